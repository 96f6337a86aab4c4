"""Best and last checkpoints of a run, and early stopping."""

import contextlib
import difflib
import json
import re
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_warn

from aezoo.callbacks import validation_schedule
from aezoo.callbacks.base import check_count, check_not_negative, is_dry_run
from aezoo.callbacks.interrupt import SYNC_EVERY, Interrupt
from aezoo.errors import AezooError
from aezoo.io import atomic_files, run_folder, terminal
from aezoo.training import distributed
from aezoo.training.arguments import Checked

_Metric = TypeVar("_Metric")
# minimum number of validations without improvement before a run is stopped
_LEAST_CHECKS = 3
# maximum seconds between two saves if epochs are not validated
_LONGEST_GAP = 300.0


def _resolve_monitor(requested: str, watched: _Metric, trainer: pl.Trainer, stage: str) -> str | _Metric:
    """Return the requested metric, or that of training if there is no validation; known after setup of the data.

    For a model trained without validation, testing also ranks its checkpoints by the metric that training monitored.
    """
    if trainer.limit_val_batches == 0:
        return requested.replace("val/", "train/", 1)
    return requested if stage == "fit" else watched


def _check_metric(owner: object, metric: str) -> None:
    if not re.fullmatch(r"(val|train)/\w+", metric):
        raise AezooError(
            f"{type(owner).__name__}.monitor is {metric!r}: give the name of a metric such as val/loss or train/nll"
        )


def _check_logged(metric: str | None, owner: object, trainer: pl.Trainer) -> None:
    """Warn early about a metric that seems mistyped; Lightning checks it only at the end of an epoch."""
    logged = [*trainer.callback_metrics]
    near = difflib.get_close_matches(metric or "", logged, n=1, cutoff=0.8)
    if near and metric not in logged:
        rank_zero_warn(
            f"{type(owner).__name__}.monitor is {metric}, which is not logged so far: did you mean {near[0]}?"
        )


