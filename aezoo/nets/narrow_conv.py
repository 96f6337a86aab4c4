"""torch's convolutions, correct also where oneDNN is wrong in 16 bits with AVX-512 (torch 2.13).

On a small grid, if a kernel column never overlaps the image at any point, its gradient is uninitialised memory: numbers
of any size and NaN. If the smaller grid is one point wide, the values are sometimes wrong in the same way. In three
dimensions, the error also occurs along other axes, with any stride, and memory is overwritten. An encoder has such
layers if it has further stages after its grid is 1x1. These layers are computed in float32 until the minimum required
version of torch computes them correctly: `tests/nets/test_narrow_conv.py` compares both with float64.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.nets.conv_grids import kernel_extents, larger_grid, smaller_grid
from aezoo.training.tracing import is_exporting


def needs_float32(layer: Any, x: Tensor) -> bool:
    """Return whether the result of a layer, transposed or not, would be wrong for this input."""
    if is_exporting():
        return False
    rank = len(layer.stride)
    if isinstance(layer.padding, str) or x.dim() != rank + 2:
        return False
    grid = tuple(x.shape[2:])
    small, large = (grid, larger_grid(layer, grid)) if layer.transposed else (smaller_grid(layer, grid), grid)
    # images and sequences are affected only along their last axis, and only with strides
    first = 0 if rank == 3 else rank - 1
    if not has_narrow_axis(*(sides[first:] for sides in (kernel_extents(layer), layer.padding, small, large))):
        return False
    low_precision = x.device.type == "cpu" and (x.itemsize == 2 or torch.is_autocast_enabled("cpu"))
    return low_precision and (rank == 3 or layer.stride[-1] > 1)


def has_narrow_axis(*sides: tuple[int, ...]) -> bool:
    """Return whether a layer is affected along any axis; arguments: kernel, padding, smaller and larger grid."""
    return any(_is_narrow(*axis) for axis in zip(*sides, strict=True))


def _is_narrow(kernel: int, padding: int, small: int, large: int) -> bool:
    """Return whether the smaller grid is one point wide, or a kernel tap is outside of the image at all points."""
    # with less padding, every tap overlaps the image at some point, unless the kernel is larger than the grid
    return small == 1 or large < kernel or 2 * padding > kernel


def in_float32(convolve: Callable[..., Tensor], layer: Any, x: Tensor) -> Tensor:
    """Compute the output of a layer in float32 by the given function of torch.nn.functional."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    settings = [layer.stride, layer.padding, layer.dilation, layer.groups]
    if layer.transposed:
        settings = [layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation]
    with torch.autocast("cpu", enabled=False):
        bias = None if layer.bias is None else layer.bias.float()
        return convolve(x.float(), layer.weight.float(), bias, *settings).to(dtype)


class Conv1d(nn.Conv1d):
    """`torch.nn.Conv1d`."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, L) -> (B, out channels, l)."""
        return in_float32(F.conv1d, self, input) if needs_float32(self, input) else super().forward(input)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out channels, h, w)."""
        return in_float32(F.conv2d, self, input) if needs_float32(self, input) else super().forward(input)


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d`."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, out channels, d, h, w)."""
        return in_float32(F.conv3d, self, input) if needs_float32(self, input) else super().forward(input)


class ConvTranspose1d(nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d`."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, l) -> (B, out channels, L)."""
        if output_size is None and needs_float32(self, input):
            return in_float32(F.conv_transpose1d, self, input)
        return super().forward(input, output_size)


class ConvTranspose2d(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d`."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, h, w) -> (B, out channels, H, W)."""
        if output_size is None and needs_float32(self, input):
            return in_float32(F.conv_transpose2d, self, input)
        return super().forward(input, output_size)


class ConvTranspose3d(nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d`."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, d, h, w) -> (B, out channels, D, H, W)."""
        if output_size is None and needs_float32(self, input):
            return in_float32(F.conv_transpose3d, self, input)
        return super().forward(input, output_size)
