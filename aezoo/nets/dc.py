"""Stages of the deep compression autoencoder DC-AE (Chen et al. 2024), https://arxiv.org/abs/2410.10733

An encoder stage is a convolution followed by a space-to-channels operation, in cells of two points per side; a decoder
stage is a convolution followed by a channels-to-space operation. Each has a parallel shortcut without parameters, in
R = 1, 2 or 3 dimensions:

    encoder: average(unshuffle(x))     decoder: shuffle(duplicate(x))

If there are too many channels, groups of adjacent channels are averaged; if there are too few, channels are duplicated;
if neither number is a multiple of the other, both happen. So a stage only learns what a rearrangement of values cannot
represent: with hidden_dims 2^R C, 4^R C, ... for data of C channels, the shortcuts restore every value without the
convolutions. A code that is a map also has a shortcut parallel to its 1x1 convolution. Unlike in the authors' networks,
the outermost stage also has a shortcut.

A residual block follows each encoder stage and precedes each decoder stage; in the paper, the blocks on small grids
have linear attention instead. In the encoder, the last point of an odd side is repeated; in the decoder, the additional
point is cut off.

Shapes: B batch, C channels.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.nets.build import activation
from aezoo.nets.conv import CONVS, grids, head, map_shape, rank_of
from aezoo.nets.resnet import ResidualBlock, default_hidden_dims

__all__ = ["Decoder", "Encoder", "default_hidden_dims", "map_shape"]


def unshuffle(x: Tensor) -> Tensor:
    """Space to channels: (B, C, *even grid) -> (B, 2^R C, *half the grid); the values of a cell are consecutive."""
    rank = x.dim() - 2
    if rank == 2:
        return F.pixel_unshuffle(x, 2)
    cells = x.reshape(*x.shape[:2], *(n for side in x.shape[2:] for n in (side // 2, 2)))
    axes = range(2, 2 + 2 * rank, 2)
    return cells.permute(0, 1, *(axis + 1 for axis in axes), *axes).flatten(1, 1 + rank)


def shuffle(x: Tensor) -> Tensor:
    """Channels to space, the inverse of `unshuffle`: (B, 2^R C, *grid) -> (B, C, *twice the grid)."""
    rank = x.dim() - 2
    if rank == 2:
        return F.pixel_shuffle(x, 2)
    cells = x.unflatten(1, (-1, *[2] * rank))
    order = (axis for i in range(2, 2 + rank) for axis in (i + rank, i))
    return cells.permute(0, 1, *order).reshape(len(x), -1, *(2 * side for side in x.shape[2:]))


def match_channels(x: Tensor, channels: int) -> Tensor:
    """Average groups of channels, or duplicate each channel: (B, C, *grid) -> (B, channels, *grid)."""
    n = x.shape[1]
    both = math.lcm(n, channels)
    x = x.repeat_interleave(both // n, 1) if both > n else x
    return x.unflatten(1, (channels, -1)).mean(2) if both > channels else x


class _Down(nn.Module):
    def __init__(self, rank: int, before: int, after: int) -> None:
        super().__init__()
        self.after = after
        self.conv = CONVS[rank](before, math.ceil(after / 2**rank), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for axis, side in enumerate(x.shape[2:], start=2):
            if side % 2:
                x = torch.cat([x, x.narrow(axis, side - 1, 1)], axis)
        # if a cell has more values than there are channels, only the first values are kept
        return unshuffle(self.conv(x)).narrow(1, 0, self.after) + match_channels(unshuffle(x), self.after)


class _Up(nn.Module):
    def __init__(self, rank: int, before: int, after: int, larger: tuple[int, ...], act: str) -> None:
        super().__init__()
        self.act, self.channels = activation(act), 2**rank * after
        self.conv = CONVS[rank](before, self.channels, 3, padding=1)
        self.cut = [axis for axis, side in enumerate(larger, start=2) if side % 2]

    def forward(self, x: Tensor) -> Tensor:
        x = shuffle(self.conv(self.act(x)) + match_channels(x, self.channels))
        for axis in self.cut:
            x = x.narrow(axis, 0, x.shape[axis] - 1)
        return x


class Encoder(nn.Module):
    """(B, C, *grid) -> (B, *code_shape); `hidden_dims` are the channels of the stages, which halve the grid."""

    def __init__(
        self, input_shape: tuple[int, ...], code_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        super().__init__()
        rank = rank_of(input_shape)
        widths = (input_shape[0], *hidden_dims)
        self.stages = nn.Sequential(
            *(part for a, b in pairwise(widths) for part in (_Down(rank, a, b), ResidualBlock(rank, b, act)))
        )
        self.act = activation(act)
        self.channels = code_shape[0] if len(code_shape) > 1 else 0
        self.head = head(code_shape, (widths[-1], *grids(input_shape, len(hidden_dims))[-1]), rank)[0]

    def forward(self, x: Tensor) -> Tensor:
        h = self.stages(x)
        code: Tensor = self.head(self.act(h))
        return code + match_channels(h, self.channels) if self.channels else code


class Decoder(nn.Module):
    """(B, *code_shape) -> (B, C, *grid); `hidden_dims` from the smallest map to the largest."""

    def __init__(
        self, code_shape: tuple[int, ...], input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        super().__init__()
        rank = rank_of(input_shape)
        sizes = grids(input_shape, len(hidden_dims))[::-1]
        widths = (*hidden_dims, input_shape[0])
        self.channels = widths[0] if len(code_shape) > 1 else 0
        self.head = head(code_shape, (widths[0], *sizes[0]), rank)[1]
        layers: list[nn.Module] = []
        for i, larger in enumerate(sizes[1:]):
            layers += [ResidualBlock(rank, widths[i], act), _Up(rank, widths[i], widths[i + 1], larger, act)]
        self.stages = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        h = self.head(z)
        x_hat: Tensor = self.stages(h + match_channels(z, self.channels) if self.channels else h)
        return x_hat
