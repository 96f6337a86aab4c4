"""The command line: fast commands, short names, recipes, runs from checkpoints, one-line errors."""

import atexit
import contextlib
import csv
import gc
import inspect
import os
import re
import subprocess
import sys
import warnings
from importlib import abc
from importlib.util import spec_from_loader
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from refusals import refused
from representative_models import others_slow

import aezoo
import aezoo.cli
from aezoo.cli import LIGHTNING_COMMANDS, recipes, short_help
from aezoo.cli import main as cli_main
from aezoo.cli.config_resolution import name_data
from aezoo.cli.main import main
from aezoo.cli.parsing import plain_message
from aezoo.data import DataModule
from aezoo.io.checkpoint import resolve_checkpoint

OFF = [f"--{name}.every_n_epochs=0" for name in ("reconstructions", "samples", "traversal", "latents", "filters")]
QUICK = ["--data.name=digits", "--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--projector.n=0", *OFF]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(*flags):
    main(["fit", *QUICK, *flags])


@pytest.mark.slow
def test_model_with_unloadable_checkpoints_is_not_trained(capsys, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    code = (
        "    def __init__(self, input_shape, *, f=len, latent_dim: int = 2):\n        super().__init__(input_shape)\n"
    )
    code = f"from aezoo.models.variational.vae import VAE\nclass Odd(VAE):\n{code}        self.save_hyperparameters()\n"
    Path("odd.py").write_text(code)
    line = refused(capsys, "fit", *QUICK, "--model", "odd.Odd")
    assert "Odd could not be loaded from its checkpoint: its hyperparameters: 'f' is a builtin_function" in line
    assert not Path("runs").exists()


# ---- light commands --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [["list"], ["recipes"], ["--help"], ["--version"], ["info", "vae"], ["cp", "vae", "v.yaml"], ["report", "run"]],
)
def test_light_commands_need_no_torch(argv):
    Path("run/checkpoints").mkdir(parents=True)
    code = f"import sys; from aezoo.cli.main import main; main({argv!r}); assert 'torch' not in sys.modules"
    code += "; print('light')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("light"), done.stderr


@pytest.mark.parametrize("whole", [True, False])
def test_garbage_collection_is_paused_during_imports(monkeypatch, whole):
    seen = []

    class Trained(abc.Loader):
        def exec_module(self, module):
            seen.append(gc.isenabled())
            module.main = lambda argv: seen.append(gc.isenabled())

    class Finder:
        def find_spec(self, name, *_):
            return spec_from_loader(name, Trained()) if name == "aezoo.cli.lightning_cli" else None

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.setattr(sys, "argv", ["aezoo", "fit"])
    monkeypatch.setattr(gc, "freeze", lambda: seen.append("kept"))  # freeze would keep the garbage of the tests
    monkeypatch.setattr(atexit, "register", seen.append)
    monkeypatch.setitem(sys.modules, "aezoo.cli.lightning_cli", None)  # restored after the test
    monkeypatch.setattr(aezoo.cli, "lightning_cli", None, raising=False)
    del sys.modules["aezoo.cli.lightning_cli"], aezoo.cli.lightning_cli
    main(None if whole else ["fit"])
    assert seen == [False, *["kept", gc.unfreeze] * whole, True]


@pytest.mark.parametrize(
    ("command", "shows"),
    [("list", "--family"), ("embed", "--nearest"), ("tune", "--search.SETTING")],
)
def test_help_command_matches_help_flag(command, shows, capsys):
    said = []
    for argv in (["help", command], [command, "--help"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert not end.value.code
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and shows in said[0]


# defaults that the short help describes in words, since they depend on the data, the model or the run
IN_WORDS = {
    "--data.size": (None, "as they are"),
    "--data.batch_size": (128, "16 to 128"),
    "--trainer.max_epochs": (20, "20 or more"),
    "--trainer.precision": (None, "32-true"),
    "--name": (None, "recipe, or model-data"),
    "--logger": (None, "tensorboard"),
    "--samples.every_n_epochs": (None, "auto"),
    "--predictions.folder": ("", "the run's folder"),
}


@pytest.mark.parametrize("command", LIGHTNING_COMMANDS)
def test_short_help_fits_one_screen_and_needs_no_torch(command, capsys):
    outputs = []
    for argv in ([command, "--help"], ["help", command], [command, "--model", "vae", "-h"]):
        main(argv)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]
    lines = outputs[0].splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    assert f"aezoo {command} --help_all" in outputs[0]
    code = (
        f"import sys; from aezoo.cli.main import main; main([{command!r}, '--help'])\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", LIGHTNING_COMMANDS)
def test_short_help_states_flags_and_defaults_of_the_parser(command, monkeypatch):
    from aezoo.cli import lightning_cli

    class Made(Exception):
        pass

    def stop(self, parser, arguments):
        raise Made

    made = []
    monkeypatch.setattr(lightning_cli.AezooCLI, "parse_arguments", stop)
    monkeypatch.setattr(lightning_cli.flag_help, "explain", lambda parser, _: made.append(parser))
    with pytest.raises(Made), contextlib.ExitStack() as ends:
        lightning_cli.AezooCLI([command], ends)
    (parser,) = made
    known = {option: action for action in parser._actions for option in action.option_strings}
    vae = inspect.signature(aezoo.model_class("vae")).parameters
    for group in short_help.COMMANDS[command][1].values():
        for line in group:
            for flag in re.findall(r"--[\w.]+\w", f"{line.flag} {line.meaning}"):
                name = flag.removeprefix("--model.")
                assert flag in known or flag in ("--resume", "--model.KEY", "--model.help") or name in vae, flag
            flag = re.search(r"--[\w.]+", line.flag)[0]
            if flag in IN_WORDS and line.default != "the run's":
                assert (known[flag].default, line.default) == IN_WORDS[flag]
            elif line.default not in ("", "the run's", "the model's"):
                of = known["--data.name" if flag == "--data" else flag].default
                assert str(of) == line.default, flag
    for example in short_help.COMMANDS[command][2]:
        words = example.split()
        assert words[0] == command
        assert all(word in known or word == "-c" or word[8:] in vae for word in words if word.startswith("-"))


@pytest.mark.slow
def test_help_describes_command_specific_flags(capsys):
    for command, checkpoint in (("fit", "to continue from its newest complete"), ("test", "whose best")):
        with pytest.raises(SystemExit):
            main([command, "--help_all"])
        text = " ".join(capsys.readouterr().out.split())
        assert text.startswith(f"usage: aezoo [options] {command}")  # also for `python -m aezoo`
        assert "A name of `aezoo recipes`, or a YAML file." in text and "--allow PKG Let a configuration" in text
        assert checkpoint in text and "registry" not in text.split("--ckpt_path CKPT_PATH", 2)[-1]
        assert "--weights_only" not in text and "A model of `aezoo list`" in text and "aezoo.models" not in text
        assert ("--resume RUN|auto Continue a run" in text) == (command == "fit")
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "conditional_vae"])
    text = capsys.readouterr().out
    assert "--model.latent_dim" in text and "input_shape" not in text and "num_classes" not in text


