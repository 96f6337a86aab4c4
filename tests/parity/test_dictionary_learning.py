"""Sparse autoencoders of dictionary_learning with our weights (Marks et al. 2024).

Source: https://github.com/saprmarks/dictionary_learning
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_models import DEAD, DEAD_AFTER, N, X, build, data, dead_mask, sum_prefixes, with_dead, without_constant
from torch import Tensor

import aezoo

with warnings.catch_warnings():  # warnings of packages that it imports
    warnings.simplefilter("ignore")
    from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew
    from dictionary_learning.grad_pursuit import grad_pursuit
    from dictionary_learning.trainers import trainer as shared
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.p_anneal import PAnnealTrainer
    from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer, geometric_median

PACKAGE = "dictionary-learning"
LR = 1e-2
# their names of our parameters
NAMES = {
    "decoder.W_NX": ("decoder.weight", "W_dec"), "decoder.b_X": ("bias", "decoder_bias", "b_dec", "decoder.bias"),
    "encoder.weight": ("encoder.weight", "W_enc"), "encoder.bias": ("gate_bias", "encoder.bias", "b_enc"),
    "r_N": ("r_mag",), "b_mag_N": ("mag_bias",), "theta_N": ("threshold",),
}  # fmt: skip
TRANSPOSED = ("decoder.weight", "W_enc")


def theirs(trainer: Callable[..., Any], model: Any, **settings: Any) -> tuple[Any, dict[str, str]]:
    """Their trainer with our weights, and their parameter names by our names."""
    d_in = model.encoder.weight.shape[1]
    given = {"steps": 100, "activation_dim": d_in, "dict_size": N, "layer": 0, "lm_name": "", "lr": LR}
    made = trainer(**given, warmup_steps=0, device="cpu", **settings)
    parameters = dict(made.ae.named_parameters())
    names = {}
    for name, p in model.named_parameters():
        names[name] = next(other for other in NAMES[name] if other in parameters)
        parameters[names[name]].data.copy_(as_theirs(names[name], p.detach()))
    return made, names


def as_theirs(name: str, value: Tensor) -> Tensor:
    return value.t() if name in TRANSPOSED else value


def compare_gradients(comparison: Any, model: Any, names: dict[str, str], other: Any, ours: Tensor, expected: Tensor,
                      quantity: str = "gradient", without: tuple[str, ...] = ()) -> None:  # fmt: skip
    """Compare the gradients of both losses for each parameter, relative to its own largest."""
    kept = [name for name in names if name not in without]
    parameters = dict(other.ae.named_parameters())
    found = torch.autograd.grad(ours, [model.get_parameter(name) for name in kept], retain_graph=True)
    of_theirs = torch.autograd.grad(expected, [parameters[names[name]] for name in kept], retain_graph=True)
    for name, a, b in zip(kept, found, of_theirs, strict=True):
        comparison.equal(f"{quantity} by {name}", a, as_theirs(names[name], b))


def compare_steps(comparison: Any, model: Any, names: dict[str, str], other: Any, x: Tensor, clip: float = 0.0,
                  betas: tuple[float, float] = (0.9, 0.999)) -> None:  # fmt: skip
    """Parameters after three steps of Adam, with projected gradients and normalised directions."""
    optimizer = torch.optim.Adam(model.parameters(), LR, betas)
    before = model.decoder.W_NX.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(x)["loss"].backward()
        model.on_before_optimizer_step(optimizer)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        model.after_optimizer_step()
        other.update(1, x)
    parameters = dict(other.ae.named_parameters())
    for name, of_theirs in names.items():
        found = model.get_parameter(name)
        comparison.equal(f"{name} after three steps", found, as_theirs(of_theirs, parameters[of_theirs]), 2e-6)
    assert (model.decoder.W_NX - before).abs().max() > LR


def log(other: Any, x: Tensor, step: int = 1) -> Any:
    return other.loss(x, step=step, logging=True)


def test_sae_l1_equals_standard_trainer(compare):
    model, x = build("sae_l1", l1=0.7), data()
    other, names = theirs(StandardTrainer, model, l1_penalty=0.7, sparsity_warmup_steps=None)
    found, expected, terms = model.loss(x), other.loss(x, step=1), log(other, x)
    comparison = compare("sae_l1", PACKAGE, "StandardTrainer")
    comparison.equal("loss", without_constant(found["loss"]), expected)
    comparison.equal("nll", without_constant(found["nll"]), terms.losses["mse_loss"])
    comparison.equal("l1", found["l1"], terms.losses["sparsity_loss"])
    comparison.equal("code", model.encode(x), terms.f)
    comparison.equal("reconstruction", model(x), terms.x_hat)
    compare_gradients(comparison, model, names, other, found["loss"], expected)
    warm, slow = build("sae_l1", l1=0.7, l1_steps=10), copy.deepcopy(other)
    warm.load_state_dict(model.state_dict())
    warm.steps.fill_(3)
    slow.sparsity_warmup_fn = shared.get_sparsity_warmup_fn(100, 10)
    comparison.equal("loss at a third of the warm-up", without_constant(warm.loss(x)["loss"]), slow.loss(x, step=3))
    annealed, _ = theirs(PAnnealTrainer, model, initial_sparsity_penalty=0.7, sparsity_warmup_steps=None)
    comparison.equal("loss of PAnnealTrainer, p = 1", without_constant(found["loss"]), annealed.loss(x, step=1))
    compare_steps(comparison, model, names, other, x)


def test_restart_of_a_dead_latent_follows_standard_trainer(compare, capsys):
    model, x = build("sae_l1", l1=0.7), data(1)
    other, names = theirs(StandardTrainer, model, l1_penalty=0.7, sparsity_warmup_steps=None)
    optimizer = torch.optim.Adam(model.parameters(), LR)
    model.loss(x)["loss"].backward()
    model.on_before_optimizer_step(optimizer)
    optimizer.step()
    model.after_optimizer_step()
    other.update(1, x)
    with torch.no_grad():
        model.decoder.b_X.zero_()
        other.ae.bias.zero_()
    model.since_fired_N.zero_()
    model.since_fired_N[4] = 10**6
    model.resample(x, optimizer, 1)
    other.resample_neurons(dead_mask(torch.tensor([4])), x)
    comparison = compare("sae_l1", PACKAGE, "StandardTrainer.resample_neurons, one sample")
    comparison.equal("decoder", model.decoder.W_NX, other.ae.decoder.weight.t())
    comparison.equal("encoder's bias", model.encoder.bias, other.ae.encoder.bias)
    comparison.equal("direction of the encoder", *(
        torch.nn.functional.normalize(W, dim=1) for W in (model.encoder.weight, other.ae.encoder.weight)
    ))  # fmt: skip
    norms = (W[4].norm() for W in (model.encoder.weight, other.ae.encoder.weight))
    reason = "a fifth of the mean norm of live rows; dictionary_learning multiplies it by the sample's norm"
    comparison.deviates("norm of the encoder's row", *norms, reason, follows="ours")
    parameters = dict(other.ae.named_parameters())
    for name, of_theirs in names.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            value = other.optimizer.state[parameters[of_theirs]][moment]
            ours = optimizer.state[model.get_parameter(name)][moment]
            comparison.equal(f"{moment} of {name}", ours, as_theirs(of_theirs, value))
    assert not optimizer.state[model.decoder.W_NX]["exp_avg"][4].any() and "resampling 1" in capsys.readouterr().out


def test_april_form_equals_penalty_with_norms(compare):
    model, x = build("sae_l1", form="april", l1=0.7), data()
    # AutoEncoderNew returns f ||d|| as features to a trainer
    settings = {"dict_class": AutoEncoderNew, "l1_penalty": 0.7, "sparsity_warmup_steps": None}
    other, names = theirs(StandardTrainer, model, **settings)
    found, expected, terms = model.loss(x), other.loss(x, step=1), log(other, x)
    comparison = compare("sae_l1", PACKAGE, "StandardTrainer, AutoEncoderNew, april")
    comparison.equal("loss", without_constant(found["loss"]), expected)
    comparison.equal("nll", without_constant(found["nll"]), terms.losses["mse_loss"])
    comparison.equal("l1", found["l1"], terms.losses["sparsity_loss"])
    comparison.equal("code", model.encode(x), other.ae.encode(x))
    comparison.equal("reconstruction", model(x), terms.x_hat)
    compare_gradients(comparison, model, names, other, found["loss"], expected)
    twice, _ = theirs(StandardTrainerAprilUpdate, model, **settings)
    reason = "its trainer multiplies by the norms again"
    comparison = compare("sae_l1", PACKAGE, "StandardTrainerAprilUpdate, AutoEncoderNew")
    comparison.deviates("l1", found["l1"], log(twice, x).losses["sparsity_loss"], reason, follows="ours")


def test_crosscoder_of_one_stream_equals_april_form(compare):
    model, x = build("crosscoder", (1, X), l1=0.7), data(7, (1, X))
    settings = {"dict_class": AutoEncoderNew, "l1_penalty": 0.7, "sparsity_warmup_steps": None}
    other, names = theirs(StandardTrainer, model, **settings)
    found, expected = model.loss(x), other.loss(x[:, 0], step=1)
    comparison = compare("crosscoder", PACKAGE, "StandardTrainer, AutoEncoderNew, one stream")
    comparison.equal("loss", without_constant(found["loss"]), expected)
    compare_gradients(comparison, model, names, other, found["loss"], expected)


def test_gated_sae_equals_gated_trainers(compare):
    model, x = build("gated_sae", l1=0.7), data()
    other, names = theirs(GatedSAETrainer, model, l1_penalty=0.7, sparsity_warmup_steps=None)
    found, expected, terms = model.loss(x), other.loss(x, step=1), log(other, x)
    comparison = compare("gated_sae", PACKAGE, "GatedSAETrainer")
    comparison.equal("loss", without_constant(found["loss"]), expected)
    comparison.equal("nll", without_constant(found["nll"]), terms.losses["mse_loss"])
    comparison.equal("l1", found["l1"], terms.losses["sparsity_loss"])
    comparison.equal("aux", found["aux"], terms.losses["aux_loss"])
    comparison.equal("code", model.encode(x), terms.f)
    comparison.equal("reconstruction", model(x), terms.x_hat)
    compare_gradients(comparison, model, names, other, found["loss"], expected)
    annealed, _ = theirs(GatedAnnealTrainer, model, initial_sparsity_penalty=0.7, sparsity_warmup_steps=None)
    comparison.equal("loss of GatedAnnealTrainer, p = 1", without_constant(found["loss"]), annealed.loss(x, step=1))
    compare_steps(comparison, model, names, other, x, betas=(0.0, 0.999))


def test_jumprelu_sae_equals_jumprelu_trainer(compare):
    settings = {"threshold": 0.5, "bandwidth": 0.8, "target_l0": 3.0}
    model, x = build("jumprelu_sae", l0_weight=0.7, **settings), data(50)
    model.theta_N.data.clamp_(min=0.05)
    other, names = theirs(JumpReluTrainer, model, bandwidth=0.8, sparsity_penalty=0.7, target_l0=3.0,
                          sparsity_warmup_steps=None)  # fmt: skip
    # their encoder does not subtract b
    other.ae.b_dec.data.zero_()
    centred = x - model.decoder.b_X.detach()
    found, expected, terms = model.loss(x), other.loss(centred, step=1), log(other, centred)
    comparison = compare("jumprelu_sae", PACKAGE, "JumpReluTrainer, x - b")
    comparison.equal("loss", without_constant(found["loss"]), expected)
    comparison.equal("nll", without_constant(found["nll"]), terms.losses["l2_loss"])
    comparison.equal("code", model.encode(x), terms.f)
    comparison.equal("reconstruction", model(x) - model.decoder.b_X, terms.recon)
    theta = ("decoder.b_X", "theta_N")
    compare_gradients(comparison, model, names, other, found["loss"], expected, without=theta)
    by_theta = torch.autograd.grad(found["loss"], model.theta_N, retain_graph=True)[0]
    other_theta = torch.autograd.grad(expected, other.ae.threshold)[0]
    reason = "they estimate the step's slope from f, which is 0 below the threshold; the paper's kernel reads pi"
    comparison.deviates("gradient by theta_N", by_theta, other_theta, reason, follows="ours")
    other.sparsity_coefficient = 0.0
    expected = other.loss(centred, step=1)
    quantity = "gradient of nll"
    compare_gradients(comparison, model, names, other, found["nll"], expected, quantity, ("decoder.b_X",))


TOPK = {"topk_sae": TopKTrainer, "batch_topk_sae": BatchTopKTrainer, "matryoshka_sae": MatryoshkaBatchTopKTrainer}


def topk_pair(name: str, x: Tensor, dead: Tensor = DEAD, **settings: Any) -> tuple[Any, Any, dict[str, str]]:
    """Our weight of AuxK is theirs divided by a variance, since they scale AuxK by it, and not the error."""
    given = {"k": 3, "k_aux": X // 2, "aux_scale": "variance", "aux_weight": 0.7 / x.var(0, correction=0).sum().item()}
    if name == "matryoshka_sae":
        given["fractions"] = (0.25, 0.5)
        settings = {"group_fractions": (0.25, 0.25, 0.5), "group_weights": [3.0] * 3} | settings
    if name != "topk_sae":
        given["theta_decay"] = 0.5
    model = with_dead(name, dead, **given)
    if name == "matryoshka_sae":
        model = sum_prefixes(model)
    other, names = theirs(
        TOPK[name], model, k=3, auxk_alpha=0.7, threshold_beta=0.5, threshold_start_step=-1, **settings
    )
    other.dead_feature_threshold = DEAD_AFTER
    other.num_tokens_since_fired.copy_(model.since_fired_N)
    return model, other, names


@pytest.fixture
def float64(monkeypatch):
    """Their AuxK is computed in float32."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.is_floating_point() else x.to(torch.float32))


