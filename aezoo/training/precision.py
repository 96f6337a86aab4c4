"""Numbers that must stay exact under autocast, and bytes as numbers."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Values in float32 if their precision is lower, for computations that must stay exact under autocast."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def from_bytes(x: Tensor) -> Tensor:
    """Bytes as values from 0 to 1, as the DataModule gives them; anything else unchanged."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x
