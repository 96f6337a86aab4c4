"""Networks of latent diffusion (Rombach et al. 2021), https://arxiv.org/abs/2112.10752, in 1, 2 or 3 dimensions.

The encoder has a convolution, then for each stage two pre-activation residual blocks and a convolution of stride 2,
then two more blocks, and finally attention between two blocks on the smallest grid. The decoder has the reverse order,
with three blocks per stage and convolutions on the doubled grid. These are AutoencoderKL and VQModel of
https://github.com/huggingface/diffusers without attention at other positions; `aezoo.io.exporters.diffusers` exports to
these classes. As there, the networks process values 2 x - 1.

A convolution of stride 2 pads one point on the right and none on the left, or two on the right if a side is odd; in the
decoder, the doubled grid is cropped. Groups of channels are normalised over the whole grid.

Shapes: B batch, C channels, N positions.
"""

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.nets.build import activation
from aezoo.nets.conv import CONVS, grids, head, map_shape, rank_of, stage_channels

__all__ = ["Decoder", "Encoder", "default_hidden_dims", "map_shape"]

EPS = 1e-6
# blocks per stage of the encoder; the decoder has one more
LAYERS = 2
_MOST_GROUPS = 32


def default_hidden_dims(input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """See `nets.default_hidden_dims`: the first two stages have 16 channels for up to 32x32 points."""
    dims = stage_channels(input_shape, 2**18)
    return (dims[0], *dims[:-1])


def group_count(widths: tuple[int, ...]) -> int:
    """Return a number of groups that divides all widths, up to 32, with at least four channels each if possible."""
    common = math.gcd(*widths)
    most = min(_MOST_GROUPS, max(1, min(widths) // 4))
    return next(n for n in range(most, 0, -1) if common % n == 0)


def stage_widths(input_shape: tuple[int, ...], hidden_dims: tuple[int, ...]) -> tuple[int, ...]:
    """Return the channels on each grid, from the largest to the smallest, one more than the number of stages."""
    return (*hidden_dims, *(hidden_dims[-1:] or (input_shape[0],)))


class Block(nn.Module):
    """shortcut(x) + conv(act(norm(conv(act(norm(x)))))): (B, C, *grid) -> (B, C', *grid).

    Args:
        rank: 1, 2 or 3 grid dimensions.
        before: C.
        after: C'.
        groups: number of groups of channels that are normalised together.
        act: an activation's name.
    """

    def __init__(self, rank: int, before: int, after: int, groups: int, act: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(groups, width, eps=EPS) for width in (before, after))
        self.conv1, self.conv2 = (CONVS[rank](width, after, 3, padding=1) for width in (before, after))
        self.act = activation(act)
        self.shortcut = nn.Identity() if before == after else CONVS[rank](before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        out: Tensor = self.shortcut(x) + self.conv2(self.act(self.norm2(h)))
        return out


class Attention(nn.Module):
    """x + attention between all positions, with one head: (B, C, *grid) -> (B, C, *grid)."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=EPS)
        # as in vit, a key bias has no effect, and the bias of `out` replaces a value bias
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h_BNC = self.norm(x).flatten(2).mT
        q_B1NC, k_B1NC, v_B1NC = (layer(h_BNC)[:, None] for layer in (self.query, self.key, self.value))
        mixed_BNC = F.scaled_dot_product_attention(q_B1NC, k_B1NC, v_B1NC)[:, 0]
        out: Tensor = x + self.out(mixed_BNC).mT.unflatten(2, x.shape[2:])
        return out


class Down(nn.Module):
    """A convolution of stride 2: (B, C, *grid) -> (B, C, *half the grid, rounded up)."""

    def __init__(self, rank: int, width: int) -> None:
        super().__init__()
        self.conv = CONVS[rank](width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        padding = [n for side in reversed(x.shape[2:]) for n in (0, 1 + side % 2)]
        out: Tensor = self.conv(F.pad(x, padding))
        return out


class Up(nn.Module):
    """A convolution on the doubled grid: (B, C, *grid) -> (B, C, *larger)."""

    def __init__(self, rank: int, width: int, larger: tuple[int, ...]) -> None:
        super().__init__()
        self.larger = larger
        self.conv = CONVS[rank](width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        for axis, side in enumerate(self.larger, start=2):
            x = x.narrow(axis, 0, side)
        out: Tensor = self.conv(x)
        return out


def _middle(rank: int, width: int, groups: int, act: str) -> list[nn.Module]:
    first, last = (Block(rank, width, width, groups, act) for _ in range(2))
    return [first, Attention(width, groups), last]


class Encoder(nn.Module):
    """(B, C, *grid) -> (B, *code_shape); `hidden_dims` are the channels of the stages, before each halves the grid."""

    def __init__(
        self, input_shape: tuple[int, ...], code_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        super().__init__()
        rank, widths = rank_of(input_shape), stage_widths(input_shape, tuple(hidden_dims))
        groups, last = group_count(widths), widths[-1]
        layers: list[nn.Module] = [CONVS[rank](input_shape[0], widths[0], 3, padding=1)]
        for i, (before, width) in enumerate(pairwise((widths[0], *widths))):
            layers += [Block(rank, before if j == 0 else width, width, groups, act) for j in range(LAYERS)]
            layers += [Down(rank, width)] if i < len(hidden_dims) else []
        layers += [*_middle(rank, last, groups, act), nn.GroupNorm(groups, last, eps=EPS), activation(act)]
        flat = head(code_shape, (last, *grids(input_shape, len(hidden_dims))[-1]), rank)[0]
        layers.append(flat if len(code_shape) == 1 else CONVS[rank](last, code_shape[0], 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        code: Tensor = self.layers(2 * x - 1)
        return code


class Decoder(nn.Module):
    """(B, *code_shape) -> (B, C, *grid); `hidden_dims` from the smallest map to the largest."""

    def __init__(
        self, code_shape: tuple[int, ...], input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        super().__init__()
        rank, widths = rank_of(input_shape), stage_widths(input_shape, tuple(hidden_dims)[::-1])[::-1]
        groups, sizes = group_count(widths), grids(input_shape, len(hidden_dims))[::-1]
        flat = head(code_shape, (widths[0], *sizes[0]), rank)[1]
        first = flat if len(code_shape) == 1 else CONVS[rank](code_shape[0], widths[0], 3, padding=1)
        layers: list[nn.Module] = [first, *_middle(rank, widths[0], groups, act)]
        for before, width, larger in zip((widths[0], *widths), widths, (*sizes[1:], None), strict=False):
            layers += [Block(rank, before if j == 0 else width, width, groups, act) for j in range(LAYERS + 1)]
            layers += [Up(rank, width, larger)] if larger is not None else []
        layers += [nn.GroupNorm(groups, widths[-1], eps=EPS), activation(act)]
        self.layers = nn.Sequential(*layers, CONVS[rank](widths[-1], input_shape[0], 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        x_hat: Tensor = (self.layers(z) + 1) / 2
        return x_hat
