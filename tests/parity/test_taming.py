"""Losses of taming-transformers around copies of our networks (Esser et al. 2020).

Source: https://github.com/CompVis/taming-transformers; taming.models needs a Lightning version of 2021. Its loss is a
mean over the X values of a sample, and its codebook loss a mean over the P D values of a code, where ours are sums.
"""

import copy
import math
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2
from taming_loss import their_loss
from torch import Tensor, nn

import aezoo

# removed in transformers 5, and only used by samplers
with mock.patch.object(transformers, "top_k_top_p_filtering", None, create=True):
    from taming.modules.transformer.mingpt import GPT

PACKAGE = "taming-transformers-rom1504"
SHAPE, X, D, K, P = (3, 8, 8), 192, 4, 7, 16


def data() -> Tensor:
    return torch.rand(6, *SHAPE)


def made(name: str, **settings: Any) -> Any:
    """A model with random offsets added to its initial weights."""
    fixed = {"hidden_dims": (6,), "net": "resnet", "latent_dim": D, "codebook_size": K}
    model = aezoo.create_model(name, SHAPE, **fixed, **settings).double().train()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def ours(name: str, **settings: Any) -> Any:
    """A model whose codes are trained by gradient and all in use."""
    model = made(name, data_init=False, dead_below=0.0, update="gradient", **settings)
    with torch.no_grad():
        rows = model.encoder(data()).movedim(1, -1).flatten(0, -2)
        model.quantiser.code_KD.copy_(rows[:K] + 0.3 * rows.std() * torch.randn(K, D))
    return model


def their_quantiser(model: Any, beta: float, legacy: bool = False) -> VectorQuantizer2:
    quantiser = VectorQuantizer2(K, D, beta, legacy=legacy)
    quantiser.embedding.weight.data.copy_(model.quantiser.code_KD)
    return quantiser


def pairs_of(model: Any, other: Any, quantiser: VectorQuantizer2) -> list[tuple[Tensor, Tensor]]:
    pairs = [(model.quantiser.code_KD, quantiser.embedding.weight)]
    for part in ("encoder", "decoder"):
        pairs += zip(getattr(model, part).parameters(), getattr(other, part).parameters(), strict=True)
    return pairs


def test_vq_vae_with_codes_trained_by_gradient(compare):
    model, x = ours("vq_vae", beta=0.25), data()
    other, quantiser = copy.deepcopy(model), their_quantiser(model, 0.25)
    z_q, auxiliary, (_, _, indices) = quantiser(other.encoder(x))
    nll = model.nll(other.decoder(z_q), x).mean()
    found, terms = model.quantise(x), model.loss(x)
    with_taming = compare("vq_vae", PACKAGE, "VectorQuantizer2")
    with_taming.equal("indices", found.indices.flatten(), indices.flatten())
    with_taming.equal("codes", found.z_q, z_q)
    with_taming.equal("nll", terms["nll"], nll)
    why = "a sum over the values of a sample's code, where theirs is a mean over all"
    weighted = terms["codebook"] + 0.25 * terms["commitment"]
    with_taming.scaled("codebook + beta commitment", weighted, auxiliary, P * D, why)
    with_taming.equal_gradients(terms["loss"], nll + P * D * auxiliary, pairs_of(model, other, quantiser))
    _, auxiliary, _ = their_quantiser(model, 0.25, legacy=True)(other.encoder(x))
    swapped = "by default their beta weights the codebook loss, and in the paper's equation 3 the commitment loss"
    firsts = [next(iter(m.encoder.parameters())) for m in (model, other)]
    losses = weighted, P * D * auxiliary
    of_z = [torch.autograd.grad(loss, p)[0] for loss, p in zip(losses, firsts, strict=True)]
    with_taming.deviates("gradient of the encoder's first layer (legacy)", *of_z, swapped, follows="ours")


@pytest.mark.parametrize("weak", [False, True])
@pytest.mark.parametrize("started", [True, False])
def test_vqgan(compare, started, weak):
    start = 0 if started else 5
    weights = {"beta": 0.25, "perceptual_weight": 0.7, "discriminator_weight": 0.6, "discriminator_dims": (6, 8)}
    model, x = ours("vqgan", discriminator_start=start, **weights), data()
    with torch.no_grad():
        model.discriminator[-1].bias.fill_(1)  # the hinge of some samples has zero slope
        model.discriminator[-1].weight.mul_(1e-4 if weak else 1)
    other, quantiser = copy.deepcopy(model), their_quantiser(model, 0.25)
    loss = their_loss(model.distance, other.discriminator, disc_start=start, codebook_weight=P * D / X)
    z_q, codebook_loss, _ = quantiser(other.encoder(x))
    x_hat = other.decoder(z_q)
    last = [p for p in other.decoder.parameters() if p.ndim > 1][-1]
    of_autoencoder, log = loss(codebook_loss, x, x_hat, 0, 0, last_layer=last)
    of_discriminator, judged = loss(codebook_loss, x, x_hat, 1, 0)
    terms = model.loss(x)
    state = f"{'weak discriminator' if weak else 'discriminator'}{'' if started else ' before its start'}"
    with_taming = compare("vqgan", PACKAGE, f"VQLPIPSWithDiscriminator ({state})")
    total = "a sum over the X values of a sample, where theirs is a mean"
    R = terms["nll"] + 0.7 * terms["perceptual"] - X * math.log(2)
    with_taming.scaled(
        "nll + perceptual (ours in place of LPIPS), without log 2 of the density", R, log["train/nll_loss"], X, total
    )
    with_taming.scaled(
        "codebook + beta commitment", terms["codebook"] + 0.25 * terms["commitment"], codebook_loss, P * D, total
    )
    with_taming.equal("adversarial", terms["adversarial"], log["train/g_loss"])
    assert (terms["adaptive_weight"] > 1e4) == weak
    weight = 0.6 * terms["adaptive_weight"]
    with_taming.scaled("adaptive weight", weight, log["train/d_weight"], X, f"of {total}")
    pairs = pairs_of(model, other, quantiser)
    with_taming.equal_gradients(terms["loss"], of_autoencoder, pairs, "gradient of the autoencoder", X, total)
    if started:
        with_taming.equal("discriminator", terms["discriminator"], judged["train/disc_loss"])
        judges = zip(model.discriminator.parameters(), other.discriminator.parameters(), strict=True)
        with_taming.equal_gradients(terms["loss"], of_discriminator, judges, "gradient of the discriminator")
    else:
        assert of_discriminator == 0 and not any(
            g.any() for g in torch.autograd.grad(terms["loss"], [*model.discriminator.parameters()])
        )


