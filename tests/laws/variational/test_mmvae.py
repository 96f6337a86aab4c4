"""Laws of MMVAE, the mixture-of-experts multimodal VAE (Shi et al. 2019)."""

from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from missing_modality_laws import (  # noqa: F401
    test_loss_matches_models_of_present_modalities,
    test_missing_modality_gets_no_gradient,
    test_outputs_equal_model_of_present_modalities,
    test_partly_missing_modalities_are_refused,
    test_posterior_draws_use_present_components,
)
from multimodal_laws import (  # noqa: F401
    test_each_modality_has_its_own_decoder,
    test_importance_sampling_estimates_evidence,
    test_inconsistent_part_sizes_are_refused,
    test_loss_is_component_mean_by_torch_distributions,
    test_mixture_kl_matches_quadrature_and_its_bounds,
    test_no_bound_is_above_the_evidence,
    test_one_part_mixture_equals_vae_exactly,
    test_other_experts_get_no_reconstruction_gradient,
    test_part_sizes_may_be_list_and_capacity_is_refused,
    test_partial_reconstruction_ignores_other_modalities,
    test_posterior_draws_follow_the_mixture_density,
    test_posterior_moments_match_mixture,
    test_score_is_noise_free_bound_of_all_parts,
    test_unknown_parts_are_refused,
)