class Checkpoints(Checked, ModelCheckpoint):
    """Saves `best-<epoch>-<step>.ckpt`, the lowest validation loss, and `last.ckpt`, in `<run>/checkpoints`.

    `last.ckpt` is written at the end of an epoch and, optionally, every few steps or minutes; its predecessor is kept
    as `previous.ckpt`. If `ValidationSchedule` skips epochs, it is written at the end of validated epochs, and of
    others if the last save was 5 minutes ago. If the last epoch is also the best, both names refer to the same file, or
    to copies if there are no hard links. Training resumes exactly from each file: no file is written within a batch,
    between two batches whose gradients are accumulated, or on the last batch of an epoch, which is followed by the save
    at its end. A run that is interrupted between two batches writes `last.ckpt` at that step. If weights or optimiser
    moments are not finite, the run ends without replacing a good file.

    Files are written by `aezoo.io.atomic_files` instead of Lightning's checkpoint plugin, unless the trainer has
    another one.

    Args:
        monitor: the metric to minimise.
        save_top_k: number of best checkpoints to keep; -1 keeps all, 0 none.
        every_n_epochs: epochs between two saves, each of which checks the metric; the last epoch is always saved. None
            saves at the end of each epoch, or of each epoch that `ValidationSchedule` validates.
        every_n_steps: optimiser steps between two saves of `last.ckpt` within an epoch; 0 disables them.
        every_n_minutes: minutes between two saves of `last.ckpt` within an epoch; 0 disables them.
        dirpath: another folder for the files. The run folder of the command line does not change.

    Attributes:
        run: the run folder, set by the command line.
        requested_period: the period set by the user, in epochs; 0 if none was set.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        save_top_k: int = 1,
        every_n_epochs: int | None = None,
        every_n_steps: int = 0,
        every_n_minutes: float = 0.0,
        dirpath: str | None = None,
    ) -> None:
        _check_metric(self, monitor)
        check_count(self, "every_n_epochs", 1 if every_n_epochs is None else every_n_epochs)
        check_count(self, "every_n_steps", every_n_steps, 0)
        if not 0 <= every_n_minutes < float("inf"):
            raise AezooError(f"Checkpoints.every_n_minutes must be at least 0 and finite, got {every_n_minutes}")
        if save_top_k < -1:
            raise AezooError(f"Checkpoints.save_top_k must be -1 (all), 0 (none) or a number, got {save_top_k}")
        super().__init__(
            dirpath=dirpath,
            # a slash in an inserted metric name would create a folder
            filename="best-{epoch:03d}-{step}",
            auto_insert_metric_name=False,
            monitor=monitor,
            mode="min",
            save_top_k=save_top_k,
            every_n_epochs=every_n_epochs or 1,
            save_last=True,
            save_on_exception=True,
            enable_version_counter=False,
        )
        self.run: Path | None = None
        self._requested_monitor, self.requested_period = monitor, every_n_epochs or 0
        self._every_n_steps, self._seconds = every_n_steps, 60 * every_n_minutes
        self._within_epochs = bool(every_n_steps or every_n_minutes)
        self._saved_at, self._n_saved = 0.0, 0
        self._validated = self._is_fit = False
        self._max_steps: int | None = None
        self._not_finite: set[str] = set()
        self._opened: list[run_folder.OpenFolder] = []

    @property
    def state_key(self) -> str:
        # Without the periods, so that a run continued with other periods still finds its best checkpoint, and without
        # the metric that replaces a missing validation, which is not known when such a run is tested
        return f"Checkpoints{{'monitor': {self._requested_monitor!r}}}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        monitored, self._is_fit = (
            _resolve_monitor(self._requested_monitor, self.monitor, trainer, stage),
            stage == "fit",
        )
        if monitored != self.monitor:
            self.monitor = monitored
            # scores of another metric, e.g. from a fit on other data, are not comparable
            self.best_k_models, self.best_model_path, self.kth_best_model_path = {}, "", ""
            self.best_model_score, self.current_score, self.kth_value = None, None, torch.tensor(torch.inf)
        with warnings.catch_warnings():
            # a resumed run continues in its own folder
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = atomic_files.DurableIO()
        distributed.release_collectives_at_exit(trainer)
        self._validated = False
        if stage == "fit" and trainer.is_global_zero and not is_dry_run(trainer) and "://" not in str(self.dirpath):
            atomic_files.prepare_folder(Path(str(self.dirpath)))
            self._release_folders()  # left open by a fit that ended with an error
            self._opened = [run_folder.OpenFolder(Path(path)) for path in (self.run, self.dirpath) if path is not None]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._release_folders()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        watched = state_dict.get("monitor", self.monitor)
        if watched != self.monitor and self._is_fit:
            return  # scores of another metric are not comparable
        self.monitor = watched
        # a checkpoint of another run starts a new list; a run whose folder was moved continues its list
        home = Path(str(self.dirpath))
        here = {str(path): str(home / Path(str(path)).name) for path in state_dict.get("best_k_models", {})}
        if state_dict.get("dirpath") == self.dirpath or (here and all(Path(path).is_file() for path in here.values())):
            moved = dict(state_dict, dirpath=self.dirpath)
            moved["best_k_models"] = {here[path]: score for path, score in state_dict["best_k_models"].items()}
            for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                moved[key] = str(home / Path(str(state_dict[key])).name) if state_dict.get(key) else ""
            super().load_state_dict(moved)
            # Lightning saves the last score that was among the best but does not restore it
            self.current_score = state_dict.get("current_score")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # While the loop's counters are restored: with a last step set, Lightning 2.6 treats a file from the end of an
        # epoch as one from its middle, and skips an epoch or ends at once
        if trainer.max_steps != -1:
            self._max_steps, trainer.fit_loop.epoch_loop.max_steps = trainer.max_steps, -1

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _check_logged(self.monitor, self, trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_max_steps(trainer)
        self._saved_at = time.monotonic()
        # this step of a continued run is already on disk
        self._last_global_step_saved = trainer.global_step
        tensors = pl_module.state_dict().items()
        self._not_finite = {name for name, value in tensors if value.is_floating_point() and not value.isfinite().all()}
        self._finished_file(trainer).unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._gone_folder()
        may = self._within_epochs or trainer.max_steps != -1 or trainer.should_stop
        if may and self._due_within_epoch(trainer, batch_idx):
            _log_batch(trainer)
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._gone_folder()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or is_dry_run(trainer):
            return
        self._validated = True
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            # several validations per epoch; the one after its last batch is saved at the end of the epoch
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning saves here or after validation, depending on settings; here, the counters always resume exactly
        if self._skips(trainer):
            return
        self._gone_folder()
        epoch, complete = trainer.current_epoch + 1, trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        ends = trainer.should_stop or epoch == trainer.max_epochs or _reached(trainer.max_steps, trainer)
        requested = any(callback.requested for callback in _interrupts(trainer))
        if self.requested_period:
            due = epoch % self.requested_period == 0
        else:
            due = validation_schedule.is_save_due(trainer) or self._is_late(trainer, _LONGEST_GAP)
        if not (due or ends or requested):
            return
        _log_epoch(trainer)
        metrics, before = self._monitor_candidates(trainer), self._n_saved
        if complete:
            # a part of the state in both files, which may be one
            self.last_model_path = self.format_checkpoint_name(metrics, self.CHECKPOINT_NAME_LAST)
        if self._validated or str(self.monitor).startswith("train/"):
            self._save_topk_checkpoint(trainer, metrics)
        self._validated = False
        if complete and not (self._n_saved > before and self._name_as_last(trainer)):
            self._save_last_checkpoint(trainer, metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do nothing, since the end of the last epoch has already been saved."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or _reached(trainer.max_steps, trainer)
        stops = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStop)]  # type: ignore[attr-defined]
        early = next((stop.settings for stop in stops if trainer.should_stop and stop.has_stopped), None)
        if trainer.is_global_zero and not is_dry_run(trainer) and self.last_model_path and (whole or early):
            limits = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps, "early_stopping": early}
            text = json.dumps({"epoch": trainer.current_epoch, "step": trainer.global_step, **limits})
            atomic_files.write(self._finished_file(trainer), lambda file: file.write(text.encode() + b"\n"))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_max_steps(trainer)
        # A file written within a batch, or on an epoch's last batch, does not resume exactly; after any other error,
        # the state may be invalid
        batches = trainer.fit_loop.epoch_loop.batch_progress
        counts = batches.state_dict()["current"]
        between = counts["ready"] == counts["processed"] and not batches.is_last_batch
        between = between and counts["ready"] % trainer.accumulate_grad_batches == 0
        if not isinstance(exception, KeyboardInterrupt) and not terminal.is_closed_pipe(exception):
            return
        is_saved = self._last_global_step_saved == trainer.global_step
        if between and not (is_saved or is_dry_run(trainer) or trainer.sanity_checking):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        for callback in _interrupts(trainer):
            callback.requeue(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        weights = {**checkpoint["state_dict"], **checkpoint.get("current_model_state", {})}
        name = next((n for n in _not_finite_names(weights) if n not in self._not_finite), None)
        if name is None and next(_not_finite_names({"optimizer": checkpoint.get("optimizer_states", [])}), None):
            name = "the optimiser's moments"
        if name is not None:
            raise AezooError(
                f"{name} is not finite at epoch {trainer.current_epoch}, step {trainer.global_step}: "
                f"{self.last_model_path or 'the last checkpoint'} is not replaced; lower --model.lr, check the data, "
                "and continue from it"
            )

    def _due_within_epoch(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        batches, step = trainer.fit_loop.epoch_loop.batch_progress, trainer.global_step
        if batches.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches or self._skips(trainer):
            return False
        if step == self._last_global_step_saved:
            return False
        # so that a run that ends within an epoch can be extended
        ends = _reached(trainer.max_steps, trainer) or (trainer.should_stop and trainer.fit_loop._can_stop_early)
        if ends or (self._every_n_steps and step % self._every_n_steps == 0):
            return True
        # ranks must save together, and synchronising them takes time
        if not self._seconds or (trainer.world_size > 1 and batch_idx % SYNC_EVERY):
            return False
        return self._is_late(trainer, self._seconds)

    def _is_late(self, trainer: pl.Trainer, seconds: float) -> bool:
        """Return whether the last save is at least `seconds` ago, by the clock of rank zero."""
        return bool(trainer.strategy.broadcast(time.monotonic() - self._saved_at >= seconds))

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        gone = self._gone_folder()
        # flushed now, since a run continued from this file does not log earlier values again
        for logger in trainer.loggers:
            logger.save()
        super()._save_checkpoint(trainer, filepath)
        if self.run is not None and trainer.is_global_zero and "://" not in filepath:
            run_folder.note_checkpoints(self.run, Path(filepath).parent)
        self._saved_at = time.monotonic()
        self._n_saved += 1
        if gone is not None:
            self._release_folders()
            raise AezooError(
                f"{gone} was deleted or moved to another disk during training. Step {trainer.global_step} was saved in "
                f"{filepath}: continue with --ckpt_path and the settings of that run"
            )

    def _name_as_last(self, trainer: pl.Trainer) -> bool:
        """Link `last.ckpt` to the best checkpoint if it has just been written; return whether this was done."""
        durable, done = trainer.strategy.checkpoint_io, False
        if isinstance(durable, atomic_files.DurableIO) and trainer.is_global_zero:
            done = durable.name_as_last()
        done = bool(trainer.strategy.broadcast(done))
        if done and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(weakref.proxy(self))
        return done

    def _gone_folder(self) -> Path | None:
        """Return a folder of the run that was deleted, if any; a folder that was only moved is located again."""
        lost = next((folder.path for folder in self._opened if folder.is_gone()), None)
        if lost is not None:
            # loggers still write to it until the state is saved
            with contextlib.suppress(OSError):
                lost.mkdir(parents=True, exist_ok=True)
        return lost

    def _release_folders(self) -> None:
        for folder in self._opened:
            folder.close()
        self._opened = []

    def _skips(self, trainer: pl.Trainer) -> bool:
        return is_dry_run(trainer) or trainer.state.fn != "fit" or trainer.sanity_checking

    def _restore_max_steps(self, trainer: pl.Trainer) -> None:
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None

    def _finished_file(self, trainer: pl.Trainer) -> Path:
        return Path(str(self.dirpath)) / atomic_files.FINISHED


def _interrupts(trainer: pl.Trainer) -> list[Interrupt]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Interrupt)]  # type: ignore[attr-defined]


def _reached(max_steps: int, trainer: pl.Trainer) -> bool:
    return max_steps != -1 and trainer.global_step >= max_steps


# Lightning logs the metrics of a batch and of an epoch after the hooks in which they are saved. If a run were killed
# in between, neither the file nor the curves would contain them. They are therefore logged earlier, so that Lightning
# does not log them again.


def _log_batch(trainer: pl.Trainer) -> None:
    connector, results = trainer._logger_connector, trainer._results
    connector.on_batch_end()
    connector.update_train_step_metrics()
    for value in results.values() if results is not None else ():
        value._forward_cache = None


def _log_epoch(trainer: pl.Trainer) -> None:
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    connector.on_epoch_end()
    # logged at the step of the epoch's last batch, as by Lightning
    loop._batches_that_stepped -= 1
    connector.update_train_epoch_metrics()
    loop._batches_that_stepped += 1


def _not_finite_names(state: Any, path: str = "") -> Iterator[str]:
    """Yield the names of the tensors in a nested state that are not finite."""
    if isinstance(state, torch.Tensor):
        # the sum is faster and finite only if all terms are; a sum of large terms may overflow
        if state.is_floating_point() and not (bool(state.sum().isfinite()) or bool(state.isfinite().all())):
            yield path
    elif isinstance(state, dict | list | tuple):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in pairs:
            yield from _not_finite_names(value, f"{path}.{key}" if path else str(key))


def checkpoint_callback(trainer: pl.Trainer) -> ModelCheckpoint | None:
    """Return the callback that tracks the best and last checkpoints, before any other that the user added."""
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    return next((saver for saver in savers if isinstance(saver, Checkpoints)), next(iter(savers), None))


class EarlyStop(Checked, EarlyStopping):
    """Stops training when the metric has not improved for `patience` epochs.

    If `ValidationSchedule` skips epochs, these are counted as well, and training is stopped only after at least 3
    validations (fewer if patience is smaller) without improvement.

    Args:
        monitor: the metric to minimise.
        patience: epochs without improvement, or validations if the Trainer's settings define how often to validate; 0
            disables early stopping.
        min_delta: minimum decrease that counts as an improvement.

    Attributes:
        settings: its arguments, by name.
    """

    def __init__(self, monitor: str = "val/loss", patience: int = 20, min_delta: float = 0.0) -> None:
        if patience < 0:
            raise AezooError(f"early_stopping.patience must be at least 0, got {patience}")
        _check_metric(self, monitor)
        check_not_negative(self, "min_delta", min_delta)
        super().__init__(monitor=monitor, mode="min", patience=patience or 2**62, min_delta=min_delta)
        self.settings: dict[str, Any] = {"monitor": monitor, "patience": patience, "min_delta": min_delta}
        # the epoch of the last check, counted from 1 (-1: unknown), and the number of checks since the best
        self._checked_epoch, self._checks = -1, 0
        self._validated = False

    @property
    def has_stopped(self) -> bool:
        """Return whether this callback has stopped the run."""
        return self.stopping_reason == EarlyStoppingReason.PATIENCE_EXHAUSTED

    @property
    def state_key(self) -> str:
        # identified by the requested metric, like the key of Checkpoints
        return f"{type(self).__qualname__}{ {'monitor': self.settings['monitor'], 'mode': self.mode}!r}"

    def state_dict(self) -> dict[str, Any]:
        own = {"monitor": self.monitor, "checked_epoch": self._checked_epoch, "checks": self._checks}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("monitor", self.monitor) != self.monitor:
            return  # scores of another metric are not comparable
        # the current settings override the saved ones, and a continued run has not been stopped
        now = {"patience": self.patience, "stopping_reason": EarlyStoppingReason.NOT_STOPPED.value}
        super().load_state_dict(state_dict | now)
        self._checked_epoch = int(state_dict.get("checked_epoch", -1))
        self._checks = int(state_dict.get("checks", self.wait_count))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        monitored = _resolve_monitor(self.settings["monitor"], self.monitor, trainer, stage)
        if monitored != self.monitor:
            self.monitor, self.best_score, self.wait_count = monitored, torch.tensor(torch.inf), 0
            self._checks = 0
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = False
        if not 0 <= self._checked_epoch <= trainer.current_epoch:
            self._checked_epoch = trainer.current_epoch

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = not trainer.sanity_checking
        super().on_validation_end(trainer, pl_module)

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _check_logged(self.monitor, self, trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # the metric may be missing if --trainer.max_steps ends the epoch before its validation
        whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        is_new = self._validated or not self.monitor.startswith("val/")
        # or in a continued run until its first validation
        is_missing = self.monitor not in trainer.callback_metrics
        self._validated = False
        if (whole and trainer.check_val_every_n_epoch == 1) if is_missing else is_new:
            # with other settings of the Trainer, Lightning counts validations as soon as they end
            is_each = trainer.check_val_every_n_epoch == 1 and getattr(trainer, "val_check_interval", None) == 1.0
            count = self._check if is_each else super().on_train_epoch_end
            count(trainer, pl_module)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epochs since the last check, of which Lightning counts only one."""
        epoch, least = trainer.current_epoch + 1, min(_LEAST_CHECKS, self.patience)
        waited = self.wait_count + max(0, epoch - self._checked_epoch - 1)
        self.wait_count = before = waited if self._checks + 1 >= least else min(waited, self.patience - 2)
        super().on_train_epoch_end(trainer, pl_module)
        if self.wait_count > before:
            self._checks += 1
        elif self.wait_count < before or not before:
            self._checks = 0
        if self._checks:
            self.wait_count += waited - before
        self._checked_epoch = epoch
