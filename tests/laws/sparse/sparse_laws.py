"""Laws of the sparse models: special cases, Bernoulli divergence, top-k, AuxK's gradient, unit norm, dead latents."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import aezoo

SHAPE = (2, 3, 4)


def data(n: int) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def build(name: str, **settings: Any) -> Any:
    return aezoo.create_model(name, input_shape=SHAPE, **settings).double()


# ---- topk_sae: Gao et al. 2024 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sparse_ae_l1", {"l1": -0.1}),
        ("sparse_ae_l1", {"l1": math.inf}),
        ("sparse_ae_kl", {"rho": 0.0}),
        ("sparse_ae_kl", {"rho": 1.0}),
        ("sparse_ae_kl", {"beta": -1.0}),
        ("sparse_ae_kl", {"l2": -1.0}),
        ("sparse_ae_kl", {"l2": math.nan}),
        ("topk_sae", {"k": 0}),
        ("topk_sae", {"k": 13, "latent_dim": 12}),
        ("topk_sae", {"k_aux": -1}),
        ("topk_sae", {"dead_after": 0}),
        ("topk_sae", {"aux_weight": -1.0}),
    ],
)
def test_invalid_values_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(aezoo.AezooError, match=next(iter(settings))):
        build(name, **settings)
