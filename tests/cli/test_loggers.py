"""`--logger` and `--trainer.logger`: real loggers, offline or with a server on localhost, and their contents."""

import csv
import importlib.metadata
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, Logger
from refusals import refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_files import OfflineRun

from aezoo.callbacks import loggers, media
from aezoo.cli import loggers as settings
from aezoo.cli.main import main
from aezoo.errors import AezooError

# of W&B and MLflow
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]
FAST = [
    "--model=linear_ae", "--data.name=digits", "--trainer.max_epochs=1", "--trainer.limit_train_batches=3",
    *(f"--{name}.every_n_epochs=0" for name in ("samples", "traversal", "latents", "filters")),
]  # fmt: skip
RUN = Path("runs/linear_ae-digits/0")
ALL = "--logger=tensorboard,csv,wandb,mlflow"


@pytest.fixture(autouse=True)
def _offline_in_an_empty_folder(tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))


def fit(*flags):
    main(["fit", *FAST, "--reconstructions.every_n_epochs=0", "--projector.n=0", *flags])


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def scalars(run):
    """The steps of each scalar of TensorBoard."""
    found = EventAccumulator(str(run), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [event.step for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def mlflow_client(address):
    from mlflow import MlflowClient  # takes a second

    return MlflowClient(address)


def local_mlflow(run):
    client = mlflow_client(f"sqlite:///{run.absolute() / 'mlflow/mlflow.db'}")
    (experiment,) = (one for one in client.search_experiments() if one.name == "aezoo")
    return client, client.search_runs([experiment.experiment_id])


def names_of(client, run_id, folder):
    return [Path(file.path).name for file in client.list_artifacts(run_id, folder)]


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_loggers_contain_a_run_and_its_continuation():
    main(["fit", *FAST, ALL, "--histograms.every_n_epochs=1", "--projector.n=20"])
    assert [path.name for path in Path().iterdir()] == ["runs"] and list(RUN.parent.iterdir()) == [RUN]
    assert {"config.yaml", "checkpoints", "pictures", "metrics.csv", "csv", "wandb", "mlflow", "loggers.json"} <= {
        path.name for path in RUN.iterdir()
    }
    picture, weight = "pictures/01 reconstructions", "weights/decoder.0.weight"
    text = (RUN / "config.yaml").read_text()

    # TensorBoard
    board = EventAccumulator(str(RUN))
    board.Reload()
    assert picture in board.Tags()["images"] and weight in board.Tags()["histograms"]
    assert "config/text_summary" in board.Tags()["tensors"] and (RUN / "projector/codes.tsv").is_file()
    # CSV
    lines = rows(RUN / "csv/metrics.csv")
    assert [row["step"] for row in lines if row["train/loss"]] == ["2"] and any(row["test/loss"] for row in lines)
    loss = float(next(row["val/loss"] for row in lines if row["val/loss"]))
    assert yaml.safe_load((RUN / "csv/hparams.yaml").read_text())["data.name"] == "digits"
    # W&B
    run = OfflineRun(RUN)
    assert run.history["val/loss"] == pytest.approx([loss]) and "test/loss" in run.history
    assert run.history["best/loss"] == pytest.approx([loss])
    assert run.config["model"] == "linear_ae" and run.config["data.name"] == "digits"
    (shown,) = run.history[f"{picture}.filenames"]
    assert (run.files[0].parent / "files" / shown[0]).read_bytes().startswith(b"\x89PNG")
    assert len(run.history[f"{weight}.values"][0]) + 1 == len(run.history[f"{weight}.bins"][0])
    parameters = sum(run.history[f"{weight}.values"][0])
    assert parameters == 64 * run.config["model.latent_dim"]
    table = run.files[0].parent / "files" / run.history["config.path"][0]
    assert yaml.safe_load(table.read_text())["data"] == [[text]]
    assert run.history["projector/codes.nrows"] == [20]
    # MLflow
    client, (found,) = local_mlflow(RUN)
    run_id = found.info.run_id
    assert found.info.status == "FINISHED" and found.info.run_name == "linear_ae-digits/0"
    assert found.data.params["model"] == "linear_ae" and found.data.params["data.name"] == "digits"
    assert found.data.metrics["best/loss"] == pytest.approx(loss)
    assert [(point.step, point.value) for point in client.get_metric_history(run_id, "val/loss")] == [
        (2, pytest.approx(loss))
    ]
    images = names_of(client, run_id, "images")
    for name in (picture, weight):
        assert any(file.startswith(name.replace("/", "~")) and file.endswith(".png") for file in images)
    assert Path(client.download_artifacts(run_id, "config.yaml")).read_text() == text
    codes = rows(Path(client.download_artifacts(run_id, "projector/codes.csv")))
    assert len(codes) == 20 and {"z0", "label"} <= codes[0].keys()
    assert found.info.artifact_uri.startswith(RUN.absolute().as_uri())

    # a resumed run has the loggers of its config.yaml
    before = len(lines)
    main(["fit", f"--resume={RUN}", "--trainer.max_epochs=2"])
    assert [path.name for path in Path().iterdir()] == ["runs"] and list(RUN.parent.iterdir()) == [RUN]
    lines = rows(RUN / "csv/metrics.csv")
    assert len(lines) > before and [row["step"] for row in lines if row["train/loss"]] == ["2", "5"]
    assert not list((RUN / "csv").glob("metrics-*"))
    assert scalars(RUN)["val/loss"] == [2, 5]
    again = OfflineRun(RUN)
    assert len(again.files) == 2 and set(again.ids) == set(run.ids) and len(set(run.ids)) == 1
    assert len(again.history["val/loss"]) == 2
    client, (found,) = local_mlflow(RUN)
    assert found.info.run_id == run_id and found.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run_id, "val/loss")] == [2, 5]
    assert len(names_of(client, run_id, "images")) > len(images)


