"""The benchmark of the commands: what it measures and skips, and which method its report names as best."""

import csv
import shutil

import numpy as np
import pytest

from aezoo import DataModule
from aezoo.errors import AezooError
from aezoo.tasks.samples import SampleSet
from benchmarks import report, report_tasks, tasks
from benchmarks.common import ResultsCSV, as_text, processor_name, read_csv
from benchmarks.report_tasks import (
    COMPARISONS,
    Figure,
    bits_at_targets,
    comparison_text,
    mean_over_classes,
    merge_rows,
    sentences,
)

SMALL = ["--data", "digits", "--seeds", "1", "--steps", "2", "--classes", "1"]
SMALL += ["--fit-rows", "120", "--test-rows", "40", "--accelerator", "cpu"]


def rows_of(folder, command):
    (path,) = folder.glob(f"tasks-{command}-fp32-pt*-cpu*.csv")
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# command: python -m benchmarks.tasks --data digits --seeds 1 --steps 2")
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    tasks.main([*SMALL, "--models", "vae", "--results", str(folder)])
    return folder


# ---- measured rows ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_command_has_model_and_baseline_rows(results):
    for command in tasks.COMMANDS:
        rows = rows_of(results, command)
        optional = {"BM3D"}  # does not take 8 x 8 images
        assert not [row["error"] for row in rows if row["error"] and row["method"] not in optional], command
        assert {"ours", "baseline"} <= {row["kind"] for row in rows}, command
        steps = {"steps=2"}
        assert {row["budget"] for row in rows} == steps and {row["code_size"] for row in rows} == {"16"}, command
        assert {row["processor"] for row in rows} == {as_text(processor_name())}, command
    methods = {command: {row["method"] for row in rows_of(results, command)} for command in tasks.COMMANDS}
    assert {"vae", "the noisy samples", "median filter"} <= methods["denoise"]
    assert {"vae, nll", "vae, nap", "isolation forest", "5th-nearest neighbour"} <= methods["detect"]
    others = {"UMAP, 16 numbers", "t-SNE, 16 numbers, transductive"}
    assert {"vae", "raw values", "PCA, 16 numbers"} | others == methods["embed"]
    assert {"vae", "vae, -ELBO", "gzip", "PNG", "JPEG", "PCA 16 + the same coder"} <= methods["compress"]


@pytest.mark.slow
def test_pca_and_mean_baselines_use_training_samples(results):
    data = DataModule("digits")
    train, test = (SampleSet.from_data(data, "train").subsample(120), SampleSet.from_data(data, "test").subsample(40))
    a, b = (part.rows(range(len(part))).flatten(1).double().numpy() for part in (train, test))
    kept = np.linalg.svd(a - a.mean(0), full_matrices=False)[2][:16]
    centred = b - a.mean(0)
    mse = {row["method"]: float(row["mse"]) for row in rows_of(results, "reconstruct")}
    assert mse["PCA, 16 numbers"] == pytest.approx(np.square(centred - centred @ kept.T @ kept).mean(), rel=1e-3)
    assert mse["mean sample"] == pytest.approx(np.square(centred).mean(), rel=1e-3)


@pytest.mark.slow
def test_memorised_samples_are_detected(results):
    rows = {row["method"]: row for row in rows_of(results, "generate")}
    assert "vae, prior gmm" in rows
    copied, real = rows["training samples, copied"], rows["real samples, held out"]
    assert float(copied["closer"]) == 1 and float(copied["distance"]) == 0 and float(copied["precision"]) == 1
    assert float(real["closer"]) == 0.5
    assert float(rows["vae, own prior"]["fid"]) > float(real["fid"])


@pytest.mark.slow
def test_existing_rows_are_kept(results, tmp_path, capsys):
    shutil.copytree(results, tmp_path, dirs_exist_ok=True)
    before = {command: rows_of(tmp_path, command) for command in tasks.COMMANDS}
    tasks.main([*SMALL, "--models", "vae", "--results", str(tmp_path)])
    assert {
        command: rows_of(tmp_path, command) for command in tasks.COMMANDS
    } == before and "seed" not in capsys.readouterr().out


# ---- planned runs ----------------------------------------------------------------------------------------------------


def plan_of(folder, *words):
    arguments = tasks.parse_arguments([*words, "--results", str(folder)])
    tables = {
        command: tasks.CommandTable(folder / f"{command}.csv", tasks.KEY, "it", arguments.again)
        for command in arguments.commands
    }
    data = {"name": "mnist5k", "root": "", "batch_size": 128, "size": None}
    return tasks.plan(arguments, data, (1, 28, 28), tables), tables


