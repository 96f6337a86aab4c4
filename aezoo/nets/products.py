"""Convolutions of images on a CPU by other means than a convolution, for layers on which oneDNN is slow.

`see` is the convolution from a larger grid x (B, H, W, C) to a smaller one y (B, h, w, O), `spread` its transpose from
y to x, `weigh` the gradient of <y, see(x)> with respect to the weights (O, rows, columns, C): channels come last, as
products of matrices want them. Each is linear in both of its arguments, and each a derivative of the other two.

Of float32 the image itself is multiplied, a row of the kernel at a time: nothing is copied, and no zeros beyond its
border are multiplied, which are 11 of 36 where a kernel of 3x3 sees 4x4 points with stride 2. oneDNN, where it is the
faster one (`aezoo.nets.linear`), wants larger products: what a point sees, as long as there are few points. Of more
points, and of 16 bits, copying all patches for one product, zeros and all, is the faster way; and numbers of 16 bits
want sums of more bits than they have.
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
from aezoo.nets.transposed import leaves_rest

Pair = tuple[int, ...]
# by oneDNN one product for each point, if there are no more than this
_FEW_POINTS = 4


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
    if _by_onednn(x):
        for seen, part, out in points(x, weight, y, geometry):
            out.copy_(linear.product(_flat(seen), _flat(part)))
        return y
    for seen, part, out in factors(x, weight, y, geometry):
        torch.addmm(out, seen, part.t(), out=out)
    return y


def spread(y: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(B, h, w, O), (O, rows, columns, C) -> (B, H, W, C)."""
    if copies(y, geometry):
        return overlaid(_times(y, weight.flatten(1).t()).unflatten(3, weight.shape[1:]), geometry)
    x = y.new_zeros(len(y), *geometry.large, weight.shape[3])
    if _by_onednn(y):
        for seen, part, out in points(x, weight, y, geometry):
            seen += linear.product(out, _flat(part).t()).view_as(seen)
        return x
    for seen, part, out in factors(x, weight, y, geometry):
        torch.addmm(seen, out, part, out=seen)
    return x


def weigh(x: Tensor, y: Tensor, geometry: Geometry) -> Tensor:
    """(B, H, W, C), (B, h, w, O) -> (O, rows, columns, C)."""
    shape = (y.shape[3], *geometry.kernel, x.shape[3])
    if copies(x, geometry):
        return _times(y.flatten(0, 2).t(), patches(x, geometry).flatten(0, 2).flatten(1).t()).view(shape)
    weight = x.new_zeros(shape)
    if _by_onednn(x):
        for seen, part, out in points(x, weight, y, geometry):
            part += linear.product(_flat(out).t(), _flat(seen).t()).view_as(part)
        return weight
    for seen, part, out in factors(x, weight, y, geometry):
        torch.addmm(part, out.t(), seen, out=part)
    return weight


def copies(x: Tensor, geometry: Geometry) -> bool:
    """Whether patches are copied, of which half may lie beyond the border where there are few."""
    return x.itemsize == 2 or (_by_onednn(x) and math.prod(geometry.small) > _FEW_POINTS)


def _by_onednn(x: Tensor) -> bool:
    """Not of nothing, of which oneDNN makes no product."""
    return linear.HALVED and x.dtype == torch.float32 and x.numel() > 0


def _times(a: Tensor, b: Tensor) -> Tensor:
    # autocast would lower float32 here, which convolutions have been told of before
    return linear.product(a, b) if a.dtype == torch.float32 else a @ b.t()


def _flat(x: Tensor) -> Tensor:
    """A matrix without gaps, which take longer to transpose than all of it to copy."""
    return x.flatten(1).contiguous()


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


def points(x: Tensor, weight: Tensor, y: Tensor, geometry: Geometry) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views of all three, for each point: (B, rows, columns, C) that it sees, (O, rows, columns, C), its own (B, O)."""
    sides = [*zip(geometry.stride, geometry.padding, geometry.kernel, geometry.large, strict=True)]

    def seen(at: int, axis: int) -> tuple[slice, slice]:
        s, p, k, n = sides[axis]
        first, last = max(0, p - at * s), min(k, p - at * s + n)
        return slice(at * s - p + first, at * s - p + last), slice(first, last)

    h, w = geometry.small
    for i, j in itertools.product(range(h), range(w)):
        (down, rows), (right, columns) = seen(i, 0), seen(j, 1)
        if rows.start < rows.stop and columns.start < columns.stop:
            yield x[:, down, right], weight[:, rows, columns], y[:, i, j]


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
        ctx.channels_first = not a.is_contiguous() and _channels_first(a).is_contiguous()

    @staticmethod
    def lie(gradient: Tensor, ctx: Any) -> Tensor:
        """In memory as what it is the gradient of: of two orders torch's activations take ten times as long."""
        return _channels_last(_channels_first(gradient).contiguous()) if ctx.channels_first else gradient

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
            See.lie(Spread.of(gradients[0], weight, ctx.geometry), ctx) if of_x else None,
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
            Spread.lie(See.of(gradients[0], weight, ctx.geometry), ctx) if of_y else None,
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


def _own(x: Tensor) -> Tensor:
    """`_channels_first` of a copy: nobody's view, so that it may be changed in place."""
    b, h, w, c = x.shape
    out = torch.empty(b, c, h, w, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _channels_last(out).copy_(x)
    return out


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
        """The values; oneDNN adds a bias number by number to a grid that is no whole number of strides."""
        within = None if leaves_rest(geometry.large, geometry.stride) else bias
        extra = geometry.output_padding()
        x = F.conv_transpose2d(y, weight, within, geometry.stride, geometry.padding, extra)
        return x if bias is None or within is not None else x.add_(bias[:, None, None])


class Overlay(_Transposed):
    """A transposed convolution as products of each point with the weights, laid over one another."""

    @staticmethod
    def forward(y: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """The values."""
        x = spread(_channels_last(y).contiguous(), _channels_last(weight).contiguous(), geometry)
        return _own(x if bias is None else x.add_(bias))


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
        return _own(x[:, :height, :width])
