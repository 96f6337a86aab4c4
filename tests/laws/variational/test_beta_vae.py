"""Laws of beta-VAE (Higgins et al. 2017)."""

from typing import Any

import torch
from objective_laws import (  # noqa: F401
    images,
    losses,
    reference_kl,
    small,
    test_active_setting_differs_from_vae,
    test_at_its_neutral_setting_the_model_is_the_vae,
    test_inference_is_the_vae_s_whatever_the_objective,
    test_invalid_values_are_refused,
)

# ---- neutral settings ------------------------------------------------------------------------------------------------


def test_beta_weighs_the_kl_by_four_unless_told_otherwise(shifted: Any) -> None:
    x = images()
    for settings, beta in (({}, 4.0), ({"beta": 0.3}, 0.3)):
        model = shifted(small("beta_vae", **settings))
        kl = reference_kl(*model.posterior(x)).mean()
        (terms,) = losses(model, x=x)
        torch.testing.assert_close(terms["loss"], terms["nll"] + beta * kl)
