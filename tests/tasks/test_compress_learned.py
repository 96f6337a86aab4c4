"""compress and decompress of codes with learned distributions: bits match these, and outputs match the model."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from representative_models import others_slow

import aezoo
import aezoo.bases.entropy_coded
from aezoo.bases.entropy_coded import SymbolReader
from aezoo.errors import AezooError
from aezoo.tasks.codec import container, entropy_model
from aezoo.tasks.compress import compress
from aezoo.tasks.decompress import decompress
from tests.tasks.test_codec_container import put_together, take_apart

NAMES = aezoo.list_models(family="compression")
SHAPE = (1, 9, 10)


def small(name, width=20.0, shape=SHAPE, **settings):
    """A model whose initial codes are scaled by `width`."""
    given = {"hidden_dims": (6, 8), "latent_dim": 6, "hyper_dim": 3, "hyper_hidden_dims": (4,), "groups": (1, 2, 3)}
    given |= {"attention": False}
    known = aezoo.registry.hyperparameters(name)
    torch.manual_seed(0)
    shape = (24,) if settings.get("net") == "mlp" else shape
    model = aezoo.create_model(name, shape, **{k: v for k, v in {**given, **settings}.items() if k in known}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
        for p in [*model.encoder.parameters()][-2:]:
            p *= width
    return model


def data(n=50, shape=SHAPE):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))


def trained(model):
    """Train the distributions, since codes far outside cost less as escapes than by their probability."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model.train().loss(data())["loss"].backward()
        optimizer.step()
    return model.eval()


def by_blocks(model, x, block):
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(block)]).numpy()


@pytest.mark.parametrize("name", others_slow(NAMES, kept=("factorized_prior", "scale_hyperprior")))
def test_file_decodes_to_reconstruction_in_model_bits(name, tmp_path):
    model, x = trained(small(name, 5.0)), data(200)
    found = compress(model, x, out=str(tmp_path), batch_size=64)
    back = decompress(model, str(tmp_path / "samples.aez"))
    assert np.array_equal(back.x, by_blocks(model, x, 64)) and back.same and back.mode == found.mode == "learned"
    with torch.no_grad():
        rate = sum(float(model.loss(part)["rate"]) * len(part) for part in x.split(64))
    assert found.bound_bits == pytest.approx(rate / math.log(2), rel=1e-5)
    # the scale of a table differs by at most 6 % from the distribution's
    # each sample of compressai has a separate stream, with its size and a state of 64 bits
    streams = 200 * (32 + 64) if name == "compressai" else 0
    assert 0.99 * found.bound_bits < found.net_bits < 1.02 * found.bound_bits + 200 + streams
    size = (tmp_path / "samples.aez").stat().st_size
    assert found.rows[0]["bytes"] == size and found.net_bits < 8 * size < found.net_bits + 8 * 1200
    assert any("PCA" in row["method"] for row in found.rows)
    assert "whole numbers" in found.summary() and "learned" in back.summary()


def test_vector_models_roundtrip(tmp_path):
    for name in ("factorized_prior", "mean_scale_hyperprior"):
        model, x = small(name, net="mlp", hidden_dims=(16,)), data(30, (24,))
        compress(model, x, out=str(tmp_path / name), compare=False)
        assert np.array_equal(decompress(model, str(tmp_path / name / "samples.aez")).x, by_blocks(model, x, 256))


@pytest.mark.parametrize("name", ["checkerboard", "elic"])
def test_single_position_code_roundtrips_with_checkerboard(name, tmp_path):
    model, x = small(name, shape=(1, 4, 3)), data(30, (1, 4, 3))
    assert model.code_shape == (6, 1, 1)
    compress(model, x, out=str(tmp_path), compare=False)
    assert np.array_equal(decompress(model, str(tmp_path / "samples.aez")).x, by_blocks(model, x, 256))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["factorized_prior", "joint_ar_hyperprior", "cheng2020"])
def test_values_beyond_tables_are_escaped(name, tmp_path):
    """Codes of tens of thousands with scales of about ten need escapes of either sign."""
    model, x = small(name, width=3e5), data(20)
    symbols = entropy_model.encode(model, x)
    widest = max(-low for low, _ in model.tables())
    assert symbols.min() < -widest and symbols.max() > widest
    found = compress(model, x, out=str(tmp_path), compare=False)
    assert np.array_equal(decompress(model, str(tmp_path / "samples.aez")).x, by_blocks(model, x, 256))
    assert found.net_bits < symbols.size * (24 + 32) + 200


