"""Laws of the VAE with a VampPrior (Tomczak & Welling 2017)."""

from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from learned_prior_laws import (  # noqa: F401
    data,
    normal,
    small,
    test_beta_can_be_annealed_but_capacity_is_refused,
    test_importance_likelihood_matches_prior_integral,
    test_invalid_values_are_refused,
    test_loss_and_gradients_match_formula,
    test_mixture_log_prob_is_independent_of_chunk_size,
    test_mixture_prior_matches_torch_distributions,
    test_mixture_prior_samples_have_its_moments,
    test_score_bounds_kl_tightly_for_far_components,
    test_single_standard_component_equals_vae,
    test_the_density_of_a_prior_integrates_to_one,
)

import aezoo

# ---- mixtures: Tomczak & Welling 2017 --------------------------------------------------------------------------------


def test_data_pseudo_inputs_give_aggregate_posterior() -> None:
    x = data(4).clamp(0.01, 0.99)
    for n in (1, 4):
        model = small("vamp_vae", n_components=n)
        with torch.no_grad():
            model.pseudo_K.copy_(x[:n].logit())
        z = torch.randn(6, 3, dtype=torch.float64)
        each = torch.stack([normal(*(p[i] for p in model.posterior(x[:n]))).log_prob(z) for i in range(n)])
        torch.testing.assert_close(model.log_prior(z), each.exp().mean(0).log())
    alone = small("vamp_vae", n_components=1)
    with torch.no_grad():
        alone.pseudo_K.copy_(x[:1].logit())
    terms = alone.loss(x[:1])
    assert terms["kl"].abs() < 1e-9 and terms["nll"] > 1  # p(z) = q(z|x)


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretised_logistic", "gaussian", "laplace:learned"])
def test_pseudo_inputs_stay_in_data_range(likelihood: str) -> None:
    model = small("vamp_vae", n_components=50, likelihood=likelihood)
    with torch.no_grad():
        model.pseudo_K.mul_(20)
    u = model.pseudo_inputs()
    assert u.shape == (50, 2, 3, 3)
    inside = bool((u >= 0).all() and (u <= 1).all())
    assert inside == model.likelihood.unit_interval
    # unlike with hardtanh, the gradient does not vanish at the ends
    (slope,) = torch.autograd.grad((0.01 * u).sum(), model.pseudo_K)
    assert bool((slope > 0).any(0).all())


# ---- initialisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_pseudo_inputs_start_at_first_samples(likelihood: str) -> None:
    torch.manual_seed(0)
    model: Any = aezoo.create_model("vamp_vae", (2, 3, 3), n_components=7, likelihood=likelihood).train()
    x = data(5).float()
    noise = model.pseudo_K.detach().clone()
    model.begin_step(x, 0)
    u = torch.cat([x, x[:2]])
    expected = torch.sigmoid(noise + torch.logit(u.clamp(0.05, 0.95))) if likelihood == "bernoulli" else noise + u
    torch.testing.assert_close(model.pseudo_inputs(), expected)
    assert (model.pseudo_inputs()[0] - model.pseudo_inputs()[5]).abs().max() > 0.01
    before = model.pseudo_K.detach().clone()
    model.begin_step(x + 1, 1)
    assert torch.equal(model.pseudo_K, before)
    untouched: Any = aezoo.create_model("vamp_vae", (2, 3, 3), n_components=7, data_init=False).train()
    before = untouched.pseudo_K.detach().clone()
    untouched.begin_step(x, 0)
    assert torch.equal(untouched.pseudo_K, before)
