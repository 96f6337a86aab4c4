"""Categorical variables: samples, differentiable relaxed samples, and the KL from the uniform distribution.

    c = one-hot of arg max_k (log p_k + g_k) ~ Cat(p)        g standard Gumbel noise
    z = softmax((log p + g) / tau), which tends to c as tau tends to 0
    KL(Cat(p) || uniform) = sum_k p_k log(K p_k)             between 0 (uniform) and log K

z is the Gumbel-softmax (Jang et al. 2016, https://arxiv.org/abs/1611.01144) or concrete distribution (Maddison et al.
2016, https://arxiv.org/abs/1611.00712).

Shapes: B batch, N variables, K classes, D = N K code.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_gumbel(like: Tensor) -> Tensor:
    """Draw standard Gumbel noise, -log of an exponential variable, with the shape of `like`."""
    noise = torch.empty_like(like, memory_format=torch.contiguous_format).exponential_()
    return -noise.clamp(min=torch.finfo(like.dtype).tiny).log()


def one_hot(values: Tensor) -> Tensor:
    """Return 1 at the maximum of the last dimension and 0 elsewhere, without gradient, (..., K) -> (..., K)."""
    return F.one_hot(values.argmax(-1), values.shape[-1]).to(values.dtype)


def sample_categorical(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one-hot samples of N variables, with their log-probability in nats, (..., N, K) -> (..., N, K), (...)."""
    c = one_hot(log_p + sample_gumbel(log_p))
    return c, (c * log_p).sum((-2, -1))


def gumbel_softmax(log_p: Tensor, tau: Tensor | float, straight_through: bool = False) -> Tensor:
    """Draw from the relaxed distribution, (..., K) -> (..., K).

    Args:
        log_p: logarithms of the classes' probabilities.
        tau: the temperature, above 0.
        straight_through: return one-hot codes instead, with the gradient of the relaxed ones.
    """
    z = ((log_p + sample_gumbel(log_p)) / tau).softmax(-1)
    return one_hot(z) + (z - z.detach()) if straight_through else z


def kl_from_uniform(p_BD: Tensor, log_p_BD: Tensor, k: int) -> Tensor:
    """Return KL(q || uniform) in nats, summed over all variables of k classes each, (B, D), (B, D) -> (B,)."""
    r_BD = log_p_BD + math.log(k)
    # expm1(r) / K = p - 1/K sums to 0; subtracting it removes the rounding errors of log p near the uniform
    return (p_BD * r_BD - r_BD.expm1() / k).sum(1)


def all_codes(n: int, k: int, device: torch.device) -> Tensor:
    """Return all one-hot codes of n variables with k classes, (k^n, n, k)."""
    return F.one_hot(torch.cartesian_prod(*[torch.arange(k, device=device)] * n).view(-1, n), k)
