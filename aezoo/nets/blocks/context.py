"""Prediction of a map from its known positions by a masked convolution and a network at each position.

Masked taps of the kernel are always 0, as in PixelCNN (van den Oord et al. 2016), https://arxiv.org/abs/1601.06759

Shapes: B batch, M channels of the map, S channels of side information.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.errors import AezooError

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


_MAX_REACH = 15


def tap_offsets(reach: int, rank: int) -> Tensor:
    """Return the offsets of a kernel's taps, from -reach to reach along each axis: (rank, 2 reach + 1, ...).

    Raises:
        AezooError: the reach is below 1 or above the width of any code.
    """
    if not 1 <= reach <= _MAX_REACH:
        raise AezooError(f"reach must be from 1 to {_MAX_REACH}, got {reach}")
    return torch.stack(torch.meshgrid(*[torch.arange(-reach, reach + 1)] * rank, indexing="ij"))


class Context(nn.Module):
    """Computes the distribution at each position of a map from known positions and side information.

    Args:
        channels: M.
        side_channels: S.
        kernel_mask: which taps of the kernel are not masked, (2 reach + 1, ...), bool.
        n_params: P, number of parameters per channel: mean and raw scale.
    """

    kernel_mask: Tensor

    def __init__(self, channels: int, side_channels: int, kernel_mask: Tensor, n_params: int = 2) -> None:
        super().__init__()
        self.channels, self.reach = channels, kernel_mask.shape[0] // 2
        self.register_buffer("kernel_mask", kernel_mask, persistent=False)
        bound = (channels * max(1, int(kernel_mask.sum()))) ** -0.5
        self.weight = nn.Parameter(torch.empty(2 * channels, channels, *kernel_mask.shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(2 * channels))
        n_in, n_out = side_channels + 2 * channels, n_params * channels
        wide, narrow = n_in - (n_in - n_out) // 3, n_in - 2 * (n_in - n_out) // 3
        self.fuse = nn.Sequential(
            *(nn.Linear(n_in, wide), nn.LeakyReLU(), nn.Linear(wide, narrow), nn.LeakyReLU(), nn.Linear(narrow, n_out))
        )

    def _masked_weight(self) -> Tensor:
        return self.weight * self.kernel_mask

    def masked_conv(self, y: Tensor) -> Tensor:
        """Return the context of every position: (B, M, *grid) -> (B, 2 M, *grid)."""
        return _CONV[self.kernel_mask.dim()](y.to(self.weight), self._masked_weight(), self.bias, padding=self.reach)

    def masked_conv_at(self, patch: Tensor) -> Tensor:
        """Return the context of one position from the positions around it: (B, M, 2 reach + 1, ...) -> (B, 2 M)."""
        return F.linear(patch.to(self.weight).flatten(1), self._masked_weight().flatten(1), self.bias)

    def forward(self, side: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """Return P parameters of each distribution: (B, S, ...), (B, 2 M, ...) -> P times (B, M, ...)."""
        joined = torch.cat([side.to(self.weight), context.to(self.weight)], 1).movedim(1, -1)
        params: Tensor = self.fuse(joined).movedim(-1, 1)
        return params.split(self.channels, 1)
