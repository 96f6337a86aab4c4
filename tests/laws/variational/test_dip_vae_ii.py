"""Laws of DIP-VAE-II, disentangled inferred prior (Kumar et al. 2018)."""

import torch
from objective_laws import (  # noqa: F401
    posterior,
    small,
    test_active_setting_differs_from_vae,
    test_at_its_neutral_setting_the_model_is_the_vae,
    test_inference_is_the_vae_s_whatever_the_objective,
    test_invalid_values_are_refused,
    test_the_callback_reaches_the_kl_term,
    test_the_penalty_is_that_of_numpy_s_covariance,
    test_two_ranks_equal_one_process,
)

# ---- covariance of the codes: Kumar et al. 2018 ----------------------------------------------------------------------


def test_dip_ii_adds_mean_variance_to_dip_i_diagonal() -> None:
    mu, log_var = posterior()
    one, two = (small(name).covariance(mu, log_var) for name in ("dip_vae_i", "dip_vae_ii"))
    torch.testing.assert_close(two - one, torch.diag((log_var.exp().sum(0)) / 6))
    assert (log_var.exp().mean(0) > 0.05).all()
