"""The base class of all models, which defines their interface."""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aezoo.corruptions import Corruption
from aezoo.distributions import likelihoods
from aezoo.distributions.likelihoods import Likelihood
from aezoo.errors import AezooError
from aezoo.training import collectives, input_checks, optimizers
from aezoo.training.data_statistics import DataStatistics
from aezoo.training.data_units import DataUnits
from aezoo.training.hub_methods import HubMethods
from aezoo.training.hyperparameters import ConstructorHyperparameters
from aezoo.training.model_names import display_name
from aezoo.training.module import TrainingModule

# models import these from here, with the base class
from aezoo.training.precision import at_least_float32 as at_least_float32
from aezoo.training.precision import from_bytes as from_bytes
from aezoo.training.traits import Traits as Traits
from aezoo.training.traits import set_traits


class Autoencoder(ConstructorHyperparameters, HubMethods, TrainingModule):
    """An encoder, a decoder, a likelihood and a loss; subclass it in one file and write the paper's formula in `loss`.

    Losses are in nats per sample: summed over data dimensions, averaged over the batch. Batches are `x`, `(x,)` or
    `(x, y)`; x is float, (B, *input_shape); labels y are optional.

    A subclass sets `encoder`, `decoder` and `code_shape`, or writes `encode` and `decode`. Its constructor takes
    `input_shape` and plain keyword arguments with defaults, nothing else. It names the arguments that it adds and
    passes the others on:

        class MyAE(Autoencoder, defaults={"likelihood": "gaussian"}, sparse_code=True):
            def __init__(self, input_shape: tuple[int, ...], *, width: int = 8, **kwargs: Unpack[TrainingArgs]) -> None:
                super().__init__(input_shape, **kwargs)

    `defaults` changes defaults of arguments that it passes on; all other keywords there are `Traits`. All arguments
    are hyperparameters, which are saved in checkpoints.

    Attributes:
        input_shape: shape of one sample.
        code_shape: shape of one code; that of a sample of zeros if the constructor does not set it.
        likelihood: p(x | decoder output).
        corruption: corruption of the input in training; None for most models.
        code_radius: radius of the ball around 0 in which codes lie; infinite for most models.
        compile_mode: whether a fit compiles the loss: auto (if the run is long enough to save time), off, or a mode
            of torch.compile: default, reduce-overhead, max-autotune. Weights keep their names.
        importance_samples: draws of the code per sample for `log_likelihood` in validation and test after training;
            more draws tighten the bound.
        steps_before: optimiser steps of earlier fits, from which a fit continues; 0 starts from the beginning, see
            `enable_step_counter`.
        data_units: the units of the data that the model was trained on, if it was trained with `aezoo.DataModule`;
            `load_model` reads them from a checkpoint. Commands take DataFrames and write tables in these units.
        data_statistics: codes and scores of the training data, for `generate` and `detect`: pretrained weights, and
            runs after `detect`, have them. None for others; training removes them.
        takes_bytes: whether `training_step` scales bytes to [0, 1] itself, as part of the compiled function.

    Args:
        input_shape: shape of one sample: (D,), (C, L), (C, H, W) or (C, D, H, W).
        likelihood: how outputs are compared with data: bernoulli, continuous_bernoulli, gaussian, gaussian:0.1,
            gaussian:learned, sigmoid_gaussian, laplace, discretised_logistic, beta_binomial, logcosh, logit_laplace.
        lr: learning rate.
        optimizer: adam, adamw, adamax, nadam, radam, rmsprop, adagrad, adadelta or sgd; also adam:beta1=0.5,eps=1e-4.
        weight_decay: the optimiser's weight decay.
        lr_schedule: constant, cosine, linear, exponential, step or multistep:FACTOR@P,P, from warm-up to the last step.
        warmup_steps: optimiser steps over which the learning rate rises linearly.

    Raises:
        AezooError: an invalid value; the message names it and the valid ones.
    """

    compile_mode: str = "auto"
    importance_samples: int = 100
    code_radius: float = math.inf
    data_units: DataUnits | None = None
    data_statistics: DataStatistics | None = None
    takes_bytes: bool = False
    steps_before: int = 0

    encoder: nn.Module
    decoder: nn.Module
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

    @cached_property
    def code_shape(self) -> tuple[int, ...]:
        """See the attributes above."""
        return input_checks.code_shape(self)

    # ---- the interface ----------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """The deterministic code, (B, *input_shape) -> (B, *code_shape); the mean of a posterior."""
        code: Tensor = self.encoder(x)
        return code

    def decode(self, z: Tensor) -> Tensor:
        """The reconstruction in data space, (B, *code_shape) -> (B, *input_shape): the likelihood's mean."""
        return self.likelihood.mean(self.decoder(z))

    def forward(self, x: Tensor) -> Tensor:
        """decode(encode(x)): what an export contains."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """Named scalars in nats per sample; `loss` is minimised.

        `aezoo/training/steps.py` logs each as `train/NAME`.

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
        raise AezooError(f"{display_name(type(self))} has no prior to sample from: use a variational model such as vae")

    def score(self, x: Tensor) -> Tensor:
        """-log p(x | z) in nats for z = encode(x), or another criterion of the model: (B, *input_shape) -> (B,).

        Larger is more anomalous. To compare samples with each other, use `anomaly_score`.
        """
        z = self.encode(x)
        params = self.decoder(z) if hasattr(self, "decoder") else self.likelihood.params_from_mean(self.decode(z))
        return self.nll(params, x)

    def anomaly_score(self, x: Tensor) -> Tensor:
        """`score` with the deviance instead of -log p(x | z), larger is more anomalous: (B, *input_shape) -> (B,).

            deviance(x, z) = max_theta log p(x | theta) - log p(x | z)

        It is 0 for a perfect reconstruction, so that grey values alone do not make a sample anomalous. Other terms,
        such as the KL, and criteria without -log p do not change. For a likelihood of fixed variance, the deviance and
        -log p(x | z) differ by a constant; for a bernoulli of values that are 0 or 1, they are equal.
        """
        with self.likelihood.use_deviance():
            return self.score(x)

    def code_reconstruction_score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `encode`, `forward` and `anomaly_score` give, each computed once."""
        z = self.encode(x)
        if type(self).score is Autoencoder.score and type(self).decode is Autoencoder.decode:
            params = self.decoder(z)
            with self.likelihood.use_deviance():
                return z, self.likelihood.mean(params), self.nll(params, x)
        return z, self.decode(z), self.anomaly_score(x)

    def extra_repr(self) -> str:
        """The first line of what torch prints of a module."""
        n = sum(parameter.numel() for parameter in self.parameters())
        try:
            code_shape = f"{self.code_shape}"
        except AezooError:  # an attribute that is not set and cannot be measured, such as in a constructor
            code_shape = "unknown"
        return f"input_shape={self.input_shape}, code_shape={code_shape}, {n:,} parameters"

    def __init_subclass__(cls, *, defaults: Mapping[str, Any] | None = None, **traits: Any) -> None:
        super().__init_subclass__(defaults=defaults)
        set_traits(cls, traits)
        input_checks.guard(cls)

    def invalid_mask(self, x: Tensor) -> Tensor:
        """Which samples have no loss, since some values are not finite: (B, *input_shape) -> (B,) bool."""
        return input_checks.not_finite(x)

    # ---- for the formulas of subclasses -----------------------------------------------------------------------------

    def nll(self, params: Tensor, x: Tensor) -> Tensor:
        """-log p(x | params) in nats per sample, in at least float32: (B, *shape), (B, *shape) -> (B,)."""
        params, x = at_least_float32(params), at_least_float32(x)
        if self.likelihood.as_deviance:
            return self.likelihood.deviance(params, x)
        return -self.likelihood.log_prob(params, x)

    def batch_mean(self, values: Tensor) -> Tensor:
        """Mean over the batch dimension, in training over the batches of all ranks, with gradient.

        Loss terms that are not linear in a batch mean need it to give the same result on one process and on many.
        """
        mean = at_least_float32(values).mean(0)
        if self._across_ranks():
            mean = collectives.all_reduce_sum(mean) / dist.get_world_size()
        return mean

    def all_gather_batch(self, values: Tensor) -> Tensor:
        """In training the values of all ranks, in their order, with gradient: (B, ...) -> (N, ...); else unchanged.

        The mean over ranks of the loss is minimised, so a term that each rank computes between its own samples and all
        N counts every pair once.
        """
        return collectives.all_gather_rows(values) if self._across_ranks() else values

    def gather_rank(self) -> int:
        """The position of this rank's batch in the result of `all_gather_batch`."""
        return dist.get_rank() if self._across_ranks() else 0

    def local_rows(self, values: Tensor) -> Tensor:
        """The row indices of this rank's samples in the result of `all_gather_batch`: (B, ...) -> (B,)."""
        first = self.gather_rank() * len(values)
        return torch.arange(first, first + len(values), device=values.device)

    def _across_ranks(self) -> bool:
        return self.training and dist.is_available() and dist.is_initialized()


input_checks.guard(Autoencoder)  # subclasses are guarded when they are defined
