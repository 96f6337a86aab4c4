"""Quantisers of vector-quantize-pytorch between copies of our networks.

Source: https://github.com/lucidrains/vector-quantize-pytorch. Its losses are means over rows and channels; ours are
sums over the P positions and D channels of a sample, so that its weights here are P D times ours.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import vector_quantize_pytorch as peer
from comparison import noise, seeded
from torch import Tensor, nn

import aezoo

PACKAGE = "vector-quantize-pytorch"
SHAPE, D, K, P = (1, 8, 8), 4, 7, 16
MEAN = "a sum over the values of a sample's code, where theirs is a mean over all"
Quantise = Callable[[Tensor], tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs casts to float32 before it compares."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def data(n: int = 6) -> Tensor:
    return torch.rand(n, *SHAPE)


def ours(name: str, **settings: Any) -> Any:
    model = aezoo.create_model(name, SHAPE, hidden_dims=(6,), net="resnet", **settings).double().train()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def rows_of(z: Tensor) -> Tensor:
    """(B, D, *places) -> (N, D)."""
    return z.movedim(1, -1).flatten(0, -2)


@torch.no_grad()
def codes_near(z: Tensor, size: int = K) -> Tensor:
    """Codes that are all in use: rows with noise."""
    rows = rows_of(z)
    return rows[torch.randperm(len(rows))[:size]] + 0.3 * rows.std() * torch.randn(size, rows.shape[1])


class Theirs:
    """Copies of our networks with their quantiser between them.

    Args:
        model: ours.
        quantise: their quantiser, from z to codes, indices and a weighted loss.
        x: samples.
    """

    def __init__(self, model: Any, quantise: Quantise, x: Tensor) -> None:
        self.model = copy.deepcopy(model)
        self.z_q, self.indices, *rest = quantise(self.model.encoder(x))
        self.auxiliary = rest[0] if rest else torch.zeros(())
        self.nll = self.model.nll(self.model.decoder(self.z_q), x).mean()
        self.loss = self.nll + self.auxiliary

    def networks(self, model: Any) -> list[tuple[Tensor, Tensor]]:
        """Pairs of parameters of both networks, ours first."""
        return self.encoders(model) + self.decoders(model)

    def encoders(self, model: Any) -> list[tuple[Tensor, Tensor]]:
        return [*zip(model.encoder.parameters(), self.model.encoder.parameters(), strict=True)]

    def decoders(self, model: Any) -> list[tuple[Tensor, Tensor]]:
        return [*zip(model.decoder.parameters(), self.model.decoder.parameters(), strict=True)]


# ---- VQ --------------------------------------------------------------------------------------------------------------


def vq(model: Any, codes: Tensor, **options: Any) -> peer.VectorQuantize:
    """Theirs with our codes, and eps of 0, since the paper does not smooth counts."""
    options = {"threshold_ema_dead_code": 0, "eps": 0.0, "rotation_trick": False, **options}
    made = peer.VectorQuantize(dim=model.latent_dim, codebook_size=model.codebook_size, **options).double().train()
    with torch.no_grad():
        made._codebook.embed.copy_(codes)
        made._codebook.embed_avg.copy_(codes)
    return made


@torch.no_grad()
def set_codes(quantiser: Any, codes: Tensor) -> None:
    quantiser.code_KD.copy_(codes)
    if quantiser.uses_ema:
        quantiser.sum_KD.copy_(codes)


FIXED = {"latent_dim": D, "codebook_size": K, "data_init": False, "dead_below": 0.0}


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("estimator", ["ste", "rotation"])
def test_vq_vae_with_moving_averages(compare, estimator, cosine):
    model, x = ours("vq_vae", estimator=estimator, cosine=cosine, decay=0.9, beta=0.3, **FIXED), data()
    set_codes(model.quantiser, codes_near(model.quantiser.project(model.encoder(x))))
    if cosine:
        set_codes(model.quantiser, nn.functional.normalize(model.quantiser.code_KD, dim=1))
    weight = 0.3 * P * D
    options = {"accept_image_fmap": True, "commitment_weight": weight, "use_cosine_sim": cosine, "decay": 0.9}
    other = vq(model, model.quantiser.code_KD, rotation_trick=estimator == "rotation", **options)
    how = f"{estimator}{', cosine' if cosine else ''}"
    with_peer = compare("vq_vae", PACKAGE, f"VectorQuantize ({how})")
    for step in (1, 2):
        theirs = Theirs(model, other, x)
        found = model.quantise(x)
        model.quantiser.load_state_dict(theirs.model.quantiser.state_dict())
        terms = model.loss(x)
        with_peer.equal(f"indices at step {step}", found.indices[:, 0], theirs.indices)
        with_peer.equal(f"codes at step {step}", found.z_q, theirs.z_q)
        with_peer.equal(f"loss at step {step}", terms["loss"], theirs.loss)
        with_peer.scaled(f"commitment at step {step}", terms["commitment"], theirs.auxiliary / weight, P * D, MEAN)
        with_peer.equal_gradients(terms["loss"], theirs.loss, theirs.networks(model), f"gradient at step {step}")
        quantiser, book = model.quantiser, other._codebook
        with_peer.equal(f"counts after step {step}", quantiser.count_K, book.cluster_size[0])
        with_peer.equal(f"sums after step {step}", quantiser.sum_KD, book.embed_avg[0])
        with_peer.equal(f"codebook after step {step}", quantiser.codebook(), book.embed[0])
    assert len(theirs.indices.unique()) > K // 2


@pytest.mark.parametrize("estimator", ["ste", "rotation"])
def test_vq_vae_with_codes_trained_by_gradient(compare, estimator):
    model, x = ours("vq_vae", update="gradient", estimator=estimator, beta=1.0, **FIXED), data()
    set_codes(model.quantiser, codes_near(model.encoder(x)))
    options = {"learnable_codebook": True, "ema_update": False, "accept_image_fmap": True}
    trick = {"rotation_trick": estimator == "rotation"}
    other = vq(model, model.quantiser.code_KD, commitment_weight=P * D, **options, **trick)
    theirs, terms = Theirs(model, other, x), model.loss(x)
    with_peer = compare("vq_vae", PACKAGE, f"VectorQuantize (learnable, {estimator})")
    with_peer.equal("nll", terms["nll"], theirs.nll)
    for term in ("codebook", "commitment"):
        with_peer.scaled(term, terms[term], theirs.auxiliary / (P * D), P * D, MEAN)
    pairs = [*theirs.networks(model), (model.quantiser.code_KD, other._codebook.embed)]
    with_peer.equal_gradients(terms["loss"], theirs.loss, pairs, "gradient (beta 1)")
    why = "they weight one squared distance, live in z and codes, so that beta slows the codes too"
    weaker = 0.25 * terms["commitment"] + terms["codebook"]
    of_codes = torch.autograd.grad(weaker, model.quantiser.code_KD)[0]
    with_peer.deviates(
        "gradient of the codes (beta 0.25)",
        of_codes,
        torch.autograd.grad(0.25 * theirs.auxiliary, other._codebook.embed)[0][0],
        why,
        follows="ours",
    )


def test_vq_vae_by_diveq(compare):
    sigma = 0.1
    model, x = ours("vq_vae", update="gradient", estimator="diveq", beta=0.0, **FIXED), data()
    model.quantiser.sigma = sigma
    set_codes(model.quantiser, codes_near(model.encoder(x)))
    options = {"directional_reparam": True, "directional_reparam_variance": sigma**2, "threshold_ema_dead_code": 1e-9}
    other = vq(model, model.quantiser.code_KD, accept_image_fmap=True, **options)
    draw = torch.randn(len(x), P, D)
    with noise([draw]):
        theirs = Theirs(model, other, x)
    with noise([draw]):
        terms = model.loss(x)
    with noise([draw]):
        found = model.quantise(x)
    with_peer = compare("vq_vae", PACKAGE, "VectorQuantize (diveq)")
    with_peer.equal("indices", found.indices[:, 0], theirs.indices)
    with_peer.equal("codes", found.z_q, theirs.z_q)
    with_peer.equal("loss", terms["loss"], theirs.loss)
    pairs = [*theirs.networks(model), (model.quantiser.code_KD, other._codebook.embed)]
    with_peer.equal_gradients(terms["loss"], theirs.loss, pairs)


def test_vq_vae_in_groups(compare):
    model, x = ours("vq_vae", n_groups=2, beta=0.3, decay=0.9, **FIXED), data()
    parts = model.encoder(x).chunk(2, 1)
    codes = [codes_near(part) for part in parts]
    for group, code in zip(model.quantiser.groups, codes, strict=True):
        set_codes(group, code)
    options = {"heads": 2, "separate_codebook_per_head": True, "codebook_dim": D // 2, "decay": 0.9}
    other = vq(model, torch.stack(codes), accept_image_fmap=True, commitment_weight=0.3 * P * D, **options)
    before = copy.deepcopy(model.quantiser.state_dict())
    theirs, found = Theirs(model, other, x), model.quantise(x)
    model.quantiser.load_state_dict(before)
    terms = model.loss(x)
    with_peer = compare("vq_vae", PACKAGE, "VectorQuantize (heads)")
    with_peer.equal("indices", found.indices.movedim(1, -1), theirs.indices)
    with_peer.equal("codes", found.z_q, theirs.z_q)
    with_peer.equal("loss", terms["loss"], theirs.loss)
    with_peer.scaled("commitment", terms["commitment"], theirs.auxiliary / (0.3 * P * D), P * D, MEAN)
    with_peer.equal_gradients(terms["loss"], theirs.loss, theirs.networks(model))
    with_peer.equal("codebooks", torch.stack([g.codebook() for g in model.quantiser.groups]), other._codebook.embed)


@pytest.mark.parametrize("estimator", ["ste", "rotation"])
def test_vq_vae_2(compare, estimator):
    settings = {"top_dims": (6,), "estimator": estimator, "beta": 0.3, "decay": 0.9, **FIXED}
    model, x = ours("vq_vae_2", **settings), data()
    h = model.encoder(x)
    set_codes(model.top, codes_near(model.top_encoder(h)))
    set_codes(model.bottom, codes_near(model.bottom_input(h, model.top.eval().quantise(model.top_encoder(h)))))
    model.top.train()
    before, copied = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    places = {"top": math.prod(model.places[:1]), "bottom": model.places[1]}
    books = {
        level: vq(
            model,
            getattr(model, level).code_KD,
            accept_image_fmap=True,
            decay=0.9,
            commitment_weight=0.3 * places[level] * D,
            rotation_trick=estimator == "rotation",
        )
        for level in places
    }
    h = copied.encoder(x)
    top, top_index, top_loss = books["top"](copied.top_encoder(h))
    joined = copied.to_bottom(torch.cat([h, copied.top_decoder(top)], 1))
    bottom, bottom_index, bottom_loss = books["bottom"](joined)
    z_q = torch.cat([top.flatten(2), bottom.flatten(2)], 2)
    nll = model.nll(copied.decoder(z_q), x).mean()
    found = model.quantise(x)
    model.load_state_dict(before)
    terms = model.loss(x)
    with_peer = compare("vq_vae_2", PACKAGE, f"VectorQuantize ({estimator})")
    with_peer.equal("indices", found.indices[:, 0], torch.cat([top_index.flatten(1), bottom_index.flatten(1)], 1))
    with_peer.equal("codes", found.z_q, z_q)
    with_peer.equal("nll", terms["nll"], nll)
    with_peer.equal("commitment", 0.3 * terms["commitment"], top_loss + bottom_loss)
    theirs = nll + top_loss + bottom_loss
    with_peer.equal("loss", terms["loss"], theirs)
    with_peer.equal_gradients(terms["loss"], theirs, zip(model.parameters(), copied.parameters(), strict=True))
    for level, book in books.items():
        with_peer.equal(f"{level} codebook after a step", getattr(model, level).code_KD, book.codebook)


def test_titok(compare):
    settings = {"n_tokens": 5, "patch_size": 4, "width": 8, "beta": 0.3, "decay": 0.9, **FIXED}
    model = aezoo.create_model("titok", SHAPE, **settings).double().train()
    x = data()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    unit = nn.functional.normalize(codes_near(model.quantiser.project(rows_of(model.encoder(x)))), dim=1)
    set_codes(model.quantiser, unit)
    weight = 0.3 * 5 * D
    other = vq(model, unit, channel_last=False, commitment_weight=weight, use_cosine_sim=True, decay=0.9)
    before = copy.deepcopy(model.quantiser.state_dict())
    theirs, found = Theirs(model, other, x), model.quantise(x)
    model.quantiser.load_state_dict(before)
    terms = model.loss(x)
    with_peer = compare("titok", PACKAGE, "VectorQuantize (cosine)")
    with_peer.equal("indices", found.indices[:, 0], theirs.indices)
    with_peer.equal("codes", found.z_q, theirs.z_q)
    with_peer.equal("loss", terms["loss"], theirs.loss)
    with_peer.scaled("commitment", terms["commitment"], theirs.auxiliary / weight, 5 * D, MEAN)
    with_peer.equal_gradients(terms["loss"], theirs.loss, theirs.networks(model))
    with_peer.equal("codebook after a step", model.quantiser.codebook(), other.codebook)


def test_rq_vae(compare):
    model, x = ours("rq_vae", levels=3, beta=0.3, decay=0.9, **FIXED), data()
    left = model.encoder(x)
    books = []
    for level in model.quantiser.levels:
        set_codes(level, codes_near(left))
        books.append(level.code_KD.clone())
        left = left - level.eval().quantise(left).z_q.detach()
    model.train()
    weight = 0.3 * P * D
    options = {"eps": 0.0, "threshold_ema_dead_code": 0, "rotation_trick": False, "decay": 0.9}
    other = peer.ResidualVQ(dim=D, num_quantizers=3, codebook_size=K, commitment_weight=weight, **options)
    other = other.double().train()
    for layer, book in zip(other.layers, books, strict=True):
        layer._codebook.embed.copy_(book)
        layer._codebook.embed_avg.copy_(book)
    before = copy.deepcopy(model.quantiser.state_dict())

    def quantise(z: Tensor) -> tuple[Tensor, ...]:
        z_q, indices, losses = other(z.flatten(2).movedim(1, 2))
        return z_q.movedim(2, 1).unflatten(2, z.shape[2:]), indices, losses.sum()

    theirs, found = Theirs(model, quantise, x), model.quantise(x)
    model.quantiser.load_state_dict(before)
    terms = model.loss(x)
    with_peer = compare("rq_vae", PACKAGE, "ResidualVQ")
    with_peer.equal("indices", found.indices.flatten(2).movedim(1, 2), theirs.indices)
    with_peer.equal("codes", found.z_q, theirs.z_q)
    with_peer.equal("loss", terms["loss"], theirs.loss)
    with_peer.scaled("commitment", terms["commitment"], theirs.auxiliary / weight, P * D, MEAN)
    with_peer.equal_gradients(terms["loss"], theirs.loss, theirs.decoders(model), "gradient of the decoder")
    with_peer.equal_gradients(
        0.3 * terms["commitment"], theirs.auxiliary, theirs.encoders(model), "commitment's gradient of the encoder"
    )
    once = "one straight-through estimator for the sum, where theirs passes the gradient of z_q to z once a level"
    with_peer.equal_gradients(
        terms["nll"], theirs.nll, theirs.encoders(model), "nll's gradient of the encoder", 1 / 3, once
    )
    ends = [level.codebook() for level in model.quantiser.levels]
    with_peer.equal("codebooks after a step", torch.stack(ends), other.codebooks)


# ---- codebooks of one map --------------------------------------------------------------------------------------------


class Product(nn.Module):
    """Their code_transform with our matrix, which multiplies from the right."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.detach().clone())

    def forward(self, codes: Tensor) -> Tensor:
        return codes @ self.matrix


