"""Learned compression with several rates in one model (Cui et al. 2021), https://arxiv.org/abs/2003.02012

Each quality s has a vector of gains and one of inverse gains. The gains multiply the code before rounding, which makes
the steps finer or coarser; the inverse gains multiply it afterwards (section 2.1):

    y = f(x)    y^ = g'_s (mu_s + round(g_s y - mu_s))    mu_s, s_s = g_h(z^_s)    z_s = h(g_s y)

    L = E_s [R_s + lam_s 255^2 log 2 / C  ||x - g(y^)||^2]    R_s = -log P(z^_s) - log P(y^_s / g'_s | z^_s)

in nats per sample, for C channels of x, with s drawn for each sample; in training, noise replaces rounding, as in
`factorized_prior`. At a fraction l between two qualities, g = g_s^(1 - l) g_(s+1)^l, and likewise g' and lam
(section 2.2). Initially, g_s is sqrt(lam_s / geometric mean of the lams), and g'_s is its inverse: the squared error of
fine steps is proportional to their square, and -d||e||^2 / dR = 1 / lam. With g = g' = 1, the model is
`mean_scale_hyperprior`, with the same distributions: the paper's asymmetric Gaussians are not implemented.

`quality` is the quality at which the model is evaluated, from 0 to the number of lams - 1; initially the highest.

Shapes: B batch, S qualities, M channels of the code, N of the side information.
"""

import math
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.entropy_coded import AdditiveNoise, Coder
from aezoo.errors import AezooError
from aezoo.models.compression.mean_scale_hyperprior import MeanScaleHyperprior
from aezoo.models.compression.scale_hyperprior import HyperArgs


class GainedHyperprior(MeanScaleHyperprior, tags=("compression",)):
    """Learns rounded codes with means and scales from side information and a step size set by a quality.

    Args:
        latent_dim: M, channels of the code.
        lams: weights of the distortion in increasing order, one for each quality.
        **kwargs: see `MeanScaleHyperprior`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 32,
        lams: tuple[float, ...] = (0.0018, 0.0067, 0.025, 0.0932),
        **kwargs: Unpack[HyperArgs],
    ) -> None:
        if not lams or not all(0 < lam < math.inf for lam in lams) or list(lams) != sorted(lams):
            raise AezooError(f"lams must be numbers above 0 that rise, as in (0.002, 0.008), got {tuple(lams)}")
        super().__init__(input_shape, latent_dim=latent_dim, lam=lams[-1], **kwargs)
        self._weights = [self.weight / lams[-1] * lam for lam in lams]
        log_gain_S = torch.tensor([math.log(lam) / 2 for lam in lams])
        log_gain_SM = (log_gain_S - log_gain_S.mean())[:, None].repeat(1, latent_dim)
        self.log_gain_SM = nn.Parameter(log_gain_SM)
        self.log_inverse_SM = nn.Parameter(-log_gain_SM)
        self.max_quality = len(lams) - 1.0
        self.quality = self.max_quality

    @property
    def quality(self) -> float:
        return self._quality

    @quality.setter
    def quality(self, quality: float) -> None:
        if not 0 <= quality <= self.max_quality:
            raise AezooError(f"quality must be from 0 to {self.max_quality:g}, one of each lam, got {quality}")
        self._quality = float(quality)
        self._shares = [max(0.0, 1 - abs(quality - s)) for s in range(len(self._weights))]
        self.weight = math.prod(weight**share for weight, share in zip(self._weights, self._shares, strict=True))

    def code_with_gains(self, coder: Coder, y: Tensor | None, n: int, shares: Sequence[float | Tensor]) -> Tensor:
        """Like `code_latents`, for a mixture of qualities with these shares, floats or tensors (n, 1)."""

        def mixed(log_SM: Tensor) -> Tensor:
            parts = [share * log_M for share, log_M in zip(shares, at_least_float32(log_SM), strict=True)]
            return torch.stack(parts).sum(0).exp().view(-1, self.code_shape[0], *(1 for _ in self.code_shape[1:]))

        y_hat = super().code_latents(coder, None if y is None else (y * mixed(self.log_gain_SM)).to(y), n)
        return y_hat * mixed(self.log_inverse_SM)

    def code_latents(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        return self.code_with_gains(coder, y, n, self._shares)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        if not self.training:
            return super().loss(x, y)
        top, noise = len(self._weights) - 1, AdditiveNoise()
        quality_B = (torch.rand(x.shape[0], device=x.device) * (top + 1)).floor().clamp_max(top)
        is_of = [quality_B == s for s in range(top + 1)]
        y_hat = self.code_with_gains(noise, self.encoder(x), x.shape[0], [is_s[:, None] for is_s in is_of])
        nll_B, rate = self.nll(self.decoder(y_hat.to(x.dtype)), x), noise.rate_B.mean()
        weighed = [torch.where(is_s, weight * nll_B, 0) for is_s, weight in zip(is_of, self._weights, strict=True)]
        loss = rate + torch.stack(weighed).sum(0).mean()
        return {"loss": loss, "nll": nll_B.mean(), "rate": rate, "bpp": self.bits_per_place(rate)}
