"""Sparse autoencoders of SAELens with our weights (Bloom et al. 2024).

Source: https://github.com/decoderesearch/SAELens
"""

import copy
import warnings
from typing import Any

import pytest
import torch
from sae_models import DEAD, N, X, build, data, dead_mask, sum_prefixes, with_dead, without_constant
from torch import Tensor

from aezoo.io.exporters.sae_lens import save_sae_lens

with warnings.catch_warnings():  # warnings of packages that it imports
    warnings.simplefilter("ignore")
    from sae_lens.saes import abstopk_sae, gated_sae, jumprelu_sae, matching_pursuit_sae, sae, standard_sae, topk_sae
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig
    from sae_lens.saes.transcoder import Transcoder, TranscoderConfig

PACKAGE = "sae-lens"
NORMS = "SAELens penalises f_i ||d_i||, whose gradient by a direction of norm 1 is along it and is removed"
MODULES = {
    "Standard": standard_sae,
    "Gated": gated_sae,
    "JumpReLU": jumprelu_sae,
    "TopK": topk_sae,
    "AbsTopK": abstopk_sae,
    "MatchingPursuit": matching_pursuit_sae,
}
ENCODER_BIAS = {"Gated": "b_gate"}
Pairs = dict[str, tuple[Tensor, Tensor]]


def training_class(kind: str) -> tuple[Any, Any]:
    if kind == "BatchTopK":
        return BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    if kind == "MatryoshkaBatchTopK":
        return MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
    return getattr(MODULES[kind], f"{kind}TrainingSAE"), getattr(MODULES[kind], f"{kind}TrainingSAEConfig")


def theirs(kind: str, model: Any, d_in: int = X, **settings: Any) -> tuple[Any, Pairs]:
    """Their model with our weights, and the pairs of parameters, theirs in the layout of ours."""
    made, config = training_class(kind)
    other = made(config(d_in=d_in, d_sae=N, dtype="float64", **settings))
    pairs = {"W_dec": (model.decoder.W_NX, other.W_dec), "b_dec": (model.decoder.b_X, other.b_dec)}
    if kind != "MatchingPursuit":
        pairs["W_enc"] = (model.encoder.weight, other.W_enc)
        pairs["b_enc"] = (model.encoder.bias, getattr(other, ENCODER_BIAS.get(kind, "b_enc")))
    if kind == "Gated":
        pairs |= {"r_mag": (model.r_N, other.r_mag), "b_mag": (model.b_mag_N, other.b_mag)}
    if kind == "JumpReLU":
        other.threshold.data = other.threshold.data.double()
        pairs["threshold"] = (model.theta_N, other.threshold)
    for name, (a, b) in pairs.items():
        b.data.copy_(a.detach().t() if name == "W_enc" else a.detach())
    return other, pairs


def step(other: Any, x: Tensor, dead: Tensor | None = None, **coefficients: float) -> Any:
    """Their training step, without the update."""
    return other.training_forward_pass(sae.TrainStepInput(x, coefficients, dead, 0, False))


