"""torch's convolutions of images, with the same parameters and results, computed faster on a CPU.

On small grids with many channels a layer takes up to 5.6 times as long by oneDNN as by matrix products, 6.0 times in
bfloat16 on a processor with AMX and 4.6 times without. A transposed convolution to few channels takes up to 2.1 times
as long as a sub-pixel convolution, or as overlaid products. On larger grids it takes up to 1.5 times as long with the
gradient of its bias, which is a separate sum here; and to a grid that is no whole number of strides, as 7x7 from 4x4,
up to 1.8 times as long with a bias, 6.6 times in bfloat16. Without AMX the gradient of bfloat16 weights is a matrix
product: otherwise a strided layer takes up to 1.2 times as long, a transposed one 2.2 times with its bias; and if an
input fills the caches, its gradient is computed after that of the weights, as it is needed next. Consecutive layers
have the samples of a batch abreast (`aezoo.nets.abreast`), on a Zen 5. `python -m benchmarks.convolutions` measures
them all; the rules are from one thread of three processors, with AMX and without. On other devices, in exported graphs
and under torch.func all is torch's own, in compiled graphs all but the bias of uneven grids; but errors of oneDNN are
corrected in compiled graphs, too (`aezoo.nets.narrow`).
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.nets import abreast, linear
from aezoo.nets.grids import larger, smaller
from aezoo.nets.memory_format import laid
from aezoo.nets.narrow import has_narrow, is_narrow, narrow
from aezoo.nets.products import Apart, Geometry, Overlay, Pair, See, Spread, SubPixel
from aezoo.nets.transposed import odd_pays, with_bias_apart

# a layer's smaller grid has no more points than this, and channels in times channels out are so many a point
_POINTS = 64
_CHANNELS = 2048
# where oneDNN is the better at convolutions: in 16 bits without units for products of tiles, in 32 where MKL is slow
_FEW_POINTS = 16
_CHANNELS_UNSTRIDED = 65536
# and a transposed layer's larger grid has at least this many for the other ways, or to leave out a bias of 16 bits
_LARGE = 100
_LARGE_IN_16_BITS = 36
# channels of all the points between: what a processor computes at once
_BETWEEN = 16
# channels whose sum is too quick to matter
_FEW = 16
_FEW_IN_16_BITS = 4
# samples from which on the batch is a side of the grid, or fewer with so many channels; and of these and of
# multiplications at least as many
_ABREAST, _FEW_ABREAST, _CHANNELS_ABREAST = 64, 16, 32768
_LEAST_ABREAST, _LARGE_ABREAST = 8, 2**21
# numbers of a batch that leave nothing else in a cache: then what is needed next is better computed last
_CACHE = 2**21


def _is_torchs(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> bool:
    """Whether to use torch's own: in exported graphs, for inductor, which makes slow loops of the rest, and on GPUs."""
    return linear.in_graph() or linear.needs_torch() or not _is_plain(layer, x)


def _is_plain(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> bool:
    """Whether torch accepts the input, and its own layer is not needed."""
    # weights that are computed are read once, as their rule may change with each time
    if x.device.type != "cpu" or x.dim() != 4 or "parametrizations" in layer._modules:
        return False
    images = x.shape[1] == layer.in_channels and min(x.shape[2:]) > 0
    same = layer.weight.dtype == x.dtype or torch.is_autocast_enabled("cpu")
    numbers = not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    extra = all(n < s for n, s in zip(layer.output_padding, layer.stride, strict=True)) if layer.transposed else True
    return images and same and numbers and extra and layer.groups == 1 and layer.dilation == (1, 1)


def abreast_pays(layer: "Conv2d | ConvTranspose2d", geometry: Geometry, x: Tensor) -> bool:
    """Whether samples abreast are faster, for a layer between others that take them so."""
    if not (layer.among_layers and linear.HALVED and torch._C._get_mkldnn_enabled() and abreast.is_known()):
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
    if not linear.TILES if _is_lowered(layer) else linear.HALVED:
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
    # beyond that no point of the smaller grid is seen
    inside = all(extra <= p for extra, p in zip(layer.output_padding, geometry.padding, strict=True))
    return few and inside and math.prod(geometry.large) >= _LARGE


def overlay_pays(layer: nn.ConvTranspose2d, geometry: Geometry) -> bool:
    """Whether overlaid products are faster, for a layer with one channel."""
    by_onednn = linear.HALVED and layer.weight.dtype == torch.float32 and not _is_lowered(layer)
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
    """As autocast has it for convolutions."""
    lowers = torch.is_autocast_enabled("cpu") and x.dtype == torch.float32
    return x.to(torch.get_autocast_dtype("cpu")) if lowers else x


def _channels_last(x: Tensor) -> Tensor:
    return _lowered(x).permute(0, 2, 3, 1)


def _channels_first(out: Tensor, bias: Tensor | None) -> Tensor:
    """And its bias, before it is a view, which autograd would copy."""
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
    # then the gradient of the weights is of x abreast as well
    x = laid(x, abreast=True) if x.itemsize == 2 and not weighs else x
    return _by(abreast.Abreast, layer, x, geometry, weighs)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`.

    Attributes:
        among_layers: its output goes to activations and to convolutions of this module alone, however it lies.
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
        """What the grids of this layer have to do with each other."""
        large, padding = tuple(input.shape[2:]), cast(Pair, self.padding)
        return Geometry(self.kernel_size, self.stride, padding, smaller(self, large), large)

    def by_products(self, input: Tensor, geometry: Geometry) -> Tensor:
        """Of what each point sees with the weights."""
        return _channels_first(See.apply(_channels_last(input), _channels_last(self.weight), geometry), self.bias)

    def abreast(self, input: Tensor, geometry: Geometry) -> Tensor:
        """By oneDNN, the batch a side of the grid."""
        return _abreast(self, input, geometry)

    def apart(self, input: Tensor, geometry: Geometry) -> Tensor:
        """As torch has it, but for its derivatives."""
        return _by(Apart, self, input, geometry)


class ConvTranspose2d(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d`.

    Attributes:
        among_layers: its output goes to activations and to convolutions of this module alone, however it lies.
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
        """As torch has it, but for a bias that is quicker to add apart."""
        if odd_pays(self, self.geometry(input).large):
            return with_bias_apart(F.conv_transpose2d, self, input)
        return super().forward(input)

    def geometry(self, input: Tensor) -> Geometry:
        """What the grids of this layer have to do with each other."""
        small, padding = tuple(input.shape[2:]), cast(Pair, self.padding)
        return Geometry(self.kernel_size, self.stride, padding, small, larger(self, small))

    def by_products(self, input: Tensor, geometry: Geometry) -> Tensor:
        """Of each point with the weights, laid over one another."""
        return _channels_first(Spread.apply(_channels_last(input), _channels_last(self.weight), geometry), self.bias)

    def by_overlay(self, input: Tensor, geometry: Geometry) -> Tensor:
        """Of each point with the weights, laid over one another, whose derivatives are torch's own."""
        return _by(Overlay, self, input, geometry)

    def by_sub_pixels(self, input: Tensor, geometry: Geometry) -> Tensor:
        """As a convolution of the smaller grid."""
        return _by(SubPixel, self, input, geometry)

    def abreast(self, input: Tensor, geometry: Geometry) -> Tensor:
        """By oneDNN, the batch a side of the grid."""
        return _abreast(self, input, geometry)

    def apart(self, input: Tensor, geometry: Geometry) -> Tensor:
        """As torch has it, but for its derivatives and for a bias that is quicker to add apart."""
        return _by(Apart, self, input, geometry)
