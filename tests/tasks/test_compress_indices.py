"""compress and decompress of codes that are indices: bits match the entropy or the prior, and outputs are equal."""

import base64
import hashlib
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import entropy
from torch import nn

import aezoo
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.bases.token_prior import IndexPrior
from aezoo.errors import AezooError
from aezoo.quantisers.base import Quantiser
from aezoo.tasks.codec import autoregressive, container, indices
from aezoo.tasks.compress import compress
from aezoo.tasks.decompress import decompress
from tests.tasks.test_codec_container import FORGED, put_together, take_apart

# written by aezoo before there were files of indices, with `Thirds` in mode lossy
VERSION_1 = base64.b85decode(
    "i9tnL4GJ0x0RR>O004U;ZEs{{B03^$Z*y~bA}k_pZ)9a`B03^aY+-3`A}k_iX>Mm_a&U5KZge6#A~rEHWo0rsH8V3YF*Y?YH8?UbIWuH9F*s&8G%"
    ";aiH#9ggW->KpHDWk4FflMOG-fhlH8?ahF)}x1W;ZuCHX<w{ZX!B0EFyDgVQ^(4I$JU<GhHkqV{c?-Uvp?-aAhJoTQV#&T`VGEY;R+0B04fPHY_4^"
    "XmVv?WOE`qF)SivWp-&}Wg<EvV{mmMEFxrdd2nSSIwEFlZ((#ZG9oM@bZ>HFXd*fyGA=PQE-))&aCIUqB5Y-LWo&aIIxs9EaB^j1X>)0BZX!A`EFy"
    "DdWn>~cFf1Z*bzy92ba^5=GcGWFVE_OC0000000000<FLd+nEV_Rn)~#~nQyryC$2%{WSf&rq?MT)cv84kc-muNV6bNZ;|4oq{NVC0o996M2#B9R@"
    "iQQ1W?*7q216Ex5C8xF2jL%Rm;-1a2r~k)0F*`+<G>*XW3xkPV`dZPnVe~Cvw+x`Ih`#H2u+wFq%n|YWJqHJ0QFWggbV-x0000000jU50FXSWC_aR"
    "LuNv>B{0Ut9Io!|v@8!o@Ge>1qy-nCe5GF!eDyT^XIC`Kv%+?iAJX;+AFk~1a3@IaXS6B0=5l>lu1?79vEX(ujw*"
)


class Parts(Quantiser):
    """Index k of a codebook of K stands for values from k / K to (k + 1) / K."""

    def __init__(self, sizes):
        super().__init__(len(sizes), sizes)
        self.register_buffer("k", torch.tensor(sizes, dtype=torch.float64), persistent=False)

    def _quantise_rows(self, z_ND, places=1):
        index = (z_ND * self.k).long()
        return self._lookup_rows(index), index, {}

    def _lookup_rows(self, index_NQ):
        return ((index_NQ + 0.5) / self.k).to(self._like.dtype)


class Plain(DiscreteAutoencoder):
    """A model whose samples are its indices: (Q, places) numbers."""

    def __init__(self, input_shape, sizes=(7,)):
        super().__init__(input_shape, likelihood="gaussian")
        self.save_hyperparameters()
        self.encoder, self.decoder, self.code_shape = nn.Identity(), nn.Identity(), input_shape
        self.quantiser, self.scale = Parts(sizes), nn.Parameter(torch.full((1,), 0.7))

    def decode(self, z):
        return self.decoder(z * self.scale).sin()

    def loss(self, x, y=None):
        raise NotImplementedError

    def samples(self, given):
        """Samples with the given indices, (n, Q, places)."""
        k = torch.tensor(self.index_sizes, dtype=torch.float64)[:, None]
        x = ((torch.as_tensor(given) + 0.5) / k).float()
        assert torch.equal(self.encode_indices(x), torch.as_tensor(given))
        return x


class Quarters(Quantiser):
    """Index k stands for values near k / 3, and is decoded as k / 4."""

    def __init__(self):
        super().__init__(2, (4, 4))

    def _quantise_rows(self, z_ND, places=1):
        index = (z_ND * 3).round().clamp(0, 3).long()
        return self._lookup_rows(index), index, {}

    def _lookup_rows(self, index_NQ):
        return index_NQ.float() / 4


