"""Residual stages: each is a stride-2 convolution and a pre-activation residual block (He et al. 2016, 1603.05027).

They use group normalisation instead of batch normalisation, so the output for a sample does not depend on its batch,
even in training.
"""

import math
from typing import ClassVar

from torch import Tensor, nn

from aezoo.nets.build import activation
from aezoo.nets.conv import CONVS, TRANSPOSED, grids, head, map_shape, rank_of, stage_channels

__all__ = ["Decoder", "Encoder", "ResidualBlock", "default_hidden_dims", "map_shape"]


def default_hidden_dims(input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """See `nets.default_hidden_dims`: the first stage has 32 channels for up to 32x32 points."""
    return stage_channels(input_shape, 2**20)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), channels and grid unchanged.

    Args:
        rank: 1, 2 or 3 grid dimensions.
        channels: number of input and output channels.
        act: an activation's name.
    """

    def __init__(self, rank: int, channels: int, act: str) -> None:
        super().__init__()
        groups = math.gcd(channels, max(1, channels // 4))  # at least 2 values per group, even on a 1x1 grid
        self.body = nn.Sequential(
            nn.GroupNorm(groups, channels),
            activation(act),
            CONVS[rank](channels, channels, 3, padding=1),
            nn.GroupNorm(groups, channels),
            activation(act),
            CONVS[rank](channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Encoder(nn.Sequential):
    """(B, C, *grid) -> (B, *code_shape); `hidden_dims` are the channels of the stride-2 stages."""

    block: ClassVar[type[nn.Module]] = ResidualBlock

    def __init__(
        self, input_shape: tuple[int, ...], code_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        rank = rank_of(input_shape)
        layers: list[nn.Module] = []
        channels = input_shape[0]
        for width in hidden_dims:
            layers += [CONVS[rank](channels, width, 3, stride=2, padding=1), self.block(rank, width, act)]
            channels = width
        smallest = (channels, *grids(input_shape, len(hidden_dims))[-1])
        super().__init__(*layers, activation(act), head(code_shape, smallest, rank)[0])


class Decoder(nn.Sequential):
    """(B, *code_shape) -> (B, C, *grid); `hidden_dims` from the smallest map to the largest."""

    block: ClassVar[type[nn.Module]] = ResidualBlock

    def __init__(
        self, code_shape: tuple[int, ...], input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        rank = rank_of(input_shape)
        sizes = grids(input_shape, len(hidden_dims))[::-1]
        widths = (*hidden_dims, input_shape[0])
        layers: list[nn.Module] = [head(code_shape, (widths[0], *sizes[0]), rank)[1]]
        for i, larger in enumerate(sizes[1:]):
            padding = tuple(1 - n % 2 for n in larger)
            up = TRANSPOSED[rank](widths[i], widths[i + 1], 3, stride=2, padding=1, output_padding=padding)
            layers += [self.block(rank, widths[i], act), activation(act), up]
        super().__init__(*layers)
