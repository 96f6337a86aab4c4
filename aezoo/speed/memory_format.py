"""Images with channels last in memory, also in combination with vectors.

A fit keeps images with channels last. Values and gradients of vectors have layout (C, H, W), and torch's operations
take ten times as long if the layouts of their inputs differ: a third of a step of the convolutional VAE with one stage.
Copying is faster. A compiled graph plans its own memory. Some layers use the abreast layout, see
`aezoo.speed.batch_inner_conv`; channels are last in it, too.
"""

from typing import Any

import torch
from torch import Tensor, nn

from aezoo.speed import linear


class _Laid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, abreast: bool) -> Tensor:
        ctx.abreast = is_abreast(x)
        return lay(x, abreast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return lay(gradients[0], ctx.abreast), None


def is_last(x: Tensor) -> bool:
    """Whether x is images with several channels and with channels last in memory."""
    return x.dim() == 4 and x.stride(1) == 1 < x.shape[1]


def is_abreast(x: Tensor) -> bool:
    """Whether x is several images with memory layout (H, W, B, C)."""
    if x.dim() != 4 or len(x) < 2:
        return False
    b, c, _, w = x.shape
    return x.stride() == (c, 1, w * b * c, b * c)


def lay(x: Tensor, abreast: bool) -> Tensor:
    """Convert images to memory layout (H, W, B, C), or (B, H, W, C); no copy if they already have it."""
    if abreast:
        return x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    return x.contiguous(memory_format=torch.channels_last)


def as_base_tensor(x: Tensor) -> Tensor:
    """The same memory as a tensor that is not a view, for a rearranged result that may be changed in place."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def in_order(x: Tensor) -> Tensor:
    """x, with a gradient in the layout of x if that is channels last."""
    if not (is_last(x) and x.requires_grad) or linear.in_graph() or linear.needs_torch(x):
        return x
    out: Tensor = _Laid.apply(x, is_abreast(x))
    return out


def laid(x: Tensor, abreast: bool) -> Tensor:
    """Convert images to the other layout, as `lay` does; their gradient keeps the current layout."""
    if is_abreast(x) is abreast:
        return x
    out: Tensor = _Laid.apply(x, abreast)
    return out


def like(x: Tensor, other: Tensor) -> Tensor:
    """x, in the layout of another tensor of its shape if that is images with channels last."""
    last = is_last(other) and not linear.in_graph()
    return lay(x, is_abreast(other)) if last else x


class Flatten(nn.Flatten):
    """`torch.nn.Flatten`."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C H W)."""
        return super().forward(in_order(input))


class ChannelsLast(nn.Module):
    """The identity; converts images to channels last if the model's images have them.

    Attributes:
        on: whether they have, set by `aezoo.training.compilation.to_channels_last`.
    """

    on = False

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        images = self.on and x.dim() == 4 and not linear.in_graph()
        return x.contiguous(memory_format=torch.channels_last) if images else x
