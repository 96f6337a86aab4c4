"""Samples that do not fit into memory with all feature maps of a network: encoder and decoder work in tiles.

A tile is cut out with a margin as wide as the receptive field, and only its middle is kept, so that the result is that
of the whole sample, without seams, up to the rounding of sums. The receptive field is measured: one position of the
input is set to NaN, which every sum and product propagates, and the positions of the output that are NaN are those that
depend on it. A network in which each position depends on all others, by attention or by a normalisation over positions,
cannot work in tiles and is refused.

Modules between encoder and decoder, such as a quantiser or the distributions of an entropy coder, are applied to the
whole code. If there are none, a tile passes both networks, and the whole code is never in memory.

With `blend`, tiles overlap and are blended instead, as by diffusers' `enable_tiling`: the weight of a tile rises from 0
to 1 over its overlap with the one before. Each tile is then a separate sample, so this works for any network, and the
result differs from that of the whole sample.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.tasks.samples import SampleSet, reference_tensor
from aezoo.training import sizes
from aezoo.training.model_names import display_name

# blocks of the samples with which the receptive field is measured
_BLOCKS = (16, 64, 256)
# number of sizes for which `Sized` stores models
_MOST_KEPT = 8
# values in a batch of samples that are not of the model's size
_MOST_VALUES = 2**22


def tiled(model: Autoencoder, size: Sequence[int], tile: int = 512, blend: float = 0.0) -> Autoencoder:
    """The same model for samples of a size, which it encodes and decodes in tiles; it shares the weights.

    Without blend it gives what `aezoo.at_size(model, size)` gives, up to the rounding of sums, in the memory that a
    tile needs.

    Args:
        model: a convolutional model whose code is a map.
        size: (L,), (H, W) or (D, H, W).
        tile: the sides of a tile in points, rounded up to a multiple of the strides; each gets a margin in addition.
        blend: share of a tile's sides, up to 1/2, that overlaps with the next tile, where both are blended; tiles then
            have no margin. For networks that need the whole sample; 0.25 in diffusers.

    Raises:
        AezooError: the model accepts no other size, or, without blend, its networks need the whole sample.
    """
    if tile < 1:
        raise AezooError(f"tile must be a number of points above 0, got {tile}")
    if not 0 <= blend <= 0.5:
        raise AezooError(f"blend must be a share of a tile from 0 to 0.5, such as 0.25, got {blend}")
    sized = sizes.rebuilt(model, (model.input_shape[0], *map(int, size)))
    nets = [getattr(sized, name, None) for name in ("encoder", "decoder")]
    strides = sizes.stride_of(model) if all(isinstance(net, nn.Module) for net in nets) else None
    if strides is None:
        raise _refusal(model, "its code is not a map between two networks")
    _check_places(sized, strides)
    ones = tuple(1 for _ in strides)
    sized.encoder = _Tiled(
        model, size, tile, blend, _encoded, (strides, strides, ones), model.input_shape[0], sized.encoder
    )
    sized.decoder = _Tiled(
        model, size, tile, blend, _decoded, (strides, ones, strides), model.code_shape[0], sized.decoder
    )
    names = ("encode", "decode", "forward", "score")
    if all(getattr(type(model), name) is getattr(Autoencoder, name) for name in names):
        whole = _Tiled(model, size, tile, blend, _reconstructed, (strides, strides, strides), model.input_shape[0])
        sized.forward = lambda x: sized.likelihood.mean(whole(x))  # type: ignore[method-assign]
        sized.score = lambda x: sized.nll(whole(x), x)  # type: ignore[method-assign]
    return sized


class Sized:
    """A model for samples of any shape, the last few of which are kept.

    Args:
        model: the model.
        tile: sides of the tiles in which larger samples are processed; 0 processes them whole.
        blend: see `tiled`.
    """

    def __init__(self, model: Autoencoder, tile: int, blend: float = 0.0) -> None:
        if tile < 0:
            raise AezooError(f"tile must be a number of points, or 0 for none, got {tile}")
        if blend and not tile:
            raise AezooError("blend applies to tiles: give tile, too, such as 512")
        self.model, self.tile, self.blend = model, tile, blend
        self._kept: dict[tuple[int, ...], Autoencoder] = {}

    def __call__(self, shape: tuple[int, ...]) -> Autoencoder:
        """The model for samples of a shape.

        Raises:
            AezooError: it does not accept such samples.
        """
        if shape not in self._kept:
            own = self.model.input_shape
            if len(shape) != len(own) or shape[0] != own[0]:
                self.model.check_batch(torch.empty(0, *shape))
            if len(self._kept) >= _MOST_KEPT:
                self._kept.pop(next(iter(self._kept)))
            in_tiles = self.tile and max(shape[1:], default=0) > self.tile
            self._kept[shape] = (
                tiled(self.model, shape[1:], self.tile, self.blend)
                if in_tiles
                else self.model if shape == own else sizes.at_size(self.model, shape[1:])
            )  # fmt: skip
        return self._kept[shape]

    def batch_size(self, samples: SampleSet, batch_size: int) -> int:
        """How many samples to process at a time: fewer than `batch_size` if samples are larger than the model's."""
        if samples.shapes is None and samples.shape == self.model.input_shape:
            return batch_size
        return min(batch_size, max(1, _MOST_VALUES // math.prod(samples.shape)))


def _encoded(model: Autoencoder, x: Tensor) -> Tensor:
    z: Tensor = model.encoder(x)
    return z


def _decoded(model: Autoencoder, z: Tensor) -> Tensor:
    x_hat: Tensor = model.decoder(z)
    return x_hat


def _reconstructed(model: Autoencoder, x: Tensor) -> Tensor:
    return _decoded(model, _encoded(model, x))


class _Tiled(nn.Module):
    """Networks of a model, applied in tiles: (B, C, *grid) -> (B, C', *grid').

    Args:
        model: the model, of any size.
        size: that of the samples.
        tile: points of a tile along each axis.
        blend: see `tiled`.
        apply: applies the networks of the model for a tile to their part of the input.
        scales: points of a sample, of the input and of the output in a block, along each axis; a block is the part of a
            sample for one position of the code.
        channels: of the input.
        network: the network of the samples' size, for its weights.

    Raises:
        AezooError: the output depends on the whole input.
    """

    def __init__(
        self,
        model: Autoencoder,
        size: Sequence[int],
        tile: int,
        blend: float,
        apply: Callable[[Autoencoder, Tensor], Tensor],
        scales: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
        channels: int,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.network, self.channels = network, channels
        self.size, self._apply_part = tuple(size), apply
        self._models: dict[tuple[int, ...], Autoencoder] = {}
        self._model = lambda: model  # not a part of this module
        self.strides, self.scale_in, self.scale_out = scales
        self.blocks = [-(-tile // stride) for stride in self.strides]
        axes = range(len(self.strides))
        self.overlaps = [max(1, int(n * blend)) if blend else 0 for n in self.blocks]
        if blend and min(self.blocks) < 2:
            raise AezooError(f"tiles that overlap need at least {2 * max(self.strides)} points per side, got {tile}")
        self.margins = [0 if blend else self._margin(axis) for axis in axes]

    def forward(self, x: Tensor) -> Tensor:
        if any(self.overlaps):
            return self._blended(x)
        y: Tensor | None = None
        for blocks in itertools.product(*map(self._along, range(len(self.strides)))):
            part = self._part(x, [seen for _, seen in blocks])
            kept: list[Any] = []
            place: list[Any] = []
            for ((start, end), (first, _)), n in zip(blocks, self.scale_out, strict=True):
                kept.append(slice((start - first) * n, (end - first) * n))
                place.append(slice(start * n, end * n))
            y = part.new_empty(*part.shape[:2], *self._grid()) if y is None else y
            y[(..., *place)] = part[(..., *kept)]
        assert y is not None  # a sample has at least one point
        return y

    def _part(self, x: Tensor, blocks: Sequence[tuple[int, int]]) -> Tensor:
        """The output for some blocks along each axis, from the first to before the last."""
        size = [
            min(end * stride, side) - start * stride
            for (start, end), stride, side in zip(blocks, self.strides, self.size, strict=True)
        ]
        seen: list[Any] = [slice(a * n, b * n) for (a, b), n in zip(blocks, self.scale_in, strict=True)]
        return self._apply_part(self._sized(tuple(size)), x[(..., *seen)])

    def _grid(self) -> list[int]:
        """Sides of the output."""
        return [
            side if n == stride else -(-side // stride) * n
            for side, n, stride in zip(self.size, self.scale_out, self.strides, strict=True)
        ]

    def _blended(self, x: Tensor) -> Tensor:
        """The mean of tiles that overlap, each with a weight that rises and falls along each axis."""
        tiles = [self._overlapping(axis) for axis in range(len(self.strides))]
        y: Tensor | None = None
        total = x.new_zeros(self._grid())
        for at in itertools.product(*(range(len(along)) for along in tiles)):
            part = self._part(x, [along[i] for along, i in zip(tiles, at, strict=True)])
            weight, place = total.new_ones(()), list[Any]()
            for axis, i in enumerate(at):
                (start, end), n, side = tiles[axis][i], self.scale_out[axis], part.shape[axis + 2]
                rise = (tiles[axis][i - 1][1] - start) * n if i else 0
                fall = (end - tiles[axis][i + 1][0]) * n if i + 1 < len(tiles[axis]) else 0
                points = torch.arange(side, device=x.device, dtype=total.dtype)
                ramp = points.div(rise).clamp(max=1) if rise else torch.ones_like(points)
                ramp = ramp * (1 - (points - (side - fall)).div(fall).clamp(min=0)) if fall else ramp
                weight = weight[..., None] * ramp
                place.append(slice(start * n, start * n + side))
            y = part.new_zeros(*part.shape[:2], *self._grid()) if y is None else y
            y[(..., *place)] += part * weight
            total[tuple(place)] += weight
        assert y is not None  # a sample has at least one point
        return y / total

    def _overlapping(self, axis: int) -> list[tuple[int, int]]:
        """Blocks of each tile along an axis; the last tile is as large as the others and overlaps more."""
        n, size = -(-self.size[axis] // self.strides[axis]), self.blocks[axis]
        step = size - self.overlaps[axis]
        starts = [*range(0, n - size, step), max(0, n - size)]
        return [(start, min(start + size, n)) for start in starts]

    def _along(self, axis: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Blocks of each tile along an axis, and these with their margins: from the first to before the last."""
        n, margin = -(-self.size[axis] // self.strides[axis]), self.margins[axis]
        for start in range(0, n, self.blocks[axis]):
            end = min(start + self.blocks[axis], n)
            yield (start, end), (max(0, start - margin), min(end + margin, n))

    def _sized(self, size: tuple[int, ...]) -> Autoencoder:
        if size not in self._models:
            self._models[size] = sizes.at_size(self._model(), size)
            _check_places(self._models[size], self.strides)
        return self._models[size]

    def _margin(self, axis: int) -> int:
        """Blocks on either side of a block on which its output depends."""
        model = self._model()
        for n in _BLOCKS:
            size = [stride * (n if i == axis else 1) for i, stride in enumerate(self.strides)]
            grid = [n_in * (n if i == axis else 1) for i, n_in in enumerate(self.scale_in)]
            sized = sizes.at_size(model, size)
            _check_places(sized, self.strides)
            x = reference_tensor(model).new_zeros(1, self.channels, *grid)
            x.narrow(axis + 2, n // 2 * self.scale_in[axis], self.scale_in[axis]).fill_(torch.nan)
            with torch.no_grad():
                y = self._apply_part(sized, x)
            depends = y.isnan().movedim(axis + 2, 0).flatten(1).any(1) if y.ndim == x.ndim else y.new_zeros(0)
            if len(depends) != n * self.scale_out[axis] or not depends.any():
                raise _refusal(model, "its output is not a map whose positions correspond to those of its input")
            seen = depends.nonzero()[:, 0] // self.scale_out[axis]
            first, last = int(seen.min()), int(seen.max())
            if first > 0 and last < n - 1:
                return max(n // 2 - first, last - n // 2)
        raise _refusal(
            model,
            "each value of its output depends on the whole sample (attention, or a normalisation over positions): "
            "leave tile out, train with --model.net conv, conv_keras, gdn or convnext, or blend tiles that overlap, "
            "which differs from the whole (blend 0.25 of reconstruct, denoise and aezoo.tiled)",
        )


def _check_places(sized: Autoencoder, strides: Sequence[int]) -> None:
    if sized.code_shape[1:] != sizes.code_grid(sized.input_shape[1:], strides):
        sides = "x".join(map(str, sized.input_shape[1:]))
        raise _refusal(sized, f"it pads samples of {sides}")


def _refusal(model: Autoencoder, reason: str) -> AezooError:
    return AezooError(f"{display_name(type(model))} cannot process tiles: {reason}")