@pytest.mark.slow
def test_mixture_tables_are_built_in_chunks(monkeypatch):
    model, x = small("cheng2020", width=3e5), data(20)
    symbols, made = entropy_model.encode(model, x), []
    coder, original = entropy_model.EntropyModelCoder(model, 20), aezoo.bases.entropy_coded.Mixtures.tables_at

    def table_at(law, power, here):
        table = original(law, power, here)
        made.append((len(here), table.mass.shape[1] - 1))
        return table

    monkeypatch.setattr(aezoo.bases.entropy_coded.Mixtures, "tables_at", table_at)
    whole = coder.encode(symbols)
    assert np.array_equal(coder.decode(whole, 20), symbols) and max(n * size for n, size in made if n > 1) > 100
    monkeypatch.setattr(entropy_model, "_MAX_ENTRIES", 100)
    made.clear()
    parts = coder.encode(symbols)
    assert np.array_equal(coder.decode(parts, 20), symbols) and max(n * size for n, size in made if n > 1) <= 100
    assert len(parts) == pytest.approx(len(whole), rel=1e-3)


@pytest.mark.slow
def test_variable_rate_model_writes_file_per_quality(tmp_path):
    model, x = trained(small("gained_hyperprior", 5.0)), data(60)
    model.quality = 1.0
    found = compress(model, x, quality=(0, 1.5, 3), out=str(tmp_path))
    assert model.quality == 1.0
    rows = [row for row in found.rows if row["method"] == "aezoo gained_hyperprior"]
    assert [row["quality"] for row in rows] == [0, 1.5, 3] and "trained for" in found.summary()
    sizes, bits = [], 0.0
    for quality in (0, 1.5, 3):
        path = tmp_path / f"samples-q{quality:g}.aez"
        sizes.append(path.stat().st_size)
        back = decompress(model, str(path))
        assert model.quality == 1.0 and container.Reader(path, 2**30).header.quality == quality
        model.quality = quality
        assert np.array_equal(back.x, by_blocks(model, x, 256)) and back.same
        with torch.no_grad():
            bits += float(model.loss(x)["rate"]) * len(x) / math.log(2)
        model.quality = 1.0
    assert sizes == sorted(sizes) and len({*sizes}) == 3
    assert found.bound_bits == pytest.approx(bits, rel=1e-5)
    assert 0.99 * bits < found.net_bits < 1.02 * bits + 600
    own = compress(model, x, compare=False)
    assert own.rows[0]["quality"] == 1.0
    one = compress(model, x, quality=0.5, out=str(tmp_path / "one"), compare=False)
    assert np.isclose(one.rows[0]["quality"], 0.5) and (tmp_path / "one" / "samples.aez").exists()


def test_unsupported_qualities_are_refused(tmp_path):
    several, one, x = small("gained_hyperprior"), small("gained_hyperprior", lams=(0.01,)), data(5)
    with pytest.raises(AezooError, match="quality is 4: give a number from 0 to 3"):
        compress(several, x, quality=4, compare=False)
    assert several.quality == 3
    for model, quality in ((several, 3.5), (several, -1), (one, 0.5)):
        compress(model, x, out=str(tmp_path), compare=False)
        header, frames = take_apart((tmp_path / "samples.aez").read_bytes())
        (tmp_path / "forged.aez").write_bytes(put_together(header | {"quality": quality}, frames))
        with pytest.raises(AezooError, match="give a number from 0 to"):
            decompress(model, str(tmp_path / "forged.aez"))
        assert model.quality == model.max_quality
    # another quality of the model gives other symbols
    compress(several, x, out=str(tmp_path), compare=False)
    header, frames = take_apart((tmp_path / "samples.aez").read_bytes())
    (tmp_path / "forged.aez").write_bytes(put_together(header | {"quality": 1.0}, frames))
    with pytest.raises(AezooError, match="refused"):
        decompress(several, str(tmp_path / "forged.aez"))


def test_escapes_preserve_32_bit_values():
    model = small("factorized_prior")
    coder = entropy_model.EntropyModelCoder(model, 4)
    symbols = np.zeros((6, entropy_model.n_symbols(model)), dtype=np.int64)
    symbols[0, :6] = [2**31 - 1, -(2**31) + 1, 65_535, -65_536, 2**16, 1]
    symbols[5, -3:] = [-1, 2**20, -(2**30)]
    content = coder.encode(symbols)
    assert np.array_equal(coder.decode(content, 6), symbols) and coder.decodes_to(content, symbols)
    symbols[3, 2] += 1
    assert not coder.decodes_to(content, symbols)