@pytest.mark.parametrize("name", TOPK)
@pytest.mark.usefixtures("float64")
def test_topk_saes_equal_topk_trainers(compare, name):
    x = data()
    x[0] *= 2
    model, other, names = topk_pair(name, x)
    sizes = getattr(model, "prefixes", (N,))
    found, expected = model.loss(x), other.loss(x, step=1)
    assert found["aux"] > 0 and other.dead_features == len(DEAD)
    comparison = compare(name, PACKAGE, TOPK[name].__name__)
    comparison.equal("loss", without_constant(found["loss"], X * len(sizes)), expected)
    if name == "matryoshka_sae":
        reason = (
            "ours is the mean over all prefixes and the empty one, as in the authors' code; the other rows compare the "
            "paper's sum over prefixes"
        )
        comparison.deviates("loss as it is", found["mean_loss"], expected, reason, follows="theirs")
    variance = x.var(0, correction=0).sum().item()
    reason = "the authors' code divides the first error by Var(x) and AuxK by Var(e); ours multiplies both by Var(x)"
    terms = log(other, x, 1).losses
    comparison.scaled("aux", found["aux"], terms["auxk_loss"], variance, reason)
    both = without_constant(found["nll"] + found.get("prefix_nll", 0), X * len(sizes))
    comparison.equal("nll", both, terms["l2_loss"])
    compare_gradients(comparison, model, names, other, found["loss"], expected)
    if name != "topk_sae":
        twin, other, _ = topk_pair(name, x)
        for step in range(3):
            batch = x + step
            twin.loss(batch), other.loss(batch, step=1)
        comparison.equal("threshold after three batches", twin.theta.value, other.ae.threshold.double())
        twin.eval()
        other.ae.threshold = (0.9 * twin.theta.value).float()
        twin.theta.value.copy_(other.ae.threshold)
        comparison.equal("code in evaluation, of one threshold", twin.encode(x), other.ae.encode(x))
        comparison.equal("reconstruction in evaluation, of one threshold", twin(x), other.ae(x))
    else:
        comparison.equal("code", model.encode(x), other.ae.encode(x))
        comparison.equal("reconstruction", model(x), other.ae(x))
    twin, other, names = topk_pair(name, x)
    compare_steps(comparison, twin, names, other, x, clip=1.0)
    comparison.equal("samples since each latent fired", twin.since_fired_N, other.num_tokens_since_fired)
    ours = build(name, k=3, data_init=True)
    with torch.no_grad():
        ours.init_from_data(x)
    comparison.equal("bias at the start", ours.decoder.b_X, geometric_median(x, 10_000, 1e-13))