class Thirds(DiscreteAutoencoder):
    """The model with which `VERSION_1` was written; must not change."""

    def __init__(self, input_shape=(2, 3)):
        super().__init__(input_shape)
        self.save_hyperparameters()
        self.encoder, self.decoder, self.code_shape = nn.Identity(), nn.Identity(), (2, 3)
        self.quantiser, self.scale = Quarters(), nn.Parameter(torch.ones(1))

    def decode(self, z):
        return self.decoder(z) * self.scale

    def loss(self, x, y=None):
        raise NotImplementedError


Thirds.__qualname__ = "Plain"


class WithPrior(Plain):
    """Token t, of position t // Q, has logits b_t + sum over s < t of a[s, t, token_s]; -inf beyond its codebook."""

    def __init__(self, input_shape, sizes=(7,), seed=0, scale=2.0):
        super().__init__(input_shape, sizes)
        self.save_hyperparameters()
        t, k = math.prod(input_shape), max(sizes)
        random = torch.Generator().manual_seed(seed)
        self.b = nn.Parameter(scale * torch.randn(t, k, generator=random))
        self.a = nn.Parameter(scale * torch.randn(t, t, k, k, generator=random) / math.sqrt(t))
        self.calls = []

    def to_tokens(self, given):
        return given.movedim(1, -1).flatten(1)

    def from_tokens(self, tokens):
        return tokens.unflatten(1, (-1, self.index_shape[0])).movedim(-1, 1)

    def next_logits(self, tokens, t):
        self.calls.append(len(tokens))
        logits = self.b[t] + sum(self.a[s, t, tokens[:, s]] for s in range(t))
        sizes = torch.tensor(self.index_sizes).repeat(self.index_shape[1])
        return (
            (logits + 0 * self.b[t])
            .expand(len(tokens), -1)
            .masked_fill(torch.arange(self.b.shape[1]) >= sizes[t], -math.inf)
        )

    def incremental_logits(self):
        return self.next_logits

    def log_prob(self, given):
        tokens = self.to_tokens(given)
        per_token = [self.next_logits(tokens, t).log_softmax(1) for t in range(tokens.shape[1])]
        return sum(p.gather(1, tokens[:, t, None])[:, 0] for t, p in enumerate(per_token))

    def draw(self, n, seed=0):
        random, tokens = torch.Generator().manual_seed(seed), torch.zeros(n, len(self.b), dtype=torch.long)
        for t in range(len(self.b)):
            p = self.next_logits(tokens, t).softmax(1)
            tokens[:, t] = torch.multinomial(p, 1, generator=random)[:, 0]
        return self.from_tokens(tokens)


def prior(shape=(2, 5), sizes=(7, 4), **settings):
    return WithPrior(shape, sizes, **settings).eval().requires_grad_(False)


def bits_by_hand(model, given):
    """-log2 of the probability of indices (n, Q, places) under `WithPrior`, by position, by numpy."""
    a, b, total = model.a.numpy(), model.b.numpy(), 0.0
    q, places = given.shape[1:]
    for sample in given.numpy():
        order = [(int(sample[i, p]), model.index_sizes[i]) for p in range(places) for i in range(q)]
        for t, (token, size) in enumerate(order):
            logits = b[t] + sum(a[s, t, order[s][0]] for s in range(t))
            total -= log_softmax(logits[:size].astype(np.float64))[token] / math.log(2)
    return total


def skewed(n, places, k, power=1.0, seed=0):
    p = (1 + np.arange(k)) ** -float(power)
    return np.random.default_rng(seed).permutation(k)[
        np.random.default_rng(seed).choice(k, (n, 1, places), p=p / p.sum())
    ]


def written(model, x, tmp_path, **settings):
    """The result of compress, and its file."""
    found = compress(model, x, out=str(tmp_path), **({"compare": False} | settings))
    return found, tmp_path / "samples.aez"


