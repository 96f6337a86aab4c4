"""Learned compression with a factorised prior (Ballé et al. 2017), https://arxiv.org/abs/1611.01704

The code is rounded. A learned distribution for each channel determines the number of bits of its integers:

    y = f(x)    y^ = m + round(y - m)    R = -sum log P(y^)    D = ||x - g(y^)||^2

    L = R + lam 255^2 log 2 / C  D     in nats per sample, for C channels of x

This is the paper's R + lam 255^2 MSE in bits per pixel, multiplied by the number of pixels and log 2. In training,
y~ = y + u replaces y^, with u ~ U(-1/2, 1/2). Then R is -log of the density of y~, and L is the negative ELBO of a VAE
with a uniform posterior. The prior is that of Ballé et al. 2018, https://arxiv.org/abs/1802.01436, appendix 6.1.

`aezoo compress` writes these integers. With likelihood gaussian, the term `nll` is D up to a constant.

Shapes: B batch, M channels of the code.
"""

from typing import Unpack

from torch import Tensor

from aezoo.bases.entropy_coded import AdditiveNoise, Coder, EntropyCoded, Factorised, ProbabilityTable, Rounding
from aezoo.bases.network import LatentArgs, NetworkArgs, NetworkAutoencoder


class FactorizedPriorArgs(LatentArgs, total=False):
    """Arguments of `FactorizedPrior`."""

    lam: float


class FactorizedPrior(
    EntropyCoded,
    NetworkAutoencoder,
    hidden_dims={"gdn": (64, 64)},
    defaults={"net": "gdn", "likelihood": "gaussian"},
    tags=("compression",),
):
    """Learns rounded codes with a learned distribution for each channel.

    Args:
        latent_dim: M, channels of the code.
        lam: weight of the distortion.
        net: gdn, conv, resnet, convnext, conv_keras, unet, dc, ldm, vit, mixer, mlp, lstm or transformer.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, latent_dim: int = 32, lam: float = 0.01, **kwargs: Unpack[NetworkArgs]
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.latent_dim = latent_dim
        self.build_nets(self.net, latent_dim, self.hidden_dims, self.activation, lam)
        self.density = Factorised(latent_dim)

    def code_latents(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        return coder(y, self.density.distribution((n, *self.code_shape)))

    def tables(self) -> list[ProbabilityTable]:
        return self.density.tables()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll_B, rate_B = self.code_with_rate(x, AdditiveNoise() if self.training else Rounding())
        nll, rate = nll_B.mean(), rate_B.mean()
        return {"loss": rate + self.weight * nll, "nll": nll, "rate": rate, "bpp": self.bits_per_place(rate)}
