"""Laws of DIP-VAE-I, disentangled inferred prior (Kumar et al. 2018)."""

import math
from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from objective_laws import (  # noqa: F401
    CODE,
    at,
    dip_law,
    images,
    small,
    test_active_setting_differs_from_vae,
    test_beta_and_capacity_apply_to_kl_term,
    test_dip_penalty_matches_numpy_covariance,
    test_inference_equals_vae_for_every_objective,
    test_invalid_values_are_refused,
    test_neutral_setting_equals_vae,
    test_two_ranks_equal_one_process,
)
from torch import Tensor

from aezoo.models.variational.dip_vae_i import DIPVAEI
from aezoo.models.variational.dip_vae_ii import DIPVAEII

# ---- covariance of the codes: Kumar et al. 2018 ----------------------------------------------------------------------


class PyTorchVAEDIP(DIPVAEII):
    """Centred over the code instead of the batch, without 1/B, with exp(2 log_var) summed into a scalar."""

    def covariance(self, mu_BD: Tensor, log_var_BD: Tensor) -> Tensor:
        centred = mu_BD - mu_BD.mean(dim=1, keepdim=True)
        return centred.T @ centred + torch.mean(torch.diagonal((2.0 * log_var_BD).exp(), dim1=0), dim=0)


def identity_law(cls: Any, s2: float) -> None:
    """Means with covariance (1 - s2) I and variances of mean s2 have no penalty; DIP-VAE-I ignores them (s2 = 0)."""
    mu, log_var = whitened(64)
    terms = at(small(cls), mu * math.sqrt(1 - s2), log_var + math.log(s2 or 1)).loss(images(64))
    assert abs(terms["off_diagonal"].item()) < 1e-20
    assert abs(terms["diagonal"].item()) < 1e-20


def whitened(n: int) -> tuple[Tensor, Tensor]:
    """Means with mean 3 and covariance I, and log-variances whose variances are 1 on average."""
    mu = torch.randn(n, CODE, dtype=torch.float64)
    mu = mu - mu.mean(0)
    log_var = torch.randn(n, CODE, dtype=torch.float64)
    mu = math.sqrt(n) * torch.linalg.qr(mu)[0] + 3
    return mu, log_var - log_var.exp().mean(0).log()


def test_codes_with_prior_covariance_have_zero_penalty() -> None:
    identity_law("dip_vae_i", 0.0)
    identity_law("dip_vae_ii", 0.4)


def test_penalty_is_accurate_for_distant_codes() -> None:
    """E[mu mu'] - E[mu] E[mu]' in float32 would be off by 1 at a mean of 3000; centred codes are not."""
    mu, log_var = whitened(64)
    far = (mu + 3000).float()
    exact = torch.cov(far.double().T, correction=0).float()
    torch.testing.assert_close(small("dip_vae_i").covariance(far, log_var.float()), exact, rtol=1e-4, atol=1e-4)
    moments = (far[:, :, None] * far[:, None]).mean(0) - far.mean(0)[:, None] * far.mean(0)
    assert (moments - exact).abs().max() > 0.1


@pytest.mark.parametrize("law", [lambda cls: dip_law(cls, "dip_vae_ii"), lambda cls: identity_law(cls, 0.4)])
def test_wrong_covariance_penalties_are_detected(law: Any) -> None:
    with pytest.raises(AssertionError):
        law(PyTorchVAEDIP)
    with pytest.raises(AssertionError):  # DIP-VAE-I is not DIP-VAE-II
        law(DIPVAEI)