def right(model, x, block=256):
    with torch.no_grad():
        parts = [model.decode_indices(model.encode_indices(part)) for part in x.split(block)]
    return torch.cat(parts).numpy()


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "n", "power"), [(2, 3000, 2), (7, 300, 0.5), (512, 2000, 1), (512, 300, 2), (60000, 900, 1)]
)
def test_index_rate_is_entropy_plus_small_table(tmp_path, k, n, power):
    model = Plain((1, 40), (k,)).eval()
    given = skewed(n, 40, k, power)
    x = model.samples(given)
    found, path = written(model, x, tmp_path)
    counts = np.bincount(given.reshape(-1), minlength=k)
    least = given.size * entropy(counts, base=2)
    assert found.mode == "indices" and found.bound_bits == pytest.approx(least, rel=1e-9)
    rel = 0.002 if given.size > 50 * k else 0.01  # large enough for a fine table
    assert least <= found.net_bits + 32 and found.net_bits == pytest.approx(least, rel=rel, abs=64)
    # a table takes at most one byte per code that occurs, plus the list of these codes
    assert 8 < found.table_bits <= 8 * 1.5 * (counts > 0).sum() + 8 * k / 20 + 80
    header, frames = take_apart(path.read_bytes())
    assert header["mode"] == "indices" and frames[0][0] == 0 and 8 * len(frames[0][2]) == found.table_bits
    assert sum(8 * len(payload) for _, _, payload in frames[1:]) == found.net_bits
    row = found.rows[0]
    assert row["bytes"] == path.stat().st_size
    assert row["bits_per_sample"] == pytest.approx(8 * row["bytes"] / n) == pytest.approx(40 * row["bits_per_dim"])
    assert np.array_equal(decompress(model, str(path)).x, right(model, x))


def test_unprofitable_table_is_omitted(tmp_path):
    few, many = skewed(1, 49, 512, 1), skewed(400, 49, 512, 1)
    even = np.random.default_rng(0).integers(0, 512, (400, 1, 49))
    for given, table in ((few, False), (many, True), (even, False)):
        model = Plain((1, 49), (512,)).eval()
        found, path = written(model, model.samples(given), tmp_path)
        assert found.table_bits == 8 if not table else found.table_bits > 800
        uniform = 9 * given.size
        if table:
            assert found.net_bits + found.table_bits < 0.9 * uniform
        else:
            assert found.net_bits == pytest.approx(uniform, abs=64)
        assert decompress(model, str(path)).same


def test_fitted_table_minimises_total_size():
    random = np.random.default_rng(0)
    for k in (1, 2, 3, 50, 1000):
        for n in (1, 5, 100, 10000):
            counts = np.bincount(random.zipf(1.5, n).clip(1, k) - 1, minlength=k)
            taken = indices.IndexTable.fit(counts)
            total = taken.bits(counts) / 8 + len(indices._pack_tables([taken]))
            assert total <= n * math.log2(k) / 8 + 1
            if k > 1:
                fair = 1 + (24 + np.log2(np.maximum(counts, 1) / n)).round()
                one = indices.IndexTable(k, 0, np.where(counts > 0, fair, 0).astype(np.uint8))
                assert total <= one.bits(counts) / 8 + len(indices._pack_tables([one]))
            if taken.levels is not None:
                f = taken.frequencies()
                assert f.sum() == 2**24 and f.min() >= 1
                share = f[counts > 0] / 2**24 / (counts[counts > 0] / n)
                # rounding by half a level up or down, times a normalisation
                assert share.max() / share.min() <= 2 ** (1.001 / (1 << taken.resolution))
                assert taken.bits(counts) == pytest.approx(-(counts[counts > 0] * np.log2(f[counts > 0] / 2**24)).sum())


def test_table_levels_are_powers_with_vanishing_loss_when_fine():
    for fine in range(4):
        found, exact = np.array(indices._powers(fine)), 2.0 ** (8 + np.arange(1 + (24 << fine)) / (1 << fine))
        assert found[0] == 0 and (np.floor(exact * (1 - 1e-12)) <= found[1:]).all() and (found[1:] <= exact).all()
    counts = np.random.default_rng(0).integers(1000, 100000, 500)
    losses = []
    for fine in range(4):
        levels = 1 + ((1 << fine) * (24 + np.log2(counts / counts.sum()))).round()
        table = indices.IndexTable(500, fine, levels.astype(np.uint8))
        losses.append(table.bits(counts) / counts.sum() - entropy(counts, base=2))
    # a relative error that is uniform over a level: its variance / 2, in bits
    expected = [(math.log(2) / r) ** 2 / 24 / math.log(2) for r in (1, 2, 4, 8)]
    assert losses == pytest.approx(expected, rel=0.15)


