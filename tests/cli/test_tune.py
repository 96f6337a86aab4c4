"""`aezoo tune`: options, the record of a study, and trials that fail, hang, are pruned or are interrupted."""

import csv
import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import yaml

import aezoo
from aezoo.cli import tune
from aezoo.cli.main import main
from aezoo.errors import AezooError

STUDY = Path("runs/vae-digits-tune")
BASE = ["tune", "--model=vae", "--data=digits"]
LR = "--search.model.lr=log:1e-4:1e-1"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake(monkeypatch):
    """Fake trials: `fake(what)` sets the outcome of each one, by the number of its folder."""
    from aezoo.cli import tune_study

    def become(**what):
        monkeypatch.setenv("FAKE_FIT", json.dumps(what))

    script = Path(__file__).with_name("tune_fit.py")
    monkeypatch.setattr(tune_study, "FIT", (sys.executable, str(script)))
    return lambda **what: become(**{name.lstrip("_"): value for name, value in what.items()})


def ends(*argv, code=2):
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    assert end.value.code == code


def rows(study=STUDY):
    with (study / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "of_it"),
    [
        ("log:1e-4:1e-2", "log", (1e-4, 1e-2, 1)),
        ("float:-1:2.5", "float", (-1.0, 2.5, 1)),
        ("int:2:64", "int", (2.0, 64.0, 1)),
        ("int:2:64:2", "int", (2.0, 64.0, 2)),
        ("int:2:64:log", "int", (2.0, 64.0, 0)),
        ("bernoulli, gaussian:learned", "choice", ("bernoulli", "gaussian:learned")),
        ("[64,32],[128]", "choice", ("[64,32]", "[128]")),
        ("16,32", "choice", ("16", "32")),
    ],
)
def test_search_is_parsed_as_range_or_choices(text, kind, of_it):
    found = tune.search("model.x", text)
    assert found.kind == kind
    assert (found.choices if kind == "choice" else (found.low, found.high, found.step)) == of_it


@pytest.mark.parametrize(
    ("text", "values", "ends"),
    [
        ("log:1e-4:1e-2", {"lr": 0.003}, ("0.0001", "0.01")),
        ("int:2:64:2", {"lr": 8}, ("2", "64")),
        ("a,b,c", {"lr": "b"}, ("a", "b", "c")),
    ],
)
def test_suggested_values_are_valid_flag_text(text, values, ends):
    found = tune.search("lr", text)
    assert found.bounds() == ends
    assert found.suggest(optuna.trial.FixedTrial(values)) == str(values["lr"])


@pytest.mark.parametrize(("text", "evenly"), [("log:0.01:1", False), ("float:0.01:1", True), ("int:1:9", True)])
def test_search_kind_sets_linear_or_log_sampling(text, evenly):
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    tune.search("k", text).suggest(trial)
    assert trial.distributions["k"].log is not evenly


