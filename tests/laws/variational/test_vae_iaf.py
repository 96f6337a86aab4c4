"""Laws of the VAE with inverse autoregressive flow (Kingma et al. 2016)."""

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from posterior_flow_laws import (  # noqa: F401
    data,
    jacobians,
    small,
    test_beta_can_be_annealed_but_capacity_is_refused,
    test_codes_and_scores_use_noise_free_posterior,
    test_flow_posterior_density_integrates_to_one,
    test_identity_flow_steps_equal_vae,
    test_importance_likelihood_matches_prior_integral,
    test_invalid_values_are_refused,
    test_log_determinant_matches_autograd_jacobian,
    test_loss_and_gradients_match_formula,
    test_mean_kl_matches_paper,
)

# ---- autoregression --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_flows", [1, 2, 3])
def test_iaf_jacobian_is_triangular_and_order_alternates(n_flows: int) -> None:
    model = small("iaf", 4, n_flows=n_flows)
    z, steps = torch.randn(1, 4, dtype=torch.float64), model.amortised(data(1))[2]
    whole = jacobians(model, z, steps)[0]
    first = model.steps[0]
    m, a = first(z, steps)
    one = small("iaf", 4, n_flows=1)
    one.steps[0] = first
    jacobian = jacobians(one, z, steps)[0]
    assert torch.equal(jacobian, jacobian.tril()) and (jacobian.tril(-1).abs() > 0).sum() == 6
    torch.testing.assert_close(jacobian.diagonal(), torch.sigmoid(a + 1.5)[0])
    torch.testing.assert_close(one.flow(z, steps)[0], torch.sigmoid(a + 1.5) * z + (1 - torch.sigmoid(a + 1.5)) * m)
    # after several steps each element depends on all; with the same order in all steps it would stay triangular
    assert (whole.abs() > 0).all() == (n_flows > 1)
