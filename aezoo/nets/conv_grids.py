"""Sizes of the larger and the smaller grid of a convolution, in any number of dimensions."""

from collections.abc import Iterable
from typing import Any


def smaller_grid(layer: Any, large: Iterable[int]) -> tuple[int, ...]:
    """Return the output grid of a convolution for an input grid."""
    sides = zip(large, layer.padding, kernel_extents(layer), layer.stride, strict=True)
    return tuple((n + 2 * p - k) // s + 1 for n, p, k, s in sides)


def larger_grid(layer: Any, small: Iterable[int]) -> tuple[int, ...]:
    """Return the output grid of a transposed convolution for an input grid."""
    sides = zip(
        small, layer.stride, layer.padding, layer.dilation, layer.kernel_size, layer.output_padding, strict=True
    )
    return tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 + extra for n, s, p, d, k, extra in sides)


def kernel_extents(layer: Any) -> tuple[int, ...]:
    """Return how many points a kernel spans along each axis, from its first tap to its last."""
    return tuple(d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
