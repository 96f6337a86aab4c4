"""generate: sources of samples, their distribution, and paths through code space."""

import importlib
import math

import numpy as np
import pytest
import torch
from scipy.spatial import geometric_slerp
from sklearn.decomposition import PCA
from torch import nn

import aezoo
from aezoo.errors import AezooError
from aezoo.tasks import generate_walks
from aezoo.tasks.generate import generate
from aezoo.tasks.samples import SampleSet


@pytest.fixture(scope="module")
def digits():
    return aezoo.DataModule("digits")


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return aezoo.create_model("vae", (1, 8, 8), latent_dim=4).eval()


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return aezoo.create_model("dense_ae", (1, 8, 8), latent_dim=4).eval()


def identity(size):
    """A model whose code is the sample itself."""
    model = aezoo.create_model("linear_ae", (size,), latent_dim=size, likelihood="gaussian")
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.eye(size) if weight.ndim == 2 else torch.zeros(size))
    return model.eval()


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_auto_prior_is_model_prior_if_available(tmp_path, vae):
    found = generate(vae, n=10, out=str(tmp_path), seed=3)
    torch.manual_seed(3)
    assert np.allclose(found.samples, vae.sample(10), atol=1e-6)
    assert np.array_equal(np.load(tmp_path / "samples.npy"), found.samples)
    assert (tmp_path / "samples.png").stat().st_size > 1000 and "own prior" in found.summary()


def test_linear_vae_samples_have_data_covariance():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 2)) @ rng.normal(size=(2, 5)) * 2 + rng.normal(size=(3000, 5)) * 0.3 + 1
    pca = PCA(2).fit(x)
    model = aezoo.create_model("vae", (5,), latent_dim=2, hidden_dims=(), likelihood="gaussian:0.3")
    loadings = pca.components_.T * np.sqrt(pca.explained_variance_ - pca.noise_variance_)  # Tipping & Bishop, eq. (7)
    (layer,) = (module for module in model.decoder.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(loadings))
        layer.bias.copy_(torch.from_numpy(pca.mean_))
    drawn = generate(model, n=50_000, batch_size=1000).samples.astype(np.float64)
    covariance = np.cov(drawn.T) + pca.noise_variance_ * np.eye(5)  # samples are means, without the noise of p(x|z)
    assert np.abs(covariance - np.cov(x.T)).max() < 0.03 * np.abs(np.cov(x.T)).max()
    assert np.abs(drawn.mean(0) - x.mean(0)).max() < 0.05


def test_auto_prior_is_mixture_for_model_without_prior():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(3, 0.2, (300, 2)), rng.normal(-3, 0.2, (100, 2))]).astype(np.float32)
    found = generate(identity(2), x[:50], fit_on=x, n=2000, n_components=2)
    assert found.source.startswith("samples from gmm, fitted to 400 codes; held-out codes are ")
    above = found.samples.mean(1) > 0
    assert above.mean() == pytest.approx(0.75, abs=0.03)
    assert np.abs(np.abs(found.samples) - 3).max() < 1.2  # nothing between the two, where a Gaussian has its middle
    assert found.samples[above].std(0) == pytest.approx([0.2, 0.2], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["gaussian", "gmm", "maf", "knn", "two_stage", "vamp", "riemannian"])
def test_samples_are_seeded_and_independent_of_batch_size(dense, digits, prior):
    one, same, other = (
        generate(dense, fit_on=digits.tensors("train")[0][:120], prior=prior, n=12, seed=seed, batch_size=size).samples
        for seed, size in ((1, 12), (1, 5), (2, 12))
    )
    # another batch size rounds differently, which is amplified by two networks and a draw in between
    assert np.allclose(one, same, atol=1e-4) and not np.allclose(one, other, atol=5e-4)
    assert one.shape == (12, 1, 8, 8)


