"""Laws of the quantised family: losses by their formulas, what each term trains, codebook usage, resuming."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import aezoo
from aezoo.models.quantised.rq_vae import RQVAE
from aezoo.models.quantised.sim_vq_vae import SimVQVAE
from aezoo.models.quantised.vq_vae import VQVAE

# the model of each case, for conftest.py
MODEL_OF = {
    "vq": "vq_vae",
    "vq-gradient": "vq_vae",
    "vq-cosine": "vq_vae",
    "vq-groups": "vq_vae",
    "rq": "rq_vae",
    "rq-gradient": "rq_vae",
    "rq-dropped": "rq_vae",
    "fsq": "fsq_vae",
    "fsq-deep": "fsq_vae",
    "fsq-dropped": "fsq_vae",
    "lfq": "lfq_vae",
    "bsq": "bsq_vae",
    "sim_vq": "sim_vq_vae",
    "fvq": "fvq_vae",
    "vq-rotation": "vq_vae",
    "vq-gumbel": "vq_vae",
    "vq-diveq": "vq_vae",
}


DIM, PLACES = 4, 3


# no neutral values, so that every weight has an effect
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vq": ("vq_vae", {"latent_dim": DIM, "codebook_size": 7, "beta": 0.6}),
    "vq-gradient": ("vq_vae", {"latent_dim": DIM, "codebook_size": 7, "beta": 0.6, "update": "gradient"}),
    "vq-cosine": ("vq_vae", {"latent_dim": DIM, "codebook_size": 7, "beta": 0.6, "cosine": True}),
    "vq-groups": ("vq_vae", {"latent_dim": DIM, "codebook_size": 7, "beta": 0.6, "n_groups": 2}),
    "rq": ("rq_vae", {"latent_dim": DIM, "levels": 3, "codebook_size": 5, "beta": 0.6}),
    "rq-gradient": ("rq_vae", {"latent_dim": DIM, "levels": 3, "codebook_size": 5, "beta": 0.6, "update": "gradient"}),
    "fsq": ("fsq_vae", {"levels": (4, 3, 5, 6)}),
    "fsq-deep": ("fsq_vae", {"levels": (4, 3, 5, 6), "depth": 3}),
    "lfq": ("lfq_vae", {"latent_dim": DIM, "entropy_weight": 0.3, "gamma": 0.7, "beta": 0.6, "temperature": 1.5}),
    "bsq": ("bsq_vae", {"latent_dim": DIM, "entropy_weight": 0.3, "gamma": 0.7, "beta": 0.6, "temperature": 0.8}),
    "sim_vq": ("sim_vq_vae", {"latent_dim": DIM, "codebook_size": 7, "beta": 0.6}),
    "fvq": ("fvq_vae", {"latent_dim": DIM, "codebook_size": 7, "beta": 0.6, "group_size": 2, "width": 16, "depth": 1}),
}


every = pytest.mark.parametrize("key", MODELS)


class FixedCode(nn.Module):
    """An encoder whose output is a given z for any input."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = z

    def forward(self, x: Tensor) -> Tensor:
        return self.z


def small(key: str, **settings: Any) -> Any:
    """A float64 model with three places, with weights and codebooks away from their initial values."""
    name, given = MODELS[key]
    return spread(built(name, **given, **settings).double())


def built(name: str, **settings: Any) -> Any:
    """An untrained model for vectors of 6 values."""
    return aezoo.create_model(name, (6,), **{"net": "mlp", "hidden_dims": (16,), "places": PLACES, **settings})


def spread(model: Any) -> Any:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.quantiser.buffers()):
            if tensor.ndim == 2:
                tensor += 0.5 * torch.randn_like(tensor)
    for module in model.quantiser.modules():
        if getattr(module, "uses_ema", False):
            module.sum_KD.copy_(module.code_KD * module.count_K[:, None])
    return model


def data(n: int = 5) -> Tensor:
    return torch.rand(n, 6, dtype=torch.float64)


