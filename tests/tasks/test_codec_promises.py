"""Guarantees of the codec besides roundtrips: hierarchical latents, other machines, whole files, comparable tables."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.overrides import TorchFunctionMode

import aezoo
from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.nets.blocks.dictionary import geometric_median
from aezoo.tasks.codec import baselines, lossless, lossy, tables
from aezoo.tasks.compress import compress
from aezoo.tasks.decompress import decompress
from aezoo.tasks.samples import reference_tensor


class WithoutFloat64(TorchFunctionMode):
    """Treats all tensors as those of a device without float64, until `.cpu()` is called."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.double and not getattr(args[0], "fetched", False):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        found = func(*args, **kwargs or {})
        if func is torch.Tensor.cpu:
            found.fetched = True
        return found


class TwoLayers(Autoencoder):
    """p(z2) p(z1 | z2) p(x | z1), q(z2 | x) q(z1 | x, z2), all of them linear and different."""

    has_prior = True

    def __init__(self, input_shape=(64,)):
        super().__init__(input_shape, likelihood="bernoulli")
        self.save_hyperparameters()
        self.code_shape = (2,)
        self.top, self.down, self.up = nn.Linear(64, 4), nn.Linear(2, 24), nn.Linear(66, 24)
        self.decoder = nn.Linear(12, 64)

    def encode(self, x):
        return self.top(x)[:, :2]

    def decode(self, z):
        return self.decoder(self.down(z)[:, :12]).sigmoid()

    def loss(self, x, y=None):
        raise NotImplementedError

    def latent_chain(self):
        model = self

        class Top:
            def prior(self, above, n):
                return torch.zeros(n, 2) + 0.3, torch.full((n, 2), 0.4)

            def posterior(self, x, above):
                mu, s = model.top(x).chunk(2, 1)
                return mu, torch.exp(s - 2)

        class Low:
            def prior(self, above, n):
                m, s = model.down(above[0].float()).reshape(n, 2, 3, 4).unbind(1)
                return m, torch.exp(0.3 * s - 0.7)

            def posterior(self, x, above):
                mu, s = model.up(torch.cat([x, above[0].float()], 1)).reshape(len(x), 2, 3, 4).unbind(1)
                return mu, torch.exp(s - 2)

        return lossless.LatentChain(
            [Top(), Low()], lambda z: 3 * self.decoder(z[1].flatten(1).float()), self.likelihood, self.input_shape
        )


def bits(n):
    return torch.randint(0, 2, (n, 64), generator=torch.Generator().manual_seed(1)).float()