@pytest.mark.parametrize("prior", ["gaussian", "gmm", "knn"])
def test_batched_draws_do_not_repeat(prior, monkeypatch):
    monkeypatch.setattr(importlib.import_module("aezoo.tasks.generate"), "_DRAWN_AT_ONCE", 5)
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    found = generate(identity(3), fit_on=x, prior=prior, n=13).samples
    assert len(np.unique(found.round(4), axis=0)) == 13


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(9,), (2, 16), (1, 8, 8), (3, 9, 7), (1, 4, 8, 8)], ids=str)
def test_every_kind_of_sample_is_written(tmp_path, shape):
    model = aezoo.create_model("dense_ae", shape, latent_dim=3)
    x = torch.rand(30, *shape, generator=torch.Generator().manual_seed(0))
    for name, asked in {
        "interpolation": {"interpolate": True},
        "traversal": {"traverse": True},
        "around": {"around": x},
    }.items():
        found = generate(model, x, fit_on=x, walks=2, steps=3, out=str(tmp_path), **asked)
        assert [file.name for file in found.files] == [f"{name}.npy", f"{name}.png"]
        assert np.load(tmp_path / f"{name}.npy").shape == (2, 3, *shape)
    found = generate(model, x, fit_on=x + 0.0, n=5, quality=6, out=str(tmp_path), batch_size=4)
    assert [file.name for file in found.files] == ["samples.npy", "samples.png", "quality.csv", "copies.png"]
    assert np.load(tmp_path / "samples.npy").shape == (5, *shape)
    assert all(file.stat().st_size > 500 for file in found.files if file.suffix == ".png")


def test_code_maps_are_sampled_with_full_shape(tmp_path):
    model = aezoo.create_model("conv_ae", (1, 8, 8))
    x = torch.rand(40, 1, 8, 8)
    for prior in ("gaussian", "gmm", "knn"):
        assert generate(model, fit_on=x, prior=prior, n=3).samples.shape == (3, 1, 8, 8)
    assert generate(model, x, traverse=True, walks=2, steps=4).samples.shape == (2, 4, 1, 8, 8)


# ---- paths in code space ---------------------------------------------------------------------------------------------


def test_curve_legend_names_both_samples():
    x = torch.rand(1, 2, 4)
    walk = generate_walks.Walks("interpolation", torch.rand(1, 3, 2), [], (x[:, 0], x[:, 1]))
    (legend,) = generate_walks.picture(walk, torch.rand(1, 3, 4).numpy()).legends
    assert [text.get_text() for text in legend.get_texts()] == ["first sample", "second sample"]


def test_interpolation_is_linear_or_spherical(vae, digits):
    x, _ = digits.tensors("test")
    with torch.no_grad():
        a, b = vae.encode(x[:2]).double().numpy()
        circle, line = (
            generate_walks.interpolation(vae, SampleSet.from_data(x[:2]), asked, 1, 7, 0).codes[0].numpy()
            for asked in (True, False)
        )
    assert np.allclose(line, np.linspace(a, b, 7), atol=1e-6)
    # in the plane of a and b, with the weights of the great circle between their directions, by scipy
    great = geometric_slerp(a / np.linalg.norm(a), b / np.linalg.norm(b), np.linspace(0, 1, 7))
    weights = np.linalg.lstsq(np.stack([a / np.linalg.norm(a), b / np.linalg.norm(b)], 1), great.T)[0]
    assert np.allclose(circle, weights.T @ np.stack([a, b]), atol=1e-5) and not np.allclose(circle, line, atol=1e-3)
    ends = torch.tensor([[0.0, 1, 2], [4.0, 1, -2]])
    straight = generate(identity(3), ends, interpolate=True, steps=5).samples[0]
    assert np.allclose(straight, np.linspace(*ends.numpy(), 5), atol=1e-6)


def test_slerp_matches_scipy_geometric_slerp():
    a, b = nn.functional.normalize(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    expected = geometric_slerp(a.numpy(), b.numpy(), t.numpy())
    assert np.allclose(generate_walks.slerp(a, b, t[:, None]), expected, atol=1e-6)
    assert torch.allclose(generate_walks.slerp(a, 2 * a, t[:, None])[-1], 2 * a)
    assert torch.isfinite(generate_walks.slerp(a, torch.zeros(6, dtype=torch.float64), t[:, None])).all()


def test_traversal_orders_dimensions_by_variance():
    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32) * [1, 5, 2]
    walked = generate(
        identity(3), x[:1].astype(np.float32), fit_on=x.astype(np.float32), traverse=True, steps=4
    ).samples
    for walk, d in zip(walked, (1, 2, 0), strict=True):
        assert np.allclose(walk[:, d], np.linspace(x[:, d].min(), x[:, d].max(), 4), atol=1e-5)
        others = [i for i in range(3) if i != d]
        assert np.allclose(walk[:, others], x[0, others], atol=1e-5)


