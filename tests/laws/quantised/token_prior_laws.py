"""Laws of the priors over indices: probabilities by enumeration, causality by gradients, and frozen tokenizers."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chi2
from torch import Tensor, nn
from torch.utils.data import DataLoader

import aezoo
from aezoo.bases import token_prior
from aezoo.bases.quantised import DiscreteAutoencoder

NAMES = ("pixelcnn", "index_transformer")


SMALL: dict[str, dict[str, Any]] = {
    "pixelcnn": {"width": 24, "depth": 3, "kernel_size": 3, "dropout": 0.0},
    "index_transformer": {"width": 16, "depth": 2, "dropout": 0.0},
}


FROZEN = {"model": "vq_vae", "trained": True}


class StubTokenizer(DiscreteAutoencoder):
    """A tokenizer whose samples are their own indices, of any layout and codebook sizes."""

    def __init__(self, index_shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        super().__init__((math.prod(index_shape),), likelihood="gaussian")
        self.layout, self.sizes, self.code_shape = index_shape, sizes, index_shape
        self.decoder = nn.Flatten()

    index_shape = property(lambda self: self.layout)  # type: ignore[assignment]
    index_sizes = property(lambda self: self.sizes)  # type: ignore[assignment]

    def encode(self, x: Tensor) -> Tensor:
        return x.unflatten(1, self.layout)

    def encode_indices(self, x: Tensor) -> Tensor:
        return x.long().unflatten(1, self.layout)

    def codes(self, indices: Tensor) -> Tensor:
        return indices.double()


def prior(name: str, index_shape: tuple[int, ...], sizes: tuple[int, ...], **settings: Any) -> Any:
    """A float64 prior over indices of this layout, with random offsets added to its initial weights."""
    with mock.patch.object(token_prior, "_build_tokenizer", return_value=StubTokenizer(index_shape, sizes)):
        model = aezoo.create_model(
            name, (math.prod(index_shape),), tokenizer=FROZEN, **{**SMALL[name], **settings}
        ).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model.eval()


def drawn(model: Any, n: int) -> Tensor:
    """Random tokens within their codebooks, (n, T)."""
    q = len(model.index_sizes)
    columns = [torch.randint(model.index_sizes[t % q], (n,)) for t in range(model.n_tokens)]
    return torch.stack(columns, 1)


def every(model: Any) -> Tensor:
    """All possible token sequences."""
    q = len(model.index_sizes)
    return torch.tensor([*itertools.product(*(range(model.index_sizes[t % q]) for t in range(model.n_tokens)))])


# index shapes (a vector, sequences, maps, a volume) and codebook sizes
LAYOUTS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((3,), (2, 3, 4)),
    ((1, 7), (5,)),
    ((3, 4), (4, 2, 3)),
    ((1, 3, 4), (5,)),
    ((2, 3, 3), (3, 4)),
    ((1, 2, 2, 3), (4,)),
    ((2, 2, 2, 2), (2, 3)),
]


CASES = [(name, *layout) for name in NAMES for layout in LAYOUTS if not (name == "pixelcnn" and len(layout[0]) == 4)]


# ---- causality -------------------------------------------------------------------------------------------------------


@contextmanager
def embedded() -> Iterator[list[Tensor]]:
    """Record the token embeddings, with gradients retained."""
    found: list[Tensor] = []
    real = F.embedding

    def keep(*args: Any, **kwargs: Any) -> Tensor:
        found.append(real(*args, **kwargs))
        found[-1].retain_grad()
        return found[-1]

    with mock.patch.object(torch.nn.functional, "embedding", keep):
        yield found


def dependence(model: Any) -> Tensor:
    """The norm of the gradient of each token's logits with respect to each embedded token: (T, T)."""
    tokens, t = drawn(model, 1), model.n_tokens
    size = torch.zeros(t, t, dtype=torch.float64)
    for row in range(t):
        with embedded() as found:
            logits = model.token_logits(tokens)[0, row]
        (logits * torch.randn_like(logits)).sum().backward()
        grad = found[0].grad.flatten(1, -2)[0].norm(dim=1)
        size[row, : len(grad)] = grad
    return size


