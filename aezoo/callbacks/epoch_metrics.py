"""The metrics of each epoch in a file for other programs."""

import json
from typing import Any

import lightning.pytorch as pl

from aezoo.callbacks.base import EpochEnd, is_dry_run, run_folder


class EpochMetrics(EpochEnd):
    """Writes `metrics.jsonl` to the run's folder: a line of JSON per epoch with its number, the step and all metrics.

    For an epoch without validation, the line contains only training metrics. Validation before training, if any, gives
    a first line with epoch -1. An epoch that a resumed run repeats has a second line.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._file = run_folder(trainer) / "metrics.jsonl"  # on every rank
        self._writes = stage == "fit" and trainer.is_global_zero and not is_dry_run(trainer)
        self._ended, self._validated = None, False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = True
        if trainer.sanity_checking:
            self.on_epoch_logged(trainer, -1)

    def on_epoch_logged(self, trainer: pl.Trainer, epoch: int) -> None:
        if self._writes:
            line: dict[str, Any] = {"epoch": epoch, "step": trainer.global_step}
            # logged metrics still contain those of earlier validations
            logged = trainer.callback_metrics.items()
            line |= {name: float(value) for name, value in logged if self._validated or not name.startswith("val")}
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self._validated = False
