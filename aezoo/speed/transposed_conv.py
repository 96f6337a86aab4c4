"""Transposed convolutions whose bias is added separately where oneDNN is slow to add it.

If the larger grid is not a whole number of strides, such as 7x7 from 4x4, oneDNN adds a bias number by number. Forward
and backward, a layer of images then takes up to 1.8 times as long in float32 and 6.6 times in bfloat16
(`python -m benchmarks.convolutions`). `aezoo.speed.conv2d` handles this and more for layers of images.
"""

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.speed.conv_grids import larger, leaves_rest
from aezoo.speed.linear import is_exporting
from aezoo.speed.narrow_conv import is_narrow, narrow

# values per sample, over all channels, above which two operations are faster than one
_MANY = 256


def odd_pays(layer: Any, large: tuple[int, ...]) -> bool:
    """Whether a bias is better added separately, for a transposed layer with this larger grid."""
    many = layer.out_channels * math.prod(large) >= _MANY
    return layer.bias is not None and many and leaves_rest(large, layer.stride)


def with_bias_apart(convolve: Callable[..., Tensor], layer: Any, x: Tensor) -> Tensor:
    """The output of the layer."""
    settings = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
    out = convolve(x, layer.weight, None, *settings)
    bias: Tensor = layer.bias.to(out.dtype)
    return out + bias.view(-1, *[1] * (out.dim() - 2))


def _pays(layer: Any, x: Tensor) -> bool:
    """Whether a separate bias pays off: not in exported graphs, which should keep the convolution, nor on GPUs."""
    if is_exporting() or x.device.type != "cpu" or x.dim() != len(layer.stride) + 2:
        return False
    # a bias that is computed is read only once, as its rule may change with each read
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
