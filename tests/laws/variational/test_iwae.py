"""Laws of the importance weighted autoencoder (Burda et al. 2015)."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_gradients_with_other_settings_are_derivatives,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from importance_bound_laws import (  # noqa: F401
    OFF_LOG_VAR,
    OFF_MU,
    POINT,
    SETTINGS,
    PyTorchVAE,
    at,
    codes,
    data,
    evidence,
    exact_bound,
    small,
    test_a_linear_model_becomes_probabilistic_pca,
    test_encoder_runs_once_and_codes_are_decoded_once,
    test_importance_bound_satisfies_every_law,
    test_inference_equals_parent,
    test_invalid_values_are_refused,
    test_neutral_setting_equals_multi_sample_vae,
    test_noise_is_independent_per_sample_and_draw,
    test_reparam_and_dreg_are_unbiased,
    test_stl_is_unbiased_for_single_sample_bounds_only,
    test_true_posterior_gives_evidence_without_noise,
    test_weights_that_underflow_leave_finite_gradients,
    test_wrong_importance_bounds_are_detected,
    true_posterior,
    unbiased_law,
)
from torch import Tensor

import aezoo
from aezoo import testing
from aezoo.callbacks.annealing import BetaAnnealing

# ---- values and gradients of one draw --------------------------------------------------------------------------------


def test_losses_of_0_and_9_nats_give_log_2() -> None:
    model = at(small("iwae", n_samples=2), torch.zeros(1, 4).double(), torch.zeros(1, 4).double())  # q = p: w = p(x|z)
    model.nll_given = lambda x, z: torch.tensor([[0.0, 9.0]]).double()
    assert model.loss(data(1))["loss"].item() == pytest.approx(0.6930, abs=1e-4)


# ---- linear-Gaussian models: closed forms ----------------------------------------------------------------------------


def exact_elbo(model: Any, x: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
    """E_q log p(x|z) - KL(q || p) in closed form, (B,)."""
    W, c = model.decoder[1].weight.detach(), model.decoder[1].bias.detach()
    s2 = (2 * model.likelihood.log_scale.detach()).exp()
    square = (x - mu @ W.T - c).square().sum(1) + log_var.exp() @ W.square().sum(0)
    log_px = -0.5 * square / s2 - 0.5 * len(c) * (2 * math.pi * s2).log()
    prior = D.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    return log_px - D.kl_divergence(D.Normal(mu, (0.5 * log_var).exp()), prior).sum(1)


def shift_encoder(model: Any) -> Any:
    """Move q away from p(z|x), in mean and variance."""
    with torch.no_grad():
        model.encoder[1].bias += 0.6 * torch.linspace(-1, 1, len(model.encoder[1].bias))
    return model


@pytest.mark.slow
def test_the_bounds_rise_from_the_elbo_towards_the_evidence() -> None:
    x = torch.randn(20, 9, dtype=torch.float64) * 1.5
    ladder = []
    for k in (1, 2, 5, 20, 100, 500):
        torch.manual_seed(5)
        model = shift_encoder(true_posterior("iwae", 3, 9, n_samples=k))
        rows = x.repeat(8000 // k, 1)
        with torch.no_grad():
            ladder.append(model.loss(rows)["elbo"].item())
    top, floor = evidence(model, x).mean().item(), exact_elbo(model, x, *model.posterior(x)).mean().item()
    assert top - floor > 0.5
    assert ladder[0] == pytest.approx(floor, abs=0.02)
    assert all(b > a + 5e-4 for a, b in itertools.pairwise(ladder))
    assert ladder[-1] == pytest.approx(top, abs=0.01)


def test_bounds_of_one_draw_follow_jensen() -> None:
    """Mean of log w <= CIWAE <= IWAE, and MIWAE <= IWAE over all samples."""
    x = data(8)
    iwae, miwae, ciwae, piwae = (
        codes(small(name, **SETTINGS[name]), x)[0] for name in ("iwae", "miwae", "ciwae", "piwae")
    )
    assert -(iwae["nll"] + iwae["kl"]) < ciwae["elbo"] - 1e-3 < iwae["elbo"] - 2e-3
    assert -(miwae["nll"] + miwae["kl"]) < miwae["elbo"] - 1e-3 < iwae["elbo"] - 2e-3
    assert piwae["miwae"] == miwae["elbo"] and piwae["elbo"] == iwae["elbo"] == ciwae["iwae"]


def test_quadrature_matches_closed_form_for_one_sample() -> None:
    model = true_posterior("iwae", 1, 4)
    closed = exact_elbo(model, POINT, OFF_MU, OFF_LOG_VAR)[0]
    assert exact_bound(model, 1, OFF_MU, OFF_LOG_VAR).item() == pytest.approx(closed.item(), abs=1e-9)
    finer = exact_bound(model, 2, OFF_MU, OFF_LOG_VAR, 60)
    assert exact_bound(model, 2, OFF_MU, OFF_LOG_VAR).item() == pytest.approx(finer.item(), abs=1e-6)


# ---- known mistakes -------------------------------------------------------------------------------------------------


def test_pytorch_vae_weighting_is_dominated_by_worst_sample() -> None:
    model = at(small("iwae", n_samples=2), torch.zeros(1, 4).double(), torch.zeros(1, 4).double())
    model.nll_given = lambda x, z: torch.tensor([[0.0, 9.0]]).double()
    model.__class__ = PyTorchVAE
    assert model.loss(data(1))["loss"].item() == pytest.approx(8.999, abs=1e-3)


def test_dreg_without_squared_weights_is_biased() -> None:
    def make(*arguments: Any, **settings: Any) -> Any:
        model = true_posterior(*arguments, **settings)
        model.scale_gradient = lambda z, factor: None
        return model

    with pytest.raises(AssertionError):
        unbiased_law("iwae", {"n_samples": 3}, {3: 1.0}, "dreg", make)


# ---- numerical accuracy, model checks, annealing ---------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["stl", "dreg"])
def test_gradients_are_accurate_at_small_variance(estimator: str) -> None:
    """In float32 (z - mu) / sigma is inaccurate if sigma is far below mu; the noise itself is exact."""
    mu, log_var = torch.full((3, 4), 5.0), torch.full((3, 4), -28.0)
    found = []
    for kind in ("reparam", estimator):
        model = at(small("iwae", estimator=kind).float(), mu, log_var)
        torch.manual_seed(1)
        found.append(model.loss(torch.full((3, 2, 3, 3), 0.3))["kl"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["stl", "dreg"])
def test_estimators_pass_the_model_checks(estimator: str) -> None:
    """With n_samples equal to the batch size of the checks, so that the axes of the noise have the same size."""
    options = {"estimator": estimator, "n_samples": testing.subject.BATCH, "hidden_dims": (8,), "latent_dim": 3}
    for check in (testing.check_batch_mean, testing.check_compile):
        check("iwae", **options)
    with torch.no_grad():
        assert all(value.isfinite() for value in small("iwae", estimator=estimator).loss(data()).values())


def test_annealing_unsupported_terms_is_refused() -> None:
    for mode, name in (("linear", "iwae"), ("linear", "miwae"), ("capacity", "ciwae"), ("capacity", "piwae")):
        with pytest.raises(aezoo.AezooError, match="needs a model with a number"):
            BetaAnnealing(mode, n_steps=5).setup(None, aezoo.create_model(name, input_shape=(4,)), "fit")
    annealing = BetaAnnealing("linear", n_steps=5)
    annealing.setup(None, aezoo.create_model("ciwae", input_shape=(4,)), "fit")
