"""Levels of Gaussian latent variables, what hierarchical VAEs are made of, whatever their networks are.

    p(z) = prod_l p(z_l | levels above)     q(z | x) = prod_l q(z_l | x, levels above)     all Gaussian and diagonal

`Level` is one of them with its densities and its KL, `ConditionalGaussian` a network that gives such a distribution,
`GaussianChain` a prior in which each level depends on the one above alone, and `Conditional` a level as bits-back
coding asks for it.

Shapes: B batch, D_l values of a level; ... are the batch dimensions.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aezoo.gaussians import LOG_2PI, kl
from aezoo.nets.build import activation
from aezoo.nets.linear import Linear
from aezoo.precision import at_least_float32

Pair = tuple[Tensor, Tensor]


def gaussian(values: Tensor) -> Pair:
    """Mean and log-variance in at least float32, the latter in the VAE's interval: (..., 2 n) -> (..., n), (..., n)."""
    mu, log_var = at_least_float32(values).chunk(2, -1)
    return mu, log_var.clamp(-30, 20)


class Level(NamedTuple):
    """z = mu + sigma eps of a level, mean and log-variance of its q, and m and log s^2 of its p: (..., D_l)."""

    z: Tensor
    eps: Tensor
    mu: Tensor
    log_var: Tensor
    m: Tensor
    log_s2: Tensor

    @property
    def q(self) -> Pair:
        """Mean and log-variance of the posterior."""
        return self.mu, self.log_var

    @property
    def p(self) -> Pair:
        """Mean and log-variance of the prior."""
        return self.m, self.log_s2

    @classmethod
    def of(cls, q: Pair, p: Pair, z: Tensor | None = None, draw: bool = True) -> "Level":
        """A level of q and p, each a mean and a log-variance.

        Args:
            q: of the posterior.
            p: of the prior.
            z: the latent variables, where they are known.
            draw: else draw them from q, not take its mean.
        """
        mu, log_var = q
        noisy = draw and z is None
        eps = torch.randn(mu.shape, device=mu.device, dtype=mu.dtype) if noisy else torch.zeros_like(mu)
        z = mu + torch.exp(0.5 * log_var) * eps if z is None else z.reshape(mu.shape)
        return cls(z, eps, mu, log_var, *p)

    def kl(self) -> Tensor:
        """KL(N(mu, sigma^2) || N(m, s^2)) in nats, in closed form: (...)."""
        return kl(self.mu, self.log_var, self.m, self.log_s2)

    def log_q(self) -> Tensor:
        """Density log N(z; mu, sigma^2) in nats, by the noise and so without the rounding of z - mu: (...)."""
        return -0.5 * (self.eps**2 + self.log_var + LOG_2PI).sum(-1)

    def log_p(self) -> Tensor:
        """Density log N(z; m, s^2) in nats: (...)."""
        return -0.5 * ((self.z - self.m) ** 2 * torch.exp(-self.log_s2) + self.log_s2 + LOG_2PI).sum(-1)


class ConditionalGaussian(nn.Sequential):
    """Mean and log-variance of a level by a net of one hidden layer: (..., n_in) -> (..., n_out), (..., n_out).

    Args:
        n_in: values that it is given, in one tensor or more.
        width: size of the hidden layer.
        n_out: size of the level.
        act: name of the activation between them.
    """

    def __init__(self, n_in: int, width: int, n_out: int, act: str) -> None:
        super().__init__(Linear(n_in, width), activation(act), Linear(width, 2 * n_out))

    def forward(self, *given: Tensor) -> Pair:
        weight = next(self.parameters())
        return gaussian(super().forward(torch.cat(given, -1).to(weight.dtype)))


class GaussianChain(nn.ModuleList):
    """p(z) = p(z_1 | z_2) ... p(z_{L-1} | z_L) p(z_L) with p(z_L) = N(0, I); its modules are the first L - 1 of these.

    Args:
        dims: D_1, ..., D_L, sizes of the levels from the bottom up.
        width: size of the networks' hidden layers.
        act: name of their activation.
    """

    zero: Tensor

    def __init__(self, dims: Sequence[int], width: int, act: str) -> None:
        super().__init__(ConditionalGaussian(above, width, size, act) for size, above in pairwise(dims))
        self.register_buffer("zero", torch.zeros(dims[-1]), persistent=False)

    def given(self, above: Sequence[Tensor], n: int = 1) -> Pair:
        """Mean and log-variance below levels from the top down, (..., D_l) each; where there are none, (n, D_L)."""
        if not above:
            return self.zero.expand(n, -1), self.zero.expand(n, -1)
        return self[-len(above)](above[-1])

    def log_prob(self, z: Sequence[Tensor]) -> Tensor:
        """Log-density in nats of levels from the bottom up, (..., D_l) -> (...)."""
        log_p = -0.5 * (z[-1] ** 2 + LOG_2PI).sum(-1)
        for (below, above), link in zip(pairwise(z), self, strict=True):
            p = link(above)
            log_p = log_p + Level.of(p, p, below).log_p()
        return log_p

    def kl(self, mu: Sequence[Tensor], log_var: Sequence[Tensor]) -> Tensor:
        """KL(q || p) in nats, each level given the mean of the one above, from the bottom up: (..., D_l) -> (...)."""
        priors = [self.given(mu[i + 1 :][::-1]) for i in range(len(mu))]
        kls = [Level.of((m, v), p, draw=False).kl() for m, v, p in zip(mu, log_var, priors, strict=True)]
        return torch.stack(kls).sum(0)

    def sample(self, n: int, like: Tensor) -> list[Tensor]:
        """Draw n codes, levels from the bottom up: (n, D_l), on the device and in the precision of `like`."""
        z = [torch.randn(n, len(self.zero), device=like.device, dtype=like.dtype)]
        for link in reversed(self):
            p = link(z[0])
            z.insert(0, Level.of(p, p).z.to(like.dtype))
        return z


class Conditional(NamedTuple):
    """A level given those above, which run from the top down, by mean and standard deviation: (n, D_l) each.

    Attributes:
        p: (levels above, n) -> mean and log-variance of p for n samples.
        q: (x, levels above) -> mean and log-variance of q for n samples x.
    """

    p: Callable[[list[Tensor], int], Pair]
    q: Callable[[Tensor, list[Tensor]], Pair]

    def prior(self, above: list[Tensor], n: int) -> Pair:
        """Mean and standard deviation of p for n samples."""
        m, log_s2 = self.p(above, n)
        return m, torch.exp(0.5 * log_s2)

    def posterior(self, x: Tensor, above: list[Tensor]) -> Pair:
        """Mean and standard deviation of q for n samples x."""
        mu, log_var = self.q(x, above)
        return mu, torch.exp(0.5 * log_var)