def test_model_trains_once_and_baselines_run_once_per_seed(tmp_path):
    specs, _ = plan_of(tmp_path, "--seeds", "2")
    runs = [(spec["model"], spec["seed"]) for spec in specs]
    assert len(runs) == len({*runs}) and {seed for _, seed in runs} == {0, 1}
    for command, models in tasks.MODELS.items():
        assert {spec["model"] for spec in specs if command in spec["commands"]} == {*models}
        bringing = [(spec["seed"], task) for spec in specs for task in spec["baselines"].get(command, [])]
        # baselines of compress do not depend on the seed; codes of another size have their own
        once = [(0, "lossy"), (0, "lossless, binarised"), (0, "lossless, bytes"), (0, "lossy")]
        assert bringing == (once if command == "compress" else [(0, ""), (1, "")]), command
    sizes = {spec["head"]["code_size"] for spec in specs if ":" not in spec["model"]}
    assert sizes == {32} and {spec["head"]["code_size"] for spec in specs} == {32, 32 * 7 * 7}


def test_rate_models_form_one_curve(tmp_path):
    specs, _ = plan_of(tmp_path, "--commands", "compress", "--seeds", "1")
    curves = {}
    for spec in specs:
        name, colon, lam = spec["model"].partition(":")
        if colon:
            assert spec["registered"] == name and spec["hyperparameters"]["lam"] == float(lam)
            curves.setdefault(name, []).append(float(lam))
    assert len(curves) == 2 and all(len({*lams}) == 3 for lams in curves.values())


def test_old_name_of_the_option_is_accepted():
    assert tasks.parse_arguments(["--verbs", "embed"]).commands == ["embed"]


def test_failed_rows_are_retried_on_request(tmp_path):
    words = ("--commands", "embed", "--models", "vae", "--seeds", "1")
    (spec,), tables = plan_of(tmp_path, *words)
    head = spec["head"] | {"budget": tasks.budget(tasks.parse_arguments([]), "embed")}
    tables["embed"].replace(head, [{"method": "vae", "kind": "ours", "error": "it broke"}])
    assert plan_of(tmp_path, *words)[0] == []
    assert len(plan_of(tmp_path, *words, "--again", "failed")[0]) == 1
    # rows of a key are added and deleted together
    whole = [{"method": "vae", "kind": "ours", "probe": 0.5}, {"method": "raw values", "kind": "baseline"}]
    tables["embed"].replace(head, whole)
    assert [row.get("error") for row in tables["embed"].rows] == [None, None]
    assert plan_of(tmp_path, *words, "--again", "failed")[0] == []
    assert len(plan_of(tmp_path, *words, "--again")[0]) == 1


def test_refused_models_are_skipped_with_a_reason(tmp_path, capsys):
    specs, _ = plan_of(
        tmp_path, "--commands", "embed", "--models", "topk_sae", "vae", "--seeds", "1", "--code-size", "8"
    )
    assert [spec["model"] for spec in specs] == ["vae"]
    assert "topk_sae is left out on mnist5k: k must lie" in capsys.readouterr().err
    with pytest.raises(AezooError, match="did you mean 'dense_ae'"):
        plan_of(tmp_path, "--models", "dens_ae")


# ---- continued runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Runs of embed without training: rows of a model and, if requested, of baselines."""
    asked, failing, notes = [], set(), []

    def run_rows(module, specs, *_):
        for spec in specs:
            name, brings = spec["model"], spec["baselines"].get("embed", [])
            asked.append((name, spec["seed"], bool(brings)))
            if name in failing:
                yield spec, {"error": "killed by SIGKILL", "out_of_memory": True}
                continue
            rows = [{"method": name, "kind": "ours", "probe": 0.5}]
            raw = {"method": "raw values", "kind": "baseline", "probe": 0.25, "error": notes[0] if notes else ""}
            yield spec, {"commands": {"embed": rows + [raw] * bool(brings)}}

    monkeypatch.setattr(tasks, "run_rows", run_rows)

    def run(*words):
        asked.clear()
        few = ["--commands", "embed", "--data", "digits", "--models", "linear_ae", "dense_ae", "--seeds", "1"]
        tasks.main([*few, "--results", str(tmp_path), *words])
        (path,) = tmp_path.glob("tasks-embed-*.csv")
        return [*asked], [(row["model"], row["method"], row["error"]) for row in read_csv(path)[1]]

    run.failing, run.notes = failing, notes
    return run


