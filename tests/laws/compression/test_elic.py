"""Laws of ELIC, learned compression in uneven groups of channels (He et al. 2022)."""

import torch
from compression_laws import (  # noqa: F401
    data,
    small,
    test_a_map_s_law_sees_only_what_was_coded_before,
    test_checkerboard_anchors_condition_non_anchors_only,
    test_codes_are_the_encoder_s_output_to_half_a_step,
    test_in_bf16_whole_numbers_are_all_that_a_code_needs_too,
    test_samples_have_the_laws_of_the_model,
    test_score_is_the_loss_of_a_sample_as_it_is_evaluated,
    test_the_loss_is_the_negative_elbo_of_a_uniform_posterior,
    test_the_loss_is_the_paper_s_rate_and_distortion,
    test_vectors_and_maps_count_bits_a_place,
    test_whole_numbers_are_all_that_a_code_needs,
)

# ---- what is coded, and in which order -------------------------------------------------------------------------------


def test_elic_in_one_group_is_a_checkerboard() -> None:
    one, two = small("checkerboard").eval(), small("elic", groups=(5,), net="gdn").eval()
    two.load_state_dict(one.state_dict())
    x = data()
    for term, value in one.loss(x).items():
        torch.testing.assert_close(two.loss(x)[term], value)