@pytest.mark.parametrize("flag", ["resume", "allow"])
def test_resume_and_allow_are_refused_in_config_files(flag, capsys):
    Path("mine.yaml").write_text(f"model: vae\n{flag}: auto\n")
    assert f"{flag} is not read from a file: give --{flag}" in refused(capsys, "fit", "-c", "mine.yaml")


@pytest.mark.slow
def test_stray_arguments_and_unknown_classes_are_refused(capsys):
    assert "'vae' does not belong to a flag: a model is --model vae, a recipe or a file is -c vae" in refused(
        capsys, "fit", "vae"
    )
    line = refused(capsys, "reconstruct", "runs/vae/0")
    assert line.endswith("to a flag: a run is --ckpt_path runs/vae/0, what to work on is --input runs/vae/0")
    for after in ([], ["--data=digits"]):
        line = refused(capsys, "fit", "--model=vae", "--model.latent_dim", *after)
        assert line == "aezoo: --model.latent_dim needs a value"
    line = refused(capsys, "fit", "--model=vae", "--trainer.callbacks+=Foo")
    assert "trainer.callbacks: no class is named Foo" in line and "--trainer.callbacks.help" in line
    for name in ("input_shape", "num_classes"):
        assert f"--model.{name} is determined by the data" in refused(capsys, "fit", "--model=vae", f"--model.{name}=3")
    assert "did you mean --resume?" in refused(capsys, "fit", "--model=vae", "--resme=auto")


@pytest.mark.slow
def test_data_flag_accepts_a_name(capsys):
    given = ["--data", "digits", "--data=shapes", "--data", "a.YAML", "--data={name: b}", "--model=vae", "--data"]
    named = [
        "--data.name",
        "digits",
        "--data.name=shapes",
        "--data",
        "a.YAML",
        "--data={name: b}",
        "--model=vae",
        "--data",
    ]
    assert name_data(given) == named
    assert name_data(["--data", "--model"]) == ["--data", "--model"]
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.logger=false"]
    main(["fit", "--model=linear_ae", "--data", "digits", *short])
    Path("mine.yaml").write_text("model: linear_ae\ndata: digits\n")
    main(["fit", "-c", "mine.yaml", "--resume=auto", *short])
    for run in ("linear_ae-digits", "mine"):
        config = yaml.safe_load(Path("runs", run, "0", "config.yaml").read_text())
        assert config["data"]["name"] == "digits" and config["data"]["batch_size"] == 32
    assert "embed needs a trained model" in refused(capsys, "embed", "--data", "digits")
    assert "unknown data 'digts', did you mean 'digits'?" in refused(capsys, "fit", "--model=vae", "--data", "digts")
    Path("list.yaml").write_text("- 1\n")
    for file in ("nothere.yaml", "list.yaml"):
        line = refused(capsys, "fit", "--model=vae", "--data", file)
        assert line == f"aezoo: --data {file}: no such file, or not a file with settings in YAML"


@pytest.mark.slow
def test_class_instantiation_error_is_reported(capsys):
    wrong = "{class_path: EarlyStopping, init_args: {monitr: val/loss}}"
    line = refused(capsys, "fit", "--model=vae", f"--trainer.callbacks+={wrong}")
    assert line == "aezoo: trainer.callbacks: Option 'monitr' is not accepted"
    # jsonargparse's message for a logger whose package is missing
    message = (
        "Does not validate against any of the Union subtypes\nErrors:\n"
        "  - Problem with given class_path 'lightning.pytorch.loggers.WandbLogger':\n"
        "      Requirement 'wandb>=0.12.10' not met.\n      HINT: Try running `pip install -U wandb`\n"
        "  - Expected a <class 'bool'>\n  - Expected a <class 'NoneType'>\nGiven value type: <class 'str'>"
    )
    reason = "WandbLogger: Requirement 'wandb>=0.12.10' not met. HINT: Try running `pip install -U wandb`"
    assert plain_message(message, None) == reason


