"""Best and last checkpoints of a run, and when to stop it."""

import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from aezoo.errors import AezooError


def _monitored(metric: str, trainer: pl.Trainer) -> str:
    """The same metric of training where there is no validation; known once the data are set up."""
    return metric.replace("val/", "train/", 1) if trainer.limit_val_batches == 0 else metric


class Checkpoints(ModelCheckpoint):
    """`best-<epoch>-<step>.ckpt`, the lowest validation loss, and `last.ckpt`, in `<run>/checkpoints`.

    A run that is interrupted between two batches writes `last.ckpt` at that very step.

    Args:
        monitor: the metric whose lowest value is best.
        save_top_k: how many of the best to keep; -1 keeps all, 0 none.
        every_n_epochs: epochs between two looks at the metric.
        dirpath: another folder for the files.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        save_top_k: int = 1,
        every_n_epochs: int = 1,
        dirpath: str | None = None,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            # a slash in an inserted metric name would make a folder
            filename="best-{epoch:03d}-{step}",
            auto_insert_metric_name=False,
            monitor=monitor,
            mode="min",
            save_top_k=save_top_k,
            every_n_epochs=every_n_epochs,
            save_last=True,
            save_on_exception=True,
            enable_version_counter=False,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.monitor is not None:
            self.monitor = _monitored(self.monitor, trainer)
        with warnings.catch_warnings():
            # a resumed run goes on in its own folder
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # a checkpoint that comes from elsewhere begins a list of its own here
        if state_dict.get("dirpath") == self.dirpath:
            super().load_state_dict(state_dict)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # a file written inside a batch, or on an epoch's last batch, does not resume exactly; one from any other error
        # may hold a broken state
        batches = trainer.fit_loop.epoch_loop.batch_progress
        counts = batches.state_dict()["current"]
        between = counts["ready"] == counts["processed"] and not batches.is_last_batch
        if isinstance(exception, KeyboardInterrupt) and between and self._should_save_on_exception(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class EarlyStop(EarlyStopping):
    """Ends the run when the metric has not improved for `patience` epochs.

    Args:
        monitor: the metric that should fall.
        patience: epochs of validation without improvement; 0 never stops.
        min_delta: what counts as an improvement.
    """

    def __init__(self, monitor: str = "val/loss", patience: int = 20, min_delta: float = 0.0) -> None:
        if patience < 0:
            raise AezooError(f"early_stopping.patience must be at least 0, got {patience}")
        super().__init__(monitor=monitor, mode="min", patience=patience or 2**62, min_delta=min_delta)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.monitor = _monitored(self.monitor, trainer)
        super().setup(trainer, pl_module, stage)
