"""Tests of aezoo/bases/entropy_coded.py."""

import math

import numpy as np
import pytest
import torch
import torch.distributions as D
from scipy import stats
from torch import Tensor

from aezoo.bases import entropy_coded
from aezoo.bases.entropy_coded import (
    MAX_SCALE,
    MIN_SCALE,
    NUM_SCALES,
    AdditiveNoise,
    Factorised,
    Gaussians,
    Mixtures,
    gaussian_tables,
)

# ---- distributions of single values ----------------------------------------------------------------------------------


def spread(channels: int = 3) -> Factorised:
    density = Factorised(channels).double()
    with torch.no_grad():
        for p in density.parameters():
            p += 0.3 * torch.randn_like(p)
    return density


def test_gaussian_log_mass_matches_scipy_in_far_tails() -> None:
    scale = torch.logspace(math.log10(0.11), 2, 25, dtype=torch.float64)[:, None]
    v = torch.tensor([-300.0, -31.3, -2.5, -0.4, 0.0, 0.3, 7.0, 45.2, 900.0], dtype=torch.float64)
    mean = torch.tensor(0.7, dtype=torch.float64)
    found = Gaussians(mean, scale, 0).log_mass(v.expand(25, -1))
    # log(F(u) - F(l)) = log F(u) + log(1 - F(l) / F(u)), with both below the mean to avoid cancellation
    off = (v - mean).abs().numpy()
    upper, lower = (stats.norm.logcdf((half - off) / scale.numpy()) for half in (0.5, -0.5))
    np.testing.assert_allclose(found.numpy(), upper + np.log1p(-np.exp(lower - upper)), rtol=1e-9)
    near = stats.norm.cdf((v + 0.5 - 0.7) / scale) - stats.norm.cdf((v - 0.5 - 0.7) / scale)
    np.testing.assert_allclose(found.exp().numpy(), near, rtol=1e-6, atol=1e-15)


def test_gaussian_masses_are_finite_in_float32() -> None:
    v = torch.tensor([0.0, 0.5, 30.0, 1e3, 1e6], requires_grad=True)
    for scale in (MIN_SCALE, 1.0, MAX_SCALE):
        width = torch.full((5,), scale, requires_grad=True)
        found = Gaussians(torch.zeros(5), width, 0).log_mass(v)
        gradients = torch.autograd.grad(found.sum(), [v, width])
        assert all(bool(values.isfinite().all()) for values in (found, *gradients)), scale


