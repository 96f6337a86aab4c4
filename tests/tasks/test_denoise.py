"""denoise: the Wiener filter's closed-form error, filters compared with scikit-image, and seeded noise."""

import csv
import sys

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle

import aezoo
from aezoo.callbacks import plotting
from aezoo.errors import AezooError
from aezoo.tasks import denoise_filters
from aezoo.tasks.denoise import denoise


def by_method(found):
    return {row["method"]: row for row in found.rows}


def images(n=12, channels=1, side=16):
    """Smooth blobs."""
    rng = np.random.default_rng(3)
    row, column = np.mgrid[:side, :side] / side
    centre = rng.uniform(0.2, 0.8, (n, channels, 2, 1, 1))
    distance = (row - centre[:, :, 0]) ** 2 + (column - centre[:, :, 1]) ** 2
    return np.exp(-distance / 0.05).astype(np.float32)


def linear(matrix, offset):
    """x_hat = matrix x + offset."""
    d = len(offset)
    model = aezoo.create_model("linear_ae", (d,), latent_dim=d)
    weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        weights["encoder.1.weight"].copy_(torch.as_tensor(matrix))
        weights["decoder.0.weight"].copy_(torch.eye(d))
        model.decoder[0].bias.copy_(torch.as_tensor(offset))
    return model


@pytest.mark.slow
def test_wiener_filter_model_has_wiener_error():
    rng, d, sigma = np.random.default_rng(0), 8, 0.7
    mix = rng.normal(0, 1, (d, d)) / np.arange(1, d + 1)
    covariance, mean = mix @ mix.T, rng.normal(0, 1, d)
    x = (rng.normal(0, 1, (20_000, d)) @ mix.T + mean).astype(np.float32)
    # x_hat = mean + C (C + sigma^2 I)^-1 (y - mean), with error tr(C - C (C + sigma^2 I)^-1 C)
    wiener = covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(d))
    expected = np.trace(covariance - wiener @ covariance) / d
    model = linear(wiener, mean - wiener @ mean)
    found = denoise(model, x, corrupt=f"gaussian:{sigma}", n_compared=20_000)
    rows = by_method(found)
    assert rows["linear_ae"]["mse"] == pytest.approx(expected, rel=0.01)
    assert list(rows) == ["linear_ae", "identity"]  # filters need neighbouring values
    # any other linear map is worse
    for factor in (0.9, 1.1):
        other = linear(factor * wiener, mean - factor * wiener @ mean)
        assert denoise(other, x, corrupt=f"gaussian:{sigma}").rows[0]["mse"] > expected


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_identity_psnr_matches_noise_variance(sigma):
    model = aezoo.create_model("dense_ae", (1, 16, 16), latent_dim=2)
    found = denoise(model, images(300), corrupt=f"gaussian:{sigma}", baselines=False)
    assert by_method(found)["identity"]["psnr"] == pytest.approx(-10 * np.log10(sigma**2), abs=0.05)


def test_median_filter_removes_salt_and_pepper():
    x = np.full((4, 1, 32, 32), 0.4, np.float32)
    model = aezoo.create_model("dense_ae", (1, 32, 32), latent_dim=2)
    rows = by_method(denoise(model, x, corrupt="salt_and_pepper:0.05"))
    assert rows["identity"]["mse"] > 0.005
    assert rows["median filter"]["mse"] == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_filters_match_scikit_image(channels):
    rng = np.random.default_rng(0)
    x = images(3, channels) + 0.2 * rng.normal(0, 1, (3, channels, 16, 16)).astype(np.float32)
    x = x.astype(np.float32)
    options = {"patch_size": 5, "patch_distance": 6, "fast_mode": True, "h": 0.15, "sigma": 0.2}
    tv, means = denoise_filters.total_variation(x, 0.1), denoise_filters.non_local_means(x, 0.2, 0.15)
    assert tv.shape == means.shape == x.shape
    for i, image in enumerate(np.moveaxis(x, 1, -1)):
        # channels last, as documented by scikit-image
        assert np.allclose(tv[i].transpose(1, 2, 0), denoise_tv_chambolle(image, weight=0.1, channel_axis=-1))
        grey = {"channel_axis": -1} if channels == 3 else {}
        expected = denoise_nl_means(image if channels == 3 else image[..., 0], **options, **grey)
        assert np.allclose(means[i].transpose(1, 2, 0), expected.reshape(image.shape), atol=1e-6)
    window = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, ((0,) * 2,) * 2 + ((1, 1),) * 2, "symmetric"), (3, 3), (2, 3)
    )
    assert np.allclose(denoise_filters.median(x, 3), np.median(window, axis=(-1, -2)))


