"""The Riemannian prior: its metric and density by formulas, and samples that follow the density."""

import numpy as np
import pytest
import torch

from aezoo.tasks.priors_riemannian import Riemannian


def ring(n: int = 600) -> np.ndarray:
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, n)
    return np.stack([np.cos(angle), np.sin(angle)], 1) * 1.4 + 0.05 * rng.standard_normal((n, 2))


def test_inverse_metric_matches_sum_and_is_positive():
    prior = Riemannian(ring(), 0)
    z = np.random.default_rng(1).standard_normal((5, 2))
    found = prior.inverse_metric(torch.from_numpy(z)).numpy()
    for i in range(5):
        expected = prior.lam * np.exp(-(z[i] ** 2).mean()) * np.eye(2)
        for c, s in zip(prior.centres.numpy(), prior.spreads.numpy(), strict=True):
            expected = expected + s * np.exp(-((z[i] - c) ** 2).sum() / prior.width**2)
        np.testing.assert_allclose(found[i], expected, rtol=1e-9)
        assert np.linalg.eigvalsh(found[i]).min() > 0
    determinant = 0.5 * np.log(np.linalg.det(found))
    np.testing.assert_allclose(prior.log_density(torch.from_numpy(z)).numpy(), determinant, rtol=1e-9)


def test_density_far_from_codes_is_gaussian():
    prior = Riemannian(ring(), 0)
    z = torch.tensor([[5.0, 5.0], [0.0, 9.0]], dtype=torch.float64)
    torch.testing.assert_close(prior.log_density(z), np.log(prior.lam) - 0.5 * (z**2).sum(1), rtol=1e-9, atol=0)
    assert (prior.log_density(prior.centres) > np.log(prior.lam) + 3).all()


@pytest.mark.slow
def test_samples_match_density_by_quadrature():
    """Compared with its quadrature: the share of each of nine squares."""
    prior = Riemannian(ring(), 0)
    z = prior.sample(4000, np.random.default_rng(3))
    axis = np.linspace(-4, 4, 401)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    density = prior.log_density(torch.from_numpy(grid)).exp().numpy()
    edges = [-4, -0.7, 0.7, 4]
    expected, *_ = np.histogram2d(*grid.T, bins=[edges, edges], weights=density)
    found, *_ = np.histogram2d(*z.T, bins=[edges, edges])
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), atol=0.03)
    assert 0.5 < prior.accepted <= 1


@pytest.mark.slow
def test_long_mcmc_step_keeps_density_invariant():
    """Errors of a long step are corrected by rejection: starting from draws of the density, it is kept."""
    prior = Riemannian(ring(), 0)
    axis = np.linspace(-3, 3, 241)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    density = prior.log_density(torch.from_numpy(grid)).exp().numpy()
    start = np.random.default_rng(0).choice(len(grid), 4000, p=density / density.sum())
    torch.manual_seed(0)
    z = torch.from_numpy(grid[start])
    for _ in range(8):
        z, accepted = prior._move(z, 0.7 * prior.width)
    assert 0.05 < accepted < 0.99
    radius = [np.quantile(np.linalg.norm(points, axis=1), [0.1, 0.5, 0.9]) for points in (z.numpy(), grid[start])]
    np.testing.assert_allclose(radius[0], radius[1], atol=0.06)


@pytest.mark.slow
def test_samples_stay_near_ring_unlike_gaussian():
    codes = ring()
    prior = Riemannian(codes, 0)
    z = prior.sample(300, np.random.default_rng(0))
    radius = np.linalg.norm(z, axis=1)
    assert (np.abs(radius - 1.4) < 0.4).mean() > 0.75
    normal = np.random.default_rng(0).standard_normal((300, 2)) @ np.linalg.cholesky(np.cov(codes.T)).T
    assert (np.abs(np.linalg.norm(normal, axis=1) - 1.4) < 0.4).mean() < 0.5


@pytest.mark.slow
def test_sampling_is_seeded_and_keeps_torch_rng_state():
    prior = Riemannian(ring(200), 0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second, third = (prior.sample(10, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, second) and not np.array_equal(first, third)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_degenerate_codes_have_finite_samples():
    for codes in (np.random.default_rng(0).standard_normal((3, 5)), np.arange(40.0)[:, None], np.zeros((10, 2))):
        z = Riemannian(codes, 0).sample(7, np.random.default_rng(0))
        assert z.shape == (7, codes.shape[1]) and np.isfinite(z).all()
