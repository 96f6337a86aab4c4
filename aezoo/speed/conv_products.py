"""Convolutions of images on a CPU by matrix products, for layers on which oneDNN's convolutions are slow.

`conv_forward` is the convolution from a larger grid x (B, H, W, C) to a smaller one y (B, h, w, O), `conv_input_grad`
its transpose from y to x, and `conv_weight_grad` the gradient of <y, conv_forward(x)> with respect to the weights
(O, rows, columns, C). Channels come last, as matrix products need them. Each is linear in both of its arguments, and
each is a derivative of the other two.

There are three algorithms; `choose_algorithm` selects the fastest on the processor. `direct_products` multiplies the
image itself, one kernel row at a time, without copies. `im2col` copies the windows of all points for a single product,
with the zeros beyond the border, which are 11 of 36 for a 3x3 kernel on 4x4 points with stride 2. `block_products`
copies everything but the zeros, for a few products. Sums of 16-bit numbers need more bits than these have, so each
value of a point and each gradient of a weight comes from a single product.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from aezoo.speed import linear
from aezoo.speed.memory_format import as_base_tensor

Pair = tuple[int, ...]
# taps, points, and the values that these taps multiply at these points
Block = tuple[slice, slice, slice]
Grouping = Literal["taps", "points"]
# `block_products` is faster for at most this many points and, if more than one, this many products per point and tap
_FEW_POINTS = 16
_LARGE = 2**21


@dataclass(frozen=True)
class Geometry:
    """Which points of the larger grid are in the window of a point of the smaller one: rows, then columns."""

    kernel: Pair
    stride: Pair
    padding: Pair
    small: Pair
    large: Pair

    def overhang(self) -> Pair:
        """How far the window of the last point of the smaller grid is beyond the larger one; negative if within."""
        parts = zip(self.kernel, self.stride, self.padding, self.small, self.large, strict=True)
        return tuple((n - 1) * s + k - p - m for k, s, p, n, m in parts)

    def output_padding(self) -> Pair:
        """The output padding of the transposed convolution."""
        return tuple(p - n for p, n in zip(self.padding, self.overhang(), strict=True))

    def pad_sizes(self) -> tuple[int, ...]:
        """Points to add around the larger grid, as `F.pad` takes them: none for channels, last axis first."""
        (top, left), (bottom, right) = self.padding, self.overhang()
        return 0, 0, left, right, top, bottom


def has_remainder(grid: Pair, stride: Pair) -> bool:
    """Whether a grid is not a whole number of strides."""
    return any(n % s for n, s in zip(grid, stride, strict=True))


def conv_forward(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(B, H, W, C), (O, rows, columns, C) -> (B, h, w, O)."""
    algorithm = choose_algorithm(x, weight, geometry)
    if algorithm == "im2col":
        return _matmul(im2col(x, geometry).flatten(3), weight.flatten(1))
    y = x.new_zeros(len(x), *geometry.small, len(weight))
    if algorithm == "blocks":
        for seen, part, out in block_products(x, weight, y, geometry, "points"):
            out.copy_(_matmul(_flatten_grid(seen), _as_matrix(part)).view_as(out))
    else:
        for seen, part, out in direct_products(x, weight, y, geometry):
            torch.addmm(out, seen, part.t(), out=out)
    return y