def test_each_codebook_has_its_own_table(tmp_path):
    class TwoMaps(Plain):
        """6 indices, of which 2 have a separate codebook, as the top of a hierarchy."""

        def codebooks(self, given):
            return {"top": (given[:, :, 1:3], (7,)), "bottom": (given[:, :, [0, 3, 4, 5]], (5,))}

    model, random = TwoMaps((1, 6), (7,)).eval(), np.random.default_rng(0)
    given = np.empty((3000, 1, 6), np.int64)
    given[:, :, 1:3] = random.choice([2, 6], (3000, 1, 2), p=[0.9, 0.1])
    given[:, :, [0, 3, 4, 5]] = random.choice([0, 1, 4], (3000, 1, 4), p=[0.05, 0.9, 0.05])
    found, path = written(model, model.samples(given), tmp_path)
    least = sum(
        given[:, :, part].size * entropy(np.bincount(given[:, :, part].reshape(-1)), base=2)
        for part in ([1, 2], [0, 3, 4, 5])
    )
    pooled = given.size * entropy(np.bincount(given.reshape(-1)), base=2)
    assert found.net_bits == pytest.approx(least, rel=0.01, abs=64) and found.net_bits < 0.7 * pooled
    assert decompress(model, str(path)).same

    class Lost(Plain):
        def codebooks(self, given):
            return {"": (given[:, :, :2], (7,))}

    with pytest.raises(AezooError, match="each index of a sample once"):
        compress(Lost((1, 6), (7,)).eval(), model.samples(given), compare=False)


@pytest.mark.parametrize("k", [1, 2, 2**16, 2**16 + 1, 300_000, 2**18, 2**24, 2**40])
def test_large_codebook_indices_are_coded_as_digits(tmp_path, k):
    bases = indices.digit_sizes(k)
    assert max(bases) <= 2**16 and math.prod(bases) >= k and len(bases) == max(1, math.ceil(math.log2(k) / 16))
    random = np.random.default_rng(0)
    given = random.integers(0, k, (60, 2, 3))
    given[0] = k - 1
    codebooks = [indices.IndexCodebook(np.array([0, 4, 2]), k), indices.IndexCodebook(np.array([1, 3, 5]), k)]
    flat = given.reshape(60, 6)
    coder = indices.TableCoder.fit(codebooks, iter([flat[:20], flat[20:]]))
    content = coder.encode(flat)
    again = indices.TableCoder.from_bytes(coder.to_bytes(), codebooks)
    assert np.array_equal(again.decode(content, 60), flat) and coder.decodes_to(content, flat)
    assert 8 * len(content) == pytest.approx(coder.bits, abs=64)
    assert 8 * len(content) <= 360 * sum(math.log2(base) for base in bases) + 64
    wrong = flat.copy()
    wrong[5, 1] = math.prod(bases) - 1
    if wrong[5, 1] >= k:  # digits that do not form an index of the codebook
        forged = indices.TableCoder.fit(codebooks, iter([wrong]))
        with pytest.raises(ValueError, match="not in its codebook"):
            forged.decode(forged.encode(wrong), 60)


def test_large_codebook_model_roundtrips(tmp_path):
    model = Plain((2, 9), (2**18, 5)).eval()
    x = torch.rand(50, 2, 9, generator=torch.Generator().manual_seed(0))
    found, path = written(model, x, tmp_path, batch_size=8)
    assert found.net_bits == pytest.approx(50 * 9 * (18 + math.log2(5)), rel=0.01, abs=64)
    assert np.array_equal(decompress(model, str(path)).x, right(model, x, 8))


