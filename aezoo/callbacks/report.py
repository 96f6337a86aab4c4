"""The report of a run, and the record `run.json` from which it is created."""

import json
import math
import os
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

import aezoo
from aezoo.callbacks.base import is_dry_run, run_folder
from aezoo.callbacks.learning_curves import LearningCurves
from aezoo.data import DataModule
from aezoo.errors import AezooError
from aezoo.io import atomic_files
from aezoo.report import write_report
from aezoo.report.runs import RECORD
from aezoo.security import json_files
from aezoo.training.arguments import Checked
from aezoo.training.model_names import display_name

_MAX_BYTES = 2**20


class Report(Checked, pl.Callback):
    """Writes `report.html` at the end of a fit: results, curves, diagnosis, pictures, settings, time and environment.

    The file loads no other files and needs no script, so it can be sent to others. `aezoo report RUN` writes it again,
    including later results of commands such as `detect`. `run.json` is written at the start and the end of a fit. It
    contains what the run's other files do not: time, environment, size of the model and, if a test follows the fit, its
    metrics. An error here gives one warning and does not end the run.

    Args:
        html: write `report.html`; `run.json` is written in any case.
    """

    def __init__(self, html: bool = True) -> None:
        super().__init__()
        self.html = html
        self._reset()

    def _reset(self) -> None:
        self._record: dict[str, Any] = {}
        self._fit: dict[str, Any] = {}
        self._began, self._epochs, self._warned = 0.0, 0, False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = run_folder(trainer)  # on every rank
        if stage == "fit":
            self._reset()
            self._folder, self._began = folder, time.monotonic()
            self._writes = trainer.is_global_zero and not is_dry_run(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._writes:
            return
        try:
            self._record = self._earlier() if trainer.global_step else {}
            self._fit = {
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "environment": environment(trainer),
            }
            self._record |= {
                "model": sizes(trainer, pl_module),
                "fits": [*self._record.get("fits", ()), self._fit],
            }
            self._write()
        except Exception as error:
            self._warn(error)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epochs += 1

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, "finished")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == "fit":
            self._finish(trainer, "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # only for a test that follows the fit; otherwise a fit may be writing to the run's folder
        if self._fit.get("end") == "finished" and not is_dry_run(trainer):
            figures = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("test/")}
            self._record["test"] = _finite(figures)
            self._save()

    def _finish(self, trainer: pl.Trainer, end: str) -> None:
        if not self._fit:
            return  # training had not started, or this is not rank zero
        self._fit |= {"end": end, "seconds": round(time.monotonic() - self._began, 3), "epochs": self._epochs}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LearningCurves) and callback.curves.epochs:
                facts = {k: v for k, v in vars(callback.curves).items() if k not in ("epochs", "train", "val")}
                self._record["curves"] = _finite(facts)
        self._save(warn=end == "finished")  # otherwise only the error that ended the fit is reported

    def _save(self, warn: bool = True) -> None:
        try:
            self._write()
            if self.html:
                write_report(self._folder)
        except Exception as error:
            if warn:
                self._warn(error)

    def _write(self) -> None:
        text = json.dumps(self._record, indent=1)
        atomic_files.write(self._folder / RECORD, lambda file: file.write(text.encode() + b"\n"))

    def _earlier(self) -> dict[str, Any]:
        """Return the record of the earlier starts of a continued run."""
        path = self._folder / RECORD
        if not path.is_file():
            return {}
        try:
            found = json_files.read(path, _MAX_BYTES, str(path))
        except AezooError:
            return {}
        kept = found if isinstance(found, dict) else {}
        # without test metrics, which belong to the end of an earlier fit
        return {"fits": kept["fits"]} if isinstance(kept.get("fits"), list) else {}

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"could not write the report: {' '.join(str(error).split()) or type(error).__name__}")


def environment(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the environment of a run: versions, system, processor, device."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "aezoo": aezoo.__version__,
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": name,
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
    }


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def sizes(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Return the model's name, its parameters, the shapes of a sample and a code, and the numbers of samples."""
    found: dict[str, Any] = {"name": display_name(type(pl_module))}
    found["parameters"] = sum(parameter.numel() for parameter in pl_module.parameters())
    for key in ("input_shape", "code_shape"):
        shape = getattr(pl_module, key, None)
        if shape is not None:
            found[key] = list(shape)
    data: Any = getattr(trainer, "datamodule", None)
    if isinstance(data, DataModule):
        splits: dict[str, Any] = {split: data.dataset(split) for split in data.splits()}
        found |= {f"{name}_samples": len(split) for name, split in splits.items()}
    return found


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Remove numbers that JSON cannot represent."""
    return {key: value for key, value in values.items() if not isinstance(value, float) or math.isfinite(value)}
