"""Laws of the objectives other than the ELBO: neutral settings, closed forms of penalties, schedules, mistakes."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from torch import Tensor
from two_ranks import on_two_ranks

import aezoo
from aezoo.testing import SharedNoise

SHAPE, CODE = (2, 3, 3), 5


def small(name: Any, **settings: Any) -> Any:
    """A model in float64 by its registry name or its class."""
    make = (lambda **s: aezoo.create_model(name, **s)) if isinstance(name, str) else name
    return make(input_shape=SHAPE, latent_dim=CODE, hidden_dims=(16,), **settings).double()


def images(n: int = 6) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def posterior(n: int = 6) -> tuple[Tensor, Tensor]:
    """Random means, correlated between dimensions, and log-variances."""
    mixing = torch.randn(CODE, CODE, dtype=torch.float64)
    mu = torch.randn(n, CODE, dtype=torch.float64) @ mixing + torch.linspace(-1, 2, CODE, dtype=torch.float64)
    return mu.requires_grad_(), (torch.randn(n, CODE, dtype=torch.float64) - 1).requires_grad_()


def at(model: Any, mu: Tensor, log_var: Tensor) -> Any:
    """The model with a given posterior for a batch of its size."""
    model.posterior = lambda x: (mu, log_var)
    return model


def reference_kl(mu: Tensor, log_var: Tensor) -> Tensor:
    q = D.Normal(mu, (0.5 * log_var).exp())
    return D.kl_divergence(q, D.Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1)


def gradients(value: Tensor, of: tuple[Tensor, ...]) -> list[Tensor]:
    found = torch.autograd.grad(value, of, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, of, strict=True)]


def same(found: Tensor, expected: Tensor, of: tuple[Tensor, ...]) -> None:
    """Value and gradient agree."""
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, of), gradients(expected, of), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


# ---- neutral settings ------------------------------------------------------------------------------------------------


NEUTRAL: dict[str, dict[str, Any]] = {
    "beta_vae": {"beta": 1.0},
    "annealed_vae": {"gamma": 1.0, "max_capacity": 0.0},
    "dip_vae_i": {"off_diagonal": 0.0, "diagonal": 0.0},
    "dip_vae_ii": {"off_diagonal": 0.0, "diagonal": 0.0},
    "info_vae": {"alpha": 0.0, "mmd_weight": 1.0},
}


# each setting by which a model differs from the VAE, one at a time
ACTIVE: list[tuple[str, dict[str, Any]]] = [
    ("beta_vae", {}),
    ("annealed_vae", {"gamma": 2.0, "max_capacity": 0.0}),
    ("dip_vae_i", {"off_diagonal": 1000.0, "diagonal": 0.0}),
    ("dip_vae_i", {"off_diagonal": 0.0, "diagonal": 1.0}),
    ("dip_vae_ii", {"off_diagonal": 1000.0, "diagonal": 0.0}),
    ("dip_vae_ii", {"off_diagonal": 0.0, "diagonal": 1.0}),
    ("info_vae", {"alpha": 0.5, "mmd_weight": 1.0}),
    ("info_vae", {"alpha": 0.0, "mmd_weight": 2.0}),
]


def build_pair(name: str, settings: dict[str, Any], shifted: Any, **parent: Any) -> tuple[Any, Any]:
    """The model and a VAE with the same weights, away from their initial values."""
    model, vae = small(name, **settings), small("vae", **parent)
    shifted(vae)
    model.load_state_dict(vae.state_dict() | {k: v for k, v in model.state_dict().items() if k not in vae.state_dict()})
    return model, vae


def losses(*models: Any, x: Tensor, training: bool = True) -> list[dict[str, Tensor]]:
    """The loss of each model with the same noise; gradients are in `grad` of the parameters."""
    found = []
    for model in models:
        torch.manual_seed(3)
        found.append(model.train(training).loss(x))
        model.zero_grad()
        found[-1]["loss"].backward()
    return found


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_setting_equals_vae(name: str, training: bool, shifted: Any) -> None:
    model, vae = build_pair(name, NEUTRAL[name], shifted)
    x = images()
    mine, theirs = losses(model, vae, x=x, training=training)
    for term in ("loss", "nll", "kl", "elbo"):
        torch.testing.assert_close(mine[term], theirs[term], rtol=0, atol=1e-5)
        torch.testing.assert_close(mine[term], theirs[term], rtol=1e-12, atol=1e-12)
    assert theirs["kl"] > 0.5
    for p, q in zip(model.parameters(), vae.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "settings"), ACTIVE, ids=lambda value: str(value))
def test_active_setting_differs_from_vae(name: str, settings: dict[str, Any], shifted: Any) -> None:
    model, vae = build_pair(name, settings, shifted)
    mine, theirs = losses(model, vae, x=images())
    assert (mine["loss"] - theirs["loss"]).abs() > 1e-3
    assert any((p.grad - q.grad).abs().max() > 1e-4 for p, q in zip(model.parameters(), vae.parameters(), strict=True))


@pytest.mark.parametrize("name", NEUTRAL)
def test_inference_equals_vae_for_every_objective(name: str, shifted: Any) -> None:
    model, vae = build_pair(name, {}, shifted)
    x, found = images(), []
    for each in (model.eval(), vae.eval()):
        torch.manual_seed(5)
        found.append([each.encode(x), each(x), each.score(x), each.log_likelihood(x, 20), each.sample(3)])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["dip_vae_i", "dip_vae_ii", "info_vae", "sigma_vae"])
def test_beta_and_capacity_apply_to_kl_term(name: str, shifted: Any) -> None:
    """BetaAnnealing sets `beta` and `capacity`; the model's other terms stay the same."""
    model, x, found = shifted(small(name)), images(), []
    for beta, capacity in ((1.0, 0.0), (0.25, 0.0), (0.25, 90.0)):
        model.beta, model.capacity = beta, capacity
        found += losses(model, x=x)
    kl = found[0]["kl"]
    assert kl > 0.1
    torch.testing.assert_close(found[1]["loss"], found[0]["loss"] - 0.75 * kl)
    torch.testing.assert_close(found[2]["loss"], found[0]["loss"] - kl + 0.25 * (90 - kl))


