"""torch's convolutions of images, with the same parameters and results, computed faster on a CPU.

In the following cases, another way is faster than oneDNN as torch calls it. The factors say how many times as long that
takes.

- Small grids with many channels: matrix products; up to 5.6 times, in bfloat16 6.0 times with AMX and 4.6 times
  without.
- Transposed, to few channels: a sub-pixel convolution or overlaid products; up to 2.1 times.
- Transposed, to a larger grid: the gradient of the bias is a separate sum; up to 1.5 times.
- Transposed, to a grid that is no whole number of strides, as 7x7 from 4x4: a separate bias; up to 1.8 times, in
  bfloat16 6.6 times.
- bfloat16 weights without AMX: their gradient is a matrix product; up to 1.2 times for a strided layer, up to 2.2 times
  for a transposed one with its bias.
- An input that fills the caches: its gradient is computed after that of the weights, since it is needed next.
- Consecutive layers on a Zen 5: they have the samples of a batch abreast (`aezoo.speed.batch_inner_conv`).

`python -m benchmarks.convolutions` measures all of these. The rules come from measurements with one thread on three
processors, with and without AMX. Other devices, exported graphs and torch.func use torch's own layers, and so do
compiled graphs, except for the bias of uneven grids. But errors of oneDNN are corrected in compiled graphs, too
(`aezoo.speed.narrow_conv`).
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.speed import batch_inner_conv, linear
from aezoo.speed.conv_grids import larger, smaller
from aezoo.speed.conv_products import Apart, Geometry, Overlay, Pair, See, Spread, SubPixel
from aezoo.speed.memory_format import laid
from aezoo.speed.narrow_conv import has_narrow, is_narrow, narrow
from aezoo.speed.transposed_conv import odd_pays, with_bias_apart

# matrix products: most points of a layer's smaller grid, and fewest (channels in x channels out) per point
_POINTS = 64
_CHANNELS = 2048
# the same where oneDNN's convolutions are better: in 16 bits without units for tile products, in 32 where MKL is slow
_FEW_POINTS = 16
_CHANNELS_UNSTRIDED = 65536
# the other ways: fewest points of a transposed layer's larger grid, and in 16 bits for a separate bias
_LARGE = 100
_LARGE_IN_16_BITS = 36
# channels out x product of strides: what a processor computes at once
_BETWEEN = 16
# up to so many channels, the sum for the bias is too fast to matter
_FEW = 16
_FEW_IN_16_BITS = 4
# samples abreast: fewest samples, fewer from so many (channels in x channels out) on; then fewest channels, and fewest
# multiplications
_ABREAST, _FEW_ABREAST, _CHANNELS_ABREAST = 64, 16, 32768
_LEAST_ABREAST, _LARGE_ABREAST = 8, 2**21
# a batch of so many values fills the caches: then the result that is needed next is better computed last
_CACHE = 2**21


def _is_torchs(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> bool:
    """Whether to use torch's own layer: in exported graphs, on GPUs, for inductor (which makes others slow loops)."""
    return linear.in_graph() or linear.needs_torch() or not _is_plain(layer, x)


