"""Convolutions of images on a CPU by other means than a convolution, for layers on which oneDNN is slow.

`see` is the convolution from a larger grid x (B, H, W, C) to a smaller one y (B, h, w, O), `spread` its transpose from
y to x, `weigh` the gradient of <y, see(x)> with respect to the weights (O, rows, columns, C): channels come last, as
products of matrices want them. Each is linear in both of its arguments, and each a derivative of the other two.

Of float32 the image itself is multiplied, a row of the kernel at a time: nothing is copied, and no zeros beyond its
border are multiplied, which are 11 of 36 where a kernel of 3x3 sees 4x4 points with stride 2. Numbers of 16 bits, and
oneDNN where it is the faster one (`aezoo.nets.linear`), want products so large that copying patches, zeros and all, is
the faster way; and numbers of 16 bits want sums of more bits than they have.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from aezoo.nets import linear

Pair = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Which points of the larger grid a point of the smaller one sees: rows, then columns."""

    kernel: Pair
    stride: Pair
    padding: Pair
    small: Pair
    large: Pair

    def beyond(self) -> Pair:
        """How far the last point of the smaller grid sees beyond the larger one, less than nothing if it does not."""
        parts = zip(self.kernel, self.stride, self.padding, self.small, self.large, strict=True)
        return tuple((n - 1) * s + k - p - m for k, s, p, n, m in parts)

    def output_padding(self) -> Pair:
        """As a transposed convolution has it."""
        return tuple(p - n for p, n in zip(self.padding, self.beyond(), strict=True))

    def borders(self) -> tuple[int, ...]:
        """Points to add around the larger grid, as `F.pad` takes them: none for channels, last axis first."""
        (top, left), (bottom, right) = self.padding, self.beyond()
        return 0, 0, left, right, top, bottom


def see(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(B, H, W, C), (O, rows, columns, C) -> (B, h, w, O)."""
    if copies(x, geometry):
        return _times(patches(x, geometry).flatten(3), weight.flatten(1))
    y = x.new_zeros(len(x), *geometry.small, len(weight))
    for seen, part, out in factors(x, weight, y, geometry):
        torch.addmm(out, seen, part.t(), out=out)
    return y


def spread(y: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(B, h, w, O), (O, rows, columns, C) -> (B, H, W, C)."""
    if copies(y, geometry):
        return overlaid(_times(y, weight.flatten(1).t()).unflatten(3, weight.shape[1:]), geometry)
    x = y.new_zeros(len(y), *geometry.large, weight.shape[3])
    for seen, part, out in factors(x, weight, y, geometry):
        torch.addmm(seen, out, part, out=seen)
    return x


def weigh(x: Tensor, y: Tensor, geometry: Geometry) -> Tensor:
    """(B, H, W, C), (B, h, w, O) -> (O, rows, columns, C)."""
    shape = (y.shape[3], *geometry.kernel, x.shape[3])
    if copies(x, geometry):
        return _times(y.flatten(0, 2).t(), patches(x, geometry).flatten(0, 2).flatten(1).t()).view(shape)
    weight = x.new_zeros(shape)
    for seen, part, out in factors(x, weight, y, geometry):
        torch.addmm(part, out.t(), seen, out=part)
    return weight


def copies(x: Tensor, geometry: Geometry) -> bool:
    """Whether patches are copied; for one point nine in ten of their numbers may lie beyond the border."""
    by_onednn = linear.HALVED and x.dtype == torch.float32 and math.prod(geometry.small) > 1
    return x.itemsize == 2 or by_onednn


def _times(a: Tensor, b: Tensor) -> Tensor:
    # autocast would lower float32 here, which convolutions have been told of before
    return linear.product(a, b) if a.dtype == torch.float32 else a @ b.t()


def factors(x: Tensor, weight: Tensor, y: Tensor, geometry: Geometry) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views of all three such that y is the sum of the products x weight^T.

    For a row of the kernel and a column of y: (points, columns C) of x, (O, columns C) of the weights, (points, O) of
    y. Points are those of the whole batch where their distance in memory is the same throughout, else a row's.
    """
    (rows, columns), (down, right), (top, left) = geometry.kernel, geometry.stride, geometry.padding
    (h, w), (height, width) = geometry.small, geometry.large
    for i, j in itertools.product(range(rows), range(w)):
        # what of the kernel's columns lies on the image, and for which rows of y its row does
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


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """What each point of the smaller grid sees, zeros beyond the border: (B, H, W, C) -> (B, h, w, *kernel, C)."""
    (rows, columns), (down, right) = geometry.kernel, geometry.stride
    seen = F.pad(x, geometry.borders()).unfold(1, rows, down).unfold(2, columns, right)
    return seen.permute(0, 1, 2, 4, 5, 3).contiguous()


def overlaid(seen: Tensor, geometry: Geometry) -> Tensor:
    """The transpose of `patches`, which adds up where they overlap: (B, h, w, *kernel, C) -> (B, H, W, C)."""
    (h, w), (rows, columns), (down, right) = geometry.small, geometry.kernel, geometry.stride
    x = seen.new_zeros(len(seen), (h - 1) * down + rows, (w - 1) * right + columns, seen.shape[-1])
    for i, j in itertools.product(range(rows), range(columns)):
        x[:, i : i + h * down : down, j : j + w * right : right] += seen[:, :, :, i, j]
    return F.pad(x, [-n for n in geometry.borders()]).contiguous()


class _Bilinear(torch.autograd.Function):
    """Keeps what its derivatives take.

    Attributes:
        by_torch: the same values by torch's own convolutions.
    """

    by_torch: ClassVar[Callable[..., Tensor]]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        (a, b, ctx.geometry), (of_a, of_b, _) = inputs, ctx.needs_input_grad
        ctx.save_for_backward(a if of_b else None, b if of_a else None)

    @classmethod
    def of(cls, a: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
        """The values, with derivatives of any order; by torch where only its operators have their rules."""
        if linear.needs_torch(a, b):
            return cls.by_torch(a, b, geometry)
        out: Tensor = cls.apply(a, b, geometry)
        return out


class See(_Bilinear):
    """`see`, with derivatives of any order."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        """The convolution."""
        return see(x.contiguous(), weight.contiguous(), geometry)

    @staticmethod
    def by_torch(a: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
        """The convolution."""
        return _channels_last(F.conv2d(_channels_first(a), _channels_first(b), None, geometry.stride, geometry.padding))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With respect to x and to the weights."""
        (x, weight), (of_x, of_weight, _) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            Spread.of(gradients[0], weight, ctx.geometry) if of_x else None,
            Weigh.of(x, gradients[0], ctx.geometry) if of_weight else None,
            None,
        )


