"""torch's convolutions of images, with the same parameters and results, computed faster on a CPU.

In the following cases, another algorithm is faster than oneDNN as torch calls it. The factors are speed-ups.

- Small grids with many channels: matrix products; up to 5.6 times, in bfloat16 6.0 times with AMX and 4.6 times
  without.
- Transposed, to few channels: a sub-pixel convolution or overlapping products; up to 2.1 times.
- Transposed, to a larger grid: the gradient of the bias is a separate sum; up to 1.5 times.
- Transposed, to a grid that is not a whole number of strides, such as 7x7 from 4x4: a separate bias; up to 1.8 times,
  in bfloat16 6.6 times.
- bfloat16 weights without AMX: their gradient is a matrix product; up to 1.2 times for a strided layer, up to 2.2 times
  for a transposed one with its bias.
- An input that fills the caches: its gradient is computed after that of the weights, since it is needed next.
- Consecutive layers on a Zen 5: the batch is the innermost spatial dimension (`aezoo.speed.batch_inner_conv`).

`python -m benchmarks.convolutions` measures all of these. The rules come from measurements with one thread on three
processors, with and without AMX. Other devices, exported graphs and torch.func use torch's layers, and so do
compiled graphs, except for the bias of uneven grids.
"""

import math
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from aezoo.nets import narrow_conv
from aezoo.nets.conv_grids import larger_grid, smaller_grid
from aezoo.nets.narrow_conv import has_narrow_axis, in_float32, needs_float32
from aezoo.speed import batch_inner_conv, linear
from aezoo.speed.conv_products import (
    ConvForward,
    ConvInputGrad,
    Geometry,
    OverlapAdd,
    Pair,
    SeparateGradients,
    SubPixel,
    has_remainder,
)
from aezoo.speed.memory_format import convert_layout
from aezoo.speed.parts import is_enabled
from aezoo.speed.swapping import Swapped
from aezoo.training.tracing import is_tracing

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
# values per sample, over all channels, above which a separate bias is faster
_MANY = 256
# up to this many channels, the time of the sum for the bias does not matter
_FEW = 16
_FEW_IN_16_BITS = 4
# batch-inner layout: smallest number of samples, and the smaller one from this many (channels in x channels out) on;
# then smallest number of channels, and of multiplications
_MIN_SAMPLES, _MIN_SAMPLES_WIDE, _WIDE_CHANNELS = 64, 16, 32768
_MIN_CHANNELS, _MIN_PRODUCTS = 8, 2**21
# a batch of this many values fills the caches: then the result that is needed next is better computed last
_CACHE = 2**21


