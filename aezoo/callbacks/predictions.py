"""Predictions as a file."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch import Tensor

from aezoo.callbacks.base import is_dry_run, run_folder
from aezoo.io import atomic_files
from aezoo.training.arguments import Checked

_CURE = "make room, or choose a folder that can be written with --predictions.folder"


class PredictionWriter(Checked, pl.Callback):
    """Writes predictions.npz: one array each for code, reconstruction, score and, if the data have it, label.

    Several ranks write one file each, predictions-rank0.npz and so on, and each holds the rank's own samples.

    Args:
        folder: where to write; the run's folder if empty.
    """

    def __init__(self, folder: str = "") -> None:
        super().__init__()
        self.folder = folder
        self.path: Path | None = None
        self._parts: dict[str, list[np.ndarray[Any, Any]]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._parts = {}
        if stage == "predict":
            folder = Path(self.folder) if self.folder else run_folder(trainer)
            suffix = "" if trainer.world_size == 1 else f"-rank{trainer.global_rank}"
            self.path = folder / f"predictions{suffix}.npz"

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for name, value in (outputs if isinstance(outputs, dict) else {"prediction": outputs}).items():
            if isinstance(value, Tensor):
                # numpy has no bfloat16; at once, so that no batch stays on the accelerator
                array = (value.float() if value.is_floating_point() else value).cpu().numpy()
                self._parts.setdefault(name, []).append(array)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._parts or self.path is None or is_dry_run(trainer):
            return
        arrays = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        self._parts = {}
        existing = self.path.exists()
        atomic_files.write(self.path, lambda file: np.savez(file, **arrays), cure=_CURE)  # type: ignore[arg-type]
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items())
        print(f"Predictions: {self.path} ({shapes})", flush=True)
        scaling = getattr(getattr(getattr(trainer, "datamodule", None), "source", None), "scaling", None)
        if "reconstruction" in arrays and scaling is not None and scaling.state():
            print("reconstruction is in the scale that the model sees (--data.scale): `aezoo reconstruct` writes the "
                  "units of the data", flush=True)  # fmt: skip
        if existing:
            print(f"aezoo: the earlier {self.path} is replaced; --predictions.folder DIR keeps both", file=sys.stderr)
