"""Training steps: the same noise after a restart, means over an epoch, step counters, initialisation with data."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from aezoo.metrics import Means
from aezoo.training import compilation
from aezoo.training.batches import BatchUnpacker
from aezoo.training.precision import from_bytes
from aezoo.training.seeding import mix, seed_all


class TrainingSteps(BatchUnpacker):
    """The training step of every model, in three parts that a faster loop calls one by one."""

    started: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._train_means = Means()
        self._before_start: list[Tensor] = []
        self._fit_seed: int | None = None
        self._compiled: compilation.Compiled | None = None
        self._channels_last = False
        # whether nothing draws from NumPy's or Python's generators in this fit
        self._uses_only_torch_rng = False

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = self.begin_step(batch, batch_idx)
        terms, values = self.step_terms(x, y)
        self.end_step(terms, values, len(x))
        return terms

    def begin_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor | None]:
        """Unpack and check a batch, and seed the step's noise; the first of three parts of a training step."""
        x, y = self._unpack(batch)
        self._seed_step(batch_idx)
        trainer = self._fitted_by()
        if "steps" in self._buffers and trainer is not None:
            # in place, since a compiled step or a CUDA graph reads it each time
            self._buffers["steps"].fill_(self.steps_before + trainer.global_step)  # type: ignore[union-attr]
        if "started" in self._buffers:
            first = trainer is None or trainer.global_step == 0
            if first or self._before_start:
                self._init_from_first_batch(x, first)  # in later steps the flag need not be fetched from an accelerator
        return x, y

    def step_terms(self, x: Tensor, y: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the loss, by name and as one vector, compiled or not; the second part, device work only."""
        terms: tuple[dict[str, Tensor], Tensor] = (self._compiled or self._terms)(x, y)
        return terms

    def end_step(self, terms: dict[str, Tensor], values: Tensor, n: int) -> None:
        """Add the terms of n samples to the epoch's means; the third part."""
        self._train_means.add(terms, n, values)

    def _terms(self, x: Tensor, y: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """The loss of a batch, which may be bytes, and all its terms as one vector; this function is compiled."""
        x = from_bytes(x)
        if self._channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        # only the loss needs gradients
        terms = {name: term if name == "loss" else term.detach() for name, term in self.loss(x, y).items()}
        return terms, torch.stack([*terms.values()]).detach()

    def _fitted_by(self) -> pl.Trainer | None:
        """The Trainer that is fitting this model, if any; Lightning keeps the reference after a fit."""
        trainer = self._trainer
        return trainer if trainer is not None and trainer.training else None

    def _seed_step(self, batch_idx: int) -> None:
        """Make noise a function of (seed, rank, epoch, batch): a resumed run draws the same as an uninterrupted one."""
        trainer = self._fitted_by()
        if trainer is not None and self._fit_seed is not None:
            seed = mix(self._fit_seed, trainer.global_rank, trainer.current_epoch, batch_idx)
            seed_all(seed, self._device, others=not self._uses_only_torch_rng)

    def on_train_epoch_end(self) -> None:
        means = self._train_means.compute()
        self._train_means.reset()
        # sync_dist avoids Lightning's warning: the means of all ranks are equal already
        self.log_dict({f"train/{name}": value for name, value in means.items()}, sync_dist=True)

    # ---- for models that change over training -----------------------------------------------------------------------

    def enable_step_counter(self) -> None:
        """Add the buffer `steps`, the optimiser steps taken; for constructors of models that change over training."""
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def step_fraction(self, n: float) -> Tensor:
        """The share of n optimiser steps that has been taken, from 0 to 1, (); 1 for n = 0."""
        steps = self._buffers["steps"]
        assert steps is not None
        return (steps / n).clamp(max=1) if n else 1 + 0 * steps

    # ---- for models that their first data initialise ----------------------------------------------------------------

    def enable_data_init(self) -> None:
        """Add the buffer `started`; for constructors of models that `init_from_data` initialises with data."""
        self.register_buffer("started", torch.tensor(False))

    def init_from_data(self, x: Tensor) -> None:
        """Initialise parameters from the first training batch of all ranks, (N, *input_shape)."""
        raise NotImplementedError(f"{type(self).__name__} must implement init_from_data")

    @torch.no_grad()
    def _init_from_first_batch(self, x: Tensor, first: bool) -> None:
        if not self.started:
            # after a step that was not finite the fault guard restores buffers, `started` among them, but no weights
            for parameter, before in zip(self.parameters(), self._before_start, strict=False):
                parameter.copy_(before)
            if self._fitted_by() is not None and not self._before_start:
                self._before_start = [parameter.detach().clone() for parameter in self.parameters()]
            self.init_from_data(self.all_gather_batch(from_bytes(x)))
            self.started.fill_(True)
        elif not first:
            self._before_start = []
