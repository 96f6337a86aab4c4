"""Hamiltonian VAE (Caterini et al. 2018), https://arxiv.org/abs/1805.11328

K leapfrog steps along the decoder's gradient move a sample from the encoder's posterior towards the true posterior.
Each step preserves volume and cools the momentum rho by a known factor, so that the bound on log p(x) is exact, in
nats:

    L = E[-log p(x|z_K) + KL]     KL = log q(z_0|x) - log p(z_K) + (|rho_K|^2 - |gamma|^2) / 2
    z_0 ~ q(z|x) = N(mu(x), diag sigma(x)^2)     gamma ~ N(0, I)     rho_0 = gamma / sqrt(beta_0)
    rho' = rho - eps/2 dU(z)     z := z + eps rho'     rho := sqrt(beta_(k-1) / beta_k) (rho' - eps/2 dU(z))
    U(z) = -log p(x|z) - log p(z)     1 / sqrt(beta_k) = 1 / sqrt(beta_0) + (1 - 1 / sqrt(beta_0)) k^2 / K^2

The product of the factors is sqrt(beta_0)^D, which cancels with the density of rho_0. beta_0 < 1 tightens the bound:
steps without cooling do not change the distance from p(x, z) N(rho). eps is learned, with one value per dimension. K =
0 is the VAE, with a sampled KL instead of the closed form.

The cooling is equation 6. The authors' code (https://github.com/anthonycaterini/hvae-nips) uses 1 / beta_k instead of 1
/ sqrt(beta_k), learns beta_0, and takes means over gamma and over the noise of z_0 in the KL. On 8x8 digits (1,000
steps, means of three seeds; `python -m benchmarks.deviations`) the ELBO is -24.95 nats with this cooling and -24.94
with that of equation 6.

Shapes: B batch, D code, K leapfrog steps or importance samples.
"""

import math
from functools import partial
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import LatentArgs
from aezoo.distributions.gaussians import LOG_2PI
from aezoo.errors import AezooError
from aezoo.manifolds import hamiltonian
from aezoo.manifolds.hamiltonian import Integrator
from aezoo.models.variational.vae import VAE

_MOST_STEPS, _LONGEST_STEP = 1_000, 0.5


class HVAEArgs(LatentArgs, total=False):
    """Arguments of `HVAE`."""

    n_leapfrog: int
    step_size: float
    beta_0: float


class HVAE(VAE, normal_prior=False, tags=("generation",)):
    """Gaussian code with a standard normal prior, whose posterior is refined by Hamiltonian dynamics.

    Args:
        n_leapfrog: K, number of leapfrog steps; each requires a forward and a backward pass through the decoder.
        step_size: initial eps, above 0 and below 0.5, the upper limit of the learned eps.
        beta_0: initial inverse temperature of the momentum, above 0 and at most 1; 1 disables tempering.
        **kwargs: see `VAE`.
    """

    step_D: nn.Parameter

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        n_leapfrog: int = 3,
        step_size: float = 0.01,
        beta_0: float = 0.3,
        **kwargs: Unpack[LatentArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        # the bound has no KL weight, so BetaAnnealing would change these without effect
        del self.beta, self.capacity
        if not 0 <= n_leapfrog <= _MOST_STEPS:
            raise AezooError(f"n_leapfrog must be from 0 to {_MOST_STEPS}, got {n_leapfrog}")
        if not 0 < step_size < _LONGEST_STEP:
            raise AezooError(f"step_size must be above 0 and below {_LONGEST_STEP}, got {step_size}")
        if not 0 < beta_0 <= 1:
            raise AezooError(f"beta_0 must be above 0 and at most 1, got {beta_0}")
        self.n_leapfrog = n_leapfrog
        self.cooling = hamiltonian.quadratic_cooling(beta_0, n_leapfrog)
        share = step_size / _LONGEST_STEP
        start_D = torch.full(self.code_shape, math.log(share / (1 - share)))
        self.register_parameter("step_D", nn.Parameter(start_D) if n_leapfrog else None)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return self.bound(x, *self.posterior(x))

    def bound(self, x: Tensor, mu_BD: Tensor, log_var_BD: Tensor) -> dict[str, Tensor]:
        """The terms of the loss for a posterior: (B, *input_shape), (B, D), (B, D)."""
        # in one call, because torch.compile may change the order of two
        eps_BD, gamma_BD = torch.randn_like(mu_BD.repeat(1, 2)).chunk(2, dim=1)
        log_q_B = -0.5 * (eps_BD**2 + log_var_BD + LOG_2PI).sum(1)
        z_BD, momentum_B = self.flow(x, mu_BD + torch.exp(0.5 * log_var_BD) * eps_BD, gamma_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = (log_q_B - self.log_prior(z_BD) + momentum_B).mean()
        return {"loss": nll + kl, "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    def flow(self, x: Tensor, z_BD: Tensor, gamma_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the code z_K and (|rho_K|^2 - |gamma|^2) / 2 from z_0 and gamma: -> (B, D), (B,)."""
        z_BD, rho_BD = self.leapfrog(x, z_BD, gamma_BD * self.cooling[0] ** -1)
        return z_BD, 0.5 * (rho_BD**2 - gamma_BD**2).sum(1)

    def leapfrog(
        self, x: Tensor, z_BD: Tensor, rho_BD: Tensor, by: Integrator = hamiltonian.leapfrog
    ) -> tuple[Tensor, Tensor]:
        """Apply K leapfrog steps to z and rho: (B, *input_shape), (B, D), (B, D) -> (B, D), (B, D)."""
        if not self.n_leapfrog:
            return z_BD, rho_BD
        return by(z_BD, rho_BD, partial(self.potential_gradient, x), self.step(), self.cooling)

    def step(self) -> Tensor:
        """Return the step sizes eps, (D,)."""
        return _LONGEST_STEP * torch.sigmoid(at_least_float32(self.step_D))

    def potential_gradient(self, x: Tensor, z_BD: Tensor) -> Tensor:
        """Return the gradient of U, which is differentiable: (B, *input_shape), (B, D) -> (B, D)."""
        # with torch.func, which also works where gradients are disabled
        return torch.func.grad(lambda z: (self.nll(self.decoder(z.to(x.dtype)), x) - self.log_prior(z)).sum())(z_BD)

    def sample_posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Draw n codes z_K for each sample, and log q(z_0|x) plus the momentum term: -> (n, B, D), (n, B)."""
        z_KBD, log_q_KB = super().sample_posterior(x, n)
        x_KB = x.expand(n, *x.shape).flatten(0, 1)
        z, momentum = self.flow(x_KB, z_KBD.flatten(0, 1), torch.randn_like(z_KBD).flatten(0, 1))
        return z.unflatten(0, (n, len(x))), log_q_KB + momentum.unflatten(0, (n, len(x)))

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """Return -ELBO from the posterior's mean with zero momentum, in nats: (B, *input_shape) -> (B,), no noise."""
        mu_BD, log_var_BD = self.posterior(x)
        z_BD, momentum_B = self.flow(x, mu_BD, torch.zeros_like(mu_BD))
        return self.nll(self.decoder(z_BD.to(x.dtype)), x) + self.kl(z_BD, log_var_BD) + momentum_B
