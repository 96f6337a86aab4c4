"""Variational autoencoder (Kingma & Welling 2013), https://arxiv.org/abs/1312.6114

Maximises the evidence lower bound, in nats per sample:

    log p(x) >= ELBO = E_q(z|x)[log p(x|z)] - KL(q(z|x) || p(z))
    q(z|x) = N(mu(x), diag sigma(x)^2)     p(z) = N(0, I)
    KL = 1/2 sum_i (mu_i^2 + sigma_i^2 - 1 - log sigma_i^2)

    L = E_q[-log p(x|z)] + beta |KL - C|

beta other than 1 is the beta-VAE (Higgins et al. 2017); the capacity C is 0 unless the callback BetaAnnealing increases
it (Burgess et al. 2018, https://arxiv.org/abs/1804.03599). beta = 1 and C = 0 minimise the negative ELBO.

Shapes: B batch, D code, K importance samples.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import LatentArgs, NetworkArgs, NetworkAutoencoder
from aezoo.distributions import gaussians
from aezoo.distributions.gaussians import LOG_2PI
from aezoo.errors import AezooError
from aezoo.training.limits import check_at_least


class BetaArgs(NetworkArgs, total=False):
    """Arguments of `VAE`, without the size of the code."""

    beta: float


class VAEArgs(LatentArgs, BetaArgs, total=False):
    """Arguments of `VAE`."""


class VAE(
    NetworkAutoencoder,
    has_prior=True,
    normal_prior=True,
    score_term="kl",
    tags=("generation", "representation", "anomaly"),
):
    """Gaussian code with a standard normal prior.

    Args:
        latent_dim: D, size of the code.
        beta: weight of the KL term.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, latent_dim: int = 16, beta: float = 1.0, **kwargs: Unpack[NetworkArgs]
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.latent_dim = latent_dim
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(0, beta=beta)
        self.beta = beta
        self.capacity = 0.0
        self.build_networks()

    def build_networks(self) -> None:
        """Set code_shape, encoder and decoder."""
        self.code_shape = (self.latent_dim,)
        self.encoder = self.build_encoder((2 * self.latent_dim,))
        self.decoder = self.build_decoder(self.code_shape)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x): (B, *input_shape) -> (B, D), (B, D)."""
        mu_BD, log_var_BD = at_least_float32(self.encoder(x)).chunk(2, dim=1)
        # exp overflows float32 at 89; diffusers' AutoencoderKL clamps to the same interval
        return mu_BD, log_var_BD.clamp(-30, 20)

    @staticmethod
    def kl(mu_BD: Tensor, log_var_BD: Tensor) -> Tensor:
        """KL(q(z|x) || N(0, I)) in nats, in closed form: (B, D), (B, D) -> (B,)."""
        return 0.5 * (mu_BD**2 + log_var_BD.exp() - 1 - log_var_BD).sum(1)  # appendix B

    def mean_kl(self, kl_B: Tensor) -> Tensor:
        """Mean of a non-negative KL, (B,) -> (); over all ranks if C > 0, since |KL - C| is linear only for C = 0."""
        # with this order of conditions, a step of one process is compiled only once
        needs_all_ranks = self._across_ranks() and self.capacity
        return self.batch_mean(kl_B) if needs_all_ranks else at_least_float32(kl_B).mean()

    def encode(self, x: Tensor) -> Tensor:
        return self.posterior(x)[0].to(x.dtype)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)  # reparameterisation, section 2.4
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.mean_kl(self.kl(mu_BD, log_var_BD))
        return {"loss": nll + self.beta * (kl - self.capacity).abs(), "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    def log_prior(self, z: Tensor) -> Tensor:
        """Return the density log p(z) in nats, (..., D) -> (...)."""
        return -0.5 * (z**2 + LOG_2PI).sum(-1)

    def sample_prior(self, n: int) -> Tensor:
        """Draw n codes from p(z), (n, D)."""
        weight = next(self.decoder.parameters())
        return torch.randn(n, *self.code_shape, device=weight.device, dtype=weight.dtype)

    def sample_posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Draw n codes z ~ q(z|x) for each sample, and log q(z|x) in nats: (B, *input_shape) -> (n, B, D), (n, B)."""
        mu_BD, log_var_BD = self.posterior(x)
        return gaussians.rsample(mu_BD, log_var_BD, n)

    @torch.no_grad()
    def log_likelihood(self, x: Tensor, n: int) -> Tensor:
        """Importance-sampled log p(x) in nats, (B, *input_shape) -> (B,); a lower bound that tightens with n >= 1.

        log 1/n sum_k p(x|z_k) p(z_k) / q(z_k|x), z_k ~ q(z|x) (Burda et al. 2015, https://arxiv.org/abs/1509.00519).
        """
        if n < 1:
            raise AezooError(f"log_likelihood needs n of at least 1, got {n}")
        chunk = max(1, min(10_000 // len(x), 2**24 // x.numel()))  # at most 64 MiB of copies of x
        log_w = []
        for start in range(0, n, chunk):
            z_KBD, log_q_KB = self.sample_posterior(x, min(chunk, n - start))
            k = len(z_KBD)
            x_KB = x.expand(k, *x.shape).flatten(0, 1)
            log_px_KB = -self.nll(self.decoder(z_KBD.flatten(0, 1).to(x.dtype)), x_KB).unflatten(0, (k, len(x)))
            log_w.append(log_px_KB + self.log_prior(z_KBD) - log_q_KB)
        return torch.logsumexp(torch.cat(log_w), dim=0) - math.log(n)

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """-ELBO with z at the posterior's mean, -log p(x | mu) + KL in nats: (B, *input_shape) -> (B,), no noise."""
        mu_BD, log_var_BD = self.posterior(x)
        return self.nll(self.decoder(mu_BD.to(x.dtype)), x) + self.kl(mu_BD, log_var_BD)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        return self.decode(self.sample_prior(n))
