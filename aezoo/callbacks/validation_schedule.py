"""Validation schedule for short epochs."""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info

from aezoo.callbacks.base import is_dry_run
from aezoo.training.arguments import Checked

# Training batches between two validations: per validation batch, and per validation for its start and two
# checkpoints. For a small dense network a validation batch takes as long as 2 training batches, and the rest as long
# as 14, so with 8 batches both take 5 % of the time.
_PER_BATCH, _PER_VALIDATION = 5, 540
# minimum number of validations in a run, for a readable curve
_LEAST_VALIDATIONS = 10


def choose_period(batches: int, val_batches: int, epochs: int | None) -> int:
    """Return the number of epochs from one validation to the next.

    Args:
        batches: number of training batches in an epoch.
        val_batches: number of batches in a validation.
        epochs: number of epochs of the run; None if not limited.
    """
    period = (_PER_BATCH * val_batches + _PER_VALIDATION) // batches
    return max(1, period if epochs is None else min(period, epochs // _LEAST_VALIDATIONS))


class ValidationSchedule(pl.Callback):
    """Validates, and by default saves, only every few epochs if epochs are short, to spend most time on training.

    The first and the last epoch are always validated, and those requested by `every_n_epochs` of a callback. Otherwise,
    every n-th epoch is validated, with n from `choose_period`: a validation after about 540 training batches and 5 more
    for each of its own batches, at least 10 in a run, and after every epoch if epochs are longer. The schedule depends
    only on counts, not on time, so all ranks, and a run that continues with the same settings, validate the same
    epochs.

    Lightning's schedule is kept for a Trainer with `check_val_every_n_epoch` or `val_check_interval`, a scheduler that
    reduces the learning rate on a plateau, Lightning's own EarlyStopping, and data without a length.

    Attributes:
        period: epochs from one validation to the next; 1 validates after each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.period = 1
        self._requested: list[int] = []
        self._max_steps = -1

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Return whether the current epoch is validated."""
        epoch = trainer.current_epoch + 1
        every = any(epoch % period == 0 for period in (self.period, *self._requested))
        return every or epoch == 1 or self._is_last(trainer)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # `Checkpoints` removes the limit until training starts
        self._max_steps = trainer.max_steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.period, self._requested = self._choose(trainer), []
        if self.period > 1:
            periods = (getattr(callback, "requested_period", 0) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            self._requested = sorted({period for period in periods if period})
            batches = trainer.num_training_batches
            rank_zero_info(
                f"validation: every {self.period} epochs, as epochs are short ({batches} batch{'es' * (batches > 1)}), "
                "set --trainer.check_val_every_n_epoch 1 to validate after each"
            )
        # not called at the start of an epoch if a run continues within it
        self._apply(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.period > 1 and trainer.should_stop:
            trainer.check_val_every_n_epoch = 1  # Lightning then validates before it stops, as at max_time

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave(trainer)

    def _apply(self, trainer: pl.Trainer) -> None:
        if self.period > 1:
            # not a divisor of the epoch's number unless validation is due
            trainer.check_val_every_n_epoch = 1 if self.is_due(trainer) else trainer.current_epoch + 2

    def _leave(self, trainer: pl.Trainer) -> None:
        if self.period > 1:
            trainer.check_val_every_n_epoch, self.period = 1, 1

    def _choose(self, trainer: pl.Trainer) -> int:
        batches, val_batches = trainer.num_training_batches, sum(trainer.num_val_batches)
        # absent for an interval of time; the integer 1 is one batch
        interval: Any = getattr(trainer, "val_check_interval", None)
        own_schedule = trainer.check_val_every_n_epoch != 1 or not (isinstance(interval, float) and interval == 1)
        plateau = any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs)
        # it counts epochs, and fails if the metric is not available yet in a continued run
        stops = [one for one in trainer.callbacks if isinstance(one, EarlyStopping)]  # type: ignore[attr-defined]
        needs_each = plateau or any(not isinstance(one, Checked) for one in stops)
        if own_schedule or needs_each or is_dry_run(trainer) or not math.isfinite(batches + val_batches):
            return 1
        limits = []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            limits.append(trainer.max_epochs)
        if self._max_steps >= 0:
            limits.append(self._max_steps // _steps_per_epoch(trainer))
        return choose_period(int(batches), int(val_batches), min(limits, default=None))

    def _is_last(self, trainer: pl.Trainer) -> bool:
        """Return whether no complete epoch follows."""
        epoch = trainer.current_epoch + 1
        if epoch == trainer.max_epochs:
            return True
        return 0 <= self._max_steps < (epoch + 1) * _steps_per_epoch(trainer)


def is_save_due(trainer: pl.Trainer) -> bool:
    """Return whether checkpoints without a given period are due at the end of the current epoch."""
    schedules = [one for one in trainer.callbacks if isinstance(one, ValidationSchedule)]  # type: ignore[attr-defined]
    return all(schedule.is_due(trainer) for schedule in schedules)


def _steps_per_epoch(trainer: pl.Trainer) -> int:
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