def vae(likelihood="bernoulli", shape=(64,), **settings):
    torch.manual_seed(0)
    model = aezoo.create_model("vae", shape, likelihood=likelihood, **({"hidden_dims": (16,)} | settings)).eval()
    with torch.no_grad():  # at the initial weights, q is close to the prior and p(x|z) hardly depends on x
        for weights in model.parameters():
            weights.mul_(2)
        (*_, last) = (part for part in model.encoder.modules() if isinstance(part, nn.Linear))
        last.bias[len(last.bias) // 2 :] -= 4  # a narrow posterior, so that a draw of z is close to the mean
    return model


@pytest.mark.slow
def test_two_latent_layers_cost_both_kls_and_roundtrip(tmp_path):
    torch.manual_seed(0)
    model, x = TwoLayers().eval(), bits(400)
    found = compress(model, x, compare=False, out=str(tmp_path))
    assert found.mode == "lossless"
    assert np.array_equal(decompress(model, str(tmp_path / "samples.aez")).x, (x * 255).byte().numpy())
    nats = []
    with torch.no_grad():
        for _ in range(16):
            mu, s = model.top(x).chunk(2, 1)
            q2, p2 = Normal(mu, torch.exp(s - 2)), Normal(torch.tensor(0.3), torch.tensor(0.4))
            z2 = q2.sample()
            mu, s = model.up(torch.cat([x, z2], 1)).chunk(2, 1)
            m, t = model.down(z2).chunk(2, 1)
            q1, p1 = Normal(mu, torch.exp(s - 2)), Normal(m, torch.exp(0.3 * t - 0.7))
            log_p = Bernoulli(logits=3 * model.decoder(q1.sample())).log_prob(x).sum()
            nats.append(float(kl_divergence(q2, p2).sum() + kl_divergence(q1, p1).sum() - log_p))
    assert found.net_bits == pytest.approx(np.mean(nats) / math.log(2), rel=0.01)
    assert found.bound_bits == pytest.approx(np.mean(nats) / math.log(2), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [9, 12])
@pytest.mark.parametrize(
    ("likelihood", "shape", "settings"),
    [
        ("bernoulli", (64,), {}),
        ("discretised_logistic:0.3", (64,), {}),
        ("beta_binomial:3", (64,), {}),
        ("discretised_logistic:0.3", (3, 8, 8), {"net": "conv", "hidden_dims": (4,)}),
    ],
)
def test_net_rate_matches_model_elbo(likelihood, shape, settings, precision):
    model = vae(likelihood, shape, latent_dim=6, **settings)
    torch.manual_seed(2)
    with torch.no_grad():  # samples drawn from the model, as those of a trained one would be
        x = model.likelihood.sample(model.decoder(torch.randn(200, 6)))
    found = compress(model, x, compare=False, precision=precision)
    torch.manual_seed(5)
    with torch.no_grad():
        elbo = np.mean([float(model.loss(x)["elbo"]) for _ in range(50)])
    assert found.net_bits == pytest.approx(-200 * elbo / math.log(2), rel=0.01)
    # the file contains net bits, initial bits, and a header of constant size
    one = compress(model, x[:1], compare=False, precision=precision)
    heads = [8 * len(part.contents[0]) - part.net_bits - part.initial_bits for part in (found, one)]
    assert heads[0] == pytest.approx(heads[1], abs=128) and heads[1] < 8 * 800


def test_device_without_float64_widens_on_cpu():
    torch.manual_seed(0)
    model = aezoo.create_model("vae", (64,), latent_dim=4, hidden_dims=(16,), likelihood="bernoulli").eval()
    levels = np.random.default_rng(0).integers(0, 2, (20, 64)).astype(np.uint8)
    coder = lossless.BitsBack(lossless.latent_chain(model), reference_tensor(model), 8, 8, b"a")
    rows = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    with torch.no_grad(), WithoutFloat64():
        assert np.array_equal(coder.decode(coder.encode(levels).words, 20), levels)
        assert coder.bound(levels) > 0
        assert geometric_median(rows).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_file_with_too_many_samples_is_refused_immediately():
    model, calls = vae(), []
    coder = lossless.BitsBack(lossless.latent_chain(model), reference_tensor(model), 16, 10, b"seed")
    with torch.no_grad():
        words = coder.encode(bits(10).byte().numpy()).words
        model.decoder.register_forward_hook(lambda *given: calls.append(None))
        assert coder.decode(words, 3000) is None
    assert len(calls) <= 2


@pytest.mark.slow
def test_initial_bits_do_not_grow_with_samples():
    model, x = vae(latent_dim=32), bits(300)  # a sample takes twice the bits that it recovers
    one, all_of_them = (compress(model, part, compare=False) for part in (x[:1], x))
    # about ten bits for each of 32 numbers, in words of 32 bits
    assert 32 * 9 <= one.initial_bits <= all_of_them.initial_bits <= 1.5 * one.initial_bits
    assert one.initial_bits + 32 > 2 * all_of_them.net_bits / 300


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_single_and_constant_samples_roundtrip(tmp_path, n):
    for value in (0.0, 1.0)[:n]:
        model, x = vae(), torch.full((n, 64), value)
        for mode in ("lossless", "lossy"):
            compress(model, x, mode=mode, out=str(tmp_path))
            found = decompress(model, str(tmp_path / "samples.aez"))
            with torch.no_grad():
                expected = 255 * x if mode == "lossless" else model(x)
            assert found.x == pytest.approx(expected.numpy(), abs=1e-6)


def test_an_empty_set_is_refused():
    with pytest.raises(AezooError, match="shape"):
        compress(vae(), np.zeros((0, 64), np.float32))


def other_arithmetic(model, error):
    """Make the network round like another machine."""
    return model.decoder.register_forward_hook(lambda module, given, out: out * (1 + error))


@pytest.mark.slow
@pytest.mark.parametrize("error", [1e-7, 1e-3])
def test_different_arithmetic_decodes_exactly_or_refuses(tmp_path, error):
    model, x = vae("discretised_logistic:0.1"), torch.arange(50 * 64).reshape(50, 64) % 256 / 255
    compress(model, x, compare=False, out=str(tmp_path))
    other_arithmetic(model, error)
    try:
        found = decompress(model, str(tmp_path / "samples.aez")).x
    except AezooError as caught:
        found = str(caught)
    if isinstance(found, str):
        assert "this machine rounds differently" in found and torch.__version__ in found
    else:
        assert error < 1e-6 and np.array_equal(found, (255 * x).byte().numpy())


def test_lossy_file_of_other_machine_needs_accepted_rounding(tmp_path):
    model, x = vae(), bits(30)
    compress(model, x, mode="lossy", compare=False, out=str(tmp_path))
    path = str(tmp_path / "samples.aez")
    right = decompress(model, path)
    hook = other_arithmetic(model, 1e-5)
    with pytest.raises(AezooError, match="--strict false"):
        decompress(model, path)
    found = decompress(model, path, strict=False)
    assert right.same and not found.same and found.x == pytest.approx(right.x, abs=1e-4)
    assert "differ by rounding" in found.summary()
    hook.remove()
    assert decompress(model, path, strict=False).same


@pytest.mark.slow
def test_decoding_uses_thread_count_of_encoding(tmp_path):
    model, x = vae(), bits(40)
    seen = []
    model.decoder.register_forward_hook(lambda module, given, out: seen.append(torch.get_num_threads()))
    files = {}
    for threads in (1, 2):
        for _ in range(2):
            compress(model, x, compare=False, threads=threads, out=str(tmp_path))
            files.setdefault(threads, []).append((tmp_path / "samples.aez").read_bytes())
        assert files[threads][0] == files[threads][1] and set(seen) == {threads}
        seen.clear()
        assert np.array_equal(decompress(model, str(tmp_path / "samples.aez")).x, (255 * x).byte().numpy())
        assert set(seen) == {threads}
        seen.clear()
    decompress(model, str(tmp_path / "samples.aez"), threads=1)
    assert set(seen) == {1}
    # rounding of so small a network is the same; only the header depends on the number of threads
    assert len(files[1][0]) == len(files[2][0])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lossless", "lossy"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_interrupted_coding_leaves_no_files(tmp_path, mode, kind):
    model, x, calls = vae(), bits(50), []

    def interrupt(module, given, out):
        calls.append(None)
        if len(calls) == 12:
            raise kind

    hook = model.decoder.register_forward_hook(interrupt)
    with pytest.raises(kind):
        compress(model, x, mode=mode, compare=False, batch_size=4, out=str(tmp_path))
    assert not list(tmp_path.iterdir())
    hook.remove()
    compress(model, x, mode=mode, compare=False, batch_size=4, out=str(tmp_path))
    calls.clear()
    model.decoder.register_forward_hook(interrupt)
    with pytest.raises(kind):
        decompress(model, str(tmp_path / "samples.aez"), out=str(tmp_path / "back"))
    assert not list((tmp_path / "back").iterdir())


def test_missing_constriction_names_extra_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "constriction", None)
    tables.constriction_stream.cache_clear()
    try:
        for command in (lambda: compress(vae(), bits(2)), lambda: decompress(vae(), str(tmp_path / "none.aez"))):
            with pytest.raises(AezooError, match=r"constriction: pip install '\.\[codec\]'"):
                command()
    finally:
        tables.constriction_stream.cache_clear()


