"""Laws of DIP-VAE-II, disentangled inferred prior (Kumar et al. 2018)."""

import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from objective_laws import (  # noqa: F401
    posterior,
    small,
    test_active_setting_differs_from_vae,
    test_beta_and_capacity_apply_to_kl_term,
    test_dip_penalty_matches_numpy_covariance,
    test_inference_equals_vae_for_every_objective,
    test_invalid_values_are_refused,
    test_neutral_setting_equals_vae,
    test_two_ranks_equal_one_process,
)

# ---- covariance of the codes: Kumar et al. 2018 ----------------------------------------------------------------------


def test_dip_ii_adds_mean_variance_to_dip_i_diagonal() -> None:
    mu, log_var = posterior()
    one, two = (small(name).covariance(mu, log_var) for name in ("dip_vae_i", "dip_vae_ii"))
    torch.testing.assert_close(two - one, torch.diag((log_var.exp().sum(0)) / 6))
    assert (log_var.exp().mean(0) > 0.05).all()
