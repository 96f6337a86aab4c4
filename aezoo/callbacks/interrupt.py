"""Ctrl-C and SIGTERM between two batches."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

_HELD = b"\naezoo: stopping after this batch; press Ctrl-C again to stop at once\n"
# batches between two agreements of the ranks, each of which waits for the slowest
_AGREE_EVERY = 8


class Interrupt(pl.Callback):
    """Holds the first SIGINT or SIGTERM of a fit until the batch is done, then raises KeyboardInterrupt.

    A checkpoint that is written then (ModelCheckpoint with save_on_exception) can be resumed from exactly, but for the
    noise that a model draws; one written within a batch, or on the last batch of an epoch, cannot, so that batch is
    followed by the end of its epoch first. A second signal interrupts at once. Several ranks agree on the batch. Under
    SLURM, SIGTERM is left to Lightning.

    Attributes:
        signum: the signal received in the last fit, or None; a program that it ended exits with 128 + signum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.signum: int | None = None
        self._leaving = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.signum, self._leaving = None, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not in setup: Lightning installs its own handler of SIGTERM after that and would end the run by itself; it
        # puts back all handlers at the end of a run, however that ends
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGINT,) if SLURMEnvironment.detect() else (signal.SIGINT, signal.SIGTERM)
            for number in signals:
                signal.signal(number, self._handle)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_if_asked(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch:
            return
        if trainer.world_size == 1 or batch_idx % _AGREE_EVERY == 0:
            self._leave_if_asked(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leaving = True  # checkpoints are written now

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._leaving:
            return
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        os.write(2, _HELD)  # print is not safe in a signal handler

    def _leave_if_asked(self, trainer: pl.Trainer) -> None:
        asked = self.signum is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            self.signum = self.signum or int(signal.SIGTERM)
            self._leaving = True
            raise KeyboardInterrupt
