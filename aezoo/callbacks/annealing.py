"""Weights of the KL term that change during training."""

import math
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from aezoo.callbacks.base import check_count
from aezoo.errors import AezooError
from aezoo.training.arguments import Checked
from aezoo.training.model_names import display_name


class BetaAnnealing(Checked, pl.Callback):
    """Increases the weight of the KL term, or its target capacity, over the first `n_steps` optimiser steps.

    - linear: beta increases from 0 to the model's own beta (Bowman et al. 2016, https://arxiv.org/abs/1511.06349).
    - cyclical: the same, repeated `cycles` times; beta increases during the fraction `ratio` of each cycle and is
      constant for the rest (Fu et al. 2019, https://arxiv.org/abs/1903.10145).
    - capacity: C increases from 0 to `max_capacity` nats in the loss nll + beta |kl - C| (Burgess et al. 2018,
      https://arxiv.org/abs/1804.03599).

    The value depends only on the step, so a resumed run continues exactly. Validation, test and the trained model use
    the final value. val/loss is therefore comparable between epochs, and the best checkpoint is selected by the final
    objective. The current value is logged as `train/beta` or `train/capacity`, in at most 500 points. A compiled step
    receives the value as a one-element tensor, since a float would be a constant and each change would recompile.

    Args:
        mode: linear, cyclical or capacity.
        n_steps: optimiser steps until the final value; 0 disables annealing.
        cycles: number of cycles in cyclical mode.
        ratio: fraction of a cycle in which beta increases.
        max_capacity: final C in nats, in capacity mode.
        gamma: beta in capacity mode; 0 uses the model's own beta.
    """

    def __init__(
        self,
        mode: Literal["linear", "cyclical", "capacity"] = "linear",
        n_steps: int = 0,
        cycles: int = 4,
        ratio: float = 0.5,
        max_capacity: float = 25.0,
        gamma: float = 0.0,
    ) -> None:
        super().__init__()
        if mode not in ("linear", "cyclical", "capacity"):
            raise AezooError(f"BetaAnnealing.mode must be linear, cyclical or capacity, got {mode!r}")
        if not 0 < ratio <= 1:
            raise AezooError(f"BetaAnnealing.ratio must lie in (0, 1], got {ratio}")
        if not (math.isfinite(max_capacity) and max_capacity >= 0 and math.isfinite(gamma) and gamma >= 0):
            raise AezooError(
                f"BetaAnnealing.max_capacity and gamma must be finite and at least 0, got {max_capacity} and {gamma}"
            )
        self.mode, self.n_steps = mode, check_count(self, "n_steps", n_steps, 0)
        self.cycles, self.ratio = check_count(self, "cycles", cycles, maximum=10_000), ratio
        self.max_capacity, self.gamma = max_capacity, gamma
        self._attribute = "capacity" if mode == "capacity" else "beta"
        self._final: float | None = None
        self._tensor: Tensor | None = None
        self._log_every = max(1, n_steps // 500)

    def value(self, step: int, final: float) -> float:
        """Return the weight at an optimiser step, counted from 0.

        Args:
            step: optimiser steps taken.
            final: the value from `n_steps` on.
        """
        if step >= self.n_steps:
            return final
        if self.mode == "cyclical":
            # step * cycles % n_steps / n_steps is the position within the cycle without rounding
            return final * min(1.0, step * self.cycles % self.n_steps / self.n_steps / self.ratio)
        return final * step / self.n_steps

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._final = None
        if stage != "fit" or not self.n_steps:
            return
        for name in {self._attribute, "beta"}:
            if not isinstance(getattr(pl_module, name, None), int | float):
                raise AezooError(
                    f"BetaAnnealing in {self.mode} mode needs a model with a number `{name}`, which "
                    f"{display_name(type(pl_module))} does not have: use a variational model such as vae, or no "
                    "annealing"
                )
        if self.mode == "capacity":
            self._final = self.max_capacity
            if self.gamma:
                vars(pl_module)["beta"] = self.gamma
        else:
            self._final = float(getattr(pl_module, "beta"))  # noqa: B009  (a plain attribute that mypy cannot know)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._final is None:
            return
        step = trainer.global_step
        value = self.value(step, self._final)
        # a tensor for compiled steps and CUDA graphs, which read its value at each step
        compiled = getattr(pl_module, "_compiled", None) is not None
        self._set(pl_module, self._in_tensor(value, pl_module.device) if compiled else value)
        if step <= self.n_steps and step % self._log_every == 0:
            # not by self.log, which takes 0.25 ms per step
            for logger in trainer.loggers:  # a logger writes on rank zero only
                logger.log_metrics({f"train/{self._attribute}": value}, step=step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._finish(pl_module)

    def _finish(self, pl_module: pl.LightningModule) -> None:
        if self._final is not None:
            self._set(pl_module, self._final)

    def _in_tensor(self, value: float, device: torch.device) -> Tensor:
        if self._tensor is None or self._tensor.device != device:
            # Apple's GPUs have no float64; a 0-dimensional tensor does not promote other dtypes
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._tensor = torch.zeros((), dtype=dtype, device=device)
        return self._tensor.fill_(value)

    def _set(self, pl_module: pl.LightningModule, value: float | Tensor) -> None:
        setattr(pl_module, self._attribute, value)
