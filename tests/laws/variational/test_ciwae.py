"""Laws of Combination importance weighted autoencoder (Rainforth et al. 2018)."""

from importance_bound_laws import (  # noqa: F401
    test_a_linear_model_becomes_probabilistic_pca,
    test_at_its_neutral_setting_it_is_the_iwae,
    test_inference_equals_parent,
    test_invalid_values_are_refused,
    test_neutral_setting_equals_multi_sample_vae,
    test_noise_is_independent_per_sample_and_draw,
    test_reparam_and_dreg_are_unbiased,
    test_stl_has_that_mean_for_bounds_of_one_sample_only,
    test_the_encoder_runs_once_and_each_code_is_decoded_once,
    test_the_model_keeps_the_law,
    test_true_posterior_gives_evidence_without_noise,
    test_weights_that_underflow_leave_finite_gradients,
)