@pytest.mark.parametrize("estimator", ["ste", "rotation"])
def test_sim_vq_vae(compare, estimator):
    model, x = ours("sim_vq_vae", latent_dim=D, codebook_size=K, estimator=estimator, beta=0.3), data()
    model.quantiser.frozen_KD.copy_(codes_near(model.encoder(x)) @ torch.linalg.inv(model.quantiser.W_DD.detach()))
    other = peer.SimVQ(
        D,
        K,
        codebook_transform=Product(model.quantiser.W_DD),
        channel_first=True,
        rotation_trick=estimator == "rotation",
        input_to_quantize_commit_loss_weight=0.3,
        commitment_weight=P * D,
    ).double()
    other.frozen_codebook.copy_(model.quantiser.frozen_KD)
    theirs, found, terms = Theirs(model, other, x), model.quantise(x), model.loss(x)
    with_peer = compare("sim_vq_vae", PACKAGE, f"SimVQ ({estimator})")
    with_peer.equal("indices", found.indices[:, 0], theirs.indices)
    with_peer.equal("codes", found.z_q, theirs.z_q)
    with_peer.equal("codebook", model.quantiser.codebook(), other.codebook)
    with_peer.equal("loss", terms["loss"], theirs.loss)
    weighted = terms["codebook"] + 0.3 * terms["commitment"]
    with_peer.scaled("codebook + beta commitment", weighted, theirs.auxiliary / (P * D), P * D, MEAN)
    pairs = [*theirs.networks(model), (model.quantiser.W_DD, other.code_transform.matrix)]
    with_peer.equal_gradients(terms["loss"], theirs.loss, pairs)


