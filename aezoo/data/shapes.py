"""shapes: sprites like dSprites (Matthey et al. 2017), drawn from their factors on demand.

    shape        3   square, ellipse, heart
    scale        6   0.5 to 1 in equal steps; at 1 the sprite reaches 1/4 of the image's side from its centre of mass
    orientation 40   of a full turn, clockwise from 0, without the end 2 pi, where dSprites repeats 0
    x, y        32   each: 1/64 of the side from one to the next, about the middle of the image

All 737,280 combinations exist. The mixed-radix digits of i are the factors of sample i, with the last factor changing
fastest; its label is its shape. `--data.channels 3` adds two factors in front, the hues of sprite and background: 6
each, red to magenta, the background at half the brightness; i and i + 737,280 are then one picture in two colours.

Pixels contain about the share of their area that is covered, in 1/255: the distance to the outline, for the ellipse to
first order, over the width of a pixel. So a move by half a pixel is visible at any size, and the centre of mass moves
linearly; `--data.binarise threshold` gives 0 or 1, as in dSprites. Squares repeat after a quarter turn and ellipses
after a half turn, here bit by bit: 430,080 grey pictures are different. Equal pictures are in the same split, so none
in val or test was trained on in another colour or orientation.

Shapes: N samples, F factors, W side of the part of an image that a sprite can reach.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from aezoo.data.images import ImageArgs
from aezoo.data.source import STAGES, Options, Source, Stage, accepts, split_rows
from aezoo.errors import AezooError

NAMES, SIZES = ("shape", "scale", "orientation", "x", "y"), (3, 6, 40, 32, 32)
COLOURS, HUES = ("hue", "background"), 6
COMBINATIONS = math.prod(SIZES)
# number of orientations after which a shape repeats
PERIODS = torch.tensor([10, 20, 40])
REACH = 0.25
# red, yellow, green, cyan, blue, magenta: the hues whose colours are exact
RGB = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]])
# distance of the heart's centre of mass from the square's along each side, for half-side 1 and two half discs
_SHIFT = (math.pi / 2 + 2 / 3) / (4 + math.pi)
_MIN_SIDE = 8
_CHUNK = 128


def _square(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Share of pixels at (u, v), in pixels from the centre, that a square covers whose corners lie r away."""
    half = r / math.sqrt(2) + 0.5
    return (half - u.abs()).clamp(0, 1) * (half - v.abs()).clamp(0, 1)


