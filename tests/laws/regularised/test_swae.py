"""Laws of the sliced Wasserstein autoencoder (Kolouri et al. 2018)."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from aggregate_posterior_laws import (  # noqa: F401
    CODE,
    assert_law_fails,
    codes,
    normal,
    same,
    small,
    test_decoded_codes_are_compared_with_prior_draws,
    test_default_likelihood_is_the_papers_squared_error,
    test_distances_are_not_rounded_under_autocast,
    test_regularisation_term_trains_encoder,
    test_samples_are_decoded_draws_from_a_standard_normal_prior,
    test_two_ranks_equal_one_process,
    test_zero_weight_equals_dense_autoencoder,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from torch import Tensor

from aezoo.models.regularised.swae import SWAE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- SWAE: Kolouri et al. 2018 ---------------------------------------------------------------------------------------


class DividedOnceMore(SWAE):
    """PyTorch-VAE: an extra 1 / (B (B - 1))."""

    def sliced_wasserstein(self, z_BD: Tensor, prior_BD: Tensor) -> Tensor:
        return super().sliced_wasserstein(z_BD, prior_BD) / (len(z_BD) * (len(z_BD) - 1))


class UnnormalisedDirections(SWAE):
    """Directions that are Gaussian vectors: D times the distance."""

    def sliced_wasserstein(self, z_BD: Tensor, prior_BD: Tensor) -> Tensor:
        v = torch.randn(self.n_projections, z_BD.shape[1], dtype=z_BD.dtype)
        return ((v @ z_BD.T).sort().values - (v @ prior_BD.T).sort().values).square().mean()


class Unsorted(SWAE):
    """The n-th code is paired with the n-th draw."""

    def sliced_wasserstein(self, z_BD: Tensor, prior_BD: Tensor) -> Tensor:
        v = F.normalize(torch.randn(self.n_projections, z_BD.shape[1], dtype=z_BD.dtype))
        return (v @ (z_BD - prior_BD).T).square().mean()


def pot_law(cls: Any) -> None:
    """The distance and its gradient are POT's for the same directions."""
    import ot

    for d in (1, 2, CODE):
        model, z, p = small(cls, latent_dim=d, n_projections=12), codes(9, d), normal(9, d)
        torch.manual_seed(4)
        found = model.sliced_wasserstein(z, p)
        torch.manual_seed(4)
        v = F.normalize(torch.randn(12, d, dtype=z.dtype))
        same(found, ot.sliced_wasserstein_distance(z, p, projections=v.T, p=2) ** 2, z)


def line_law(cls: Any) -> None:
    """On a line it is the integral of the squared difference of the quantiles."""
    z, p = codes(7, 1), normal(7, 1)
    levels = (np.arange(7 * 300) + 0.5) / (7 * 300)
    a, b = (np.quantile(s.detach().numpy(), levels, method="inverted_cdf") for s in (z, p))
    found = small(cls, latent_dim=1).sliced_wasserstein(z, p)
    assert found.item() == pytest.approx(((a - b) ** 2).mean(), rel=1e-9)


def shift_law(cls: Any) -> None:
    """Between N(m, I) and N(0, I) it is ||m||^2 / D in any dimension."""
    for d in (2, 8):
        m = torch.linspace(0.5, 2, d).double()
        found = small(cls, latent_dim=d, n_projections=600).sliced_wasserstein(normal(1500, d) + m, normal(1500, d))
        assert found.item() == pytest.approx(m.square().sum().item() / d, rel=0.1)


SW_LAWS = (pot_law, line_law, shift_law)


@pytest.mark.slow
@pytest.mark.parametrize("law", SW_LAWS, ids=lambda law: law.__name__)
def test_sliced_wasserstein_distance_satisfies_laws(law: Any) -> None:
    law(SWAE)


@pytest.mark.parametrize(
    ("mistake", "law"),
    [
        *((DividedOnceMore, law) for law in SW_LAWS),
        (UnnormalisedDirections, line_law),
        (UnnormalisedDirections, shift_law),
        (Unsorted, line_law),
        (Unsorted, shift_law),
    ],
)
def test_wrong_sliced_wasserstein_distances_are_detected(mistake: Any, law: Any) -> None:
    assert_law_fails(law, mistake)


def test_distance_of_permuted_set_is_zero() -> None:
    model, z = small("swae"), codes(9)
    assert model.sliced_wasserstein(z, z[torch.randperm(9)]) == 0
    p = normal(9)
    assert model.sliced_wasserstein(z, p) != model.sliced_wasserstein(z, p)
    assert (model.n_projections, model.sw_weight) == (50, 10.0)
