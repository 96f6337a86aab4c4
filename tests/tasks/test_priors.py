"""Priors: samples are distributed like the codes, by statistical tests and known densities."""

import numpy as np
import pytest
from scipy.stats import ks_2samp, multivariate_normal

from aezoo.errors import AezooError
from aezoo.tasks import priors, priors_principal


def mixture(n, seed):
    """Two narrow Gaussians in three dimensions, 3 to 1, unlike a single Gaussian."""
    rng = np.random.default_rng(seed)
    first = rng.random(n) < 0.75
    a = rng.multivariate_normal([4, 0, 1], [[1, 0.8, 0], [0.8, 1, 0], [0, 0, 0.1]], n)
    b = rng.multivariate_normal([-4, 2, 0], [[0.2, 0, 0], [0, 2, 0.5], [0, 0.5, 0.3]], n)
    return np.where(first[:, None], a, b)


def ring(n, seed):
    rng = np.random.default_rng(seed)
    angle, radius = rng.uniform(0, 2 * np.pi, n), 2 + 0.2 * rng.standard_normal(n)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def least_p(a, b):
    """The smallest Kolmogorov-Smirnov p-value over 30 projections, times 30 (Bonferroni)."""
    directions = np.random.default_rng(7).normal(size=(30, a.shape[1]))
    return 30 * min(ks_2samp(a @ d, b @ d).pvalue for d in directions)


def test_mixture_samples_pass_two_sample_test():
    fitted = priors.fit("gmm", mixture(4000, 0), n_components=2)
    drawn = fitted.sample(2000, seed=1)
    assert least_p(drawn, mixture(2000, 2)) > 0.05
    # the test has power: a single Gaussian fails it
    assert least_p(priors.fit("gaussian", mixture(4000, 0)).sample(2000, seed=1), mixture(2000, 2)) < 1e-6
    # samples are not sorted by component
    assert least_p(drawn[:1000], drawn[1000:]) > 0.05


def test_fitted_mixture_density_matches_true_density():
    fitted = priors.fit("gmm", mixture(20_000, 0), n_components=2)
    x = mixture(500, 5)
    a = multivariate_normal([4, 0, 1], [[1, 0.8, 0], [0.8, 1, 0], [0, 0, 0.1]]).pdf(x)
    b = multivariate_normal([-4, 2, 0], [[0.2, 0, 0], [0, 2, 0.5], [0, 0.5, 0.3]]).pdf(x)
    expected = np.log(0.75 * a + 0.25 * b)
    assert abs((fitted.log_prob(x) - expected).mean()) < 0.02 and np.abs(fitted.log_prob(x) - expected).max() < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 40], ids=["fewer dimensions than codes", "more dimensions than codes"])
def test_gaussian_prior_has_code_moments(size):
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(30, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)
    drawn = priors.fit("gaussian", codes).sample(200_000, seed=0)
    covariance = np.cov(codes.T)
    scale = np.sqrt(np.diag(covariance))
    assert np.abs((drawn.mean(0) - codes.mean(0)) / scale).max() < 0.02
    assert np.abs((np.cov(drawn.T) - covariance) / np.outer(scale, scale)).max() < 0.02


def test_gaussian_density_matches_scipy():
    codes = mixture(300, 0)
    fitted = priors.fit("gaussian", codes)
    expected = multivariate_normal(codes.mean(0), np.cov(codes.T)).logpdf(mixture(50, 1))
    assert np.allclose(fitted.log_prob(mixture(50, 1)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gmm", "maf"])
def test_residual_components_keep_code_covariance(name, monkeypatch):
    monkeypatch.setattr(priors_principal, "_MAX_COMPONENTS", 2)
    monkeypatch.setattr(priors_principal, "_EPOCHS", 30)
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(600, 6)) @ rng.normal(size=(6, 6)) + 3
    drawn = priors.fit(name, codes, n_components=1).sample(20_000, seed=0)
    covariance = np.cov(codes.T)
    scale = np.sqrt(np.diag(covariance))
    assert np.abs((np.cov(drawn.T) - covariance) / np.outer(scale, scale)).max() < (0.03 if name == "gmm" else 0.2)
    assert np.abs((drawn.mean(0) - codes.mean(0)) / scale).max() < (0.03 if name == "gmm" else 0.2)


def test_few_codes_keep_covariance_beyond_components():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(8, 5)) @ rng.normal(size=(5, 5))
    drawn = priors_principal.PrincipalSubspace("gaussian", codes, 2, 1, 0).sample(100_000, seed=0)
    covariance = np.cov(codes.T)
    scale = np.sqrt(np.diag(covariance))
    assert np.abs((np.cov(drawn.T) - covariance) / np.outer(scale, scale)).max() < 0.03


@pytest.mark.slow
def test_flow_prior_beats_gaussian_and_is_normalised():
    fitted, held = priors.fit("maf", ring(800, 0)), ring(1000, 1)
    gaussian = priors.fit("gaussian", ring(800, 0)).log_prob(held).mean()
    # the ring's own is -2.34, a Gaussian's -3.54
    assert gaussian + 0.6 < fitted.log_prob(held).mean() < -2.3
    assert fitted.gain(held) == pytest.approx(fitted.log_prob(held).mean() - gaussian, abs=1e-6)
    side = np.linspace(-6, 6, 241)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    assert np.exp(fitted.log_prob(grid)).sum() * (side[1] - side[0]) ** 2 == pytest.approx(1, abs=0.01)
    # samples have the stated density: their mean log-density is minus its entropy
    drawn = fitted.sample(4000, seed=0)
    assert np.abs(np.linalg.norm(drawn, axis=1) - 2).mean() < 0.5
    histogram = np.histogram2d(*drawn.T, bins=24, range=[[-4, 4], [-4, 4]])[0].T / len(drawn)
    centres = (np.linspace(-4, 4, 241)[1:] + np.linspace(-4, 4, 241)[:-1]) / 2
    fine = np.stack(np.meshgrid(centres, centres), -1).reshape(-1, 2)
    mass = np.exp(fitted.log_prob(fine)).reshape(24, 10, 24, 10).sum((1, 3)) / 30**2
    assert np.abs(histogram - mass).sum() < 0.25  # 0.15 is the noise of 4,000 samples