def test_integers_support_step_and_log_sampling():
    for text, seen in (("int:2:8:3", {2, 5, 8}), ("int:1:4:log", {1, 2, 3, 4})):
        tune_study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        trials = [tune_study.ask() for _ in range(60)]
        assert {int(tune.search("k", text).suggest(trial)) for trial in trials} == seen
    assert trials[0].distributions["k"].log


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lgo:1e-4:1e-2", "did you mean log:1e-4:1e-2?"),
        ("1e-4", "that is one value: give log:LOW:HIGH"),
        ("log:1e-4", "give log:LOW:HIGH, with numbers"),
        ("log:1e-4:x", "give log:LOW:HIGH, with numbers"),
        ("log:1e-4:inf", "give log:LOW:HIGH, with numbers"),
        ("int:2:6.5", "give int:LOW:HIGH, int:LOW:HIGH:STEP or int:LOW:HIGH:log"),
        ("int:2:8:0", "the step must be at least 1"),
        ("float:2:1", "2 is not below 1"),
        ("log:0:1", "a logarithm needs a lower end above 0"),
        ("int:0:8:log", "a logarithm needs a lower end above 0"),
        ("a,,b", "values that differ, none of them empty"),
        ("a,a", "values that differ"),
    ],
)
def test_invalid_search_is_refused_in_one_line(capsys, text, words):
    ends(*BASE, f"--search.model.lr={text}")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"aezoo: --search.model.lr {text}: ") and words in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing is searched"),
        (["--search.model.lr"], "--search.model.lr needs a range or values"),
        (["--search.model.lr", "--trials=3"], "--search.model.lr needs a range or values"),
        ([LR, LR], "--search.model.lr is given twice"),
        (["--search.=a,b"], "names no setting"),
        ([LR, "--trails=3"], "did you mean --trials?"),
        (["--serach.model.lr=a,b"], "did you mean --search?"),
        ([LR, "--trials=x"], "invalid int value: 'x'"),
        ([LR, "--trials=0"], "--trials takes a number from 1"),
        ([LR, "--direction=up"], "invalid choice: 'up'"),
        ([LR, "--timeout=nan"], "--timeout takes seconds above 0"),
        ([LR, "--monitor=loss"], "such as val/loss or train/nll"),
        ([LR, "--storage=mysql://a/b"], "give postgresql://USER@HOST/DATABASE, or a file"),
        ([LR, "--ckpt_path=runs/vae/0"], "--ckpt_path does not apply to tune"),
        ([LR, "--resume", "auto"], "--resume does not apply to tune"),
    ],
)
def test_invalid_tune_flag_is_refused_in_one_line(capsys, flags, words):
    ends(*BASE, *flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aezoo: ") and words in line and not Path("runs").exists()


def test_fit_flags_keep_order_with_similar_names():
    words = ["-c", "vae", "--model.k", "-1", "--rank_timeout=3", "--model", "vae", "--data.seed", "2"]
    options, searches, flags = tune.read([*words[:3], LR, *words[3:6], "--seed", "4", *words[6:], "--trials=2"])
    assert flags == words and options.seed == 4 and options.trials == 2 and searches[0].name == "model.lr"


@pytest.mark.slow
def test_help_and_mistakes_need_neither_torch_nor_optuna():
    for argv, code in ((["tune", "--help"], 0), (["tune", "--search.model.lr=log:1"], 2)):
        text = f"import sys; from aezoo.cli.main import main\ntry: main({argv!r})\n"
        text += "except SystemExit as end: code = end.code"
        text += "\nassert not {'torch', 'optuna'} & {*sys.modules}; print('code', code)"
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == f"code {code}", done.stderr


def test_missing_optuna_names_extra_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    ends(*BASE, LR)
    assert "pip install '.[tune]' in a checkout of aezoo" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--search.model.latent_dmi=int:2:8"], "unknown flag --model.latent_dmi, did you mean --model.latent_dim?"),
        (["--search.model.likelihood=bernoulli,gausian"], "bernoulli,gausian: gausian is not possible: "),
        (["--search.model.latent_dim=float:2:8"], "latent_dim takes int, got 2.0"),
        (["--search.model.latent_dim=int:0:8"], "latent_dim must be at least 1, got 0"),
        ([LR, "--trainer.max_epoch=3"], "did you mean --trainer.max_epochs?"),
        ([LR, "--model=vea"], "did you mean 'vae'"),
    ],
)
def test_invalid_fit_flags_are_refused_before_first_trial(capsys, fake, flags, words):
    fake()
    ends(*BASE, *flags)
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("aezoo: ") and words in line and not Path("runs").exists()