def _use_torch(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> bool:
    """Whether to use torch's layer: in exported graphs, on GPUs, for inductor (which makes slow loops of others)."""
    return is_tracing() or linear.needs_torch_autograd() or not _is_plain(layer, x)


def _is_plain(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> bool:
    """Whether torch accepts the input, and torch's layer is not needed."""
    # parametrised weights are read only once, because they may differ each time they are read
    if x.device.type != "cpu" or x.dim() != 4 or is_parametrized(layer):
        return False
    images = x.shape[1] == layer.in_channels and min(x.shape[2:]) > 0
    same = layer.weight.dtype == x.dtype or torch.is_autocast_enabled("cpu")
    numbers = not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    extra = all(n < s for n, s in zip(layer.output_padding, layer.stride, strict=True)) if layer.transposed else True
    return images and same and numbers and extra and layer.groups == 1 and layer.dilation == (1, 1)


def use_batch_inner(layer: "Conv2d | ConvTranspose2d", geometry: Geometry, x: Tensor) -> bool:
    """Whether the batch-inner layout is faster, for a layer between others that accept this layout."""
    if not (
        layer.feeds_convolutions
        and linear.MKL_HALF_WIDTH
        and torch.backends.mkldnn.enabled
        and batch_inner_conv.is_available()
    ):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layer.weight.dtype
    if x.dtype not in (torch.float32, dtype) or dtype not in (torch.float32, *[torch.bfloat16] * (not linear.HAS_AMX)):
        return False
    points, channels = math.prod(geometry.small), layer.in_channels * layer.out_channels
    long = len(x) >= (_MIN_SAMPLES_WIDE if channels >= _WIDE_CHANNELS else _MIN_SAMPLES)
    wide = min(layer.in_channels, layer.out_channels) >= _MIN_CHANNELS
    large = len(x) * points * channels * math.prod(geometry.kernel) >= _MIN_PRODUCTS
    strided = math.prod(geometry.stride) > 1 and math.prod(geometry.kernel) > 1 and points <= _POINTS
    sides = geometry.kernel, geometry.padding, geometry.small, geometry.large
    return long and wide and large and strided and not has_narrow_axis(*sides) and is_enabled("batch_inner")


def use_products(layer: nn.Conv2d | nn.ConvTranspose2d, small: Pair) -> bool:
    """Whether matrix products are faster, for a layer with this smaller grid."""
    points, channels = math.prod(small), layer.in_channels * layer.out_channels
    most, least = _POINTS, _CHANNELS * max(4, points)
    if not linear.HAS_AMX if _is_low_precision(layer) else linear.MKL_HALF_WIDTH:
        unstrided = points > 1 and math.prod(layer.stride) == 1
        most, least = _FEW_POINTS, _CHANNELS_UNSTRIDED if unstrided else least
    is_suitable = min(small) > 0 and points <= most and channels >= least and math.prod(layer.kernel_size) > 1
    return is_suitable and is_enabled("conv_products")


def use_weight_grad_product(layer: nn.Conv2d | nn.ConvTranspose2d, geometry: Geometry) -> bool:
    """Whether a matrix product is faster for the gradient of the weights, if it is not for the rest."""
    slow = torch.is_grad_enabled() and _is_low_precision(layer) and not linear.HAS_AMX
    enough = layer.in_channels * layer.out_channels >= 4 * _CHANNELS and math.prod(geometry.small) <= _POINTS
    strided = math.prod(layer.stride) > 1 and math.prod(layer.kernel_size) > 1
    return slow and enough and strided and is_enabled("conv_products")


def _has_few_channels(layer: nn.ConvTranspose2d, geometry: Geometry) -> bool:
    between = math.prod(layer.stride)
    few = 1 < between <= _BETWEEN // layer.out_channels
    # points outside do not depend on the smaller grid
    inside = all(extra <= p for extra, p in zip(layer.output_padding, geometry.padding, strict=True))
    return few and inside and math.prod(geometry.large) >= _LARGE


def use_sub_pixels(layer: nn.ConvTranspose2d, geometry: Geometry) -> bool:
    """Whether a sub-pixel convolution of the smaller grid is faster, for a layer with few channels."""
    return _has_few_channels(layer, geometry) and is_enabled("sub_pixel")


def use_overlap_add(layer: nn.ConvTranspose2d, geometry: Geometry) -> bool:
    """Whether overlapping products are faster, for a layer with one channel."""
    by_onednn = linear.MKL_HALF_WIDTH and layer.weight.dtype == torch.float32 and not _is_low_precision(layer)
    overlap = any(k > s for k, s in zip(geometry.kernel, geometry.stride, strict=True))
    is_suitable = by_onednn and layer.out_channels == 1 and overlap and _has_few_channels(layer, geometry)
    return is_suitable and is_enabled("overlap_add")


def use_separate_bias(layer: nn.ConvTranspose2d, geometry: Geometry) -> bool:
    """Whether a separate bias is faster in a transposed convolution, or in its backward pass."""
    lowered = _is_low_precision(layer)
    many = layer.out_channels > (_FEW_IN_16_BITS if lowered else _FEW)
    slow = torch.is_grad_enabled() and not (lowered and linear.HAS_AMX) and many
    backward = slow and math.prod(geometry.large) >= (_LARGE_IN_16_BITS if lowered else _LARGE)
    return layer.bias is not None and (backward or has_slow_bias(layer, geometry.large))


def has_slow_bias(layer: nn.ConvTranspose2d, large: Pair) -> bool:
    """Whether a bias is better added separately, for a layer with this larger grid, since oneDNN is slow to add it."""
    many = layer.out_channels * math.prod(large) >= _MANY
    return layer.bias is not None and many and has_remainder(large, layer.stride)


def use_separate_gradients(layer: nn.Conv2d | nn.ConvTranspose2d, geometry: Geometry, x: Tensor) -> bool:
    """Whether separate derivatives are faster."""
    if not is_enabled("separate_gradients"):
        return False
    if isinstance(layer, nn.ConvTranspose2d):
        return use_separate_bias(layer, geometry) or use_weight_grad_product(layer, geometry)
    sides = layer.in_channels * math.prod(geometry.large), layer.out_channels * math.prod(geometry.small)
    fills = len(x) * max(sides) >= _CACHE and torch.is_grad_enabled() and not _is_low_precision(layer)
    return fills or use_weight_grad_product(layer, geometry)


def _is_low_precision(layer: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    return layer.weight.itemsize == 2 or torch.is_autocast_enabled("cpu")


def _autocast(x: Tensor) -> Tensor:
    """The tensor in the dtype that autocast gives convolutions."""
    lowers = torch.is_autocast_enabled("cpu") and x.dtype == torch.float32
    return x.to(torch.get_autocast_dtype("cpu")) if lowers else x


def _channels_last(x: Tensor) -> Tensor:
    return _autocast(x).permute(0, 2, 3, 1)


def _channels_first(out: Tensor, bias: Tensor | None) -> Tensor:
    """Permute, with the bias added before: autograd would copy a view."""
    return (out if bias is None else out.add_(bias)).permute(0, 3, 1, 2)


def _apply(
    way: type[torch.autograd.Function],
    layer: nn.Conv2d | nn.ConvTranspose2d,
    x: Tensor,
    geometry: Geometry,
    weight_by_product: bool | None = None,
) -> Tensor:
    bias = None if layer.bias is None else _autocast(layer.bias)
    weight_by_product = use_weight_grad_product(layer, geometry) if weight_by_product is None else weight_by_product
    out: Tensor = way.apply(_autocast(x), _autocast(layer.weight), bias, geometry, weight_by_product, layer.transposed)
    return out


def _with_batch_inner(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor, geometry: Geometry) -> Tensor:
    x, weight_by_product = _autocast(x), use_products(layer, geometry.small)
    # the gradient of the weights then also needs x in this layout
    x = convert_layout(x, batch_inner=True) if x.itemsize == 2 and not weight_by_product else x
    return _apply(batch_inner_conv.BatchInnerConv, layer, x, geometry, weight_by_product)


class Conv2d(Swapped, nn.Conv2d):
    """`torch.nn.Conv2d`.

    Attributes:
        feeds_convolutions: its output goes only to activations and to convolutions of this module, which accept any
            memory layout.
    """

    plain: ClassVar[type[nn.Module]] = nn.Conv2d
    settings = ("feeds_convolutions",)
    feeds_convolutions = False

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out channels, h, w)."""
        geometry = None if _use_torch(self, input) else self.geometry(input)
        if geometry:
            if use_batch_inner(self, geometry, input):
                return self.with_batch_inner(input, geometry)
            input = convert_layout(input, batch_inner=False)
        if geometry and use_products(self, geometry.small):
            return self.with_products(input, geometry)
        if needs_float32(self, input):
            return in_float32(F.conv2d, self, input)
        if geometry and use_separate_gradients(self, geometry, input):
            return self.with_separate_gradients(input, geometry)
        return super().forward(input)

    def geometry(self, input: Tensor) -> Geometry:
        """How the grids of this layer are related."""
        large, padding = tuple(input.shape[2:]), cast(Pair, self.padding)
        return Geometry(self.kernel_size, self.stride, padding, smaller_grid(self, large), large)

    def with_products(self, input: Tensor, geometry: Geometry) -> Tensor:
        """Products of the weights with the values in the window of each point."""
        return _channels_first(
            ConvForward.apply(_channels_last(input), _channels_last(self.weight), geometry), self.bias
        )

    def with_batch_inner(self, input: Tensor, geometry: Geometry) -> Tensor:
        """By oneDNN, with the batch as a side of the grid."""
        return _with_batch_inner(self, input, geometry)

    def with_separate_gradients(self, input: Tensor, geometry: Geometry) -> Tensor:
        """The result of torch's own layer, with separate derivatives."""
        return _apply(SeparateGradients, self, input, geometry)


class ConvTranspose2d(Swapped, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d`.

    Attributes:
        feeds_convolutions: its output goes only to activations and to convolutions of this module, which accept any
            memory layout.
    """

    plain: ClassVar[type[nn.Module]] = nn.ConvTranspose2d
    settings = ("feeds_convolutions",)
    feeds_convolutions = False

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, h, w) -> (B, out channels, H, W)."""
        if output_size is not None:
            return super().forward(input, output_size)
        geometry = None if _use_torch(self, input) else self.geometry(input)
        if geometry and min(geometry.large) < 1:
            return super().forward(input)  # which refuses it
        if geometry:
            if use_batch_inner(self, geometry, input):
                return self.with_batch_inner(input, geometry)
            input = convert_layout(input, batch_inner=False)
        if geometry and use_products(self, geometry.small):
            return self.with_products(input, geometry)
        if needs_float32(self, input):
            return in_float32(F.conv_transpose2d, self, input)
        if geometry is None:
            inductors = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
            return self._compiled(input) if inductors and _is_plain(self, input) else super().forward(input)
        if use_overlap_add(self, geometry):
            return self.with_overlap_add(input, geometry)
        if use_sub_pixels(self, geometry):
            return self.with_sub_pixels(input, geometry)
        if use_separate_gradients(self, geometry, input):
            return self.with_separate_gradients(input, geometry)
        return super().forward(input)

    def _compiled(self, input: Tensor) -> Tensor:
        """The result of torch's layer, with a separate bias if that is faster."""
        if has_slow_bias(self, self.geometry(input).large):
            padding = cast(Pair, self.padding)
            out = F.conv_transpose2d(input, self.weight, None, self.stride, padding, self.output_padding)
            assert self.bias is not None
            return out + self.bias.to(out.dtype)[:, None, None]
        return super().forward(input)

    def geometry(self, input: Tensor) -> Geometry:
        """How the grids of this layer are related."""
        small, padding = tuple(input.shape[2:]), cast(Pair, self.padding)
        return Geometry(self.kernel_size, self.stride, padding, small, larger_grid(self, small))

    def with_products(self, input: Tensor, geometry: Geometry) -> Tensor:
        """Products of each point with the weights, overlaid."""
        return _channels_first(
            ConvInputGrad.apply(_channels_last(input), _channels_last(self.weight), geometry), self.bias
        )

    def with_overlap_add(self, input: Tensor, geometry: Geometry) -> Tensor:
        """Products of each point with the weights, added where they overlap, with torch's derivatives."""
        return _apply(OverlapAdd, self, input, geometry)

    def with_sub_pixels(self, input: Tensor, geometry: Geometry) -> Tensor:
        """As a convolution on the smaller grid."""
        return _apply(SubPixel, self, input, geometry)

    def with_batch_inner(self, input: Tensor, geometry: Geometry) -> Tensor:
        """By oneDNN, with the batch as a side of the grid."""
        return _with_batch_inner(self, input, geometry)

    def with_separate_gradients(self, input: Tensor, geometry: Geometry) -> Tensor:
        """The result of torch's layer, with separate derivatives and, if that is faster, a separate bias."""
        return _apply(SeparateGradients, self, input, geometry)


class NarrowConv2d(Conv2d):
    """`aezoo.nets.narrow_conv.Conv2d`."""

    plain = narrow_conv.Conv2d


class NarrowConvTranspose2d(ConvTranspose2d):
    """`aezoo.nets.narrow_conv.ConvTranspose2d`."""

    plain = narrow_conv.ConvTranspose2d