def _ellipse(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """The same of an ellipse with semi-axes r and r / 2."""
    u2, v2, r2 = u * u, v * v, r * r
    form = u2 + 4 * v2
    length, slope = form.sqrt(), (u2 + 16 * v2).sqrt()
    return (0.5 + length * (r - length) / slope.clamp(min=1e-6)).where(form > 1e-6 * r2, 1.0).clamp(0, 1)


def _heart(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """The same of a square with a half disc on each of two sides, the point between the other two r away."""
    half = r / (math.sqrt(2) * (1 + _SHIFT))
    # rotated by pi / 4, and shifted from the centre of mass to the square's
    s, t = (u - v) / math.sqrt(2) + _SHIFT * half, (-u - v) / math.sqrt(2) + _SHIFT * half
    covered = (half + 0.5 - s.abs()).clamp(0, 1) * (half + 0.5 - t.abs()).clamp(0, 1)
    for a, b in ((s, t), (t, s)):
        covered = covered.maximum(half + 0.5 - ((a - half).square() + b.square()).sqrt())
    return covered.clamp(0, 1)


@accepts(ImageArgs)
class Shapes(Source):
    """Sprites with known factors, at any size.

    Attributes:
        factor_names: what varies, in the order of the columns of `factors`.
        factor_sizes: how many values each has.
    """

    white = 255

    def __init__(self, options: Options) -> None:
        if options.scale not in ("auto", "none"):
            raise AezooError(
                f"--data.scale {options.scale} needs a data set in memory, which {options.name} is not: use auto"
            )
        self.options = options
        self.size, channels = options.size or 64, options.channels or 1
        if self.size < _MIN_SIDE:
            raise AezooError(f"--data.size {self.size} is too small to draw shapes: give at least {_MIN_SIDE}")
        self.input_shape = (channels, self.size, self.size)
        self.class_names = ("square", "ellipse", "heart")
        self.num_classes = len(self.class_names)
        self.coloured = channels == 3
        self.factor_names: tuple[str, ...] = (*COLOURS, *NAMES) if self.coloured else NAMES
        self.factor_sizes: tuple[int, ...] = (HUES, HUES, *SIZES) if self.coloured else SIZES
        self._rows: dict[Stage, Tensor] | None = None

    def __len__(self) -> int:
        return math.prod(self.factor_sizes)

    def factors(self, index: Tensor | Sequence[int]) -> Tensor:
        """The factors of samples by index: (N,) -> (N, F), each from 0 to its size - 1."""
        rest, digits = self._within(torch.as_tensor(index).long(), len(self), "sample"), []
        for size in reversed(self.factor_sizes):
            digits.append(rest % size)
            rest = rest.div(size, rounding_mode="floor")
        return torch.stack(digits[::-1], dim=-1)

    def index(self, factors: Tensor) -> Tensor:
        """The indices of samples by factors: (N, F) -> (N,)."""
        index = torch.zeros_like(factors[..., 0])
        for name, size, column in zip(self.factor_names, self.factor_sizes, factors.unbind(-1), strict=True):
            index = index * size + self._within(column, size, name)
        return index

    def render(self, factors: Tensor) -> Tensor:
        """The pictures of factors: (N, F) -> (N, C, size, size), uint8; each depends on its own row alone."""
        self.index(factors)
        parts = [self._draw(*part.unbind(1)[::-1]) for part in factors.long().split(_CHUNK)]
        return torch.cat(parts) if parts else torch.empty(0, *self.input_shape, dtype=torch.uint8)

    def rows(self, stage: Stage) -> Tensor:
        """The indices of a split's samples, in its order."""
        grey = self._grey_indices()[stage]
        return (torch.arange(len(self) // COMBINATIONS)[:, None] * COMBINATIONS + grey).flatten()

    def split(self, stage: Stage) -> "Dataset[Any] | None":
        grey = self._grey_indices()[stage]
        if not len(grey):
            return None
        return SpriteDataset(self, grey)

    def _grey_indices(self) -> dict[Stage, Tensor]:
        """Numbers of the grey samples of each split; equal pictures are in one."""
        if self._rows is None:
            everything = torch.arange(COMBINATIONS).view(SIZES)
            parts: dict[Stage, list[Tensor]] = {stage: [] for stage in STAGES}
            # a group is a picture with all orientations that look the same
            for shape, period in enumerate(PERIODS.tolist()):
                groups = everything[shape].unflatten(1, (-1, period)).movedim(1, -1).flatten(0, -2)
                fractions = (self.options.val_fraction, self.options.test_fraction)
                for stage, chosen in split_rows(len(groups), None, fractions, self.options.seed).items():
                    parts[stage].append(groups[chosen].flatten())
            self._rows = {stage: torch.cat(part).sort().values for stage, part in parts.items()}
        return self._rows

    def _draw(self, y: Tensor, x: Tensor, orientation: Tensor, scale: Tensor, shape: Tensor, *hues: Tensor) -> Tensor:
        """(N,) each -> (N, C, size, size) uint8."""
        n, size = len(x), self.size
        ground_NC, sprite_NC = torch.zeros(n, 1), torch.full((n, 1), 255.0)
        if hues:
            ground_NC, sprite_NC = (RGB[hue] * level for hue, level in zip(hues, (128.0, 255.0), strict=True))
        angle = orientation % PERIODS[shape] * (2 * math.pi / SIZES[2])
        radius = (0.5 + 0.1 * scale) * (REACH * size)
        # centres in pixels, pixel k being [k, k + 1]; only a part of the image can be reached by the sprite
        centre_N2 = ((torch.stack([y, x], 1) - 15.5) / 64 + 0.5) * size
        side = min(size, math.ceil(2 * REACH * size) + 2)
        start_N2 = (centre_N2 - side / 2).round().clamp(0, size - side)
        offset_N2W = start_N2[:, :, None] + torch.arange(side) + 0.5 - centre_N2[:, :, None]
        down_NW1, right_N1W = offset_N2W[:, 0, :, None], offset_N2W[:, 1, None, :]
        cos, sin, reach = (values[:, None, None] for values in (angle.cos(), angle.sin(), radius))
        within_WW = torch.arange(side)[:, None] * size + torch.arange(side)
        image = ground_NC.to(torch.uint8)[:, :, None].repeat(1, 1, size * size)
        first_NC = torch.arange(ground_NC.numel()).view(ground_NC.shape) * size * size
        first_NC += (start_N2[:, :1] * size + start_N2[:, 1:]).long()
        for kind, cover in enumerate((_square, _ellipse, _heart)):
            of = (shape == kind).nonzero()[:, 0]
            if len(of):
                across, down, c, s = right_N1W[of], down_NW1[of], cos[of], sin[of]
                share_n1WW = cover(c * across + s * down, c * down - s * across, reach[of])[:, None]
                ground, sprite = (colour[of][:, :, None, None] for colour in (ground_NC, sprite_NC))
                colours = (ground + (sprite - ground) * share_n1WW).round_().to(torch.uint8)
                image.view(-1)[first_NC[of][:, :, None, None] + within_WW] = colours
        return image.view(n, *self.input_shape)

    @staticmethod
    def _within(values: Tensor, size: int, name: str) -> Tensor:
        wrong = values[(values < 0) | (values >= size)]
        if len(wrong):
            raise AezooError(f"shapes has {size} values of {name}, 0 to {size - 1}: {int(wrong[0])} is out of range")
        return values


class SpriteDataset(Dataset[tuple[Tensor, Tensor]]):
    """The samples of a split, drawn when they are read.

    Args:
        source: draws them.
        grey: (n,) indices of samples without hues; with colours each comes in every pair of hues.
    """

    def __init__(self, source: Shapes, grey: Tensor) -> None:
        self.source, self.grey = source, grey

    def __len__(self) -> int:
        return len(self.source) // COMBINATIONS * len(self.grey)

    @property
    def labels(self) -> Tensor:
        """The shape of each sample."""
        return (self.grey // (COMBINATIONS // SIZES[0])).repeat(len(self.source) // COMBINATIONS)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([range(len(self))[index]])
        return x[0], y[0]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """A whole batch at once; torch's loader prefers this method to one call per sample."""
        at = torch.as_tensor(indices)
        numbers = at.div(len(self.grey), rounding_mode="floor") * COMBINATIONS + self.grey[at % len(self.grey)]
        factors = self.source.factors(numbers)
        return self.source.render(factors), factors[:, -5]