# ---- studies ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_study_finds_best_trial_and_writes_its_config(fake, capsys):
    fake()
    main([*BASE, LR, "--trials=12", "--trainer.max_epochs=5", "--trainer.devices=1"])
    table = rows()
    assert len(table) == 12 and {row["state"] for row in table} <= {"complete", "pruned"}
    whole = [row for row in table if row["state"] == "complete"]
    for row in whole:  # the best epoch is the fourth of five
        assert float(row["val/loss"]) == pytest.approx((math.log10(float(row["model.lr"])) + 3) ** 2)
        assert row["epochs"] == "5" and Path(row["run"], "log.txt").is_file()
    best = min(whole, key=lambda row: float(row["val/loss"]))
    config = yaml.safe_load((STUDY / "best.yaml").read_text())
    assert config["model"]["init_args"]["lr"] == float(best["model.lr"])
    assert config["trainer"]["callbacks"] == [{"class_path": "aezoo.callbacks.EMA"}]
    assert config["trainer"]["default_root_dir"] is None
    assert {"--trainer.max_epochs=5", "--trainer.devices=1"} <= {*config["trainer"]["words"]}
    page = (STUDY / "study.html").read_text()
    assert page.count("plotly.js v") == 1 and page.count("Plotly.newPlot(") == 5 and "default-src 'none'" in page
    out = capsys.readouterr().out
    assert f"best: trial {best['trial']}, val/loss" in out and f"aezoo fit -c {STUDY / 'best.yaml'}" in out
    main([*BASE, LR, "--trials=12", "--trainer.max_epochs=5", "--trainer.devices=1"])
    assert len(rows()) == 12  # nothing is left to do


@pytest.mark.slow
def test_trial_values_are_determined_by_seed(fake):
    fake()
    drawn = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main([*BASE, LR, "--trials=2", f"--seed={seed}", f"--study={name}"])
        drawn[name] = [row["model.lr"] for row in rows(Path(name))]
    assert drawn["a"] == drawn["b"] != drawn["c"] and len(set(drawn["a"])) == 2


@pytest.mark.slow
def test_direction_max_selects_largest_value(fake):
    fake()
    Path("mine.yaml").write_text("trainer:\n  default_root_dir: out\n")
    main([*BASE, "-c", "mine.yaml", LR, "--trials=3", "--direction=max", "--prune=off"])
    tune_study = Path("out/mine-tune")
    largest = max(rows(tune_study), key=lambda row: float(row["val/loss"]))
    assert float(largest["val/loss"]) == pytest.approx((math.log10(float(largest["model.lr"])) + 3) ** 2 + 3)
    config = yaml.safe_load((tune_study / "best.yaml").read_text())
    assert config["model"]["init_args"]["lr"] == float(largest["model.lr"])
    assert config["trainer"]["default_root_dir"] == "out"


@pytest.mark.slow
def test_failed_trials_do_not_end_study(fake, capsys):
    fake(_0="crash", _1="die", _3="nan")
    main([*BASE, LR, "--trials=4"])
    assert [row["state"] for row in rows()] == ["fail", "fail", "complete", "fail"]
    assert [row["error"] for row in rows()] == [
        "it is broken, fix it",
        "ended by SIGKILL (often: no memory left)",
        "",
        "no finite val/loss was logged",
    ]
    assert "trial 0: failed: it is broken, fix it" in capsys.readouterr().out


@pytest.mark.slow
def test_study_ends_after_three_failed_trials(fake, capsys):
    fake(_0="crash", _1="crash", _2="crash")
    ends(*BASE, LR, "--trials=9")
    assert "the first 3 trials failed, the last with: it is broken, fix it; see" in capsys.readouterr().err
    assert len(rows()) == 3


@pytest.mark.slow
def test_unpromising_trial_is_pruned(fake):
    fake(_5="bad")
    main([*BASE, LR, "--trials=6"])
    assert rows()[5]["state"] == "pruned" and float(rows()[5]["val/loss"]) == 1e6
    assert rows()[5]["epochs"] == "4" and not [*Path(rows()[5]["run"]).rglob("finished")]


@pytest.mark.slow
def test_interrupted_study_resumes_exactly(fake, capsys):
    fake()
    main([*BASE, LR, "--trials=4", "--study=whole"])
    fake(_1="interrupt")
    command = [*BASE, LR, "--trials=4", "--study=cut"]
    ends(*command, code=130)
    said = capsys.readouterr().err
    assert "1 of 4 trials are done" in said and f"continue with: aezoo {' '.join(command)}" in said
    main(command)
    whole, cut = rows(Path("whole")), rows(Path("cut"))
    assert [row["state"] for row in cut] == ["complete", "interrupted", "complete", "complete", "complete"]
    assert cut[1]["run"] == cut[2]["run"] and cut[1]["model.lr"] == cut[2]["model.lr"]
    config = yaml.safe_load(Path(cut[2]["run"], "vae-digits/0/config.yaml").read_text())
    assert "--resume=auto" in config["trainer"]["words"]
    kept = [row["model.lr"] for row in cut if row["state"] == "complete"]
    assert kept == [row["model.lr"] for row in whole]


