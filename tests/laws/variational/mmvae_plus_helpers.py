"""Helpers of the laws of MMVAE+ and CMVAE."""

from typing import Any

import pytest
import torch
from multimodal_laws import (
    CODE,
)
from torch import Tensor

M, P = 3, 2


def with_draws(model: Any, x: Tensor, *draws: Tensor) -> Any:
    """The loss with the given noise in the order of its draws."""
    left = iter(draws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda like: next(left).expand_as(like))
        return model.loss(x)


def noise(n: int = 5) -> tuple[Tensor, Tensor]:
    """Noise of (u, w) from the encoder of each part, (B, M, E), and of w_j ~ r_j for u from part i, (B, M, M, P)."""
    return torch.randn(n, M, CODE + P, dtype=torch.float64), torch.randn(n, M, M, P, dtype=torch.float64)


def split_parts(values: Tensor) -> tuple[Tensor, Tensor]:
    return values[..., :CODE], values[..., CODE:]
