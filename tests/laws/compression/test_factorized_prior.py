"""Laws of Learned compression with a factorised prior (Ballé et al. 2017)."""

from compression_laws import (  # noqa: F401
    test_a_map_s_law_sees_only_what_was_coded_before,
    test_codes_are_the_encoder_s_output_to_half_a_step,
    test_in_bf16_whole_numbers_are_all_that_a_code_needs_too,
    test_samples_have_the_laws_of_the_model,
    test_score_is_the_loss_of_a_sample_as_it_is_evaluated,
    test_the_loss_is_the_negative_elbo_of_a_uniform_posterior,
    test_the_loss_is_the_paper_s_rate_and_distortion,
    test_vectors_and_maps_count_bits_a_place,
    test_whole_numbers_are_all_that_a_code_needs,
)
