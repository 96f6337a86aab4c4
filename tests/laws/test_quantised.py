"""Laws of the quantised family: each loss by its formula, where gradients go, k-means, usage, what is resumed."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.utils.data import DataLoader

import aezoo
from aezoo.models.quantised.rq_vae import RQVAE
from aezoo.models.quantised.sim_vq_vae import SimVQVAE
from aezoo.models.quantised.vq_vae import VQVAE
from aezoo.quantisers import FSQ, VQ, GroupedVQ
from aezoo.testing import check_ddp, subject_of

DIM, PLACES = 4, 3
# away from neutral values, so that every weight shows
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


class Given(nn.Module):
    """An encoder that gives the same z to whatever it reads, so that z can be looked at."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = z

    def forward(self, x: Tensor) -> Tensor:
        return self.z


def small(key: str, **settings: Any) -> Any:
    """A model of three places in float64, its weights and its codes away from where they start."""
    name, given = MODELS[key]
    return spread(built(name, **given, **settings).double())


def built(name: str, **settings: Any) -> Any:
    """A model of vectors of 6 values, as it starts."""
    return aezoo.create_model(name, (6,), **{"net": "mlp", "hidden_dims": (16,), "places": PLACES, **settings})


def spread(model: Any) -> Any:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.quantiser.buffers()):
            if tensor.ndim == 2:
                tensor += 0.5 * torch.randn_like(tensor)
    for module in model.quantiser.modules():
        if getattr(module, "averages", False):
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


# ---- the loss, written out a place at a time ------------------------------------------------------------------------


def rows_of(z: Tensor) -> np.ndarray:
    """(B, D, P) -> (B P, D), the places of a sample next to each other."""
    return np.stack([place for sample in z.detach().numpy() for place in sample.T])