@pytest.mark.slow
def test_files_of_a_moved_run_are_where_it_is():
    first = loggers.MLflow(Path("runs/a/0"), experiment_name="aezoo", run_name="a/0")
    first.finalize("success")
    Path("runs/a").rename("moved")
    second = loggers.MLflow(Path("moved/0"), experiment_name="aezoo", run_name="moved/0")
    assert second.run_id == first.run_id
    media.log_picture(trainer_of(second), "pictures/x", np.zeros((4, 6, 3), np.uint8), b"")
    (picture,) = Path().rglob("*.png")
    assert picture.is_relative_to("moved/0/mlflow/artifacts")
    assert os.environ.get("MLFLOW_TRACKING_URI") is None


@pytest.mark.slow
def test_loggers_of_the_trainer_are_added(monkeypatch, tmp_path):
    (tmp_path / "other").mkdir()
    other = f"{{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}/other, name: x, version: y}}}}"
    fit("--trainer.logger", "CSVLogger", f"--trainer.logger+={other}")
    assert list(RUN.glob("events*")) and rows(RUN / "csv/metrics.csv")
    assert (RUN / "metrics.csv").is_file() and (RUN / "checkpoints/last.ckpt").is_file()
    assert rows(tmp_path / "other/x/y/metrics.csv") and not (tmp_path / "other/x/y/checkpoints").exists()
    # only missing loggers are added, and the run folder stays the same
    fit("--logger=csv", "--trainer.logger+=TensorBoardLogger", "--resume=off")
    second = RUN.parent / "1"
    assert {"csv", "metrics.csv", "config.yaml", "checkpoints"} <= {path.name for path in second.iterdir()}
    assert scalars(second)["val/loss"] == [2]
    assert [path.name for path in Path().iterdir()] == ["runs"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--logger=none"], ["--logger=false"], ["--trainer.logger=false"]], ids=str)
def test_no_logger_still_gives_a_run_folder(flags):
    fit(*flags)
    assert sorted(path.name for path in RUN.iterdir() if path.name != ".lock") == [
        "checkpoints", "config.yaml", "metrics.csv", "pictures", "report.html", "run.json",
    ]  # fmt: skip


@pytest.mark.slow
def test_files_name_loggers_and_flags_override_them():
    Path("mine.yaml").write_text("logger: [csv]\n")
    fit("-c", "mine.yaml")
    run = Path("runs/mine/0")
    assert (run / "csv").is_dir() and not list(run.glob("events*"))
    fit("-c", "mine.yaml", "--logger", "tensorboard")
    assert not (run.parent / "1/csv").exists() and list((run.parent / "1").glob("events*"))
    # evaluations only log if requested
    before = rows(run / "csv/metrics.csv")
    main(["test", f"--ckpt_path={run}"])
    assert rows(run / "csv/metrics.csv") == before
    main(["test", f"--ckpt_path={run}", "--logger=csv"])
    assert [row["test/loss"] != "" for row in rows(run / "csv/metrics.csv")][len(before) :] == [True]


@pytest.mark.slow
def test_two_processes_log_once():
    flags = ["--reconstructions.every_n_epochs=1", "--projector.n=0", ALL, "--trainer.devices=2"]
    command = [sys.executable, "-m", "aezoo", "fit", *FAST, *flags, "--trainer.accelerator=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in Path().iterdir()] == ["runs"] and [*RUN.parent.iterdir()] == [RUN]
    assert len([*RUN.glob("checkpoints/*.ckpt")]) == 2 and scalars(RUN)["val/loss"] == [2]
    assert [row["step"] for row in rows(RUN / "csv/metrics.csv") if row["val/loss"]] == ["2"]
    run = OfflineRun(RUN)
    assert len(run.files) == 1 and len(run.history["val/loss"]) == 1
    client, (found,) = local_mlflow(RUN)
    assert [point.step for point in client.get_metric_history(found.info.run_id, "val/loss")] == [2]
    images = names_of(client, found.info.run_id, "images")
    assert sum("reconstructions" in name and name.endswith(".png") for name in images) == 1


# ---- MLflow's server -------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server with an SQLite store."""
    port = free_port()
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", f"{tmp_path}/files"]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--workers", "1"], stdout=log, stderr=log, start_new_session=True, cwd=tmp_path
        )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, (tmp_path / "server.log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
def test_runs_are_continued_on_a_server_of_mlflow(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "digits")
    fit("--logger=mlflow", "--reconstructions.every_n_epochs=1")
    main(["fit", f"--resume={RUN}", "--trainer.max_epochs=2", "--model.lr=0.01"])
    client = mlflow_client(server)
    (found,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "linear_ae-digits/0"
    assert [point.step for point in client.get_metric_history(found.info.run_id, "val/loss")] == [2, 5]
    # MLflow does not allow changing a parameter
    assert found.data.params["model.lr"] == "0.001"
    names = names_of(client, found.info.run_id, "images")
    assert {re.search(r"step\+(\d+)", name)[1] for name in names if "reconstructions" in name} == {"3", "6"}
    assert not (RUN / "mlflow").exists() and [path.name for path in Path().iterdir()] == ["runs"]


@pytest.mark.slow
def test_server_that_is_away_is_named_at_the_start(capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    line = refused(capsys, "fit", *FAST, "--logger=mlflow")
    assert "MLflow cannot use http://127.0.0.1:" in line and "remove mlflow from --logger" in line
    assert not RUN.exists()


@pytest.mark.slow
def test_failing_server_gets_its_values_later(monkeypatch):
    run = Path("runs/a/0")
    logger = loggers.MLflow(run, experiment_name="aezoo")
    client = logger.experiment
    send, down = client.log_batch, [True]

    def log_batch(*args, **kwargs):
        if down[0]:
            raise ConnectionError("no route to host")
        return send(*args, **kwargs)

    monkeypatch.setattr(client, "log_batch", log_batch)
    monkeypatch.setattr(loggers, "_PAUSE", 0.0)
    logger.log_metrics({"a (b)": 1.0}, step=1)
    with pytest.warns(UserWarning, match="did not accept metrics: no route to host"):
        logger.save()
    # further warnings would be errors here
    logger.log_metrics({"a (b)": 2.0}, step=2)
    logger.save()
    with pytest.warns(UserWarning, match="2 values could not be sent to MLflow"):
        logger.close()
    down[0] = False
    logger.finalize("success")
    _, (found,) = local_mlflow(run)
    history = client.get_metric_history(found.info.run_id, "a b")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 2.0)] and found.info.status == "FINISHED"


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, None), (True, None), ("csv", ["csv"]), ("CSV, wandb", ["csv", "wandb"]), (["csv", "csv"], ["csv"]),
        ("[mlflow, csv]", ["mlflow", "csv"]), ("none", []), (False, []), ("false", []), ([], []), ("null", None),
    ],
    ids=str,
)  # fmt: skip
def test_setting_names_loggers(setting, expected):
    assert settings.names(setting) == expected


