"""Laws of VAE with a normalising-flow posterior (Rezende & Mohamed 2015)."""

import torch
from posterior_flow_laws import (  # noqa: F401
    KINDS,
    data,
    small,
    test_codes_and_scores_are_those_of_a_posterior_without_noise,
    test_identity_flow_steps_equal_vae,
    test_importance_likelihood_matches_prior_integral,
    test_invalid_values_are_refused,
    test_the_density_of_the_last_code_integrates_to_one,
    test_the_kl_is_the_paper_s_in_the_mean,
    test_the_kl_s_weight_may_rise_but_there_is_no_capacity,
    test_the_log_determinant_is_that_of_autograd_s_jacobian,
    test_the_loss_and_all_its_gradients_are_those_of_the_formula,
)

# ---- the loss --------------------------------------------------------------------------------------------------------


def test_steps_are_the_encoder_s_output_for_the_sample() -> None:
    """Amortised: two samples have two flows, and the encoder learns from the log-determinant alone."""
    for kind in KINDS:
        model, x = small(kind), data(2)
        steps = model.amortised(x)[2]
        assert not torch.equal(*steps)
        log_det = model.flow(torch.zeros(2, 3, dtype=torch.float64), steps)[1]
        (gradient,) = torch.autograd.grad(log_det.sum(), model.encoder[1].weight)
        assert gradient.abs().max() > 0