@pytest.mark.slow
def test_list_shows_name_family_and_paper_and_filters(capsys):
    main(["list"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == aezoo.list_models()
    assert all("http" in row for row in rows)
    main(["list", "topk*", "sparse*", "--family", "sparse"])
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()] == [
        "sparse_ae_kl",
        "sparse_ae_l1",
        "topk_sae",
    ]


def test_info_lists_hyperparameters_and_counts_parameters(capsys):
    main(["info", "linear_ae", "--shape", "30"])
    out = capsys.readouterr().out
    assert "latent_dim: int = 16" in out and "size of the code" in out and "||x - x_hat||^2" in out
    assert f"{30 * 16 + 16 + 16 * 30 + 30:,} parameters" in out and "code shape (16,)" in out


def test_cp_copies_a_recipe_and_keeps_an_existing_file(capsys):
    main(["cp", "vae", "mine/my.yaml"])
    assert Path("mine/my.yaml").read_text() == recipes.find_recipe("vae").read_text()
    assert "--force" in refused(capsys, "cp", "vae", "mine/my.yaml")


@pytest.mark.slow
def test_console_script_exits_0_without_repr():
    done = subprocess.run([sys.executable, "-m", "aezoo", "list"], capture_output=True, text=True)
    assert done.returncode == 0 and "object at" not in done.stdout + done.stderr


@pytest.mark.slow
def test_closed_pipe_is_not_an_error():
    done = subprocess.run(f"{sys.executable} -m aezoo list | head -1", shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_unencodable_characters_are_replaced_in_output():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "aezoo", "list", "factorized_prior"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and "(Ball? et al. 2017)" in done.stdout, done.stderr


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_saved_model_is_refused_where_checkpoint_is_needed(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help_all"])
    assert "saved model" not in " ".join(capsys.readouterr().out.split())
    saved = aezoo.save_model(aezoo.create_model("dense_ae", input_shape=(1, 8, 8)), "saved")
    assert "saved is a saved model, not a checkpoint" in refused(capsys, command, "--ckpt_path", str(saved))
    assert "saved model" not in refused(capsys, command, "--ckpt_path", "nothing")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["ft"], "did you mean 'fit'"),
        (["list", "nothing*"], "no model matches"),
        (["list", "--family", "sparce"], "unknown family"),
        (["info", "vea"], "did you mean 'vae'"),
        (["info", "Dense_10"], "dense_10 is a recipe, not a model: aezoo fit -c dense_10 trains it"),
        (["fit"], "which model?"),
        (["fit", "--model", "vea"], "did you mean 'vae'"),
        (["fit", "--model"], "--model needs a value"),
        (["fit", "-c", "veu"], "did you mean 'vae'"),
        (["fit", "-c", "http://example.org/x.yaml"], "can only be read from disk"),
        (["fit", "--model", "vae", "--data.nme", "digits"], "did you mean --data.name"),
        (["fit", "--model", "vae", "--trainer.max_epoch", "1"], "did you mean --trainer.max_epochs"),
        (["fit", "--model", "vae", "--model.latent_dmi", "1"], "did you mean --model.latent_dim"),
        (["fit", "-c", "vae", "--model.latent_dmi", "1"], "did you mean --model.latent_dim"),
        (["fit", "--model", "vae", "--model.latent_dim", "abc"], "latent_dim takes int, got abc"),
        (["fit", "--model", "vae", "--model.latent_dim", "0"], "latent_dim must be at least 1, got 0"),
        (["fit", "--model", "vae", "--model.lr", "0"], "lr must be above 0"),
        (["fit", "--model", "vae", "--model.likelihood", "foo"], "unknown likelihood 'foo'"),
        (["fit", "--model", "vae", "--trainer.max_epochs", "x"], "trainer.max_epochs takes int, got x"),
        (
            ["fit", "--model", "vae", "--compile", "fast"],
            "compile takes one of auto, off, default, reduce-overhead, max-autotune, got fast",
        ),
        (["fit", "--model", "vae", "--data.memory", "foo"], "data.memory takes one of auto, on, off, got foo"),
        (["fit", "--model", "vae", "--data.name", "digit"], "did you mean 'digits'"),
        (["fit", "--model", "vae", "--data.batch_size", "0"], "at least 1"),
        (["fit", "--model", "conv_ae", "--data.name", "array", "--data.root", "no.npy"], "no.npy does not exist"),
        (["fit", "--model", "vae", "--optimizer", "AdamW"], "unknown flag --optimizer"),
        (["fit", "--model", "vae", "--data", "CIFAR10"], "did you mean 'cifar10'"),
        (["fit", "--model", "vae", "--model.latent_dim", "99999999999"], "vae of this size does not fit in memory"),
        (["fit", "-model", "vae"], "unknown flag -model, did you mean --model?"),
        (["fit", "--model", "vae", "-model.latent_dim", "2"], "did you mean --model.latent_dim?"),
        (["help", "ft"], "did you mean 'fit'"),
        (["test", "--model", "vae"], "needs a trained model"),
        (["test", "--ckpt_path", "nothing"], "no checkpoint at nothing"),
        (["test", "--ckpt_path", "https://example.org/a.ckpt"], "only be loaded from disk"),
    ],
)
def test_invalid_command_is_refused_in_one_line(capsys, argv, words):
    assert words in refused(capsys, *argv)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("val_check_interval=1000", "less than or equal to the number of the training batches (3)"),
        ("limit_val_batches=0.0001", "Please increase the `limit_val_batches` argument"),
        ("limit_train_batches=0.0001", "Please increase the `limit_train_batches` argument"),
        ("limit_test_batches=0.0001", "trainer.limit_test_batches is 0.0001, less than one of 6 batches"),
        ("callbacks+=DeviceStatsMonitor", "a package is missing"),
    ],
)
def test_setting_that_does_not_fit_data_is_refused(capsys, monkeypatch, flag, words):
    from lightning.pytorch.callbacks import device_stats_monitor

    monkeypatch.setattr(device_stats_monitor, "_PSUTIL_AVAILABLE", False)
    assert words in refused(capsys, "fit", "--model=linear_ae", *QUICK, f"--trainer.{flag}")
    assert not list(Path("runs").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "as YAML"),
        ("just words", "contains no settings"),
        ("model: vea", "did you mean 'vae'"),
        ("model: {class_path: vae, init_args: {latent: 2}}", "did you mean 'latent_dim'"),
        ("model: vae\ntrainer: {max_epoch: 2}", "did you mean trainer.max_epochs"),
        ("model: vae\ncompile: fast", "compile takes one of auto, off, default, reduce-overhead, max-autotune, got"),
        ("model: vae\ncompile: on", "max-autotune, got on"),
    ],
)
def test_invalid_config_file_is_refused_in_one_line(capsys, text, words):
    Path("my.yaml").write_text(text)
    assert words in refused(capsys, "fit", "-c", "my.yaml")


