"""Tests of aezoo/manifolds/sphere.py."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from finite_differences import assert_gradients_match
from scipy import integrate, special, stats
from torch import Tensor
from torch.nn import functional as F

from aezoo.manifolds import sphere as manifold

FAMILIES = ("power_spherical", "vmf")


def about_mean(d: int, family: str) -> Any:
    return manifold.FAMILIES[family](d)


def concentrations(kappa: float, n: int) -> Tensor:
    return torch.full((n,), kappa, dtype=torch.float64)


def directions(n: int, d: int) -> Tensor:
    return F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1)


def mean_cosine(d: int, family: str, kappa: float) -> float:
    """E[mu . z]."""
    if family == "vmf":
        return float(special.ive(d / 2, kappa) / special.ive(d / 2 - 1, kappa))
    return kappa / (kappa + d - 1)


# ---- the sphere ------------------------------------------------------------------------------------------------------


def test_large_order_bessel_functions_do_not_underflow() -> None:
    """At order 249 scipy's value is 0; the reference is I_nu(k) = (k/2)^nu / Gamma(nu + 1) * 0F1(nu + 1, k^2/4)."""
    d, kappa = 500, 1.0
    assert special.ive(d / 2 - 1, kappa) == 0
    log_z, mean_h = about_mean(d, "vmf").normaliser(concentrations(kappa, 1))
    series = special.hyp0f1(d / 2, kappa**2 / 4)
    log_z_0 = 0.5 * math.log(math.pi) + math.lgamma((d - 1) / 2) - math.lgamma(d / 2)
    assert log_z.item() == pytest.approx(math.log(series) + log_z_0 - kappa, abs=1e-8)
    assert mean_h.item() + 1 == pytest.approx(kappa / d * special.hyp0f1(d / 2 + 1, kappa**2 / 4) / series, abs=1e-8)


def test_vmf_density_matches_scipy() -> None:
    for d, kappa in ((2, 3.0), (4, 0.5), (7, 60.0)):
        mu, z = directions(1, d), directions(20, d)
        found = about_mean(d, "vmf").log_prob(z, mu, concentrations(kappa, 1))
        np.testing.assert_allclose(found, stats.vonmises_fisher(mu[0].numpy(), kappa).logpdf(z.numpy()), atol=1e-8)


def levels(n: int) -> Tensor:
    """Midpoints of n equal parts of [0, 1], in place of uniform noise."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_angle_quantile_matches_marginal_cdf(family: str) -> None:
    u = levels(400)
    for d in (2, 3, 8, 33):
        q = about_mean(d, family)
        for kappa in (1e-3, 1.0, 20.0, 2e3):
            theta = q.quantile(torch.full_like(u, kappa), u).numpy()
            if family == "power_spherical":
                below = special.betainc((d - 1) / 2, (d - 1) / 2 + kappa, np.sin(theta / 2) ** 2)
                np.testing.assert_allclose(below, u, atol=1e-4 if d == 2 else 1e-5)
            else:
                t = np.linspace(1e-12, min(math.pi, 3 * float(theta[-1])), 200_001)
                log_f = kappa * (np.cos(t) - 1) + (d - 2) * np.log(np.abs(np.sin(t)))
                cdf = integrate.cumulative_simpson(np.exp(log_f - log_f.max()), x=t, initial=0)
                np.testing.assert_allclose(np.interp(theta, t, cdf / cdf[-1]), u, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_draws_are_unit_vectors_around_mu(family: str) -> None:
    """E[z] = E[mu . z] mu, and z is isotropic orthogonally to mu, for any mu, the poles included."""
    d, kappa, n = 5, 6.0, 30_000
    q = about_mean(d, family)
    for mu in (torch.eye(d, dtype=torch.float64)[0], -torch.eye(d, dtype=torch.float64)[0], *directions(1, d)):
        z = q.sample(mu.expand(n, d), concentrations(kappa, n))
        torch.testing.assert_close(z.norm(dim=1), torch.ones(n, dtype=torch.float64))
        cosine = mean_cosine(d, family, kappa)
        torch.testing.assert_close(z.mean(0), cosine * mu, rtol=0, atol=0.012)
        across = z - (z @ mu)[:, None] * mu
        share = (1 - (z @ mu).square().mean().item()) / (d - 1)
        expected = share * (torch.eye(d, dtype=torch.float64) - torch.outer(mu, mu))
        torch.testing.assert_close(across.T @ across / n, expected, rtol=0, atol=0.012)


def rejection_gradient(d: int, kappa: float, n: int) -> float:
    """Biased d/dkappa of the mean of Wood's sampler, without the correction for the acceptance probability."""
    k = torch.full((n,), kappa, dtype=torch.float64, requires_grad=True)
    b = (-2 * k + torch.sqrt(4 * k**2 + (d - 1) ** 2)) / (d - 1)
    x = (1 - b) / (1 + b)
    c = k * x + (d - 1) * torch.log(1 - x**2)
    half = torch.tensor((d - 1) / 2, dtype=torch.float64)
    eps = D.Beta(half, half).sample((n,))
    w = (1 - (1 + b) * eps) / (1 - (1 - b) * eps)
    taken = k * w + (d - 1) * torch.log(1 - x * w) - c >= torch.rand(n, dtype=torch.float64).log()
    return float(torch.autograd.grad(w[taken].sum(), k)[0].sum() / taken.sum())


