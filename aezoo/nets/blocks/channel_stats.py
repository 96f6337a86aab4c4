"""Running mean and standard deviation of each channel of a code, for models trained on codes."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from aezoo.training.precision import buffers_kept_in_float32


class Standardiser(nn.Module):
    """Scales codes so that channels have mean 0 and standard deviation 1, and back, (B, C, *grid) -> (B, C, *grid).

    Both moments are over a batch's samples and grid. In the first steps they are plain means over the steps, later
    moving averages. They stay float32 in a bf16 model, where a step below 1/256 of the value would have no effect.

    Attributes:
        mean_C: mean of each channel, 0 before training.
        std_C: standard deviation of each channel, 1 before training.
        count: number of batches so far, ().

    Args:
        channels: C.
        decay: decay rate of the moving averages.
    """

    mean_C: Tensor
    std_C: Tensor
    count: Tensor

    def __init__(self, channels: int, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean_C", torch.zeros(channels))
        self.register_buffer("std_C", torch.ones(channels))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def observe(self, z: Tensor, batch_mean: Callable[[Tensor], Tensor]) -> None:
        """Update the statistics with the codes of a training step.

        Args:
            z: (B, C, *grid), in at least float32.
            batch_mean: computes the mean over all samples of a batch, on all ranks, (B, C) -> (C,).
        """
        z = z.flatten(2)
        mean_C = batch_mean(z.mean(2))
        var_C = batch_mean((z - mean_C[:, None]).square().mean(2))
        rate = (1 / self.count.add_(1).to(z)).clamp(min=1 - self.decay)
        off_C = mean_C - self.mean_C
        # the variance of a mixture of the earlier samples and this batch
        var_C = (1 - rate) * self.std_C**2 + rate * (var_C + (1 - rate) * off_C**2)
        self.mean_C.add_((rate * off_C).to(self.mean_C))
        self.std_C.copy_(var_C.clamp(min=1e-12).sqrt())  # equal codes have no variance

    def forward(self, z: Tensor) -> Tensor:
        """Return standardised codes."""
        return ((z - _over_grid(self.mean_C, z)) / _over_grid(self.std_C, z)).to(z)

    def restore(self, z: Tensor) -> Tensor:
        """Invert `forward`."""
        return (z * _over_grid(self.std_C, z) + _over_grid(self.mean_C, z)).to(z)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        with buffers_kept_in_float32(self, ("mean_C", "std_C")):
            super()._apply(fn, recurse)
        return self


def _over_grid(values_C: Tensor, z: Tensor) -> Tensor:
    return values_C.view(-1, *[1] * (z.ndim - 2))
