"""report.html and run.json written by a fit."""

import json
import math

import lightning.pytorch as pl
import pytest
import torch
from callback_fakes import Fake
from lightning.pytorch.loggers import TensorBoardLogger

from aezoo.callbacks import Checkpoints, Interrupt, LearningCurves, Report
from aezoo.callbacks.base import is_enabled
from aezoo.errors import AezooError


class Ends(pl.Callback):
    """Ends a fit in the second epoch with an error or a signal."""

    def __init__(self, error):
        self.error = error

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise self.error


def record(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "0"


@pytest.mark.slow
def test_fit_leaves_a_report_and_its_record(fit, folder):
    trainer = fit(Fake((4,)), LearningCurves(), Report(), max_epochs=3)
    found, (start,) = record(folder), record(folder)["fits"]
    assert found["model"] == {"name": "Fake", "parameters": 40, "input_shape": [4], "code_shape": [4]}
    assert start["end"] == "finished" and start["epochs"] == 3 and 0 < start["seconds"] < 600
    environment = start["environment"]
    assert (
        environment["torch"] == torch.__version__ and environment["device"] == "cpu" and environment["processes"] == 1
    )
    assert found["curves"]["steps"] == 9 and not any(
        math.isnan(v) for v in found["curves"].values() if type(v) is float
    )
    page = (folder / "report.html").read_text("utf-8")
    assert "<h1>Fake</h1>" in page and "epoch 3 of 3" in page and f"{trainer.callback_metrics['val/loss']:.4g}" in page


@pytest.mark.slow
def test_report_can_be_switched_off(fit, folder):
    fit(Fake((4,)), Report(html=False))
    assert record(folder)["fits"][0]["end"] == "finished" and not (folder / "report.html").exists()
    fit(Fake((4,)), Report(), logger=TensorBoardLogger(folder.parent, name="", version="1"), fast_dev_run=True)
    assert not (folder.parent / "1" / "run.json").exists()
    with pytest.raises(AezooError, match="html"):
        Report(html="no")
    assert is_enabled(Report(html=False))


@pytest.mark.slow
@pytest.mark.parametrize(("error", "end"), [(KeyboardInterrupt(), "interrupted"), (ValueError("x"), "failed")])
def test_fit_that_does_not_end_by_itself_has_a_report(fit, folder, error, end):
    with pytest.raises((SystemExit, ValueError)):
        fit(Fake((4,)), LearningCurves(), Interrupt(), Report(), Ends(error), max_epochs=3)
    assert record(folder)["fits"][0]["end"] == end and record(folder)["fits"][0]["epochs"] == 1
    page = (folder / "report.html").read_text("utf-8")
    assert {"interrupted": "interrupted", "failed": "ended by an error"}[end] in page and "epoch 1 of 1" in page


@pytest.mark.slow
def test_continued_run_keeps_its_earlier_starts(fit, folder):
    fit(Fake((4,)), LearningCurves(), Report(), saver := Checkpoints(), enable_checkpointing=True)
    last = saver.last_model_path
    fit(Fake((4,)), LearningCurves(), Report(), Checkpoints(), enable_checkpointing=True, ckpt_path=last, max_epochs=3)
    assert [start["epochs"] for start in record(folder)["fits"]] == [2, 1]
    assert "2, of which 2 were not killed" in (folder / "report.html").read_text("utf-8")
    # a new run in the same folder is counted separately
    fit(Fake((4,)), Report())
    assert len(record(folder)["fits"]) == 1


@pytest.mark.slow
def test_failure_to_write_is_one_warning(fit, folder, monkeypatch):
    (folder / "report.html").mkdir(parents=True)
    with pytest.warns(UserWarning, match="could not write the report: cannot write .*report.html"):
        trainer = fit(Fake((4,)), Report())
    assert trainer.current_epoch == 2 and record(folder)["fits"][0]["end"] == "finished"
    monkeypatch.setattr("aezoo.callbacks.report.write_report", lambda folder: 1 / 0)
    with pytest.warns(UserWarning, match="could not write the report: division by zero"):
        assert fit(Fake((4,)), Report()).current_epoch == 2
    monkeypatch.setattr("aezoo.callbacks.report.environment", lambda trainer: 1 / 0)
    with pytest.warns(UserWarning, match="could not write the report: division by zero"):
        assert fit(Fake((4,)), Report()).current_epoch == 2