@pytest.mark.slow
def test_table_matches_scikit_image_metrics():
    model, x = aezoo.create_model("dense_ae", (1, 16, 16), latent_dim=2), images(40)
    found = denoise(model, x, corrupt="gaussian:0.2", n_compared=40)
    row = found.rows[0]
    assert row["psnr"] == pytest.approx(peak_signal_noise_ratio(x, found.x_hat, data_range=1), abs=1e-3)
    # torchmetrics' window, inside of the borders
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    pairs = zip(x[:, 0], found.x_hat[:, 0], strict=True)
    assert row["ssim"] == pytest.approx(np.mean([structural_similarity(a, b, **options) for a, b in pairs]), abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("low", "high"), [(-3.0, 5.0), (0.0, 255.0), (5.0, 5.5)])
def test_ssim_takes_the_range_of_data_without_psnr(low, high):
    model = aezoo.create_model("dense_ae", (1, 16, 16), latent_dim=2, likelihood="gaussian")
    x = images(20)
    x = ((x - x.min()) / np.ptp(x) * (high - low) + low).astype(np.float32)
    found = denoise(model, x, corrupt=f"gaussian:{0.1 * (high - low)}")
    row = found.rows[0]
    assert row["mse"] == pytest.approx(((x - found.x_hat) ** 2).mean(), rel=1e-4)
    assert "psnr" not in row and "PSNR" not in found.summary()
    assert f"SSIM for a range of {high - low:g}, the clean samples'" in found.summary()
    # SSIM of values scaled to [0, 1]
    unit = denoise(linear(np.eye(256), np.zeros(256)), x.reshape(20, 256), corrupt=f"gaussian:{0.1 * (high - low)}")
    noisy = (unit.x_hat.reshape(20, 16, 16) - low) / (high - low)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    pairs = zip((x[:, 0] - low) / (high - low), noisy, strict=True)
    # torchmetrics includes the borders, with another reflection
    expected = np.mean([structural_similarity(a, b, full=True, **options)[1] for a, b in pairs])
    assert by_method(found)["identity"]["ssim"] == pytest.approx(expected, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.03, 0.3, 1.0])
def test_filter_strength_grid_is_near_optimal(sigma):
    clean = images(6)
    noisy = (clean + sigma * np.random.default_rng(0).normal(0, 1, clean.shape)).astype(np.float32)

    def error(output):
        return ((output - clean) ** 2).mean()

    found = denoise_filters.filters((1, 16, 16), sigma)
    least = {name: min(error(run(noisy)) for run in settings.values()) for name, settings in found.items()}
    shares = sigma * np.geomspace(0.2, 10, 20)
    assert least["total variation"] < 1.05 * min(error(denoise_filters.total_variation(noisy, w)) for w in shares)
    assert least["non-local means"] < 1.15 * min(
        error(denoise_filters.non_local_means(noisy, sigma, h)) for h in shares
    )
    # a larger window would blur a small image too much
    assert least["median filter"] < 1.25 * min(error(denoise_filters.median(noisy, size)) for size in (3, 5, 7, 9))


@pytest.mark.slow
def test_filters_are_invariant_to_data_scale():
    model = aezoo.create_model("dense_ae", (1, 16, 16), latent_dim=2, likelihood="gaussian")
    small, large = (
        denoise(model, unit * (images(8) - 0.5), corrupt=f"gaussian:{0.2 * unit}").rows[1:] for unit in (1, 100)
    )
    assert [row["setting"] for row in small] == [row["setting"] for row in large]
    # 0.05 dB
    assert [1e4 * row["mse"] for row in small] == pytest.approx([row["mse"] for row in large], rel=0.0115)


@pytest.mark.slow
def test_filter_settings_are_chosen_on_spread_out_samples(monkeypatch):
    seen = []
    best_setting = denoise_filters.best_setting
    monkeypatch.setattr(
        "aezoo.tasks.denoise.best_setting", lambda s, noisy, clean: seen.append(clean) or best_setting(s, noisy, clean)
    )
    # sorted by brightness, as many sets are by class
    x = np.repeat(np.linspace(0, 1, 200, dtype=np.float32), 256).reshape(200, 1, 16, 16)
    found = denoise(aezoo.create_model("dense_ae", (1, 16, 16)), x, corrupt="gaussian:0.1")
    assert len(seen[0]) == 64 and seen[0].mean() == pytest.approx(0.5, abs=0.1)
    assert "best for 64 of them" in found.summary()


@pytest.mark.slow
def test_filter_uses_setting_with_least_error():
    clean = images(20)
    noisy = clean + 0.3 * np.random.default_rng(0).normal(0, 1, clean.shape).astype(np.float32)
    settings = denoise_filters.filters((1, 16, 16), 0.3)["total variation"]
    errors = {name: ((run(noisy) - clean) ** 2).mean() for name, run in settings.items()}
    best = denoise_filters.best_setting(settings, noisy, clean)
    assert all(errors[best] <= error for error in errors.values()) and len(set(errors.values())) == len(errors)