@pytest.mark.parametrize("estimator", ["ste", "rotation"])
def test_fvq_vae(compare, estimator):
    settings = {"latent_dim": D, "codebook_size": K, "group_size": 2, "width": 8, "depth": 1}
    model, x = ours("fvq_vae", estimator=estimator, beta=1.0, **settings), data()
    bridge = copy.deepcopy(model.quantiser.bridge)
    other = vq(
        model,
        model.quantiser.raw_KD,
        vq_bridge=bridge,
        accept_image_fmap=True,
        rotation_trick=estimator == "rotation",
        commitment_weight=P * D,
    )
    theirs, found, terms = Theirs(model, other, x), model.quantise(x), model.loss(x)
    with_peer = compare("fvq_vae", PACKAGE, f"VectorQuantize (vq_bridge, {estimator})")
    with_peer.equal("indices", found.indices[:, 0], theirs.indices)
    with_peer.equal("codes", found.z_q, theirs.z_q)
    with_peer.equal("nll", terms["nll"], theirs.nll)
    for term in ("codebook", "commitment"):
        with_peer.scaled(term, terms[term], theirs.auxiliary / (P * D), P * D, MEAN)
    pairs = [*theirs.networks(model), (model.quantiser.raw_KD, other._codebook.embed)]
    pairs += zip(model.quantiser.bridge.parameters(), bridge.parameters(), strict=True)
    with_peer.equal_gradients(terms["loss"], theirs.loss, pairs, "gradient (beta 1)")