def test_vector_model_refuses_images_before_training(capsys):
    np.save("x.npy", np.random.default_rng(0).random((100, 30), dtype=np.float32))
    assert "convolutions take" in refused(capsys, "fit", "--model", "conv_ae", "--data.name", "x.npy")


@pytest.mark.slow
def test_unscaled_table_trains_by_default():
    np.save("table.npy", np.random.default_rng(0).normal(size=(300, 30)))
    main(["fit", "--model", "vae", "--data.name", "table.npy", "--trainer.max_epochs", "1", *OFF])
    assert aezoo.load_model("runs/vae-table/0").input_shape == (30,)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fit_writes_files_and_names_next_commands(capsys):
    fit("--model", "vae", "--model.latent_dim", "3")
    out = capsys.readouterr()
    run = Path("runs/vae-digits/0")
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "checkpoints"} and list(run.glob("events*"))
    names = {path.name for path in (run / "checkpoints").iterdir()}
    # the slash in val/loss does not make a folder
    assert names == {"best-000-3.ckpt", "last.ckpt", "last.ckpt.json", "finished.json"}
    assert "test/loss" in out.out and "aezoo reconstruct --ckpt_path runs/vae-digits/0" in out.out
    assert "litlogger" not in out.out + out.err and "litmodels" not in out.out + out.err
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["class_path"] == "vae" and config["model"]["init_args"]["latent_dim"] == 3
    assert config["seed_everything"] == 0
    assert "input_shape" not in config["model"]["init_args"]


@pytest.mark.slow
def test_unregistered_class_is_named_by_import_path(capsys, monkeypatch, tmp_path):
    code = "from aezoo.models.classic.dense_ae import DenseAE\n\n\nclass MyAE(DenseAE):\n    pass\n"
    Path("my_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    mine = ["--model", "my_module.MyAE"]
    fit(*mine, "--model.latent_dim=3")
    assert capsys.readouterr().out.startswith("MyAE: ")
    (run,) = map(str, Path("runs").glob("*/0"))
    assert run.startswith("runs/MyAE-")
    fit(*mine, "--model.latent_dim=3", "--trainer.max_epochs=2", "--resume=auto")
    assert [path.name for path in Path(run).parent.iterdir()] == ["0"]
    line = refused(capsys, "test", "--ckpt_path", run)
    assert "pass -c RUN/config.yaml --model your_module.YourClass to test and predict" in line
    main(["test", "--ckpt_path", run, "-c", f"{run}/config.yaml", *mine])


@pytest.mark.slow
def test_suggested_commands_quote_folder_names(capsys):
    fit("--model=linear_ae", "--trainer.default_root_dir=my runs")
    out = capsys.readouterr().out
    assert "Next: aezoo reconstruct --ckpt_path 'my runs/linear_ae-digits/0'\n" in out
    assert "Next: tensorboard --logdir 'my runs'\n" in out
    with pytest.raises(SystemExit):
        main(["fit", "--resume", "my runs/linear_ae-digits/0"])
    assert capsys.readouterr().err.endswith("aezoo test --ckpt_path 'my runs/linear_ae-digits/0'\n")
    main(["cp", "vae", "my vae.yaml"])
    assert "aezoo fit -c 'my vae.yaml'" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("fraction", ["0.1", "0"])
def test_test_is_suggested_only_with_test_split(capsys, fraction):
    fit("--model=linear_ae", "--checkpoints.save_top_k=0", f"--data.test_fraction={fraction}")
    out = capsys.readouterr().out
    assert ("Next: aezoo test" in out) == (fraction != "0")
    assert ("Next: aezoo embed --ckpt_path runs/linear_ae-digits/0 --split val\n" in out) == (fraction == "0")


@pytest.mark.slow
def test_run_without_test_batches_ends_with_summary(capsys):
    fit("--model=linear_ae", "--trainer.limit_test_batches=0")
    assert "Next: aezoo test --ckpt_path runs/linear_ae-digits/0\n" in capsys.readouterr().out


@pytest.mark.slow
def test_every_run_has_a_folder_and_reusable_config():
    fit("--model=dense_ae")
    fit("--model", "dense")
    main(["fit", "-c", "runs/dense_ae-digits/1/config.yaml"])
    assert sorted(p.name for p in Path("runs/dense_ae-digits").iterdir()) == ["0", "1"]
    first, again = (aezoo.load_model(run) for run in ("runs/dense_ae-digits/1", "runs/config/0"))
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)  # the same seed gives the same weights


