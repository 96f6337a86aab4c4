"""When to validate where epochs are short."""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info

from aezoo.callbacks.base import is_dry_run
from aezoo.training.arguments import Checked

# Training batches per batch of validation, and those that starting a validation and writing two checkpoints are worth:
# a batch of validation takes up to 0.6 of a training batch, and the rest up to 8, so both stay near 10 %.
_PER_BATCH, _PER_VALIDATION = 5, 80
# of a whole run, so that its curve can be read
_LEAST_VALIDATIONS = 10


def choose_period(batches: int, val_batches: int, epochs: int | None) -> int:
    """Epochs from one validation to the next.

    Args:
        batches: training batches in an epoch.
        val_batches: batches of a validation.
        epochs: epochs of the run; None if it has no such limit.
    """
    period = round((_PER_BATCH * val_batches + _PER_VALIDATION) / batches)
    return max(1, period if epochs is None else min(period, epochs // _LEAST_VALIDATIONS))


class ValidationSchedule(pl.Callback):
    """Validates, and saves by default, only every few epochs if epochs are short, so that most time goes to training.

    The first epoch and the last are always validated, and so are those for which a callback has been asked by its
    `every_n_epochs`. In between it is every n-th epoch, by `choose_period`: a validation after about 80 training
    batches and 5 more for each of its own batches, at least 10 in a run, and none skipped if epochs are longer. Only
    counts decide, no clocks: each rank, and a run that continues with the same settings, validates the same epochs.

    A Trainer with `check_val_every_n_epoch` or `val_check_interval`, a scheduler that reduces the learning rate on a
    plateau, Lightning's own EarlyStopping, and data without a length keep Lightning's schedule.

    Attributes:
        period: epochs from one validation to the next; 1 validates each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.period = 1
        self._requested: list[int] = []
        self._max_steps = -1

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Whether the current epoch is validated."""
        epoch = trainer.current_epoch + 1
        every = any(epoch % period == 0 for period in (self.period, *self._requested))
        return every or epoch == 1 or self._is_last(trainer)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # `Checkpoints` takes the limit away until the training starts
        self._max_steps = trainer.max_steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.period, self._requested = self._choose(trainer), []
        if self.period > 1:
            periods = (getattr(callback, "requested_period", 0) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            self._requested = sorted({period for period in periods if period})
            batches = trainer.num_training_batches
            rank_zero_info(
                f"validation: every {self.period} epochs, as they are short ({batches} batch{'es' * (batches > 1)}); "
                "--trainer.check_val_every_n_epoch 1 changes that"
            )
        # a run that continues within an epoch does not start it
        self._apply(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.period > 1 and trainer.should_stop:
            trainer.check_val_every_n_epoch = 1  # Lightning validates before it stops, as at the end of max_time

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave(trainer)

    def _apply(self, trainer: pl.Trainer) -> None:
        if self.period > 1:
            # no divisor of this epoch's number unless it is due
            trainer.check_val_every_n_epoch = 1 if self.is_due(trainer) else trainer.current_epoch + 2

    def _leave(self, trainer: pl.Trainer) -> None:
        if self.period > 1:
            trainer.check_val_every_n_epoch, self.period = 1, 1

    def _choose(self, trainer: pl.Trainer) -> int:
        batches, val_batches = trainer.num_training_batches, sum(trainer.num_val_batches)
        # of a time there is no interval, and 1 is a batch
        interval: Any = getattr(trainer, "val_check_interval", None)
        own_schedule = trainer.check_val_every_n_epoch != 1 or not (isinstance(interval, float) and interval == 1)
        plateau = any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs)
        # it counts epochs, and fails if a continued run does not know its metric yet
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
        """Whether no whole epoch follows."""
        epoch = trainer.current_epoch + 1
        if epoch == trainer.max_epochs:
            return True
        return 0 <= self._max_steps < (epoch + 1) * _steps_per_epoch(trainer)


def is_save_due(trainer: pl.Trainer) -> bool:
    """Whether checkpoints are due at the end of the current epoch, where no period is given for them."""
    schedules = [one for one in trainer.callbacks if isinstance(one, ValidationSchedule)]  # type: ignore[attr-defined]
    return all(schedule.is_due(trainer) for schedule in schedules)


def _steps_per_epoch(trainer: pl.Trainer) -> int:
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