def moved(model: Any) -> Tensor:
    """The change of each token's logits when one token changes: (T, T)."""
    tokens, t = drawn(model, 1), model.n_tokens
    size = torch.zeros(t, t, dtype=torch.float64)
    with torch.no_grad():
        before = model.token_logits(tokens)
        for column in range(t):
            other = tokens.clone()
            other[0, column] = (other[0, column] + 1) % model.index_sizes[column % len(model.index_sizes)]
            size[:, column] = (model.token_logits(other) - before)[0].abs().amax(1)
    return size


def causal_law(model: Any) -> None:
    """Each token's logits depend on every token before it and on none after."""
    for size in (dependence(model), moved(model)):
        before = torch.ones_like(size).tril(-1).bool()
        assert size[~before].max() <= 1e-12 * size.max()
        assert size[before].min() > 1e-9 * size.max()


@pytest.mark.parametrize(("name", "shape", "sizes"), CASES)
def test_token_logits_are_causal(name: str, shape: Any, sizes: Any) -> None:
    causal_law(prior(name, shape, sizes, **({"depth": 6} if name == "pixelcnn" else {})))


# ---- probabilities ---------------------------------------------------------------------------------------------------


TINY: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((1, 2, 2), (3,)), ((1, 4), (3,)), ((2, 2), (3, 2)), ((2, 1, 2), (2, 3)), ((4,), (3, 2, 3, 2)),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "sizes"), TINY)
def test_the_probabilities_of_all_sequences_sum_to_one(name: str, shape: Any, sizes: Any) -> None:
    model = prior(name, shape, sizes)
    total = model.log_prob(model.from_tokens(every(model))).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "sizes"), [((1, 3, 4), (5,)), ((2, 3, 3), (3, 4)), ((3, 4), (4, 2, 3))])
def test_the_loss_is_the_cross_entropy_of_the_indices(name: str, shape: Any, sizes: Any) -> None:
    model = prior(name, shape, sizes)
    x = model.from_tokens(drawn(model, 6)).flatten(1).double()
    tokens = model.to_tokens(x.long().unflatten(1, shape))
    logits = model.logits(tokens).detach()
    for i, size in enumerate(sizes):  # codes outside the codebook of an index
        of_index = logits[:, i :: len(sizes)]
        assert torch.isfinite(of_index[..., :size]).all() and (of_index[..., size:] == -math.inf).all()
    nll, hits = np.zeros(6), 0
    for b, t in itertools.product(range(6), range(model.n_tokens)):
        row = logits[b, t, : sizes[t % len(sizes)]].numpy()
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        nll[b] -= np.log(p[tokens[b, t]])
        hits += int(row.argmax() == tokens[b, t])
    terms = model.loss(x)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum") / 6
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-12) == pytest.approx(nll.mean(), rel=1e-12)
    assert terms["nll"].item() == terms["loss"].item() and terms["accuracy"].item() == pytest.approx(
        hits / tokens.numel()
    )
    assert model.log_prob(x.long().unflatten(1, shape)).detach().numpy() == pytest.approx(-nll, rel=1e-12)
    own = -torch.distributions.Normal(x, 0.5**0.5).log_prob(x).sum(1)  # the stub tokenizer reconstructs x exactly
    torch.testing.assert_close(model.score(x) - own, torch.from_numpy(nll), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_dropped_index_has_no_loss(name: str) -> None:
    model = prior(name, (2, 3), (4, 4))
    tokens = drawn(model, 3)
    dropped = tokens.clone()
    dropped[:, -1] = -1
    costs = -model.logits(tokens).log_softmax(2).gather(2, tokens[..., None])[..., 0]
    torch.testing.assert_close(model._nll(dropped)[0], costs[:, :-1].sum(1))


@pytest.mark.parametrize(("name", "shape", "sizes"), CASES)
def test_next_logits_match_whole_and_are_causal(name: str, shape: Any, sizes: Any) -> None:
    model = prior(name, shape, sizes).float()
    tokens = drawn(model, 4)
    with torch.no_grad():
        whole = model.logits(tokens)
        for t in range(model.n_tokens):
            found = model.next_logits(tokens, t)
            torch.testing.assert_close(found, whole[:, t], rtol=1e-5, atol=1e-5)
            later = torch.where(torch.arange(model.n_tokens) < t, tokens, drawn(model, 4))
            assert torch.equal(model.next_logits(later, t), found)


@pytest.mark.parametrize(("name", "shape", "sizes"), CASES)
@pytest.mark.parametrize("every_nth", [1, 3])
def test_incremental_logits_match_full_logits(name: str, shape: Any, sizes: Any, every_nth: int) -> None:
    """Tokens may be skipped: the codec skips those that have only one possible code."""
    model = prior(name, shape, sizes)
    tokens = drawn(model, 4)
    with torch.no_grad():
        whole, walk, other = model.logits(tokens), model.incremental_logits(), model.incremental_logits()
        for t in range(0, model.n_tokens, every_nth):
            found = walk(tokens, t)
            torch.testing.assert_close(found, whole[:, t], rtol=1e-10, atol=1e-10)
            later = torch.where(torch.arange(model.n_tokens) < t, tokens, drawn(model, 4))
            assert torch.equal(other(later, t), found)


# ---- draws -----------------------------------------------------------------------------------------------------------


def drawn_probabilities(model: Any, temperature: float, top_k: int) -> np.ndarray:
    """The probability of every sequence, with each conditional limited to top_k and sharpened by 1 / temperature."""
    sequences = every(model)
    logits = model.logits(sequences).detach().numpy()
    p = np.ones(len(sequences))
    for t in range(model.n_tokens):
        rows = np.exp(logits[:, t] - logits[:, t].max(1, keepdims=True))
        rows /= rows.sum(1, keepdims=True)
        if top_k:
            rows[rows < np.sort(rows, 1)[:, -top_k][:, None]] = 0
        rows **= 1 / temperature
        p *= (rows / rows.sum(1, keepdims=True))[np.arange(len(p)), sequences[:, t]]
    return p


def chi_square_law(model: Any, sample: Callable[..., Tensor], temperature: float, top_k: int) -> None:
    """Chi-square test of the frequencies of sequences, with a false alarm rate of 1e-6."""
    p = drawn_probabilities(model, temperature, top_k)
    assert p.sum() == pytest.approx(1)
    n, order = 3000, {tuple(s): i for i, s in enumerate(every(model).tolist())}
    tokens = model.to_tokens(sample(n, temperature, top_k))
    counts = np.zeros(len(p))
    np.add.at(counts, [order[tuple(s)] for s in tokens.tolist()], 1)
    assert counts[p == 0].sum() == 0
    often = n * p >= 5
    observed, expected = [*counts[often], counts[~often].sum()], [*n * p[often], n * p[~often].sum()]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True) if e > 1e-9)
    assert chi2.sf(statistic, sum(e > 1e-9 for e in expected) - 1) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.6, 0), (1.0, 2), (1.5, 2)])
