"""Replaces layers and likelihoods of a model by faster ones, and restores them."""

import itertools
from collections.abc import Iterator

from torch import nn

from aezoo.nets.build import ACTIVATIONS
from aezoo.speed import linear
from aezoo.speed.conv2d import Conv2d, ConvTranspose2d, NarrowConv2d, NarrowConvTranspose2d
from aezoo.speed.linear import Linear
from aezoo.speed.memory_format import LIKELIHOODS, Flatten, Unflatten
from aezoo.speed.parts import is_enabled
from aezoo.speed.swapping import Swapped

_CONVOLUTIONS: tuple[type[Swapped], ...] = (Conv2d, ConvTranspose2d, NarrowConv2d, NarrowConvTranspose2d)
_ACTIVATIONS = (*ACTIVATIONS.values(),)


def swap_in(module: nn.Module, input_shape: tuple[int, ...] = (), channels_last: bool = False) -> list[Swapped]:
    """Swap faster classes into all parts of a module whose class is exactly the one that they replace.

    Args:
        module: the model.
        input_shape: shape of a sample.
        channels_last: whether the model's images have channels last in memory.

    Returns:
        The parts, to be restored by `swap_out`, without those that another call has swapped.
    """
    faster: dict[type[nn.Module], type[Swapped]] = {kind.plain: kind for kind in _CONVOLUTIONS}
    if linear.MKL_HALF_WIDTH and is_enabled("linear"):
        faster[nn.Linear] = Linear
    if channels_last:
        faster |= {nn.Flatten: Flatten, nn.Unflatten: Unflatten, **LIKELIHOODS}
    swapped = []
    for part in module.modules():
        kind = faster.get(type(part))
        # the decoder's first feature map, but not its output, is followed by layers that keep its memory layout
        if kind is None or (isinstance(part, nn.Unflatten) and tuple(part.unflattened_size) == input_shape):
            continue
        part.__class__ = kind  # type: ignore[assignment]
        swapped.append(part)
    if linear.MKL_HALF_WIDTH and is_enabled("batch_inner"):
        _mark_sequences(module)
    return swapped  # type: ignore[return-value]


def swap_out(parts: list[Swapped]) -> None:
    """Make these parts plain again."""
    for part in parts:
        if isinstance(part, Swapped):  # not if other code has changed its class since
            part.swap_out()


def _mark_sequences(module: nn.Module) -> None:
    """Set `feeds_convolutions` of convolutions that are followed by another, or by a flattening, in a sequence."""
    for part in module.modules():
        if isinstance(part, nn.Sequential):
            layers = [layer for layer in _in_order(part) if not isinstance(layer, _ACTIVATIONS)]
            for layer, after in itertools.pairwise(layers):
                if isinstance(layer, Conv2d | ConvTranspose2d):
                    layer.feeds_convolutions = isinstance(after, Conv2d | ConvTranspose2d | Flatten)


def _in_order(sequence: nn.Sequential) -> Iterator[nn.Module]:
    for layer in sequence:
        if isinstance(layer, nn.Sequential):
            yield from _in_order(layer)
        else:
            yield layer
