"""A U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597) of noisy samples, their noise level, and a map.

The map may have any grid. It is upsampled to the samples' grid by nearest neighbours and concatenated as channels. The
noise level, one number, sets scale and shift of every block's second normalisation, as in diffusion models (Dhariwal &
Nichol 2021, https://arxiv.org/abs/2105.05233). The stages are those of resnet; the maps of the way down are added on
the way up. Unlike `unet` it has no code: it is neither an encoder nor a decoder, but the net of a model that learns to
denoise.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from aezoo.nets.build import activation
from aezoo.nets.conv import CONVS, grids, rank_of
from aezoo.nets.resnet import ResidualBlock
from aezoo.speed.linear import Linear
from aezoo.training.precision import at_least_float32

_WIDTH = 32


class Block(ResidualBlock):
    """A residual block whose second normalisation is scaled and shifted: (B, C, *grid), (B or 1, 32) -> same as first.

    Args:
        rank: 1, 2 or 3 grid dimensions.
        channels: number of channels, in and out.
        act: an activation's name.
    """

    def __init__(self, rank: int, channels: int, act: str) -> None:
        super().__init__(rank, channels, act)
        self.film = Linear(_WIDTH, 2 * channels)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:  # type: ignore[override]
        norm, act, conv, norm_2, act_2, conv_2 = self.body
        scale, shift = self.film(level).unflatten(1, (-1, *[1] * (x.ndim - 2))).chunk(2, 1)
        h = norm_2(conv(act(norm(x))))
        x = x + conv_2(act_2(h * (1 + scale) + shift))
        return x


class Denoiser(nn.Module):
    """(B, *input_shape), (B or 1, 1), (B, channels, *any grid) -> (B, *input_shape).

    Args:
        input_shape: shape of one sample.
        channels: channels of the map.
        dims: channels of the stages of stride 2, on the way down.
        act: an activation's name.
    """

    frequencies: Tensor

    def __init__(self, input_shape: tuple[int, ...], channels: int, dims: tuple[int, ...], act: str) -> None:
        super().__init__()
        rank, data = rank_of(input_shape), input_shape[0]
        widths, conv = (*(dims[:1] or (data,)), *dims), CONVS[rank]
        # the log noise level spans a few units: the slowest wave distinguishes its ends, the fastest tenths of a unit
        self.register_buffer("frequencies", torch.logspace(-1, 1, _WIDTH // 2), persistent=False)
        self.embed = nn.Sequential(Linear(_WIDTH, _WIDTH), activation(act), Linear(_WIDTH, _WIDTH), activation(act))
        self.enlarge, self.first = nn.Upsample(input_shape[1:]), conv(data + channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(conv(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.blocks = nn.ModuleList(Block(rank, n, act) for n in (*widths[1:], *widths[::-1]))
        up = zip(pairwise(widths[::-1]), grids(input_shape, len(dims))[-2::-1], strict=True)
        self.up = nn.ModuleList(nn.Sequential(nn.Upsample(grid), conv(a, b, 3, padding=1)) for (a, b), grid in up)
        self.last = nn.Sequential(activation(act), conv(widths[0], data, 3, padding=1))

    def forward(self, x: Tensor, level: Tensor, z: Tensor) -> Tensor:
        angles = level * at_least_float32(self.frequencies)
        embedded = self.embed(torch.cat([angles.cos(), angles.sin()], 1).to(z.dtype))
        maps, blocks = [self.first(torch.cat([x.to(z.dtype), self.enlarge(z)], 1))], iter(self.blocks)
        for down in self.down:
            maps.append(next(blocks)(down(maps[-1]), embedded))
        h = next(blocks)(maps.pop(), embedded)
        for up in self.up:
            h = next(blocks)(up(h) + maps.pop(), embedded)
        out: Tensor = self.last(h)
        return out