def test_draws_have_the_enumerated_probabilities(name: str, temperature: float, top_k: int) -> None:
    model = prior(name, (1, 2, 2), (3,), depth=2)
    chi_square_law(model, model.sample_indices, temperature, top_k)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1e-4, 0), (1.0, 1), (0.0, 7)])
def test_temperature_0_or_top_1_draws_the_likeliest(name: str, temperature: float, top_k: int) -> None:
    model = prior(name, (2, 2, 2), (3, 4))
    tokens = torch.zeros(1, 8, dtype=torch.long)
    for t in range(8):
        tokens[0, t] = model.logits(tokens)[0, t].argmax()
    found = model.sample_indices(5, temperature, top_k)
    assert torch.equal(found, model.from_tokens(tokens).expand(5, -1, -1, -1))
    assert torch.equal(model.sample(5, temperature, top_k), found.flatten(1).double())


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_trained_nll_reaches_source_entropy(name: str, adam: Any) -> None:
    """For independent indices, the nll falls to the sum of their entropies and not below."""
    shape, rng = (1, 2, 3), np.random.default_rng(0)
    p_TK = rng.dirichlet(np.ones(4), 6)
    x = torch.from_numpy(np.stack([rng.choice(4, 8000, p=p) for p in p_TK], 1)).float()
    model = prior(name, shape, (4,), depth=1).float()
    adam(model, x[:4000], 120, 0.02, 200)
    entropy = -(p_TK * np.log(p_TK)).sum()
    with torch.no_grad():
        nll = model.loss(x[4000:])["nll"].item()
    assert entropy * 0.98 < nll < entropy * 1.1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 3, 3), (2, 4)])
