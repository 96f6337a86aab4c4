"""Optimal sigma-VAE, a calibrated decoder (Rybkin et al. 2021), https://arxiv.org/abs/2006.13202

    L = E_q[||x - xhat||^2 / (2 s^2) + X/2 log(2 pi s^2)] + KL(q(z|x) || p(z))     xhat = g(z)
    s^2 = argmin L = mean of (x - xhat)^2 over the batch and all values     (their analytic solution)

in nats per sample. p(x|z) = N(xhat, s^2) has the single variance that minimises L, so the likelihood and the KL need no
relative weight. dL/ds = 0 at this optimum, so s needs no gradient. The batch contains the samples of all ranks.

In evaluation, a density must not be fitted to the data that it is evaluated on, so log s is its running mean over
training. Therefore the validation ELBO is a bound, and score and log_likelihood do not depend on the rest of the batch.

Shapes: B batch, X data dimensions, D code.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import FixedLikelihoodArgs
from aezoo.distributions.likelihoods import Gaussian
from aezoo.models.variational.vae import VAE


class SigmaVAE(VAE, tags=("generation",)):
    """A VAE with a Gaussian likelihood whose noise scale is set to its optimal value in every batch.

    Args:
        latent_dim: D, size of the code.
        beta: weight of the KL term.
        **kwargs: see `VAE`.
    """

    likelihood: Gaussian

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        beta: float = 1.0,
        **kwargs: Unpack[FixedLikelihoodArgs],
    ) -> None:
        super().__init__(input_shape, latent_dim=latent_dim, beta=beta, likelihood="gaussian", **kwargs)
        # scores, likelihoods and evaluation use it; it is saved, unlike a likelihood's usual fixed scale
        self.likelihood.register_buffer("log_scale", self.likelihood.log_scale)

    def optimal_variance(self, sse_B: Tensor) -> Tensor:
        """Return s^2, the mean squared error per value, clamped to exp(-30) and exp(20): (B,) -> ()."""
        x_dim = math.prod(self.input_shape)
        return (self.batch_mean(sse_B) / x_dim).clamp(math.exp(-30), math.exp(20)).detach()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        error_BX = at_least_float32(x).flatten(1) - at_least_float32(self.decoder(z_BD.to(x.dtype))).flatten(1)
        sse_B = (error_BX**2).sum(1)
        log_s = self.likelihood.log_scale
        if self.training:
            s2 = self.optimal_variance(sse_B)
            log_s.lerp_((0.5 * s2.log()).to(log_s), 0.1)  # like BatchNorm's running statistics
        else:
            s2 = torch.exp(2 * at_least_float32(self.likelihood.bounded_scale))
        nll = (sse_B / (2 * s2) + error_BX.shape[1] / 2 * torch.log(2 * math.pi * s2)).mean()
        kl = self.mean_kl(self.kl(mu_BD, log_var_BD))
        loss = nll + self.beta * (kl - self.capacity).abs()
        return {"loss": loss, "nll": nll, "kl": kl, "elbo": -(nll + kl), "sigma": s2.sqrt()}
