"""Laws of MMVAE+: which code says what of which part, its two limits, and exact evidence."""

from typing import Any

import pytest
import torch
from multimodal_laws import (
    CODE,
)
from torch import Tensor

M, P = 3, 2


def with_draws(model: Any, x: Tensor, *draws: Tensor) -> Any:
    """The loss, whose draws are these in this order."""
    left = iter(draws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda like: next(left).expand_as(like))
        return model.loss(x)


def noise(n: int = 5) -> tuple[Tensor, Tensor]:
    """Of the codes of each part; of the private code of each, the last but one dimension, with the u of each."""
    return torch.randn(n, M, CODE + P, dtype=torch.float64), torch.randn(n, M, M, P, dtype=torch.float64)


def split_parts(values: Tensor) -> tuple[Tensor, Tensor]:
    return values[..., :CODE], values[..., CODE:]
