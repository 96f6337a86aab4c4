"""Perlin noise (Perlin 1985), https://doi.org/10.1145/325165.325247"""

import itertools
import math

import torch
from torch import Tensor

_FINEST = 4  # pixels across a cell
_MOST_HALVINGS = 5


def perlin(n: int, grid: tuple[int, ...], device: torch.device) -> Tensor:
    """Gradient noise from -1 to 1, on a separate lattice for each sample: (n, H, W).

    Each side has 1, 2, 4 .. 32 cells, none smaller than 4 pixels, and the lattice is rotated by up to 90 degrees, as in
    DRAEM (Zavrtanik et al. 2021, https://arxiv.org/abs/2108.07610).

    Args:
        n: number of samples.
        grid: (H, W).
        device: where the noise is drawn.
    """
    halvings = min(_MOST_HALVINGS, int(math.log2(max(1, min(grid) // _FINEST))))
    side = 2**halvings + 1  # of the lattice, which is periodic beyond
    angle_BG = 2 * math.pi * torch.rand(n, side * side, device=device)
    cells_B2 = 2 ** (torch.rand(n, 2, device=device) * (halvings + 1)).floor()
    turn_B11 = math.pi * (torch.rand(n, 1, 1, device=device) - 0.5)
    i, j = ((torch.arange(length, device=device) + 0.5) / length - 0.5 for length in grid)
    cos, sin, i = turn_B11.cos(), turn_B11.sin(), i[:, None]
    u, v = (torch.stack([cos * i - sin * j, sin * i + cos * j]) + 0.5) * cells_B2.T[..., None, None]

    noise = torch.zeros_like(u)
    for du, dv in itertools.product((0, 1), repeat=2):
        corner = ((u.floor() + du) % side * side + (v.floor() + dv) % side).long()
        angle = angle_BG.gather(1, corner.flatten(1)).view_as(u)
        a, b = u - u.floor() - du, v - v.floor() - dv
        noise = noise + _fade(1 - a.abs()) * _fade(1 - b.abs()) * (a * angle.cos() + b * angle.sin())
    return math.sqrt(2) * noise


def _fade(t: Tensor) -> Tensor:
    """6 t^5 - 15 t^4 + 10 t^3 (Perlin 2002, https://doi.org/10.1145/566654.566636)."""
    return t**3 * (t * (6 * t - 15) + 10)
