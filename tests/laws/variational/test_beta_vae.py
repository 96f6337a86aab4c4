"""Laws of beta-VAE (Higgins et al. 2017)."""

from typing import Any

import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from objective_laws import (  # noqa: F401
    images,
    losses,
    reference_kl,
    small,
    test_active_setting_differs_from_vae,
    test_inference_equals_vae_for_every_objective,
    test_invalid_values_are_refused,
    test_neutral_setting_equals_vae,
)

# ---- neutral settings ------------------------------------------------------------------------------------------------


def test_beta_weights_kl_and_defaults_to_four(shifted: Any) -> None:
    x = images()
    for settings, beta in (({}, 4.0), ({"beta": 0.3}, 0.3)):
        model = shifted(small("beta_vae", **settings))
        kl = reference_kl(*model.posterior(x)).mean()
        (terms,) = losses(model, x=x)
        torch.testing.assert_close(terms["loss"], terms["nll"] + beta * kl)
