"""reconstruct: errors with explicit formulas, and all kinds of samples."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import aezoo
from aezoo.data.source import ArrayDataset
from aezoo.errors import AezooError
from aezoo.tasks.reconstruct import _PartReconstructor, _picture
from aezoo.tasks.samples import SampleSet


def test_linear_model_errors_match_pca():
    x = np.random.default_rng(0).normal(0, 1, (300, 6)) @ np.diag([3, 2, 1, 1, 0.5, 0.2])
    reference = PCA(2).fit(x)
    model = aezoo.create_model("linear_ae", (6,), latent_dim=2)
    with torch.no_grad():
        mean, axes = torch.tensor(reference.mean_).float(), torch.tensor(reference.components_).float()
        for weight in model.parameters():
            weight.zero_()
        linear = {tuple(p.shape): p for p in model.parameters()}
        linear[2, 6].copy_(axes)
        linear[6, 2].copy_(axes.T)
        linear[6,].copy_(mean)
        linear[2,].copy_(-axes @ mean)
    found = aezoo.reconstruct(model, x.astype(np.float32), batch_size=7)
    expected = reference.inverse_transform(reference.transform(x))
    assert np.allclose(found.x_hat, expected, atol=1e-4)
    assert np.allclose(found.mse, ((x - expected) ** 2).mean(1), rtol=1e-3, atol=1e-6)
    assert np.allclose(found.mae, np.abs(x - expected).mean(1), rtol=1e-3, atol=1e-6)
    # the deviance of the Gaussian likelihood is the squared error: see aezoo.distributions.likelihoods
    assert np.allclose(found.score, ((x - expected) ** 2).sum(1), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(9,), (2, 16), (1, 8, 8), (3, 9, 7), (1, 4, 8, 8)], ids=str)
def test_every_kind_of_sample_is_written(tmp_path, shape):
    model = aezoo.create_model("dense_ae", shape)
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    found = aezoo.reconstruct(model, x, n_shown=3, out=str(tmp_path), batch_size=2)
    assert np.load(tmp_path / "reconstructions.npy").shape == (5, *shape)
    assert torch.allclose(torch.from_numpy(np.array(found.x_hat)), model.eval()(x).detach(), atol=1e-6)
    assert (tmp_path / "errors.csv").read_text().startswith("index,mse,mae,score\n0,")
    assert (tmp_path / "reconstructions.png").stat().st_size > 1000
    assert [file.name for file in found.files] == ["reconstructions.npy", "errors.csv", "reconstructions.png"]
    assert "5 samples, PSNR" in found.summary()


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.02, 1.05), (-1.0, 2.0)])
def test_psnr_uses_the_same_range_in_all_commands(tmp_path, low, high):
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * (high - low) + low
    model = aezoo.create_model("linear_ae", (1, 8, 8), latent_dim=4).eval()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    tested = trainer.test(model, torch.utils.data.DataLoader(x, 16), verbose=False)[0]
    found = aezoo.reconstruct(model, x)
    packed, noisy = aezoo.compress(model, x, quality=12.0), aezoo.denoise(model, x, corrupt="gaussian:0", n_compared=40)
    r2 = 1 - found.mse.mean() / float((x - x.mean(0)).square().mean())
    assert found.r2 == pytest.approx(r2, rel=1e-5) and f"r2 {found.r2:.4g}" in found.summary()
    if high == 2:
        assert "test/psnr" not in tested and found.psnr is None and "PSNR" not in found.summary() + packed.summary()
        assert packed.rows[0]["mse"] == pytest.approx(tested["test/mse"], rel=1e-3) and "psnr" not in noisy.rows[0]
        assert "by mean squared error" in packed.summary() or " mse " in packed.summary()
    else:
        expected = pytest.approx(-10 * np.log10(tested["test/mse"]), abs=0.01)
        assert [tested["test/psnr"], found.psnr, packed.rows[0]["psnr"], noisy.rows[0]["psnr"]] == [expected] * 4
        assert f"PSNR {found.psnr:.2f} dB" in found.summary()


def test_missing_values_are_excluded_from_errors():
    model = aezoo.create_model("mvae", (6,), likelihood="gaussian")
    x = torch.rand(4, 6)
    x[0, :3], x[1, 3:] = torch.nan, torch.nan
    found = aezoo.reconstruct(model, x)
    errors = torch.from_numpy(np.array(found.x_hat)) - x
    assert np.allclose(found.mse, errors.square().nanmean(1), atol=1e-6)
    assert np.allclose(found.mae, errors.abs().nanmean(1), atol=1e-6)
    some = aezoo.reconstruct(aezoo.create_model("mmvae", (6,), likelihood="gaussian"), x, parts=0)
    assert np.isnan(some.mse).tolist() == [True, False, False, False]
    assert "1 of them lack the evaluated parts" in some.summary() and "nan" not in some.summary()
    assert np.allclose(found.score, model.anomaly_score(x)) and np.isfinite(found.score).all()
    with pytest.raises(AezooError, match="NaN or infinity in 2 of 4 rows"):
        aezoo.reconstruct(aezoo.create_model("vae", (6,)), x)


def test_single_sample_and_labelled_data_are_reconstructed(tmp_path):
    data = aezoo.DataModule("digits")
    x, y = data.tensors("test")
    model = aezoo.create_model("conv_ae", (1, 8, 8))
    aezoo.reconstruct(model, x[:1], out=str(tmp_path / "one"))
    aezoo.reconstruct(model, data, out=str(tmp_path / "all"))
    lines = (tmp_path / "all" / "errors.csv").read_text().splitlines()
    assert lines[0] == "index,mse,mae,score,label" and [int(line.split(",")[4]) for line in lines[1:]] == y.tolist()


@pytest.mark.slow
def test_multi_label_targets_are_omitted(tmp_path):
    data = SampleSet(ArrayDataset(torch.rand(3, 4), torch.zeros(3, 2)))
    aezoo.reconstruct(aezoo.create_model("dense_ae", (4,)), data, out=str(tmp_path))
    assert (tmp_path / "errors.csv").read_text().startswith("index,mse,mae,score\n0,")


def test_vae_score_is_deviance_at_posterior_mean_plus_kl():
    torch.manual_seed(0)
    model = aezoo.create_model("vae", (5,), latent_dim=2).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 if weight.ndim == 1 else 0)
        x = torch.rand(7, 5)
        mean, log_variance = model.posterior(x)
        q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
        nll = torch.nn.functional.binary_cross_entropy(model.decode(mean), x, reduction="none").sum(1)
        least = torch.nn.functional.binary_cross_entropy(x, x, reduction="none").sum(1)
    assert np.allclose(aezoo.reconstruct(model, x).score, nll - least + kl, rtol=1e-4)


def test_picture_shows_best_median_and_worst_samples(monkeypatch):
    shown = {}
    monkeypatch.setattr(
        "aezoo.callbacks.plotting.panel_figure",
        lambda panels, labels, columns: shown.update(dict(zip(labels, panels, strict=True))),
    )
    x = torch.zeros(9, 2)
    mse = np.array([5, 1, 9, 2, 7, 3, 8, 4, 6]) / 10
    _picture(SampleSet.from_data(x + torch.arange(9)[:, None]), np.zeros((9, 2), np.float32), mse, 1)
    assert {label: float(panel["original"][0]) for label, panel in shown.items()} == {
        "best: mse 0.1": 1,
        "median: mse 0.5": 0,
        "worst: mse 0.9": 2,
    }
    shown.clear()
    mse[2] = np.nan
    _picture(SampleSet.from_data(x + torch.arange(9)[:, None]), np.zeros((9, 2), np.float32), mse, 1)
    assert [*shown][-1] == "worst: mse 0.8"


def test_results_do_not_depend_on_batch_size():
    model = aezoo.create_model("vae", (1, 8, 8))
    x = torch.rand(11, 1, 8, 8)
    one, many = (aezoo.reconstruct(model, x, batch_size=size) for size in (1, 11))
    assert np.allclose(one.x_hat, many.x_hat, atol=1e-6) and np.allclose(one.score, many.score, rtol=1e-5)


def test_bad_values_are_refused():
    model, x = aezoo.create_model("dense_ae", (4,)), torch.rand(3, 4)
    for bad in ({"table": "xls"}, {"n_shown": -1}, {"batch_size": 0}):
        with pytest.raises(AezooError, match=next(iter(bad))):
            aezoo.reconstruct(model, x, **bad)


@pytest.fixture
def half():
    """A model of two modalities, and samples."""
    torch.manual_seed(0)
    model = aezoo.create_model("mvae", (1, 6, 4), parts=(2, 4), latent_dim=2, hidden_dims=(5,)).eval()
    return model, torch.rand(7, 1, 6, 4)


def test_samples_are_reconstructed_from_chosen_modalities(half, tmp_path):
    model, x = half
    found = aezoo.reconstruct(model, x, parts=(1,), out=str(tmp_path), batch_size=3)
    expected = model.reconstruct_from(x, (1,)).detach()
    assert torch.allclose(torch.from_numpy(np.array(found.x_hat)), expected, atol=1e-6)
    square = (x - expected) ** 2
    assert np.allclose(found.part_mse[0], square[:, :, :2].mean((1, 2, 3)), rtol=1e-4)
    assert np.allclose(found.part_mse[1], square[:, :, 2:].mean((1, 2, 3)), rtol=1e-4)
    assert found.score is None and np.allclose(found.mse, square.mean((1, 2, 3)), rtol=1e-4)
    assert (tmp_path / "errors.csv").read_text().startswith("index,mse,mae,mse_0,mse_1\n0,")
    assert "mse_1" in found.summary() and (tmp_path / "reconstructions.png").is_file()
    other = torch.cat([torch.rand(7, 1, 2, 4), x[:, :, 2:]], 2)
    assert np.array_equal(aezoo.reconstruct(model, other, parts=1, batch_size=3).x_hat, found.x_hat)


def test_unread_modalities_are_grey_in_picture(half):
    model, x = half
    shown = _PartReconstructor(model, (0,)).shown(x)
    assert torch.equal(shown[:, :, :2], x[:, :, :2]) and shown[:, :, 2:].unique().numel() == 1
    x[0, :, :2] = torch.nan
    shown = _PartReconstructor(model, (0,)).shown(x)[:, :, 2:]
    assert shown.unique().numel() == 1 and shown.isfinite().all()


@pytest.mark.parametrize(
    ("name", "parts", "words"), [("vae", (0,), "vae does not support parts"), ("mvae", (2,), "0 to 1")]
)
def test_unknown_modalities_are_refused(name, parts, words):
    model = aezoo.create_model(name, (6,), latent_dim=2, hidden_dims=(5,))
    with pytest.raises(AezooError, match=words):
        aezoo.reconstruct(model, torch.rand(3, 6), parts=parts)
