"""Laws of the VAE with a mixture of Gaussians as prior (Jiang et al. 2016)."""

import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from learned_prior_laws import (  # noqa: F401
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


def test_mixture_starts_with_standard_normal_moments() -> None:
    torch.manual_seed(0)
    model = aezoo.create_model("mixture_vae", input_shape=(4,), latent_dim=2, n_components=3000)
    z = model.sample_prior(50_000)
    assert z.mean(0).abs().max() < 0.05 and (torch.cov(z.T) - torch.eye(2)).abs().max() < 0.06
