"""The losses of all epochs: as a file, a picture and the input of the diagnosis."""

import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from aezoo.callbacks.base import EpochEnd, Picture, is_dry_run, preserved_state, run_folder, warn_on_error
from aezoo.callbacks.checkpoints import EarlyStop
from aezoo.callbacks.loggers import StepLogger
from aezoo.distributions.likelihoods import Bernoulli, ContinuousBernoulli, Gaussian, SigmoidGaussian
from aezoo.io import atomic_files
from aezoo.report.diagnosis import Curves

if TYPE_CHECKING:
    from aezoo.autoencoder import Autoencoder

_SAMPLES = 512
# number of these that are reconstructed
_DECODED = 64
# likelihoods whose mean minimises the mean squared error
_LEAST_SQUARES = (Bernoulli, ContinuousBernoulli, Gaussian, SigmoidGaussian)
# a unit is constant if its variance is less than this fraction of the largest variance
_CONSTANT = 1e-6
# minimum average number of uses per unit of a sparse code for an unused unit to count as dead
_USES = 20


class LearningCurves(EpochEnd, Picture):
    """Writes metrics.csv, a line per epoch, and at the end of a fit pictures/curves.png, with any logger.

    `metrics.csv` contains the epoch, counted from 0 as in the names of checkpoints, the number of optimiser steps, and
    all metrics. A run that continues from a checkpoint replaces the lines after it. A CSVLogger in the same folder
    writes this file itself; the command line's `StepLogger` does not.

    Attributes:
        curves: the losses and the other values that `aezoo.report.diagnosis` needs.
    """

    def __init__(self) -> None:
        super().__init__(every_n_epochs=1, n_inputs=_SAMPLES)
        self.requested_period = 0
        self.curves = Curves((), (), ())
        self._begin()

    def _begin(self) -> None:
        # of each epoch: its number, the loss of training, the loss of validation
        self._rows: list[list[float]] = []
        self._best = [math.inf, math.nan]
        self._ended = None
        self._writes, self._validated = False, False
        self._table: MetricsCSV | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        folder = run_folder(trainer)  # on every rank
        if stage == "fit" and not is_dry_run(trainer):
            self._begin()
            self._trainer, self._writes = trainer, trainer.is_global_zero
            others = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
            taken = any(Path(logger.log_dir) == folder for logger in others if not isinstance(logger, StepLogger))
            self._table = None if taken else MetricsCSV(folder / "metrics.csv")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._writes and self._table is not None:
            with warn_on_error(self):
                self._table.resume(trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_epoch_logged(self, trainer: pl.Trainer, epoch: int) -> None:
        self._record(epoch)
        self._validated = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close_epoch(trainer)
        if self._writes:
            self.curves = self._history(trainer)
            model, x = cast("Autoencoder", pl_module), torch.cat(self._x) if self._x else None
            with warn_on_error(self):
                if x is not None and self._active:
                    with preserved_state(pl_module):
                        self.curves = replace(self.curves, **self._of_code(model, x))
                if self._rows:
                    self._plot()

    def state_dict(self) -> dict[str, Any]:
        if self._ended is not None:
            self._record(self._ended)  # checkpoints are saved at the end of an epoch, before the metrics are complete
        return {"rows": [list(row) for row in self._rows], "best": list(self._best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = [[float(value) for value in row] for row in state_dict["rows"]]
        self._best = [float(value) for value in state_dict["best"]]

    def is_due(self, epoch: int, last: bool) -> bool:
        return False  # curves are only drawn at the end

    def _record(self, epoch: int) -> None:
        """Record the epoch that has ended; replace its row if its metrics were not complete before."""
        step, logged = self._trainer.global_step, self._trainer.callback_metrics
        # logged metrics still contain those of earlier validations
        found = {key: float(value) for key, value in logged.items() if self._validated or not key.startswith("val")}
        if self._rows and self._rows[-1][0] == epoch:
            self._rows.pop()
        self._rows.append([float(epoch), *(found.get(key, math.nan) for key in ("train/loss", "val/loss"))])
        if found.get("val/loss", math.nan) < self._best[0]:
            self._best = [found["val/loss"], found.get("val/mse", math.nan)]
        if self._writes and self._table is not None:
            with warn_on_error(self):
                self._table.add({"epoch": epoch, "step": step, **found})

    # ---- diagnosis --------------------------------------------------------------------------------------------------

    def _history(self, trainer: pl.Trainer) -> Curves:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        stop = next(
            (callback for callback in callbacks if isinstance(callback, EarlyStop) and callback.has_stopped), None
        )
        epochs, train, val = zip(*self._rows, strict=True) if self._rows else ((), (), ())
        return Curves(
            [int(epoch) + 1 for epoch in epochs], train, val, trainer.global_step,
            limit="max_steps" if 0 <= trainer.max_steps <= trainer.global_step else "max_epochs",
            patience=stop.settings["patience"] if stop else 0,
            stopped_by=stop.monitor if stop else "",
            one_epoch=getattr(trainer.lightning_module, "one_epoch", False),
        )  # fmt: skip

    def _of_code(self, model: "Autoencoder", x: Tensor) -> dict[str, Any]:
        """Return the dead units of a code with one axis, and the error of PCA with as many components as units."""
        units = model.code_shape[0] if len(model.code_shape) == 1 and not getattr(model, "discrete_code", False) else 0
        found: dict[str, Any] = {"units": units, "has_posterior": hasattr(model, "posterior")}
        found |= {"has_beta": "beta" in model.hparams, "decoded": self._decoded(model, x)}
        if units:
            found["dead_units"] = self._dead_units(model, x, units)
        # a denoising model's mean squared error is that of corrupted samples, so it is not compared
        if units and model.corruption is None and isinstance(getattr(model, "likelihood", None), _LEAST_SQUARES):
            found |= {"mse": self._best[1], "pca_mse": pca_error(x, units)}
        return found

    def _decoded(self, model: "Autoencoder", x: Tensor) -> tuple[float, float]:
        """Return the range of reconstructions for a likelihood on [0, 1]; for others it is not computed."""
        likelihood = getattr(model, "likelihood", None)
        if not getattr(likelihood, "unit_interval", False) or not x.isfinite().all():
            return 0.0, 1.0
        low, high = self.apply(model, x[:_DECODED]).aminmax()
        return float(low), float(high)

    def _dead_units(self, model: "Autoencoder", x: Tensor, units: int) -> int:
        logged = {key: float(value) for key, value in self._trainer.callback_metrics.items()}
        if model.sparse_code:
            # a unit expected to be used once or twice may be rare instead of dead
            enough = len(x) * logged.get("val/l0", 0.0) >= _USES * units
            return round(units * logged.get("val/dead", 0.0)) if enough else 0
        if "val/active_units" in logged:
            return units - round(logged["val/active_units"])
        variance = self.apply(model.encode, x).flatten(1).double().var(0)
        return int((variance <= _CONSTANT * variance.max()).sum())

    def _plot(self) -> None:
        from aezoo.callbacks import plotting

        history = self.curves
        figure = plotting.curve_figure(
            history.epochs, {"train/loss": history.train, "val/loss": history.val}, f"{history.steps} steps"
        )
        plotting.write_png(self._folder / "curves.png", plotting.render(figure))


def pca_error(x: Tensor, n_components: int) -> float:
    """Return the mean squared error of PCA on every other sample, fitted to the rest; NaN if it cannot be fitted.

    Args:
        x: (N, *shape).
        n_components: number of components.
    """
    fit_ND, test_ND = x[::2].flatten(1).double(), x[1::2].flatten(1).double()
    if not (0 < n_components < min(len(fit_ND), fit_ND.shape[1])) or not len(test_ND) or not x.isfinite().all():
        return math.nan
    mean_D = fit_ND.mean(0)
    fit_ND, test_ND = fit_ND - mean_D, test_ND - mean_D
    # by the Gram matrix, since there are fewer samples than values per sample
    values, vectors = torch.linalg.eigh(fit_ND @ fit_ND.T)
    values, vectors = values[-n_components:], vectors[:, -n_components:]
    kept = values > 1e-10 * values.max()
    codes = test_ND @ fit_ND.T @ vectors[:, kept] / values[kept].sqrt()
    return float((test_ND.square().sum() - codes.square().sum()) / test_ND.numel())


class MetricsCSV:
    """A CSV file to which rows are added; it is rewritten if a row has new columns or repeats an epoch.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._rows, self._columns = path, [], []  # type: tuple[Path, list[dict[str, Any]], list[str]]

    def resume(self, step: int) -> None:
        """Keep the rows up to a step if the file exists."""
        if self._path.is_file():
            with self._path.open(newline="", encoding="utf-8") as file:
                # a killed run may have left an incomplete row
                rows = [row for row in csv.DictReader(file) if None not in row.values()]
            self._rows = [row for row in rows if int(row["step"]) <= step]
            self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Add the row of an epoch."""
        again = bool(self._rows) and str(self._rows[-1]["epoch"]) == str(row["epoch"])
        if again and self._rows[-1] == row:
            return
        self._rows = [*self._rows[:-1], row] if again else [*self._rows, row]
        if again or set(row) - set(self._columns):
            self._write()
        else:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)

    def _write(self) -> None:
        names = {name for row in self._rows for name in row} - {"epoch", "step"}
        self._columns = ["epoch", "step", *sorted(names)]
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        atomic_files.write(self._path, lambda file: file.write(text.getvalue().encode()))
