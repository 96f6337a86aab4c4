"""Laws of Learned compression with autoregressive context (Minnen et al. 2018)."""

from compression_laws import (  # noqa: F401
    test_bf16_symbols_determine_code,
    test_bits_are_counted_per_position_for_vectors_and_maps,
    test_codes_are_encoder_output_within_half_a_step,
    test_context_model_is_causal_in_training,
    test_gradients_of_both_terms_are_finite_differences,
    test_loss_is_negative_elbo_with_uniform_posterior,
    test_loss_matches_paper_rate_distortion,
    test_rate_and_distortion_train_expected_networks,
    test_rate_passes_gradients_to_itself_and_earlier_parts,
    test_sampled_symbols_follow_model_distribution,
    test_score_is_evaluation_loss_per_sample,
    test_sequential_coding_matches_parallel_training_rate,
    test_side_information_passes_gradients_to_code,
    test_symbol_distributions_are_causal,
    test_symbols_determine_code_and_reconstruction,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
