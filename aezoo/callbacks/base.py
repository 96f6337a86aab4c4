"""Base class and utilities of the picture callbacks: drawing schedule, samples and output files."""

import random
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from aezoo.callbacks import media
from aezoo.data.columns import Columns
from aezoo.errors import AezooError
from aezoo.training.arguments import Checked
from aezoo.training.seeding import forked_rng

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from aezoo.autoencoder import Autoencoder

_SEED = 0
_CHUNK = 128
# 128 MiB of float32: the maximum that a callback stores of large samples
_MAX_STORED_VALUES = 2**25
# the order in which TensorBoard shows pictures
_PICTURES = (
    "reconstructions", "samples", "latents", "latent_map", "traversal", "interpolation", "kl_per_dimension",
    "codebook_indices", "codebook_usage", "codebook_frequencies", "filters", "atoms",
)  # fmt: skip
# default: epochs between two pictures, and the maximum fraction of a fit's time spent on drawing
PERIOD, _SHARE = 5, 0.03
# estimated seconds for the pictures of an epoch, used until the first have been drawn
_FIRST_GUESS = 0.5
# maximum number of samples or panels in one picture
MAX_DRAWN = 10_000


def run_folder(trainer: pl.Trainer) -> Path:
    """Return the folder of this run; must be called on every rank, because Lightning broadcasts the path."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def is_dry_run(trainer: pl.Trainer) -> bool:
    """Return whether the trainer only runs a few batches (fast_dev_run); then nothing is drawn or written."""
    return bool(getattr(trainer, "fast_dev_run", False))


def is_enabled(callback: pl.Callback) -> bool:
    """Return whether a callback is enabled; even a disabled one costs 7 us per step in Lightning's hooks."""
    if getattr(callback, "every_n_epochs", 1) == 0:
        return False
    return all(getattr(callback, name, 1) != 0 for name in ("n_steps", "decay", "patience"))


