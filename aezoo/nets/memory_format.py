"""Images with channels last in memory, also where they come from vectors or go to them.

A fit keeps images with channels last. A vector's numbers, and gradients of vectors, come as (C, H, W), and torch's
operations take ten times as long where their inputs are not in one order: a third of a step of the convolutional VAE
with one stage. To copy what comes is quicker. A graph plans its own memory. Some layers have the samples abreast, see
`aezoo.nets.abreast`: channels are last then, too.
"""

from typing import Any

import torch
from torch import Tensor, nn

from aezoo.nets import linear


class _Laid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, abreast: bool) -> Tensor:
        ctx.abreast = is_abreast(x)
        return lay(x, abreast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return lay(gradients[0], ctx.abreast), None


def is_last(x: Tensor) -> bool:
    """Whether it is images of several channels that lie with these last."""
    return x.dim() == 4 and x.stride(1) == 1 < x.shape[1]


def is_abreast(x: Tensor) -> bool:
    """Whether it is several images that lie as (H, W, B, C)."""
    if x.dim() != 4 or len(x) < 2:
        return False
    b, c, _, w = x.shape
    return x.stride() == (c, 1, w * b * c, b * c)


def lay(x: Tensor, abreast: bool) -> Tensor:
    """Images as (H, W, B, C) in memory, or as (B, H, W, C): themselves if they lie so."""
    if abreast:
        return x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    return x.contiguous(memory_format=torch.channels_last)


def nobodys_view(x: Tensor) -> Tensor:
    """The same memory as a tensor of its own, for an operator's result that is arranged anew and may be changed."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def in_order(x: Tensor) -> Tensor:
    """x, whose gradient will lie in memory as x does if that is with channels last."""
    if not (is_last(x) and x.requires_grad) or linear.in_graph() or linear.needs_torch(x):
        return x
    out: Tensor = _Laid.apply(x, is_abreast(x))
    return out


def laid(x: Tensor, abreast: bool) -> Tensor:
    """Images as `lay` has them, that lie the other way now; their gradient will lie as they do now."""
    if is_abreast(x) is abreast:
        return x
    out: Tensor = _Laid.apply(x, abreast)
    return out


def like(x: Tensor, other: Tensor) -> Tensor:
    """x, in memory as another tensor of its shape if that is images with channels last."""
    last = is_last(other) and not linear.in_graph()
    return lay(x, is_abreast(other)) if last else x


class Flatten(nn.Flatten):
    """`torch.nn.Flatten`."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C H W)."""
        return super().forward(in_order(input))


class ChannelsLast(nn.Module):
    """What it is given; if that is images and the model's lie in memory with channels last, as those.

    Attributes:
        on: whether they do, which `aezoo.acceleration.to_channels_last` sets.
    """

    on = False

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        images = self.on and x.dim() == 4 and not linear.in_graph()
        return x.contiguous(memory_format=torch.channels_last) if images else x
