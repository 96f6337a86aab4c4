"""Laws of LFQ autoencoder, lookup-free quantisation of MAGVIT-v2 (Yu et al. 2023)."""

from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from quantised_laws import (  # noqa: F401
    test_autocast_indices_and_terms_match_float32,
    test_each_term_trains_expected_parts_only,
    test_inference_calls_do_not_update_codebook,
    test_invalid_values_are_refused,
    test_loss_matches_numpy_formula,
    test_resume_is_exact_and_indices_roundtrip,
    test_straight_through_passes_code_gradient_to_z,
    test_usage_is_over_whole_set_not_batch_mean,
)