# ---- under a prior ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(7, 4), (3, 40), (5,)])
def test_prior_coded_rate_is_cross_entropy(tmp_path, sizes):
    model = prior((len(sizes), 5), sizes)
    given = model.draw(300)
    x = model.samples(given)
    found, path = written(model, x, tmp_path, batch_size=64)
    least = bits_by_hand(model, given)
    assert found.mode == "prior" and found.table_bits == 0
    assert found.bound_bits == pytest.approx(least, rel=1e-5)
    assert least <= found.net_bits <= 1.001 * least + 64 + 64 + 5 * 8
    # the file without its header, the frame's header and the checksum
    header, frames = take_apart(path.read_bytes())
    assert header["mode"] == "prior" and [frame[0] for frame in frames] == [300]
    assert 8 * len(frames[0][2]) == found.net_bits
    # less than with a table for each codebook
    pooled = [given[:, q].reshape(-1) for q in range(len(sizes))]
    assert found.net_bits < 0.9 * sum(len(part) * entropy(torch.bincount(part).numpy(), base=2) for part in pooled)
    assert np.array_equal(decompress(model, str(path)).x, right(model, x, 64))
    # common mistakes: a prior of the next token, or tokens in another order
    tokens = model.to_tokens(given)
    wrong = {
        "the logits of the token after": lambda t: model.next_logits(tokens, min(t + 1, tokens.shape[1] - 1)),
        "the token itself is not in front of it": lambda t: model.next_logits(tokens.flip(1), t),
    }
    for name, logits in wrong.items():
        p = [logits(t).log_softmax(1).gather(1, tokens[:, t, None]).clamp(min=-17) for t in range(tokens.shape[1])]
        assert -float(sum(part.sum() for part in p)) / math.log(2) > 1.2 * least, name


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(64, 16), (3,), (1, 6)])
def test_uniform_prior_costs_log2_k_and_certain_prior_zero(tmp_path, sizes):
    model = prior((len(sizes), 6), sizes, scale=0.0)
    given = torch.stack([torch.from_numpy(skewed(400, 6, k)[:, 0]) for k in sizes], 1)
    found, path = written(model, model.samples(given), tmp_path)
    bits = 400 * 6 * sum(map(math.log2, sizes))
    assert found.bound_bits == pytest.approx(bits, rel=1e-5)
    assert bits <= found.net_bits <= bits + 64 + 64 + 16
    assert decompress(model, str(path)).same
    # the next token is certain
    with torch.no_grad():
        model.b.fill_(-1e9)
        chosen = model.to_tokens(given[:1])[0]
        model.b[torch.arange(len(chosen)), chosen] = 0
    found, path = written(model, model.samples(given[:1].expand(400, -1, -1)), tmp_path)
    assert found.bound_bits == 0 and found.net_bits <= 64 + 64 + 16
    assert decompress(model, str(path)).same
    # an unlikely token costs 24 bits and roundtrips
    surprise = given[:1].expand(400, -1, -1).clone()
    surprise[7] = (surprise[7] + 1) % torch.tensor(sizes)[:, None]
    found, path = written(model, model.samples(surprise), tmp_path)
    seldom = 24 * 6 * sum(size > 1 for size in sizes)
    assert found.net_bits == pytest.approx(seldom, abs=160)
    assert np.array_equal(decompress(model, str(path)).x, right(model, model.samples(surprise)))


def test_coding_takes_one_pass_per_token_of_a_block(tmp_path):
    model = prior((2, 5))
    x = model.samples(model.draw(70))
    model.calls.clear()
    _, path = written(model, x, tmp_path, batch_size=32)
    blocks = [32] * 10 + [32] * 10 + [6] * 10
    # for the rate by `log_prob`, for the file, and for decoding its first block as a check
    assert sorted(model.calls) == sorted(blocks * 2 + [32] * 10)
    model.calls.clear()
    decompress(model, str(path))
    assert model.calls == blocks


@pytest.mark.parametrize("batch_size", [1, 4, 300])
@pytest.mark.parametrize("n", [1, 5, 8])
def test_frames_and_blocks_of_any_size_roundtrip(tmp_path, monkeypatch, batch_size, n):
    for model in (prior((2, 3), (3, 4)), Plain((2, 3), (3, 4)).eval()):
        x = torch.rand(n, 2, 3, generator=torch.Generator().manual_seed(n))
        with monkeypatch.context() as patch:
            patch.setattr(container, "MAX_FRAME_VALUES", 6 * 4)
            _, path = written(model, x, tmp_path, batch_size=batch_size)
        frames = [frame[0] for frame in take_apart(path.read_bytes())[1] if frame[0]]
        assert sum(frames) == n and max(frames) == min(n, 4)
        assert np.array_equal(decompress(model, str(path)).x, right(model, x, min(batch_size, 4)))


