"""Laws of the VAE with a normalising-flow posterior (Rezende & Mohamed 2015)."""

import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from posterior_flow_laws import (  # noqa: F401
    KINDS,
    data,
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

# ---- the loss --------------------------------------------------------------------------------------------------------


def test_flow_parameters_are_amortised() -> None:
    """Each sample has a flow of its own, and the log-determinant has a gradient for the encoder."""
    for kind in KINDS:
        model, x = small(kind), data(2)
        steps = model.amortised(x)[2]
        assert not torch.equal(*steps)
        log_det = model.flow(torch.zeros(2, 3, dtype=torch.float64), steps)[1]
        (gradient,) = torch.autograd.grad(log_det.sum(), model.encoder[1].weight)
        assert gradient.abs().max() > 0
