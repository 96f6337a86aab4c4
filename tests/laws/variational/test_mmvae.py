"""Laws of MMVAE, the mixture-of-experts multimodal VAE (Shi et al. 2019)."""

from missing_modality_laws import (  # noqa: F401
    test_loss_matches_models_of_present_modalities,
    test_missing_modality_gets_no_gradient,
    test_outputs_equal_model_of_present_modalities,
    test_partly_missing_modalities_are_refused,
    test_posterior_draws_use_present_components,
)
from multimodal_laws import (  # noqa: F401
    test_a_mixture_of_one_part_is_the_vae_to_the_last_bit,
    test_codes_are_the_mixture_s_mean_and_its_moments_are_known,
    test_each_modality_has_its_own_decoder,
    test_importance_samples_find_the_evidence_from_any_posterior,
    test_loss_is_component_mean_by_torch_distributions,
    test_mixture_kl_matches_integration_below_mean_kl,
    test_no_bound_is_above_the_evidence,
    test_other_experts_get_no_reconstruction_gradient,
    test_partial_reconstruction_ignores_other_modalities,
    test_parts_that_there_are_not_are_refused,
    test_posterior_draws_follow_the_mixture_density,
    test_sizes_may_be_a_list_and_no_kl_of_several_has_a_capacity,
    test_sizes_that_do_not_add_up_are_refused,
    test_the_score_is_the_bound_of_all_parts_without_noise,
)