# ---- roundtrips and refusals -----------------------------------------------------------------------------------------

KINDS = {"prior": lambda: prior((2, 3), (5, 4), seed=3), "indices": lambda: Plain((2, 3), (5, 4)).eval()}


@pytest.fixture(params=KINDS)
def held(request, tmp_path):
    """A model, samples and their file."""
    model = KINDS[request.param]()
    x = torch.rand(40, 2, 3, generator=torch.Generator().manual_seed(0)) ** 2
    return model, x, written(model, x, tmp_path, batch_size=16)[1]


def refusal(model, path, content=None, **settings):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AezooError) as caught:
        decompress(model, str(path), **settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def test_truncated_or_altered_files_are_refused(held):
    model, _, path = held
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for i in range(0, len(whole), 3):
        refusal(model, path, whole[:i])
    for _ in range(100):
        i, bit = random.integers(len(whole)), 1 << int(random.integers(8))
        refusal(model, path, whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :])


def test_file_of_different_model_or_prior_is_refused(held):
    model, _, path = held
    with torch.no_grad():
        (model.b if hasattr(model, "b") else model.scale).add_(1e-3)
    assert "another model" in refusal(model, path)


@pytest.mark.slow
def test_forged_payload_decodes_or_is_refused(held):
    model, x, path = held
    header, frames = take_apart(path.read_bytes())
    random, expected = np.random.default_rng(1), right(model, x, 16)
    for _ in range(60):
        forged = [list(frame) for frame in frames]
        frame = forged[random.integers(len(forged))]
        payload = bytearray(frame[2])
        match random.integers(4):
            case 0:
                payload[random.integers(len(payload))] ^= 1 << int(random.integers(8))
            case 1:
                payload = payload[: random.integers(len(payload))]
            case 2:
                payload = bytearray(random.bytes(random.integers(1, 60)))
            case 3:
                frame[0] += int(random.integers(1, 5))
        frame[2] = bytes(payload)
        path.write_bytes(put_together(header | {"n": sum(frame[0] for frame in forged)}, forged))
        try:
            found = decompress(model, str(path)).x
        except AezooError as error:
            found = str(error)
        assert np.array_equal(found, expected) if isinstance(found, np.ndarray) else "\n" not in found


@pytest.mark.slow
def test_forged_header_is_refused_or_harmless(held):
    model, x, path = held
    header, frames = take_apart(path.read_bytes())
    expected = right(model, x, 16)
    for field, values in FORGED.items():
        for value in values:
            path.write_bytes(put_together(header | {field: value}, frames))
            try:
                found = decompress(model, str(path)).x
            except AezooError as error:
                assert "\n" not in (line := str(error)) and len(line) < 500  # noqa: PT017
            else:
                harmless = {"quality", "seed", "model", "torch", "block", "precision"}
                assert np.array_equal(found, expected) and (header[field] == value or field in harmless), field


def test_false_sample_count_is_refused_quickly_under_prior(tmp_path):
    model = KINDS["prior"]()
    _, path = written(model, torch.rand(40, 2, 3), tmp_path, batch_size=16)
    header, [[_, digest, payload]] = take_apart(path.read_bytes())
    model.calls.clear()
    n = 4000
    assert "are different here" in refusal(model, path, put_together(header | {"n": n}, [[n, digest, payload]]))
    assert len(model.calls) <= 6 * 5