@pytest.mark.parametrize("name", ["annealed_vae", "dip_vae_i", "dip_vae_ii", "info_vae", "sigma_vae"])
def test_two_ranks_equal_one_process(name: str, shifted: Any) -> None:
    """Terms and gradients, for annealed_vae with one rank's KL below and the other's above the capacity."""
    model, x = shifted(small(name)), images()
    kl_B = reference_kl(*model.posterior(x)).detach()
    x = x[kl_B.argsort()]
    if name == "annealed_vae":
        model.max_capacity, model.capacity_steps = kl_B.median().item(), 1
        model.steps.fill_(1)
    with SharedNoise(range(6), 6):
        whole = model.loss(x)
    together = on_two_ranks(model, x)
    assert together.terms.keys() == whole.keys()
    for term in whole:
        torch.testing.assert_close(together.terms[term], whole[term])
    expected = torch.autograd.grad(whole["loss"], [*model.parameters()])
    for found, g in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(found, g)
    assert (on_two_ranks(model, x, exchange=False).terms["loss"] - whole["loss"]).abs() > 1e-3


# ---- covariance of the codes: Kumar et al. 2018 ----------------------------------------------------------------------


def covariance(name: str, mu: Tensor, log_var: Tensor) -> np.ndarray:
    """The covariance that is penalised, by numpy."""
    found: np.ndarray = np.cov(mu.detach().numpy().T, bias=True)
    return found + (np.diag(log_var.detach().exp().mean(0).numpy()) if name == "dip_vae_ii" else 0)


def dip_law(cls: Any, name: str) -> None:
    """The penalties and their gradients equal those with the covariance of numpy and of torch."""
    mu, log_var = posterior(8)
    terms = at(small(cls, off_diagonal=3.0, diagonal=0.7), mu, log_var).loss(images(8))
    C = covariance(name, mu, log_var)
    assert terms["off_diagonal"].item() == pytest.approx((C**2).sum() - (np.diag(C) ** 2).sum(), rel=1e-9)
    assert terms["diagonal"].item() == pytest.approx(((np.diag(C) - 1) ** 2).sum(), rel=1e-9)
    cov = torch.cov(mu.T, correction=0) + (log_var.exp().mean(0).diag() if name == "dip_vae_ii" else 0)
    torch.testing.assert_close(cov.detach(), torch.from_numpy(C))
    off = cov[~torch.eye(CODE, dtype=torch.bool)]
    penalty = 3 * (off**2).sum() + 0.7 * ((cov.diagonal() - 1) ** 2).sum()
    same(terms["loss"] - terms["nll"], reference_kl(mu, log_var).mean() + penalty, (mu, log_var))


@pytest.mark.parametrize("name", ["dip_vae_i", "dip_vae_ii"])
def test_dip_penalty_matches_numpy_covariance(name: str) -> None:
    dip_law(name, name)


# ---- invalid values --------------------------------------------------------------------------------------------------


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("beta_vae", {"beta": -1.0}, "beta must"),
    ("sigma_vae", {"beta": -0.1}, "beta must"),
    ("annealed_vae", {"gamma": -1.0}, "gamma must"),
    ("annealed_vae", {"gamma": math.inf}, "gamma takes a finite"),
    ("annealed_vae", {"max_capacity": -0.1}, "max_capacity must"),
    ("annealed_vae", {"capacity_steps": 0}, "capacity_steps must"),
    *((f"dip_vae_{n}", {name: -1.0}, f"{name} must") for n in ("i", "ii") for name in ("off_diagonal", "diagonal")),
    ("info_vae", {"alpha": 1.5}, "alpha must"),
    ("info_vae", {"alpha": 0.2, "mmd_weight": 0.7}, "at least 1 - alpha = 0.8"),
    ("info_vae", {"kernel": "linear"}, "inverse_multiquadratic or rbf"),
    ("info_vae", {"bandwidth": 0.0}, "bandwidth must"),
]


@pytest.mark.parametrize(("name", "settings", "words"), BAD, ids=lambda value: str(value))
def test_invalid_values_are_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(aezoo.AezooError, match=words) as error:
        aezoo.create_model(name, input_shape=(4,), **settings)
    assert "\n" not in str(error.value)
    for each in (*NEUTRAL, "sigma_vae"):
        with pytest.raises(aezoo.AezooError, match="latent_dim"):
            aezoo.create_model(each, input_shape=(4,), latent_dim=0)
