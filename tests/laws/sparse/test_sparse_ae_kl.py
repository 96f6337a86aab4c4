"""Laws of Sparse autoencoder with a target activation (Ng 2011, CS294A notes)."""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from sparse_laws import (  # noqa: F401
    SHAPE,
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

# ---- sparse_ae_kl ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.01, 0.05, 0.4])
def test_sparsity_matches_bernoulli_kl(rho: float, shifted: Any) -> None:
    model, x = shifted(build("sparse_ae_kl", rho=rho, beta=2.0, latent_dim=9)), data(6)
    terms, h = model.loss(x), model.encode(x)
    assert 0 < h.min() <= h.max() < 1
    rho_hat = h.mean(0)
    expected = D.kl_divergence(D.Bernoulli(torch.full_like(rho_hat, rho)), D.Bernoulli(rho_hat)).sum()
    torch.testing.assert_close(terms["sparsity"], expected)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 2 * expected + 1e-4 * terms["l2"])
    # the divergence of the mean activity, not the mean of each sample's divergence
    each = torch.stack([model.sparsity(row) for row in h]).mean()
    assert (each - expected).abs() > 1e-3


@pytest.mark.parametrize("rho", [0.01, 0.05, 0.4])
def test_divergence_vanishes_only_at_target(rho: float) -> None:
    model = build("sparse_ae_kl", rho=rho, latent_dim=3)
    for r in (1e-9, 1e-4, rho / 2, rho, (1 + rho) / 2, 1 - 1e-9):
        rho_hat = torch.full((3,), r, dtype=torch.float64, requires_grad=True)
        value = model.sparsity(rho_hat)
        (slope,) = torch.autograd.grad(value, rho_hat)
        if r == rho:
            assert abs(value.item()) < 1e-12
            assert slope.abs().max() < 1e-12
        else:
            assert value > 1e-4
            assert (slope * (r - rho) > 0).all()
            torch.testing.assert_close(slope, torch.full_like(slope, (r - rho) / (r * (1 - r))), rtol=1e-6, atol=0)


def test_sparsity_gradient_matches_finite_differences(shifted: Any) -> None:
    model, x = shifted(build("sparse_ae_kl", latent_dim=5, beta=3.0, l2=0.0)), data(4)
    parameter, h = model.encoder[1].weight, 1e-5
    terms = model.loss(x)
    (found,) = torch.autograd.grad(terms["loss"] - terms["nll"], parameter)
    with torch.no_grad():
        for i, j in ((0, 0), (1, 7), (4, 23)):
            ends = []
            for step in (h, -2 * h):
                parameter[i, j] += step
                terms = model.loss(x)
                ends.append(3 * terms["sparsity"])
            parameter[i, j] += h
            assert abs((ends[0] - ends[1]) / (2 * h) - found[i, j]) < 1e-7


@pytest.mark.parametrize("logit", [-60.0, -20.0, -3.0, 3.0, 12.0])
def test_saturated_unit_keeps_kl_gradient(logit: float) -> None:
    """With equal activations the gradient of the pre-activation is rhohat - rho, however small rhohat is."""
    model = aezoo.create_model("sparse_ae_kl", input_shape=SHAPE, rho=0.2, latent_dim=3)
    pre = torch.full((3,), logit, requires_grad=True)
    (slope,) = torch.autograd.grad(model.sparsity(pre.sigmoid()), pre)
    torch.testing.assert_close(slope, pre.sigmoid().detach() - 0.2, rtol=2e-2, atol=0)


def of_ng(model: Any, x: Tensor, rho: float, beta: float, decay: float) -> Tensor:
    """J_sparse of the notes for one sigmoid layer and a linear one, with loops over units and layers."""
    flat, down, up = x.flatten(1), model.encoder[1], model.decoder[1]
    h = torch.sigmoid(flat @ down.weight.T + down.bias)
    J = 0.5 * (h @ up.weight.T + up.bias - flat).square().sum(1).mean()
    for W in (down.weight, up.weight):
        J = J + decay / 2 * sum(row.square().sum() for row in W)
    for r in h.mean(0):
        J = J + beta * (rho * torch.log(rho / r) + (1 - rho) * torch.log((1 - rho) / (1 - r)))
    return J


def test_squared_error_is_twice_published_objective(shifted: Any) -> None:
    """The defaults are the notes' beta = 3 and lambda = 1e-4."""
    model, x = shifted(build("sparse_ae_kl", likelihood="gaussian", latent_dim=9)), data(6)
    constant = 12 * math.log(math.pi)
    found, expected = model.loss(x)["loss"], constant + 2 * of_ng(model, x, 0.05, 3, 1e-4)
    torch.testing.assert_close(found, expected)
    a, e = (torch.autograd.grad(value, [*model.parameters()]) for value in (found, expected))
    for mine, theirs in zip(a, e, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert (expected - constant - 2 * of_ng(model, x, 0.05, 3, 0)) > 1e-3


@pytest.mark.parametrize("net", ["mlp", "conv", "vit", "lstm"])
def test_weights_decay_and_biases_do_not(net: str, shifted: Any) -> None:
    shape = (2, 12) if net == "lstm" else (2, 4, 4)
    settings = {"net": net, "hidden_dims": (8, 8), "latent_dim": 5, "beta": 0.0}
    model = shifted(aezoo.create_model("sparse_ae_kl", shape, l2=0.25, **settings).double())
    terms = model.loss(torch.rand(3, *shape, dtype=torch.float64))
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(terms["loss"] - terms["nll"], parameters)
    for name, p, g in zip(names, parameters, found, strict=True):
        expected = 0.5 * p if p.ndim > 1 else torch.zeros_like(p)
        torch.testing.assert_close(g, expected.detach(), rtol=1e-6, atol=1e-9, msg=name)
    assert sum(p.ndim > 1 for p in parameters) >= 4


@pytest.mark.parametrize("l2", [0.0, 1e-4])
def test_weight_decay_prevents_evading_divergence(l2: float, shifted: Any) -> None:
    """Units scaled to rho + eps (h - mean of h), and a decoder divided by eps, have no divergence and a similar nll."""
    model, x = shifted(build("sparse_ae_kl", latent_dim=5, l2=l2)), data(200)
    down, up, eps, rho = model.encoder[1], model.decoder[1], 1e-4, 0.05
    with torch.no_grad():
        before, pre = model.loss(x), down(x.flatten(1))
        h = pre.sigmoid()
        # for small eps a unit is linear, with slope rho (1 - rho)
        shrink = eps * (h * (1 - h)).mean(0) / (rho * (1 - rho))
        up.bias += up.weight @ (h.mean(0) - rho / eps)
        up.weight /= eps
        down.bias.copy_(math.log(rho / (1 - rho)) - shrink * (pre - down.bias).mean(0))
        down.weight *= shrink[:, None]
        after = model.loss(x)
    assert before["sparsity"] > 1 and after["sparsity"] < 1e-6
    assert (after["nll"] - before["nll"]).abs() < 0.5
    assert (after["loss"] < before["loss"]) == (l2 == 0)
