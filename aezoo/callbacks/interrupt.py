"""Handling of Ctrl-C, SIGTERM, SIGHUP and SLURM's signals between two batches."""

import contextlib
import os
import re
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from aezoo.io import terminal
from aezoo.training import distributed

_HANDLED = b"\naezoo: stopping after this batch; press Ctrl-C again to stop at once\n"
# batches between two synchronisations of the ranks
SYNC_EVERY = 8


class Interrupt(pl.Callback):
    """Defers the first SIGINT, SIGTERM or SIGHUP of a fit to the end of the batch, then raises KeyboardInterrupt.

    The checkpoint that `Checkpoints` then writes resumes exactly. A checkpoint written within a batch, between batches
    whose gradients are accumulated, or on the last batch of an epoch would not, so the run first finishes these
    batches; on the last batch of an epoch and during validation, it finishes the epoch. A second signal interrupts at
    once, except SIGHUP, which both the kernel and the shell send when a terminal is closed. Under `nohup`, which
    ignores SIGHUP, the run continues. Several ranks stop after the same batch.

    Under SLURM, the signal that announces the end of a job (SIGUSR1, or the one set in the cluster environment) has the
    same effect. After `Checkpoints` has written its file, the job is requeued if Lightning would do so.

    Attributes:
        signum: the signal received in the last fit, or None; the program then exits with 128 + signum.
        requested: whether the ranks have agreed to stop.
    """

    def __init__(self) -> None:
        super().__init__()
        self.signum: int | None = None
        self.requested = False
        self._stopping = self._has_trained = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.signum, self.requested, self._stopping, self._has_trained = None, False, False, False
        distributed.release_collectives_at_exit(trainer)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install_handlers(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install_handlers(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # the last epoch is saved if the request was known at its end; a later request needs another batch
        if self.requested or not self._has_trained:
            self._stop_if_requested(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._has_trained = True
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.world_size == 1 or batch_idx % SYNC_EVERY == 0:
            self._stop_if_requested(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # checkpoints are written after this hook; the next epoch does not start
        self._sync_request(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stopping = True  # checkpoints are written now

    def requeue(self, trainer: pl.Trainer) -> None:
        """Requeue the job if SLURM has announced its end; must be called after all files are written.

        This is not a hook: after an interruption, Lightning only calls `on_exception`, for this callback before
        Checkpoints.
        """
        environment = _slurm(trainer)
        if environment is None or not environment.auto_requeue or not trainer.is_global_zero:
            return
        if self.signum == _requeue_signal(environment):
            _requeue()

    def _install_handlers(self, trainer: pl.Trainer) -> None:
        # Not in setup, after which Lightning installs its own handlers, which would end the run; Lightning restores
        # all handlers at the end of a run in any case
        if threading.current_thread() is not threading.main_thread():
            return
        signals = {signal.SIGINT, *terminal.termination_signals()}
        environment = _slurm(trainer)
        if environment is not None or SLURMEnvironment.detect():
            signals.add(_requeue_signal(environment))
        for number in signals:
            signal.signal(number, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._stopping or (self.signum is not None and signum == terminal.HANGUP):
            return
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        with contextlib.suppress(OSError):  # the reader, e.g. `tee`, may have been ended by the same signal
            os.write(2, _HANDLED)  # print is not safe in a signal handler

    def _sync_request(self, trainer: pl.Trainer) -> None:
        requested = self.signum is not None
        if trainer.world_size > 1:
            requested = trainer.strategy.reduce_boolean_decision(requested, all=False)
        self.requested = self.requested or requested

    def _stop_if_requested(self, trainer: pl.Trainer) -> None:
        self._sync_request(trainer)
        if self.requested:
            self.signum = self.signum or int(signal.SIGTERM)
            self._stopping = True
            raise KeyboardInterrupt


def _slurm(trainer: pl.Trainer) -> SLURMEnvironment | None:
    environment = trainer._accelerator_connector.cluster_environment
    return environment if isinstance(environment, SLURMEnvironment) else None


def _requeue_signal(environment: SLURMEnvironment | None) -> signal.Signals:
    return getattr(environment, "requeue_signal", None) or signal.SIGUSR1


def _requeue() -> None:
    """Requeue this SLURM job; with `--resume auto`, its command continues from the checkpoint."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch("[0-9_-]+", job):
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        wrong = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        wrong = str(error)
    if wrong:
        rank_zero_warn(f"SLURM job {job} was not requeued: {wrong}")
    else:
        rank_zero_info(f"SLURM job {job} was requeued")
