"""Laws of VAE with a mixture of Gaussians as prior (Jiang et al. 2016)."""

import torch
from learned_prior_laws import (  # noqa: F401
    test_a_single_standard_component_is_the_vae,
    test_codes_drawn_from_a_mixture_have_its_moments,
    test_importance_likelihood_matches_prior_integral,
    test_invalid_values_are_refused,
    test_many_codes_are_compared_with_the_components_in_parts,
    test_score_bounds_kl_tightly_for_far_components,
    test_the_density_of_a_prior_integrates_to_one,
    test_the_kl_s_weight_may_rise_but_there_is_no_capacity,
    test_the_loss_and_all_its_gradients_are_those_of_the_formula,
    test_the_prior_is_the_mixture_of_torch_distributions,
)

import aezoo

# ---- mixtures: Tomczak & Welling 2017 --------------------------------------------------------------------------------


def test_mixture_starts_with_standard_normal_moments() -> None:
    torch.manual_seed(0)
    model = aezoo.create_model("mixture_vae", input_shape=(4,), latent_dim=2, n_components=3000)
    z = model.sample_prior(50_000)
    assert z.mean(0).abs().max() < 0.05 and (torch.cov(z.T) - torch.eye(2)).abs().max() < 0.06
