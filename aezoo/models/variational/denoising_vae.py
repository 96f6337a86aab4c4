"""Denoising VAE (Im et al. 2015), https://arxiv.org/abs/1511.06406

    L = E_C[ E_q[-log p(x|z)] + beta KL(q(z|x~) || p(z)) ]     x~ ~ C(x~|x), z ~ q(z|x~)

in nats per sample. The code is computed from a corrupted sample, and the likelihood from the clean one. The effective
posterior is the mixture q~(z|x) = E_C[q(z|x~)], which is more flexible than a Gaussian. With this posterior, L at beta
= 1 is an upper bound on the negative ELBO (section 3). Without corruption this is the VAE.

Training draws new noise for every batch; evaluation always uses the same noise, from a fixed seed. Samples that are
encoded or scored are not corrupted: q(z|x) in `log_likelihood` is the encoder's output for the clean sample.
"""

from typing import Unpack

import torch
from torch import Tensor

from aezoo import corruptions
from aezoo.models.variational.vae import VAE, VAEArgs


class DenoisingVAE(VAE, tags=("generation", "denoising")):
    """A VAE that learns to remove a corruption; in evaluation, reconstructions and metrics also use corrupted inputs.

    Args:
        corruption: gaussian:STD, masking:SHARE, salt_and_pepper:SHARE or none.
        **kwargs: see `VAE`.
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, corruption: str = "gaussian:0.3", **kwargs: Unpack[VAEArgs]
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.corruption = corruptions.corruption(corruption)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        noisy = x if self.corruption is None else self.corruption(x)
        mu_BD, log_var_BD = self.posterior(noisy)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.mean_kl(self.kl(mu_BD, log_var_BD))
        loss = nll + self.beta * (kl - self.capacity).abs()
        return {"loss": loss, "nll": nll, "kl": kl, "elbo": -(nll + kl)}
