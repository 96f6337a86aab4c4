"""Likelihoods of images in memory order, and a binary cross-entropy with fewer logarithms."""

import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor, nn

from aezoo.distributions import likelihoods
from aezoo.distributions.likelihoods import Likelihood
from aezoo.speed.linear import needs_torch_autograd
from aezoo.speed.memory_format import is_channels_last, with_layout_of
from aezoo.speed.swapping import Swapped
from aezoo.training.tracing import is_tracing

# polynomial for log(1 + e) / e on [0, 1], highest power first, accurate to 6e-9
_LOG1P = Chebyshev.interpolate(lambda e: np.log1p(e) / e, 9, domain=[0, 1]).convert(kind=Polynomial).coef[::-1].tolist()
# number of factors in one product, whose logarithm is the sum of their logarithms: float32 can represent 2^120
_MOST_FACTORS, _FEW_FACTORS = 120, 8
# from this number of values on, saving several operations outweighs a step of autograd in Python
_MANY = 2**15


class _CrossEntropy(torch.autograd.Function):
    """The sum of t^+ - t x + log(1 + exp(-|t|)) per sample, with fewer logarithms than torch's own function.

    It takes logarithms of products of numbers from 1 to 2. A product loses less precision than a single value in torch,
    which is a difference of large numbers. On a CPU, torch's exp2 is faster than its exp.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, x: Tensor, factors: int) -> Tensor:
        ctx.save_for_backward(t, x)
        ratios = torch.mul(t.abs(), -1 / math.log(2)).exp2_().add_(1)
        logs = ratios.reshape(len(t), -1, factors).prod(2).log_()
        return t.clamp_min(0).addcmul_(t, x, value=-1).flatten(1).sum(1).add_(logs.sum(1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (t, x), (of_t, of_x, _) = ctx.saved_tensors, ctx.needs_input_grad
        g = gradients[0].reshape(-1, *[1] * (t.dim() - 1))
        by_x = -t * g if of_x else None
        # batched gradients stand for many, which cannot be written in place into a single tensor
        if torch.is_grad_enabled() or needs_torch_autograd(g):
            return (t.sigmoid() - x) * g if of_t else None, by_x, None
        return t.sigmoid().sub_(x).mul_(g) if of_t else None, by_x, None


@functools.cache
def _factors(values: int) -> int:
    return max(n for n in range(1, _MOST_FACTORS + 1) if values % n == 0)


def cross_entropies(params: Tensor, x: Tensor) -> Tensor:
    """`cross_entropy` of each sample, summed: (B, *shape), (B, *shape) -> (B,)."""
    values = params.numel()
    # a symbolic size is not an int
    ours = isinstance(values, int) and params.is_cpu and params.dtype == x.dtype == torch.float32
    if (
        ours
        and params.shape == x.shape
        and values >= _MANY
        and not is_tracing()
        and not needs_torch_autograd(params, x)
    ):
        factors = _factors(params[0].numel())
        if factors >= _FEW_FACTORS:
            found: Tensor = _CrossEntropy.apply(params, x, factors)
            return found
    return cross_entropy(params, x).flatten(1).sum(1)


def cross_entropy(params: Tensor, x: Tensor) -> Tensor:
    """For each value, -x log p - (1 - x) log(1 - p) with p = sigmoid(params)."""
    if not (torch.compiler.is_compiling() and params.is_cpu and params.dtype == torch.float32):
        return F.binary_cross_entropy_with_logits(params, x, reduction="none")
    # t^+ - t x + log(1 + exp(-|t|)), in one pass by inductor; the library's log1p is over half of torch's own time
    t = params.detach()
    e = torch.exp(-t.abs())
    quotient = _LOG1P[0] * e + _LOG1P[1]
    for coefficient in _LOG1P[2:]:
        quotient = quotient * e + coefficient
    value = t.clamp_min(0) - t * x + quotient * e
    # the gradient is p - x directly, instead of that of each operation
    return value + (torch.where(t < 0, e, 1) / (1 + e) - x) * (params - t)


def _in_memory_order(params: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (B, H, W, C) if channels are last in the parameters, since torch copies or is slow where layouts differ.

    A graph plans its own memory.
    """
    if is_tracing() or not is_channels_last(params):
        return params, x
    return params.permute(0, 2, 3, 1), with_layout_of(x, params).permute(0, 2, 3, 1)


class _InMemoryOrder:
    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        found: Tensor = super().log_prob(*_in_memory_order(params, x))  # type: ignore[misc]
        return found


class Bernoulli(Swapped, likelihoods.Bernoulli):
    """`aezoo.distributions.likelihoods.Bernoulli`."""

    plain = likelihoods.Bernoulli

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        params, x = _in_memory_order(params, x)
        return -cross_entropies(params, x)


class ContinuousBernoulli(Swapped, likelihoods.ContinuousBernoulli):
    """`aezoo.distributions.likelihoods.ContinuousBernoulli`."""

    plain = likelihoods.ContinuousBernoulli

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        params, x = _in_memory_order(params, x)
        return (self._log_normaliser(params) - cross_entropy(params, x)).flatten(1).sum(1)


def _swapped(plain: type[Likelihood]) -> type[Swapped]:
    return type(plain.__name__, (Swapped, _InMemoryOrder, plain), {"plain": plain})


_PLAIN: tuple[type[Likelihood], ...] = (
    likelihoods.Bernoulli,
    likelihoods.ContinuousBernoulli,
    likelihoods.Gaussian,
    likelihoods.Laplace,
    likelihoods.LogCosh,
    likelihoods.DiscretisedLogistic,
    likelihoods.BetaBinomial,
    likelihoods.LogitLaplace,
)
# by the class that each stands in for
IN_MEMORY_ORDER: dict[type[nn.Module], type[Swapped]] = {plain: _swapped(plain) for plain in _PLAIN}
FEWER_LOGARITHMS: dict[type[nn.Module], type[Swapped]] = {kind.plain: kind for kind in (Bernoulli, ContinuousBernoulli)}