def unpack(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Return (x, labels) of a batch x, (x,) or (x, y); labels are None unless y is one integer per sample."""
    if isinstance(batch, Tensor):
        return batch, None
    x, y = batch[0], batch[1] if len(batch) > 1 else None
    is_label = isinstance(y, Tensor) and y.ndim == 1 and not y.is_floating_point()
    return x, y if is_label else None


@contextmanager
def preserved_state(model: pl.LightningModule) -> Iterator[None]:
    """Set evaluation mode, no gradients and a fixed seed; restore modes and random states on exit."""
    modes = [(module, module.training) for module in model.modules()]
    # Lightning's isolate_rng does not restore the states after an exception
    states = random.getstate(), np.random.get_state()
    model.eval()
    try:
        with forked_rng(model.device), torch.no_grad():
            torch.manual_seed(_SEED)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, training in modes:
            module.training = training


def save_figure(trainer: pl.Trainer, folder: Path, name: str, figure: "Figure") -> None:
    """Write a figure to `folder/name.png` atomically and to each logger that supports images; on rank zero only."""
    from aezoo.callbacks.plotting import render, write_png

    pixels = render(figure)
    png = write_png(folder / f"{name}.png", pixels)
    media.log_picture(trainer, f"{folder.name}/{picture_title(name)}", pixels, png)


class DrawingTime:
    """Schedules all pictures of a fit for the same epochs, so that drawing takes a small fraction of its time."""

    _of: ClassVar["weakref.WeakKeyDictionary[pl.Trainer, DrawingTime]"] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self._started, self._spent, self._before = time.monotonic(), 0.0, 0.0
        self._cost, self._epoch, self._allowed = _FIRST_GUESS, -1, False

    @classmethod
    def start(cls, trainer: pl.Trainer) -> None:
        """Reset the times for a new fit; called by each callback before the fit starts."""
        cls._of[trainer] = cls()

    @classmethod
    def of(cls, trainer: pl.Trainer) -> "DrawingTime":
        """Return the instance that all callbacks of a trainer share."""
        return cls._of[trainer]

    def allows(self, epoch: int) -> bool:
        """Return whether the pictures of this epoch stay within the limit; the same value for all callbacks."""
        if epoch != self._epoch:
            if self._allowed:
                self._cost = self._spent - self._before
            self._epoch, self._before = epoch, self._spent
            # twice, since those at the end of training are always drawn
            self._allowed = self._spent + 2 * self._cost <= _SHARE * (time.monotonic() - self._started)
        return self._allowed

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Add the time spent in the context."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._spent += time.monotonic() - began


def picture_title(name: str) -> str:
    """Return a picture's name in loggers, with a number, since TensorBoard sorts pictures by name.

    Args:
        name: name of the file, may have a suffix.
    """
    words = name.replace("_", " ").replace("kl ", "KL ")
    place = next((i for i, known in enumerate(_PICTURES, 1) if name.startswith(known)), None)
    return words if place is None else f"{place:02} {words}"


@contextmanager
def warn_on_error(owner: Any) -> Iterator[None]:
    """Turn an error into a warning, once until `owner._warned` is reset, so that training continues."""
    try:
        yield
    except Exception as error:
        if not owner._warned:
            owner._warned = True
            rank_zero_warn(f"{type(owner).__name__} drew no picture: {type(error).__name__}: {error}")


def check_period(owner: object, every_n_epochs: int | None) -> int:
    """Return the period, `PERIOD` for None; reject a negative one."""
    if every_n_epochs is None:
        return PERIOD
    if every_n_epochs < 0:
        raise AezooError(
            f"{type(owner).__name__}.every_n_epochs must be 0 (off) or the number of epochs between two pictures, "
            f"got {every_n_epochs}"
        )
    return every_n_epochs


def check_count(owner: object, name: str, value: int, minimum: int = 1, maximum: int | None = None) -> int:
    """Reject a count below `minimum` or above `maximum`."""
    if value < minimum:
        raise AezooError(f"{type(owner).__name__}.{name} must be at least {minimum}, got {value}")
    if maximum is not None and value > maximum:
        raise AezooError(f"{type(owner).__name__}.{name} must be at most {maximum}, got {value}")
    return value


def check_not_negative(owner: object, name: str, value: float) -> float:
    """Reject a number below 0."""
    if not value >= 0:
        raise AezooError(f"{type(owner).__name__}.{name} must be at least 0, got {value}")
    return value


class Picture(Checked, pl.Callback):
    """Draws after the validation of every n-th epoch and at the end of training; subclasses implement `draw`.

    The samples are the first ones of the first validation, so that pictures of different epochs show the same samples.
    Only rank zero draws. An error while drawing gives one warning and does not end the run.

    Args:
        every_n_epochs: epochs between two pictures; 0 disables them. None draws every 5 epochs, or less often if all
            pictures would take more than 3 % of the fit's time. If an epoch is not validated, its picture is drawn
            after the next validation.
        n_inputs: number of validation samples that `draw` needs.

    Attributes:
        requested_period: the period set by the user, in epochs; 0 if none was set.
    """

    def __init__(self, every_n_epochs: int | None, n_inputs: int) -> None:
        super().__init__()
        self.every_n_epochs, self._limited = check_period(self, every_n_epochs), every_n_epochs is None
        self.requested_period = every_n_epochs or 0
        self._n_inputs = n_inputs
        self._x: list[Tensor] = []
        self._y: list[Tensor] = []
        self._complete: bool
        self._reset()

    def draw(self, model: "Autoencoder", x: Tensor, y: Tensor | None) -> "dict[str, Figure]":
        """Return figures by file name; empty if there is nothing to draw for the model.

        Args:
            model: in evaluation mode, without gradients.
            x: at most `n_inputs` validation samples on the CPU; none if the fit has no validation.
            y: their labels.
        """
        raise NotImplementedError

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Compute function(x) in chunks on the model's device in the trainer's precision; float32 on the CPU."""
        convert, device = self._trainer.precision_plugin.convert_input, self._trainer.lightning_module.device
        with self._trainer.precision_plugin.forward_context():
            return torch.cat([function(convert(part.to(device))).float().cpu() for part in x.split(_CHUNK)])

    def is_due(self, epoch: int, last: bool) -> bool:
        """Return whether to draw after the validation of an epoch, counted from 1; `last` if it is the last one."""
        return last or epoch // self.every_n_epochs > self._looked_at // self.every_n_epochs

    @property
    def columns(self) -> Columns | None:
        """Return the columns of the trainer's data if they are a table, else None."""
        found = getattr(getattr(self._trainer, "datamodule", None), "columns", None)
        return found if isinstance(found, Columns) else None

    @property
    def caption(self) -> str:
        """Return a caption that says when the picture was drawn."""
        return f"epoch {self._epoch + 1}, step {self._trainer.global_step}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._reset()
        if stage == "fit" and self.every_n_epochs and not is_dry_run(trainer):
            self._trainer, self._folder = trainer, run_folder(trainer) / "pictures"
            self._active = trainer.is_global_zero
            DrawingTime.start(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._looked_at = self._looking_at = trainer.current_epoch

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if not trainer.sanity_checking and epoch != self._looking_at:
            self._looked_at, self._looking_at = self._looking_at, epoch

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._active and not self._complete and dataloader_idx == 0 and not trainer.sanity_checking:
            x, y = unpack(batch)
            n = min(self._n_inputs, max(1, _MAX_STORED_VALUES // max(1, x[0].numel())))
            left = n - sum(len(part) for part in self._x)
            # copied, because a batch may be a view of memory that is reused
            self._x.append(x[:left].detach().float().to("cpu", copy=True))
            if y is not None:
                self._y.append(y[:left].detach().to("cpu", copy=True))
            self._complete = left <= len(x)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._active and not trainer.sanity_checking:
            self._complete = True
            self._epoch = trainer.current_epoch
            last = self._epoch + 1 == trainer.max_epochs
            if self.is_due(self._epoch + 1, last) and (
                last or not self._limited or DrawingTime.of(trainer).allows(self._epoch)
            ):
                self._draw(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._active and self._drawn_at != trainer.global_step:
            self._epoch = max(0, trainer.current_epoch - 1)
            self._draw(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._reset()

    def _reset(self) -> None:
        self._active, self._complete, self._warned = False, self._n_inputs == 0, False
        self._epoch, self._drawn_at = 0, -1
        # epochs, counted from 1, of the previous and the current validation
        self._looked_at = self._looking_at = 0
        self._x.clear()
        self._y.clear()

    def _draw(self, pl_module: pl.LightningModule) -> None:
        trainer, self._drawn_at = self._trainer, self._trainer.global_step
        if self._n_inputs and not self._x:
            return
        x = torch.cat(self._x) if self._x else torch.empty(0)
        y = torch.cat(self._y) if self._y else None
        with warn_on_error(self), DrawingTime.of(trainer).measured():
            with preserved_state(pl_module):
                figures = self.draw(cast("Autoencoder", pl_module), x, y)
            for name, figure in figures.items():
                save_figure(trainer, self._folder, name, figure)


class EpochEnd(pl.Callback):
    """Calls `on_epoch_logged` when all metrics of an epoch are available.

    The model logs training metrics after `on_train_epoch_end`, so they are read in the next hook.
    """

    _ended: int | None = None

    def on_epoch_logged(self, trainer: pl.Trainer, epoch: int) -> None:
        """Called when the metrics of an epoch, counted from 0, are in `trainer.callback_metrics`."""
        raise NotImplementedError

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ended = None if is_dry_run(trainer) else trainer.current_epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close_epoch(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close_epoch(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close_epoch(trainer)

    def _close_epoch(self, trainer: pl.Trainer) -> None:
        if self._ended is not None:
            epoch, self._ended = self._ended, None
            self.on_epoch_logged(trainer, epoch)


class BestLoss:
    """The lowest val/loss so far and its epoch."""

    def __init__(self) -> None:
        self.value, self.epoch = float("inf"), -1

    def update(self, trainer: pl.Trainer) -> None:
        """Update the values with the validation that has just ended."""
        loss = trainer.callback_metrics.get("val/loss")
        if loss is not None and float(loss) < self.value:
            self.value, self.epoch = float(loss), trainer.current_epoch

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {"value": self.value, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the values from a checkpoint."""
        self.value, self.epoch = float(state["value"]), int(state["epoch"])
