"""Averaged weights."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from aezoo.callbacks.base import check_count
from aezoo.errors import AezooError
from aezoo.training.arguments import Checked
from aezoo.training.projected_weights import Constrained


class EMA(Checked, WeightAveraging):
    """Exponential moving average of the weights, a <- decay a + (1 - decay) w, updated after optimiser steps.

    Validation, pictures, checkpoints and the trained model use the averaged weights; training continues with the
    current ones, which checkpoints store under `current_model_state`. Until the first update, the average equals the
    current model. Integer buffers, such as counters, and those in a model's `not_averaged` are copied instead of
    averaged. Constraints of a model, such as directions of unit norm, are applied to the average as well.

    Args:
        decay: weight of the previous average; 0 disables averaging.
        every_n_steps: optimiser steps between two updates.
        start_step: optimiser steps before the first update.
    """

    # required by dictionaries of directions, which reject averages that are not projected
    projects_weights = True

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1, start_step: int = 0) -> None:
        if not 0 <= decay < 1:
            raise AezooError(f"EMA.decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.every_n_steps = check_count(self, "every_n_steps", every_n_steps)
        self.start_step = check_count(self, "start_step", start_step, 0)
        self._swapped = False
        # set by FaultGuard on a GPU: 1 if the step was skipped; on the device, to avoid a synchronisation
        self.skipped: Tensor | None = None
        super().__init__(multi_avg_fn=self._update)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if self._average_model is None or step_idx is None:
            return False
        return step_idx >= self.start_step and (step_idx - self.start_step) % self.every_n_steps == 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # otherwise the average of an earlier fit would replace the weights loaded by validate or test
        self._average_model, self._latest_update_step, self._swapped, self.skipped = None, 0, False, None
        if self.decay:
            super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # read at every update; on an accelerator, each read would synchronise
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before = self._latest_update_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._average_model is None or self._latest_update_step == before:
            return
        average = self._average_model.module
        for name in getattr(pl_module, "not_averaged", ()):
            average.get_buffer(name).copy_(pl_module.get_buffer(name))
        if isinstance(average, Constrained):
            average.after_optimizer_step()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._average_model is not None:
            self._follow(pl_module)
            self._swap_models(pl_module)
            self._swapped = True

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # swapped back later, so that callbacks that draw in this hook use the averaged weights in any order
        pass

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap_back(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._average_model is not None:
            self._follow(pl_module)
            self._copy_average_to_current(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # A checkpoint may be written now, so both sets of weights must be in their places and include the last step,
        # which this callback has not seen if another one raised before it
        self._swap_back(pl_module)
        if self._average_model is not None:
            self.on_train_batch_end(trainer, pl_module, None, None, 0)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is not None:
            self._follow(pl_module)
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _follow(self, pl_module: pl.LightningModule) -> None:
        """Set the average to the current model, before the first update.

        Without this, Lightning's callback validates and stores the initial weights (#21724).
        """
        if self._average_model is not None and self._average_model.n_averaged == 0:
            self._average_model.module.load_state_dict(pl_module.state_dict())

    def _swap_back(self, pl_module: pl.LightningModule) -> None:
        if self._swapped:
            self._swap_models(pl_module)
            self._swapped = False

    def _update(self, averaged: list[Tensor], current: list[Tensor], n_averaged: Tensor) -> None:
        # the average is a copy from before Lightning lowered the precision, and small updates need its precision
        current = [new.to(old.dtype) for old, new in zip(averaged, current, strict=True)]
        if averaged[0].is_floating_point() and self.skipped is not None:
            # no change of the average if the step was skipped
            skipped = self.skipped > 0
            current = [torch.where(skipped, old, new) for old, new in zip(averaged, current, strict=True)]
        if averaged[0].is_floating_point():
            get_ema_multi_avg_fn(self.decay)(averaged, current, n_averaged)
        else:
            for old, new in zip(averaged, current, strict=True):
                old.copy_(new)
