"""Numbers that must stay exact under autocast and in half precision, and bytes as numbers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_HALF = (torch.bfloat16, torch.float16)


def at_least_float32(values: Tensor) -> Tensor:
    """Values in float32 if their precision is lower, for computations that must stay exact under autocast."""
    return values.float() if values.dtype in _HALF else values


@contextmanager
def buffers_kept_in_float32(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """For `nn.Module._apply`: within it, a cast to half precision does not change these buffers of a module.

    A step of a running mean below 1/256 of its value would have no effect in bfloat16.
    """
    before = {name: getattr(module, name) for name in names}
    yield
    for name, values in before.items():
        after = getattr(module, name)
        if values is not None and after is not None and after.dtype in _HALF:
            setattr(module, name, values.to(after.device))  # restores the bits that the cast has dropped


def from_bytes(x: Tensor) -> Tensor:
    """Bytes as values from 0 to 1, as the DataModule gives them; anything else unchanged."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x