@pytest.mark.parametrize(
    ("setting", "guess"), [("tensorbord", "tensorboard"), ("csv,mlflw", "mlflow"), (["wandB", "wnadb"], "wandb")]
)
def test_unknown_logger_suggests_the_nearest(setting, guess):
    with pytest.raises(AezooError, match=f"did you mean {guess}\\? --logger takes tensorboard, csv, wandb, mlflow"):
        settings.names(setting)


@pytest.mark.slow
def test_unknown_logger_is_refused_in_one_line(capsys):
    assert "did you mean wandb?" in refused(capsys, "fit", *FAST, "--logger=wand")
    assert "'' is not known" in refused(capsys, "fit", *FAST, "--logger=")
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--logger=wandb", "--trainer.logger=WandbLogger", "--trainer.logger+=WandbLogger"])
def test_missing_package_is_named_with_its_extra(capsys, monkeypatch, flag):
    real = importlib.metadata.distribution

    def distribution(name):
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(settings.metadata, "distribution", distribution)
    # a folder left by another run is not a package
    Path("wandb").mkdir()
    assert "W&B is not installed: pip install '.[wandb]' in a checkout of aezoo" in refused(capsys, "fit", *FAST, flag)


def test_extras_of_loggers_exist():
    extras = importlib.metadata.metadata("aezoo").get_all("Provides-Extra")
    for kind in settings.KINDS.values():
        assert set(re.findall(r"\.\[(\w+)\]", kind.advice)) <= set(extras)


