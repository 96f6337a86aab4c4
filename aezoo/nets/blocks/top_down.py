"""Residual networks with latent variables at every resolution of an image, as in very deep VAEs.

Child 2021, https://arxiv.org/abs/2011.10650; details as in https://github.com/openai/vdvae. Bottleneck networks have
1x1, 3x3, 3x3 and 1x1 convolutions, with a GELU before each and a quarter of the channels inside; on grids up to 2x2,
all convolutions are 1x1. The bottom-up path uses average pooling, the top-down path nearest-neighbour upsampling. The
stream has a learned initial value at each resolution: per position up to 64x64, per channel above. The last layer of a
block's p starts at 0, so that p is N(0, I) and f is 0. The last layer of its net and the projection of z start at
1/sqrt(N) of the usual scale, where N is the number of blocks of a path.

Shapes: B batch, W channels of the stream, Z of the latent variables, D values of all of them.
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.nets.blocks.levels import Conditional, GaussianParams, Level
from aezoo.training.precision import at_least_float32

Grid = tuple[int, int]


def grids(input_shape: Sequence[int], n: int) -> list[Grid]:
    """Return the grids of n resolutions: that of the image (C, H, W), then halved each time, rounded up."""
    return [(-(-input_shape[1] // 2**i), -(-input_shape[2] // 2**i)) for i in range(n)]


def conv(n_in: int, n_out: int, kernel: int) -> nn.Conv2d:
    """Create a convolution that preserves the grid; its bias starts at 0."""
    layer = nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2)
    nn.init.zeros_(cast(Tensor, layer.bias))
    return layer


class Bottleneck(nn.Sequential):
    """Convolutions 1x1 to W/4 channels, 3x3, 3x3, 1x1, a GELU before each: (B, n_in, *grid) -> (B, n_out, *grid).

    Args:
        n_in: input channels.
        width: W.
        n_out: output channels.
        grid: size of the grid; up to 2x2, all convolutions are 1x1.
        scale: factor of the last convolution's initial weights.
    """

    def __init__(self, n_in: int, width: int, n_out: int, grid: Grid, scale: float = 1.0) -> None:
        middle, kernel = max(1, width // 4), 3 if max(grid) > 2 else 1
        last = conv(middle, n_out, 1)
        with torch.no_grad():
            last.weight *= scale
        convs = conv(n_in, middle, 1), conv(middle, middle, kernel), conv(middle, middle, kernel), last
        super().__init__(*(layer for c in convs for layer in (nn.GELU(), c)))


class BottomUp(nn.Module):
    """(B, *input_shape) -> activations (B, W, *grid) of each resolution, starting with the image's.

    Args:
        input_shape: (C, H, W) of the image.
        width: W.
        blocks: number of residual blocks at each resolution.
    """

    def __init__(self, input_shape: tuple[int, ...], width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.first = conv(input_shape[0], width, 3)
        scale = math.sqrt(1 / sum(blocks))
        self.stages = nn.ModuleList(
            nn.ModuleList(Bottleneck(width, width, width, grid, scale) for _ in range(n))
            for grid, n in zip(grids(input_shape, len(blocks)), blocks, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.first(x)
        found: list[Tensor] = []
        for blocks in self.stages:
            if found:
                y = F.avg_pool2d(y, 2, ceil_mode=True, count_include_pad=False)
            for block in blocks:  # type: ignore[attr-defined]
                y = y + block(y)
            found.append(y)
        return found


class TopDownBlock(nn.Module):
    """One group of latent variables and its update of the stream y, with activations a of the bottom-up path.

        q = q_net([y; a])     p, f = p_net(y)     y <- y + f + W z     y <- y + net(y)

    Args:
        width: W.
        channels: Z.
        grid: size of the grid.
        scale: factor of the initial weights of the projection of z and of the last layer of net.
    """

    def __init__(self, width: int, channels: int, grid: Grid, scale: float) -> None:
        super().__init__()
        self.sizes = [2 * channels, width]
        self.q = Bottleneck(2 * width, width, 2 * channels, grid)
        self.p = Bottleneck(width, width, 2 * channels + width, grid, scale=0)
        self.of_z = conv(channels, width, 1)
        with torch.no_grad():
            self.of_z.weight *= scale
        self.net = Bottleneck(width, width, width, grid, scale)

    def forward(self, y: Tensor, a: Tensor | None, z: Tensor | None, draw: bool) -> tuple[Tensor, Level]:
        p, f = self.p(y).split(self.sizes, 1)
        prior = gaussian(p)
        level = Level.from_distributions(prior if a is None else gaussian(self.q(torch.cat([y, a], 1))), prior, z, draw)
        y = y + f + self.of_z(level.z.to(self.of_z.weight.dtype))
        y = y + self.net(y)
        return y, Level(*(part.flatten(1) for part in level))


def gaussian(values: Tensor) -> GaussianParams:
    """Return mean and log-variance from means and log standard deviations: (B, 2 Z, *grid) -> (B, Z, *grid) each."""
    mu, log_std = at_least_float32(values).chunk(2, 1)
    return mu, (2 * log_std).clamp(-30, 20)


class TopDown(nn.Module):
    """(B, D) -> the likelihood's parameters (B, *input_shape); a code contains all groups, lowest resolution first.

    Args:
        input_shape: (C, H, W) of the image.
        width: W.
        channels: Z.
        blocks: number of blocks of each resolution, starting with the image's.

    Attributes:
        sizes: number of values of each group.
    """

    def __init__(self, input_shape: tuple[int, ...], width: int, channels: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.grids, scale = grids(input_shape, len(blocks)), math.sqrt(1 / sum(blocks))
        self.starts = nn.ParameterList(torch.zeros(width, *(g if max(g) <= 64 else (1, 1))) for g in self.grids)
        self.stages = nn.ModuleList(
            nn.ModuleList(TopDownBlock(width, channels, grid, scale) for _ in range(n))
            for grid, n in zip(self.grids, blocks, strict=True)
        )
        sizes = [n * [channels * math.prod(grid)] for grid, n in zip(self.grids, blocks, strict=True)]
        self.sizes = [size for stage in reversed(sizes) for size in stage]
        self.gain, self.bias = nn.Parameter(torch.ones(width, 1, 1)), nn.Parameter(torch.zeros(width, 1, 1))
        self.last = conv(width, input_shape[0], 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.decode_levels(z)[0]

    def decode_levels(self, z: Tensor) -> tuple[Tensor, list[Level]]:
        """Return parameters and groups of whole codes: (B, D) -> (B, *input_shape), (B, D_i) each."""
        return self.forward_levels(z.shape[0], codes=z.split(self.sizes, 1))

    def conditional(self, bottom_up: Callable[[Tensor], Sequence[Tensor]]) -> Conditional:
        """Return the distributions of each group given those above; `bottom_up` computes the activations of x for q."""
        return Conditional(
            lambda above, n: self.forward_levels(n, codes=above)[1][len(above)].p,
            lambda x, above: self.forward_levels(len(x), bottom_up(x), above)[1][len(above)].q,
        )

    def forward_levels(
        self, n: int, a: Sequence[Tensor] | None = None, codes: Sequence[Tensor] = (), draw: bool = False
    ) -> tuple[Tensor, list[Level]]:
        """Return parameters and groups of n samples; after the given groups, z is from q, or from p without a.

        Args:
            n: number of samples.
            a: the output of `BottomUp`.
            codes: the first groups of the code, (n, D_i) each.
            draw: draw the other groups instead of using means.
        """
        levels: list[Level] = []
        y = torch.zeros(())
        for i in reversed(range(len(self.grids))):
            start, (rows, columns) = self.starts[i][None], self.grids[i]
            if levels:
                y = F.interpolate(y, scale_factor=2.0)[:, :, :rows, :columns] + start
            else:
                y = start.expand(n, -1, rows, columns)
            for block in self.stages[i]:  # type: ignore[attr-defined]
                z = codes[len(levels)] if len(levels) < len(codes) else None
                y, level = block(y, None if a is None else a[i], z, draw)
                levels.append(level)
        return self.last(y * self.gain + self.bias), levels