@pytest.mark.slow
def test_flow_keeps_best_held_out_weights(monkeypatch):
    monkeypatch.setattr(priors_principal, "_PATIENCE", 10_000)
    monkeypatch.setattr(priors_principal, "_EPOCHS", 100)  # by then 100 codes are memorised
    rng = np.random.default_rng(0)
    fitted = priors.fit("maf", rng.normal(size=(100, 4)))
    assert fitted.gain(rng.normal(size=(2000, 4))) > -0.3  # no density is better than the Gaussian here


@pytest.mark.slow
def test_knn_samples_lie_between_neighbouring_codes():
    codes = mixture(60, 0)
    drawn = priors.fit("knn", codes, n_neighbours=3).sample(300, seed=0).astype(np.float64)
    every = np.linalg.norm(codes[:, None] - codes[None], axis=2)
    np.fill_diagonal(every, np.inf)
    near = np.argsort(every, axis=1)[:, :3]
    used, places = set(), []
    for z in drawn:
        found = []
        for a in range(60):
            for rank, b in enumerate(near[a]):
                along = codes[b] - codes[a]
                u = np.clip((z - codes[a]) @ along / (along @ along), 0, 1)
                found.append((np.linalg.norm(codes[a] + u * along - z), rank, u, a))
        off, rank, u, a = min(found)
        assert off < 1e-5
        used.add((rank, a))
        places.append(u)
    assert {rank for rank, _ in used} == {0, 1, 2} and len({a for _, a in used}) > 45
    assert np.std(places) == pytest.approx(12**-0.5, abs=0.05)  # of U(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", priors.GENERAL_PRIORS)
def test_samples_are_determined_by_seed(name, monkeypatch):
    monkeypatch.setattr(priors_principal, "_EPOCHS", 3)
    codes = mixture(200, 0).astype(np.float32)
    one, two = (priors.fit(name, codes, seed=3) for _ in range(2))
    assert np.array_equal(one.sample(20, 5), two.sample(20, 5))
    assert np.array_equal(one.sample(20, 5), one.sample(20, 5))
    assert not np.isclose(one.sample(20, 5), one.sample(20, 6)).all(1).any()
    assert one.sample(20, 5).dtype == np.float32 and one.sample(20, 5).shape == (20, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", priors.GENERAL_PRIORS)
@pytest.mark.parametrize(
    "kind", ["all the same", "two", "one dimension", "a dead dimension", "twins", "binary", "sparse"]
)
def test_degenerate_codes_can_be_fitted(name, kind, monkeypatch):
    monkeypatch.setattr(priors_principal, "_EPOCHS", 3)
    codes = {
        "all the same": np.full((20, 3), 0.7),
        "two": np.array([[0.0, 1.0], [2.0, 3.0]]),
        "one dimension": mixture(50, 0)[:, :1],
        "a dead dimension": mixture(50, 0) * [1, 0, 1],
        "twins": np.repeat(mixture(2, 0), 10, axis=0),
        "binary": np.random.default_rng(0).integers(0, 2, (60, 4)),
        "sparse": mixture(60, 0).repeat(40, axis=1) * (np.random.default_rng(0).random((60, 120)) < 0.05),
    }[kind]
    drawn = priors.fit(name, codes.astype(np.float32)).sample(7, seed=0)
    assert drawn.shape == (7, codes.shape[1]) and np.isfinite(drawn).all()
    if kind == "binary":  # 0 and 1 are as frequent as in the codes
        many = priors.fit(name, codes.astype(np.float32)).sample(2000, seed=0)
        assert np.abs(many.mean(0) - codes.mean(0)).max() < 0.15
    if kind == "all the same":
        assert np.allclose(drawn, 0.7)
    if kind == "a dead dimension":
        assert np.abs(drawn[:, 1]).max() < 1e-5
    if kind == "twins":
        along = codes[10] - codes[0]
        off = drawn - codes[0] - np.outer((drawn - codes[0]) @ along / (along @ along), along)
        assert np.abs(off).max() < 1e-4


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"name": "kde"}, "choose from gaussian, gmm, maf, knn"),
        ({"codes": np.zeros((1, 3))}, "at least 2 codes"),
        ({"codes": np.full((5, 3), np.nan)}, "NaN or infinite"),
        ({"n_components": 0}, "n_components"),
        ({"n_neighbours": 0}, "n_neighbours"),
    ],
    ids=["name", "one code", "not finite", "components", "neighbours"],
)
def test_a_bad_value_is_refused(wrong, said):
    with pytest.raises(AezooError, match=said):
        priors.fit(**({"name": "gmm", "codes": mixture(20, 0)} | wrong))


def test_missing_zuko_names_extra_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zuko", None)
    with pytest.raises(AezooError, match=r"\.\[flows\]"):
        priors.fit("maf", mixture(20, 0))
