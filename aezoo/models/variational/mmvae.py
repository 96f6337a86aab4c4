"""MMVAE, the mixture-of-experts multimodal VAE (Shi et al. 2019), https://arxiv.org/abs/1911.03393

A sample consists of parts x = (x_1, ..., x_M), its modalities. The posterior is the mixture of their encoders'
Gaussians:

    q(z|x) = 1/M sum_i q_i(z|x_i)     q_i = N(mu_i, diag sigma_i^2)     p(z) = N(0, I)

    L = 1/M sum_i E_q_i[-log p(x|z) + beta (log q(z|x) - log p(z))]     (section 3)
      = 1/M sum_i (E_q_i[-log p(x|z)] + beta (KL(q_i || p) - E_q_i[log q_i(z|x_i) - log q(z|x)]))

in nats per sample. This is the ELBO, not the tighter IWAE bound that the paper uses for training. Stratified sampling
estimates it without bias: each expert draws one z, from which all parts are decoded (x_i also from z ~ q_j), and q(z|x)
is the density of the whole mixture at that z. The term subtracted in the second form is at most log M. Without it, the
KL of the mixture would be replaced by the mean of the experts' KLs, which is never smaller. M = 1 is the VAE. If parts
of a sample are missing, L is computed from its other parts.

The code is the mixture's mean, the mean of the mu_i. The score is the second form for beta = 1 with z at the mu_i.

Shapes: B batch, D code, M parts, S components of the mixture, K importance samples.
"""

import math
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.multimodal import MissingModalities, MultimodalVAEArgs
from aezoo.distributions import gaussians
from aezoo.distributions.gaussians import LOG_2PI
from aezoo.models.variational.vae import VAE


class MMVAE(MissingModalities, VAE, normal_prior=False, tags=("multimodal", "imputation")):
    """A VAE of several modalities whose posterior is the mixture of the posteriors of the single modalities.

    Args:
        **kwargs: see `VAE`.
    """

    def __init__(self, input_shape: tuple[int, ...], **kwargs: Unpack[MultimodalVAEArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        # the sampled KL may be negative, so its distance from a capacity has no meaning
        del self.capacity
        self.build_parts(self.parts, self.net, self.hidden_dims, self.activation)

    def components(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Means and log-variances of the mixture q(z | some parts): (B, *input_shape) -> (B, S, D), (B, S, D)."""
        return self.experts(x, parts)

    def present_components(self, x: Tensor, parts: Sequence[int] | None = None) -> Tensor:
        """Return which components belong to parts that the sample has: (B, *input_shape) -> (B, S) bool."""
        return self.present_mask(x, parts)

    def weights(self, x: Tensor, parts: Sequence[int] | None = None) -> Tensor:
        """S times the weight of each component in the mixture, 1 for complete samples: (B, *input_shape) -> (B, S)."""
        there_BS = self.present_components(x, parts).to(torch.promote_types(x.dtype, torch.float32))
        return there_BS * there_BS.shape[1] / there_BS.sum(1, keepdim=True)

    def infer(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        return gaussians.mixture_moments(*self.components(x, parts), self.weights(x, parts))

    @staticmethod
    def log_densities(z_BKD: Tensor, mu_BSD: Tensor, log_var_BSD: Tensor) -> Tensor:
        """Log q_s(z_k) in nats of all components: (B, K, D), (B, S, D), (B, S, D) -> (B, K, S)."""
        mu_B1SD, log_var_B1SD = mu_BSD[:, None], log_var_BSD[:, None]
        d2_BKSD = (z_BKD[:, :, None] - mu_B1SD) ** 2 * torch.exp(-log_var_B1SD)
        return -0.5 * (d2_BKSD + log_var_B1SD + LOG_2PI).sum(3)

    @staticmethod
    def log_mean(log_q_BKS: Tensor, weight_BS: Tensor) -> Tensor:
        """Log q(z_k) in nats of the mixture: (B, K, S), (B, S) -> (B, K)."""
        return (log_q_BKS + weight_BS.log()[:, None]).logsumexp(2) - math.log(log_q_BKS.shape[2])

    def bound(self, x: Tensor, noise: bool = True) -> tuple[Tensor, Tensor]:
        """Weighted -log p(x|z_s) and KL terms for z_s ~ q_s, or for z_s = mu_s: (B, *input_shape) -> (B, S), (B, S)."""
        (mu_BSD, log_var_BSD), weight_BS = self.components(x), self.weights(x)
        z_BSD = mu_BSD + torch.exp(0.5 * log_var_BSD) * torch.randn_like(mu_BSD) if noise else mu_BSD
        nll_BS = torch.stack([self.nll_of_part(i, z_BSD, x_i) for i, x_i in enumerate(self.split(x))]).sum(0)
        kl_BS = self.kl(mu_BSD.flatten(0, 1), log_var_BSD.flatten(0, 1)).unflatten(0, nll_BS.shape)
        log_q_BSS = self.log_densities(z_BSD, mu_BSD, log_var_BSD)
        log_mixture_BS = self.log_mean(log_q_BSS, weight_BS)
        return weight_BS * nll_BS, weight_BS * (kl_BS - (log_q_BSS.diagonal(dim1=1, dim2=2) - log_mixture_BS))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll, kl = (values_BS.mean() for values_BS in self.bound(x))
        return {"loss": nll + self.beta * kl, "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    def sample_posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        (mu_BSD, log_var_BSD), weight_BS = self.components(x), self.weights(x)
        b, s, d = mu_BSD.shape
        whole = bool((weight_BS == 1).all())
        of_BK = torch.randint(s, (b, n), device=x.device) if whole else torch.multinomial(weight_BS, n, True)
        of_BKD = of_BK[..., None].expand(b, n, d)
        std_BKD = torch.exp(0.5 * log_var_BSD.gather(1, of_BKD))
        z_BKD = mu_BSD.gather(1, of_BKD) + std_BKD * torch.randn_like(std_BKD)
        log_q_BK = self.log_mean(self.log_densities(z_BKD, mu_BSD, log_var_BSD), weight_BS)
        return z_BKD.transpose(0, 1), log_q_BK.T

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """Return the loss's terms with z_s at the components' means, in nats: (B, *input_shape) -> (B,), no noise."""
        nll_BS, kl_BS = self.bound(x, noise=False)
        return (nll_BS + kl_BS).mean(1)