@pytest.mark.slow
def test_second_run_works_without_logger():
    for number in "01":
        fit("--model", "linear_ae", "--trainer.logger", "false")
        assert Path(f"runs/linear_ae-digits/{number}/config.yaml").is_file()


@pytest.mark.slow
def test_named_loggers_write_into_the_run_folder(capsys):
    run = Path("runs/linear_ae-digits/0")
    fit("--model=linear_ae", "--trainer.logger", "[TensorBoardLogger, CSVLogger]")
    assert list(run.glob("events*")) and "val/loss" in (run / "csv/metrics.csv").read_text()
    before = set((run / "csv/metrics.csv").read_text().splitlines())
    main(["fit", f"--ckpt_path={run}", "--trainer.max_epochs=2"])
    assert before < set((run / "csv/metrics.csv").read_text().splitlines())
    header, *lines = (run / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "val/loss"} <= set(header.split(",")) and [line.split(",")[0] for line in lines] == ["0", "1"]
    Path("mine.yaml").write_text("model: linear_ae\ntrainer: {logger: CSVLogger}\n")
    fit("-c", "mine.yaml")
    assert {"metrics.csv", "csv", "config.yaml", "checkpoints"} <= {path.name for path in Path("runs/mine/0").iterdir()}
    assert [path.name for path in Path().iterdir() if path.is_dir()] == ["runs"]


def test_warnings_are_one_line_without_source(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    cli_main._shorten_warnings()
    assert warnings.formatwarning("two\nlines", UserWarning, "a.py", 3) == "aezoo: warning: two lines\n"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["model: topk_sae", "model: {class_path: topk_sae}", "model: {class_path: TopKSAE}"])
def test_yaml_takes_registry_names_and_flags_win(form):
    Path("mine.yaml").write_text(f"{form}\ndata: {{name: digits}}\n")
    fit("-c", "mine.yaml", "--model.k", "5")
    model = aezoo.load_model("runs/mine/0")
    assert type(model).__name__ == "TopKSAE" and model.k == 5


@pytest.mark.slow
def test_yaml_on_and_off_are_read_as_strings():
    Path("mine.yaml").write_text("model: linear_ae\ncompile: off\ndata: {name: digits, memory: on}\n")
    fit("-c", "mine.yaml")
    config = yaml.safe_load(Path("runs/mine/0/config.yaml").read_text())
    assert (config["compile"], config["data"]["memory"]) == ("off", "on")


def test_run_folder_is_refused_as_recipe(capsys):
    Path("runs/vae/0").mkdir(parents=True)
    Path("runs/vae/0/config.yaml").write_text("model: vae\n")
    line = refused(capsys, "fit", "-c", "runs/vae/0")
    assert "run folder: give -c runs/vae/0/config.yaml for its settings, or --ckpt_path runs/vae/0" in line


@pytest.mark.slow
def test_local_file_takes_precedence_over_recipe():
    Path("vae").write_text("model: linear_ae\n")
    fit("-c", "vae")
    assert type(aezoo.load_model("runs/vae/0")).__name__ == "LinearAE"