# ---- scalars ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def spread(model: Any) -> None:
    """Give the encoder's output a standard deviation of 1."""
    last = [p for p in model.encoder.parameters() if p.ndim > 1][-1]
    last /= model.encoder(data()).std(dim=(0, 2, 3)).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("levels", [(5, 5, 7), (3, 9, 5, 7), (8, 5, 6)])
def test_fsq_vae(compare, levels):
    model, x = ours("fsq_vae", levels=levels), data(30)
    spread(model)
    # without values that another factor of the bound would round differently
    bounded = model.quantiser.bound(rows_of(model.encoder(x)))
    x = x[((bounded - bounded.round()).abs() < 0.495).unflatten(0, (len(x), P)).flatten(1).all(1)]
    assert len(x) > 5
    theirs, found = Theirs(model, peer.FSQ([*levels]).double(), x), model.quantise(x)
    terms = model.loss(x)
    with_peer = compare("fsq_vae", PACKAGE, f"FSQ{levels}")
    with_peer.equal("indices", found.indices[:, 0], theirs.indices)
    with_peer.equal("codes", found.z_q, theirs.z_q)
    with_peer.equal("loss", terms["loss"], theirs.loss)
    with_peer.equal_gradients(terms["loss"], theirs.loss, theirs.decoders(model), "gradient of the decoder")
    bound = "the paper's bound is (L - 1)(1 - eps) / 2, and theirs (L - 1)(1 + eps) / 2, with eps = 1e-3"
    if all(level % 2 for level in levels):
        how = "gradient of the encoder", 0.999 / 1.001, bound
        with_peer.equal_gradients(terms["loss"], theirs.loss, theirs.encoders(model), *how)
    else:
        ((weight, copied),) = [pair for pair in theirs.encoders(model) if pair[0].ndim > 1][-1:]
        with_peer.deviates(
            "gradient of the encoder's last layer",
            torch.autograd.grad(terms["loss"], weight)[0],
            torch.autograd.grad(theirs.loss, copied)[0],
            f"{bound}, and even levels are shifted by tan(o / half) in the paper and by atanh in theirs",
            follows="ours",
        )


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("squash", ["tanh", "sigmoid", "normal"])
def test_fsp_vae(compare, squash, rate):
    model, x = ours("fsp_vae", levels=(5, 4, 3), squash=squash, quantised=rate), data()
    model.mean_weight = model.variance_weight = 0.0
    options = {"channel_first": True, "act_name": squash, "quantize_rate": rate}
    with seeded():
        theirs = Theirs(model, lambda z: peer.FSP([5, 4, 3], vector_norm="none", **options).double()(z)[:2], x)
    with seeded():
        found = model.quantise(x)
    with seeded():
        terms = model.loss(x)
    with_peer = compare("fsp_vae", PACKAGE, f"FSP ({squash}, quantised {rate})")
    with_peer.equal("indices", found.indices[:, 0], theirs.indices)
    with_peer.equal("codes", found.z_q, theirs.z_q)
    with_peer.equal("loss without regularisers", terms["loss"], theirs.loss)
    with_peer.equal_gradients(terms["loss"], theirs.loss, theirs.networks(model))
    z = model.encoder(x)
    _, _, _, info = peer.FSP([5, 4, 3], **options).double()(z)
    mean, variance = info["norm_info"]["mean"], info["norm_info"]["variance"]
    n = len(x) * P
    with_peer.scaled("code_mean", terms["code_mean"], mean.square().sum(), P, "summed over places")
    target = {"tanh": math.pi**2 / 12, "sigmoid": math.pi**2 / 3, "normal": 1.0}[squash]
    own = rows_of(z).var(0, unbiased=False)
    with_peer.scaled("variance of the code", own, variance, (n - 1) / n, "divided by n, where theirs is by n - 1")
    with_peer.equal("code_variance", terms["code_variance"], P * (variance * (n - 1) / n - target).square().sum())