def test_noise_depends_on_seed_and_sample_index_only():
    model, x = aezoo.create_model("dense_ae", (1, 16, 16), latent_dim=2), images(20)
    options = {"corrupt": "gaussian:0.2", "baselines": False}
    first = denoise(model, x, **options)
    assert np.allclose(denoise(model, x, batch_size=3, **options).x_hat, first.x_hat, atol=1e-6)
    assert np.allclose(denoise(model, x[:5], **options).x_hat, first.x_hat[:5], atol=1e-6)
    assert not np.allclose(denoise(model, x, seed=1, **options).x_hat, first.x_hat, atol=1e-6)
    same = denoise(model, np.repeat(x[:1], 2, 0), **options).x_hat
    assert not np.allclose(same[0], same[1], atol=1e-6)


def test_table_uses_n_samples_with_model_noise():
    model, x = linear(np.eye(5), np.zeros(5)), np.random.default_rng(0).normal(0, 1, (50, 5)).astype(np.float32)
    found = denoise(model, x, corrupt="gaussian:0.3", n_compared=10, batch_size=7)
    # the model is the identity
    assert found.rows[0]["mse"] == pytest.approx(found.rows[1]["mse"], rel=1e-5)
    assert "least error" in found.summary() and "filter" not in found.summary()
    assert found.n_compared == 10 and "10 of 50 samples" in found.summary() and len(found.x_hat) == 50


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(9,), (2, 16), (1, 8, 8), (3, 9, 7), (1, 4, 8, 8)], ids=str)
def test_every_kind_of_sample_is_denoised_and_written(tmp_path, shape):
    model = aezoo.create_model("dense_ae", shape, latent_dim=3)
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    found = denoise(model, x, corrupt="gaussian:0.1", n_shown=3, out=str(tmp_path), batch_size=2)
    assert [path.name for path in found.files] == ["denoised.npy", "denoise.csv", "denoised.png"]
    assert np.load(tmp_path / "denoised.npy").shape == (5, *shape)
    rows = list(csv.DictReader((tmp_path / "denoise.csv").read_text().splitlines()))
    filters = {1: [], 2: ["median filter", "total variation"], 4: ["median filter", "total variation"]}
    more = filters.get(len(shape), ["median filter", "total variation", "non-local means"])
    assert [row["method"] for row in rows] == ["dense_ae", "identity", *more]
    assert [float(row["mse"]) for row in rows] == pytest.approx([row["mse"] for row in found.rows])


def test_noisy_input_is_denoised_without_metrics(tmp_path, monkeypatch):
    shown, drawn = [], plotting.mosaic_figure
    monkeypatch.setattr(plotting, "mosaic_figure", lambda rows, names: shown.append(names) or drawn(rows, names))
    model, x = aezoo.create_model("dense_ae", (1, 8, 8), latent_dim=3), torch.rand(3, 1, 8, 8)
    x = x + 0.5 * torch.randn(x.shape)  # outside of the range of clean samples
    found = denoise(model, x, out=str(tmp_path))
    assert [path.name for path in found.files] == ["denoised.npy", "denoised.png"]
    assert found.rows == [] and "--corrupt gaussian:0.3" in found.summary()
    assert shown == [["input", "output"]]  # noise is not assumed in the labels
    with torch.no_grad():
        assert np.allclose(found.x_hat, model.eval()(x), atol=1e-6)


def test_missing_scikit_image_is_named_in_table(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    model = aezoo.create_model("dense_ae", (1, 8, 8), latent_dim=3)
    rows = by_method(denoise(model, images(3, side=8), corrupt="gaussian:0.1"))
    assert rows["median filter"]["mse"] > 0
    for name in ("total variation", "non-local means"):
        assert rows[name]["mse"] is None and "pip install '.[images]' in a checkout of aezoo" in rows[name]["setting"]


@pytest.mark.parametrize("x", [images(1), np.full((3, 1, 16, 16), 0.5, np.float32)], ids=["one sample", "constant"])
@pytest.mark.parametrize("corrupt", ["gaussian:0", "masking:1", "salt_and_pepper:1"])
def test_degenerate_samples_and_zero_noise_give_finite_errors(x, corrupt):
    model = aezoo.create_model("dense_ae", (1, 16, 16), latent_dim=3)
    found = denoise(model, x, corrupt=corrupt)
    assert all(np.isfinite(row["mse"]) for row in found.rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrupt": "fog:1"}, "unknown corruption 'fog:1'"),
        ({"corrupt": "gaussian"}, "needs a standard deviation"),
        ({"corrupt": "gaussian:1e38"}, "at most 1e"),
        ({"n_compared": 0}, "n_compared"),
        ({"n_shown": -1}, "n_shown"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_values_are_refused_in_one_line(options, message):
    with pytest.raises(AezooError, match=message) as refused:
        denoise(aezoo.create_model("dense_ae", (1, 16, 16)), images(2), **options)
    assert "\n" not in str(refused.value)