@pytest.mark.slow
def test_run_below_one_epoch_tests_and_saves(capsys):
    fit("--model", "vae", "--data.batch_size", "100", "--trainer.max_epochs", "5", "--trainer.max_steps", "3")
    assert "test/loss" in capsys.readouterr().out
    assert torch.load("runs/vae-digits/0/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.slow
def test_importance_samples_tighten_the_log_likelihood(capsys):
    fit("--model", "vae", "--model.latent_dim", "3", "--data.batch_size", "100")
    found = []
    for n in ("1", "300"):
        capsys.readouterr()
        main(["test", "--ckpt_path", "runs/vae-digits/0", "--importance_samples", n])
        found.append(float(re.search(r"test/log_likelihood +(-?[\d.]+)", capsys.readouterr().out)[1]))
    assert found[0] < found[1]
    refused(capsys, "test", "--ckpt_path", "runs/vae-digits/0", "--importance_samples", "0")


@pytest.mark.slow
def test_checkpoint_suffices_to_validate_test_predict_resume(capsys):
    fit("--model", "vae", "--model.latent_dim", "3", "--data.batch_size", "100")
    for path in ("runs/vae-digits/0", "runs/vae-digits", "runs/vae-digits/0/checkpoints/last.ckpt"):
        main(["test", "--ckpt_path", path])
    main(["validate", "--ckpt_path", "runs/vae-digits/0"])
    assert "val/log_likelihood" in capsys.readouterr().out
    main(["predict", "--ckpt_path", "runs/vae-digits/0"])
    with np.load("runs/vae-digits/0/predictions.npz") as found:
        n = DataModule("digits").tensors("test")[0].shape[0]
        assert found["code"].shape == (n, 3) and found["reconstruction"].shape == (n, 1, 8, 8)
    main(["fit", "--ckpt_path", "runs/vae-digits/0", "--trainer.max_epochs", "2"])
    checkpoint = torch.load("runs/vae-digits/0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6 and checkpoint["epoch"] == 1
    assert checkpoint["hyper_parameters"]["latent_dim"] == 3
    assert checkpoint["datamodule_hyper_parameters"]["batch_size"] == 100
    assert not Path("runs/vae-digits/1").exists()


@pytest.mark.slow
def test_refused_fit_keeps_run_config(capsys):
    fit("--model", "dense_ae")
    config = Path("runs/dense_ae-digits/0/config.yaml")
    before = config.read_text()
    for flag in ("--model=linear_ae", "--model.latent_dim=7"):
        line = refused(capsys, "fit", "--ckpt_path=runs/dense_ae-digits/0", "--trainer.max_epochs=2", flag)
        assert "do not fit the model" in line and config.read_text() == before


@pytest.mark.slow
def test_weights_only_checkpoint_cannot_resume_training(capsys):
    fit("--model=dense_ae", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_weights_only=true",
        "--trainer.callbacks.dirpath=lean")  # fmt: skip
    (lean,) = map(str, Path("lean").iterdir())
    line = refused(capsys, "fit", "--ckpt_path", lean, "--trainer.max_epochs=2")
    assert f"{lean} contains only weights" in line and "aezoo.load_model" in line
    main(["test", "--ckpt_path", lean])
    out = capsys.readouterr().out
    assert "test/loss" in out and "run folder" not in out


@pytest.mark.slow
def test_flags_override_checkpoint_with_notice(capsys):
    fit("--model", "dense_ae")
    main(["fit", "--ckpt_path", "runs/dense_ae-digits/0", "--trainer.max_epochs", "2", "--model.lr", "0.5"])
    assert "model.lr is 0.5, the checkpoint has 0.001" in capsys.readouterr().err
    assert yaml.safe_load(Path("runs/dense_ae-digits/0/config.yaml").read_text())["model"]["init_args"]["lr"] == 0.5
    saved = torch.load("runs/dense_ae-digits/0/checkpoints/last.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 0.5
    line = refused(capsys, "fit", "--ckpt_path", "runs/dense_ae-digits/0", "--model.optimizer", "sgd")
    assert "contains the state of adam" in line
    line = refused(capsys, "test", "--ckpt_path", "runs/dense_ae-digits/0", "--model.latent_dim", "7")
    assert "do not fit the model" in line
    line = refused(capsys, "test", "--ckpt_path", "runs/dense_ae-digits/0", "--data.name", "mnist5k")
    assert "trained on samples of shape 1x8x8" in line


@pytest.mark.slow
def test_moved_checkpoint_keeps_its_model_name(tmp_path):
    fit("--model", "sparse")
    (tmp_path / "elsewhere.ckpt").write_bytes(Path("runs/sparse_ae_l1-digits/0/checkpoints/last.ckpt").read_bytes())
    main(["test", "--ckpt_path", "elsewhere.ckpt"])


@pytest.mark.slow
def test_best_checkpoint_is_taken_regardless_of_time():
    fit("--model", "dense_ae", "--trainer.max_epochs", "3", "--checkpoints.save_top_k=-1")
    files = sorted(Path("runs/dense_ae-digits/0/checkpoints").glob("best-*.ckpt"))
    assert len(files) == 3
    os.utime(files[0])  # as after a copy or from an archive
    assert resolve_checkpoint("runs/dense_ae-digits/0") == files[-1]


@pytest.mark.slow
def test_second_model_checkpoint_does_not_change_best(capsys):
    # the last epoch, saved by Lightning's callback, is not the best
    diverges = ["--model.optimizer=sgd", "--model.lr=0.3", "--trainer.max_epochs=4"]
    fit("--model=dense_ae", *diverges, "--trainer.callbacks+=ModelCheckpoint")
    out, home = capsys.readouterr().out, Path("runs/dense_ae-digits/0/checkpoints")
    (best,) = home.glob("best-*.ckpt")
    assert "best-003" not in best.name and list(home.glob("epoch=3-*.ckpt"))
    assert re.search(rf"best checkpoint +{best}\n", out)
    main(["test", f"--ckpt_path={best}", "--trainer.callbacks+=ModelCheckpoint"])
    assert re.search(r"test/loss .*", out)[0].split() == re.search(r"test/loss .*", capsys.readouterr().out)[0].split()


@pytest.mark.slow
@pytest.mark.parametrize("without", [["--trainer.limit_val_batches", "0"], ["--data.val_fraction", "0"]])
def test_best_checkpoint_uses_training_loss_without_validation(capsys, without):
    fit("--model", "vae", *without)
    (best,) = Path("runs/vae-digits/0/checkpoints").glob("best-*.ckpt")
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*callbacks used to create the checkpoint")
        main(["test", "--ckpt_path", "runs/vae-digits/0"])
    assert re.search(rf"best checkpoint +{best}\n", capsys.readouterr().out)


@pytest.mark.slow
def test_resume_with_validation_forgets_training_scores():
    # its loss is far below any validation loss with beta 0
    fit("--model", "vae", "--model.beta", "0", "--trainer.limit_val_batches", "0", "--trainer.max_epochs", "3")
    more = ["--trainer.limit_val_batches", "1.0", "--trainer.max_epochs", "4", "--model.beta", "1"]
    main(["fit", "--ckpt_path", "runs/vae-digits/0", *more])
    state = torch.load("runs/vae-digits/0/checkpoints/last.ckpt", weights_only=True)["callbacks"]
    (saver,) = (found for key, found in state.items() if key.startswith("Checkpoints"))
    (stopper,) = (found for key, found in state.items() if key.startswith("EarlyStop"))
    assert saver["monitor"] == stopper["monitor"] == "val/loss"
    assert saver["best_model_score"] == stopper["best_score"] == saver["current_score"]


def validated(run):
    """The validated epochs of a run, counted from 1, and its setting of them."""
    with (Path("runs") / run / "metrics.csv").open() as file:
        epochs = [int(row["epoch"]) + 1 for row in csv.DictReader(file) if row["val/loss"]]
    settings = yaml.safe_load((Path("runs") / run / "config.yaml").read_text())
    return epochs, settings["trainer"]["check_val_every_n_epoch"]


@pytest.mark.slow
def test_short_epochs_are_not_all_validated_by_default(capsys):
    few = [
        *("--model=dense_ae", "--model.hidden_dims=[4]", "--trainer.max_epochs=20", "--trainer.limit_train_batches=1"),
        *("--trainer.limit_val_batches=1", "--trainer.limit_test_batches=0", "--logger=none", "--report.html=false"),
    ]
    fit(*few, "--name=run")
    found = validated("run/0")
    assert found == ([1, *range(2, 21, 2)], 0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [int(line[6:].partition("/")[0]) for line in lines if "val/loss" in line] == found[0] and len(lines) == 20
    # its config.yaml gives the same run
    main(["fit", "-c", "runs/run/0/config.yaml", "--name=again"])
    assert validated("again/0") == found
    fit(*few, "--name=each", "--trainer.check_val_every_n_epoch=1")
    assert validated("each/0") == ([*range(1, 21)], 1)
    # a fraction of an epoch validates each epoch; a run that reaches its time limit ends with a validation
    fit(*few, "--name=share", "--trainer.val_check_interval=1.0", "--trainer.max_time=00:00:00:01")
    epochs = validated("share/0")[0]
    assert epochs == [*range(1, len(epochs) + 1)]


@pytest.mark.slow
def test_schedule_accumulation_and_clipping_work_together():
    fit(
        "--model=vae", "--model.lr_schedule=cosine", "--model.warmup_steps=2",
        "--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=1.0", "--model.optimizer=adamw",
    )  # fmt: skip


@pytest.mark.slow
def test_optional_callbacks_are_added_by_class_name():
    fit(
        "--model=vae", "--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.9",
        "--trainer.callbacks+=BetaAnnealing", "--trainer.callbacks.n_steps=10",
    )  # fmt: skip


def test_model_and_data_hyperparameters_do_not_clash():
    import inspect

    data = set(inspect.signature(DataModule).parameters)
    for name in aezoo.list_models():
        assert not data & set(inspect.signature(aezoo.model_class(name)).parameters)


def test_command_line_classes_are_picklable():
    import pickle

    from aezoo.cli import lightning_cli

    for cls in (lightning_cli.AezooCLI, lightning_cli.SaveConfig, lightning_cli.Parser):
        assert pickle.loads(pickle.dumps(cls)) is cls


def test_too_many_cpu_processes_are_refused(capsys, monkeypatch):
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    from aezoo.cli import trainer_settings

    monkeypatch.setattr(_MultiProcessingLauncher, "launch", None)
    monkeypatch.setattr(trainer_settings, "available_cores", lambda: 2)
    flags = ["fit", *QUICK, "--model=vae", "--trainer.accelerator=cpu", "--trainer.strategy=ddp_fork"]
    assert "has 2 core(s): give at most 8" in refused(capsys, *flags, "--trainer.devices=1000")
    assert not Path("runs").exists()
    # cluster launchers count cores differently
    monkeypatch.setattr(trainer_settings, "available_cores", lambda: 0)
    settings = SimpleNamespace(root_device=torch.device("cpu"), launcher=None)
    trainer_settings.check_processes(SimpleNamespace(strategy=settings, num_devices=8))


@pytest.mark.parametrize("built", [True, False])
def test_missing_gpu_is_reported_with_remedy(capsys, monkeypatch, built):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    line = refused(capsys, "fit", *QUICK, "--model=vae", "--trainer.accelerator=gpu")
    assert "give --trainer.accelerator cpu or auto" in line and ("install torch with GPU support" in line) is not built


@pytest.mark.slow
def test_ctrl_c_keeps_checkpoint_and_prints_resume_command():
    import signal

    command = [sys.executable, "-u", "-m", "aezoo", "fit", "--model", "vae", "--trainer.max_epochs", "10000", *OFF]
    command += ["--data.name", "digits", "--data.batch_size", "500", "--projector.n", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("epoch 3/"):
            process.send_signal(signal.SIGINT)
            break
    with process.stdout as rest:
        lines += rest.read().splitlines()
    assert process.wait() == 130, "".join(lines)
    assert "Traceback" not in "".join(lines)
    assert lines[-1].strip() == "continue with: aezoo fit --ckpt_path runs/vae-digits/0"
    step = int(re.search(r"interrupted at epoch \d+, step (\d+); last saved", "".join(lines))[1])
    checkpoint = torch.load("runs/vae-digits/0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == step
    main(["fit", "--ckpt_path", "runs/vae-digits/0", "--trainer.max_epochs", str(checkpoint["epoch"] + 2)])


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", others_slow(recipes.recipes(), kept=("vae", "dense_ae")))
def test_every_recipe_trains_and_states_command_and_figure(name, fashion_files, photos_with_masks):
    head = [line for line in recipes.recipes()[name].read_text().splitlines() if line.startswith("#")]
    is_published = head[2].startswith("# target: ")
    assert head[1].startswith(f"# aezoo fit -c {name}")
    assert re.search(r"# reached: (test|train)/\S+ -?\d", head[-1]) or (is_published and "not run yet" in head[-1])
    flags = [f"--data.root={fashion_files}"] if "fashion" in name else []
    if name.startswith("mvtec_"):  # pretrained weights need a network
        layers = "torchvision:resnet18,pretrained=false,out_indices=1:2"
        flags = [f"--data.root={photos_with_masks}", "--data.size=32", f"--model.init_args.features={layers}"]
    elif is_published:  # MNIST itself needs a network
        flags = ["--data.name=mnist5k", "--importance_samples=2"]
    short = [f"--trainer.limit_{split}_batches=1" for split in ("train", "val", "test")]
    main(["fit", "-c", name, *flags, "--trainer.max_epochs=1", *short, "--projector.n=0", *OFF])
    assert Path(f"runs/{name}/0/checkpoints/last.ckpt").is_file()


@pytest.fixture(scope="session")
def photos_with_masks(tmp_path_factory):
    """Photographs of noise in MVTec's layout."""
    root = tmp_path_factory.mktemp("bottle")
    rng = np.random.default_rng(0)
    for folder, n in (("train/good", 8), ("test/good", 2), ("test/cut", 2), ("ground_truth/cut", 2)):
        (root / folder).mkdir(parents=True)
        is_mask = folder.startswith("ground_truth")
        for i in range(n):
            pixels = rng.integers(1, 256, (40, 40) if is_mask else (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}{'_mask' * is_mask}.png")
    return root


@pytest.fixture(scope="session")
def fashion_files(tmp_path_factory):
    """Idx files of 200 random images in torchvision's folder of Fashion-MNIST."""
    root = tmp_path_factory.mktemp("data")
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", 200), ("t10k", 50)):
        pixels, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n).astype(np.uint8)
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + values.tobytes())
    return root


LONG = "x" * 300


@pytest.mark.parametrize(
    "argv",
    [
        ["cp", "vae", LONG], ["fit", "-c", LONG], ["fit", "--model", "vae", "--data", LONG], ["fit", "--resume", LONG],
        ["test", "--ckpt_path", LONG], ["reconstruct", "--ckpt_path", LONG],
    ],
)  # fmt: skip
def test_overlong_path_is_refused_in_one_line(argv, capsys):
    line = refused(capsys, *argv)
    assert "File name too long" in line and "default_root_dir" not in line


@pytest.mark.parametrize("argv", [["fit", "--model", "vae", "--data"], ["test", "--ckpt_path"], ["cp", "vae"]])
def test_path_with_newline_is_escaped_in_error(argv, capsys):
    Path("a\nb\x1b[31m.npy").write_text("no array")
    assert "a\\nb\\x1b[31m.npy" in refused(capsys, *argv, "a\nb\x1b[31m.npy")


@pytest.mark.slow
def test_checkpoint_replaced_while_it_is_read_is_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--data", "digits", "--trainer.max_epochs", "1", "--projector.n", "0"]
    main(["fit", "--model", "vae", "--model.hidden_dims", "[8]", *quick])
    (best,) = Path("runs/vae-digits/0/checkpoints").glob("best*.ckpt")
    load, replaced = torch.load, []

    def replace_after_first(file, *args, **settings):
        content = load(file, *args, **settings)
        if not replaced:
            replaced.append(best.rename(best.with_name("best-007-9.ckpt")))
        return content

    monkeypatch.setattr(torch, "load", replace_after_first)
    main(["test", "--ckpt_path", "runs/vae-digits/0"])
    assert replaced


@pytest.mark.slow
def test_a_run_has_the_name_that_was_given(capsys):
    run, own = Path("runs/my_run/0"), ["--model=dense_ae", "--model.latent_dim=3", "--name=my run"]
    fit(*own)
    assert [path.name for path in Path("runs").iterdir()] == ["my_run"]
    head = (run / "config.yaml").read_text().splitlines()[1]
    assert head.startswith("# aezoo fit --data.name=digits ") and head.endswith("--model.latent_dim=3 '--name=my run'")
    # resuming does not change the recorded command
    fit(*own, "--resume=auto", "--trainer.max_epochs=2")
    main(["fit", f"--ckpt_path={run}", "--trainer.max_epochs=3"])
    assert [path.name for path in run.parent.iterdir()] == ["0"]
    assert (run / "config.yaml").read_text().splitlines()[1] == head
    line = refused(capsys, "fit", f"--ckpt_path={run}", "--name=other")
    assert line == f"aezoo: {run} keeps its name: drop --name other, or start a new run without --ckpt_path"
    main(["fit", "-c", str(run / "config.yaml"), "--trainer.max_epochs=1"])
    assert sorted(path.name for path in run.parent.iterdir()) == ["0", "1"]