def test_gaussian_mass_gradients_match_float64_in_tails() -> None:
    """Far from the mean, d log P / dv is about -(v - mean -+ 1/2) / s^2 and d log P / ds (v - mean -+ 1/2)^2 / s^3."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        v = torch.tensor([0.3, -2.0, 30.0, 100.0, -1e3, 1e4, 1e5, 1e6], dtype=dtype, requires_grad=True)
        width = (
            torch.tensor([[MIN_SCALE], [0.8], [20.0], [MAX_SCALE]], dtype=dtype).expand(-1, 8).clone().requires_grad_()
        )
        log_mass = Gaussians(torch.zeros(8, dtype=dtype), width, 0).log_mass(v.expand(4, -1))
        found[dtype] = [slope.double() for slope in torch.autograd.grad(log_mass.sum(), [v, width])]
    by_hand = -(1e6 - 0.5) * sum(scale**-2 for scale in (MIN_SCALE, 0.8, 20.0, MAX_SCALE))
    assert float(found[torch.float64][0][-1]) == pytest.approx(by_hand, rel=1e-4)
    for mine, exact in zip(*found.values(), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-3, atol=1e-5)


def test_factorised_cdf_is_monotone_with_half_at_median() -> None:
    density = spread()
    off = torch.linspace(-400, 400, 20_001, dtype=torch.float64).expand(3, -1)
    F_CN = density.logits(off).sigmoid().detach()
    assert bool((F_CN.diff(dim=1) >= 0).all())
    assert float(F_CN[:, 0].max()) < 0.01 and float(F_CN[:, -1].min()) > 0.99
    torch.testing.assert_close(density.logits(torch.zeros(3, 1).double()).detach(), torch.zeros(3, 1).double())
    law = density.distribution((1, 3))
    assert torch.equal(law.mean[0], density.median_C) and bool((density.median_C != 0).all())


def test_factorised_masses_are_integrals_of_the_density() -> None:
    density = spread()
    v = torch.tensor([[-3.2, 0.4, 6.0], [1.1, -9.0, 0.2]], dtype=torch.float64)
    fine = torch.linspace(-0.5, 0.5, 2_001, dtype=torch.float64)
    off = ((v - density.median_C).T[..., None] + fine).flatten(1).requires_grad_()
    (slope,) = torch.autograd.grad(density.logits(off).sigmoid().sum(), off)
    expected = torch.trapezoid(slope.view(3, 2, -1), fine, dim=2).T
    torch.testing.assert_close(density.distribution((2, 3)).log_mass(v).exp(), expected, rtol=1e-5, atol=1e-10)


def test_factorised_masses_of_all_whole_numbers_sum_to_one() -> None:
    density = spread()
    k = torch.arange(-3000.0, 3001.0, dtype=torch.float64)
    mass = density.distribution((6001, 3)).log_mass(density.median_C + k[:, None]).exp()
    torch.testing.assert_close(mass.sum(0), torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_tables_match_log_mass() -> None:
    density = spread()
    for c, (low, mass) in enumerate(density.tables()):
        k = torch.arange(low, low + len(mass), dtype=torch.float64)
        v = density.median_C.detach() + k[:, None]
        found = density.distribution(v.shape).log_mass(v)[:, c].exp()
        np.testing.assert_allclose(mass, found.detach().numpy(), rtol=1e-6, atol=1e-14)
        assert 1 - 1e-6 < mass.sum() <= 1 and low < 0 < low + len(mass)
    scales = np.geomspace(MIN_SCALE, MAX_SCALE, NUM_SCALES)
    for scale, (low, mass) in zip(scales, gaussian_tables(), strict=True):
        k = np.arange(low, low + len(mass))
        expected = stats.norm.cdf((k + 0.5) / scale) - stats.norm.cdf((k - 0.5) / scale)
        np.testing.assert_allclose(mass, expected, rtol=1e-9, atol=1e-15)
        assert 1 - 1e-8 < mass.sum() <= 1
    between = np.exp((np.log(scales[1:]) + np.log(scales[:-1])) / 2)
    given = torch.tensor([0.001, *between * 0.999, 1e6], dtype=torch.float64)
    assert Gaussians(given, given, 7).table.tolist() == [7, *range(7, 7 + NUM_SCALES - 1), 7 + NUM_SCALES - 1]
    assert Gaussians(given, given * 1.001 / 0.999, 7).table[1:-1].tolist() == [*range(8, 7 + NUM_SCALES)]


def mixtures(k: int = 3, n: int = 40, dtype: torch.dtype = torch.float64) -> Mixtures:
    """Mixtures of k components for n values, with separated modes and scales from MIN_SCALE to about 3."""
    means, logits = 6 * torch.randn(k, n, 1, dtype=dtype), torch.randn(k, n, 1, dtype=dtype)
    return Mixtures(means, (MIN_SCALE + 3 * torch.rand(k, n, 1, dtype=dtype) ** 3).clamp_max(MAX_SCALE), logits)


def of_torch(law: Mixtures) -> D.MixtureSameFamily:
    """The same mixture without rounding, as a distribution of torch, (n, 1)."""
    means, scales, logits = (part.movedim(0, -1) for part in (law.parts.mean, law.parts.scale, law.log_weight))
    return D.MixtureSameFamily(D.Categorical(logits=logits), D.Normal(means, scales))


def test_mixture_masses_match_torch_cdf_differences() -> None:
    law = mixtures()
    k = torch.arange(-12.0, 13.0, dtype=torch.float64)
    for v in (law.mean + step for step in k):
        steps = of_torch(law).cdf(v + 0.5) - of_torch(law).cdf(v - 0.5)
        torch.testing.assert_close(law.log_mass(v).exp(), steps, rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(law.mean, of_torch(law).mean)


def test_mixture_log_mass_matches_scipy_in_far_tails() -> None:
    law = mixtures()
    for v in (law.mean - 300, law.mean + 900.3):
        parts = []
        for mean, scale, log_weight in zip(law.parts.mean, law.parts.scale, law.log_weight, strict=True):
            upper, lower = (stats.norm.logcdf((half - (v - mean).abs()) / scale) for half in (0.5, -0.5))
            parts.append(log_weight.numpy() + upper + np.log1p(-np.exp(lower - upper)))
        np.testing.assert_allclose(law.log_mass(v).numpy(), np.logaddexp.reduce(parts), rtol=1e-9)


def test_mixture_masses_of_all_whole_numbers_sum_to_one() -> None:
    """For integers added to the mean, to 0 and to a fractional offset."""
    for dtype in (torch.float64, torch.float32):
        law = mixtures(dtype=dtype)
        k = torch.arange(-100.0, 101.0, dtype=dtype)
        for start in (law.mean, torch.zeros_like(law.mean), law.mean + 0.37):
            total = sum(law.log_mass(start + step).double().exp() for step in k)
            torch.testing.assert_close(
                total, torch.ones_like(total), rtol=0, atol=1e-8 if dtype == torch.float64 else 1e-4
            )


def test_mixture_of_equal_components_equals_gaussian() -> None:
    mean, scale = torch.randn(30, 2, dtype=torch.float64), MIN_SCALE + torch.rand(30, 2, dtype=torch.float64)
    one, v = Gaussians(mean, scale, 0), mean + 4 * torch.randn(30, 2, dtype=torch.float64)
    for k in (1, 2, 5):
        logits = 3 * torch.randn(k, 30, 2, dtype=torch.float64)
        law = Mixtures(mean.expand(k, -1, -1), scale.expand(k, -1, -1), logits)
        torch.testing.assert_close(law.mean, one.mean)
        torch.testing.assert_close(law.log_mass(v), one.log_mass(v))
    # the other component has negligible weight
    logits = torch.tensor([0.0, -200.0], dtype=torch.float64).view(2, 1, 1).expand(2, 30, 2)
    law = Mixtures(torch.stack([mean, mean + 70]), torch.stack([scale, 9 * scale]), logits)
    torch.testing.assert_close(law.log_mass(v), one.log_mass(v))


def test_mixture_masses_are_finite_in_float32() -> None:
    v = torch.tensor([0.0, 0.5, 30.0, 1e3, 1e6]).requires_grad_()
    for scale in (MIN_SCALE, 1.0, MAX_SCALE):
        means = torch.tensor([0.0, 50.0, -1e3])[:, None].expand(3, 5).clone().requires_grad_()
        scales = torch.tensor([scale, MIN_SCALE, MAX_SCALE])[:, None].expand(3, 5).clone().requires_grad_()
        logits = torch.tensor([0.0, -300.0, 80.0])[:, None].expand(3, 5).clone().requires_grad_()
        found = Mixtures(means, scales, logits).log_mass(v)
        gradients = torch.autograd.grad(found.sum(), [v, means, scales, logits])
        assert all(bool(values.isfinite().all()) for values in (found, *gradients)), scale


def test_mixture_tables_match_log_mass() -> None:
    law = mixtures(n=200)
    powers = law.table.flatten().numpy()
    assert len({*powers}) > 2
    for power in np.unique(powers):
        here = np.flatnonzero(powers == power)
        low, mass = law.tables_at(int(power), here)
        assert low == -(2**power) and mass.shape == (len(here), 2 ** (power + 1) + 1)
        for i, step in enumerate(range(low, -low + 1)):
            expected = law.log_mass(law.mean + step).exp().flatten()[here]
            np.testing.assert_allclose(mass[:, i], expected, rtol=1e-6, atol=1e-14)
        assert mass.sum(1).min() > 1 - 1e-8
        # a table of half the width would truncate a component
        reach = ((law.parts.mean - law.mean).abs() + 6 * law.parts.scale).amax(0).flatten()[here]
        assert bool((reach > 2 ** (power - 1)).all()) or power == 1


def test_mixture_table_spans_weighted_components() -> None:
    means, scales = torch.tensor([[0.0], [0.0], [3000.0]]), torch.tensor([[0.2], [200.0], [1.0]])
    law = Mixtures(means, scales, torch.tensor([[0.0], [-25.0], [-40.0]]))
    assert law.table.tolist() == [1]
    assert Mixtures(means, scales, torch.tensor([[0.0], [-15.0], [-40.0]])).table.tolist() == [11]
    assert Mixtures(100 * means, scales, torch.tensor([[0.0], [0.0], [0.0]])).table.tolist() == [12]


def test_mixture_samples_follow_masses() -> None:
    one = mixtures(n=1)
    law = Mixtures(*(of.expand(3, 20_000, 1) for of in (one.parts.mean, one.parts.scale, one.log_weight)))
    drawn = law.draw()
    assert drawn.shape == (20_000, 1) and drawn.dtype == torch.long
    low, mass = one.tables_at(int(one.table), np.array([0]))
    likely = mass[0] * 20_000 > 5
    share = np.bincount(drawn.flatten().numpy() - low, minlength=mass.size)[likely]
    assert (
        likely.sum() > 3 and stats.chisquare(share, mass[0][likely] / mass[0][likely].sum() * share.sum()).pvalue > 1e-4
    )


def test_scale_is_clamped_to_table_range() -> None:
    raw = torch.tensor([-1e4, -3.0, 0.0, 5.0, 1e4])
    found = entropy_coded.scale_of(raw)
    torch.testing.assert_close(found[1:4], MIN_SCALE + torch.log1p(raw[1:4].exp()))
    assert float(found[0]) == pytest.approx(MIN_SCALE) and float(found[-1]) == MAX_SCALE


# ---- the objective ---------------------------------------------------------------------------------------------------


def test_noise_rate_is_kl_of_uniform_posterior() -> None:
    """E_u[-log P(y + u)], with P the density of the law convolved with U(-1/2, 1/2), by quadrature."""
    y, mean, scale = 1.3, 0.4, 0.8
    u = np.linspace(-0.5, 0.5, 20_001)
    density = stats.norm.cdf((y + u + 0.5 - mean) / scale) - stats.norm.cdf((y + u - 0.5 - mean) / scale)
    expected = np.trapezoid(-np.log(density), u)
    noise = AdditiveNoise()
    ones = torch.ones(100_000, 1, dtype=torch.float64)
    noise(y * ones, Gaussians(mean * ones, scale * ones, 0))
    assert isinstance(noise.rate_B, Tensor)
    assert float(noise.rate_B.mean()) == pytest.approx(expected, abs=5 * float(noise.rate_B.std()) / math.sqrt(100_000))


def test_noise_is_uniform_about_the_value() -> None:
    passed = AdditiveNoise().transform(torch.full((50_000,), 3.0, dtype=torch.float64))
    assert stats.kstest(passed.numpy(), "uniform", args=(2.5, 1)).pvalue > 1e-3