def test_loggers_with_given_folders_are_not_moved():
    ours = Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=Namespace(save_dir="", prefix="p"))
    theirs = Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=Namespace(save_dir="there"))
    assert settings.split([ours, theirs]) == ([theirs], {"csv": {"save_dir": "", "prefix": "p"}})
    assert settings.split(theirs) == (theirs, {}) and settings.split(ours) == (None, {"csv": dict(ours.init_args)})
    assert settings.split(None) == (None, {}) and settings.split(False) == (False, {})


def test_marked_loggers_keep_their_arguments_and_lists():
    (marked,) = settings.with_folder({"class_path": "WandbLogger", "init_args": {"project": "p"}})
    assert marked == {
        "class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "p", "save_dir": ""},
    }  # fmt: skip
    other = {"class_path": "CSVLogger", "init_args": {"save_dir": "there"}}
    assert settings.with_folder([other, "my.Logger"]) == [other, "my.Logger"]
    assert settings.with_folder(False) is False and settings.with_folder(None) is None


@pytest.mark.parametrize(
    ("foreign", "fit", "kinds"),
    [(None, True, ["TensorBoard"]), (True, True, ["TensorBoard"]), (False, True, None), (None, False, None)],
)
def test_default_is_tensorboard_for_a_fit(foreign, fit, kinds):
    made = settings.make(None, foreign, {}, Path("runs/a/0"), None, fit, True)
    assert made is False if kinds is None else [type(logger).__name__ for logger in made] == kinds


def test_other_ranks_make_no_run_of_wandb_or_mlflow():
    made = settings.make("wandb,mlflow,csv", None, {}, Path("runs/a/0"), None, True, writes=False)
    assert [type(logger).__name__ for logger in made] == ["DummyLogger", "DummyLogger", "StepLogger"]
    assert not Path("runs").exists()


# ---- CSV -------------------------------------------------------------------------------------------------------------


def step_logger(folder, resumed_at=None):
    return loggers.StepLogger(folder.parent.parent, folder.parent.name, folder.name, resumed_at=resumed_at)


