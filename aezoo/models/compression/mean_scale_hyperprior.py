"""Learned compression with a mean and scale hyperprior (Minnen et al. 2018), https://arxiv.org/abs/1809.02736

Side information z tells where the code is expected as well, and the code is rounded from there (table 1):

    y = f(x)    z = h(y)    z^ = m + round(z - m)    mu, s = g_h(z^)    y^ = mu + round(y - mu)

    P(z^) factorised, learned    P(y^ | z^) = N(mu, s^2) * U(-1/2, 1/2)    R = -log P(z^) - log P(y^ | z^)

    L = R + lam 255^2 log 2 / C  ||x - g(y^)||^2

in nats per sample, C channels of x; in training noise takes the place of rounding, as in `factorized_prior`.
"""

from torch import Tensor

from aezoo.entropy import Coder
from aezoo.models.compression.scale_hyperprior import ScaleHyperprior


class MeanScaleHyperprior(ScaleHyperprior):
    """Rounded codes, Gaussian with means and scales that side information gives."""

    per_channel = 2

    def side(self, y: Tensor) -> Tensor:
        z: Tensor = self.hyper_encoder(y)
        return z

    def walk(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        return coder(y, self.law(*self.said(coder, y, n).chunk(2, 1)))