def test_quantisation_error_is_step_squared_over_12():
    codes = (np.random.default_rng(0).normal(size=(4000, 3)) * [1, 10, 0.1]).astype(np.float32)
    quantiser = lossy.ScalarQuantiser.fit(codes, lambda z: z * np.float32([5, 1, 1]), 2.0, "deviation")
    assert quantiser.step == pytest.approx(codes.std(0) / 4, rel=1e-5)  # whatever the decoder
    error = quantiser.codes(quantiser.symbols(codes)) - codes
    assert (error**2).mean(0) == pytest.approx(quantiser.step**2 / 12, rel=0.1)
    model, x = vae(), torch.rand(60, 64)
    psnr = [row["psnr"] for row in compress(model, x, steps="deviation", quality=(0.0, 4.0, 9.0), compare=False).rows]
    # coarser codes are farther from the model's reconstruction
    with torch.no_grad():
        own = -10 * math.log10(float(((model(x) - x) ** 2).mean()))
    assert psnr[2] == pytest.approx(own, abs=0.05) and abs(psnr[0] - own) > abs(psnr[2] - own)


@pytest.mark.parametrize("steps", lossy.STEPS)
def test_more_bits_give_less_distortion(steps):
    torch.manual_seed(0)
    model = aezoo.create_model("linear_ae", (64,), latent_dim=64)
    with torch.no_grad():
        for weights in model.parameters():
            weights.copy_(torch.eye(64) if weights.ndim == 2 else torch.zeros(64))
    x = torch.rand(300, 64) * torch.linspace(0.1, 1, 64)
    rows = compress(model, x, mode="lossy", steps=steps, quality=(0.0, 1.0, 2.0, 3.0, 4.0, 6.0), compare=False).rows
    rate, psnr = [row["bits_per_dim"] for row in rows], [row["psnr"] for row in rows]
    assert rate == sorted(rate) and psnr == sorted(psnr) and len(set(rate)) == len(set(psnr)) == 6


@pytest.mark.slow
def test_baseline_codecs_are_lossless():
    x = (np.random.default_rng(0).random((70, 3, 9, 7)) * 255).astype(np.uint8)
    for grid in (baselines._sheet(x.shape), baselines._strip(x.shape)):
        pages = [np.asarray(page) for page in baselines._pages(x, grid)]
        assert np.array_equal(baselines._split_pages(pages, x.shape, grid), x)
    rows = {row["method"]: row for row in baselines.lossless_codecs(x, False)}
    # random bytes cannot be compressed
    assert all(row["bytes"] > 0.99 * x.size and row["samples"] == 70 for row in rows.values())
    assert {"PNG (lossless)", "gzip (lossless)", "xz (lossless)"} <= rows.keys()
    ones = {row["method"]: row for row in baselines.lossless_codecs((x[:, :1] > 127).astype(np.uint8), True)}
    assert all(row["bits_per_dim"] < 1.6 for row in ones.values())
