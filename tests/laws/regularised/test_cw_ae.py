"""Laws of the Cramer-Wold autoencoder (Knop et al. 2018)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from aggregate_posterior_laws import (  # noqa: F401
    assert_law_fails,
    codes,
    images,
    normal,
    same,
    small,
    test_default_likelihood_is_the_papers_squared_error,
    test_distances_are_not_rounded_under_autocast,
    test_fitted_priors_follow_the_codes,
    test_regularisation_term_trains_encoder,
    test_samples_are_decoded_draws_from_a_standard_normal_prior,
    test_two_ranks_equal_one_process,
    test_zero_weight_equals_dense_autoencoder,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from scipy.special import hyp1f1
from torch import Tensor

from aezoo.distributions import divergences
from aezoo.models.regularised.cw_ae import CWAE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- Cramer-Wold: Knop et al. 2018 -----------------------------------------------------------------------------------


def test_phi_matches_kummer_function_and_gradient() -> None:
    s = torch.cat([torch.linspace(0, 60, 601), torch.logspace(1.8, 5, 30)]).double().requires_grad_()
    for d in range(1, 20):
        found = small("cw_ae", latent_dim=d, hidden_dims=()).phi(s)
        (slope,) = torch.autograd.grad(found.sum(), s)
        at, b = -s.detach().numpy(), d / 2
        np.testing.assert_allclose(found.detach(), hyp1f1(0.5, b, at), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(slope, -0.5 / b * hyp1f1(1.5, b + 1, at), rtol=1e-8, atol=1e-11)


def test_phi_uses_asymptotics_from_20_dimensions() -> None:
    s = torch.linspace(0, 200, 101).double()
    for d in (20, 64):
        found = small("cw_ae", latent_dim=d, hidden_dims=()).phi(s)
        torch.testing.assert_close(found, (1 + 4 * s / (2 * d - 3)) ** -0.5)
        assert np.abs(found.numpy() / hyp1f1(0.5, d / 2, -s.numpy()) - 1).max() < 0.02


def over_lines(z: Tensor, lines: Tensor) -> float:
    """The squared L2 distance of the smoothed densities on each line, by a sum over a grid, averaged over the lines."""
    z, c = z.detach(), (4 / (3 * len(z))) ** 0.4
    t = torch.linspace(-16, 16, 1601, dtype=torch.float64)
    total, prior = 0.0, D.Normal(torch.zeros_like(t), math.sqrt(1 + c))
    for part in lines.split(250):
        found = torch.exp(D.Normal((part @ z.T)[:, :, None], math.sqrt(c)).log_prob(t)).mean(1)
        total += ((found - torch.exp(prior.log_prob(t))) ** 2).sum().item() * 0.02
    return total / len(lines)


class WrongBandwidth(CWAE):
    """Silverman's rule with n^(-1/5), which is for a standard deviation, not for a variance."""

    def distance(self, z_BD: Tensor) -> Tensor:
        n = len(z_BD)
        c = (4 / (3 * n)) ** 0.2
        within = self.phi(divergences.squared_distances(z_BD, z_BD) / (4 * c)).mean() / c**0.5
        across = self.phi((z_BD**2).sum(1) / (2 + 4 * c)).mean() / (c + 0.5) ** 0.5
        return (within - 2 * across + (1 + c) ** -0.5) / (2 * math.sqrt(math.pi))


def lines_law(cls: Any) -> None:
    """In 1 and 2 dimensions the mean over all lines is exact, in more it is a Monte-Carlo mean."""
    angles = torch.arange(200).double() * math.pi / 200
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    for d, lines, rel in ((1, torch.ones(1, 1).double(), 1e-8), (2, circle, 1e-8), (5, None, 0.03), (24, None, 0.05)):
        lines = F.normalize(torch.randn(1500, d).double()) if lines is None else lines
        z = codes(6, d)
        assert small(cls, latent_dim=d).distance(z).item() == pytest.approx(over_lines(z, lines), rel=rel)


@pytest.mark.slow
def test_the_cramer_wold_distance_is_the_integral_over_lines() -> None:
    lines_law(CWAE)
    assert_law_fails(lines_law, WrongBandwidth)


def test_distance_gradient_passes_gradcheck() -> None:
    for d in (2, 3, 20):
        assert torch.autograd.gradcheck(small("cw_ae", latent_dim=d).distance, codes(4, d))


@pytest.mark.slow
def test_cramer_wold_vanishes_at_prior_and_grows_away() -> None:
    model = small("cw_ae", latent_dim=5)
    few, many = model.distance(normal(30, 5)), model.distance(normal(700, 5))
    assert 0 < many < few / 5
    moved = [model.distance(normal(700, 5) + shift).item() for shift in (0.3, 0.6, 1.2, 2.4)]
    assert many < moved[0] / 2 and moved == sorted(moved)
    assert model.distance(0.3 * normal(700, 5)) > 20 * many


def test_loss_contains_log_of_distance(shifted: Any) -> None:
    model, x = shifted(small("cw_ae", cw_weight=3.0)), images()
    terms = model.loss(x)
    expected = torch.log(model.distance(model.encode(x)))
    torch.testing.assert_close(terms["log_cw"], expected)
    same(terms["loss"], terms["nll"] + 3 * expected, model.encoder[1].weight)
    assert small("cw_ae").cw_weight == 1


def test_negative_rounding_gives_finite_logarithm(shifted: Any) -> None:
    model = shifted(small("cw_ae"))
    model.distance = lambda z: z.sum() * 0 - 1e-7
    terms = model.loss(images())
    terms["loss"].backward()
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())
