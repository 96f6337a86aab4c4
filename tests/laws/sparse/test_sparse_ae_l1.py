"""Laws of Sparse autoencoder with an L1 penalty on its code, a Laplace prior (Olshausen & Field 1996)."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from sparse_laws import (  # noqa: F401
    build,
    data,
    test_invalid_values_are_refused,
)
from torch import Tensor

import aezoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- sparse_ae_l1 ----------------------------------------------------------------------------------------------------


def test_l1_weight_0_equals_relu_autoencoder(shifted: Any) -> None:
    x, found = data(6), []
    for name, extra in (("sparse_ae_l1", {"l1": 0.0}), ("dense_ae", {"code_activation": "relu"})):
        torch.manual_seed(0)
        model = shifted(build(name, latent_dim=9, hidden_dims=(8,), **extra))
        model.loss(x)["loss"].backward()
        found.append((model.loss(x)["loss"], model.encode(x), *(p.grad for p in model.parameters())))
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_glorot_weights_and_zero_biases_of_any_network() -> None:
    for net, layers in (("mlp", 4), ("conv", 6)):
        settings = {"net": net, "hidden_dims": (8, 8), "latent_dim": 40, "weight_init": "glorot"}
        model = aezoo.create_model("sparse_ae_l1", (1, 16, 16), **settings)
        found = [m for m in model.modules() if hasattr(m, "bias")]
        assert len(found) >= layers and not any(m.bias.any() for m in found)
        code = next(m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 40)
        limit = (6 / (code.in_features + 40)) ** 0.5
        assert 0.95 * limit < code.weight.abs().max() <= limit


def test_l1_penalty_is_summed_in_nats_per_sample(shifted: Any) -> None:
    model, x = shifted(build("sparse_ae_l1", l1=0.7, latent_dim=9)), data(6)
    terms, h = model.loss(x), model.encode(x)
    torch.testing.assert_close(terms["loss"] - terms["nll"], 0.7 * h.norm(p=1, dim=1).mean())
    torch.testing.assert_close(terms["nll"], model.score(x).mean())
    assert (h == 0).any()
    (a,) = torch.autograd.grad(terms["loss"] - terms["nll"], model.encoder[1].bias)
    torch.testing.assert_close(a, 0.7 * (h > 0).double().mean(0))


def test_scaling_code_down_always_lowers_loss(shifted: Any) -> None:
    """Hence unit norms or weight decay are needed, as the docstring says."""
    model, x = shifted(build("sparse_ae_l1", l1=0.7, latent_dim=9)), data(6)
    found = [model.loss(x)]
    for _ in range(3):
        with torch.no_grad():
            for p in (model.encoder[1].weight, model.encoder[1].bias):
                p /= 10
            model.decoder[1].weight *= 10
        found.append(model.loss(x))
    for before, after in pairwise(found):
        torch.testing.assert_close(after["nll"], before["nll"])
        torch.testing.assert_close(after["l1"], before["l1"] / 10)
        assert after["loss"] < before["loss"]


@pytest.mark.slow
def test_activity_falls_with_the_l1_weight(digits: Tensor, adam: Any) -> None:
    x, activity, active = digits[:1437].float(), [], []
    for l1 in (0.0, 0.3, 3.0):
        torch.manual_seed(0)
        model = aezoo.create_model("sparse_ae_l1", input_shape=(1, 8, 8), l1=l1, latent_dim=64)
        adam(model, x, steps=300, lr=3e-3, batch=128)
        h = model.encode(x).detach()
        activity.append(h.abs().mean().item())
        active.append((h > 0).double().mean().item())
    assert activity[0] > 1.5 * activity[1] > 1.5 * 1.5 * activity[2]
    assert active[0] > active[2]
