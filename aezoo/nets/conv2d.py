"""torch's convolutions of images, with the same parameters and results, computed as a CPU does it faster.

Where a grid is small and the channels are many, oneDNN takes up to three times as long as a product of two matrices of
the same size, and six times in bfloat16: patches of the image, a row each, times the weights. And on a larger grid up
to half of a transposed convolution's time goes into the gradient of its bias, which is added apart here. `python -m
benchmarks.convolutions` measures both. On other devices, and in compiled or exported graphs, all is torch's own.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# a layer's smaller grid has no more points than this, and channels in times channels out are so many a point
_POINTS = 16
_CHANNELS = 2048

Pair = tuple[int, ...]


# no tuple, since torch.func would look for tensors in it
@dataclass(frozen=True)
class Geometry:
    """Which points of the larger grid a point of the smaller one sees: rows, then columns."""

    kernel: Pair
    stride: Pair
    padding: Pair
    small: Pair
    large: Pair

    def borders(self) -> tuple[int, ...]:
        """Points to add around the larger grid, as `F.pad` takes them: none for channels, last axis first."""
        sides = [0, 0]
        parts = (self.kernel, self.stride, self.padding, self.small, self.large)
        for k, s, p, n, m in zip(*(part[::-1] for part in parts), strict=True):
            sides += [p, (n - 1) * s + k - p - m]
        return tuple(sides)


class Patches(torch.autograd.Function):
    """What each point of the smaller grid sees, zeros beyond the border: (B, H, W, C) -> (B, h, w, *kernel, C).

    Linear, and so its own derivative.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, geometry: Geometry) -> Tensor:
        """Copy."""
        (rows, columns), (down, right) = geometry.kernel, geometry.stride
        seen = F.pad(x, geometry.borders()).unfold(1, rows, down).unfold(2, columns, right)
        return seen.permute(0, 1, 2, 4, 5, 3).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the geometry."""
        ctx.geometry = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The transpose."""
        return Overlay.apply(gradients[0], ctx.geometry), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """The same map."""
        return Patches.apply(tangents[0], ctx.geometry)


class Overlay(torch.autograd.Function):
    """The transpose of `Patches`, which adds them up where they overlap: (B, h, w, *kernel, C) -> (B, H, W, C)."""

    generate_vmap_rule = True
    setup_context = Patches.setup_context

    @staticmethod
    def forward(seen: Tensor, geometry: Geometry) -> Tensor:
        """Add."""
        (h, w), (rows, columns), (down, right) = geometry.small, geometry.kernel, geometry.stride
        x = seen.new_zeros(len(seen), (h - 1) * down + rows, (w - 1) * right + columns, seen.shape[-1])
        for i in range(rows):
            for j in range(columns):
                x[:, i : i + h * down : down, j : j + w * right : right] += seen[:, :, :, i, j]
        return F.pad(x, [-n for n in geometry.borders()])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The transpose."""
        return Patches.apply(gradients[0], ctx.geometry), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """The same map."""
        return Overlay.apply(tangents[0], ctx.geometry)


def _is_torchs(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> bool:
    """A graph for elsewhere should say convolution, of patches inductor makes slow loops, and GPUs have their own."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    images = x.dim() == 4 and x.shape[1] == layer.in_channels
    numbers = not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    plain = numbers and layer.groups == 1 and layer.dilation == (1, 1)
    return traced or not (x.is_cpu and images and plain)


def products_pay(layer: nn.Conv2d | nn.ConvTranspose2d, small: Pair) -> bool:
    """Whether matrix products are the faster way, for a layer whose smaller grid is this."""
    points, channels = math.prod(small), layer.in_channels * layer.out_channels
    enough = channels >= _CHANNELS * max(4, points) and math.prod(layer.kernel_size) > 1
    return min(small) > 0 and points <= _POINTS and enough


def _lowered(x: Tensor) -> Tensor:
    """As autocast has it for products, before patches are copied."""
    lowers = torch.is_autocast_enabled("cpu") and x.dtype == torch.float32
    return x.to(torch.get_autocast_dtype("cpu")) if lowers else x


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out channels, h, w)."""
        if not _is_torchs(self, input):
            geometry = self.geometry(input)
            if products_pay(self, geometry.small):
                return self.by_products(input, geometry)
        return super().forward(input)

    def geometry(self, input: Tensor) -> Geometry:
        """What the grids of this layer have to do with each other."""
        large, padding = tuple(input.shape[2:]), cast(Pair, self.padding)
        sizes = zip(large, padding, self.kernel_size, self.stride, strict=True)
        small = tuple((n + 2 * p - k) // s + 1 for n, p, k, s in sizes)
        return Geometry(self.kernel_size, self.stride, padding, small, large)

    def by_products(self, input: Tensor, geometry: Geometry) -> Tensor:
        """Patches times weights."""
        seen = Patches.apply(_lowered(input).permute(0, 2, 3, 1), geometry)
        return F.linear(seen.flatten(3), self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)


class ConvTranspose2d(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d`."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, h, w) -> (B, out channels, H, W)."""
        if _is_torchs(self, input) or output_size is not None:
            return super().forward(input, output_size)
        if products_pay(self, tuple(input.shape[2:])):
            return self.by_products(input, self.geometry(input))
        if self.bias is not None and torch.is_grad_enabled():
            return self.with_bias_apart(input)
        return super().forward(input)

    def geometry(self, input: Tensor) -> Geometry:
        """What the grids of this layer have to do with each other."""
        small, padding = tuple(input.shape[2:]), cast(Pair, self.padding)
        sizes = zip(small, self.stride, padding, self.kernel_size, self.output_padding, strict=True)
        large = tuple((n - 1) * s - 2 * p + k + extra for n, s, p, k, extra in sizes)
        return Geometry(self.kernel_size, self.stride, padding, small, large)

    def by_products(self, input: Tensor, geometry: Geometry) -> Tensor:
        """Weights times inputs, laid over one another."""
        seen = _lowered(input).permute(0, 2, 3, 1) @ self.weight.permute(0, 2, 3, 1).flatten(1)
        out = Overlay.apply(seen.unflatten(3, (*self.kernel_size, self.out_channels)), geometry)
        # before it is a view, which autograd would copy
        return (out if self.bias is None else out.add_(self.bias)).permute(0, 3, 1, 2)

    def with_bias_apart(self, input: Tensor) -> Tensor:
        """As torch has it, but for the bias."""
        padding = cast(Pair, self.padding)
        out = F.conv_transpose2d(input, self.weight, None, self.stride, padding, self.output_padding)
        return out if self.bias is None else out.add_(self.bias[:, None, None])