OURS = [("linear_ae", "linear_ae", ""), ("dense_ae", "dense_ae", "")]
RAW = ("linear_ae", "raw values", "")


def test_rows_are_keyed_by_settings_with_own_baselines(fake):
    assert fake() == ([("linear_ae", 0, True), ("dense_ae", 0, False)], [OURS[0], RAW, OURS[1]])
    for number, words in enumerate((["--code-size", "5"], ["--fit-rows", "7"], ["--test-rows", "7"], ["--steps", "7"])):
        asked, rows = fake(*words)
        assert asked == [("linear_ae", 0, True), ("dense_ae", 0, False)], words
        assert rows == [OURS[0], RAW, OURS[1]] * (number + 2)
        assert fake(*words)[0] == fake()[0] == []


def test_class_limit_affects_only_detect_settings(tmp_path):
    (spec,), tables = plan_of(tmp_path, "--commands", "detect", "embed", "--models", "vae", "--seeds", "1")
    for command in ("detect", "embed"):
        head = tasks.command_head(spec["head"], command, tasks.parse_arguments([]))
        tables[command].replace(
            head, [{"method": m, "kind": k} for m, k in (("vae, nll", "ours"), ("knn", "baseline"))]
        )
    words = ("--commands", "detect", "embed", "--models", "vae", "--seeds", "1", "--classes", "2")
    (spec,), tables = plan_of(tmp_path, *words)
    assert spec["commands"] == ["detect"] and spec["baselines"] == {"detect": [""]}
    tables["detect"].replace(
        tasks.command_head(spec["head"], "detect", tasks.parse_arguments(words)),
        [{"method": "vae, nll", "kind": "ours"}],
    )
    assert [row.get("classes", "") for row in tables["detect"].rows] == ["", "", "2"]
    assert plan_of(tmp_path, "--commands", "detect", "embed", "--models", "vae", "--seeds", "1")[0] == []


def test_missing_baselines_are_added_by_next_run(fake):
    fake.failing.add("linear_ae")
    lost = ("linear_ae", "linear_ae", "killed by SIGKILL")
    assert fake()[1] == [lost, OURS[1]]
    # with an existing model, which keeps its rows; the failed one is only repeated on request
    fake.failing.add("dense_ae")
    assert fake() == ([("dense_ae", 0, True)], [lost, OURS[1]])
    fake.failing.remove("dense_ae")
    asked, rows = fake()
    assert asked == [("dense_ae", 0, True)] and rows == [lost, OURS[1], ("dense_ae", "raw values", "")]
    assert fake()[0] == []
    fake.failing.clear()
    asked, rows = fake("--again", "failed")
    assert asked == [("linear_ae", 0, False)] and sorted(rows) == sorted([*OURS, ("dense_ae", "raw values", "")])


def test_missing_baselines_are_added_with_a_new_model(fake):
    fake.failing.update({"linear_ae", "dense_ae"})
    fake()
    assert fake()[0] == []
    asked, _ = fake("--models", "linear_ae", "vae")
    assert asked == [("vae", 0, True)]


def test_baselines_survive_model_failure_without_duplicates(fake):
    fake()
    fake.failing.add("linear_ae")
    _, rows = fake("--models", "linear_ae", "--again")
    assert rows.count(RAW) == 1 and ("linear_ae", "linear_ae", "killed by SIGKILL") in rows
    _, rows = fake("--models", "dense_ae", "--again")
    assert [row for row in rows if row[1] == "raw values"] == [("dense_ae", "raw values", "")]


def test_failed_baseline_is_measured_again_on_request(fake):
    fake.notes.append("no room")
    fake()
    fake.notes.clear()
    assert fake()[0] == []
    asked, rows = fake("--again", "failed")
    assert asked == [("linear_ae", 0, True)] and sorted(rows) == sorted([*OURS, RAW])


