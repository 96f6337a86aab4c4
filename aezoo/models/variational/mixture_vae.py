"""VAE with a mixture of Gaussians as prior (Jiang et al. 2016), https://arxiv.org/abs/1611.05148

    L = E_q[-log p(x|z)] + beta E_q[log q(z|x) - log p(z)]     q(z|x) = N(mu(x), diag sigma(x)^2)
    p(z) = sum_k w_k N(z | m_k, diag s_k^2)                    w, m, s learned with the rest

in nats per sample. The KL to a mixture has no closed form, so both densities are evaluated at the z that is decoded.
With equal weights this is the prior MoG of Tomczak & Welling 2017, https://arxiv.org/abs/1705.07120. K = 1 with m = 0
and s = 1 is the VAE. The initial prior has approximately the mean and the covariance of N(0, I).

The score has no noise: instead of the KL it uses the bound KL(q || p) <= -log sum_k w_k exp(-KL(q || p_k)) of Hershey &
Olsen 2007, https://doi.org/10.1109/ICASSP.2007.366913, which is an equality for K = 1.

Shapes: B batch, D code, K components.
"""

from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.mixture_prior import MixturePrior
from aezoo.distributions.gaussians import LOG_2PI
from aezoo.models.variational.vae import VAE, VAEArgs


class MixtureVAEArgs(VAEArgs, total=False):
    """Arguments of `MixtureVAE`."""

    n_components: int


class MixtureVAE(MixturePrior, VAE, normal_prior=False, tags=("representation", "generation")):
    """Gaussian code whose prior is a learned mixture of Gaussians.

    Args:
        n_components: K, number of Gaussians in the prior.
        **kwargs: see `VAE`.
    """

    def __init__(self, input_shape: tuple[int, ...], *, n_components: int = 10, **kwargs: Unpack[VAEArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        self.n_components = n_components
        # the sampled KL may be negative, so its distance from a capacity would be meaningless
        del self.capacity
        self.build_mixture(n_components, self.latent_dim)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_1BD, log_q_1B = self.sample_posterior(x, 1)
        nll = self.nll(self.decoder(z_1BD[0].to(x.dtype)), x).mean()
        kl = (log_q_1B - self.log_prior(z_1BD)).mean()
        return {"loss": nll + self.beta * kl, "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    def log_prior(self, z: Tensor) -> Tensor:
        return self.mixture_log_prob(z)

    def sample_prior(self, n: int) -> Tensor:
        return self.sample_mixture(n).to(next(self.decoder.parameters()).dtype)

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """Return -log p(x | mu) plus the bound on the KL, in nats: (B, *input_shape) -> (B,), no noise."""
        mu_BD, log_var_BD = self.posterior(x)
        log_q_B = -0.5 * (1 + log_var_BD + LOG_2PI).sum(1)  # its mean over q
        kl_B = log_q_B - torch.logsumexp(self.log_joint(mu_BD, log_var_BD.exp()), 1)
        return self.nll(self.decoder(mu_BD.to(x.dtype)), x) + kl_B