def test_deterministic_pattern_costs_first_index_only(name: str, shape: Any, adam: Any) -> None:
    """k_t = k_0 + t (mod 5): only the uniform k_0 costs log 5 nats."""
    t = math.prod(shape)
    tokens = (torch.arange(5)[:, None] + torch.arange(t)) % 5
    model = prior(name, shape, (5,) * shape[0], depth=2).float()
    x = model.from_tokens(tokens).flatten(1).float()
    adam(model, x, 150, 0.02, 5)
    terms = model.loss(x)
    assert terms["nll"].item() == pytest.approx(math.log(5), abs=0.08)
    assert terms["accuracy"].item() >= (t - 1) / t


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


TOKENIZER: dict[str, Any] = {"net": "mlp", "hidden_dims": (8,), "places": 4, "latent_dim": 3, "codebook_size": 6}


def batches(n: int = 6) -> DataLoader[Any]:
    return DataLoader([torch.rand(8, 1, 4, 4) for _ in range(n)], batch_size=None)  # type: ignore[arg-type]


@pytest.fixture
def trained(tmp_path: Any, quiet: Any) -> Any:
    """A saved vq_vae, trained for a few steps so that its codes are initialised and updated."""
    model = aezoo.create_model("vq_vae", (1, 4, 4), **TOKENIZER)
    quiet(max_epochs=1).fit(model, batches())
    return aezoo.save_model(model, tmp_path / "tokenizer")


@pytest.mark.parametrize("name", NAMES)
def test_trained_tokenizer_is_frozen_under_its_prior(name: str, trained: Any, quiet: Any) -> None:
    model = aezoo.create_model(name, (1, 4, 4), tokenizer=str(trained), **SMALL[name])
    before = copy.deepcopy(model.state_dict())
    quiet(max_epochs=2).fit(model, batches())
    model.train()
    assert model.training and not any(part.training for part in model.tokenizer.modules())
    assert not any(p.requires_grad for p in model.tokenizer.parameters())
    (group,) = model.parameter_groups()
    assert not {id(p) for p in group["params"]} & {id(p) for p in model.tokenizer.parameters()}
    after, own = model.state_dict(), aezoo.load_model(trained).state_dict()
    assert {"tokenizer.quantiser.code_KD", "tokenizer.quantiser.sum_KD", "tokenizer.quantiser.count_K"} <= after.keys()
    for key, value in after.items():
        if key.startswith("tokenizer."):
            assert torch.equal(value, own[key.removeprefix("tokenizer.")]), key
    moved_too = [key for key, value in after.items() if not torch.equal(value, before[key])]
    assert len(moved_too) > 5 and not any(key.startswith("tokenizer.") for key in moved_too)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_untrained_tokenizer_trains_as_if_alone(name: str, quiet: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = aezoo.create_model(name, (1, 4, 4), tokenizer={"model": "vq_vae", "lr": 2e-3, **TOKENIZER}, **SMALL[name])
    alone = aezoo.create_model("vq_vae", (1, 4, 4), lr=2e-3, **TOKENIZER)
    alone.load_state_dict(model.tokenizer.state_dict())
    data = batches(20)
    quiet(max_epochs=2).fit(model, data)
    assert "the tokenizer vq_vae has random weights" in capsys.readouterr().err
    quiet(max_epochs=2).fit(alone, data)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(model.tokenizer.state_dict()[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert int(alone.quantiser.updates) == 40  # encoding the indices is not a second step
    terms = model.eval().loss(torch.rand(3, 1, 4, 4))
    assert terms["loss"].item() == pytest.approx((terms["nll"] + terms["tokenizer_loss"]).item(), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_prior_contains_tokenizer_and_needs_no_file(name: str, trained: Any, tmp_path: Any) -> None:
    model = aezoo.create_model(name, (1, 4, 4), tokenizer=str(trained), **SMALL[name]).eval()
    x = torch.rand(5, 1, 4, 4)
    expected = aezoo.load_model(trained)(x)
    for file in trained.iterdir():
        file.unlink()
    settings = model.hparams["tokenizer"]
    assert settings["model"] == "vq_vae" and settings["trained"] is True and settings["hidden_dims"] == [8]
    other = aezoo.load_model(aezoo.save_model(model, tmp_path / "prior"))
    assert other.frozen and other.hparams == model.hparams
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    torch.manual_seed(0)
    one = model.sample(3)
    torch.manual_seed(0)
    assert torch.equal(other.sample(3), one)
    # another prior can load the tokenizer from this checkpoint
    third = aezoo.create_model("index_transformer", (1, 4, 4), tokenizer=str(tmp_path / "prior"))
    assert torch.equal(third(x), expected) and third.hparams["tokenizer"] == settings