@pytest.mark.parametrize("size", [3, 5])
def test_qlae(compare, size):
    model, x = ours("qlae", latent_dim=D, n_values=size, beta=2.0), data()
    weights = {"commitment_loss_weight": 0.0, "quantization_loss_weight": 2.0 * D}
    other = peer.LatentQuantize([size] * D, D, **weights).double().train()
    with torch.no_grad():
        model.quantiser.value_DK.copy_(torch.stack([*other.values_per_latent]))
    theirs, found, terms = Theirs(model, other, x), model.quantise(x), model.loss(x)
    with_peer = compare("qlae", PACKAGE, f"LatentQuantize ({size} values)")
    packed = (found.indices * size ** torch.arange(D)).sum(1)
    with_peer.equal("indices", packed, theirs.indices)
    with_peer.equal("codes", found.z_q, theirs.z_q)
    with_peer.equal("nll", terms["nll"], theirs.nll)
    for term in ("codebook", "commitment"):
        with_peer.scaled(term, terms[term], theirs.auxiliary / (2 * D), D, MEAN)
    loss = terms["nll"] + 2 * terms["commitment"]
    with_peer.equal("loss without codebook", loss, theirs.loss)
    with_peer.equal_gradients(loss, theirs.loss, theirs.networks(model), "gradient without codebook")
    both = peer.LatentQuantize([size] * D, D, 1.0 * D, 2.0 * D).double().train()
    z = model.encoder(x).detach().requires_grad_()
    own = model.quantiser(z).terms
    ours_of_z = torch.autograd.grad(own["codebook"] + 2 * own["commitment"], z)
    theirs_of_z = torch.autograd.grad(both(z)[2], z)
    why = "their term for the values passes through the straight-through estimator to z, and reaches no value"
    with_peer.deviates("gradient of z with codebook", ours_of_z[0], theirs_of_z[0], why, follows="ours")