@pytest.mark.slow
def test_truncated_trial_metrics_do_not_end_study(fake):
    fake(_0="interrupt")
    command = [*BASE, LR, "--trials=1"]
    ends(*command, code=130)
    (STUDY / "0/vae-digits/0/metrics.jsonl").write_text('{"epoch": -1, "step": 0}\n\0\0\n{"epoch": 0, "st')
    main(command)
    assert [(row["state"], row["epochs"]) for row in rows()][1:] == [("complete", "5")]


@pytest.mark.slow
def test_changed_search_needs_new_study(fake, capsys):
    fake(_0="interrupt")
    ends(*BASE, LR, "--trials=1", code=130)
    fake()
    main([*BASE, LR, "--trials=1", "--direction=max"])  # no trial was run yet, so nothing is lost
    capsys.readouterr()
    ends(*BASE, "--search.model.lr=log:1e-5:1e-2", "--trials=2", "--seed=3")
    line = capsys.readouterr().err
    assert "a study with other --direction, --search.model.lr, --seed: give another --study, or continue it: " in line
    assert f"aezoo {' '.join(BASE)} {LR} --trials=1 --direction=max" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("monitor", "words"),
    [
        ("val/los", "--monitor val/los is not logged by these runs, did you mean val/loss?"),
        ("train/kl", "--monitor train/kl is not logged by these runs: there are train/loss, val/loss"),
    ],
)
def test_an_unknown_monitor_ends_the_first_trial(fake, capsys, monitor, words):
    fake()
    ends(*BASE, LR, f"--monitor={monitor}")
    assert words in capsys.readouterr().err
    main([*BASE, LR, "--trials=1"])
    assert [row["state"] for row in rows()] == ["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["study.db", "else/where.log"])
def test_study_storage_can_be_chosen(fake, name):
    fake()
    for trials in (1, 2):
        main([*BASE, LR, f"--trials={trials}", f"--storage={name}"])
    assert len(rows()) == 2 and Path(name).is_file() and not (STUDY / "study.log").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["words.db", "words.log"])
def test_invalid_storage_file_is_refused(fake, capsys, name):
    Path(name).write_text("no record\nat all\n")
    ends(*BASE, LR, f"--storage={name}")
    assert f"cannot use {name} as a study: " in capsys.readouterr().err and not Path("runs").exists()


@pytest.mark.slow
def test_truncated_journal_line_is_removed(fake):
    fake()
    main([*BASE, LR, "--trials=1"])
    for torn in ('{"op_code":5,"wor', '{"op'):
        with (STUDY / "study.log").open("a") as file:
            file.write(torn)
        main([*BASE, LR, "--trials=2"])
        main([*BASE, LR, "--trials=3"])
    assert [row["state"] for row in rows()] == ["complete"] * 3


@pytest.mark.slow
def test_invalid_storage_file_is_not_modified(fake):
    Path("words.log").write_text("no record\nat all")
    ends(*BASE, LR, "--storage=words.log")
    assert Path("words.log").read_text() == "no record\nat all"


@pytest.mark.slow
def test_stale_lock_does_not_block_study(fake):
    fake()
    main([*BASE, LR, "--trials=1"])
    (STUDY / "study.log.lock").symlink_to(STUDY / "study.log")
    main([*BASE, LR, "--trials=2"])
    assert len(rows()) == 2


@pytest.mark.slow
def test_moved_study_continues_from_another_folder(fake, monkeypatch, capsys):
    fake(_1="interrupt")
    command = [*BASE, LR, "--trials=2", "--study"]
    ends(*command, "one/mine", code=130)
    fake()
    Path("one").rename("two")
    Path("here").mkdir()
    monkeypatch.chdir("here")
    main([*command, "../two/mine"])
    table = rows(Path("../two/mine"))
    assert [row["state"] for row in table] == ["complete", "interrupted", "complete"]
    assert [row["run"] for row in table] == ["../two/mine/0", "../two/mine/1", "../two/mine/1"]
    assert "its run: ../two/mine/" in capsys.readouterr().out


