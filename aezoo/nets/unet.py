"""A U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597) that is split into two parts at the code.

An encoder stage has two convolutions and a pooling; a decoder stage doubles the grid and has two convolutions. Any size
works. The skip connections of a U-Net copy maps from the encoder to the decoder, so that the code does not contain all
information about the sample. Here they stay within the encoder and within the decoder. In the encoder, the map of every
stage is also pooled and passed to the code's layer. In the decoder, the code's map is enlarged and passed to every
stage. So the decoder's only input is the code.

`UNet` is a complete U-Net without a code, for models that process their outputs.

Group normalisation is used as in resnet, so the output for a sample does not depend on its batch.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from aezoo.nets.build import activation
from aezoo.nets.conv import CONVS, grids, head, map_shape, rank_of, stage_channels

__all__ = ["Decoder", "Encoder", "UNet", "default_hidden_dims", "map_shape"]

_POOLS: dict[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


def default_hidden_dims(input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """See `nets.default_hidden_dims`: the first stage has 16 channels for up to 32x32 points."""
    return stage_channels(input_shape, 2**18)


class _TwoConvolutions(nn.Sequential):
    def __init__(self, rank: int, before: int, after: int, act: str) -> None:
        groups = math.gcd(after, max(1, after // 4))
        layers: list[nn.Module] = []
        for channels in (before, after):
            norm = nn.GroupNorm(groups, after)
            layers += [CONVS[rank](channels, after, 3, padding=1), norm, activation(act)]
        super().__init__(*layers)


class _DoubleChannels(nn.Module):
    """Repeat each value 2^R times and crop the result to the grid, as the reverse of a pooling that rounds up."""

    def __init__(self, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.grid = grid
        self.up = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        for axis, side in enumerate(self.grid, start=2):
            x = x.narrow(axis, 0, side)
        return x


class Encoder(nn.Module):
    """(B, C, *grid) -> (B, *code_shape); `hidden_dims` are the channels of the stages, each of which halves the grid.

    The map of a stage has two paths: it is pooled as the input of the next stage, and it is pooled repeatedly, together
    with earlier maps, as an input of the code's layer.
    """

    def __init__(
        self, input_shape: tuple[int, ...], code_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        super().__init__()
        rank = rank_of(input_shape)
        widths = (input_shape[0], *hidden_dims)
        self.stages = nn.ModuleList(_TwoConvolutions(rank, a, b, act) for a, b in pairwise(widths))
        self.pool = _POOLS[rank](2, ceil_mode=True)
        channels = sum(hidden_dims) if hidden_dims else input_shape[0]
        self.head = head(code_shape, (channels, *grids(input_shape, len(hidden_dims))[-1]), rank)[0]

    def forward(self, x: Tensor) -> Tensor:
        h = skipped = x
        for i, stage in enumerate(self.stages):
            h = stage(h)
            skipped = self.pool(torch.cat([skipped, h], 1) if i else h)
            h = self.pool(h)
        code: Tensor = self.head(skipped)
        return code


class Decoder(nn.Module):
    """(B, *code_shape) -> (B, C, *grid); `hidden_dims` from the smallest map to the largest."""

    def __init__(
        self, code_shape: tuple[int, ...], input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        super().__init__()
        rank = rank_of(input_shape)
        sizes = grids(input_shape, len(hidden_dims))[::-1]
        channels = hidden_dims[0] if hidden_dims else input_shape[0]
        self.head = head(code_shape, (channels, *sizes[0]), rank)[1]
        self.act = activation(act)
        # the input of the first stage is only the code's map
        before = [channels, *(width + channels for width in hidden_dims)]
        self.ups = nn.ModuleList(_DoubleChannels(size) for size in sizes[1:])
        self.stages = nn.ModuleList(
            _TwoConvolutions(rank, a, b, act) for a, b in zip(before, hidden_dims, strict=False)
        )
        self.last = CONVS[rank](hidden_dims[-1] if hidden_dims else channels, input_shape[0], 1)

    def forward(self, z: Tensor) -> Tensor:
        code = self.act(self.head(z))
        h = code
        for i, (up, stage) in enumerate(zip(self.ups, self.stages, strict=True)):
            code = up(code)
            h = stage(torch.cat([up(h), code], 1) if i else code)
        x_hat: Tensor = self.last(h)
        return x_hat


class UNet(nn.Module):
    """(B, C, *grid) -> (B, outputs, *grid), with the skip connections of the paper.

    Args:
        input_shape: (C, *grid), any size.
        outputs: channels of the output.
        hidden_dims: channels of the stages, at least one; each stage after the first halves the grid.
        act: an activation's name.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, hidden_dims: tuple[int, ...], act: str) -> None:
        super().__init__()
        rank = rank_of(input_shape)
        self.down = nn.ModuleList(
            _TwoConvolutions(rank, a, b, act) for a, b in pairwise((input_shape[0], *hidden_dims))
        )
        self.pool = _POOLS[rank](2, ceil_mode=True)
        self.enlarge = nn.ModuleList(_DoubleChannels(grid) for grid in grids(input_shape, len(hidden_dims) - 1)[-2::-1])
        self.up = nn.ModuleList(_TwoConvolutions(rank, a + b, b, act) for a, b in pairwise(hidden_dims[::-1]))
        self.last = CONVS[rank](hidden_dims[0], outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps: list[Tensor] = []
        for stage in self.down:
            maps.append(stage(self.pool(maps[-1]) if maps else x))
        h = maps.pop()
        for enlarge, stage in zip(self.enlarge, self.up, strict=True):
            h = stage(torch.cat([enlarge(h), maps.pop()], 1))
        found: Tensor = self.last(h)
        return found
