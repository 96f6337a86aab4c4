"""Strided convolutions (encoder) and transposed convolutions (decoder) in 1, 2 or 3 dimensions, for any size.

Each stage has kernel size 3, stride 2 and padding 1, which maps a side n to ceil(n / 2). In the decoder, the output
padding is 0 for an odd side and 1 for an even side, so every size is restored exactly, without cropping.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.deprecated import renamed
from aezoo.errors import AezooError
from aezoo.nets.build import activation
from aezoo.nets.narrow_conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d

CONVS: dict[int, type[nn.Module]] = {1: Conv1d, 2: Conv2d, 3: Conv3d}
# limits in `stage_channels`
_LARGEST_LAST_SIDE, _MOST_CHANNELS = 8, 128
_LEAST_FIRST, _MOST_FIRST = 4, 32
TRANSPOSED: dict[int, type[nn.Module]] = {1: ConvTranspose1d, 2: ConvTranspose2d, 3: ConvTranspose3d}


def rank_of(input_shape: tuple[int, ...]) -> int:
    """Return the number of grid dimensions: 1 for (C, L), 2 for (C, H, W), 3 for (C, D, H, W).

    Raises:
        AezooError: the shape has another number of dimensions, such as a vector.
    """
    rank = len(input_shape) - 1
    if rank not in CONVS:
        raise AezooError(
            f"convolutions take (C, L), (C, H, W) or (C, D, H, W), not {tuple(input_shape)}: "
            "for a vector use a model with net='mlp', such as dense_ae"
        )
    return rank


def grids(input_shape: tuple[int, ...], stages: int) -> list[tuple[int, ...]]:
    """Return the grid sizes from the input's to the smallest, one more than the number of stages."""
    sizes = [tuple(input_shape[1:])]
    for _ in range(stages):
        sizes.append(tuple(math.ceil(n / 2) for n in sizes[-1]))
    return sizes


def stage_channels(input_shape: tuple[int, ...], budget: int) -> tuple[int, ...]:
    """Return the channels of at least 2 stages, such that all sides of the last grid are at most 8.

    Channels double from stage to stage, up to 128. The first stage has 32 channels, or fewer (but at least 4) if the
    square of this number times the number of grid points of the input exceeds the budget, so that larger samples have
    about the same cost.
    """
    rank_of(input_shape)
    width, stages = _MOST_FIRST, max(2, math.ceil(math.log2(max(input_shape[1:]) / _LARGEST_LAST_SIDE)))
    while width > _LEAST_FIRST and width**2 * math.prod(input_shape[1:]) > budget:
        width //= 2
    return tuple(min(width << stage, _MOST_CHANNELS) for stage in range(stages))


def default_hidden_dims(input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """See `nets.default_hidden_dims`: the first stage has 32 channels for up to 64x64 points."""
    return stage_channels(input_shape, 2**22)


def map_shape(input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """(channels, *grid) after all stages."""
    rank_of(input_shape)
    return (channels, *grids(input_shape, len(hidden_dims))[-1])


def head(code_shape: tuple[int, ...], grid_shape: tuple[int, ...], rank: int) -> tuple[nn.Module, nn.Module]:
    """Create the layers between last feature map and code: linear for a vector, a 1x1 convolution for a map."""
    if len(code_shape) == 1:
        size = math.prod(grid_shape)
        down = nn.Sequential(nn.Flatten(), nn.Linear(size, code_shape[0]))
        up = nn.Sequential(nn.Linear(code_shape[0], size), nn.Unflatten(1, grid_shape))
        return down, up
    if tuple(code_shape[1:]) != tuple(grid_shape[1:]):
        raise AezooError(
            f"a code of shape {tuple(code_shape)} does not fit: these stages leave a grid of {tuple(grid_shape[1:])}"
        )
    return CONVS[rank](grid_shape[0], code_shape[0], 1), CONVS[rank](code_shape[0], grid_shape[0], 1)


class Encoder(nn.Sequential):
    """(B, C, *grid) -> (B, *code_shape); `hidden_dims` are the channels of the stride-2 stages."""

    def __init__(
        self, input_shape: tuple[int, ...], code_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        rank = rank_of(input_shape)
        layers: list[nn.Module] = []
        channels = input_shape[0]
        for width in hidden_dims:
            layers += [CONVS[rank](channels, width, 3, stride=2, padding=1), activation(act)]
            channels = width
        smallest = (channels, *grids(input_shape, len(hidden_dims))[-1])
        super().__init__(*layers, head(code_shape, smallest, rank)[0])


class Decoder(nn.Sequential):
    """(B, *code_shape) -> (B, C, *grid); `hidden_dims` from the smallest map to the largest."""

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
            layers += [activation(act), up]
        super().__init__(*layers)


class UpsampleConcat(nn.Module):
    """Concatenate the codes of two levels: each position of the bottom grid gets the nearest code of the top grid.

    (B, C, T) -> (B, 2 C, *bottom grid).
    """

    def __init__(self, grids: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        super().__init__()
        self.grids = grids

    def forward(self, z: Tensor) -> Tensor:
        top, bottom = z.split([math.prod(grid) for grid in self.grids], 2)
        up = F.interpolate(top.unflatten(2, self.grids[0]), self.grids[1])
        return torch.cat([up, bottom.unflatten(2, self.grids[1])], 1)


__getattr__ = renamed(__name__)
