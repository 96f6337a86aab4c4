"""Laws of k-sparse autoencoder (Makhzani & Frey 2013)."""

from typing import Any

import numpy as np
import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from sae_laws import (  # noqa: F401
    build,
    data,
    gap,
    gradients,
    test_invalid_values_are_refused,
    trained,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- k_sparse: Makhzani & Frey 2013 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 11, 12])
def test_k_largest_signed_units_are_kept(k: int, shifted: Any) -> None:
    model, x = shifted(build("k_sparse", latent_dim=12, k=k)), data(30) - 0.5
    z = (x.flatten(1) @ model.encoder.weight.T + model.encoder.bias).detach().numpy()
    support = np.argsort(-z, axis=1)[:, :k]
    kept = np.zeros_like(z)
    np.put_along_axis(kept, support, np.take_along_axis(z, support, 1), 1)
    found = model.encode(x)
    np.testing.assert_allclose(found.detach().numpy(), kept, atol=1e-12)
    assert ((found != 0).sum(1) == k).all()
    assert model.loss(x)["l0"] == k
    # z is kept with its sign, without ReLU or absolute values
    assert (kept < 0).any() or k < 5
    by_size = np.argsort(-np.abs(z), axis=1)[:, :k]
    assert k == 12 or (np.sort(by_size) != np.sort(support)).any()


def test_all_units_equal_tied_linear_autoencoder(shifted: Any) -> None:
    x = data(9)
    model, linear = shifted(build("k_sparse", latent_dim=12, k=12)), build("linear_ae", latent_dim=12)
    with torch.no_grad():
        linear.encoder[1].weight.copy_(model.encoder.weight)
        linear.encoder[1].bias.copy_(model.encoder.bias)
        linear.decoder[0].weight.copy_(model.encoder.weight.T)
        linear.decoder[0].bias.copy_(model.decoder.bias)
    torch.testing.assert_close(model.encode(x), linear.encode(x))
    torch.testing.assert_close(model(x), linear(x))
    found, expected = model.loss(x)["loss"], linear.loss(x)["loss"]
    torch.testing.assert_close(found, expected)
    down, up = torch.autograd.grad(expected, (linear.encoder[1].weight, linear.decoder[0].weight))
    (tied,) = torch.autograd.grad(found, model.encoder.weight)
    torch.testing.assert_close(tied, down + up.T)
    assert gap(tied, down) > 1e-2  # the decoder also contributes to the gradient of tied weights
    assert sum(p.numel() for p in model.parameters()) == 12 * 24 + 12 + 24


def test_unselected_units_get_no_gradient(shifted: Any) -> None:
    model, x = shifted(build("k_sparse", latent_dim=12, k=2, start_k=9, k_steps=10)), data(2)
    for steps, mode in ((10, True), (0, False)):
        model.train(mode).steps.fill_(steps)
        found = gradients(model.loss(x)["loss"], model)
        idle = ~(model.encode(x) != 0).any(0)
        assert 8 <= idle.sum() <= 10
        for name in ("encoder.weight", "encoder.bias"):
            assert torch.equal(found[name].reshape(12, -1).abs().amax(1) == 0, idle)


def test_k_falls_linearly_and_evaluation_uses_the_last(shifted: Any, quiet: Any) -> None:
    model, x = shifted(build("k_sparse", latent_dim=12, k=3, start_k=11, k_steps=6)).float(), data(250).float()
    seen = trained(model, x, quiet, lambda module, terms: float(terms["l0"]))
    expected = [11, 10, 8, 7, 6, 4, 3, 3, 3, 3]  # 11 - 8 t / 6, rounded
    assert seen == expected
    fresh = shifted(build("k_sparse", latent_dim=12, k=3, start_k=11, k_steps=6))
    assert fresh.train().loss(data(5))["l0"] == 11
    assert fresh.eval().loss(data(5))["l0"] == 3
    assert build("k_sparse", latent_dim=12, k=3, start_k=11).train().loss(data(5))["l0"] == 3


@pytest.mark.parametrize(("alpha", "kept"), [(1.0, 5), (1.3, 6), (2.4, 12), (0.01, 1)])
def test_codes_keep_alpha_k_units_and_the_loss_keeps_k(alpha: float, kept: int, shifted: Any) -> None:
    model, x = shifted(build("k_sparse", latent_dim=12, k=5, alpha=alpha)), data(7)
    for mode in (True, False):
        model.train(mode)
        assert ((model.encode(x) != 0).sum(1) == kept).all()
        assert model.loss(x)["l0"] == 5
        assert torch.equal(model(x), model.decode(model.encode(x)))
    assert (gap(model.loss(x)["nll"], model.score(x).mean()) < 1e-9) == (kept == 5)
