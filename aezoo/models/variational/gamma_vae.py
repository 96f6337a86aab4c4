"""Gamma VAE (Figurnov et al. 2018), https://arxiv.org/abs/1805.08498

Codes are positive; in nats per sample:

    L = E_q[-log p(x|z)] + beta KL(q(z|x) || p(z))     q(z|x) = Gamma(alpha(x), rho(x))     p(z) = Gamma(a, b)
    KL = sum_d (alpha - a) psi(alpha) - log Gamma(alpha) + log Gamma(a) + a log(rho / b) + alpha (b / rho - 1)

alpha and a are shapes, rho and b rates: Gamma(alpha, rho) has the mean alpha / rho and the variance alpha / rho^2. The
rate b only sets the unit of the codes.

Gradients of samples are computed by implicit reparameterisation, dz/dalpha = -(dF/dalpha) / q(z) with the cumulative
distribution function F, which torch's Gamma implements. They are unbiased, and differ from those of a rejection sampler
(Naesseth et al. 2017, https://arxiv.org/abs/1610.05683), whose accepted samples also depend on alpha. Independent Gamma
variables with the same rate, divided by their sum, have a Dirichlet distribution, which is the code of Joo et al. 2019
(https://arxiv.org/abs/1901.02739).

Shapes: B batch, D code, K importance samples.
"""

import math
from typing import Unpack

import torch
from torch import Tensor
from torch.distributions import Gamma
from torch.nn import functional as F

from aezoo.autoencoder import at_least_float32
from aezoo.models.variational.vae import VAE, VAEArgs
from aezoo.training.limits import check_at_least

# with a smaller shape, float32 rounds one sample in 10,000 or more to 0
LEAST_SHAPE, LEAST_RATE, MOST = 0.1, 1e-3, 1e6


class GammaVAE(VAE, normal_prior=False, tags=("generation",)):
    """Positive codes with a Gamma posterior and a Gamma prior.

    Args:
        prior_shape: a, shape of the prior, at least 0.1: sparse below 1, exponential at 1, nearly normal when large.
        prior_rate: b, rate of the prior, at least 0.001: the mean of the codes is a / b.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        prior_shape: float = 2.0,
        prior_rate: float = 1.0,
        **kwargs: Unpack[VAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(LEAST_SHAPE, prior_shape=prior_shape)
        check_at_least(LEAST_RATE, prior_rate=prior_rate)
        self.prior_shape = prior_shape
        self.prior_rate = prior_rate

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return shape alpha and rate rho of q(z|x): (B, *input_shape) -> (B, D), (B, D)."""
        shape_BD, rate_BD = F.softplus(at_least_float32(self.encoder(x))).chunk(2, dim=1)
        alpha_BD = (LEAST_SHAPE + shape_BD).clamp(max=MOST)
        return alpha_BD, self.prior_rate * (LEAST_RATE + rate_BD).clamp(max=MOST)

    def kl(self, alpha_BD: Tensor, rho_BD: Tensor) -> Tensor:  # type: ignore[override]
        """KL(q(z|x) || p(z)) in nats, in closed form: (B, D), (B, D) -> (B,)."""
        a, alpha, rate = self.prior_shape, alpha_BD.double(), rho_BD.double() / self.prior_rate
        of_shapes_BD = (alpha - a) * torch.digamma(alpha) - torch.lgamma(alpha) + math.lgamma(a)
        # in float64, as these are differences of large numbers
        return (of_shapes_BD + a * rate.log() + alpha * (1 / rate - 1)).sum(1).to(alpha_BD.dtype)

    def encode(self, x: Tensor) -> Tensor:
        alpha_BD, rho_BD = self.posterior(x)
        return (alpha_BD / rho_BD).to(x.dtype)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        alpha_BD, rho_BD = self.posterior(x)
        z_BD = Gamma(alpha_BD, rho_BD, validate_args=False).rsample()
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.mean_kl(self.kl(alpha_BD, rho_BD))
        return {"loss": nll + self.beta * (kl - self.capacity).abs(), "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    @staticmethod
    def log_density(z: Tensor, alpha: Tensor, rho: Tensor) -> Tensor:
        """Return the log-density of Gamma(alpha, rho) in nats, three (..., D) -> (...)."""
        exact = Gamma(alpha.double(), rho.double(), validate_args=False)
        return exact.log_prob(z.double()).sum(-1).to(z.dtype)

    def log_prior(self, z: Tensor) -> Tensor:
        wide = z.double()
        return self.log_density(z, torch.full_like(wide, self.prior_shape), torch.full_like(wide, self.prior_rate))

    def sample_prior(self, n: int) -> Tensor:
        weight = next(self.decoder.parameters())
        alpha_ND = at_least_float32(weight.new_full((n, *self.code_shape), self.prior_shape))
        return Gamma(alpha_ND, self.prior_rate, validate_args=False).sample().to(weight.dtype)

    def sample_posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        alpha_BD, rho_BD = self.posterior(x)
        z_KBD = Gamma(alpha_BD, rho_BD, validate_args=False).rsample((n,))
        return z_KBD, self.log_density(z_KBD, alpha_BD, rho_BD)

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """Return -log p(x | mean of q) + KL in nats: (B, *input_shape) -> (B,), no noise."""
        alpha_BD, rho_BD = self.posterior(x)
        return self.nll(self.decoder((alpha_BD / rho_BD).to(x.dtype)), x) + self.kl(alpha_BD, rho_BD)
