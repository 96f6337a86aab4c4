"""Learned compression with a mean and scale hyperprior (Minnen et al. 2018), https://arxiv.org/abs/1809.02736

Side information z also determines the mean of the code, and the code is rounded relative to it (table 1):

    y = f(x)    z = h(y)    z^ = m + round(z - m)    mu, s = g_h(z^)    y^ = mu + round(y - mu)

    P(z^) factorised, learned    P(y^ | z^) = N(mu, s^2) * U(-1/2, 1/2)    R = -log P(z^) - log P(y^ | z^)

    L = R + lam 255^2 log 2 / C  ||x - g(y^)||^2

in nats per sample, for C channels of x; in training, noise replaces rounding, as in `factorized_prior`.

Shapes: B batch, M channels of the code, N of the side information.
"""

from torch import Tensor

from aezoo.bases.entropy_coded import Coder
from aezoo.models.compression.scale_hyperprior import ScaleHyperprior


class MeanScaleHyperprior(ScaleHyperprior, tags=("compression",)):
    """Learns rounded codes that are Gaussian, with means and scales from side information."""

    per_channel = 2

    def side(self, y: Tensor) -> Tensor:
        z: Tensor = self.hyper_encoder(y)
        return z

    def code_latents(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        return coder(y, self.distribution(*self.code_side(coder, y, n).chunk(2, 1)))
