"""DnCNN, residual denoising network (Zhang et al. 2016), https://arxiv.org/abs/1608.03981

Predicts the noise v in y = x + v, v ~ N(0, sigma^2 I), and subtracts it:

    x_hat = y - R(y)
    L = E_v[ -log p(x | x_hat) ]     with likelihood=gaussian  ||R(y) - v||^2 + D/2 log(pi)

This is the residual form (eq. 1, summed), since x_hat - x = v - R(y). With residual=False, R(y) itself is x_hat (the
direct form). R is a stack of convolutions of stride 1; the last one has no activation. There is no batch normalisation,
so that a sample does not depend on its batch; the authors' released networks also run without it
(https://github.com/cszn/KAIR, main_test_dncnn.py). Weights are initialised as in He et al. 2015,
https://arxiv.org/abs/1502.01852, which keeps the scale from layer to layer.

The code is not a bottleneck. It is the input of the last convolution: a feature map on the same grid as the data. In
the residual form, the code also contains the noisy sample, from which decode subtracts the noise. Training draws new
noise for every batch; evaluation draws it once, from a fixed seed. PSNR is computed on x_hat, not clamped to [0, 1].

Shapes: B batch, C channels of the data, H features.
"""

from itertools import pairwise
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo import nets
from aezoo.autoencoder import Autoencoder
from aezoo.corruptions import GaussianNoise
from aezoo.errors import AezooError
from aezoo.nets.conv import CONVS, rank_of
from aezoo.training.arguments import OptimizerArgs, TrainingArgs

_MOST_LAYERS = 100
_LOCATIONS = ("gaussian", "laplace", "logcosh")


class Features(nn.Module):
    """All convolutions but the last, (B, C, *grid) -> (B, H, *grid); y and these features in the residual form."""

    def __init__(self, input_shape: tuple[int, ...], width: int, depth: int, act: str, residual: bool) -> None:
        super().__init__()
        conv, channels = CONVS[rank_of(input_shape)], (input_shape[0], *[width] * (depth - 1))
        layers = [(conv(*pair, 3, padding=1), nets.activation(act)) for pair in pairwise(channels)]
        self.layers = nn.Sequential(*[module for layer in layers for module in layer])
        self.residual = residual

    def forward(self, y: Tensor) -> Tensor:
        h = self.layers(y)
        return torch.cat([y, h.to(y.dtype)], 1) if self.residual else h


class SubtractNoise(nn.Module):
    """The last convolution, applied to a code; in the residual form, y minus its output: (B, C, *grid)."""

    def __init__(self, input_shape: tuple[int, ...], width: int, residual: bool) -> None:
        super().__init__()
        self.last = CONVS[rank_of(input_shape)](width, input_shape[0], 3, padding=1)
        self.residual = residual
        self.channels = input_shape[0]

    def forward(self, z: Tensor) -> Tensor:
        if not self.residual:
            return self.last(z)
        y, h = z.split([self.channels, z.shape[1] - self.channels], 1)
        return y - self.last(h)


class DnCNNArgs(TrainingArgs, total=False):
    """Arguments of `DnCNN`, without the noise."""

    residual: bool
    width: int
    depth: int
    activation: str


class DnCNN(Autoencoder, tags=("denoising",)):
    """Removes Gaussian noise of known strength; metrics in evaluation also start from noisy input.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), any size.
        sigma: standard deviation of the noise, on the data's scale; 25/255 is the 25 of papers with values up to 255.
        residual: predict the noise, not the clean sample.
        width: features of each layer; 64 in the paper.
        depth: number of convolutions; 17 in the paper.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers.
        likelihood: how outputs are compared with data: gaussian, gaussian:0.1, gaussian:learned, laplace or logcosh.
        **kwargs: see `Autoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        sigma: float = 25 / 255,
        residual: bool = True,
        width: int = 32,
        depth: int = 8,
        activation: str = "relu",
        likelihood: str = "gaussian",
        **kwargs: Unpack[OptimizerArgs],
    ) -> None:
        super().__init__(input_shape, likelihood=likelihood, **kwargs)
        if likelihood.partition(":")[0] not in _LOCATIONS:
            raise AezooError(
                f"a denoiser's output is the sample itself, so likelihood is {', '.join(_LOCATIONS)} "
                f"with or without a scale, not {likelihood!r}"
            )
        if sigma <= 0:
            raise AezooError(f"sigma must be above 0, on the data's scale, got {sigma}")
        if width < 1 or not 2 <= depth <= _MOST_LAYERS:
            raise AezooError(f"width must be at least 1 and depth from 2 to {_MOST_LAYERS}, got {width} and {depth}")
        self.corruption = GaussianNoise(sigma)
        self.encoder = Features(self.input_shape, width, depth, activation, residual)
        self.decoder = SubtractNoise(self.input_shape, width, residual)
        self.code_shape = (width + residual * self.input_shape[0], *self.input_shape[1:])
        for p in (*self.encoder.parameters(), *self.decoder.parameters()):
            nn.init.kaiming_normal_(p, nonlinearity="relu") if p.ndim > 1 else nn.init.zeros_(p)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        noisy = x if self.corruption is None else self.corruption(x)
        nll_B = self.nll(self.decoder(self.encoder(noisy)), x)
        nll = nll_B.mean()
        return {"loss": nll, "nll": nll}