def _is_plain(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> bool:
    """Whether torch accepts the input, and its own layer is not needed."""
    # parametrised weights are read only once, since their rule may change with every read
    if x.device.type != "cpu" or x.dim() != 4 or "parametrizations" in layer._modules:
        return False
    images = x.shape[1] == layer.in_channels and min(x.shape[2:]) > 0
    same = layer.weight.dtype == x.dtype or torch.is_autocast_enabled("cpu")
    numbers = not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    extra = all(n < s for n, s in zip(layer.output_padding, layer.stride, strict=True)) if layer.transposed else True
    return images and same and numbers and extra and layer.groups == 1 and layer.dilation == (1, 1)


def abreast_pays(layer: "Conv2d | ConvTranspose2d", geometry: Geometry, x: Tensor) -> bool:
    """Whether samples abreast are faster, for a layer between others that accept this layout."""
    if not (
        layer.among_layers and linear.MKL_HALF_WIDTH and torch._C._get_mkldnn_enabled() and batch_inner_conv.is_known()
    ):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layer.weight.dtype
    if x.dtype not in (torch.float32, dtype) or dtype not in (torch.float32, *[torch.bfloat16] * (not linear.TILES)):
        return False
    points, channels = math.prod(geometry.small), layer.in_channels * layer.out_channels
    long = len(x) >= (_FEW_ABREAST if channels >= _CHANNELS_ABREAST else _ABREAST)
    wide = min(layer.in_channels, layer.out_channels) >= _LEAST_ABREAST
    large = len(x) * points * channels * math.prod(geometry.kernel) >= _LARGE_ABREAST
    strided = math.prod(geometry.stride) > 1 and math.prod(geometry.kernel) > 1 and points <= _POINTS
    sides = geometry.kernel, geometry.padding, geometry.small, geometry.large
    return long and wide and large and strided and not has_narrow(*sides)


def products_pay(layer: nn.Conv2d | nn.ConvTranspose2d, small: Pair) -> bool:
    """Whether matrix products are faster, for a layer with this smaller grid."""
    points, channels = math.prod(small), layer.in_channels * layer.out_channels
    most, least = _POINTS, _CHANNELS * max(4, points)
    if not linear.TILES if _is_lowered(layer) else linear.MKL_HALF_WIDTH:
        unstrided = points > 1 and math.prod(layer.stride) == 1
        most, least = _FEW_POINTS, _CHANNELS_UNSTRIDED if unstrided else least
    return min(small) > 0 and points <= most and channels >= least and math.prod(layer.kernel_size) > 1


def weighing_pays(layer: nn.Conv2d | nn.ConvTranspose2d, geometry: Geometry) -> bool:
    """Whether a matrix product is faster for the gradient of the weights, if it is not for the rest."""
    slow = torch.is_grad_enabled() and _is_lowered(layer) and not linear.TILES
    enough = layer.in_channels * layer.out_channels >= 4 * _CHANNELS and math.prod(geometry.small) <= _POINTS
    return slow and enough and math.prod(layer.stride) > 1 and math.prod(layer.kernel_size) > 1


def sub_pixels_pay(layer: nn.ConvTranspose2d, geometry: Geometry) -> bool:
    """Whether a sub-pixel convolution of the smaller grid is faster, for a layer with few channels."""
    between = math.prod(layer.stride)
    few = 1 < between <= _BETWEEN // layer.out_channels
    # points beyond see no point of the smaller grid
    inside = all(extra <= p for extra, p in zip(layer.output_padding, geometry.padding, strict=True))
    return few and inside and math.prod(geometry.large) >= _LARGE


def overlay_pays(layer: nn.ConvTranspose2d, geometry: Geometry) -> bool:
    """Whether overlaid products are faster, for a layer with one channel."""
    by_onednn = linear.MKL_HALF_WIDTH and layer.weight.dtype == torch.float32 and not _is_lowered(layer)
    overlap = any(k > s for k, s in zip(geometry.kernel, geometry.stride, strict=True))
    return by_onednn and layer.out_channels == 1 and overlap and sub_pixels_pay(layer, geometry)


def bias_pays_apart(layer: nn.ConvTranspose2d, geometry: Geometry) -> bool:
    """Whether a separate bias is faster in a transposed convolution, or in its backward pass."""
    lowered = _is_lowered(layer)
    many = layer.out_channels > (_FEW_IN_16_BITS if lowered else _FEW)
    slow = torch.is_grad_enabled() and not (lowered and linear.TILES) and many
    backward = slow and math.prod(geometry.large) >= (_LARGE_IN_16_BITS if lowered else _LARGE)
    return layer.bias is not None and (backward or odd_pays(layer, geometry.large))


def apart_pays(layer: nn.Conv2d | nn.ConvTranspose2d, geometry: Geometry, x: Tensor) -> bool:
    """Whether separate derivatives are faster."""
    if isinstance(layer, nn.ConvTranspose2d):
        return bias_pays_apart(layer, geometry) or weighing_pays(layer, geometry)
    sides = layer.in_channels * math.prod(geometry.large), layer.out_channels * math.prod(geometry.small)
    fills = len(x) * max(sides) >= _CACHE and torch.is_grad_enabled() and not _is_lowered(layer)
    return fills or weighing_pays(layer, geometry)


def _is_lowered(layer: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    return layer.weight.itemsize == 2 or torch.is_autocast_enabled("cpu")


def _lowered(x: Tensor) -> Tensor:
    """The tensor in the dtype that autocast gives convolutions."""
    lowers = torch.is_autocast_enabled("cpu") and x.dtype == torch.float32
    return x.to(torch.get_autocast_dtype("cpu")) if lowers else x


def _channels_last(x: Tensor) -> Tensor:
    return _lowered(x).permute(0, 2, 3, 1)


def _channels_first(out: Tensor, bias: Tensor | None) -> Tensor:
    """Permute, with the bias added before: autograd would copy a view."""
    return (out if bias is None else out.add_(bias)).permute(0, 3, 1, 2)


def _by(
    way: type[torch.autograd.Function],
    layer: nn.Conv2d | nn.ConvTranspose2d,
    x: Tensor,
    geometry: Geometry,
    weighs: bool | None = None,
) -> Tensor:
    bias = None if layer.bias is None else _lowered(layer.bias)
    weighs = weighing_pays(layer, geometry) if weighs is None else weighs
    out: Tensor = way.apply(_lowered(x), _lowered(layer.weight), bias, geometry, weighs, layer.transposed)
    return out


def _abreast(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor, geometry: Geometry) -> Tensor:
    x, weighs = _lowered(x), products_pay(layer, geometry.small)
    # the gradient of the weights then also needs x abreast
    x = laid(x, abreast=True) if x.itemsize == 2 and not weighs else x
    return _by(batch_inner_conv.Abreast, layer, x, geometry, weighs)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`.

    Attributes:
        among_layers: its output goes only to activations and to convolutions of this module, which accept any memory
            layout.
    """

    among_layers = False

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out channels, h, w)."""
        geometry = None if _is_torchs(self, input) else self.geometry(input)
        if geometry:
            if abreast_pays(self, geometry, input):
                return self.abreast(input, geometry)
            input = laid(input, abreast=False)
        if geometry and products_pay(self, geometry.small):
            return self.by_products(input, geometry)
        if is_narrow(self, input):
            return narrow(F.conv2d, self, input)
        if geometry and apart_pays(self, geometry, input):
            return self.apart(input, geometry)
        return super().forward(input)

    def geometry(self, input: Tensor) -> Geometry:
        """How the grids of this layer are related."""
        large, padding = tuple(input.shape[2:]), cast(Pair, self.padding)
        return Geometry(self.kernel_size, self.stride, padding, smaller(self, large), large)

    def by_products(self, input: Tensor, geometry: Geometry) -> Tensor:
        """Products of the values that each point sees with the weights."""
        return _channels_first(See.apply(_channels_last(input), _channels_last(self.weight), geometry), self.bias)

    def abreast(self, input: Tensor, geometry: Geometry) -> Tensor:
        """By oneDNN, with the batch as a side of the grid."""
        return _abreast(self, input, geometry)

    def apart(self, input: Tensor, geometry: Geometry) -> Tensor:
        """The result of torch's own layer, with separate derivatives."""
        return _by(Apart, self, input, geometry)


class ConvTranspose2d(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d`.

    Attributes:
        among_layers: its output goes only to activations and to convolutions of this module, which accept any memory
            layout.
    """

    among_layers = False

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, h, w) -> (B, out channels, H, W)."""
        if output_size is not None:
            return super().forward(input, output_size)
        geometry = None if _is_torchs(self, input) else self.geometry(input)
        if geometry and min(geometry.large) < 1:
            return super().forward(input)  # which refuses it
        if geometry:
            if abreast_pays(self, geometry, input):
                return self.abreast(input, geometry)
            input = laid(input, abreast=False)
        if geometry and products_pay(self, geometry.small):
            return self.by_products(input, geometry)
        if is_narrow(self, input):
            return narrow(F.conv_transpose2d, self, input)
        if geometry is None:
            inductors = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
            return self.in_graph(input) if inductors and _is_plain(self, input) else super().forward(input)
        if overlay_pays(self, geometry):
            return self.by_overlay(input, geometry)
        if sub_pixels_pay(self, geometry):
            return self.by_sub_pixels(input, geometry)
        if apart_pays(self, geometry, input):
            return self.apart(input, geometry)
        return super().forward(input)

    def in_graph(self, input: Tensor) -> Tensor:
        """The result of torch's own layer, with a separate bias if that is faster."""
        if odd_pays(self, self.geometry(input).large):
            return with_bias_apart(F.conv_transpose2d, self, input)
        return super().forward(input)

    def geometry(self, input: Tensor) -> Geometry:
        """How the grids of this layer are related."""
        small, padding = tuple(input.shape[2:]), cast(Pair, self.padding)
        return Geometry(self.kernel_size, self.stride, padding, small, larger(self, small))

    def by_products(self, input: Tensor, geometry: Geometry) -> Tensor:
        """Products of each point with the weights, overlaid."""
        return _channels_first(Spread.apply(_channels_last(input), _channels_last(self.weight), geometry), self.bias)

    def by_overlay(self, input: Tensor, geometry: Geometry) -> Tensor:
        """Products of each point with the weights, overlaid, with torch's own derivatives."""
        return _by(Overlay, self, input, geometry)

    def by_sub_pixels(self, input: Tensor, geometry: Geometry) -> Tensor:
        """As a convolution on the smaller grid."""
        return _by(SubPixel, self, input, geometry)

    def abreast(self, input: Tensor, geometry: Geometry) -> Tensor:
        """By oneDNN, with the batch as a side of the grid."""
        return _abreast(self, input, geometry)

    def apart(self, input: Tensor, geometry: Geometry) -> Tensor:
        """The result of torch's own layer, with separate derivatives and, if that is faster, a separate bias."""
        return _by(Apart, self, input, geometry)
