"""Sparse coders of EleutherAI's sparsify with our weights (Belrose et al. 2024).

Source: https://github.com/EleutherAI/sparsify
"""

import warnings
from typing import Any

import pytest
import torch
from sae_models import DEAD, N, X, build, data, dead_mask, with_dead, without_constant
from torch import Tensor

with warnings.catch_warnings():  # warnings of packages that it imports
    warnings.simplefilter("ignore")
    from sparsify import SparseCoder, SparseCoderConfig

PACKAGE = "eai-sparsify"
VARIANCE = "sparsify divides by the summed variance of the data; ours is in nats per sample"
LOST = "the fused backward of sparsify 1.3 drops the gradient of pre-activations: AuxK and Multi-TopK train no encoder"
Pairs = dict[str, tuple[Tensor, Tensor]]


def theirs(model: Any, **settings: Any) -> tuple[SparseCoder, Pairs]:
    """Their coder with our weights, and the pairs of parameters."""
    other = SparseCoder(X, SparseCoderConfig(num_latents=N, **settings), dtype=torch.float64)
    pairs = {
        "W_enc": (model.encoder.weight, other.encoder.weight), "b_enc": (model.encoder.bias, other.encoder.bias),
        "W_dec": (model.decoder.W_NX, other.W_dec), "b_dec": (model.decoder.b_X, other.b_dec),
    }  # fmt: skip
    for a, b in pairs.values():
        b.data.copy_(a.detach())
    return other, pairs


def scale_of(y: Tensor) -> float:
    """The factor between their fractions and our sums."""
    return (y - y.mean(0)).square().sum(1).mean().item()


def gradient_of_encoder(loss: Tensor, pairs: Pairs, side: int) -> tuple[Tensor, ...]:
    parameters = [pairs[name][side] for name in ("W_enc", "b_enc")]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return tuple(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))


@pytest.mark.parametrize("dead", [DEAD, DEAD[:2]], ids=len)
def test_topk_sae_equals_sparse_coder(compare, dead):
    model, x = with_dead("topk_sae", dead, k=2, k_aux=X // 2, multi_weight=0.125), data()
    other, pairs = theirs(model, k=2, multi_topk=True)
    found, expected, scale = model.loss(x), other(x, dead_mask=dead_mask(dead)), scale_of(x)
    comparison = compare("topk_sae", PACKAGE, f"SparseCoder, {len(dead)} dead latents, k_aux {X // 2}")
    for name, ours, of_theirs in (
        ("nll", without_constant(found["nll"]), expected.fvu),
        ("aux", found["aux"], expected.auxk_loss),
        ("multi", without_constant(found["multi"]), expected.multi_topk_fvu),
    ):
        comparison.scaled(name, ours, of_theirs, scale, VARIANCE)
    loss = without_constant(found["loss"], X * 1.125)
    # the weights of their trainer, with alpha of the paper
    total = expected.fvu + expected.auxk_loss / 32 + expected.multi_topk_fvu / 8
    comparison.scaled("loss", loss, total, scale, VARIANCE)
    values, index, _ = other.encode(x)
    comparison.equal("code", model.encode(x), torch.zeros(len(x), N).scatter(1, index, values))
    comparison.equal("reconstruction", model(x), other.decode(values, index))
    of_nll = found["nll"], expected.fvu
    comparison.equal_gradients(*of_nll, pairs.values(), "gradient of nll", scale, VARIANCE)
    decoder = [pairs["W_dec"]]
    comparison.equal_gradients(found["loss"], total, decoder, "gradient by the dictionary", scale, VARIANCE)
    for term, of_theirs in (("aux", expected.auxk_loss), ("multi", expected.multi_topk_fvu)):
        assert not any(g.any() for g in gradient_of_encoder(of_theirs, pairs, 1))
        both = found["nll"] + found[term], scale * (expected.fvu + of_theirs)
        ours, lost = (gradient_of_encoder(loss, pairs, i) for i, loss in enumerate(both))
        comparison.deviates(f"gradient of nll + {term} by the encoder", ours[0], lost[0], LOST, follows="ours")


def test_directions_follow_sparse_coder(compare):
    model, x = build("topk_sae", k=3), data()
    other, pairs = theirs(model, k=3)
    found, expected = model.loss(x)["nll"], other(x).fvu * scale_of(x)
    found.backward(), expected.backward()
    model.on_before_optimizer_step(None)
    other.remove_gradient_parallel_to_decoder_directions()
    comparison = compare("topk_sae", PACKAGE, "SparseCoder.remove_gradient_parallel_to_decoder_directions")
    ours, of_theirs = pairs["W_dec"]
    comparison.equal("projected gradient by W_dec", ours.grad, of_theirs.grad)
    with torch.no_grad():
        ours *= 1.7
        of_theirs *= 1.7
    model.after_optimizer_step()
    other.set_decoder_norm_to_unit_norm()
    comparison.equal("normalised directions", ours, of_theirs)


@pytest.mark.parametrize("positive", [True, False])
def test_transcoder_equals_sparse_coder_of_all_latents(compare, positive):
    model, x = build("transcoder", (2, X), targets=(1,), l1=0.0), data(7, (2, X))
    with torch.no_grad():
        model.encoder.bias += 8 if positive else 0
    other, pairs = theirs(model, k=N, transcode=True)
    found, expected, scale = model.loss(x), other(x[:, 0], x[:, 1]), scale_of(x[:, 1])
    part = f"SparseCoder, transcode, k of all latents, {'all positive' if positive else 'of both signs'}"
    comparison = compare("transcoder", PACKAGE, part)
    comparison.scaled("nll", without_constant(found["nll"]), expected.fvu, scale, VARIANCE)
    code = torch.zeros(len(x), N).scatter(1, expected.latent_indices, expected.latent_acts)
    comparison.equal("code", model.encode(x), code)
    comparison.equal("prediction", model(x)[:, 1], expected.sae_out)
    assert (code > 0).all() == positive
    both = found["loss"], expected.fvu
    decoder = [pairs[name] for name in ("W_dec", "b_dec")]
    comparison.equal_gradients(*both, decoder, "gradient by the dictionary", scale, VARIANCE)
    if positive:
        comparison.equal_gradients(*both, pairs.values(), "gradient", scale, VARIANCE)
    else:
        ours, passed = (gradient_of_encoder(loss, pairs, i) for i, loss in enumerate((found["loss"], scale * both[1])))
        reason = "the fused backward of sparsify 1.3 passes a ReLU's gradient below 0 too"
        comparison.deviates("gradient by the encoder", ours[0], passed[0], reason, follows="ours")