def gumbel_draws(draw: Tensor) -> Any:
    """Exponential variables in our layout, (B, P, K), or theirs, (B, K, H, W)."""

    def fill(out: Tensor) -> Tensor:
        return out.copy_(draw if out.ndim == 3 else draw.movedim(2, 1).reshape(out.shape))

    return mock.patch.object(torch.Tensor, "exponential_", fill)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", ["gumbel_vq_vae", "dvae"])
def test_gumbel_vq_vae(compare, name, hard, training):
    settings = {"kl_steps": 0} if name == "dvae" else {}
    model, x = made(name, beta=0.4, hard=hard, **settings).train(training), data()
    model.quantiser.temperature.fill_(0.7)
    other = copy.deepcopy(model)
    quantiser = GumbelQuantize(K, D, K, straight_through=hard, kl_weight=0.4 * P, temp_init=0.7).train(training)
    quantiser.proj = nn.Identity()
    quantiser.embed.weight.data.copy_(model.quantiser.code_KC)
    with gumbel_draws(torch.empty(len(x), P, K).exponential_()):
        z_q, weighted_kl, (_, _, indices) = quantiser(other.encoder(x))
        found, terms = model.draw(x), model.loss(x)
    nll = model.nll(other.decoder(z_q), x).mean()
    how = f"{'hard' if hard else 'relaxed'} in training" if training else "in evaluation"
    with_taming = compare(name, PACKAGE, f"GumbelQuantize ({how})")
    with_taming.equal("indices", found.indices[:, 0], indices)
    with_taming.equal("codes", found.z_q, z_q)
    with_taming.equal("nll", terms["nll"], nll)
    with_taming.scaled("kl", terms["kl"], weighted_kl / (0.4 * P), P, "summed over places, where theirs is a mean")
    with_taming.equal("loss", terms["loss"], nll + weighted_kl)
    pairs = [(model.quantiser.code_KC, quantiser.embed.weight)]
    for part in ("encoder", "decoder"):
        pairs += zip(getattr(model, part).parameters(), getattr(other, part).parameters(), strict=True)
    if training:
        with_taming.equal_gradients(terms["loss"], nll + weighted_kl, pairs)


def test_index_transformer(compare):
    """Their GPT with tied input and output embeddings, as in GPT-2, and without bias of queries, keys and values."""
    width, depth = 32, 2
    tokenizer = {"model": "vq_vae", "latent_dim": D, "codebook_size": K, "hidden_dims": (6,)}
    settings = {"tokenizer": tokenizer, "width": width, "depth": depth, "dropout": 0.0}
    model = aezoo.create_model("index_transformer", SHAPE, **settings).double().train()
    gpt = GPT(K, P, n_layer=depth, n_head=width // 16, n_embd=width).double().train()
    gpt.head.weight = gpt.tok_emb.weight
    start = nn.Parameter(torch.empty(width))
    *blocks, norm = list(model.blocks)[1:]
    modules, joined = [(norm, gpt.ln_f)], []
    for block, other in zip(blocks, gpt.blocks, strict=True):
        modules += [(block.norm, other.ln1), (block.out, other.attn.proj), (block.mlp[0], other.ln2)]
        modules += [(block.mlp[1], other.mlp[0]), (block.mlp[3], other.mlp[2])]
        joined.append((block.qkv.weight, [other.attn.query, other.attn.key, other.attn.value]))
    pairs = [(model.book_QKW, gpt.tok_emb.weight), (model.start_W, start), (model.position_TW, gpt.pos_emb)]
    for a, b in modules:
        pairs += zip(a.parameters(), b.parameters(), strict=True)
    with torch.no_grad():
        for a, b in pairs:
            a += 0.2 * torch.randn_like(a)
            b.copy_(a.reshape(b.shape))
        for weight, parts in joined:
            for rows, part in zip(weight.chunk(3), parts, strict=True):
                part.weight.copy_(rows)
                part.bias.zero_()
    tokens = torch.randint(K, (6, P))
    logits, mean = gpt(tokens[:, :-1], embeddings=start.expand(6, 1, -1), targets=tokens)
    nll = -model.log_prob(model.from_tokens(tokens)).mean()
    with_taming = compare("index_transformer", PACKAGE, "GPT (tied, without biases of q, k and v)")
    total = "summed over the indices of a sample, where theirs is a mean"
    with_taming.equal("logits", model.logits(tokens), logits)
    with_taming.scaled("nll of indices", nll, mean, P, total)
    with_taming.equal_gradients(nll, mean, pairs, "gradient", P, total)
    for i, (weight, parts) in enumerate(joined, 1):
        theirs = torch.autograd.grad(mean, [part.weight for part in parts], retain_graph=True)
        (own,) = torch.autograd.grad(nll, weight, retain_graph=True)
        with_taming.scaled(f"gradient of q, k and v of block {i}", own, torch.cat(theirs), P, total)