def conv_input_grad(y: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(B, h, w, O), (O, rows, columns, C) -> (B, H, W, C)."""
    algorithm = choose_algorithm(y, weight, geometry)
    if algorithm == "im2col":
        return col2im(_matmul(y, weight.flatten(1).t()).unflatten(3, weight.shape[1:]), geometry)
    x = y.new_zeros(len(y), *geometry.large, weight.shape[3])
    if algorithm == "blocks":
        for seen, part, out in block_products(x, weight, y, geometry, "taps"):
            seen += _matmul(_flatten_grid(out), _as_matrix(part).t()).view_as(seen)
    else:
        for seen, part, out in direct_products(x, weight, y, geometry):
            torch.addmm(seen, out, part, out=seen)
    return x


def conv_weight_grad(x: Tensor, y: Tensor, geometry: Geometry) -> Tensor:
    """(B, H, W, C), (B, h, w, O) -> (O, rows, columns, C)."""
    weight = x.new_empty(y.shape[3], *geometry.kernel, x.shape[3])
    algorithm = choose_algorithm(x, weight, geometry)
    if algorithm == "im2col":
        return _matmul(y.flatten(0, 2).t(), im2col(x, geometry).flatten(0, 2).flatten(1).t()).view_as(weight)
    if algorithm == "direct" or not all_taps_used(geometry):
        weight.zero_()
    if algorithm == "blocks":
        for seen, part, out in block_products(x, weight, y, geometry, "taps"):
            part.copy_(_matmul(_flatten_grid(out).t(), _flatten_grid(seen).t()).view_as(part))
    else:
        for seen, part, out in direct_products(x, weight, y, geometry):
            torch.addmm(part, out.t(), seen, out=part)
    return weight


def choose_algorithm(x: Tensor, weight: Tensor, geometry: Geometry) -> Literal["direct", "blocks", "im2col"]:
    """The fastest method for a product of either grid with the weights."""
    by_onednn = x.itemsize == 2 or (linear.MKL_HALF_WIDTH and x.dtype == torch.float32)
    # oneDNN cannot multiply empty matrices
    if not by_onednn or x.numel() == 0:
        return "direct"
    points, (out, *_, channels) = math.prod(geometry.small), weight.shape
    large = points == 1 or len(x) * out * channels >= _LARGE
    return "blocks" if large and points <= _FEW_POINTS and not linear.HAS_AMX else "im2col"


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    # autocast would lower float32 here, although the convolution has already handled it
    return linear.onednn_linear(a, b) if a.dtype == torch.float32 else a @ b.t()


def _flatten_grid(x: Tensor) -> Tensor:
    """(B, h, w, ...) -> (B h w, ...)."""
    return _as_matrix(x.flatten(0, 2))


def _as_matrix(x: Tensor) -> Tensor:
    """A contiguous matrix; transposing a matrix with gaps takes longer than copying all of it."""
    return x.flatten(1).contiguous()


def direct_products(
    x: Tensor, weight: Tensor, y: Tensor, geometry: Geometry
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views of all three such that y is the sum of the products x weight^T.

    For a kernel row and a column of y: (points, columns C) of x, (O, columns C) of the weights, (points, O) of y. The
    points are those of the whole batch if their distance in memory is constant, otherwise those of one row.
    """
    (rows, columns), (down, right), (top, left) = geometry.kernel, geometry.stride, geometry.padding
    (h, w), (height, width) = geometry.small, geometry.large
    for i, j in itertools.product(range(rows), range(w)):
        # the kernel columns that lie on the image, and the rows of y for which the kernel row does
        first, last = max(0, left - j * right), min(columns, width + left - j * right)
        begin, end = max(0, -((i - top) // down)), min(h, (height - 1 + top - i) // down + 1)
        n = end - begin
        if first >= last or n <= 0:
            continue
        row, column = begin * down + i - top, j * right - left
        seen = x[:, row : row + (n - 1) * down + 1 : down, column + first : column + last].flatten(2)
        part, out = weight[:, i, first:last].flatten(1), y[:, begin:end, j]
        if all(view.stride(0) == n * view.stride(1) for view in (seen, out)):
            yield seen.flatten(0, 1), part, out.flatten(0, 1)
        else:
            for of_x, of_y in zip(seen.unbind(1), out.unbind(1), strict=True):
                yield of_x, part, of_y


def block_products(
    x: Tensor, weight: Tensor, y: Tensor, geometry: Geometry, group_by: Grouping
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views of all three such that y is the sum of the products, with nothing beyond the border.

    (B, h, w, rows, columns, C) of x, (O, rows, columns, C) of the weights, (B, h, w, O) of y. A part contains either
    all points that use the same taps of the kernel, or all taps that the same points use; in the second case, no part
    contains an element of x twice.
    """
    (of_rows, of_columns), (down, right) = _blocks(geometry, group_by), geometry.stride
    for (rows, i, high), (columns, j, wide) in itertools.product(of_rows, of_columns):
        seen = x[:, high, wide].unfold(1, rows.stop - rows.start, down).unfold(2, columns.stop - columns.start, right)
        yield seen.permute(0, 1, 2, 4, 5, 3), weight[:, rows, columns], y[:, i, j]


@functools.cache
def _blocks(geometry: Geometry, group_by: Grouping) -> tuple[list[Block], ...]:
    """The blocks of rows, then those of columns."""
    sides = zip(geometry.kernel, geometry.stride, geometry.padding, geometry.small, geometry.large, strict=True)
    return tuple([*_along(*side, group_by)] for side in sides)


def all_taps_used(geometry: Geometry) -> bool:
    """Whether each tap of the kernel multiplies a point of the larger grid."""
    sides = zip(_blocks(geometry, "taps"), geometry.kernel, strict=True)
    return all(sum(taps.stop - taps.start for taps, *_ in blocks) == kernel for blocks, kernel in sides)


def _along(kernel: int, stride: int, padding: int, small: int, large: int, group_by: Grouping) -> Iterator[Block]:
    """Taps, points, and the values that these taps multiply at these points, along one axis."""

    def taps(point: int) -> slice:
        return slice(max(0, padding - point * stride), min(kernel, padding - point * stride + large))

    def points(tap: int) -> slice:
        return slice(max(0, -((tap - padding) // stride)), min(small, (large - 1 + padding - tap) // stride + 1))

    n, others, most = (small, taps, small) if group_by == "points" else (kernel, points, stride)
    for within, group in itertools.groupby(range(n), others):
        run = [*group] if within.start < within.stop else []
        for first in run[::most]:
            some = slice(first, min(first + most, run[-1] + 1))
            tap, point = (within, some) if group_by == "points" else (some, within)
            start = point.start * stride + tap.start - padding
            yield tap, point, slice(start, (point.stop - 1) * stride + tap.stop - padding)


def im2col(x: Tensor, geometry: Geometry) -> Tensor:
    """The window of each point of the smaller grid, zero beyond the border: (B, H, W, C) -> (B, h, w, *kernel, C)."""
    (rows, columns), (down, right) = geometry.kernel, geometry.stride
    seen = F.pad(x, geometry.pad_sizes()).unfold(1, rows, down).unfold(2, columns, right)
    return seen.permute(0, 1, 2, 4, 5, 3).contiguous()


def col2im(seen: Tensor, geometry: Geometry) -> Tensor:
    """The transpose of `im2col`, which sums overlapping values: (B, h, w, *kernel, C) -> (B, H, W, C)."""
    (h, w), (rows, columns), (down, right) = geometry.small, geometry.kernel, geometry.stride
    x = seen.new_zeros(len(seen), (h - 1) * down + rows, (w - 1) * right + columns, seen.shape[-1])
    for i, j in itertools.product(range(rows), range(columns)):
        x[:, i : i + h * down : down, j : j + w * right : right] += seen[:, :, :, i, j]
    return F.pad(x, [-n for n in geometry.pad_sizes()]).contiguous()


def to_layout_of_input(gradient: Tensor, ctx: Any) -> Tensor:
    """Give a gradient the layout of its input: torch's activations take ten times as long with mixed layouts."""
    return channels_last(channels_first(gradient).contiguous()) if ctx.channels_first else gradient


class _Bilinear(torch.autograd.Function):
    """Saves what its derivatives need.

    Attributes:
        torch_reference: computes the same values by torch's convolutions.
    """

    torch_reference: ClassVar[Callable[..., Tensor]]

    @staticmethod
    def save(ctx: Any, a: Tensor, b: Tensor, geometry: Geometry) -> None:
        """Save tensors for the derivatives; torch requires Python's signature if this is a separate step."""
        of_a, of_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(a if of_b else None, b if of_a else None)
        ctx.geometry = geometry
        ctx.channels_first = not a.is_contiguous() and channels_first(a).is_contiguous()

    @classmethod
    def apply_or_torch(cls, a: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
        """The values, with derivatives of any order; by torch if only torch's operators support them."""
        if linear.needs_torch_autograd(a, b):
            return cls.torch_reference(a, b, geometry)
        out: Tensor = cls.apply(a, b, geometry)
        return out


class ConvForward(_Bilinear):
    """`conv_forward`, with derivatives of any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        """The convolution."""
        ConvForward.save(ctx, x, weight, geometry)
        return conv_forward(x.contiguous(), weight.contiguous(), geometry)

    @staticmethod
    def torch_reference(a: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
        """The convolution."""
        return channels_last(F.conv2d(channels_first(a), channels_first(b), None, geometry.stride, geometry.padding))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients with respect to x and to the weights."""
        (x, weight), (of_x, of_weight, _) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            to_layout_of_input(ConvInputGrad.apply_or_torch(gradients[0], weight, ctx.geometry), ctx) if of_x else None,
            ConvWeightGrad.apply_or_torch(x, gradients[0], ctx.geometry) if of_weight else None,
            None,
        )


class ConvInputGrad(_Bilinear):
    """`conv_input_grad`, with derivatives of any order."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        """The transposed convolution."""
        ConvInputGrad.save(ctx, y, weight, geometry)
        return conv_input_grad(y.contiguous(), weight.contiguous(), geometry)

    @staticmethod
    def torch_reference(a: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
        """The transposed convolution."""
        y, weight, extra = channels_first(a), channels_first(b), geometry.output_padding()
        return channels_last(F.conv_transpose2d(y, weight, None, geometry.stride, geometry.padding, extra))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients with respect to y and to the weights."""
        (y, weight), (of_y, of_weight, _) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            to_layout_of_input(ConvForward.apply_or_torch(gradients[0], weight, ctx.geometry), ctx) if of_y else None,
            ConvWeightGrad.apply_or_torch(gradients[0], y, ctx.geometry) if of_weight else None,
            None,
        )


class ConvWeightGrad(_Bilinear):
    """`conv_weight_grad`, with derivatives of any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, geometry: Geometry) -> Tensor:
        """The gradient of the weights."""
        ConvWeightGrad.save(ctx, x, y, geometry)
        return conv_weight_grad(x.contiguous(), y.contiguous(), geometry)

    @staticmethod
    def torch_reference(a: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
        """The gradient of the weights."""
        x, y = channels_first(a), channels_first(b)
        shape = (y.shape[1], x.shape[1], *geometry.kernel)
        return channels_last(conv2d_weight(x, shape, y, geometry.stride, geometry.padding))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients with respect to x and to y."""
        (x, y), (of_x, of_y, _) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            ConvInputGrad.apply_or_torch(y, gradients[0], ctx.geometry) if of_x else None,
            ConvForward.apply_or_torch(x, gradients[0], ctx.geometry) if of_y else None,
            None,
        )


def channels_first(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), torch's order."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def _channels_first_copy(x: Tensor) -> Tensor:
    """`channels_first` of a tensor that nothing else uses, contiguous."""
    return as_base_tensor(channels_first(x.contiguous()))


class Convolution(torch.autograd.Function):
    """With a bias, and in torch's layout: grids (B, C, H, W) and (B, O, h, w), weights (O, C, rows, columns)."""

    @staticmethod
    def save(
        ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry, weight_by_product: bool, transposed: bool
    ) -> None:
        """Save what the derivatives need."""
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.weight_by_product, ctx.transposed = geometry, weight_by_product, transposed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients with respect to the input, the weights (by `conv_weight_grad` if requested) and the bias."""
        g, (x, weight), (of_x, of_weight, of_bias, *_) = gradients[0], ctx.saved_tensors, ctx.needs_input_grad
        by_bias = g.sum((0, 2, 3)) if of_bias else None
        # the gradient that is needed next is computed last, so it is still in the cache
        by_weight = Convolution.weight_gradient(ctx, g, x, weight) if of_weight else None
        by_x = Convolution.torch_reference(ctx, g, x, weight, (True, False, False))[0] if of_x else None
        return by_x, by_weight, by_bias, None, None, None

    @staticmethod
    def weight_gradient(ctx: Any, g: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
        """The gradient with respect to the weights, channels last."""
        if not ctx.weight_by_product:
            return Convolution.torch_reference(ctx, g, x, weight, (False, True, False))[1]
        large, small = (g, x) if ctx.transposed else (x, g)
        return channels_first(ConvWeightGrad.apply_or_torch(channels_last(large), channels_last(small), ctx.geometry))

    @staticmethod
    def torch_reference(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, output_mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        """The requested derivatives."""
        extra = ctx.geometry.output_padding() if ctx.transposed else (0, 0)
        settings = ctx.geometry.stride, ctx.geometry.padding, (1, 1), ctx.transposed, extra, 1
        found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
            g, x, weight, None, *settings, output_mask
        )
        return found


class SeparateGradients(Convolution):
    """A convolution, transposed or not, whose derivatives are computed separately."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        weight_by_product: bool,
        transposed: bool,
    ) -> Tensor:
        """The values; oneDNN adds a bias value by value if the larger grid is not a whole number of strides."""
        Convolution.save(ctx, x, weight, geometry, weight_by_product, transposed)
        if not transposed:
            return F.conv2d(x, weight, bias, geometry.stride, geometry.padding)
        within = None if has_remainder(geometry.large, geometry.stride) else bias
        extra = geometry.output_padding()
        out = F.conv_transpose2d(x, weight, within, geometry.stride, geometry.padding, extra)
        return out if bias is None or within is not None else out.add_(bias[:, None, None])


class OverlapAdd(Convolution):
    """A transposed convolution: products of each point with the weights, summed where they overlap."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        weight_by_product: bool,
        transposed: bool,
    ) -> Tensor:
        """The values."""
        Convolution.save(ctx, y, weight, geometry, weight_by_product, transposed)
        x = conv_input_grad(channels_last(y).contiguous(), channels_last(weight).contiguous(), geometry)
        return _channels_first_copy(x if bias is None else x.add_(bias))


class SubPixel(Convolution):
    """A transposed convolution as a convolution on the smaller grid, with a channel for each point between its points.

    Shi et al. 2016, https://arxiv.org/abs/1609.07009.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        weight_by_product: bool,
        transposed: bool,
    ) -> Tensor:
        """The values."""
        Convolution.save(ctx, y, weight, geometry, weight_by_product, transposed)
        (top, left), (down, right) = geometry.padding, geometry.stride
        # zeros that make the kernel a whole number of strides, and what padding removes as well
        above, before = -top % down, -left % right
        rows, columns = (
            -(-(k + m) // s) for k, m, s in zip(geometry.kernel, (above, before), geometry.stride, strict=True)
        )
        k, m = geometry.kernel
        taps = F.pad(weight, (before, columns * right - m - before, above, rows * down - k - above))
        taps = taps.unflatten(3, (columns, right)).unflatten(2, (rows, down)).flip(2, 4)
        taps = taps.permute(3, 5, 1, 0, 2, 4).flatten(0, 2).contiguous(memory_format=torch.channels_last)
        offset = None if bias is None else bias.repeat(down * right)
        x = F.conv2d(y, taps, offset, padding=(rows - 1, columns - 1)).permute(0, 2, 3, 1)
        i, j = (top + above) // down, (left + before) // right
        height, width = geometry.large
        x = x[:, i : i - (-height // down), j : j - (-width // right)]
        x = x.unflatten(3, (down, right, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return _channels_first_copy(x[:, :height, :width])
