"""Training throughput."""

import time
from typing import Any

import lightning.pytorch as pl
import torch

from aezoo.callbacks.base import unpack
from aezoo.callbacks.validation_schedule import is_save_due


class Throughput(pl.Callback):
    """Logs `train/samples_per_s`: training samples of all ranks per second, including data loading.

    It is logged once per epoch or, if `ValidationSchedule` skips epochs, once per validation for all epochs since.

    Validation, pictures, checkpoints and the first batch of a fit, which includes compilation, are not measured. The
    accelerator is synchronised when the clock is stopped, not at each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._started: float | None = None
        self._warm = self._logged = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started, self._warm, self._logged = None, False, False
        self._samples, self._seconds = 0, 0.0  # a resumed epoch starts without on_train_epoch_start

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._logged:
            self._samples, self._seconds, self._logged = 0, 0.0, False
        self._started = time.perf_counter() if self._warm else None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._started is None and self._warm:  # again after a validation within the epoch
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._warm:
            self._samples += len(unpack(batch)[0])
        else:
            self._warm = True
            self._wait(pl_module)
            self._samples, self._seconds, self._started = 0, 0.0, time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop(pl_module)
        # a value takes Lightning as long as a small training step
        if self._samples and self._seconds > 0 and is_save_due(trainer):
            rate = self._samples / self._seconds
            pl_module.log("train/samples_per_s", rate, sync_dist=True, reduce_fx="sum")
            self._logged = True

    def _stop(self, pl_module: pl.LightningModule) -> None:
        if self._started is not None:
            self._wait(pl_module)
            self._seconds += time.perf_counter() - self._started
            self._started = None

    @staticmethod
    def _wait(pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