def test_reader_uses_writer_blocks_and_frames(tmp_path, monkeypatch):
    model, x = small("checkerboard"), data(50)
    monkeypatch.setattr(container, "MAX_FRAME_VALUES", 21 * x[0].numel())  # frames of three blocks of seven
    compress(model, x, out=str(tmp_path), batch_size=7, compare=False)
    reader = container.Reader(tmp_path / "samples.aez", 2**30)
    assert [frame.n for frame in reader.frames] == [21, 21, 8]
    assert np.array_equal(decompress(model, str(tmp_path / "samples.aez")).x, by_blocks(model, x, 7))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e12])
def test_non_finite_or_huge_codes_are_refused(value):
    model = small("factorized_prior")
    with torch.no_grad():
        model.encoder[-1].bias[2] = value
    with pytest.raises(AezooError, match=r"NaN, infinite or above 2\^31: train it again"):
        compress(model, data(), compare=False)


def test_nan_codes_are_refused_before_integer_cast(monkeypatch):
    """On ARM, NaN becomes 0."""
    model, long = small("factorized_prior"), torch.Tensor.long
    with torch.no_grad():
        model.encoder[-1].bias[2] = math.nan
    monkeypatch.setattr(torch.Tensor, "long", lambda values: long(values.nan_to_num(0)))
    with pytest.raises(AezooError, match="NaN, infinite or above"):
        compress(model, data(), compare=False)


@pytest.mark.parametrize("name", ["mean_scale_hyperprior", "joint_ar_hyperprior", "cheng2020"])
def test_differing_entropy_model_refuses_file(name, tmp_path, monkeypatch):
    model, x = small(name), data()
    compress(model, x, out=str(tmp_path), compare=False)
    kind = type(model)
    law = kind.distribution
    monkeypatch.setattr(kind, "distribution", lambda self, *numbers: law(self, *numbers[:-1], numbers[-1] + 0.3))
    with pytest.raises(AezooError, match="its whole numbers are different here"):
        decompress(model, str(tmp_path / "samples.aez"))


def test_rounding_differences_are_refused_or_accepted_on_request(tmp_path, monkeypatch):
    model, x = small("scale_hyperprior"), data()
    compress(model, x, out=str(tmp_path), compare=False)
    decode = type(model).decode
    monkeypatch.setattr(type(model), "decode", lambda self, z: decode(self, z) * (1 + 1e-6))
    with pytest.raises(AezooError, match="outputs are different here"):
        decompress(model, str(tmp_path / "samples.aez"))
    loose = decompress(model, str(tmp_path / "samples.aez"), strict=False)
    assert not loose.same
    np.testing.assert_allclose(loose.x, by_blocks(model, x, 256), rtol=1e-5, atol=1e-6)


def test_non_deterministic_device_is_found_when_writing(monkeypatch):
    model = small("mean_scale_hyperprior")
    kind, drift = type(model), itertools.count()
    law = kind.distribution
    monkeypatch.setattr(kind, "distribution", lambda self, mean, raw: law(self, mean, raw + 0.05 * next(drift)))
    with pytest.raises(AezooError, match="does not give the same result twice"):
        compress(model, data(), compare=False)


def test_foreign_and_forged_files_are_refused(tmp_path):
    model, x = small("factorized_prior"), data()
    compress(model, x, out=str(tmp_path), compare=False)
    path = tmp_path / "samples.aez"
    with pytest.raises(AezooError, match="was written with another model"):
        decompress(small("scale_hyperprior"), str(path))
    header, frames = take_apart(path.read_bytes())
    forged = tmp_path / "forged.aez"
    for mode in ("indices", "prior"):
        forged.write_bytes(put_together(header | {"mode": mode}, [(0, hashlib.sha256().digest(), b""), *frames]))
        with pytest.raises(AezooError, match=f"it contains {mode}, which factorized_prior does not use|parts is empty"):
            decompress(model, str(forged))
    n, digest, payload = frames[0]
    for damaged in (payload[:8], payload[:-40] + b"\xff" * 40, b"", bytes(len(payload))):
        forged.write_bytes(put_together(header, [(n, digest, damaged)]))
        with pytest.raises(AezooError, match="refused"):
            decompress(model, str(forged))


def test_coded_symbols_have_rate_of_loss():
    """The rate of coded symbols equals that of the samples they come from."""
    model, x = small("elic"), data(9)
    symbols = torch.from_numpy(entropy_model.encode(model, x))
    coder = SymbolReader(aezoo.bases.entropy_coded.read_in_order(symbols))
    model.code_latents(coder, None, len(x))
    with torch.no_grad():
        torch.testing.assert_close(coder.rate_B.mean(), model.loss(x)["rate"])
