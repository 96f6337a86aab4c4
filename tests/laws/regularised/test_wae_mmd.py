"""Laws of WAE-MMD, the Wasserstein autoencoder with an MMD (Tolstikhin et al. 2018)."""

import math
from typing import Any

import pytest
import torch
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

from aezoo.distributions import divergences
from aezoo.models.regularised.wae_mmd import KERNELS, WAEMMD

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


# ---- WAE-MMD: Tolstikhin et al. 2018 ---------------------------------------------------------------------------------


def loops(name: str, scales: tuple[float, ...], z: Tensor, p: Tensor, unbiased: bool) -> Tensor:
    """The MMD by two loops over samples."""

    def k(a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros((), dtype=z.dtype)
        for s in scales:
            c, squared = 2 * len(a) * s, ((a - b) ** 2).sum()
            total = total + (c / (c + squared) if name == "inverse_multiquadratic" else torch.exp(-squared / c))
        return total

    n, own, cross = len(z), torch.zeros((), dtype=z.dtype), torch.zeros((), dtype=z.dtype)
    for i in range(n):
        for j in range(n):
            if i != j or not unbiased:
                own = own + k(z[i], z[j]) + k(p[i], p[j])
            cross = cross + k(z[i], p[j])
    return own / (n * (n - 1) if unbiased else n**2) - 2 * cross / n**2


class DividedTwice(WAEMMD):
    """PyTorch-VAE: the mean MMD is divided by B (B - 1) once more."""

    def mmd(self, z_BD: Tensor, prior_BD: Tensor) -> Tensor:
        return super().mmd(z_BD, prior_BD) / (len(z_BD) * (len(z_BD) - 1))


class CrossWithoutDiagonal(WAEMMD):
    """PyTorch-VAE: pairs (z_i, p_i) are left out, as if they were pairs of a sample with itself."""

    def mmd(self, z_BD: Tensor, prior_BD: Tensor) -> Tensor:
        n, k = len(z_BD), self.k(divergences.squared_distances(z_BD, prior_BD))
        off = (k.sum() - k.diagonal().sum()) / (n * (n - 1))
        return super().mmd(z_BD, prior_BD) + 2 * k.mean() - 2 * off


class MeanOverTheCode(WAEMMD):
    """PyTorch-VAE: the squared distance of the RBF is a mean over the code."""

    def k(self, squared: Tensor) -> Tensor:
        return super().k(squared / self.code_shape[0])


def mmd_law(cls: Any) -> None:
    """The MMD and its gradient are those of two loops over the samples."""
    for kernel in KERNELS:
        for scales in ((1.0,), SCALES):
            for unbiased in (False, True):
                z, p = codes(5), normal(5)
                found = small(cls, kernel=kernel, kernel_scales=scales, unbiased=unbiased).mmd(z, p)
                same(found, loops(kernel, scales, z, p, unbiased), z)


def test_mmd_matches_double_loop() -> None:
    mmd_law(WAEMMD)
    model = small("wae_mmd")
    assert (model.kernel, model.kernel_scales, model.unbiased, model.mmd_weight) == (KERNELS[0], SCALES, True, 10.0)


@pytest.mark.parametrize("mistake", [DividedTwice, CrossWithoutDiagonal, MeanOverTheCode])
def test_wrong_mmd_estimates_are_detected(mistake: Any) -> None:
    assert_law_fails(mmd_law, mistake)


def mean_kernel(squared_shift: float, variance: float) -> float:
    """E k(a, b) of the RBFs, a - b ~ N(m, variance I), in closed form."""
    total = 0.0
    for s in SCALES:
        c = 2 * CODE * s
        h = 1 + 2 * variance / c
        total += h ** (-CODE / 2) * math.exp(-squared_shift / (c * h))
    return total


@pytest.mark.slow
def test_u_statistic_is_unbiased_and_v_statistic_has_known_bias() -> None:
    n, draws = 20, 300
    for unbiased, expected in ((True, 0.0), (False, 2 * (len(SCALES) - mean_kernel(0, 2)) / n)):
        model = small("wae_mmd", kernel="rbf", unbiased=unbiased)
        found = torch.stack([model.mmd(normal(n), normal(n)) for _ in range(draws)])
        assert found.mean().item() == pytest.approx(expected, abs=4 * found.std().item() / math.sqrt(draws))
        assert (found < 0).float().mean() > 0.3 if unbiased else (found > 0).all()
        assert found.std() / math.sqrt(draws) < 0.02


@pytest.mark.parametrize("kernel", KERNELS)
def test_v_statistic_is_permutation_and_copy_invariant(kernel: str) -> None:
    model, z, p = small("wae_mmd", kernel=kernel, unbiased=False), codes(9), normal(9)
    assert model.mmd(z, z[torch.randperm(9)]).abs() < 1e-12
    torch.testing.assert_close(model.mmd(torch.cat([z, z]), torch.cat([p, p])), model.mmd(z, p))
    for unbiased in (False, True):
        single = small("wae_mmd", kernel=kernel, unbiased=unbiased).mmd(z[:1], p[:1])
        assert single.isfinite()


def test_default_equals_algorithm_2_term_by_term() -> None:
    """Sums over l != j over n (n - 1), and over all pairs with the prior twice over n^2."""
    model, z, p = small("wae_mmd"), codes(7), normal(7)
    n, k = 7, lambda a, b: sum(2 * CODE * s / (2 * CODE * s + (a - b).square().sum()) for s in SCALES)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    same_set = sum(k(z[i], z[j]) + k(p[i], p[j]) for i, j in pairs) / (n * (n - 1))
    same(model.mmd(z, p), same_set - 2 * sum(k(a, b) for a in z for b in p) / n**2, z)
    # for codes from the prior both signs occur
    signs = {float(small("wae_mmd").mmd(normal(20), normal(20)).sign()) for _ in range(40)}
    assert signs == {-1.0, 1.0}


@pytest.mark.slow
def test_mmd_matches_closed_form_for_gaussian_codes() -> None:
    model = small("wae_mmd", kernel="rbf", unbiased=True)
    for shift, v in ((1.0, 1.0), (0.0, 0.05), (0.0, 4.0), (0.7, 0.3)):
        exact = mean_kernel(0, 2 * v) + mean_kernel(0, 2) - 2 * mean_kernel(CODE * shift**2, v + 1)
        found = model.mmd(shift + math.sqrt(v) * normal(700), normal(700))
        assert found.item() == pytest.approx(exact, rel=0.15, abs=0.03)
        assert exact > 0.1