# ---- signs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lfq_vae", "bsq_vae"])
def test_lookup_free_models(compare, name):
    """At a temperature at which no probability is below 1e-5, where they clamp logarithms."""
    temperature, w, gamma, beta = (4.0, 0.4, 0.8, 0.3)
    settings = {"temperature": temperature, "entropy_weight": w, "gamma": gamma, "beta": beta}
    model, x = ours(name, latent_dim=D, **settings), data()
    other = peer.LFQ(
        dim=D,
        entropy_loss_weight=w * P,
        commitment_loss_weight=beta * P * D,
        diversity_gamma=gamma,
        spherical=name == "bsq_vae",
        force_quantization_f32=False,
    )
    other = other.double().train()
    broken = {}

    def quantise(z: Tensor) -> tuple[Tensor, ...]:
        found, parts = other(z, inv_temperature=1 / temperature, return_loss_breakdown=True)
        broken.update(parts._asdict())
        return tuple(found)

    theirs, found, terms = Theirs(model, quantise, x), model.quantise(x), model.loss(x)
    with_peer = compare(name, PACKAGE, f"LFQ{' (spherical)' if name == 'bsq_vae' else ''}")
    # their first channel is the highest bit
    flipped = sum(((theirs.indices >> i) & 1) << (D - 1 - i) for i in range(D))
    with_peer.equal("indices", found.indices[:, 0], flipped)
    with_peer.equal("codes", found.z_q, theirs.z_q)
    with_peer.equal("codes of indices", model.codes(found.indices), other.indices_to_codes(theirs.indices))
    places = "summed over places"
    with_peer.scaled("entropy", terms["entropy"], broken["per_sample_entropy"], P, places)
    with_peer.scaled("diversity", terms["diversity"], broken["batch_entropy"], P, places)
    with_peer.scaled("commitment", terms["commitment"], broken["commitment"], P * D, MEAN)
    with_peer.equal("loss", terms["loss"], theirs.loss)
    with_peer.equal_gradients(terms["loss"], theirs.loss, theirs.networks(model))
