"""Laws of ELIC, learned compression with channel groups of different sizes (He et al. 2022)."""

import torch
from compression_laws import (  # noqa: F401
    data,
    small,
    test_bf16_symbols_determine_code,
    test_bits_are_counted_per_position_for_vectors_and_maps,
    test_checkerboard_anchors_condition_non_anchors_only,
    test_codes_are_encoder_output_within_half_a_step,
    test_gradients_of_both_terms_are_finite_differences,
    test_loss_is_negative_elbo_with_uniform_posterior,
    test_loss_matches_paper_rate_distortion,
    test_rate_and_distortion_train_expected_networks,
    test_rate_passes_gradients_to_itself_and_earlier_parts,
    test_sampled_symbols_follow_model_distribution,
    test_score_is_evaluation_loss_per_sample,
    test_side_information_passes_gradients_to_code,
    test_symbol_distributions_are_causal,
    test_symbols_determine_code_and_reconstruction,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401

# ---- coded symbols and their order -----------------------------------------------------------------------------------


def test_elic_in_one_group_is_a_checkerboard() -> None:
    one, two = small("checkerboard").eval(), small("elic", groups=(5,), net="gdn").eval()
    two.load_state_dict(one.state_dict())
    x = data()
    for term, value in one.loss(x).items():
        torch.testing.assert_close(two.loss(x)[term], value)