def nearest(row: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    found: np.ndarray = codebook[np.argmin([np.sum((row - code) ** 2) for code in codebook])]
    return found


def by_books(rows: np.ndarray, codebooks: list[np.ndarray]) -> tuple[np.ndarray, dict[str, float]]:
    """Codes, each the nearest to what the codebooks before have left over, and their squared distance."""
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
    """z_q, (B, C, P), and terms a sample, by numpy from the encoder's output."""
    rows, quantiser, terms = rows_of(z), model.quantiser, dict[str, float]()
    if key == "vq-groups":
        codebooks = [group.code_KD.detach().numpy() for group in quantiser.groups]
        parts = [
            by_books(part, [codebook])
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
        codes, terms = by_books(rows, [*codebooks])
        if key.endswith("gradient"):
            terms["codebook"] = terms["commitment"]
    elif key == "sim_vq":
        codes, terms = by_books(rows, [quantiser.frozen_KD.numpy() @ quantiser.W_DD.detach().numpy()])
        terms["codebook"] = terms["commitment"]
    elif key == "fvq":
        codes, terms = by_books(rows, [quantiser.codebook().detach().numpy()])
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
def test_the_loss_is_its_formula_written_out_in_numpy(key: str, training: bool) -> None:
    model, x = small(key).train(training), data()
    z_q, expected = reference(key, model, model.encoder(x))
    log_p = D.Bernoulli(logits=model.decoder(z_q), validate_args=False).log_prob(x)
    expected["nll"] = -log_p.sum().item() / len(x)
    expected["loss"] = expected["nll"] + sum(w * expected.get(term, 0) for term, w in WEIGHTS.items())
    found = {name: value.item() for name, value in model.loss(x).items()}
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_step_of_training_counts_the_rows_of_the_batch_once() -> None:
    model, x = small("vq").train(), data()
    before = model.quantiser.count_K.clone()
    hits = np.bincount(model.eval().encode_indices(x).flatten().numpy(), minlength=7)
    model.train().loss(x)
    expected = 0.99 * before.numpy() + 0.01 * hits
    moved = model.quantiser.count_K != len(x) * PLACES / 7  # a code that died has started anew
    assert int(moved.sum()) > 0
    np.testing.assert_allclose(model.quantiser.count_K[moved].numpy(), expected[moved.numpy()], rtol=1e-6)


# ---- where gradients go ---------------------------------------------------------------------------------------------


ENCODER, CODES, DECODER = "encoder", "codes", "decoder"
REACHES = {
    "nll": {ENCODER, DECODER},
    "commitment": {ENCODER},
    "codebook": {CODES},
    "entropy": {ENCODER},
    "diversity": {ENCODER},
}


@every
def test_each_term_moves_what_it_may_and_nothing_else(key: str) -> None:
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


@pytest.mark.parametrize("estimator", ["diveq", "gumbel"])
def test_estimators_that_train_codes_through_the_decoder_do(estimator: str) -> None:
    model = small("vq-gradient", estimator=estimator).train()
    terms = model.loss(data())
    assert ("codebook" in terms) == (estimator == "gumbel")
    (of_codes,) = gradients(terms["nll"], model.quantiser.parameters())
    assert of_codes.abs().max() > 0


class BetaOnCodebook:
    """On the wrong term: taming-transformers #57, diffusers #8226, 1d-tokenizer #95, SEED-Voken #60, CodeFormer."""

    def loss(self: Any, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = super().loss(x)  # type: ignore[misc]
        return terms | {"loss": terms["nll"] + terms["commitment"] + self.beta * terms["codebook"]}


class BetaOnBoth:
    def loss(self: Any, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = super().loss(x)  # type: ignore[misc]
        return terms | {"loss": terms["nll"] + self.beta * (terms["commitment"] + terms["codebook"])}


class CommitmentAfterTheEstimator:
    """jax-vqvae-gpt #2: z_q has the gradient of z by then, so that nothing pulls z."""

    def loss(self: Any, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = super().loss(x)  # type: ignore[misc]
        z = self.encoder(x)
        commitment = (z - self.quantiser(z).z_q).square().sum((1, 2)).mean()
        return terms | {"loss": terms["nll"] + self.beta * commitment + terms["codebook"]}


def beta_law(cls: Any, **settings: Any) -> None:
    """With beta = 0.6 it pulls z to the codes, and 1 the codes to z, both as differences written out say."""
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


BOOKS = [(VQVAE, {"update": "gradient"}), (RQVAE, {"update": "gradient", "levels": 3}), (SimVQVAE, {})]


@pytest.mark.parametrize(("cls", "settings"), BOOKS)
def test_beta_weighs_the_commitment_and_nothing_else(cls: Any, settings: dict[str, Any]) -> None:
    beta_law(cls, **settings)


@pytest.mark.parametrize("rival", [BetaOnCodebook, BetaOnBoth, CommitmentAfterTheEstimator])
@pytest.mark.parametrize(("cls", "settings"), BOOKS)
def test_a_rival_s_beta_breaks_the_law(rival: Any, cls: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        beta_law(type("Rival", (rival, cls), {}), **settings)


def passed(key: str, **settings: Any) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """A model, z and z_q as rows, (N, D), and the gradients of the nll in both."""
    model = small(key, **settings).eval()
    z = torch.randn(5, DIM, PLACES, dtype=torch.float64, requires_grad=True)
    seen: list[Tensor] = []
    model.encoder = Given(z)
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    nll = model.loss(data())["nll"]
    found = z, seen[0], *torch.autograd.grad(nll, [z, seen[0]])
    z, z_q, of_z, of_q = (value.detach().movedim(1, -1).flatten(0, 1) for value in found)
    assert of_q.abs().max() > 0
    return model, z, z_q, of_z, of_q


@pytest.mark.parametrize("key", ["vq", "vq-gradient", "vq-groups", "rq", "rq-gradient", "lfq", "sim_vq", "fvq"])
def test_straight_through_z_gets_the_gradient_of_its_code(key: str) -> None:
    _, z, z_q, of_z, of_q = passed(key)
    assert not torch.equal(z, z_q)
    assert torch.equal(of_z, of_q)


def test_straight_through_the_sphere_and_the_bound_are_differentiated() -> None:
    _, z, _, of_z, of_q = passed("bsq")
    norm = z.norm(dim=1, keepdim=True)
    u = z / norm
    torch.testing.assert_close(of_z, (of_q - u * (u * of_q).sum(1, keepdim=True)) / norm)
    for key in ("fsq", "fsq-deep"):
        _, z, _, of_z, of_q = passed(key)
        L = torch.tensor([4.0, 3, 5, 6], dtype=torch.float64)
        half, offset = (L - 1) * 0.999 / 2, torch.where(L % 2 == 0, 0.5, 0.0)
        slope = half / torch.cosh(z + (offset / half).tan()) ** 2 / (L // 2)
        torch.testing.assert_close(of_z, of_q * slope)


@pytest.mark.parametrize("key", ["vq", "vq-gradient", "rq", "sim_vq", "fvq"])
def test_rotation_keeps_the_angle_to_the_code_and_scales_by_the_norms(key: str) -> None:
    model, z, z_q, of_z, of_q = passed(key, estimator="rotation")
    assert torch.equal(z_q, as_rows(model.encode(data())))
    torch.testing.assert_close(of_z.norm(dim=1) / of_q.norm(dim=1), z_q.norm(dim=1) / z.norm(dim=1))
    torch.testing.assert_close(F.cosine_similarity(of_z, z), F.cosine_similarity(of_q, z_q), rtol=0, atol=1e-10)
    assert (of_z - of_q).abs().max() > 1e-3


# ---- neutral limits -------------------------------------------------------------------------------------------------


def trained_losses(model: Any, steps: int = 4) -> list[dict[str, float]]:
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    dice, found = torch.Generator().manual_seed(3), []
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.rand(8, 6, generator=dice, dtype=torch.float64)
        terms = model.train().training_step(x, 0)
        terms["loss"].backward()
        optimizer.step()
        found.append({name: value.item() for name, value in terms.items()})
    return found


def require_alike(one: Any, other: Any) -> None:
    """The same losses while both are trained, which change."""
    first, second = trained_losses(one), trained_losses(other)
    assert first[0]["loss"] != first[-1]["loss"]
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


@pytest.mark.parametrize(
    "settings",
    [{}, {"update": "gradient"}, {"estimator": "rotation"}, {"dead_below": 3.0, "decay": 0.5}, {"dropout": 1.0}],
)
def test_one_level_of_rq_vae_is_vq_vae(settings: dict[str, Any]) -> None:
    settings = {"latent_dim": DIM, "codebook_size": 7, "beta": 0.6, **settings}
    one = built("rq_vae", levels=1, **settings).double()
    other = built("vq_vae", **{name: value for name, value in settings.items() if name != "dropout"}).double()
    other.load_state_dict({key.replace("levels.0.", ""): value for key, value in one.state_dict().items()})
    require_alike(one, other)
    assert torch.equal(one.quantiser.levels[0].code_KD, other.quantiser.code_KD)


@pytest.mark.parametrize("settings", [{}, {"update": "gradient"}, {"cosine": True}, {"dead_below": 3.0, "decay": 0.5}])
def test_one_group_of_vq_vae_is_vq_vae_under_the_names_of_before(settings: dict[str, Any]) -> None:
    given = {"latent_dim": DIM, "codebook_size": 7, "beta": 0.6, **settings}
    one, other = (spread(built("vq_vae", n_groups=1, **given).double()) for _ in range(2))
    assert type(one.quantiser) is VQ
    other.load_state_dict(one.state_dict())
    other.quantiser = GroupedVQ(DIM, 1, 7, **{"dead_below": 1.0, **settings}).double()
    other.quantiser.groups[0].load_state_dict(one.quantiser.state_dict())
    require_alike(one, other)


@pytest.mark.parametrize(
    "settings",
    [{}, {"update": "gradient"}, {"cosine": True}, {"estimator": "rotation"}, {"dead_below": 3.0, "decay": 0.5}],
)
def test_groups_of_vq_vae_are_quantised_as_by_a_vq_vae_each(settings: dict[str, Any]) -> None:
    """Terms are the sums of theirs and a place's indices theirs in turn, in training and evaluation, and so learn."""
    settings = {"codebook_size": 7, "beta": 0.6, **settings}
    whole = spread(built("vq_vae", latent_dim=DIM, n_groups=2, **settings).double())
    parts = [built("vq_vae", latent_dim=DIM // 2, **settings).double().quantiser for _ in range(2)]
    for part, group in zip(parts, whole.quantiser.groups, strict=True):
        part.load_state_dict(group.state_dict())
    for training in (True, True, False):
        z = torch.randn(9, DIM, PLACES, dtype=torch.float64, requires_grad=True)
        whole.encoder, grad = Given(z), torch.randn(9, DIM, PLACES, dtype=torch.float64)
        found = whole.train(training).quantise(data(9))
        cuts = [(part.train(training)(cut), cut) for part, cut in zip(parts, z.split(DIM // 2, 1), strict=True)]
        assert torch.equal(found.indices, torch.cat([of.indices for of, _ in cuts], 1))
        assert torch.equal(found.z_q, torch.cat([of.z_q for of, _ in cuts], 1))
        assert found.terms.keys() == cuts[0][0].terms.keys()
        for term, value in found.terms.items():
            torch.testing.assert_close(value, cuts[0][0].terms[term] + cuts[1][0].terms[term])
        (of_z,) = torch.autograd.grad(found.z_q, z, grad)
        theirs = torch.autograd.grad([of.z_q for of, _ in cuts], z, [*grad.split(DIM // 2, 1)])[0]
        assert torch.equal(of_z, theirs)
    assert not torch.equal(*(part.code_KD for part in parts))
    for part, group in zip(parts, whole.quantiser.groups, strict=True):
        assert torch.equal(part.code_KD, group.code_KD)


def test_depth_1_of_fsq_vae_is_fsq_and_two_values_a_channel_are_the_signs_of_lfq_vae() -> None:
    one, other = small("fsq", dropout=1.0), small("fsq")
    other.load_state_dict(one.state_dict())
    other.quantiser = FSQ((4, 3, 5, 6)).double()
    require_alike(one, other)
    lfq, x = small("lfq"), data()
    fsq = built("fsq_vae", levels=(2,) * DIM).double()
    fsq.load_state_dict({key: value for key, value in lfq.state_dict().items() if "quantiser" not in key})
    assert torch.equal(fsq.encode_indices(x), lfq.encode_indices(x))
    assert fsq.loss(x)["loss"].item() == pytest.approx(lfq.loss(x)["nll"].item(), rel=1e-12)


def test_one_channel_of_bsq_vae_is_lfq_vae_and_no_weights_leave_the_nll() -> None:
    models = [built(name, latent_dim=1).double() for name in ("lfq_vae", "bsq_vae")]
    models[1].load_state_dict(models[0].state_dict())
    x = data()
    assert models[0].loss(x)["nll"].item() == models[1].loss(x)["nll"].item()
    for name in ("lfq_vae", "bsq_vae", "vq_vae", "rq_vae"):
        weights = {"entropy_weight": 0.0} if name in ("lfq_vae", "bsq_vae") else {}
        terms = built(name, beta=0.0, latent_dim=DIM, **weights).loss(x.float())
        assert terms["loss"].item() == terms["nll"].item() and terms["commitment"].item() > 0


def test_sim_vq_vae_with_a_matrix_of_1_is_vq_vae_until_the_codes_move() -> None:
    one, other = small("sim_vq"), small("vq-gradient", data_init=False, dead_below=0.0)
    nets = {key: value for key, value in one.state_dict().items() if "quantiser" not in key}
    other.load_state_dict({**nets, "quantiser.code_KD": one.quantiser.frozen_KD})
    with torch.no_grad():
        one.quantiser.W_DD.copy_(torch.eye(DIM))
    first, second = trained_losses(one, 2), trained_losses(other, 2)
    assert first[0] == pytest.approx(second[0], rel=1e-12)
    assert first[1]["codebook"] != pytest.approx(second[1]["codebook"], rel=1e-6)


def test_a_code_that_is_used_takes_all_with_it_in_sim_vq_vae_and_none_in_vq_vae() -> None:
    frozen = {}
    for key in ("sim_vq", "vq-gradient"):
        model = small(key, **({} if key == "sim_vq" else {"data_init": False, "dead_below": 0.0}))
        with torch.no_grad():
            model.encoder = Given(model.quantiser.codebook()[2].expand(5, PLACES, -1).movedim(1, 2) + 0.01)
        before = {name: value.clone() for name, value in model.quantiser.state_dict().items()}
        codebook = model.quantiser.codebook().detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model.train().loss(data())["loss"].backward()
        optimizer.step()
        moved = (model.quantiser.codebook() != codebook).any(1)
        assert moved.tolist() == ([True] * 7 if key == "sim_vq" else [i == 2 for i in range(7)])
        frozen[key] = [name for name, value in model.quantiser.state_dict().items() if torch.equal(value, before[name])]
    assert frozen == {"sim_vq": ["frozen_KD"], "vq-gradient": []}


# ---- k-means --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("batch", "decay", "epochs"), [(1437, 0.5, 100), (479, 0.95, 100)])
def test_with_identity_nets_training_reaches_the_inertia_of_k_means(
    rows: Tensor, batch: int, decay: float, epochs: int
) -> None:
    first = rows[torch.randperm(len(rows))[:20]].clone()
    reference = KMeans(20, init=first.numpy(), n_init=1, max_iter=300).fit(rows.numpy()).inertia_
    model = on_data(VQVAE, 64, codebook_size=20, decay=decay, data_init=False, dead_below=0.0)
    model.quantiser.code_KD.copy_(first)
    model.quantiser.sum_KD.copy_(first)
    start = error(model, rows)
    model.train()
    for _ in range(epochs):
        for part in rows[torch.randperm(len(rows))].split(batch):
            model.training_step(part, 0)
    found = error(model, rows)
    assert start > 1.3 * reference
    assert found < 1.01 * reference
    # which is what both terms of the loss count
    terms = model.loss(rows)
    assert terms["commitment"].item() * len(rows) == pytest.approx(found, rel=1e-4)
    constant = 0.5 * 64 * math.log(math.pi)  # of a variance of 1 / 2
    assert (terms["nll"].item() - constant) * len(rows) == pytest.approx(found, rel=1e-3)


def test_the_first_batch_starts_the_codes_once(rows: Tensor) -> None:
    first, second = rows[:700], rows[700:]
    model = on_data(VQVAE, 64, codebook_size=20).train()
    assert not model.started
    model.begin_step((first,), 0)
    assert bool(model.started)
    codes = model.quantiser.code_KD.clone()
    reference = min(KMeans(20, n_init=1, random_state=seed).fit(first.numpy()).inertia_ for seed in range(3))
    assert error(model, first) < 1.03 * reference
    label = torch.cdist(first, codes).argmin(1)
    means = torch.stack([first[label == k].mean(0) for k in range(20)])
    assert (codes - means).norm() < 0.05 * codes.norm()
    loaded = on_data(VQVAE, 64, codebook_size=20)
    loaded.load_state_dict(model.state_dict())
    for started in (model, loaded):
        started.train().begin_step((second,), 0)
        assert torch.equal(started.quantiser.code_KD, codes)
    never = on_data(VQVAE, 64, codebook_size=20, data_init=False).train()
    codes = never.quantiser.code_KD.clone()
    never.begin_step((first,), 0)
    assert torch.equal(never.quantiser.code_KD, codes)


def test_groups_of_channels_start_and_end_as_k_means_of_each(rows: Tensor) -> None:
    """Which gives 20^2 codes where one codebook of as many numbers has 20."""
    model = on_data(VQVAE, 64, codebook_size=20, n_groups=2, decay=0.5, dead_below=0.0).train()
    model.begin_step((rows,), 0)
    reference = sum(
        min(KMeans(20, n_init=1, random_state=seed).fit(half.numpy()).inertia_ for seed in range(3))
        for half in rows.split(32, 1)
    )
    start = error(model, rows)
    assert start < 1.03 * reference
    for _ in range(10):
        model.train().training_step(rows, 0)
    assert error(model, rows) < 1.001 * start
    assert model.index_shape == (2, 1) and model.index_sizes == (20, 20)
    one_book = KMeans(20, n_init=1, random_state=0).fit(rows.numpy()).inertia_
    assert error(model, rows) < 0.9 * one_book


def test_more_levels_leave_less_of_the_data_and_the_first_are_the_same(rows: Tensor) -> None:
    errors, codebooks = [], []
    for levels in (1, 2, 3, 4):
        model = on_data(RQVAE, 64, levels=levels, codebook_size=16).train()
        model.begin_step((rows,), 0)
        errors.append(error(model, rows))
        codebooks.append(model.quantiser.levels[0].code_KD)
        terms = model.loss(rows)
        indices = model.encode_indices(rows)
        if levels == 4:  # a prefix of the levels is a code
            partial = [model.decode_indices(indices.where(torch.arange(4)[:, None] < n, -1)) for n in (1, 2, 3, 4)]
            found = [float((x_hat - rows).double().square().sum()) for x_hat in partial]
            assert found == pytest.approx(errors, rel=1e-5)
            # commitment adds what each level leaves over
            assert terms["commitment"].item() * len(rows) == pytest.approx(sum(errors), rel=1e-4)
    for fewer, more in itertools.pairwise(errors):
        assert more < 0.85 * fewer
    assert all(torch.equal(codebook, codebooks[0]) for codebook in codebooks)
    one_book = KMeans(16, n_init=1, random_state=0).fit(rows.numpy()).inertia_
    assert errors[0] == pytest.approx(one_book, rel=0.03)


# ---- indices --------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("key", LEARNED)
def test_training_goes_on_from_a_checkpoint_as_if_unstopped_and_indices_go_there_and_back(
    key: str, quiet: Any, tmp_path: Any
) -> None:
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
def test_dropout_keeps_first_levels_of_a_share_of_samples_in_training(key: str) -> None:
    name, settings = LEARNED[key]
    model, x, found = spread(built(name, **settings).double()), data(2000), []
    before = copy.deepcopy(model).eval()
    model.quantiser.register_forward_hook(lambda module, inputs, quantised: found.append(quantised.indices))
    model.decoder.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    model.train().loss(x)
    indices, z_q = found
    depth = (indices >= 0).sum(1)
    assert torch.equal(indices >= 0, torch.arange(3)[:, None] < depth[:, None])
    assert torch.equal(depth, depth[:, :1].expand(-1, PLACES))  # of a sample, not of a place
    shares = np.bincount(depth[:, 0].numpy(), minlength=4) / 2000
    np.testing.assert_allclose(shares, [0, 0.7 / 3, 0.7 / 3, 0.3 + 0.7 / 3], atol=5 * 0.5 / 2000**0.5)
    # the levels that are kept are those of evaluation, and their sum is what is decoded
    assert torch.equal(indices, before.encode_indices(x).where(indices >= 0, -1))
    torch.testing.assert_close(z_q, before.codes(indices))


@every
def test_under_autocast_indices_and_terms_are_those_of_float32(key: str) -> None:
    model = small(key).float().eval()
    z = (0.3 * torch.randn(700, DIM, PLACES)).bfloat16()
    x = torch.rand(700, 6)
    model.encoder = Given(z.float())
    exact, terms = model.encode_indices(x), model.loss(x)
    model.encoder = Given(z)
    with torch.autocast("cpu", torch.bfloat16):
        half, half_terms = model.encode_indices(x), model.loss(x)
    assert torch.equal(half, exact)
    for name in terms.keys() - {"nll", "loss"}:
        assert half_terms[name].dtype == torch.float32 and torch.equal(half_terms[name], terms[name]), name
    if key == "vq":  # which is not so where distances are computed in bf16
        near, codes = as_rows(z), model.quantiser.code_KD.bfloat16()
        wrong = (codes.square().sum(1) - 2 * near @ codes.T).argmin(1)
        assert (wrong != as_rows(exact)[:, 0]).any()


# ---- what is used ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "sizes"),
    [("vq", (7,)), ("vq-groups", (7, 7)), ("rq", (5, 5, 5)), ("fsq", (360,)), ("lfq", (16,))],
)
def test_usage_is_that_of_the_whole_set_and_not_the_mean_of_batches(
    key: str, sizes: tuple[int, ...], quiet: Any
) -> None:
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


def test_revival_brings_every_code_into_use_where_clusters_are_balanced(quiet: Any) -> None:
    clusters = torch.rand(48, 6).repeat(16, 1)[torch.randperm(768)]
    loader: Any = DataLoader((clusters + 0.01 * torch.randn(768, 6)).clamp(0, 1), batch_size=192)  # type: ignore[arg-type]
    used = {}
    for dead_below in (0.0, 1.0):
        torch.manual_seed(4)
        settings = {"latent_dim": DIM, "codebook_size": 12, "decay": 0.9, "data_init": False}
        model = built("vq_vae", places=1, dead_below=dead_below, **settings)
        trainer = quiet(max_epochs=20)
        trainer.fit(model, loader, loader)
        trainer.validate(model, loader, verbose=False)
        used[dead_below] = float(trainer.callback_metrics["val/usage"])
    assert used[0.0] < 0.8
    assert used[1.0] == 1.0


# ---- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_like_one_with_every_option() -> None:
    """Of each model's defaults test_models says so."""
    nets = {"latent_dim": 4, "hidden_dims": (8, 8), "codebook_size": 6}
    revived = {"dead_below": 6.0, "decay": 0.5}
    check_ddp(
        *(subject_of(n, **nets, **revived, update=u) for n in ("vq_vae", "rq_vae") for u in ("ema", "gradient")),
        subject_of("vq_vae", **nets, cosine=True),
        subject_of("vq_vae", **nets, **revived, n_groups=2),
        subject_of("rq_vae", **nets, dropout=0.6),
        subject_of("fsq_vae", depth=2, dropout=0.6, hidden_dims=(8, 8)),
        subject_of("lfq_vae", latent_dim=12, hidden_dims=(8, 8), entropy_weight=3.0),
        subject_of("sim_vq_vae", **nets, estimator="rotation"),
    )


# ---- values ---------------------------------------------------------------------------------------------------------


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
def test_values_that_cannot_work_are_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word) as refusal:
        aezoo.create_model(name, input_shape=(1, 8, 8), **settings)
    assert len(str(refusal.value).splitlines()) == 1


# ---- inference of a model in training -------------------------------------------------------------------------------


PRIORS = ("index_transformer", "pixelcnn")


@pytest.mark.parametrize("name", [name for name in aezoo.list_models() if aezoo.model_class(name).discrete_code])
def test_what_is_only_looked_at_teaches_a_book_nothing(name: str) -> None:
    """A Trainer leaves a model in training, in which a quantiser learns from all that it quantises."""
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
def test_what_it_is_trained_on_teaches_it(key: str) -> None:
    model = small(key)
    before = copy.deepcopy(model.quantiser.state_dict())
    model.loss(torch.rand(4, 6).double())
    assert any(not torch.equal(value, model.quantiser.state_dict()[name]) for name, value in before.items())