def test_interpolation_defaults_to_samples_of_the_prior(vae):
    torch.manual_seed(0)
    with torch.no_grad():
        codes = vae.encode(vae.sample(1000))
        walked = generate(vae, traverse=True, walks=2, steps=3, batch_size=1000).samples
        z = codes[0].repeat(2, 3, 1)
        for i, d in enumerate(codes.var(0).argsort(descending=True)[:2]):
            low, high = codes[:, d].min(), codes[:, d].max()
            z[i, :, d] = torch.stack([low, (low + high) / 2, high])
        assert np.allclose(walked, vae.decode(z.flatten(0, 1)).unflatten(0, (2, 3)), atol=1e-5)
    assert generate(vae, interpolate=True, walks=3, steps=4).samples.shape == (3, 4, 1, 8, 8)
    some = torch.rand(3, 1, 8, 8)  # codes of these are varied by those of the prior
    assert generate(vae, around=some, steps=4).samples.shape == (3, 4, 1, 8, 8)
    assert np.allclose(generate(vae, around=some, spread=1e-6, steps=2).samples[:, 0], vae(some).detach(), atol=1e-4)


def test_neighbourhood_radius_is_in_code_deviations():
    rng = np.random.default_rng(0)
    train = (rng.normal(size=(500, 3)) * [1, 5, 0]).astype(np.float32)
    x = rng.normal(size=(2, 3)).astype(np.float32)
    found = generate(identity(3), around=x, fit_on=train, spread=0.1, steps=4000).samples - x[:, None]
    assert found.reshape(-1, 3).std(0) == pytest.approx(0.1 * train.std(0), rel=0.03)
    assert np.abs(found.reshape(-1, 3).mean(0)).max() < 0.03


# ---- bad values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["gaussian", "gmm", "knn"])
def test_equal_training_samples_generate_same_sample(dense, prior):
    x = torch.full((12, 1, 8, 8), 0.3)
    found = generate(dense, x, fit_on=x, prior=prior, n=3, quality=4)
    assert np.allclose(found.samples, dense(x[:3]).detach(), atol=1e-5)
    assert all(math.isfinite(found.figures[0][name]) for name in ("fid", "kid", "precision", "recall"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prior": "kde"}, "choose from auto, own, gaussian"),
        ({"prior": "own"}, "has no prior of its own"),
        ({"fit_on": None}, "give them as fit_on"),
        ({"fit_on": torch.rand(1, 1, 8, 8)}, "at least 2 codes"),
        ({"fit_on": torch.rand(9, 1, 9, 9)}, "expects samples of shape"),
        ({"n": 0}, "n, walks and batch_size must be at least 1"),
        ({"steps": 1}, "steps at least 2"),
        ({"interpolate": True, "traverse": True}, "exclude each other"),
        ({"spread": 0.0}, "spread must be above 0"),
        ({"traverse": True, "fit_on": None}, "walks start from samples: give x"),
        ({"around": torch.rand(1, 1, 8, 8), "fit_on": None}, "two at least: give them as fit_on"),
        ({"traverse": True, "fit_on": torch.rand(1, 1, 8, 8)}, "two at least: give them as fit_on"),
        ({"interpolate": True, "fit_on": torch.rand(1, 1, 8, 8)}, "needs two samples at least, x contains one"),
        ({"interpolate": True, "circle": True}, "has no prior: leave it out"),
        ({"circle": True}, "give interpolate, too"),
        ({"quality": 5, "fit_on": torch.rand(1, 1, 8, 8)}, "two training samples at least"),
        ({"quality": 1}, "0 or at least 2"),
        ({"quality": 5, "traverse": True}, "leave out interpolate"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_bad_value_is_refused_in_one_line(dense, wrong, said):
    with pytest.raises(AezooError, match=said) as caught:
        generate(dense, **({"fit_on": torch.rand(9, 1, 8, 8)} | wrong))
    assert "\n" not in str(caught.value)


def test_quality_needs_training_samples_even_with_a_prior(vae):
    with pytest.raises(AezooError, match="give them as fit_on"):
        generate(vae, torch.rand(5, 1, 8, 8), quality=10)