@pytest.mark.usefixtures("float64")
def test_auxk_of_few_dead_latents_is_scaled(compare):
    x, dead = data(), DEAD[:2]
    model, other, _ = topk_pair("topk_sae", x, dead)
    expected, variance = log(other, x, 1).losses["auxk_loss"], x.var(0, correction=0).sum().item()
    comparison = compare("topk_sae", PACKAGE, f"TopKTrainer, {len(dead)} dead latents, k_aux {X // 2}")
    reason = (
        "Var(x), see TopKTrainer, times dead / k_aux, a factor of sparsify and SAELens that they and the paper lack"
    )
    comparison.scaled("aux", model.loss(x)["aux"], expected, variance * len(dead) / (X // 2), reason)


@pytest.mark.usefixtures("float64")
def test_matryoshka_weights_of_their_default(compare):
    x = data()
    model, other, _ = topk_pair("matryoshka_sae", x, group_weights=None)
    found, terms = model.loss(x), log(other, x, 1).losses
    both = without_constant(found["nll"] + found["prefix_nll"], 3 * X)
    comparison = compare("matryoshka_sae", PACKAGE, "MatryoshkaBatchTopKTrainer, weights of its default")
    comparison.scaled("nll", both, terms["l2_loss"], 9, "the paper sums M errors; they weigh each by 1 / M and average")


def test_gradient_pursuit_of_orthogonal_directions(compare):
    model, x = build("matching_pursuit_sae", k=3), data()
    with torch.no_grad():
        model.decoder.b_X.zero_()
        # an orthonormal basis and its negatives, so that residuals of either sign are matched
        basis = torch.linalg.qr(torch.randn(X, X)).Q
        model.decoder.W_NX.copy_(torch.cat([basis, -basis]))
    comparison = compare("matching_pursuit_sae", PACKAGE, "grad_pursuit, orthogonal directions")
    comparison.equal("code", model.encode(x), grad_pursuit(x, model.decoder.W_NX.t(), 3))
    assert ((model.encode(x) > 0).sum(1) == 3).all()


def test_sparse_ae_l1_equals_autoencoder_without_bias(compare):
    model, x = aezoo.create_model("sparse_ae_l1", (X,), latent_dim=N, l1=0.7, likelihood="gaussian").double(), data()
    encoder, decoder = (
        [m for m in net.modules() if isinstance(m, torch.nn.Linear)] for net in (model.encoder, model.decoder)
    )
    assert len(encoder) == len(decoder) == 1
    with torch.no_grad():
        encoder[0].bias += torch.randn(N)
        decoder[0].bias.zero_()  # theirs also subtracts it from x
    other = StandardTrainer(100, X, N, 0, "", l1_penalty=0.7, warmup_steps=0, sparsity_warmup_steps=None, device="cpu")
    assert isinstance(other.ae, AutoEncoder)
    pairs = [(encoder[0].weight, other.ae.encoder.weight), (encoder[0].bias, other.ae.encoder.bias),
             (decoder[0].weight, other.ae.decoder.weight)]  # fmt: skip
    for a, b in pairs:
        b.data.copy_(a.detach())
    found, expected, terms = model.loss(x), other.loss(x, step=1), log(other, x)
    comparison = compare("sparse_ae_l1", PACKAGE, "StandardTrainer, no bias of the output")
    comparison.equal("loss", without_constant(found["loss"]), expected)
    comparison.equal("nll", without_constant(found["nll"]), terms.losses["mse_loss"])
    comparison.equal("l1", found["l1"], terms.losses["sparsity_loss"])
    comparison.equal("code", model.encode(x), terms.f)
    comparison.equal("reconstruction", model(x), terms.x_hat)
    comparison.equal_gradients(found["loss"], expected, pairs)