def test_each_compress_mode_has_its_own_baselines(tmp_path):
    words = ("--commands", "compress", "--models", "vae", "conv_vae", "bytes_vae", "--seeds", "1")
    specs, tables = plan_of(tmp_path, *words)
    assert [spec["baselines"] for spec in specs] == [
        {"compress": ["lossy", "lossless, binarised"]}, {}, {"compress": ["lossless, bytes"]},
    ]  # fmt: skip
    heads = [tasks.command_head(spec["head"], "compress", tasks.parse_arguments(words)) for spec in specs]
    for head, kinds in zip(
        heads, ({"lossy": 1}, {"lossy": 0, "lossless, binarised": 0}, {"lossless, bytes": 0}), strict=True
    ):
        rows = [{"task": task, "method": head["model"], "kind": "ours"} for task in kinds]
        tables["compress"].replace(
            head,
            rows + [{"task": "lossy", "method": "JPEG", "kind": "baseline"}] * kinds.get("lossy", 0),
        )
    # a bound is a reference of its model
    bound = {"task": "lossless, binarised", "method": "conv_vae, -ELBO", "kind": "reference"}
    tables["compress"].rows.append(heads[1] | bound)
    repairs = plan_of(tmp_path, *words)[0]
    assert [(spec["model"], spec["baselines"], spec["repairs"]) for spec in repairs] == [
        ("conv_vae", {"compress": ["lossless, binarised"]}, ["compress"]),
        ("bytes_vae", {"compress": ["lossless, bytes"]}, ["compress"]),
    ]
    # a task that a model refuses is not repeated
    tables["compress"].replace(
        heads[2], [{"task": "lossless, bytes", "method": "bytes_vae", "kind": "ours", "error": "no"}]
    )
    assert [spec["model"] for spec in plan_of(tmp_path, *words)[0]] == ["conv_vae"]


# ---- the report ------------------------------------------------------------------------------------------------------


def comparison_of(command, task=""):
    return next(comparison for comparison in COMPARISONS if (comparison.command, comparison.task) == (command, task))


def made(method, kind, seed, **cells):
    setting = {"dataset": "digits", "code_size": "16", "budget": "steps=2", "fit_rows": "9", "test_rows": "9"}
    return setting | {"method": method, "kind": kind, "seed": str(seed)} | {k: str(v) for k, v in cells.items()}


def denoised(ours, baseline):
    rows = [made("vae", "ours", seed, psnr=value) for seed, value in enumerate(ours)]
    return rows + [made("median filter", "baseline", seed, psnr=value) for seed, value in enumerate(baseline)]


def test_winning_baseline_is_reported():
    (rows,) = merge_rows(comparison_of("denoise"), denoised((10, 12, 17), (20, 22, 27)))
    assert [row["method"] for row in rows] == ["median filter", "vae"]  # best first
    assert [(row["psnr"], row["psnr_low"], row["psnr_high"], row["seeds"]) for row in rows] == [
        ("22.0", "20.0", "27.0", "3"), ("12.0", "10.0", "17.0", "3"),
    ]  # fmt: skip
    (line,) = sentences(comparison_of("denoise"), rows)
    assert line == (
        "- digits (codes of 16 numbers, steps=2): a baseline, median filter (22), is ahead of the best model, "
        "vae (12), by 10 dB."
    )


def test_winner_and_gaps_within_seed_noise_are_named():
    (rows,) = merge_rows(comparison_of("denoise"), denoised((10, 22, 23), (20, 21, 22)))
    assert rows[0]["method"] == "vae"
    (line,) = sentences(comparison_of("denoise"), rows)
    assert "a model, vae (22), is ahead of the best baseline, median filter (21), by 1 dB, within the spread" in line
    (rows,) = merge_rows(comparison_of("denoise"), denoised((21,), (21,)))
    assert "are equal" in next(sentences(comparison_of("denoise"), rows))


def test_lower_error_is_better_and_reference_is_unranked():
    rows = [made("real samples", "reference", 0, fid=0.1), made("copies", "baseline", 0, fid=3)]
    rows += [made("vae", "ours", 0, fid=5), made("conv_ae", "ours", 0, fid=4)]
    (found,) = merge_rows(comparison_of("generate"), rows)
    assert [row["method"] for row in found] == ["real samples", "copies", "conv_ae", "vae"]
    (line,) = sentences(comparison_of("generate"), found)
    assert "a baseline, copies (3), is ahead of the best model, conv_ae (4), by 1." in line
    text = report_tasks.table(comparison_of("generate"), [found])
    assert "| digits | copies | baseline | 1 | **3** |" in text and "| real samples | reference | 1 | 0.1 |" in text


def test_shared_baselines_count_once_and_report_failures():
    rows = denoised((10, 12), (20, 22)) + denoised((), (20, 22))
    rows.append(made("vae", "ours", 2, error="killed by SIGKILL"))
    (found,) = merge_rows(comparison_of("denoise"), rows)
    assert [(row["method"], row["seeds"], row["errors"]) for row in found] == [
        ("median filter", "2", ""), ("vae", "2", "killed by SIGKILL"),
    ]  # fmt: skip
    assert found[0]["psnr"] == "21.0"


