"""Laws of LFQ autoencoder, lookup-free quantisation of MAGVIT-v2 (Yu et al. 2023)."""

from quantised_laws import (  # noqa: F401
    test_each_term_moves_what_it_may_and_nothing_else,
    test_invalid_values_are_refused,
    test_resume_is_exact_and_indices_roundtrip,
    test_straight_through_z_gets_the_gradient_of_its_code,
    test_the_loss_is_its_formula_written_out_in_numpy,
    test_under_autocast_indices_and_terms_are_those_of_float32,
    test_usage_is_over_whole_set_not_batch_mean,
    test_what_is_only_looked_at_teaches_a_book_nothing,
)
