"""Which epochs are validated if epochs are short, and the effects on other callbacks."""

import json
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from callback_fakes import Fake, FakeVAE
from lightning.pytorch.callbacks import EarlyStopping

import aezoo
from aezoo.callbacks import (
    Checkpoints,
    CodeStatistics,
    EarlyStop,
    EpochMetrics,
    Interrupt,
    LearningCurves,
    Reconstructions,
    Samples,
    ValidationSchedule,
    checkpoints,
)
from aezoo.callbacks.base import DrawingTime
from aezoo.callbacks.validation_schedule import choose_period
from aezoo.data import DataModule


def epoch_of(trainer):
    return trainer.current_epoch + 1


class Validated(pl.Callback):
    """Records the validated epochs, counted from 1."""

    def __init__(self):
        self.epochs = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.epochs.append(epoch_of(trainer))


def validated(fit, *callbacks, model=None, **options):
    """The validated epochs of a run with the schedule, with 3 training and 3 validation batches."""
    seen = Validated()
    settings = {"logger": False, "num_sanity_val_steps": 0, "max_epochs": 30} | options
    trainer = fit(model or Fake((4,)), *callbacks, seen, ValidationSchedule(), **settings)
    assert trainer.check_val_every_n_epoch == options.get("check_val_every_n_epoch", 1)
    return seen.epochs


@pytest.mark.parametrize(
    ("batches", "val_batches", "epochs", "period"),
    [
        # 10, 60 and 500 steps per epoch, 8 validation batches, without limit and for usual numbers of epochs
        (10, 8, None, 58), (10, 8, 125, 12), (10, 8, 60, 6), (10, 8, 5, 1),
        (60, 8, None, 9), (60, 8, 20, 2), (60, 8, 19, 1),
        (500, 8, None, 1), (500, 80, None, 1), (469, 79, None, 1), (469, 200, None, 3),
        # without validation: the period of checkpoints
        (10, 0, None, 54), (1, 1, None, 545), (1, 1, 0, 1),
    ],
)  # fmt: skip
def test_period_by_counts_of_batches(batches, val_batches, epochs, period):
    assert choose_period(batches, val_batches, epochs) == period


@pytest.mark.slow
def test_first_and_last_epoch_are_validated(fit):
    assert validated(fit, max_epochs=32) == [1, *range(3, 31, 3), 32]
    assert validated(fit, max_epochs=6) == [1, 2, 3, 4, 5, 6]
    # epochs of one step, with all batches accumulated; max_steps ends the run
    steps = {"max_epochs": -1, "accumulate_grad_batches": 4, "max_steps": 31}
    assert validated(fit, **steps) == [1, *range(3, 31, 3), 31]


@pytest.mark.slow
def test_last_whole_epoch_is_validated_before_max_steps(fit):
    assert validated(fit, max_epochs=-1, max_steps=3 * 21 + 1)[-3:] == [18, 20, 21]
    # all epochs of a run with few epochs, even if the limit is only set when the training starts
    limited = {"max_epochs": -1, "max_steps": 3 * 6, "enable_checkpointing": True}
    assert validated(fit, Checkpoints(), **limited) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"check_val_every_n_epoch": 5}, [5, 10, 15, 20]),
        ({"val_check_interval": 1}, sorted([*range(1, 21)] * 3)),
        ({"val_check_interval": 0.5}, sorted([*range(1, 21)] * 3)),
        ({"limit_val_batches": 0}, []),
    ],
    ids=["check_val_every_n_epoch", "val_check_interval", "share", "no validation"],
)
@pytest.mark.slow
def test_settings_of_the_trainer_win(fit, options, epochs):
    assert validated(fit, **{"max_epochs": 20} | options) == epochs


@pytest.mark.slow
def test_lightnings_own_monitors_see_each_epoch(fit):
    class Plateau(Fake):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}

    assert validated(fit, model=Plateau((4,)), max_epochs=20) == [*range(1, 21)]
    other = EarlyStopping("val/loss", patience=100)
    assert validated(fit, other, max_epochs=20) == [*range(1, 21)]


@pytest.mark.slow
def test_requested_periods_are_validated(fit):
    regular = {1, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30}
    found = validated(fit, Checkpoints(every_n_epochs=7), enable_checkpointing=True)
    assert set(found) == regular | {7, 14, 21, 28}
    model = FakeVAE((1, 8, 8))
    assert set(validated(fit, CodeStatistics(every_n_epochs=10), CodeStatistics(), model=model)) == regular | {10, 20}
    assert set(validated(fit, Samples(n=4, every_n_epochs=11), model=FakeVAE((1, 8, 8)))) == regular | {11, 22}


@pytest.mark.slow
def test_pictures_are_drawn_at_the_next_validation(fit, monkeypatch):
    drawn = []
    monkeypatch.setattr(Reconstructions, "draw", lambda self, model, x, y: drawn.append(self._epoch + 1) or {})
    callback = Reconstructions(every_n_epochs=5)
    callback.requested_period = 0
    assert validated(fit, callback, model=Fake((1, 8, 8))) == [1, *range(3, 31, 3)]
    assert drawn == [6, 12, 15, 21, 27, 30]


@pytest.mark.slow
def test_kl_is_drawn_at_the_next_validation(fit, monkeypatch):
    drawn = []
    monkeypatch.setattr(DrawingTime, "allows", lambda self, epoch: True)
    monkeypatch.setattr(CodeStatistics, "_draw", lambda self, trainer: drawn.append(trainer.current_epoch + 1))
    validated(fit, CodeStatistics(), model=FakeVAE((1, 8, 8)))
    assert drawn[:-1] == [6, 12, 15, 21, 27, 30]  # and at the end


