"""Transposed convolutions whose bias is added apart where oneDNN is slow to add it.

To a grid that is no whole number of strides, such as 7x7 from 4x4, it adds a bias number by number: forward and
backward, a layer of images takes up to 1.8 times as long in float32, 6.6 times in bfloat16
(`python -m benchmarks.convolutions`). Layers of images have more than that of their own, in `aezoo.nets.conv2d`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.nets.grids import larger, leaves_rest
from aezoo.nets.linear import goes_elsewhere
from aezoo.nets.narrow import is_narrow, narrow

# numbers of a sample, over all channels, from which on two operations are quicker than one
_MANY = 256


def odd_pays(layer: Any, large: tuple[int, ...]) -> bool:
    """Whether a bias is better added apart, for a transposed layer whose larger grid is this."""
    many = layer.out_channels * math.prod(large) >= _MANY
    return layer.bias is not None and many and leaves_rest(large, layer.stride)


def with_bias_apart(convolve: Callable[..., Tensor], layer: Any, x: Tensor) -> Tensor:
    """What the layer computes."""
    settings = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
    out = convolve(x, layer.weight, None, *settings)
    bias: Tensor = layer.bias.to(out.dtype)
    return out + bias.view(-1, *[1] * (out.dim() - 2))


def _pays(layer: Any, x: Tensor) -> bool:
    """A graph for elsewhere should say convolution, and GPUs have their own."""
    if goes_elsewhere() or x.device.type != "cpu" or x.dim() != len(layer.stride) + 2:
        return False
    # a bias that is computed is read once, as its rule may change with each time
    if "parametrizations" in layer._modules:
        return False
    return odd_pays(layer, larger(layer, x.shape[2:]))


class ConvTranspose1d(nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d`."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, l) -> (B, out channels, L)."""
        if output_size is None and is_narrow(self, input):
            return narrow(F.conv_transpose1d, self, input)
        if output_size is None and _pays(self, input):
            return with_bias_apart(F.conv_transpose1d, self, input)
        return super().forward(input, output_size)


class ConvTranspose3d(nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d`."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, d, h, w) -> (B, out channels, D, H, W)."""
        if output_size is None and is_narrow(self, input):
            return narrow(F.conv_transpose3d, self, input)
        if output_size is None and _pays(self, input):
            return with_bias_apart(F.conv_transpose3d, self, input)
        return super().forward(input, output_size)
