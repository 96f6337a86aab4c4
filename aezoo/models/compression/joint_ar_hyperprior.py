"""Learned compression with autoregressive context (Minnen et al. 2018), https://arxiv.org/abs/1809.02736

Side information and previous positions, row by row, determine the distribution at each position (section 2.1):

    mu_t, s_t = p(g_h(z^)_t, (W * y^)_t)    W a masked convolution of positions < t (van den Oord et al. 2016)
    y^_t = mu_t + round(y_t - mu_t)    P(y^_t | y^_<t, z^) = N(mu_t, s_t^2) * U(-1/2, 1/2)

    L = R + lam 255^2 log 2 / C  ||x - g(y^)||^2    R = -log P(z^) - sum_t log P(y^_t | y^_<t, z^)

In training, all positions are known up to noise, and W is one convolution; coding takes one step per position.

Shapes: B batch, M channels of the code, N of the side information, T positions.
"""

import itertools
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.entropy_coded import AdditiveNoise, Coder
from aezoo.errors import AezooError
from aezoo.models.compression.mean_scale_hyperprior import MeanScaleHyperprior
from aezoo.models.compression.scale_hyperprior import ScaleHyperpriorArgs
from aezoo.nets.blocks.context import Context, tap_offsets

Index = tuple[Any, ...]


class JointARHyperprior(MeanScaleHyperprior, tags=("compression",)):
    """Learns rounded codes with a Gaussian at each position, from side information and earlier positions.

    Args:
        input_shape: shape of one sample, (C, L), (C, H, W) or (C, D, H, W).
        hyper_hidden_dims: channels of the stages between y and z; mirrored on the way back.
        reach: number of positions that W covers on each side.
        net: gdn, conv, resnet, convnext, unet, dc, ldm, vit or mixer.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers;
            with net gdn, only in the networks of the side information.
        **kwargs: see `MeanScaleHyperprior`.
    """

    def __init__(self, input_shape: tuple[int, ...], *, reach: int = 2, **kwargs: Unpack[ScaleHyperpriorArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        self.grid = self.code_shape[1:]
        if not self.grid:
            raise AezooError(f"net {self.net!r} gives a code without a grid: use gdn or conv, or mean_scale_hyperprior")
        kernel = tap_offsets(reach, len(self.grid))[0]
        before = torch.arange(kernel.numel()).view_as(kernel) < kernel.numel() // 2
        self.context = Context(self.latent_dim, 2 * self.latent_dim, before)

    def code_latents(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        side = self.code_side(coder, y, n)
        if isinstance(coder, AdditiveNoise) and y is not None:
            y_noisy = coder.transform(at_least_float32(y))
            coder.add_rate(y_noisy, self.distribution(*self.context(side, self.context.masked_conv(y_noisy))))
            return y_noisy
        reach = self.context.reach
        known = F.pad(side.new_zeros(n, *self.code_shape), [reach] * 2 * len(self.grid))
        for place in itertools.product(*map(range, self.grid)):
            at: Index = (..., *place)
            about: Index = (..., *(slice(i, i + 2 * reach + 1) for i in place))
            distribution = self.distribution(*self.context(side[at], self.context.masked_conv_at(known[about].clone())))
            y_hat = coder(None if y is None else y[at], distribution)
            middle: Index = (..., *(i + reach for i in place))
            known[middle] = y_hat.detach()  # no optimiser step follows an evaluation
        inner: Index = (..., *(slice(reach, reach + side) for side in self.grid))
        return known[inner]