def test_malformed_tables_are_refused():
    codebooks = [indices.IndexCodebook(np.array([0, 1]), 6), indices.IndexCodebook(np.array([2]), 3)]
    counts = iter([np.array([[0, 1, 2], [5, 1, 2], [1, 1, 0]] * 200)])
    right = indices.TableCoder.fit(codebooks, counts).to_bytes()
    assert indices.TableCoder.from_bytes(right, codebooks).to_bytes() == right
    levels = indices.zlib.compressobj(9, indices.zlib.DEFLATED, -15)
    high = bytes([1, 0]) + levels.compress(bytes([25] * 6)) + levels.flush()
    levels = indices.zlib.compressobj(9, indices.zlib.DEFLATED, -15)
    none = bytes([1, 0]) + levels.compress(bytes([26, 1, 1, 1, 1, 1])) + levels.flush()
    for wrong in (
        b"",
        b"\x00",
        bytes([5, 0]),
        right[:-3],
        right + b"x",
        bytes([1, 1]) + right[2:-1],
        high,
        none,
        bytes([1, 0]),
    ):
        with pytest.raises((ValueError, indices.zlib.error)):
            indices.TableCoder.from_bytes(wrong, codebooks)


def test_mismatched_modes_are_refused(held, tmp_path):
    model, _, path = held
    header, frames = take_apart(path.read_bytes())
    for mode in ("lossless", "lossy", "indices", "prior", "zip"):
        if mode != header["mode"]:
            refusal(model, path, put_together(header | {"mode": mode}, frames))
    refusal(model, path, put_together(header | {"levels": 2}, frames))
    nothing = aezoo.create_model("linear_ae", (2, 3), latent_dim=2).eval()
    _, other = written(nothing, torch.rand(4, 2, 3), tmp_path / "other", mode="lossy")
    head, rest = take_apart(other.read_bytes())
    for mode, frames in (("indices", rest), ("prior", rest[1:])):
        assert "does not use" in refusal(nothing, other, put_together(head | {"mode": mode}, frames))


@pytest.mark.slow
def test_differently_computing_prior_is_refused(tmp_path, monkeypatch):
    model = prior((2, 6), (9, 30), seed=1)
    x = model.samples(model.draw(256))
    _, path = written(model, x, tmp_path, batch_size=16)
    own = WithPrior.next_logits
    for error in (1e-6, 1e-2):
        monkeypatch.setattr(WithPrior, "next_logits", lambda self, tokens, t, e=error: own(self, tokens, t) * (1 + e))
        for strict in (True, False):
            model.calls.clear()
            assert "indices are different here" in refusal(model, path, strict=strict)
            assert len(model.calls) <= 12 * (16 if error < 1e-3 else 2)
    monkeypatch.undo()
    assert decompress(model, str(path)).same


def test_other_rounding_accepted_on_request_with_exact_indices(held):
    model, x, path = held
    expected = right(model, x, 16)
    hook = model.decoder.register_forward_hook(lambda module, given, out: out * (1 + 1e-6))
    assert "--strict false" in refusal(model, path)
    found = decompress(model, str(path), strict=False)
    assert not found.same and found.x == pytest.approx(expected, abs=1e-5)
    hook.remove()
    assert decompress(model, str(path)).same


def test_non_deterministic_device_writes_no_file(tmp_path, monkeypatch):
    model, own, calls = prior((2, 6), (9, 30)), WithPrior.next_logits, []

    def noisy(self, tokens, t):
        calls.append(t)
        return own(self, tokens, t) + 1e-3 * len(calls) ** 0.5 * torch.arange(30)

    x = model.samples(model.draw(64))
    monkeypatch.setattr(WithPrior, "next_logits", noisy)
    with pytest.raises(AezooError, match="does not give the same result twice"):
        written(model, x, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [-1, 7])
