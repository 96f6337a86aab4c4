"""The contract of every model and the only training loop."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import aezoo
from aezoo import likelihoods, optimizers
from aezoo.corruptions import Corruption
from aezoo.errors import AezooError
from aezoo.likelihoods import Likelihood
from aezoo.metrics import Evaluation, Means

_EVALUATION_SEED = 20
_IMPORTANCE_SAMPLES = 100


def at_least_float32(values: Tensor) -> Tensor:
    """Values in float32 if their precision is lower: what must stay exact under autocast is computed there."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Whatever is drawn or seeded inside, torch's random streams go on afterwards as if nothing had been."""
    # torch's fork_rng covers the CPU and CUDA; manual_seed seeds Apple's GPUs as well
    apple = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        if apple is not None:
            torch.mps.set_rng_state(apple)


class Autoencoder(pl.LightningModule):
    """An encoder, a decoder, a likelihood and a loss; subclass it in one file and write the paper's formula in `loss`.

    Losses are in nats per sample: summed over data dimensions, averaged over the batch. Batches are `x`, `(x,)` or
    `(x, y)`; x is float, (B, *input_shape); labels y are optional.

    A subclass sets `encoder`, `decoder` and `code_shape` and calls `save_hyperparameters()`; its constructor takes
    `input_shape` and plain keyword arguments with defaults, nothing else.

    Attributes:
        input_shape: shape of one sample.
        code_shape: shape of one code.
        likelihood: p(x | decoder output).
        corruption: what the input goes through in training; None for most models.
        has_prior: `sample` works.
        sparse_code: most entries of a code are meant to be zero.

    Args:
        input_shape: shape of one sample: (D,), (C, L), (C, H, W) or (C, D, H, W).
        likelihood: how outputs are compared with data, see `aezoo.likelihoods`.
        lr: learning rate.
        optimizer: adam, adamw, sgd, ... see `aezoo.optimizers`.
        weight_decay: the optimiser's weight decay.
        lr_schedule: constant, cosine, linear, exponential or step, from warm-up to the last step.
        warmup_steps: optimiser steps over which the learning rate rises linearly.

    Raises:
        AezooError: a value that cannot work; the message says which and what is possible.
    """

    has_prior: ClassVar[bool] = False
    sparse_code: ClassVar[bool] = False

    encoder: nn.Module
    decoder: nn.Module
    code_shape: tuple[int, ...]
    corruption: Corruption | None

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        likelihood: str = "bernoulli",
        lr: float = 1e-3,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= len(input_shape) <= 4 or any(int(n) != n or n < 1 for n in input_shape):
            raise AezooError(f"input_shape must be (D,), (C, L), (C, H, W) or (C, D, H, W), got {tuple(input_shape)}")
        optimizers.check(optimizer, lr, weight_decay, lr_schedule, warmup_steps)
        self.input_shape = tuple(int(n) for n in input_shape)
        self.likelihood: Likelihood = likelihoods.likelihood(likelihood)
        self.corruption = None  # not on the class, where it would hide the module that a subclass sets
        self.lr, self.optimizer, self.weight_decay = lr, optimizer, weight_decay
        self.lr_schedule, self.warmup_steps = lr_schedule, warmup_steps
        self._train_means = Means()
        self._evaluation: Evaluation | None = None
        self._checked: set[bool] = set()

    # ---- the contract -----------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """The deterministic code, (B, *input_shape) -> (B, *code_shape); of a posterior, its mean."""
        code: Tensor = self.encoder(x)
        return code

    def decode(self, z: Tensor) -> Tensor:
        """The reconstruction in data space, (B, *code_shape) -> (B, *input_shape): the likelihood's mean."""
        return self.likelihood.mean(self.decoder(z))

    def forward(self, x: Tensor) -> Tensor:
        """decode(encode(x)): what an export contains."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """Named scalars in nats per sample; `loss` is minimised, all are logged.

        Args:
            x: (B, *input_shape).
            y: (B,) labels, for models that use them.
        """
        raise NotImplementedError(f"{type(self).__name__} must write its loss")

    def sample(self, n: int) -> Tensor:
        """Draw n samples from the model's prior, (n, *input_shape): the likelihood's mean at z ~ p(z).

        Raises:
            AezooError: the model has no prior.
        """
        raise AezooError(f"{type(self).__name__} has no prior to sample from: take a variational model such as vae")

    def score(self, x: Tensor) -> Tensor:
        """Anomaly score, larger is stranger: -log p(x | decoder(encode(x))) in nats, (B, *input_shape) -> (B,)."""
        return self.nll(self.decoder(self.encode(x)), x)

    # ---- for the formulas of subclasses -----------------------------------------------------------------------------

    def nll(self, params: Tensor, x: Tensor) -> Tensor:
        """-log p(x | params) in nats per sample, in at least float32: (B, *shape), (B, *shape) -> (B,)."""
        return -self.likelihood.log_prob(at_least_float32(params), at_least_float32(x))

    def batch_mean(self, values: Tensor) -> Tensor:
        """Mean over the batch dimension, in training over the batches of all ranks, with gradient.

        A loss term that is not linear in such a mean needs it to be the same on one process and on many.
        """
        mean = at_least_float32(values).mean(0)
        if self.training and dist.is_available() and dist.is_initialized():
            from torch.distributed.nn.functional import all_reduce

            mean = all_reduce(mean) / dist.get_world_size()
        return mean

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = self._unpack(batch)
        terms = self.loss(x, y)
        self._train_means.add(terms, len(x))
        return {"loss": terms["loss"], **{name: t.detach() for name, t in terms.items() if name != "loss"}}

    def on_train_epoch_end(self) -> None:
        means = self._train_means.compute()
        self._train_means.reset()
        self.log_dict({f"train/{name}": value for name, value in means.items()}, sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = self._unpack(batch)
        z = self.encode(x)
        found = {"code": z, "reconstruction": self.decode(z), "score": self.score(x)}
        return found if y is None else {**found, "label": y}

    def configure_optimizers(self) -> Any:
        optimizer = optimizers.build(self.optimizer, self.parameters(), self.lr, self.weight_decay)
        if self.lr_schedule == "constant" and not self.warmup_steps:
            return optimizer
        schedule = optimizers.schedule(optimizer, self.lr_schedule, self.warmup_steps, self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "train/lr"}}

    def on_fit_start(self) -> None:
        self._checked.clear()
        self._train_means.reset()
        self._evaluation = None

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path is None or type(self).configure_optimizers is not Autoencoder.configure_optimizers:
            return
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        if isinstance(optimizer, torch.optim.Optimizer) and (scheduler is None or isinstance(scheduler, LambdaLR)):
            optimizers.renew(optimizer, scheduler, self.lr, self.weight_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        from aezoo.registry import name_of

        checkpoint["aezoo"] = {"model": name_of(type(self)), "version": aezoo.__version__}

    def _evaluate(self, batch: Any, batch_idx: int) -> None:
        x, y = self._unpack(batch)
        if self._evaluation is None:
            self._evaluation = Evaluation(self.input_shape, self.device)
        with self._fixed_noise(batch_idx):
            terms = self.loss(x, y)
            x_hat = self(x if self.corruption is None else self.corruption(x))
            log_likelihood = getattr(self, "log_likelihood", None)
            if callable(log_likelihood) and self.trainer.state.fn in ("validate", "test"):
                terms["log_likelihood"] = log_likelihood(x, _IMPORTANCE_SAMPLES).mean()
        self._evaluation.add(terms, x, x_hat)

    def _log_evaluation(self, stage: str) -> None:
        if self._evaluation is not None:
            figures = self._evaluation.compute()
            self._evaluation = None
            self.log_dict({f"{stage}/{name}": value for name, value in figures.items()}, sync_dist=True)

    @contextmanager
    def _fixed_noise(self, batch_idx: int) -> Iterator[None]:
        """The same noise for a batch at every evaluation, so that epochs compare; training's noise is untouched."""
        with forked_rng(self.device):
            torch.manual_seed((_EVALUATION_SEED * 1_000_003 + self.global_rank) * 1_000_003 + batch_idx)
            yield

    def _unpack(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        x, y = (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1] if len(batch) > 1 else None)
        if self.training not in self._checked:
            self.check_batch(x)
            self._checked.add(self.training)
        return x, y

    def check_batch(self, x: Tensor) -> None:
        """Refuse a batch that the model cannot use; the loop calls it on the first batches of training and evaluation.

        Only training data must lie in the likelihood's interval: unseen data may exceed the range they were scaled by.

        Raises:
            AezooError: wrong shape or dtype, values that are not finite, or outside of [0, 1] where that is needed.
        """
        if tuple(x.shape[1:]) != self.input_shape:
            raise AezooError(
                f"the model expects samples of shape {_by(self.input_shape)}, the data give {_by(x.shape[1:])}: "
                "build the model with that input_shape or change the data's size and channels"
            )
        if not x.is_floating_point():
            raise AezooError(f"the model expects float data, got {x.dtype}: scale it first, for images x.float() / 255")
        low, high = float(x.min()), float(x.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise AezooError("the data hold NaN or infinite values: clean them first")
        if self.training and self.likelihood.unit_interval and not (low >= -1e-6 and high <= 1 + 1e-6):
            raise AezooError(
                f"this likelihood needs data in [0, 1], got values from {low:.4g} to {high:.4g}: "
                "scale the data, or take likelihood='gaussian'"
            )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)