@pytest.mark.slow
def test_epochs_without_validation_are_saved_after_minutes(fit, monkeypatch):
    saved = []
    monkeypatch.setattr(Checkpoints, "_save_last_checkpoint", lambda self, trainer, _: saved.append(epoch_of(trainer)))
    monkeypatch.setattr(Checkpoints, "_save_topk_checkpoint", lambda self, trainer, _: None)
    epochs = validated(fit, Checkpoints(), enable_checkpointing=True)
    assert saved == epochs
    saved.clear()
    monkeypatch.setattr(checkpoints, "_LONGEST_GAP", 0.0)
    assert validated(fit, Checkpoints(), enable_checkpointing=True) == epochs
    assert saved == [*range(1, 31)]


@pytest.mark.slow
def test_stop_within_an_epoch_is_validated_at_once(fit):
    class StopAt(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 3 * 7 + 1

    assert validated(fit, StopAt()) == [1, 3, 6, 8]


class Worsening(Fake):
    """Its validation loss is lowest in a given epoch."""

    best = 1

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", float(abs(self.trainer.current_epoch + 1 - self.best)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patience", "best", "stopped"),
    # epochs 1, 5, 10, 15, ... are validated; at least three validations must be without improvement
    [(20, 10, 30), (21, 10, 35), (2, 10, 20), (1, 10, 15), (5, 10, 25)],
)
def test_patience_counts_epochs_and_at_least_three_validations(fit, patience, best, stopped):
    model, stop = Worsening((4,)), EarlyStop(patience=patience)
    model.best = best
    assert validated(fit, stop, model=model, max_epochs=50)[-1] == stopped
    assert stop.has_stopped and stop.stopped_epoch + 1 == stopped


@pytest.mark.slow
def test_patience_counts_validations_of_a_given_period(fit):
    model, stop = Worsening((4,)), EarlyStop(patience=3)
    model.best = 15
    assert validated(fit, stop, model=model, max_epochs=50, check_val_every_n_epoch=5)[-1] == 30


@pytest.mark.slow
def test_early_stop_ignores_metrics_of_an_earlier_validation(fit):
    class Improving(Fake):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", -float(self.trainer.current_epoch))

    stop = EarlyStop(patience=1)
    assert validated(fit, stop, model=Improving((4,)), max_epochs=20)[-1] == 20
    assert not stop.has_stopped and stop.wait_count == 0


@pytest.mark.slow
def test_records_have_validations_where_they_were(fit, tmp_path):
    metrics, curves = EpochMetrics(), LearningCurves()
    epochs = validated(fit, metrics, curves, model=Fake((1, 8, 8)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] + 1 for line in lines] == [*range(1, 31)]
    assert [line["epoch"] + 1 for line in lines if "val/loss" in line] == epochs
    known = [epoch for epoch, loss in zip(curves.curves.epochs, curves.curves.val, strict=True) if loss == loss]
    assert known == epochs and len(curves.curves.epochs) == 30


class Stop(pl.Callback):
    """Interrupts a run after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != self.step:
            return
        if trainer.is_last_batch:
            next(one for one in trainer.callbacks if isinstance(one, Interrupt)).requested = True
        else:
            raise KeyboardInterrupt


class SignalAtStart(pl.Callback):
    """Acts as if a signal had arrived after the end of an epoch, at a given step."""

    def __init__(self, step):
        self.step = step

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.global_step == self.step:
            next(one for one in trainer.callbacks if isinstance(one, Interrupt)).signum = signal.SIGTERM


def trained(folder: Path, step: int | None = None, start: int | None = None, ckpt_path: str | None = None):
    """A run of 40 epochs of 4 batches, interrupted after a step or by a signal before the next one."""
    torch.manual_seed(0)
    model = aezoo.create_model("dense_ae", (4,), latent_dim=2, hidden_dims=(8,), lr=0.1)
    data = DataModule.from_arrays(torch.rand(80, 4, generator=torch.Generator().manual_seed(0)), batch_size=16)
    saver, curves, seen, stop = Checkpoints(), LearningCurves(), Validated(), EarlyStop(patience=30)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=40, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[SignalAtStart(start), Interrupt(), stop, curves, seen, saver, ValidationSchedule(), Stop(step)],
    )  # fmt: skip
    if step is start is None:
        trainer.fit(model, data, ckpt_path=ckpt_path)
    else:
        with pytest.raises(SystemExit):
            trainer.fit(model, data)
        assert trainer.global_step == (step or start + 1)
    return seen.epochs, curves.curves, saver, stop.state_dict(), model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    "interrupted",
    [{"step": 6 * 4 + 2}, {"step": 6 * 4}, {"step": 8 * 4 - 1}, {"start": 6 * 4}],
    ids=["within an epoch", "after one", "before a due one", "between two"],
)
def test_run_continues_exactly_between_validations(tmp_path, interrupted):
    whole = trained(tmp_path / "whole")
    assert whole[0] == [1, *range(4, 41, 4)]
    before = trained(tmp_path / "parts", **interrupted)
    (state,) = Path(before[2].dirpath).glob("last*.ckpt")
    assert torch.load(state, weights_only=True)["global_step"] == interrupted.get("step", 6 * 4 + 1)
    after = trained(tmp_path / "parts", ckpt_path=before[2].last_model_path)
    assert before[0] + after[0] == whole[0]
    assert after[1].epochs == whole[1].epochs and after[1].train == whole[1].train
    torch.testing.assert_close(torch.tensor(after[1].val), torch.tensor(whole[1].val), rtol=0, atol=0, equal_nan=True)
    assert Path(after[2].best_model_path).name == Path(whole[2].best_model_path).name
    assert after[3] == whole[3]
    assert all(torch.equal(after[4][name], value) for name, value in whole[4].items())
