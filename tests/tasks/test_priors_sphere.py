"""The prior of codes on a sphere: it recovers mixture parameters, and density and samples match scipy's."""

import math

import numpy as np
import pytest
from scipy.special import ive
from scipy.stats import ks_2samp, vonmises_fisher

from aezoo.errors import AezooError
from aezoo.tasks.priors_sphere import Sphere, concentration

A, B = np.array([0.6, 0.8, 0.0, 0.0]), np.array([0.0, 0.0, -1.0, 0.0])


def mixture(n: int, seed: int) -> np.ndarray:
    """Two caps, 3 to 1."""
    rng = np.random.default_rng(seed)
    a = vonmises_fisher(A, 20.0).rvs(n, random_state=rng)
    b = vonmises_fisher(B, 60.0).rvs(n, random_state=rng)
    return np.where(rng.random((n, 1)) < 0.75, a, b)


def test_fit_recovers_mixture_parameters() -> None:
    prior = Sphere(mixture(5000, 0), 2, 0)
    order = np.argsort(-prior.weights_K)
    np.testing.assert_allclose(prior.weights_K[order], [0.75, 0.25], atol=0.02)
    np.testing.assert_allclose(prior.means_KD[order], [A, B], atol=0.02)
    np.testing.assert_allclose(prior.kappas_K[order], [20, 60], rtol=0.06)
    z = mixture(300, 1)
    log_a, log_b = vonmises_fisher(A, 20.0).logpdf(z), vonmises_fisher(B, 60.0).logpdf(z)
    expected = np.logaddexp(log_a + math.log(0.75), log_b + math.log(0.25))
    assert abs((prior.log_prob(z) - expected).mean()) < 0.02


@pytest.mark.slow
def test_draws_pass_a_two_sample_test_with_the_mixture() -> None:
    drawn, other = Sphere(mixture(5000, 0), 2, 0).sample(3000, 1), mixture(3000, 2)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-6)
    directions = np.random.default_rng(7).normal(size=(20, 4))
    assert 20 * min(ks_2samp(drawn @ d, other @ d).pvalue for d in directions) > 0.05
    one = Sphere(mixture(5000, 0), 1, 0).sample(3000, 1)
    assert 20 * min(ks_2samp(one @ d, other @ d).pvalue for d in directions) < 1e-6  # the test has power
    assert np.array_equal(drawn, Sphere(mixture(5000, 0), 2, 0).sample(3000, 1))
    assert 20 * min(ks_2samp(drawn[:1500] @ d, drawn[1500:] @ d).pvalue for d in directions) > 1e-3


@pytest.mark.parametrize("size", [2, 3, 10, 64])
def test_concentration_is_recovered_from_mean_length(size: int) -> None:
    kappa = np.array([0.5, 5.0, 80.0, 3000.0])
    length = ive(size / 2, kappa) / ive(size / 2 - 1, kappa)
    np.testing.assert_allclose(concentration(length, size), kappa, rtol=1e-3)


@pytest.mark.slow
def test_log_normaliser_does_not_underflow() -> None:
    for size, kappa in ((2, 0.5), (2, 30.0), (2, 400.0), (500, 1.0)):
        prior, z = Sphere(np.eye(size), 0, 0), np.eye(size)[:2]
        prior.weights_K, prior.means_KD, prior.kappas_K = np.ones(1), np.eye(size)[:1], np.array([kappa])
        nu = size / 2 - 1
        if size == 2:
            log_i = math.log(ive(nu, kappa)) + kappa
        else:
            # order 249 at 1: (x/2)^nu / Gamma(nu + 1) (1 + x^2 / (4 (nu + 1)))
            assert ive(nu, kappa) == 0
            log_i = nu * math.log(0.5) - math.lgamma(nu + 1) + math.log1p(1 / 1000)
        log_c = nu * math.log(kappa) - size / 2 * math.log(2 * math.pi) - log_i
        np.testing.assert_allclose(prior.log_prob(z), log_c + kappa * np.array([1, 0]), atol=1e-5, rtol=1e-7)
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((400, 600)) + 2
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    prior = Sphere(wide, 3, 0)
    assert np.isfinite(prior.log_prob(wide)).all() and np.isfinite(prior.sample(5, 0)).all()


def test_zero_components_give_uniform_distribution() -> None:
    prior = Sphere(mixture(50, 0), 0, 0)
    drawn = prior.sample(20_000, 0)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(drawn.T @ drawn / len(drawn), np.eye(4) / 4, atol=0.01)
    np.testing.assert_allclose(prior.log_prob(drawn[:3]), -math.log(2 * math.pi**2))


def test_equal_codes_are_fitted_and_non_unit_codes_refused() -> None:
    same = np.repeat(A[None], 10, 0).astype(np.float32)
    np.testing.assert_allclose(Sphere(same, 10, 0).sample(5, 0), same[:5], atol=0.02)
    circle = Sphere(mixture(40, 0)[:, :2] / np.linalg.norm(mixture(40, 0)[:, :2], axis=1, keepdims=True), 2, 0)
    assert np.isfinite(circle.sample(7, 0)).all()
    for wrong in (3 * mixture(10, 0), np.ones((5, 1))):
        with pytest.raises(AezooError, match="unit vectors"):
            Sphere(wrong, 2, 0)
