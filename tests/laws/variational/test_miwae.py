"""Laws of the multiply importance weighted autoencoder (Rainforth et al. 2018)."""

import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from importance_bound_laws import (  # noqa: F401
    ESTIMATORS,
    OFF_LOG_VAR,
    OFF_MU,
    POINT,
    linear,
    pathwise,
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
    test_wrong_importance_bounds_are_detected,
    true_posterior,
)

# ---- linear-Gaussian models: closed forms ----------------------------------------------------------------------------


def test_dreg_has_lower_variance_than_reparam() -> None:
    torch.manual_seed(0)
    spread = {}
    for estimator in ESTIMATORS:
        torch.manual_seed(2)
        model = true_posterior("iwae", 2, 4, n_samples=8, estimator=estimator)
        mu, log_var = torch.tensor([[-0.5, 0.4]]).double(), torch.tensor([[-0.3, 0.2]]).double()
        spread[estimator] = pathwise(model, POINT, mu, log_var, 4000).std(0).norm().item()
    assert spread["dreg"] < 0.8 * spread["reparam"]
    model = true_posterior("miwae", 1, 4, n_groups=16, n_samples=2)
    one = linear("miwae", 1, 4, n_groups=1, n_samples=2)
    one.load_state_dict(model.state_dict())
    many, few = (pathwise(m, POINT, OFF_MU, OFF_LOG_VAR, 8000).std(0) for m in (model, one))
    torch.testing.assert_close(few / many, torch.full((2,), 4.0).double(), rtol=0.1, atol=0)
