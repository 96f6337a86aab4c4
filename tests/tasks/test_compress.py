"""compress and decompress: rates match the bounds, samples roundtrip, and damaged files are refused."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import betabinom, logistic

import aezoo
from aezoo.data.source import ArrayDataset
from aezoo.errors import AezooError
from aezoo.tasks.codec import baselines, lossless, lossy
from aezoo.tasks.codec.compression import Compression
from aezoo.tasks.compress import compress
from aezoo.tasks.decompress import decompress
from aezoo.tasks.samples import SampleSet, reference_tensor


def _vae(likelihood, seed=0, latent_dim=4):
    torch.manual_seed(seed)
    model = aezoo.create_model("vae", (64,), latent_dim=latent_dim, hidden_dims=(16,), likelihood=likelihood).eval()
    with torch.no_grad():  # a posterior far from the prior, so that the KL is a large part of the bits
        (*_, last) = (part for part in model.encoder.modules() if isinstance(part, torch.nn.Linear))
        last.bias.copy_(torch.cat([torch.full((latent_dim,), 1.5), torch.full((latent_dim,), -4.0)]))
    return model


def _file(tmp_path, x, model, **settings):
    compress(model, x, compare=False, out=str(tmp_path), **settings)
    return tmp_path / "samples.aez"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("likelihood", "k"), [("bernoulli", 2), ("discretised_logistic:0.3", 256), ("beta_binomial", 256)]
)
def test_lossless_roundtrip_takes_elbo_bits(tmp_path, likelihood, k):
    model, x = (
        _vae(likelihood, latent_dim=16),
        torch.randint(0, k, (300, 64), generator=torch.Generator().manual_seed(1)) / (k - 1),
    )
    found = compress(model, x, compare=False, out=str(tmp_path))
    back = decompress(model, str(tmp_path / "samples.aez"))
    assert np.array_equal(back.x, (x * 255).round().byte().numpy())
    with torch.no_grad():
        mu, log_var = model.posterior(x)
        q = torch.distributions.Normal(mu, torch.exp(0.5 * log_var))
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1).mean().item()
        nats = []
        for _ in range(16):
            t, v = model.decoder(q.sample()).double().numpy(), x.double().numpy()
            if k == 2:
                p = np.where(v > 0.5, 1 / (1 + np.exp(-t)), 1 / (1 + np.exp(t)))
            elif likelihood == "beta_binomial":
                p = betabinom.pmf((255 * v).round(), 255, 2 * expit(t), 2 * expit(-t))
            else:
                upper = np.where(v == 1, 1, logistic.cdf(v + 0.5 / 255, t, 0.3))
                p = upper - np.where(v == 0, 0, logistic.cdf(v - 0.5 / 255, t, 0.3))
            nats.append(-np.log(p).sum(1).mean() + kl)
    assert found.net_bits == pytest.approx(300 * np.mean(nats) / math.log(2), rel=0.02)


def test_compress_does_not_move_model_likelihood(tmp_path, monkeypatch):
    model, moved = _vae("beta_binomial"), []
    real = torch.nn.Module._apply
    # called in place by .cpu() and .to()
    monkeypatch.setattr(torch.nn.Module, "_apply", lambda self, *rest: moved.append(self) or real(self, *rest))
    compress(model, torch.randint(0, 256, (20, 64)) / 255, compare=False, out=str(tmp_path))
    assert moved and not any(part is model.likelihood for part in moved)


def test_initial_bits_are_recovered_or_decoding_fails():
    model = _vae("bernoulli")
    levels = np.random.default_rng(0).integers(0, 2, (20, 64)).astype(np.uint8)
    with torch.no_grad():
        a, b = (
            lossless.BitsBack(lossless.latent_chain(model), reference_tensor(model), 8, 8, key) for key in (b"a", b"b")
        )
        words = a.encode(levels).words
        assert np.array_equal(a.decode(words, 20), levels) and b.decode(words, 20) is None


@pytest.mark.slow
def test_lossy_quality_raises_psnr_and_the_file_decodes(tmp_path):
    x = torch.rand(100, 64, generator=torch.Generator().manual_seed(0))
    model = aezoo.create_model("linear_ae", (64,), latent_dim=64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.eye(64) if p.ndim == 2 else torch.zeros(64))
    found = compress(model, x, mode="lossy", quality=(1.0, 3.0, 5.0), compare=False, out=str(tmp_path))
    psnr = [row["psnr"] for row in found.rows]
    assert psnr[1] > psnr[0] + 6 and psnr[2] > psnr[1] + 6
    back = decompress(model, str(tmp_path / "samples-q5.aez"))
    assert back.same and -10 * math.log10(np.mean((back.x - x.numpy()) ** 2)) == pytest.approx(psnr[2], abs=0.01)


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path):
    model = _vae("bernoulli")
    path = _file(tmp_path, torch.ones(2, 64), model)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    damaged = [whole[:i] for i in range(len(whole))]
    for _ in range(300):
        i, bit = rng.integers(len(whole)), 1 << int(rng.integers(8))
        damaged.append(whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(AezooError) as caught:
            decompress(model, str(path))
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    with pytest.raises(AezooError, match="another model"):
        decompress(_vae("bernoulli", seed=1), str(path))


def test_lossy_codes_take_table_bits_and_roundtrip():
    random = np.random.default_rng(0)
    codes = (random.normal(size=(5000, 3)) * [1, 10, 0.1] + [0, 5, -3]).astype(np.float32)
    slope = np.array([1, 4, 2], np.float32)
    quantiser = lossy.ScalarQuantiser.fit(codes, lambda z: z * slope, 4.0)
    # equal steps of the output, 2^-4 deviations of the dimension that changes it most
    assert quantiser.step == pytest.approx(2**-4 * (slope * codes.std(0)).max() / slope, rel=0.01)
    codec = lossy.Codec.fit(codes, quantiser, codes.min(0), codes.max(0), len(codes))
    symbols = quantiser.symbols(codes)
    again = lossy.Codec.from_bytes(codec.to_bytes(), 3)
    content = codec.encode(symbols)
    assert np.array_equal(again.decode(content, len(symbols)), symbols)
    bits = 0.0
    for d, table in enumerate(again.histograms):
        borders = table.low + np.concatenate([[0], np.cumsum(table.width)])
        p = np.repeat(table.share / 4096 / table.width, table.width)
        assert p.sum() == pytest.approx(1)
        bits -= np.log2(p[symbols[:, d] - borders[0]]).sum()
    assert 8 * len(content) == pytest.approx(bits, rel=0.01, abs=64)
    error = np.abs(quantiser.codes(symbols) - codes).max(0)
    assert (error <= 0.5001 * quantiser.step).all() and error[1] > 0.49 * quantiser.step[1]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(9,), (2, 16), (1, 8, 8), (3, 9, 7), (1, 4, 8, 8)], ids=str)
@pytest.mark.parametrize("n", [1, 21])
def test_every_sample_shape_roundtrips(tmp_path, shape, n):
    model = aezoo.create_model("dense_ae", shape)
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))
    found = compress(model, x, out=str(tmp_path), batch_size=4)
    back = decompress(model, str(tmp_path / "samples.aez"), out=str(tmp_path / "back"))
    assert found.mode == "lossy" and back.same and back.x.shape == (n, *shape)
    assert np.array_equal(np.load(tmp_path / "back" / "samples.npy"), back.x)


def test_lossless_file_decodes_to_png_pixels(tmp_path):
    from PIL import Image

    torch.manual_seed(0)
    model = aezoo.create_model("vae", (1, 8, 8), latent_dim=2, hidden_dims=(8,)).eval()
    x = torch.randint(0, 2, (5, 1, 8, 8)).float()
    threads = torch.get_num_threads()
    compress(model, x, out=str(tmp_path), compare=False, threads=1)
    decompress(model, str(tmp_path / "samples.aez"), kind="png", out=str(tmp_path / "png"))
    pixels = [np.asarray(Image.open(tmp_path / "png" / f"{i:06d}.png")) for i in range(5)]
    assert np.array_equal(np.stack(pixels) / 255, x[:, 0].numpy()) and torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"mode": "zip"}, "mode is 'zip'"),
        ({"quality": 99.0}, "quality"),
        ({"quality": (1.0, 1.0)}, "quality"),
        ({"steps": "golden"}, "steps is 'golden'"),
        ({"precision": 0}, "precision is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"mode": "lossless"}, "needs values 0 and 1"),
    ],
)
def test_bad_values_are_refused(bad, words):
    with pytest.raises(AezooError, match=words):
        compress(_vae("bernoulli"), torch.rand(3, 64), **bad)


def test_a_model_without_a_posterior_has_no_lossless_code():
    with pytest.raises(AezooError):
        compress(aezoo.create_model("dense_ae", (64,)), torch.ones(3, 64), mode="lossless")


def _row(method, bits, psnr=math.nan, mse=math.nan):
    return baselines.table_row(method, bits / 8, (1, 1), psnr=psnr, mse=mse)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        # a photograph: the same size as AVIF at lower PSNR, larger than PCA at lower PSNR
        ([_row("aezoo vae", 4436, 16.3), _row("PCA", 2722, 18.3), _row("AVIF", 4390, 22.9), _row("JPEG", 9000, 30.0)],
         ["better than aezoo vae (16.3 dB) at 4436 bits per dimension: AVIF 22.9 dB, PCA 18.3 dB"]),
        # interpolated between two qualities, 1 % more bits: 20 + 10 log(202 / 100) / log(400 / 100) = 25.07 dB
        ([_row("aezoo vae", 200, 24.0), _row("JPEG", 100, 20.0), _row("JPEG", 400, 30.0)],
         ["better than aezoo vae (24 dB) at 200 bits per dimension: JPEG 25.07 dB"]),
        ([_row("aezoo vae", 200, 26.0), _row("JPEG", 100, 20.0), _row("JPEG", 400, 30.0), _row("xz (lossless)", 500)],
         ["no other method is better than aezoo vae (26 dB) at 200 bits per dimension, by PSNR"]),
        ([_row("aezoo vae", 600, 26.0), _row("xz (lossless)", 500)],
         ["better than aezoo vae (26 dB) at 600 bits per dimension: xz (lossless)"]),
        ([_row("-ELBO, the bound", 8), _row("aezoo, net", 9), _row("aezoo, the file", 20), _row("xz (lossless)", 16)],
         ["formats smaller than the file of 20 bits per dimension: xz (lossless) 16"]),
        ([_row("aezoo, the file", 20), _row("xz (lossless)", 24)],
         ["formats smaller than the file of 20 bits per dimension: none"]),
        ([_row("aezoo vae", 600, 26.0)], []),
        # no other method is as small, which does not imply that the model is good
        ([_row("aezoo vae", 100, -4.0), _row("mean sample", 0, -5.0), _row("PCA", 800, 15.6), _row("AVIF", 200, 12.8)],
         ["no other method is as small as aezoo vae (-4 dB) at 100 bits per dimension; the nearest: AVIF 12.8 dB at "
          "200"]),
        ([_row("aezoo vae", 100, -4.0), _row("mean sample", 0, 9.5), _row("AVIF", 200, 12.8)],
         ["better than aezoo vae (-4 dB) at 100 bits per dimension: mean sample 9.5 dB; no other method is as small, "
          "the nearest: AVIF 12.8 dB at 200"]),
        ([_row("aezoo vae", 100, 10.0), _row("mean sample", 0, 9.5), _row("AVIF", 100, 9.8)],
         ["no other method is better than aezoo vae (10 dB) at 100 bits per dimension, by PSNR"]),
        # data without a known peak
        ([_row("aezoo vae", 100, mse=2.0), _row("mean sample", 0, mse=1.5), _row("PCA", 90, mse=0.5)],
         ["better than aezoo vae (mse 2) at 100 bits per dimension: PCA mse 0.5, mean sample mse 1.5"]),
        ([_row("aezoo vae", 100, mse=0.2), _row("mean sample", 0, mse=1.5), _row("PCA", 90, mse=0.5)],
         ["no other method is better than aezoo vae (mse 0.2) at 100 bits per dimension, by mean squared error"]),
    ],
)  # fmt: skip
def test_the_verdict_names_methods_ahead_at_equal_rate(rows, said):
    assert baselines.verdict(rows) == said
    assert Compression("lossy", rows).summary().splitlines()[1 + len(rows) :] == said


def test_decompress_writes_the_format_of_the_input(tmp_path):
    import pandas

    frame = pandas.DataFrame(np.random.default_rng(0).normal(1e4, 1e3, (30, 3)).round(), columns=["eur", "m2", "built"])
    data = aezoo.DataModule.from_arrays(frame, scale="standard")
    model = aezoo.create_model("linear_ae", (3,), latent_dim=3).eval()
    compress(model, data, out=str(tmp_path), compare=False)
    back = decompress(model, str(tmp_path / "samples.aez"), out=str(tmp_path / "back"))
    read = pandas.read_csv(tmp_path / "back" / "samples.csv")
    assert list(read) == list(frame) and np.allclose(read, data.columns.values(back.x)) and len(back.files) == 1
    (tmp_path / "columns.json").write_text('{"names": ["a"], "offset": [0], "factor": [1]}')
    with pytest.raises(AezooError, match=r"columns\.json was not written by compress"):
        decompress(model, str(tmp_path / "samples.aez"))
    (tmp_path / "columns.json").unlink()
    decompress(model, str(tmp_path / "samples.aez"), columns=data.columns, out=str(tmp_path / "back"))
    assert pandas.read_csv(tmp_path / "back" / "samples.csv").equals(read)
    decompress(model, str(tmp_path / "samples.aez"), kind="npy", out=str(tmp_path / "npy"))
    assert np.array_equal(np.load(tmp_path / "npy" / "samples.npy"), back.x)

    images = ArrayDataset(torch.rand(3, 1, 8, 8), None, ["a.png", "b.png", "c.png"])
    model = aezoo.create_model("linear_ae", (1, 8, 8), latent_dim=2).eval()
    for samples, kind in ((SampleSet(images), "png"), (SampleSet(ArrayDataset(images.x)), "npy")):
        compress(model, samples, out=str(tmp_path), compare=False)
        found = decompress(model, str(tmp_path / "samples.aez"), out=str(tmp_path / kind))
        assert {file.suffix for file in found.files} == {f".{kind}"}


@pytest.mark.slow
@pytest.mark.parametrize("rates", [(1.05571, 1.05572), (0.0557, 0.0557), (0.0557, 3.849)], ids=str)
def test_axes_of_one_quality_have_short_labels(rates):
    rows = [
        {"method": name, "bits_per_dim": rate, "psnr": psnr, "ssim": math.nan}
        for name, rate, psnr in zip(("model", "PCA"), rates, (14.9, 14.9003), strict=True)
    ]
    figure = baselines.rate_distortion_figure(rows)
    figure.canvas.draw()
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        low, high = axis.get_view_interval()
        labels = [label.get_text() for label in axis.get_ticklabels() if low <= float(label.get_text()) <= high]
        assert 3 <= len(set(labels)) == len(labels) <= 10 and max(map(len, labels)) <= 5
        assert axis.get_offset_text().get_text() == ""