def test_rows_of_different_settings_are_not_merged():
    rows = denoised((10,), (20,))
    groups = merge_rows(comparison_of("denoise"), [*rows, rows[0] | {"budget": "steps=9", "psnr": "30"}])
    assert [len(group) for group in groups] == [2, 1]
    assert comparison_text(Figure("psnr", "psnr", "high"), groups[1]) == "no baseline gets there, vae (30) does"
    assert comparison_text(Figure("ssim", "ssim", "high"), groups[1]) == "no model has a figure"


def test_detection_is_median_over_seeds_of_class_mean():
    values = {0: (0.5, 0.7), 1: (0.8, 1.0), 2: (0.6, 0.8)}
    rows = [
        made("vae, nll", "ours", seed, auroc=value, aupr=value, **{"class": str(name)})
        for seed, each in values.items()
        for name, value in enumerate(each)
    ]
    (found,) = merge_rows(comparison_of("detect"), rows + rows[:1])
    assert float(found[0]["auroc"]) == pytest.approx(0.7) and found[0]["seeds"] == "3"
    assert float(mean_over_classes(rows[:2])["aupr"]) == pytest.approx(0.6)
    # a mean over a subset of the classes is not comparable
    (found,) = merge_rows(comparison_of("detect"), [*rows, rows[5] | {"class": "2", "auroc": "", "error": "it broke"}])
    assert found[0]["seeds"] == "2" and float(found[0]["auroc"]) == pytest.approx(0.75)


def test_bits_at_target_psnr_are_interpolated():
    points = [{"bits_per_dim": str(bits), "psnr": str(psnr)} for bits, psnr in ((0.1, 15), (0.2, 19), (0.5, 21))]
    found = bits_at_targets(points)
    assert float(found["bits_17"]) == pytest.approx(0.15)  # half way
    assert float(found["bits_20"]) == pytest.approx(0.35)
    assert float(found["bits_14"]) == 0.1 and found["bits_14_most"] and not found["bits_17_most"]
    assert "bits_25" not in found and float(found["best_psnr"]) == 21
    # a quality with more bits and a lower PSNR does not count
    found = bits_at_targets([*points, {"bits_per_dim": "0.3", "psnr": "14"}])
    assert float(found["bits_17"]) == pytest.approx(0.15)


def test_unreached_psnr_target_is_reported():
    rows = [made("vae", "ours", 0, task="lossy", bits_per_dim=0.1, psnr=18)]
    rows += [made("JPEG", "baseline", 0, task="lossy", bits_per_dim=bits, psnr=10 + 20 * bits) for bits in (0.5, 1)]
    (found,) = merge_rows(comparison_of("compress", "lossy"), rows)
    lines = [*sentences(comparison_of("compress", "lossy"), found)]
    told = "a model, vae (≤ 0.1), is ahead of the best baseline, JPEG (≤ 0.5), by at most 0.4 bits/dim."
    assert f"at 17 dB: {told}" in lines[1]
    assert "at 20 dB: no model gets there, JPEG (≤ 0.5) does." in lines[2]
    assert "at 25 dB: no model gets there, JPEG (0.75) does." in lines[3]
    (found,) = merge_rows(
        comparison_of("compress", "lossless"), [made("PNG", "baseline", 0, task="lossless, bytes", bytes=3)]
    )
    assert found[0]["bytes"] == "3.0"  # lossless only


@pytest.mark.slow
def test_report_lists_task_commands_first_with_pictures(results, tmp_path, capsys):
    shutil.copytree(results, tmp_path, dirs_exist_ok=True)
    ResultsCSV(tmp_path / "speed-startup-x.csv", ("what",), "it").put({"what": "imports", "seconds": 3.0})
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "task-denoise.png").write_bytes(b"\x89PNG")
    report.main(["--results", str(tmp_path)])
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.index("[Commands for trained models: ") < text.index("[Start-up]") and "Others" not in text
    text = "\n".join((tmp_path / f"{command}.md").read_text() for command in tasks.COMMANDS)
    for command in tasks.COMMANDS:
        assert f"## {command}\n\n`tasks-{command}-fp32" in text, command
    assert "![denoise](pictures/task-denoise.png)" in text and "![embed]" not in text
    assert "- digits (codes of 16 numbers, steps=2): a baseline, PCA, 16 numbers (" in text
    assert "### lossless" in text and "| digits | vae | ours | 1 |" in text
