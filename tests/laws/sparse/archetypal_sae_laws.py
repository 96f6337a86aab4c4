"""Laws of AbsTopK SAE, whose codes have both signs, and RA-SAE, whose directions are mixtures of data."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import aezoo

SHAPE = (2, 3, 4)


SMALL = {"latent_dim": 12, "k": 3}


DEAD = torch.tensor([2, 5, 7])


create: Any = aezoo.create_model


def data(n: int) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def build(name: str, **settings: Any) -> Any:
    return create(name, input_shape=SHAPE, **(SMALL | settings)).double()


def same_gradients(model: Any, first: Tensor, second: Tensor) -> None:
    found = [torch.autograd.grad(value, [*model.parameters()], retain_graph=True) for value in (first, second)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# ---- abs_topk_sae: Zhu et al. 2025 -----------------------------------------------------------------------------------


def largest(pi: Tensor, k: int) -> Tensor:
    """The k entries of each row that are largest in absolute value, by a loop."""
    f = torch.zeros_like(pi)
    for row, values in enumerate(pi.tolist()):
        for i in sorted(range(len(values)), key=lambda i: -abs(values[i]))[:k]:
            f[row, i] = pi[row, i]
    return f


# ---- ra_sae: Fel et al. 2025 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("abs_topk_sae", {"k": 0}),
        ("abs_topk_sae", {"k": 13}),
        ("abs_topk_sae", {"aux_scale": "mse"}),
        ("ra_sae", {"n_points": 0}),
        ("ra_sae", {"delta": -0.1}),
        ("ra_sae", {"delta": math.inf}),
        ("ra_sae", {"delta": math.nan}),
        ("ra_sae", {"k": 13}),
    ],
)
def test_invalid_values_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(aezoo.AezooError, match=next(iter(settings))):
        build(name, **settings)
