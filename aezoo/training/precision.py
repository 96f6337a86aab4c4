"""Numbers that must stay exact under autocast."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Values in float32 if their precision is lower, for computations that must stay exact under autocast."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
