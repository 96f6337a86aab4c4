"""Training until the validation loss has stopped improving, on one core and within a limit of time."""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

import aezoo
from aezoo.tasks.samples import evaluation_mode

# loss terms whose values depend on an opponent that is also trained
_ADVERSARIAL_TERMS = frozenset(("adversarial", "discriminator", "mi"))
# hyperparameters with the length of a schedule in optimiser steps; the loss changes until it has ended
_SCHEDULES = ("capacity_steps", "kl_steps", "k_steps", "l0_steps", "l1_steps", "level_steps", "temperature_steps")
# optimiser steps of each phase of a model that is trained layer by layer, as long as the usual schedule
_PHASE_STEPS = 1000


class Budget(NamedTuple):
    """When a training ends.

    Attributes:
        interval: optimiser steps between two evaluations.
        patience: evaluations without an improvement after which a training has converged.
        least: smallest decrease that is an improvement, as a share of the decrease of the loss since the first step.
        seconds: limit of training and evaluations together, see `clock`.
        samples: validation samples of an evaluation, the same each time and with the same noise.
    """

    interval: int = 200
    patience: int = 10
    least: float = 5e-4
    seconds: float = 300.0
    samples: int = 4000

    def as_text(self) -> str:
        """The text of a CSV's cell, without the time limit, which does not change a converged training."""
        return f"converged: {self.patience}x{self.interval} steps, least {self.least:g}"


def clock(device: torch.device) -> float:
    """Processor time of this process on the CPU, which other load does not increase; otherwise wall-clock time."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def monitored(terms: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """The name and value of the monitored figure, which should decrease.

    The loss, except for losses with an opponent: the negative ELBO of those that have one, otherwise the nll. The loss
    of a perceptual model contains the opponent's gradient without its value.
    """
    if not _ADVERSARIAL_TERMS & terms.keys() or "perceptual" in terms:
        return "loss", terms["loss"]
    return ("-elbo", -terms["elbo"]) if "elbo" in terms else ("nll", terms["nll"])


def schedule_end(model: aezoo.Autoencoder, batches: int) -> int:
    """The optimiser step from which a model's objective stays the same.

    Args:
        model: the model.
        batches: optimiser steps of an epoch.
    """
    lengths = [int(model.hparams.get(name) or 0) for name in _SCHEDULES]
    if "phase_epochs" in model.hparams:
        lengths.append(len(model.encoder) * model.hparams["phase_epochs"] * batches)  # type: ignore[arg-type]
    return max(lengths)


def phase_epochs(batches: int) -> int:
    """Epochs of a phase of a model that is trained layer by layer; its default needs a fit of known length."""
    return math.ceil(_PHASE_STEPS / batches)


class Convergence(pl.Callback):
    """Ends a fit when the monitored figure has stopped improving, and restores the weights of its lowest value.

    Args:
        x: validation samples (N, *input_shape).
        y: their labels, if any.
        batch_size: samples at a time, as in training: some losses compare those of a batch.
        budget: when to stop.

    Attributes:
        columns: the results, as columns of a CSV.
        training_seconds: the part of `seconds` without evaluations.
    """

    def __init__(self, x: Tensor, y: Tensor | None, batch_size: int, budget: Budget) -> None:
        self.budget, self.columns = budget, dict[str, Any]()
        labels = [None] * len(x) if y is None else y.split(batch_size)
        self._batches = [*zip(x.split(batch_size), labels, strict=False)]
        self._began = self._evaluating = self.training_seconds = 0.0
        self._first = self._best = self._reference = math.inf
        self._start = self._waited = 0
        self._weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, aezoo.Autoencoder)
        self._start = schedule_end(pl_module, int(trainer.num_training_batches))
        self._began = clock(pl_module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        step, seconds = trainer.global_step, clock(pl_module.device) - self._began
        is_late = seconds >= self.budget.seconds
        is_due = step == 1 or (step >= self._start and step % self.budget.interval == 0)
        if not (is_due or is_late):
            return
        assert isinstance(pl_module, aezoo.Autoencoder)
        value = self.evaluate(pl_module)
        if step == 1:
            self._first = value
        if step >= self._start or is_late:
            self._compare(trainer, pl_module, value, seconds)
        self._evaluating += clock(pl_module.device) - self._began - seconds
        stopped = "diverged" if not math.isfinite(value) else "capped" if is_late else ""
        if not stopped and self._waited >= self.budget.patience:
            stopped = "converged"
        if stopped:
            self.columns["stopped"] = stopped
            trainer.should_stop = True

    def _compare(self, trainer: pl.Trainer, model: aezoo.Autoencoder, value: float, seconds: float) -> None:
        if value < self._best:
            self._best = value
            self._weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
            self.columns |= {"best_step": trainer.global_step, "seconds_to_best": seconds}
            self.columns["best_epoch"] = round(trainer.global_step / trainer.num_training_batches, 2)
        if value < self._reference - self.budget.least * max(0.0, self._first - value):
            self._reference, self._waited = value, 0
        else:
            self._waited += 1

    def evaluate(self, model: aezoo.Autoencoder) -> float:
        """The monitored figure of the validation samples."""
        total, count = 0.0, 0
        with evaluation_mode(model):
            for i, (x, y) in enumerate(self._batches):
                torch.manual_seed(i)
                terms = model.loss(x.to(model.device), None if y is None else y.to(model.device))
                self.columns["monitor"], value = monitored(terms)
                total, count = total + float(value) * len(x), count + len(x)
        return total / count

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = clock(pl_module.device) - self._began
        self.columns |= {"val": self._best, "steps": trainer.global_step, "seconds": total}
        self.columns["epochs"] = round(trainer.global_step / trainer.num_training_batches, 2)
        self.training_seconds = total - self._evaluating
        if self._weights:
            pl_module.load_state_dict(self._weights)
