"""Levels of Gaussian latent variables for hierarchical VAEs, with any networks.

    p(z) = prod_l p(z_l | levels above)     q(z | x) = prod_l q(z_l | x, levels above)     all Gaussian and diagonal

`Level` contains one level with its densities and its KL. `ConditionalGaussian` is a network that outputs such a
distribution. `GaussianChain` is a prior in which each level depends only on the level above. `Conditional` is a level
in the form that bits-back coding needs.

Shapes: B batch, D_l values of a level; ... are the batch dimensions.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aezoo.distributions.gaussians import LOG_2PI, kl
from aezoo.nets.build import activation
from aezoo.training.precision import at_least_float32

GaussianParams = tuple[Tensor, Tensor]


def gaussian(values: Tensor) -> GaussianParams:
    """Mean and log-variance in at least float32, the latter clamped as in the VAE: (..., 2 n) -> (..., n), (..., n)."""
    mu, log_var = at_least_float32(values).chunk(2, -1)
    return mu, log_var.clamp(-30, 20)


class Level(NamedTuple):
    """A level: z = mu + sigma eps, mean and log-variance of q, and m and log s^2 of p: (..., D_l)."""

    z: Tensor
    eps: Tensor
    mu: Tensor
    log_var: Tensor
    m: Tensor
    log_s2: Tensor

    @property
    def q(self) -> GaussianParams:
        """Return mean and log-variance of the posterior."""
        return self.mu, self.log_var

    @property
    def p(self) -> GaussianParams:
        """Return mean and log-variance of the prior."""
        return self.m, self.log_s2

    @classmethod
    def from_distributions(
        cls, q: GaussianParams, p: GaussianParams, z: Tensor | None = None, draw: bool = True
    ) -> "Level":
        """Build a level from q and p, each given by a mean and a log-variance.

        Args:
            q: the posterior.
            p: the prior.
            z: the latent variables, if known.
            draw: if z is not given, draw it from q instead of taking the mean.
        """
        mu, log_var = q
        noisy = draw and z is None
        eps = torch.randn(mu.shape, device=mu.device, dtype=mu.dtype) if noisy else torch.zeros_like(mu)
        z = mu + torch.exp(0.5 * log_var) * eps if z is None else z.reshape(mu.shape)
        return cls(z, eps, mu, log_var, *p)

    def kl(self) -> Tensor:
        """Return KL(N(mu, sigma^2) || N(m, s^2)) in nats, in closed form: (...)."""
        return kl(self.mu, self.log_var, self.m, self.log_s2)

    def log_q(self) -> Tensor:
        """Return log N(z; mu, sigma^2) in nats, computed from the noise to avoid rounding errors of z - mu: (...)."""
        return -0.5 * (self.eps**2 + self.log_var + LOG_2PI).sum(-1)

    def log_p(self) -> Tensor:
        """Return log N(z; m, s^2) in nats: (...)."""
        return -0.5 * ((self.z - self.m) ** 2 * torch.exp(-self.log_s2) + self.log_s2 + LOG_2PI).sum(-1)


class ConditionalGaussian(nn.Sequential):
    """A network with one hidden layer for mean and log-variance of a level: (..., n_in) -> (..., n_out), (..., n_out).

    Args:
        n_in: total size of the inputs.
        width: size of the hidden layer.
        n_out: size of the level.
        act: name of the activation.
    """

    def __init__(self, n_in: int, width: int, n_out: int, act: str) -> None:
        super().__init__(nn.Linear(n_in, width), activation(act), nn.Linear(width, 2 * n_out))

    def forward(self, *given: Tensor) -> GaussianParams:
        weight = next(self.parameters())
        return gaussian(super().forward(torch.cat(given, -1).to(weight.dtype)))


class GaussianChain(nn.ModuleList):
    """p(z) = p(z_1 | z_2) ... p(z_{L-1} | z_L) p(z_L) with p(z_L) = N(0, I); its modules are the first L - 1 factors.

    Args:
        dims: D_1, ..., D_L, sizes of the levels from the bottom up.
        width: size of the networks' hidden layers.
        act: name of their activation.
    """

    zero: Tensor

    def __init__(self, dims: Sequence[int], width: int, act: str) -> None:
        super().__init__(ConditionalGaussian(above, width, size, act) for size, above in pairwise(dims))
        self.register_buffer("zero", torch.zeros(dims[-1]), persistent=False)

    def prior_params(self, above: Sequence[Tensor], n: int = 1) -> GaussianParams:
        """Mean and log-variance of the level below those given, top first, (..., D_l) each; without any, (n, D_L)."""
        if not above:
            return self.zero.expand(n, -1), self.zero.expand(n, -1)
        return self[-len(above)](above[-1])

    def log_prob(self, z: Sequence[Tensor]) -> Tensor:
        """Return the log-density in nats of levels, ordered from the bottom up, (..., D_l) -> (...)."""
        log_p = -0.5 * (z[-1] ** 2 + LOG_2PI).sum(-1)
        for (below, above), link in zip(pairwise(z), self, strict=True):
            p = link(above)
            log_p = log_p + Level.from_distributions(p, p, below).log_p()
        return log_p

    def kl(self, mu: Sequence[Tensor], log_var: Sequence[Tensor]) -> Tensor:
        """Return KL(q || p) in nats, bottom up, each level given the mean of the level above: (..., D_l) -> (...)."""
        priors = [self.prior_params(mu[i + 1 :][::-1]) for i in range(len(mu))]
        kls = [
            Level.from_distributions((m, v), p, draw=False).kl() for m, v, p in zip(mu, log_var, priors, strict=True)
        ]
        return torch.stack(kls).sum(0)

    def sample(self, n: int, like: Tensor) -> list[Tensor]:
        """Draw n codes, levels ordered from the bottom up: (n, D_l), on the device and in the precision of `like`."""
        z = [torch.randn(n, len(self.zero), device=like.device, dtype=like.dtype)]
        for link in reversed(self):
            p = link(z[0])
            z.insert(0, Level.from_distributions(p, p).z.to(like.dtype))
        return z


class Conditional(NamedTuple):
    """The distributions of a level, given the levels above in order from the top down: (n, D_l) each.

    Attributes:
        p: (levels above, n) -> mean and log-variance of p for n samples.
        q: (x, levels above) -> mean and log-variance of q for n samples x.
    """

    p: Callable[[list[Tensor], int], GaussianParams]
    q: Callable[[Tensor, list[Tensor]], GaussianParams]

    def prior(self, above: list[Tensor], n: int) -> GaussianParams:
        """Return mean and standard deviation of p for n samples."""
        m, log_s2 = self.p(above, n)
        return m, torch.exp(0.5 * log_s2)

    def posterior(self, x: Tensor, above: list[Tensor]) -> GaussianParams:
        """Return mean and standard deviation of q for n samples x."""
        mu, log_var = self.q(x, above)
        return mu, torch.exp(0.5 * log_var)