def test_continued_csv_moves_rows_that_are_written_again():
    run = Path("runs/a/0")
    first = step_logger(run)
    for step in range(4):
        first.log_metrics({"train/loss": torch.tensor(step / 2)}, step)
    first.save()
    first.log_metrics({"test/loss": 7.0}, 2)
    first.finalize("success")
    path = run / "csv/metrics.csv"
    with path.open("a") as file:
        file.write("4")  # truncated by a kill
    resumed = step_logger(run, 2)
    resumed.log_metrics({"train/loss": 9.0, "val/loss": 1.0}, 2)
    resumed.finalize("success")
    kept = [(row["step"], row["train/loss"], row["val/loss"], row["test/loss"]) for row in rows(path)]
    assert kept == [("0", "0.0", "", ""), ("1", "0.5", "", ""), ("2", "", "", "7.0"), ("2", "9.0", "1.0", "")]
    assert [row["train/loss"] for row in rows(run / "csv/metrics-0.csv")][:5] == ["0.0", "0.5", "1.0", "1.5", ""]
    # nothing comes after the checkpoint, so nothing is moved
    step_logger(run, 3).log_metrics({"train/loss": 8.0}, 3)
    assert len(rows(path)) == 4 and len(list((run / "csv").glob("metrics-*"))) == 1


def test_csv_survives_a_kill_while_its_columns_change(monkeypatch):
    run = Path("runs/a/0")
    logger = step_logger(run)
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    logger.log_metrics({"b": 1.0}, 1)
    with pytest.raises(KeyboardInterrupt):
        logger.save()
    assert [row["a"] for row in rows(run / "csv/metrics.csv")] == ["1.0"]


# ---- other loggers ---------------------------------------------------------------------------------------------------


class Plain(Logger):
    """A third-party logger with only the methods that Lightning needs."""

    name, version = "plain", "0"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def log_metrics(self, metrics, step=None):
        self.seen.append((metrics, step))

    def log_hyperparams(self, params, *args, **kwargs):
        self.seen.append(params)


class Pictures(Plain):
    def log_image(self, key, images, step=None):
        self.seen.append((key, [image.shape for image in images], step))


class Broken(Plain):
    def log_image(self, key, images, step=None):
        raise OSError("disk\nfull")


def trainer_of(*found, rank=0):
    return SimpleNamespace(loggers=[*found], global_step=5, is_global_zero=rank == 0)


def log_everything(trainer):
    media.log_picture(trainer, "pictures/x", np.zeros((4, 6, 3), np.uint8), b"")
    values = torch.arange(10.0)
    media.log_histogram(trainer, "weights/x", lambda writer: None, lambda: media.bars_of(values))
    media.log_text(trainer, "config", "a: 1")
    media.log_hyperparameters(trainer, {"model": "vae"})
    media.log_results(trainer, {"best/loss": 1.0})
    media.log_embedding(trainer, "codes", torch.ones(3, 2), {}, None, lambda folder: None)


def test_other_loggers_get_what_they_can_take():
    plain, pictures = Plain(), Pictures()
    log_everything(trainer_of(plain, pictures))
    assert plain.seen == [{"model": "vae"}, ({"best/loss": 1.0}, 5)]
    assert pictures.seen[0] == ("pictures/x", [(4, 6, 3)], 5)
    assert pictures.seen[1][0] == "weights/x" and pictures.seen[1][1][0][2] == 3
    assert pictures.seen[2:] == plain.seen


def test_other_ranks_log_nothing():
    pictures = Pictures()
    log_everything(trainer_of(pictures, rank=1))
    assert pictures.seen == []


def test_broken_logger_warns_once_and_disturbs_no_other():
    broken, pictures = Broken(), Pictures()
    with pytest.warns(UserWarning, match="Broken could not log everything: OSError: disk full") as warned:
        log_everything(trainer_of(broken, pictures))
    assert len(warned) == 1 and len(pictures.seen) == 4


@pytest.mark.slow
def test_wide_codes_are_given_by_principal_components():
    logger = loggers.MLflow(Path("runs/a/0"), experiment_name="aezoo")
    media.log_embedding(trainer_of(logger), "codes", torch.randn(9, 300), {"label": torch.arange(9)}, None, print)
    client, (found,) = local_mlflow(Path("runs/a/0"))
    table = rows(Path(client.download_artifacts(found.info.run_id, "projector/codes.csv")))
    assert [*table[0]] == [*(f"PC {i}" for i in range(9)), "label"] and [row["label"] for row in table] == [
        *"012345678"
    ]


def test_csv_logger_ignores_pictures(tmp_path):
    log_everything(trainer_of(CSVLogger(tmp_path, name="x", version="0")))
    assert yaml.safe_load((tmp_path / "x/0/hparams.yaml").read_text()) == {"model": "vae"}