def test_out_of_range_indices_are_refused(wrong):
    model = Plain((1, 4), (7,)).eval()
    own = model.quantiser._quantise_rows

    def outside(z_ND, places=1):
        q, index, terms = own(z_ND, places)
        return q, index.index_fill(0, torch.tensor([3]), wrong), terms

    model.quantiser._quantise_rows = outside
    with pytest.raises(AezooError, match="not in its codebooks"):
        compress(model, torch.rand(5, 1, 4), compare=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_prior_of_nan_is_refused(value):
    model = prior((2, 3), (5, 4))
    with torch.no_grad():
        model.b[2] = value
    with pytest.raises(AezooError, match="train it again"):
        compress(model, torch.rand(5, 2, 3), compare=False)


def test_codebooks_too_large_for_a_prior_are_refused():
    model = Plain((1, 3), (2**16 + 1,)).eval()
    model.to_tokens = lambda given: given.flatten(1)
    with pytest.raises(AezooError, match="use smaller codebooks"):
        autoregressive.AutoregressiveCoder(model, 8)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_old_lossy_file_without_indices_is_read(tmp_path):
    model, path = Thirds().eval(), tmp_path / "old.aez"
    path.write_bytes(VERSION_1)
    header, _ = take_apart(VERSION_1)
    assert (header["mode"], header["model"]) == ("lossy", "Plain")
    found, x = decompress(model, str(path)), torch.arange(30).reshape(5, 2, 3) % 7 / 8
    assert found.same and found.mode == "lossy" and found.x == pytest.approx(right(model, x), abs=0.02)
    assert hashlib.sha256(found.x.tobytes()).digest() == take_apart(VERSION_1)[1][-1][1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_table_has_one_row_per_model(tmp_path, kind):
    model = {"prior": prior, "indices": Plain}[kind]((1, 8), (9,)).eval()
    x = torch.rand(60, 1, 8, generator=torch.Generator().manual_seed(0))
    rows = {}
    for quality in (3.0, (1.0, 2.0)):
        found = compress(model, x, quality=quality, compare=True, out=str(tmp_path))
        assert found.files[0].name == "samples.aez"
        rows[quality] = found.rows
        own = [row for row in found.rows if row["method"].startswith("aezoo")]
        assert [row["method"] for row in own[1:]] == (
            [f"{own[0]['method']}, tables instead of its prior"] if kind == "prior" else []
        )
        assert all(math.isnan(row["quality"]) for row in own)
        mse = float(((torch.from_numpy(right(model, x)) - x).double() ** 2).mean())
        assert own[0]["psnr"] == pytest.approx(-10 * math.log10(mse), abs=1e-4)
        assert "quality and steps do not change" in found.summary() and "bits_per_sample" in found.summary()
    assert [row["quality"] for row in rows[(1.0, 2.0)] if "PCA" in row["method"]] == [1, 2]
    assert len([row for row in rows[3.0] if row["method"] == "PCA 8 + histograms"]) == 5
    assert rows[3.0][0] == rows[(1.0, 2.0)][0]
    assert {"rate_distortion.csv", "rate_distortion.png"} <= {path.name for path in tmp_path.iterdir()}
    if kind == "prior":  # the size with tables
        plain, _ = written(Plain((1, 8), (9,)).eval(), x, tmp_path / "plain")
        assert own[1]["bytes"] == pytest.approx(plain.rows[0]["bytes"], abs=12)


def test_index_models_refuse_lossless_and_auto_is_lossy():
    model, x = Plain((1, 8), (9,)).eval(), torch.rand(20, 1, 8)
    assert compress(model, x, mode="lossy", compare=False).contents == compress(model, x, compare=False).contents
    with pytest.raises(AezooError, match="lossless needs"):
        compress(model, x, mode="lossless", compare=False)


GROUPS = {"n_groups": 2}
CODED = [
    # the codes of soft_vq are mixtures, which have no indices
    *((name, {}) for name in aezoo.list_models(family="quantised") if name != "soft_vq"),
    ("vq_vae", GROUPS),
    *((name, {"tokenizer": {"model": "vq_vae", **GROUPS}}) for name in ("pixelcnn", "index_transformer")),
    *((name, {"tokenizer": "qlae"}) for name in ("pixelcnn", "index_transformer")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), CODED)
def test_every_discrete_model_is_coded_by_indices(tmp_path, name, settings):
    torch.manual_seed(0)
    model = aezoo.create_model(name, (1, 16, 16), **settings).eval()
    x = torch.rand(9, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found, path = written(model, x, tmp_path, batch_size=4)
    back = decompress(model, str(path))
    under_prior = isinstance(model, IndexPrior)
    assert found.mode == back.mode == ("prior" if under_prior else "indices") and back.same
    assert back.x == pytest.approx(right(model, x, 4), abs=1e-6)
    if under_prior:
        with torch.no_grad():
            least = -float(model.log_prob(model.encode_indices(x)).double().sum()) / math.log(2)
        assert least <= found.net_bits <= 1.02 * least + 64 + 64 + 3 * 8
