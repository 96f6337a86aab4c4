"""Laws of Learned compression with autoregressive context (Minnen et al. 2018)."""

from compression_laws import (  # noqa: F401
    test_a_map_s_law_sees_only_what_was_coded_before,
    test_codes_are_the_encoder_s_output_to_half_a_step,
    test_in_bf16_whole_numbers_are_all_that_a_code_needs_too,
    test_no_place_sees_itself_or_a_later_one_in_training,
    test_places_in_turn_are_the_one_convolution_of_training,
    test_rate_and_distortion_train_what_they_follow_from,
    test_samples_have_the_laws_of_the_model,
    test_score_is_the_loss_of_a_sample_as_it_is_evaluated,
    test_the_loss_is_the_negative_elbo_of_a_uniform_posterior,
    test_the_loss_is_the_paper_s_rate_and_distortion,
    test_vectors_and_maps_count_bits_a_place,
    test_whole_numbers_are_all_that_a_code_needs,
)
