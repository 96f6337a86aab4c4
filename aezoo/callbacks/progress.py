"""The progress bar."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from rich import get_console
from torch import Tensor

from aezoo.callbacks.base import check_count, unpack
from aezoo.training.arguments import Checked


class ProgressBar(Checked, RichProgressBar):
    """Progress bar, by rich, with the loss terms of the last batch, val/loss and samples per second.

    Between two refreshes, the cost per batch is negligible. If the output is not a terminal, one line is printed per
    epoch, with val/loss if the epoch has been validated.

    Args:
        refresh_rate: refreshes per second; 0 disables the bar.
        leave: keep the bar of each epoch on the screen.
    """

    def __init__(self, refresh_rate: int = 5, leave: bool = False) -> None:
        check_count(self, "refresh_rate", refresh_rate, 0)
        super().__init__(refresh_rate, leave, RichProgressBarTheme(metrics_format=".4g"))
        self._plain_lines = False
        self._finished: int | None = None
        self._validated = False
        self._terms: dict[str, Tensor] = {}
        self._rate: float | None = None
        self._counting_since: float | None = None
        self._samples, self._shown_at = 0, 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        console = get_console()
        seen = console.is_terminal or console.is_jupyter
        self._plain_lines = self.refresh_rate > 0 and trainer.is_global_zero and not seen
        if self._plain_lines:
            self.disable()

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        shown: dict[str, Any] = {name: float(value) for name, value in self._terms.items()}
        logged = trainer.callback_metrics
        if "val/loss" in logged:
            shown["val/loss"] = float(logged["val/loss"])
        rate = self._rate if self._rate is not None else logged.get("train/samples_per_s")
        return shown if rate is None else {**shown, "samples/s": f"{float(rate):,.0f}"}

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        columns = super().configure_columns(trainer)
        description, bar, batches, clock, _ = columns  # the metrics have samples per second
        wide = get_console().width >= 100
        bar.bar_width = 20 if wide else 10
        return [description, bar, batches, clock] if wide else [description, bar, batches]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._print_epoch(trainer)
        self._start_counting()
        with self._without_redrawing():
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.is_enabled:
            return
        self._samples += len(unpack(batch)[0]) * trainer.world_size
        now = time.monotonic()
        if self._due(now) or trainer.is_last_batch:
            if self._counting_since is not None and now > self._counting_since:
                self._rate = self._samples / (now - self._counting_since)
            self._counting_since, self._samples = now, 0
            self._terms = _scalars(outputs)
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._counting_since = None
        self._validated = not trainer.sanity_checking
        super().on_validation_start(trainer, pl_module)

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        with self._without_redrawing():
            super().on_validation_batch_start(*args, **kwargs)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._due(time.monotonic()):
            super().on_validation_batch_end(*args, **kwargs)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._due(time.monotonic()):
            super().on_test_batch_end(*args, **kwargs)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._due(time.monotonic()):
            super().on_predict_batch_end(*args, **kwargs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._finished = trainer.current_epoch

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._print_epoch(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(OSError):  # the terminal may be closed; other callbacks must still save
            super().on_exception(trainer, pl_module, exception)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_progress()  # before other output, since printing over a live bar repeats it

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_test_end(trainer, pl_module)
        self._stop_progress()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_predict_end(trainer, pl_module)
        self._stop_progress()

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        known = last is not None and last > 0
        return f"Epoch {current_epoch + 1}/{last}" if known else f"Epoch {current_epoch + 1}"

    def _start_counting(self) -> None:
        self._terms, self._rate = {}, None
        self._samples, self._counting_since, self._shown_at = 0, None, 0.0

    def _due(self, now: float) -> bool:
        if now - self._shown_at < 1 / max(self.refresh_rate, 1e-9):
            return False
        self._shown_at = now
        return True

    @contextlib.contextmanager
    def _without_redrawing(self) -> Iterator[None]:
        """Leave drawing to the refresh thread: rich draws at once if a task is added or reset."""
        bar = self.progress
        if bar is not None:
            bar.disable = True
        try:
            yield
        finally:
            if bar is not None:
                bar.disable = False

    def _print_epoch(self, trainer: pl.Trainer) -> None:
        """Print a line for the last epoch; its means are logged by the model after all callbacks."""
        if self._plain_lines and self._finished is not None:
            logged = trainer.callback_metrics
            # the metrics still contain the loss of an earlier validation
            names = ("train/loss", "val/loss") if self._validated else ("train/loss",)
            named = [f"{name} {float(logged[name]):.4g}" for name in names if name in logged]
            if "train/samples_per_s" in logged:
                named.append(f"{float(logged['train/samples_per_s']):,.0f} samples/s")
            last = trainer.max_epochs if trainer.max_epochs not in (None, -1) else "?"
            print(f"epoch {self._finished + 1}/{last}", *named, sep="  ", flush=True)
        self._finished, self._validated = None, False


def _scalars(outputs: Any) -> dict[str, Tensor]:
    """Return the loss terms that a training step returned."""
    if isinstance(outputs, Tensor):
        return {"loss": outputs}
    if isinstance(outputs, dict):
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor) and value.numel() == 1}
    return {}