def as_rows(values: Tensor) -> Tensor:
    return values.movedim(1, -1).flatten(0, -2)


def gradients(value: Tensor, of: Any) -> list[Tensor]:
    of = [*of]
    found = torch.autograd.grad(value, of, retain_graph=True, allow_unused=True, materialize_grads=True) if of else []
    return [*found]


# ---- the loss by numpy, place by place -------------------------------------------------------------------------------


def rows_of(z: Tensor) -> np.ndarray:
    """(B, D, P) -> (B P, D), the places of a sample next to each other."""
    return np.stack([place for sample in z.detach().numpy() for place in sample.T])


def nearest(row: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    found: np.ndarray = codebook[np.argmin([np.sum((row - code) ** 2) for code in codebook])]
    return found


def by_codebooks(rows: np.ndarray, codebooks: list[np.ndarray]) -> tuple[np.ndarray, dict[str, float]]:
    """Sums of the nearest codes to the residuals of earlier codebooks, and their squared distance."""
    codes: list[np.ndarray] = []
    distance = 0.0
    for row in rows:
        total = np.zeros_like(row)
        for codebook in codebooks:
            total = total + nearest(row - total, codebook)
            distance += np.sum((row - total) ** 2)
        codes.append(total)
    return np.stack(codes), {"commitment": distance}


def by_signs(rows: np.ndarray, size: float, temperature: float) -> tuple[np.ndarray, dict[str, float]]:
    """Signs, and both entropies of softmax(2 u.c / temperature) over all 2^D codes c."""
    codebook = size * np.array([*itertools.product((-1.0, 1.0), repeat=rows.shape[1])])
    p = np.exp(2 * rows @ codebook.T / temperature)
    p /= p.sum(1, keepdims=True)
    codes = np.where(rows > 0, size, -size)
    mean = p.mean(0)
    terms = {
        "entropy": -np.sum(p * np.log(p)),
        "diversity": -len(rows) * np.sum(mean * np.log(mean)),  # the same at every place
        "commitment": np.sum((rows - codes) ** 2),
    }
    return codes, terms


def by_rounding(rows: np.ndarray, levels: tuple[int, ...], depth: int) -> tuple[np.ndarray, dict[str, float]]:
    """The listing of the paper's appendix A.1; each further level takes the middle of one of L cells."""
    L = np.array(levels, dtype=float)
    half, offset = (L - 1) * (1 - 1e-3) / 2, np.where(L % 2 == 0, 0.5, 0.0)
    bounded = np.tanh(rows + np.tan(offset / half)) * half - offset
    steps, cell = np.round(bounded), np.ones_like(L)
    for _ in range(depth - 1):
        cell = cell / L
        steps = steps + cell * (np.floor((bounded - steps) / cell + L / 2).clip(0, L - 1) + 0.5 - L / 2)
    return steps / np.floor(L / 2), {}


def reference(key: str, model: Any, z: Tensor) -> tuple[Tensor, dict[str, float]]:
    """z_q, (B, C, P), and terms per sample, by numpy from the encoder's output."""
    rows, quantiser, terms = rows_of(z), model.quantiser, dict[str, float]()
    if key == "vq-groups":
        codebooks = [group.code_KD.detach().numpy() for group in quantiser.groups]
        parts = [
            by_codebooks(part, [codebook])
            for part, codebook in zip(np.split(rows, len(codebooks), 1), codebooks, strict=True)
        ]
        codes = np.concatenate([found for found, _ in parts], 1)
        terms["commitment"] = sum(part["commitment"] for _, part in parts)
    elif key.startswith(("vq", "rq")):
        codebooks = [level.code_KD.detach().numpy() for level in getattr(quantiser, "levels", [quantiser])]
        if key == "vq-cosine":
            rows, codebooks = (
                values / np.linalg.norm(values, axis=-1, keepdims=True) for values in (rows, np.stack(codebooks))
            )
        codes, terms = by_codebooks(rows, [*codebooks])
        if key.endswith("gradient"):
            terms["codebook"] = terms["commitment"]
    elif key == "sim_vq":
        codes, terms = by_codebooks(rows, [quantiser.frozen_KD.numpy() @ quantiser.W_DD.detach().numpy()])
        terms["codebook"] = terms["commitment"]
    elif key == "fvq":
        codes, terms = by_codebooks(rows, [quantiser.codebook().detach().numpy()])
        terms["codebook"] = terms["commitment"]
    elif key.startswith("fsq"):
        codes, terms = by_rounding(rows, (4, 3, 5, 6), 3 if key == "fsq-deep" else 1)
    elif key == "lfq":
        codes, terms = by_signs(rows, 1.0, 1.5)
    else:
        codes, terms = by_signs(rows / np.linalg.norm(rows, axis=1, keepdims=True), DIM**-0.5, 0.8)
    z_q = np.stack([codes[i : i + PLACES].T for i in range(0, len(codes), PLACES)])
    return torch.from_numpy(z_q), {name: value / len(z) for name, value in terms.items()}


WEIGHTS = {"commitment": 0.6, "codebook": 1.0, "entropy": 0.3, "diversity": -0.3 * 0.7}


@pytest.mark.parametrize("training", [True, False])
@every
def test_loss_matches_numpy_formula(key: str, training: bool) -> None:
    model, x = small(key).train(training), data()
    z_q, expected = reference(key, model, model.encoder(x))
    log_p = D.Bernoulli(logits=model.decoder(z_q), validate_args=False).log_prob(x)
    expected["nll"] = -log_p.sum().item() / len(x)
    expected["loss"] = expected["nll"] + sum(w * expected.get(term, 0) for term, w in WEIGHTS.items())
    found = {name: value.item() for name, value in model.loss(x).items()}
    assert found == pytest.approx(expected, rel=1e-9)


# ---- what each term trains -------------------------------------------------------------------------------------------


ENCODER, CODES, DECODER = "encoder", "codes", "decoder"


REACHES = {
    "nll": {ENCODER, DECODER},
    "commitment": {ENCODER},
    "codebook": {CODES},
    "entropy": {ENCODER},
    "diversity": {ENCODER},
}


@every
def test_each_term_trains_expected_parts_only(key: str) -> None:
    model = small(key)
    parts = {ENCODER: model.encoder, CODES: model.quantiser, DECODER: model.decoder}
    terms = model.loss(data())
    assert terms.keys() - {"loss"} <= REACHES.keys()
    for term in terms.keys() - {"loss"}:
        if not terms[term].requires_grad:
            continue
        moved = {part for part, net in parts.items() if any(g.any() for g in gradients(terms[term], net.parameters()))}
        assert moved == REACHES[term], term
    assert bool([*model.quantiser.parameters()]) == ("codebook" in terms)


class BetaOnCodebook:
    """The wrong term (taming-transformers #57, diffusers #8226, 1d-tokenizer #95, SEED-Voken #60, CodeFormer)."""

    def loss(self: Any, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = super().loss(x)  # type: ignore[misc]
        return terms | {"loss": terms["nll"] + terms["commitment"] + self.beta * terms["codebook"]}


class BetaOnAllTerms:
    def loss(self: Any, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = super().loss(x)  # type: ignore[misc]
        return terms | {"loss": terms["nll"] + self.beta * (terms["commitment"] + terms["codebook"])}


class CommitmentAfterEstimator:
    """jax-vqvae-gpt #2: z_q already has the gradient of z, so that of the commitment term is 0."""

    def loss(self: Any, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = super().loss(x)  # type: ignore[misc]
        z = self.encoder(x)
        commitment = (z - self.quantiser(z).z_q).square().sum((1, 2)).mean()
        return terms | {"loss": terms["nll"] + self.beta * commitment + terms["codebook"]}


def beta_law(cls: Any, **settings: Any) -> None:
    """The weight of the term that pulls z to the codes is beta = 0.6, that of the term that pulls codes to z is 1."""
    nets = {"net": "mlp", "hidden_dims": (16,), "places": PLACES, "latent_dim": DIM}
    model = spread(cls((6,), codebook_size=7, beta=0.6, **nets, **settings).double())
    x = data(9)
    z, codes = model.encoder(x), [*model.quantiser.parameters()]
    levels = [*getattr(model.quantiser, "levels", [model.quantiser])]
    codebooks = [(level.codebook() if hasattr(level, "codebook") else level.code_KD) for level in levels]
    left, pull, push = z.movedim(1, -1).flatten(0, 1), torch.zeros(()), torch.zeros(())
    for codebook in codebooks:
        chosen = codebook[[int((row - codebook).square().sum(1).argmin()) for row in left]]
        pull = pull + 0.6 * (left - chosen.detach()).square().sum() / len(x)
        push = push + (left.detach() - chosen).square().sum() / len(x)
        left = left - chosen.detach()
    terms = model.loss(x)
    rest = terms["loss"] - terms["nll"]
    for value, of in ((pull, [*model.encoder.parameters()]), (push, codes)):
        expected = gradients(value, of)
        assert all(g.abs().max() > 0 for g in expected)
        for found, wanted in zip(gradients(rest, of), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


CODEBOOKS = [(VQVAE, {"update": "gradient"}), (RQVAE, {"update": "gradient", "levels": 3}), (SimVQVAE, {})]


@pytest.mark.parametrize(("cls", "settings"), CODEBOOKS)
def test_beta_weights_commitment_only(cls: Any, settings: dict[str, Any]) -> None:
    beta_law(cls, **settings)


@pytest.mark.parametrize("mistake", [BetaOnCodebook, BetaOnAllTerms, CommitmentAfterEstimator])
@pytest.mark.parametrize(("cls", "settings"), CODEBOOKS)
def test_misplaced_beta_is_detected(mistake: Any, cls: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        beta_law(type("Mistake", (mistake, cls), {}), **settings)


def passed(key: str, **settings: Any) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """A model, z and z_q as rows, (N, D), and the gradients of the nll by both."""
    model = small(key, **settings).eval()
    z = torch.randn(5, DIM, PLACES, dtype=torch.float64, requires_grad=True)
    seen: list[Tensor] = []
    model.encoder = FixedCode(z)
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    nll = model.loss(data())["nll"]
    found = z, seen[0], *torch.autograd.grad(nll, [z, seen[0]])
    z, z_q, of_z, of_q = (value.detach().movedim(1, -1).flatten(0, 1) for value in found)
    assert of_q.abs().max() > 0
    return model, z, z_q, of_z, of_q


@pytest.mark.parametrize("key", ["vq", "vq-gradient", "vq-groups", "rq", "rq-gradient", "lfq", "sim_vq", "fvq"])
def test_straight_through_passes_code_gradient_to_z(key: str) -> None:
    _, z, z_q, of_z, of_q = passed(key)
    assert not torch.equal(z, z_q)
    assert torch.equal(of_z, of_q)


@pytest.mark.parametrize("key", ["vq", "vq-gradient", "rq", "sim_vq", "fvq"])
def test_rotation_trick_keeps_angle_and_scales_by_norms(key: str) -> None:
    model, z, z_q, of_z, of_q = passed(key, estimator="rotation")
    assert torch.equal(z_q, as_rows(model.encode(data())))
    torch.testing.assert_close(of_z.norm(dim=1) / of_q.norm(dim=1), z_q.norm(dim=1) / z.norm(dim=1))
    torch.testing.assert_close(F.cosine_similarity(of_z, z), F.cosine_similarity(of_q, z_q), rtol=0, atol=1e-10)
    assert (of_z - of_q).abs().max() > 1e-3


# ---- neutral limits --------------------------------------------------------------------------------------------------


def trained_losses(model: Any, steps: int = 4) -> list[dict[str, float]]:
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    generator, found = torch.Generator().manual_seed(3), []
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.rand(8, 6, generator=generator, dtype=torch.float64)
        terms = model.train().training_step(x, 0)
        terms["loss"].backward()
        optimizer.step()
        found.append({name: value.item() for name, value in terms.items()})
    return found


def require_alike(one: Any, other: Any) -> None:
    """Check that both models have the same losses in training, and that these change."""
    first, second = trained_losses(one), trained_losses(other)
    assert first[0]["loss"] != first[-1]["loss"]
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


# ---- k-means ---------------------------------------------------------------------------------------------------------


def on_data(cls: Any, dim: int, **settings: Any) -> Any:
    """A model whose code is the sample itself: one place, identity nets."""
    nets = {"net": "mlp", "hidden_dims": (), "places": 1, "latent_dim": dim, "likelihood": "gaussian"}
    model = cls((dim,), **nets, **settings)
    model.encoder, model.decoder = nn.Unflatten(1, (dim, 1)), nn.Flatten()
    return model


@pytest.fixture(scope="module")
def rows(digits: Tensor) -> Tensor:
    return digits.flatten(1).float()


def error(model: Any, rows: Tensor) -> float:
    """Squared error of reconstructions, summed over the set."""
    with torch.no_grad():
        return float((model.eval()(rows) - rows).double().square().sum())


# ---- indices ---------------------------------------------------------------------------------------------------------


LEARNED = {
    **MODELS,
    "vq-groups": ("vq_vae", {"latent_dim": DIM, "codebook_size": 7, "n_groups": 2, "dead_below": 2.0, "decay": 0.5}),
    "vq-rotation": ("vq_vae", {"latent_dim": DIM, "codebook_size": 7, "estimator": "rotation"}),
    "vq-gumbel": ("vq_vae", {"latent_dim": DIM, "codebook_size": 7, "estimator": "gumbel", "update": "gradient"}),
    "vq-diveq": ("vq_vae", {"latent_dim": DIM, "codebook_size": 7, "estimator": "diveq", "update": "gradient"}),
    "rq-dropped": ("rq_vae", {"latent_dim": DIM, "levels": 3, "codebook_size": 5, "dropout": 0.7}),
    "fsq-dropped": ("fsq_vae", {"levels": (4, 3, 5, 6), "depth": 3, "dropout": 0.7}),
}


def batches(n: int = 48, size: int = 8) -> Any:
    x: Any = torch.rand(n, 6, generator=torch.Generator().manual_seed(5))
    return DataLoader(x, batch_size=size)


@pytest.mark.slow
@pytest.mark.parametrize("key", LEARNED)
def test_resume_is_exact_and_indices_roundtrip(key: str, quiet: Any, tmp_path: Any) -> None:
    name, settings = LEARNED[key]
    torch.manual_seed(11)
    whole = built(name, **settings)
    start = {key: value.clone() for key, value in whole.state_dict().items()}
    quiet(max_epochs=3).fit(whole, batches(), batches())
    torch.manual_seed(11)
    stopped, first = built(name, **settings), quiet(max_epochs=2)
    first.fit(stopped, batches(), batches())
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    loaded = aezoo.load_model(tmp_path / "stopped.ckpt")
    x = next(iter(batches()))
    for mode in (False, True):
        torch.manual_seed(2)
        expected = stopped.train(mode).loss(x)
        torch.manual_seed(2)
        found = loaded.train(mode).loss(x)
        assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}
    torch.manual_seed(99)
    resumed = built(name, **settings)
    trainer = quiet(max_epochs=3)
    trainer.fit(resumed, batches(), batches(), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    assert any(not torch.equal(value, start[key]) for key, value in whole.state_dict().items())
    with torch.no_grad():
        indices = whole.eval().encode_indices(x)
        assert torch.equal(whole.decode_indices(indices), whole(x))
    assert len(indices.unique()) > 1


@pytest.mark.parametrize("key", ["rq-dropped", "fsq-dropped"])
def test_quantiser_dropout_keeps_first_levels(key: str) -> None:
    name, settings = LEARNED[key]
    model, x, found = spread(built(name, **settings).double()), data(2000), []
    before = copy.deepcopy(model).eval()
    model.quantiser.register_forward_hook(lambda module, inputs, quantised: found.append(quantised.indices))
    model.decoder.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    model.train().loss(x)
    indices, z_q = found
    depth = (indices >= 0).sum(1)
    assert torch.equal(indices >= 0, torch.arange(3)[:, None] < depth[:, None])
    assert torch.equal(depth, depth[:, :1].expand(-1, PLACES))  # the same at all places of a sample
    shares = np.bincount(depth[:, 0].numpy(), minlength=4) / 2000
    np.testing.assert_allclose(shares, [0, 0.7 / 3, 0.7 / 3, 0.3 + 0.7 / 3], atol=5 * 0.5 / 2000**0.5)
    # the kept levels have the indices of evaluation, and their sum is decoded
    assert torch.equal(indices, before.encode_indices(x).where(indices >= 0, -1))
    torch.testing.assert_close(z_q, before.codes(indices))


@every
def test_autocast_indices_and_terms_match_float32(key: str) -> None:
    model = small(key).float().eval()
    z = (0.3 * torch.randn(700, DIM, PLACES)).bfloat16()
    x = torch.rand(700, 6)
    model.encoder = FixedCode(z.float())
    exact, terms = model.encode_indices(x), model.loss(x)
    model.encoder = FixedCode(z)
    with torch.autocast("cpu", torch.bfloat16):
        half, half_terms = model.encode_indices(x), model.loss(x)
    assert torch.equal(half, exact)
    for name in terms.keys() - {"nll", "loss"}:
        assert half_terms[name].dtype == torch.float32 and torch.equal(half_terms[name], terms[name]), name
    if key == "vq":  # with distances in bf16 some indices would differ
        near, codes = as_rows(z), model.quantiser.code_KD.bfloat16()
        wrong = (codes.square().sum(1) - 2 * near @ codes.T).argmin(1)
        assert (wrong != as_rows(exact)[:, 0]).any()


# ---- codebook usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "sizes"),
    [("vq", (7,)), ("vq-groups", (7, 7)), ("rq", (5, 5, 5)), ("fsq", (360,)), ("lfq", (16,))],
)
def test_usage_is_over_whole_set_not_batch_mean(key: str, sizes: tuple[int, ...], quiet: Any) -> None:
    model, x = small(key).float(), torch.rand(60, 6)
    figures = []
    for size in (4, 30):
        trainer = quiet()
        trainer.validate(model, DataLoader(x, batch_size=size), verbose=False)  # type: ignore[arg-type]
        figures.append({k: float(v) for k, v in trainer.callback_metrics.items() if "usage" in k or "perp" in k})
    indices = model.eval().encode_indices(x).numpy()
    usage, perplexity = [], []
    for codebook, size in enumerate(sizes):
        shares = np.bincount(indices[:, codebook].ravel(), minlength=size) / indices[:, codebook].size
        usage.append(np.mean(shares > 0))
        perplexity.append(math.exp(-sum(p * math.log(p) for p in shares if p)))
    expected = {"val/usage": np.mean(usage), "val/perplexity": np.mean(perplexity)}
    if len(sizes) > 1:
        for codebook in range(len(sizes)):
            expected |= {f"val/usage_{codebook}": usage[codebook], f"val/perplexity_{codebook}": perplexity[codebook]}
    for found in figures:
        assert found == pytest.approx(expected, rel=1e-5)
    means = [np.mean([len(np.unique(part[:, codebook])) / size for codebook, size in enumerate(sizes)])
             for part in np.split(indices, 15)]  # fmt: skip
    assert np.mean(means) < 0.95 * expected["val/usage"]


# ---- invalid values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("vq_vae", {"beta": -0.1}, "beta"),
        ("vq_vae", {"codebook_size": 0}, "codebook_size"),
        ("vq_vae", {"update": "adam"}, "update"),
        ("vq_vae", {"n_groups": 0}, "n_groups"),
        ("vq_vae", {"n_groups": 3}, "3 groups do not divide 16"),
        ("rq_vae", {"levels": 0}, "levels"),
        ("rq_vae", {"codebook_size": 0}, "codebook_size"),
        ("rq_vae", {"beta": math.nan}, "beta"),
        ("rq_vae", {"dropout": 1.5}, "dropout"),
        ("rq_vae", {"estimator": "none"}, "estimator"),
        ("fsq_vae", {"levels": ()}, "levels"),
        ("fsq_vae", {"levels": (8, 1)}, "levels"),
        ("fsq_vae", {"depth": 0}, "depth"),
        ("fsq_vae", {"dropout": -0.5}, "dropout"),
        ("lfq_vae", {"latent_dim": 0}, "latent_dim"),
        ("lfq_vae", {"latent_dim": 63}, "63"),
        ("lfq_vae", {"entropy_weight": -1.0}, "entropy_weight"),
        ("lfq_vae", {"gamma": -1.0}, "gamma"),
        ("lfq_vae", {"temperature": 0.0}, "temperature"),
        ("bsq_vae", {"beta": -1.0}, "beta"),
        ("bsq_vae", {"temperature": -1.0}, "temperature"),
        ("sim_vq_vae", {"beta": math.inf}, "beta"),
        ("sim_vq_vae", {"codebook_size": 0}, "codebook_size"),
        ("sim_vq_vae", {"estimator": "gumbel"}, "estimator"),
        ("sim_vq_vae", {"places": 0, "net": "mlp"}, "places"),
        ("fvq_vae", {"group_size": 0}, "group_size"),
        ("fvq_vae", {"depth": 0}, "depth"),
        ("fvq_vae", {"width": 0}, "width"),
        ("fvq_vae", {"codebook_size": 0}, "codebook_size"),
    ],
)
def test_invalid_values_are_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word) as refusal:
        aezoo.create_model(name, input_shape=(1, 8, 8), **settings)
    assert len(str(refusal.value).splitlines()) == 1


# ---- inference of a model in training --------------------------------------------------------------------------------


PRIORS = ("index_transformer", "pixelcnn")


@pytest.mark.parametrize("name", [name for name in aezoo.list_models() if aezoo.model_class(name).discrete_code])
def test_inference_calls_do_not_update_codebook(name: str) -> None:
    """A Trainer leaves a model in training mode, in which each batch updates the codebook."""
    torch.manual_seed(0)
    # the priors over indices drop activations
    model = aezoo.create_model(name, (1, 16, 16), **({"dropout": 0.0} if name in PRIORS else {}))
    x, before = torch.rand(4, 1, 16, 16), copy.deepcopy(model.state_dict())
    codebooks = [part.training for part in model.modules()]
    for call in (model.encode, model.encode_indices, model.score, model):
        assert torch.equal(call(x), call(x))
    for (key, value), now in zip(before.items(), model.state_dict().values(), strict=True):
        assert torch.equal(value, now), key
    assert [part.training for part in model.modules()] == codebooks


@pytest.mark.parametrize("key", ["vq", "rq", "vq-cosine"])
def test_training_loss_updates_codebook(key: str) -> None:
    model = small(key)
    before = copy.deepcopy(model.quantiser.state_dict())
    model.loss(torch.rand(4, 6).double())
    assert any(not torch.equal(value, model.quantiser.state_dict()[name]) for name, value in before.items())