def gradients(ours: Tensor, expected: Tensor, pairs: Pairs) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradients of both losses for all parameters, in the layout of ours; those without one are 0."""
    found = torch.autograd.grad(ours, [a for a, _ in pairs.values()], retain_graph=True, allow_unused=True)
    other = torch.autograd.grad(expected, [b for _, b in pairs.values()], retain_graph=True, allow_unused=True)
    result = {}
    for (name, (a, _)), p, q in zip(pairs.items(), found, other, strict=True):
        q = q if q is None or name != "W_enc" else q.t()
        result[name] = tuple(torch.zeros_like(a) if g is None else g for g in (p, q))
    return result


def equal_gradients(comparison: Any, ours: Tensor, expected: Tensor, pairs: Pairs, quantity: str = "gradient") -> None:
    for name, (found, other) in gradients(ours, expected, pairs).items():
        comparison.equal(f"{quantity} by {name}", found, other)


def radial_part_removed(model: Any, gradient: Tensor) -> Tensor:
    """Remove the radial part of a gradient, as before each step of our optimisers."""
    directions = copy.deepcopy(model.decoder)
    directions.W_NX.grad = gradient.clone()
    directions.remove_parallel_gradient()
    return directions.W_NX.grad


@pytest.mark.parametrize("form", ["unit_norm", "april"])
def test_sae_l1_equals_standard_sae(compare, form):
    model, x = build("sae_l1", form=form, l1=0.7), data()
    other, pairs = theirs("Standard", model, apply_b_dec_to_input=form == "unit_norm")
    found, expected = model.loss(x), step(other, x, l1=0.7)
    comparison = compare("sae_l1", PACKAGE, f"StandardTrainingSAE, {form}")
    comparison.equal("loss", without_constant(found["loss"]), expected.loss)
    comparison.equal("nll", without_constant(found["nll"]), expected.losses["mse_loss"])
    comparison.equal("l1", 0.7 * found["l1"], expected.losses["l1_loss"])
    comparison.equal("code", model.encode(x), expected.feature_acts)
    comparison.equal("reconstruction", model(x), expected.sae_out)
    if form == "unit_norm":
        by_W = gradients(found["loss"], expected.loss, {"W_dec": pairs.pop("W_dec")})["W_dec"]
        comparison.deviates("gradient by W_dec", *by_W, NORMS, follows="ours")
        comparison.equal("projected gradient by W_dec", *(radial_part_removed(model, g) for g in by_W))
    equal_gradients(comparison, found["loss"], expected.loss, pairs)


def test_gated_sae_equals_gated_sae_but_for_the_frozen_decoder(compare):
    model, x = build("gated_sae", l1=0.7), data()
    other, pairs = theirs("Gated", model)
    found, expected = model.loss(x), step(other, x, l1=0.7)
    comparison = compare("gated_sae", PACKAGE, "GatedTrainingSAE")
    comparison.equal("loss", without_constant(found["loss"]), expected.loss)
    comparison.equal("nll", without_constant(found["nll"]), expected.losses["mse_loss"])
    comparison.equal("l1", 0.7 * found["l1"], expected.losses["l1_loss"])
    comparison.equal("aux", found["aux"], expected.losses["auxiliary_reconstruction_loss"])
    comparison.equal("code", model.encode(x), expected.feature_acts)
    comparison.equal("reconstruction", model(x), expected.sae_out)
    equal_gradients(comparison, found["nll"], expected.losses["mse_loss"], pairs, "gradient of nll")
    decoder = {name: pairs.pop(name) for name in ("W_dec", "b_dec")}
    equal_gradients(comparison, found["loss"], expected.loss, pairs)
    l1 = gradients(found["l1"], expected.losses["l1_loss"] / 0.7, decoder)
    comparison.equal("gradient of l1 by b_dec", *l1["b_dec"])
    comparison.deviates("gradient of l1 by W_dec", *l1["W_dec"], NORMS, follows="ours")
    aux = gradients(found["aux"], expected.losses["auxiliary_reconstruction_loss"], decoder)
    for name, both in aux.items():
        reason = "the decoder of equation 8 is frozen; SAELens trains it with this term"
        comparison.deviates(f"gradient of aux by {name}", *both, reason, follows="ours")


@pytest.mark.parametrize("target", [0.0, 3.0])
def test_jumprelu_sae_equals_jumprelu_sae(compare, target):
    settings = {"l0_weight": 0.7, "threshold": 0.5, "bandwidth": 0.8, "target_l0": target}
    # their penalty is computed for each sample, ours for the batch: they are equal for one sample
    model, x = build("jumprelu_sae", **settings), data(1 if target else 50)
    assert (model.theta_N > 0).any() and (model.theta_N < 0.4).any()
    mode = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": target} if target else {}
    other, pairs = theirs("JumpReLU", model, jumprelu_bandwidth=0.8, **mode)
    scale = 2 * target if target else 1.0
    found, expected = model.loss(x), step(other, x, l0=0.7 / scale)
    comparison = compare("jumprelu_sae", PACKAGE, f"JumpReLUTrainingSAE, {'quadratic' if target else 'step'}")
    comparison.equal("loss", without_constant(found["loss"]), expected.loss)
    comparison.equal("nll", without_constant(found["nll"]), expected.losses["mse_loss"])
    penalty, of_theirs = found["loss"] - found["nll"], step(other, x, l0=0.7).losses["l0_loss"]
    if target:
        reason = "2 / target (L0 - target)^2 of Gemma Scope 2, where ours is (L0 / target - 1)^2"
        comparison.scaled("l0 penalty", penalty, of_theirs, 1 / scale, reason)
    else:
        comparison.equal("l0 penalty", penalty, of_theirs)
    comparison.equal("code", model.encode(x), expected.feature_acts)
    comparison.equal("reconstruction", model(x), expected.sae_out)
    equal_gradients(comparison, found["loss"], expected.loss, pairs)


@pytest.mark.parametrize("dead", [DEAD, DEAD[:2]], ids=len)
@pytest.mark.parametrize(("name", "kind"), [("topk_sae", "TopK"), ("abs_topk_sae", "AbsTopK")])
def test_topk_saes_equal_topk_saes(compare, name, kind, dead):
    model, x = with_dead(name, dead, k=3, k_aux=X // 2, aux_weight=0.7), data()
    with torch.no_grad():
        # their AuxK has a ReLU for TopK
        model.encoder.bias[dead] = 4 if kind == "TopK" else 0.5
        if kind == "AbsTopK":
            model.encoder.bias[::2] *= -1
    settings = {"k": 3, "rescale_acts_by_decoder_norm": False, "aux_loss_coefficient": 0.7}
    other, pairs = theirs(kind, model, **settings)
    found, expected = model.loss(x), step(other, x, dead_mask(dead))
    comparison = compare(name, PACKAGE, f"{kind}TrainingSAE, {len(dead)} dead latents, k_aux {X // 2}")
    comparison.equal("loss", without_constant(found["loss"]), expected.loss)
    comparison.equal("nll", without_constant(found["nll"]), expected.losses["mse_loss"])
    comparison.equal("aux", 0.7 * found["aux"], expected.losses["auxiliary_reconstruction_loss"])
    comparison.equal("code", model.encode(x), expected.feature_acts)
    comparison.equal("reconstruction", model(x), expected.sae_out)
    equal_gradients(comparison, found["loss"], expected.loss, pairs)
    assert (model.encode(x) < 0).any() == (kind == "AbsTopK") and found["aux"] > 0


def test_auxk_with_negative_pre_activations(compare):
    model, x = with_dead("topk_sae", k=3, k_aux=X // 2), data()
    with torch.no_grad():
        model.encoder.bias[DEAD] = -1
    other, _ = theirs("TopK", model, k=3, rescale_acts_by_decoder_norm=False, aux_loss_coefficient=1.0)
    ours, expected = model.loss(x)["aux"], step(other, x, dead_mask()).losses["auxiliary_reconstruction_loss"]
    comparison = compare("topk_sae", PACKAGE, "TopKTrainingSAE, negative pre-activations of dead latents")
    reason = "SAELens keeps negative pre-activations of dead latents as the equation does; ours are 0 as in its code"
    comparison.deviates("aux", ours, expected, reason, follows="both")


def test_k_sparse_equals_topk_with_transposed_weights(compare):
    model, x = build("k_sparse", k=3), data()
    with torch.no_grad():
        model.encoder.bias += 5  # k-sparse autoencoders have no ReLU
    bias = next(p for name, p in model.decoder.named_parameters() if p.shape == (X,))
    made, config = training_class("TopK")
    settings = {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": False, "k": 3, "dtype": "float64"}
    other = made(config(d_in=X, d_sae=N, **settings))
    for a, b in ((model.encoder.weight.t(), other.W_enc), (model.encoder.weight, other.W_dec),
                 (model.encoder.bias, other.b_enc), (bias, other.b_dec)):  # fmt: skip
        b.data.copy_(a.detach())
    found, expected = model.loss(x), step(other, x)
    comparison = compare("k_sparse", PACKAGE, "TopKTrainingSAE, transposed weights, positive codes")
    comparison.equal("loss", without_constant(found["loss"]), expected.loss)
    comparison.equal("code", model.encode(x), expected.feature_acts)
    comparison.equal("reconstruction", model(x), expected.sae_out)
    ours = torch.autograd.grad(found["loss"], (model.encoder.weight, model.encoder.bias, bias))
    both = torch.autograd.grad(expected.loss, (other.W_enc, other.W_dec, other.b_enc, other.b_dec))
    comparison.equal("gradient by the weight, of both uses", ours[0], both[0].t() + both[1])
    comparison.equal("gradient by the encoder's bias", ours[1], both[2])
    comparison.equal("gradient by the decoder's bias", ours[2], both[3])


BATCH = {"batch_topk_sae": "BatchTopK", "matryoshka_sae": "MatryoshkaBatchTopK"}


def batch_pair(name: str) -> tuple[Any, Any, Pairs]:
    """A BatchTopK model and theirs; some samples have more than k active latents."""
    prefixes = {"fractions": (0.25, 0.5)} if name == "matryoshka_sae" else {}
    model = with_dead(name, k=3, k_aux=X // 2, aux_weight=0.7, **prefixes)
    if prefixes:
        model = sum_prefixes(model)
    with torch.no_grad():
        model.encoder.bias[DEAD] = 3
    widths = {"matryoshka_widths": model.prefixes} if prefixes else {}
    settings = {"k": 3, "rescale_acts_by_decoder_norm": False, "aux_loss_coefficient": 0.7}
    return model, *theirs(BATCH[name], model, **settings, **widths)


@pytest.mark.parametrize("name", BATCH)
def test_batch_topk_saes_equal_batch_topk_saes(compare, name):
    (model, other, pairs), x = batch_pair(name), data()
    comparison = compare(name, PACKAGE, f"{BATCH[name]}TrainingSAE")
    x[0] *= 4
    found, expected = model.loss(x), step(other, x, dead_mask())
    counts = (expected.feature_acts > 0).sum(1)
    assert counts.max() > 3 > counts.min() and found["aux"] > 0
    comparison.equal("loss", without_constant(found["loss"], X * len(getattr(model, "prefixes", (N,)))), expected.loss)
    if name == "matryoshka_sae":
        reason = (
            "ours is the mean over all prefixes and the empty one, as in the authors' code; the other rows compare the "
            "paper's sum over prefixes"
        )
        comparison.deviates("loss as it is", found["mean_loss"], expected.loss, reason, follows="theirs")
    comparison.equal("nll", without_constant(found["nll"]), expected.losses["mse_loss"])
    comparison.equal("aux", 0.7 * found["aux"], expected.losses["auxiliary_reconstruction_loss"])
    code = model.top_of_batch(model.pre_activations(x), 3)
    comparison.equal("code in training", code, expected.feature_acts)
    if name == "matryoshka_sae":
        inner = sum(value for term, value in expected.losses.items() if term.startswith("inner"))
        comparison.equal("prefix_nll", without_constant(found["prefix_nll"], 2 * X), inner)
    equal_gradients(comparison, found["loss"], expected.loss, pairs)
    reason = (
        "SAELens starts its running mean at 0, 1% of the least activation after a step; ours is the mean of all "
        "batches so far, as the paper's expectation"
    )
    fresh, other, _ = batch_pair(name)
    fresh.loss(x), step(other, x, dead_mask())
    comparison.deviates("threshold after a step", fresh.theta.value, other.topk_threshold, reason, follows="ours")
    fresh.theta.value *= 0.9  # so that no activation equals it, which is active in ours only
    # in evaluation theirs is a JumpReLU SAE
    state = {key: value.detach().clone() for key, value in other.state_dict().items()}
    state["topk_threshold"] = fresh.theta.value.detach()
    other.process_state_dict_for_saving_inference(state)
    inference = jumprelu_sae.JumpReLUSAE(jumprelu_sae.JumpReLUSAEConfig(X, N, dtype="float64"))
    inference.load_state_dict(state)
    fresh.eval()
    comparison.equal("code in evaluation, of one threshold", fresh.encode(x), inference.encode(x))
    comparison.equal("reconstruction in evaluation, of one threshold", fresh(x), inference(x))


def test_matching_pursuit_sae_equals_matching_pursuit_sae(compare):
    model, x = build("matching_pursuit_sae", k=4), data()
    settings = {"max_iterations": 4, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
    other, pairs = theirs("MatchingPursuit", model, **settings)
    found, expected = model.loss(x), step(other, x)
    comparison = compare("matching_pursuit_sae", PACKAGE, "MatchingPursuitTrainingSAE")
    comparison.equal("loss", without_constant(found["loss"]), expected.loss)
    comparison.equal("code", model.encode(x), expected.feature_acts)
    comparison.equal("reconstruction", model(x), expected.sae_out)
    equal_gradients(comparison, found["loss"], expected.loss, pairs)


def test_temporal_sae_equals_temporal_sae(compare):
    steps, heads, k = 5, 2, 3
    model, x = build("temporal_sae", (steps, X), k=k, key_dim=4, heads=heads), 2 * data(4, (steps, X))
    config = TemporalSAEConfig(
        X, N, "float64", n_heads=heads, bottleneck_factor=N // 4, kval_topk=k, tied_weights=False
    )
    other, context = TemporalSAE(config), model.context
    attention, width = other.attn_layers[0], other.lam
    with torch.no_grad():
        # SAELens scales the encoder's input and has no encoder bias
        model.encoder.bias.zero_()
        attention.v_ctx.bias.zero_()  # the bias of the output has the same effect
    weights = {
        "W_dec": (model.decoder.W_NX, other.W_dec), "b_dec": (model.decoder.b_X, other.b_dec),
        "q": (context.query.weight, attention.q_target.weight), "k": (context.key.weight, attention.k_ctx.weight),
        "v": (context.value.weight, attention.v_ctx.weight), "out": (context.out.weight, attention.c_proj.weight),
        "q.bias": (context.query.bias, attention.q_target.bias), "out.bias": (context.out.bias, attention.c_proj.bias),
    }  # fmt: skip
    for a, b in weights.values():
        b.data.copy_(a.detach())
    other.W_enc.data.copy_(model.encoder.weight.detach().t() / width)
    found, (new, predicted), x_hat = model.loss(x), other.encode_with_predictions(x), other(x)
    assert found["aux"] == 0 and (predicted < 0).any()
    expected = sae.mse_loss(x_hat, x).sum((1, 2)).mean()
    comparison = compare("temporal_sae", PACKAGE, "TemporalSAE")
    comparison.equal("code of what is new", model.encode(x)[:, 0], new)
    comparison.equal("code of what is predicted", model.encode(x)[:, 1], predicted)
    comparison.equal("reconstruction", model(x), x_hat)
    comparison.equal("nll", without_constant(found["nll"], steps * X), expected)
    equal_gradients(comparison, found["loss"], expected, weights)
    (ours,), (of_theirs,) = (
        torch.autograd.grad(loss, p, retain_graph=True)
        for loss, p in ((found["loss"], model.encoder.weight), (expected, other.W_enc))
    )
    reason = "SAELens multiplies the encoder's input by 1 / (4 D), which our weights hold"
    comparison.scaled("gradient by W_enc", ours, of_theirs.t(), 1 / width, reason)


def test_transcoder_equals_transcoder(compare):
    model, x = build("transcoder", (2, X), targets=(1,), l1=0.0), data(7, (2, X))
    other = Transcoder(TranscoderConfig(X, N, "float64", d_out=X, apply_b_dec_to_input=False))
    pairs = {
        "W_enc": (model.encoder.weight, other.W_enc), "b_enc": (model.encoder.bias, other.b_enc),
        "W_dec": (model.decoder.W_NX, other.W_dec), "b_dec": (model.decoder.b_X, other.b_dec),
    }  # fmt: skip
    for name, (a, b) in pairs.items():
        b.data.copy_(a.detach().t() if name == "W_enc" else a.detach())
    found, (y_hat, code) = model.loss(x), other.forward_with_activations(x[:, 0])
    expected = sae.mse_loss(y_hat, x[:, 1]).sum(1).mean()
    comparison = compare("transcoder", PACKAGE, "Transcoder")
    comparison.equal("nll", without_constant(found["nll"]), expected)
    comparison.equal("code", model.encode(x), code)
    comparison.equal("prediction", model(x)[:, 1], y_hat)
    equal_gradients(comparison, found["loss"], expected, pairs)


def test_crosscoder_equals_a_standard_sae_for_each_stream(compare):
    streams = 3
    model, x = build("crosscoder", (streams, X), l1=0.7), data(7, (streams, X))
    whole, pairs = theirs("Standard", model, streams * X, apply_b_dec_to_input=False)
    expected = step(whole, x.flatten(1), l1=0.0)
    penalties = []
    for W in whole.W_dec.split(X, 1):
        part = standard_sae.StandardTrainingSAE(standard_sae.StandardTrainingSAEConfig(X, N, "float64"))
        del part.W_dec
        part.W_dec = W
        one = sae.TrainStepInput(x, {"l1": 0.7}, None, 0, False)
        penalties.append(part.calculate_aux_loss(one, expected.feature_acts, None, None)["l1_loss"])
    found, loss = model.loss(x), expected.loss + sum(penalties)
    comparison = compare("crosscoder", PACKAGE, "StandardTrainingSAE, penalty of each stream")
    comparison.equal("loss", without_constant(found["loss"], streams * X), loss)
    comparison.equal("nll", without_constant(found["nll"], streams * X), expected.losses["mse_loss"])
    comparison.equal("l1", 0.7 * found["l1"], sum(penalties))
    comparison.equal("code", model.encode(x), expected.feature_acts)
    comparison.equal("reconstruction", model(x).flatten(1), expected.sae_out)
    equal_gradients(comparison, found["loss"], loss, pairs)


SAVED = {
    "sae_l1": {"form": "april"},
    "gated_sae": {},
    "jumprelu_sae": {"threshold": 0.3, "input_norm": "layer_norm"},
    "topk_sae": {"k": 3, "unit_norm": False, "input_norm": "rms_norm"},
    "abs_topk_sae": {"k": 3},
    "batch_topk_sae": {"k": 3},
    "matryoshka_sae": {"k": 3, "fractions": (0.25, 0.5)},
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_saes_are_read_by_sae_lens(compare, tmp_path, name):
    model, x = build(name, **SAVED[name]).eval(), data()
    with torch.no_grad():
        for theta in (getattr(model, "theta_N", None), getattr(getattr(model, "theta", None), "value", None)):
            if theta is not None:
                theta.copy_(0.3 + 0.1 * torch.rand_like(theta))
    other = sae.SAE.load_from_disk(save_sae_lens(model, tmp_path, {"model_name": "gpt2"}))
    code = model.encode(x)[:, :N]
    comparison = compare(name, PACKAGE, f"{type(other).__name__}, saved here and read there")
    comparison.equal("code", code, other.encode(x))
    comparison.equal("reconstruction", model(x), other(x))
    assert other.cfg.metadata.model_name == "gpt2" and 0 < (code != 0).sum() < code.numel()


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("skip", [False, True])
def test_saved_transcoders_are_read_by_sae_lens(compare, tmp_path, activation, skip):
    model, x = build("transcoder", (2, X), targets=(1,), activation=activation, skip=skip).eval(), data(7, (2, X))
    if activation == "jumprelu":
        model.theta_N.data.fill_(0.4)
    other = sae.SAE.load_from_disk(save_sae_lens(model, tmp_path))
    y_hat, code = other.forward_with_activations(x[:, 0])
    comparison = compare("transcoder", PACKAGE, f"{type(other).__name__}, saved here and read there")
    comparison.equal("code", model.encode(x)[:, :N], code)
    comparison.equal("prediction", model(x)[:, 1], y_hat)