@pytest.mark.slow
def test_the_gradient_in_kappa_is_unbiased() -> None:
    """d/dkappa E[mu . z] at D = 5, kappa = 2 is 0.1474; through a rejection sampler it is 0.1277."""
    d, kappa = 5, 2.0
    exact = (mean_cosine(d, "vmf", kappa + 1e-4) - mean_cosine(d, "vmf", kappa - 1e-4)) / 2e-4
    assert exact == pytest.approx(0.1474, abs=1e-4)
    k = torch.full((20_000,), kappa, dtype=torch.float64, requires_grad=True)
    mean = about_mean(d, "vmf").quantile(k, levels(20_000)).cos()
    assert mean.mean().item() == pytest.approx(mean_cosine(d, "vmf", kappa), abs=1e-5)
    found = torch.autograd.grad(mean.sum(), k)[0].mean().item()
    assert found == pytest.approx(exact, abs=1e-5)
    assert rejection_gradient(d, kappa, 400_000) == pytest.approx(0.1277, abs=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_sample_gradient_is_derivative_of_quantile(family: str) -> None:
    u = levels(50)
    for d in (2, 3, 9, 40):
        q = about_mean(d, family)
        for kappa in (0.5, 10.0, 1e3):
            k = torch.full_like(u, kappa).requires_grad_()
            found = torch.autograd.grad(q.quantile(k, u).sum(), k)[0]
            with torch.no_grad():
                step = 1e-3 * kappa
                expected = (q.quantile(k + step, u) - q.quantile(k - step, u)) / (2 * step)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_in_mu_is_unbiased(family: str) -> None:
    """d/dmu E[(c . z)^2] in the tangent space of mu, with E[z z'] = s I + (E[t^2] - s) mu mu' and t = mu . z."""
    d, kappa, n = 3, 4.0, 60_000
    q, mu, c = about_mean(d, family), directions(1, d)[0], torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    mu = mu.requires_grad_()
    z = q.sample(F.normalize(mu, dim=0).expand(n, d), concentrations(kappa, n))
    found = torch.autograd.grad((z @ c).square().mean(), mu)[0]
    squared = (z @ mu).square().mean().item()
    slope = 2 * (squared - (1 - squared) / (d - 1)) * (c @ mu) * (c - (c @ mu) * mu)
    torch.testing.assert_close(found, slope.detach(), rtol=0, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_match_finite_differences(family: str) -> None:
    law = about_mean(4, family)

    def draw(mu: Tensor, kappa: Tensor) -> Tensor:
        torch.manual_seed(0)
        return law.sample(F.normalize(mu, dim=1), kappa.exp())

    def density(z: Tensor, mu: Tensor, kappa: Tensor) -> Tensor:
        return law.log_prob(F.normalize(z, dim=1), F.normalize(mu, dim=1), kappa.exp())

    z, mu, kappa = torch.randn(3, 4), torch.randn(3, 4), torch.rand(3)
    assert_gradients_match(draw, mu, kappa)
    assert_gradients_match(density, z, mu, kappa)
    assert_gradients_match(lambda kappa: law.normaliser(kappa.exp()), kappa)
