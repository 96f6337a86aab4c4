"""Laws of the log-cosh VAE (Chen et al. 2019)."""

import math
from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from perceptual_distance_laws import (
    decoded,
    images,
    model_and_vae,
    same,
    small,
)
from scipy import stats

import aezoo
from aezoo.models.variational.logcosh_vae import LogCoshVAE

# ---- log-cosh: Chen et al. 2019 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_logcosh_vae_equals_vae_with_logcosh_likelihood(training: bool, shifted: Any) -> None:
    same(*model_and_vae(LogCoshVAE, shifted, {"likelihood": "logcosh:0.1"}), training)
    same(*model_and_vae(LogCoshVAE, shifted, {"likelihood": "logcosh:2", "beta": 3.0}, a=0.5, beta=3.0), training)


def test_log_cosh_likelihood_is_normalised_paper_loss(shifted: Any) -> None:
    a, x = 10.0, images()
    model = shifted(small(LogCoshVAE, a=a, beta=a))
    terms, x_hat = decoded(model, lambda: model.loss(x))
    log_p = stats.hypsecant.logpdf(x.numpy(), x_hat.detach().numpy(), 0.1).reshape(6, -1).sum(1)
    assert terms["nll"].item() == pytest.approx(-log_p.mean(), rel=1e-6)  # a scale is kept in float32
    paper = (torch.log(torch.cosh(a * (x - x_hat))) / a).flatten(1).sum(1).mean() + terms["kl"]
    assert (terms["loss"] / a).item() == pytest.approx((paper + 64 * math.log(math.pi / a) / a).item(), rel=1e-6)


@pytest.mark.parametrize("a", [0.0, -1.0, 1e-9, 1e9])
def test_out_of_range_scale_is_refused(a: float) -> None:
    with pytest.raises(aezoo.AezooError, match="a must lie"):
        small(LogCoshVAE, a=a)
