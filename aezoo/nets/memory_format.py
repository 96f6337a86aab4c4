"""Images with channels last in memory, also where they come from vectors or go to them.

A fit keeps images with channels last. A vector's numbers, and gradients of vectors, come as (C, H, W), and torch's
operations take ten times as long where their inputs are not in one order: a third of a step of the convolutional VAE
with one stage. To copy what comes is quicker. A graph plans its own memory.
"""

from typing import Any

import torch
from torch import Tensor, nn

from aezoo.nets import linear


class _InOrder(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous(memory_format=torch.channels_last)


def is_last(x: Tensor) -> bool:
    """Whether it is images of several channels that lie with these last."""
    return x.dim() == 4 and x.stride(1) == 1 < x.shape[1]


def in_order(x: Tensor) -> Tensor:
    """x, whose gradient will lie in memory as x does if that is with channels last."""
    if not (is_last(x) and x.requires_grad) or linear.in_graph() or linear.needs_torch(x):
        return x
    out: Tensor = _InOrder.apply(x)
    return out


def like(x: Tensor, other: Tensor) -> Tensor:
    """x, in memory as another tensor of its shape if that is images with channels last."""
    last = is_last(other) and not linear.in_graph()
    return x.contiguous(memory_format=torch.channels_last) if last else x


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
