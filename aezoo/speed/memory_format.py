"""Images with channels last in memory, also in combination with vectors and in likelihoods.

A fit keeps images with channels last. Values and gradients of vectors have layout (C, H, W), and torch's operations
take ten times as long if the layouts of their inputs differ: a third of a step of the convolutional VAE with one stage.
Copying is faster. A compiled graph chooses its layouts. Some layers use the batch-inner layout, see
`aezoo.speed.batch_inner_conv`; channels are last in it, too.
"""

from typing import Any

import torch
from torch import Tensor, nn

from aezoo.distributions import likelihoods
from aezoo.distributions.likelihoods import Likelihood
from aezoo.speed.linear import needs_torch_autograd
from aezoo.speed.swapping import Swapped
from aezoo.training.tracing import is_tracing


class _ConvertLayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch_inner: bool) -> Tensor:
        ctx.batch_inner = is_batch_inner(x)
        return to_layout(x, batch_inner)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return to_layout(gradients[0], ctx.batch_inner), None


def is_channels_last(x: Tensor) -> bool:
    """Whether x is images with several channels and with channels last in memory."""
    return x.dim() == 4 and x.stride(1) == 1 < x.shape[1]


def is_batch_inner(x: Tensor) -> bool:
    """Whether x is several images with memory layout (H, W, B, C)."""
    if x.dim() != 4 or len(x) < 2:
        return False
    b, c, _, w = x.shape
    return x.stride() == (c, 1, w * b * c, b * c)


def to_layout(x: Tensor, batch_inner: bool) -> Tensor:
    """Convert images to memory layout (H, W, B, C), or (B, H, W, C); no copy if they already have it."""
    if batch_inner:
        return x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    return x.contiguous(memory_format=torch.channels_last)


def as_base_tensor(x: Tensor) -> Tensor:
    """The same memory as a tensor that is not a view, for a rearranged result that may be changed in place."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def keep_grad_layout(x: Tensor) -> Tensor:
    """x, with a gradient in the layout of x if that is channels last."""
    if not (is_channels_last(x) and x.requires_grad) or is_tracing() or needs_torch_autograd(x):
        return x
    out: Tensor = _ConvertLayout.apply(x, is_batch_inner(x))
    return out


def convert_layout(x: Tensor, batch_inner: bool) -> Tensor:
    """Convert images to the other layout, as `to_layout` does; their gradient keeps the current layout."""
    if is_batch_inner(x) is batch_inner:
        return x
    out: Tensor = _ConvertLayout.apply(x, batch_inner)
    return out


def with_layout_of(x: Tensor, other: Tensor) -> Tensor:
    """x, in the layout of another tensor of its shape if that is images with channels last."""
    last = is_channels_last(other) and not is_tracing()
    return to_layout(x, is_batch_inner(other)) if last else x


class Flatten(Swapped, nn.Flatten):
    """`torch.nn.Flatten`."""

    plain = nn.Flatten

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C H W)."""
        return super().forward(keep_grad_layout(input))


class Unflatten(Swapped, nn.Unflatten):
    """`torch.nn.Unflatten`, with images in channels last."""

    plain = nn.Unflatten

    def forward(self, input: Tensor) -> Tensor:
        """(B, C H W) -> (B, C, H, W)."""
        x = super().forward(input)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and not is_tracing() else x


def to_channels_last(module: nn.Module) -> bool:
    """Give 2-D convolutions their faster memory layout, with the same values. Returns whether there are any."""
    if not any(isinstance(part, nn.Conv2d | nn.ConvTranspose2d) for part in module.modules()):
        return False
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
    return True


def to_channels_first(module: nn.Module) -> None:
    """Give weights torch's default memory layout again, with the same values."""
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload, unused-ignore]


class _InMemoryOrder:
    """Takes both as (B, H, W, C) if channels are last in the parameters: torch copies or is slow where layouts differ.

    A compiled graph chooses its layouts.
    """

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        if not is_tracing() and is_channels_last(params):
            params, x = params.permute(0, 2, 3, 1), with_layout_of(x, params).permute(0, 2, 3, 1)
        found: Tensor = super().log_prob(params, x)  # type: ignore[misc]
        return found


def _swapped(plain: type[Likelihood]) -> type[Swapped]:
    return type(plain.__name__, (Swapped, _InMemoryOrder, plain), {"plain": plain})


_PLAIN: tuple[type[Likelihood], ...] = (
    likelihoods.Bernoulli,
    likelihoods.ContinuousBernoulli,
    likelihoods.Gaussian,
    likelihoods.SigmoidGaussian,
    likelihoods.Laplace,
    likelihoods.LogCosh,
    likelihoods.DiscretisedLogistic,
    likelihoods.BetaBinomial,
    likelihoods.LogitLaplace,
)
# by the class that each replaces
LIKELIHOODS: dict[type[nn.Module], type[Swapped]] = {plain: _swapped(plain) for plain in _PLAIN}