class Spread(_Bilinear):
    """`spread`, with derivatives of any order."""

    @staticmethod
    def forward(y: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        """The transposed convolution."""
        return spread(y.contiguous(), weight.contiguous(), geometry)

    @staticmethod
    def by_torch(a: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
        """The transposed convolution."""
        y, weight, extra = _channels_first(a), _channels_first(b), geometry.output_padding()
        return _channels_last(F.conv_transpose2d(y, weight, None, geometry.stride, geometry.padding, extra))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With respect to y and to the weights."""
        (y, weight), (of_y, of_weight, _) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            See.of(gradients[0], weight, ctx.geometry) if of_y else None,
            Weigh.of(gradients[0], y, ctx.geometry) if of_weight else None,
            None,
        )


class Weigh(_Bilinear):
    """`weigh`, with derivatives of any order."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, geometry: Geometry) -> Tensor:
        """The gradient of the weights."""
        return weigh(x.contiguous(), y.contiguous(), geometry)

    @staticmethod
    def by_torch(a: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
        """The gradient of the weights."""
        x, y = _channels_first(a), _channels_first(b)
        shape = (y.shape[1], x.shape[1], *geometry.kernel)
        return _channels_last(conv2d_weight(x, shape, y, geometry.stride, geometry.padding))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With respect to x and to y."""
        (x, y), (of_x, of_y, _) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            Spread.of(y, gradients[0], ctx.geometry) if of_x else None,
            See.of(x, gradients[0], ctx.geometry) if of_y else None,
            None,
        )


def _channels_first(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), as torch has them."""
    return x.permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


class _Transposed(torch.autograd.Function):
    """(B, O, h, w), (O, C, rows, columns), (C,) -> (B, C, H, W), as torch has them; its derivatives but the bias's."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what the derivatives take."""
        y, weight, _, ctx.geometry = inputs
        ctx.save_for_backward(y, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With respect to y, to the weights and to the bias."""
        g, (y, weight), (of_y, of_weight, of_bias, _) = gradients[0], ctx.saved_tensors, ctx.needs_input_grad
        stride, padding, extra = ctx.geometry.stride, ctx.geometry.padding, ctx.geometry.output_padding()
        y_and_weight = torch.ops.aten.convolution_backward(
            g, y, weight, None, stride, padding, (1, 1), True, extra, 1, (of_y, of_weight, False)
        )[:2]
        return *y_and_weight, g.sum((0, 2, 3)) if of_bias else None, None


class BiasApart(_Transposed):
    """A transposed convolution."""

    @staticmethod
    def forward(y: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """The values."""
        return F.conv_transpose2d(y, weight, bias, geometry.stride, geometry.padding, geometry.output_padding())


class SubPixel(_Transposed):
    """A transposed convolution as one from the smaller grid, with a channel for each point between its points.

    Shi et al. 2016, https://arxiv.org/abs/1609.07009.
    """

    @staticmethod
    def forward(y: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """The values."""
        (top, left), (down, right) = geometry.padding, geometry.stride
        # zeros, with which the kernel is a whole number of strides, and what padding takes off as well
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
        return x[:, :height, :width].contiguous().permute(0, 3, 1, 2)
