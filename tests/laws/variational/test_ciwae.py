"""Laws of the combination importance weighted autoencoder (Rainforth et al. 2018)."""

from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from importance_bound_laws import (  # noqa: F401
    test_a_linear_model_becomes_probabilistic_pca,
    test_encoder_runs_once_and_codes_are_decoded_once,
    test_importance_bound_satisfies_every_law,
    test_inference_equals_parent,
    test_invalid_values_are_refused,
    test_neutral_setting_equals_iwae,
    test_neutral_setting_equals_multi_sample_vae,
    test_noise_is_independent_per_sample_and_draw,
    test_reparam_and_dreg_are_unbiased,
    test_stl_is_unbiased_for_single_sample_bounds_only,
    test_true_posterior_gives_evidence_without_noise,
    test_weights_that_underflow_leave_finite_gradients,
)
