"""Predictions for a map from its known places: a masked convolution, and a network at each place.

Masked taps of the kernel are always 0, as in PixelCNN (van den Oord et al. 2016), https://arxiv.org/abs/1601.06759

Shapes: B batch, M channels of the map, S channels of side information.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.speed.linear import Linear

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


_MOST_REACH = 15


def taps(reach: int, rank: int) -> Tensor:
    """Offsets of the taps of a kernel, from -reach to reach along each axis: (rank, 2 reach + 1, ...).

    Raises:
        AezooError: a reach below 1, or above the width of any code.
    """
    if not 1 <= reach <= _MOST_REACH:
        raise AezooError(f"reach must be from 1 to {_MOST_REACH}, got {reach}")
    return torch.stack(torch.meshgrid(*[torch.arange(-reach, reach + 1)] * rank, indexing="ij"))


class Context(nn.Module):
    """Parameters of the distributions of a map's places, from known places and side information.

    Args:
        channels: M.
        besides: S.
        open_taps: which taps of the kernel are not masked, (2 reach + 1, ...), bool.
        numbers: P, parameters of the distribution of one channel: mean and raw scale.
    """

    open_taps: Tensor

    def __init__(self, channels: int, besides: int, open_taps: Tensor, numbers: int = 2) -> None:
        super().__init__()
        self.channels, self.reach = channels, open_taps.shape[0] // 2
        self.register_buffer("open_taps", open_taps, persistent=False)
        bound = (channels * max(1, int(open_taps.sum()))) ** -0.5
        self.weight = nn.Parameter(torch.empty(2 * channels, channels, *open_taps.shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(2 * channels))
        n_in, n_out = besides + 2 * channels, numbers * channels
        wide, less = n_in - (n_in - n_out) // 3, n_in - 2 * (n_in - n_out) // 3
        self.fuse = nn.Sequential(
            *(Linear(n_in, wide), nn.LeakyReLU(), Linear(wide, less), nn.LeakyReLU(), Linear(less, n_out))
        )

    def _holed(self) -> Tensor:
        return self.weight * self.open_taps

    def seen(self, y: Tensor) -> Tensor:
        """The context of every place: (B, M, *grid) -> (B, 2 M, *grid)."""
        return _CONV[self.open_taps.dim()](y.to(self.weight), self._holed(), self.bias, padding=self.reach)

    def seen_from(self, patch: Tensor) -> Tensor:
        """The context of one place, from the places around it: (B, M, 2 reach + 1, ...) -> (B, 2 M)."""
        return F.linear(patch.to(self.weight).flatten(1), self._holed().flatten(1), self.bias)

    def forward(self, besides: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        """P parameters of each distribution: (B, S, ...), (B, 2 M, ...) -> P times (B, M, ...)."""
        both = torch.cat([besides.to(self.weight), seen.to(self.weight)], 1).movedim(1, -1)
        found: Tensor = self.fuse(both).movedim(-1, 1)
        return found.split(self.channels, 1)