@pytest.mark.slow
def test_renamed_study_folder_continues(fake):
    fake()
    command = [*BASE, LR, "--study"]
    main([*command, "mine", "--trials=1"])
    Path("mine").rename("old")
    main([*command, "old", "--trials=2"])
    assert [row["run"] for row in rows(Path("old"))] == ["old/0", "old/1"]


@pytest.mark.slow
def test_study_name_not_folder_identifies_study_in_storage(fake, capsys):
    fake()
    command = [*BASE, LR, "--storage=all.db"]
    main([*command, "--trials=1", "--study=a/x"])
    main([*command, "--trials=2", "--study=b/x"])  # as on another machine
    first, second = rows(Path("b/x"))
    assert first["run"].endswith(f"{Path.cwd()}/a/x/0") and second["run"] == "b/x/0"
    main([*command, "--trials=1", "--study=b/x", "--study_name=y"])
    assert [row["run"] for row in rows(Path("b/x"))] == ["b/x/1"]
    capsys.readouterr()
    ends(*command, "--study=c/x", "--direction=max")
    assert "all.db contains a study with other --direction: give another --study_name, or" in capsys.readouterr().err
    assert not Path("c").exists()


@pytest.mark.slow
def test_ctrl_c_while_opening_storage_prints_continue_command(fake, capsys, monkeypatch):
    from aezoo.cli import tune_study

    fake()
    monkeypatch.setattr(tune_study.Study, "_open_study", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    ends(*BASE, LR, code=130)
    assert "aezoo: interrupted\ncontinue with: aezoo tune" in capsys.readouterr().err


@pytest.mark.slow
def test_full_disk_is_reported_and_study_continues(fake, capsys, monkeypatch):
    fake()
    main([*BASE, LR, "--trials=1"])

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(optuna.storages.journal.JournalFileBackend, "append_logs", full)
        ends(*BASE, LR, "--trials=2")
    assert "No space left on device; what was recorded is kept" in capsys.readouterr().err
    main([*BASE, LR, "--trials=2"])
    assert len(rows()) == 2


@pytest.mark.slow
def test_after_the_timeout_no_trial_is_started(fake, capsys):
    fake()
    main([*BASE, LR, "--trials=1"])
    main([*BASE, LR, "--trials=9", "--timeout=1e-9"])
    assert len(rows()) == 1 and "no further trial is started" in capsys.readouterr().err


@pytest.mark.slow
def test_real_study_trains_and_best_config_can_be_fitted(capsys):
    off = [f"--{name}.every_n_epochs=0" for name in ("reconstructions", "samples", "traversal", "latents", "filters")]
    quick = [*off, "--projector.n=0", "--trainer.max_epochs=2", "--trainer.limit_train_batches=2"]
    main([*BASE, "--search.model.latent_dim=int:2:8", "--trials=1", *quick])
    (row,) = rows()
    assert row["state"] == "complete" and row["epochs"] == "2", row
    run = Path(row["run"], "vae-digits/0")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [-1, 0, 1] and "val/loss" in lines[0] and lines[2]["step"] == 4
    assert float(row["val/loss"]) == min(line["val/loss"] for line in lines[1:]) and "train/loss" in lines[1]
    assert aezoo.load_model(run).code_shape == (int(row["model.latent_dim"]),)
    main(["fit", "-c", str(STUDY / "best.yaml"), "--trainer.fast_dev_run=true"])
    assert f"code shape ({row['model.latent_dim']},)" in capsys.readouterr().out
    text = (STUDY / "best.yaml").read_text()
    assert "EpochMetrics" not in text and f"latent_dim: {row['model.latent_dim']}" in text


def test_bad_search_space_raises_aezoo_error():
    with pytest.raises(AezooError, match="one value"):
        tune.search("model.lr", "x")
