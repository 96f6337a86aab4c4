"""Laws of the partially importance weighted autoencoder (Rainforth et al. 2018)."""

import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from importance_bound_laws import (  # noqa: F401
    ESTIMATORS,
    codes,
    data,
    decoder,
    encoder,
    gradient,
    small,
    test_a_linear_model_becomes_probabilistic_pca,
    test_encoder_runs_once_and_codes_are_decoded_once,
    test_importance_bound_satisfies_every_law,
    test_inference_equals_parent,
    test_invalid_values_are_refused,
    test_neutral_setting_equals_iwae,
    test_noise_is_independent_per_sample_and_draw,
    test_reparam_and_dreg_are_unbiased,
    test_stl_is_unbiased_for_single_sample_bounds_only,
    test_true_posterior_gives_evidence_without_noise,
    test_weights_that_underflow_leave_finite_gradients,
    test_wrong_importance_bounds_are_detected,
)

# ---- neutral settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_piwae_gradients_are_miwae_encoder_iwae_decoder(estimator: str) -> None:
    x, learned = data(), {"likelihood": "gaussian:learned", "estimator": estimator}
    piwae = small("piwae", n_groups=3, n_samples=4, **learned)
    miwae = small("miwae", n_groups=3, n_samples=4, **learned)
    iwae = small("iwae", n_samples=12, **learned)
    losses = [codes(model, x)[0]["loss"] for model in (piwae, miwae, iwae)]
    torch.testing.assert_close(gradient(losses[0], encoder(piwae)), gradient(losses[1], encoder(miwae)))
    torch.testing.assert_close(gradient(losses[0], decoder(piwae)), gradient(losses[2], decoder(iwae)))
    assert torch.equal(losses[0], losses[2])
    # the gradients of MIWAE and IWAE differ, so a swap of encoder and decoder would be detected
    both = [gradient(losses[1], part(miwae)) - gradient(losses[2], part(iwae)) for part in (encoder, decoder)]
    assert all(difference.abs().max() > 1e-2 for difference in both)
    assert gradient(losses[0], [piwae.likelihood.log_scale]).abs() > 1e-2


# ---- very different weights ------------------------------------------------------------------------------------------


def test_piwae_encoder_learns_from_low_weight_groups() -> None:
    """Its gradient is a mean over groups, while that of the decoder comes from the better group only."""
    piwae, miwae = (small(name, n_groups=2, n_samples=3) for name in ("piwae", "miwae"))
    x, far, found = data(3), torch.tensor([0.0] * 3 + [2000.0] * 3).double(), []
    for model in (piwae, miwae):
        inner = type(model).nll_given
        model.nll_given = lambda x, z, inner=inner, model=model: inner(model, x, z) + far
        found.append(gradient(codes(model, x)[0]["loss"], encoder(model)))
    torch.testing.assert_close(*found)
