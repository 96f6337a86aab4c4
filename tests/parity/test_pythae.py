"""Losses of pythae around copies of our networks (Chadebec et al. 2022).

Source: https://github.com/clementchadebec/benchmark_VAE

pythae leaves the constant of a Gaussian's density out. Where the quantity is named "without constant", ours is compared
without it. Variances that ours clamps to keep them finite lie inside the interval here.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from comparison import Comparison, noise, seeded
from pythae import models as pythae
from pythae import samplers
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseDiscriminator, BaseEncoder
from pythae.models.rhvae.rhvae_utils import create_inverse_metric, create_metric
from pythae.samplers import RHVAESampler
from pythae.trainers import AdversarialTrainer
from torch import Tensor, nn

import aezoo
from aezoo.distributions import divergences
from aezoo.manifolds import hamiltonian
from aezoo.manifolds.riemannian import half_log_det
from aezoo.nets.blocks.flows import above_minus_one

SHAPE, LATENT, BATCH = (1, 4, 4), 3, 7
LOSSES = {"bernoulli": "bce", "gaussian:1": "mse"}
Pairs = list[tuple[Tensor, Tensor]]


class Encoder(BaseEncoder):
    """A copy of our encoder, and a map of its output to what pythae expects."""

    def __init__(self, encoder: nn.Module, head: Callable[[Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        self.net, self.head, self.latent_dim = copy.deepcopy(encoder), head, LATENT

    def forward(self, x: Tensor) -> ModelOutput:
        return ModelOutput(**self.head(self.net(x)))


class Decoder(BaseDecoder):
    """A copy of our decoder, and a map of its output to what pythae expects."""

    def __init__(self, decoder: nn.Module, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.head = copy.deepcopy(decoder), head

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.head(self.net(z)))


class Discriminator(BaseDiscriminator):
    """Copies of the layers of our discriminator, the last of which gives a logit; pythae takes probabilities."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.depth = nn.ModuleList(copy.deepcopy(layer) for layer in layers), len(layers)

    def forward(self, x: Tensor, output_layer_levels: list[int] | None = None) -> ModelOutput:
        found = ModelOutput()
        for i, layer in enumerate(self.layers):
            x = layer(x)
            found[f"embedding_layer_{i + 1}"] = x
        return ModelOutput(embedding=x.sigmoid(), **{k: found[k] for k in found})


def deterministic(out: Tensor) -> dict[str, Tensor]:
    return {"embedding": out}


def gaussian(out: Tensor) -> dict[str, Tensor]:
    mean, log_var = out.chunk(2, dim=1)
    return {"embedding": mean, "log_covariance": log_var}


def identity(out: Tensor) -> Tensor:
    return out


def ours(name: str, **settings: Any) -> Any:
    return aezoo.create_model(name, SHAPE, **{"latent_dim": LATENT, "hidden_dims": (8,), **settings}).double()


def theirs(
    kind: str,
    model: Any,
    head: Callable[[Tensor], dict[str, Tensor]] = gaussian,
    likelihood: str = "bernoulli",
    networks: dict[str, Any] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    **settings: Any,
) -> Any:
    encoder = Encoder(model.encoder, head)
    decoder = Decoder(model.decoder, decode or (torch.sigmoid if likelihood == "bernoulli" else identity))
    if head is not deterministic or kind == "Adversarial_AE":
        settings["reconstruction_loss"] = LOSSES[likelihood]
    kind_class, config_class = getattr(pythae, kind), getattr(pythae, f"{kind}Config", None)
    config = (config_class or getattr(pythae, f"{kind}_Config"))(
        input_dim=tuple(model.input_shape), latent_dim=model.code_shape[0], **settings
    )
    return kind_class(config, encoder, decoder, **(networks or {})).double()


def encoder_pairs(model: Any, other: Any) -> Pairs:
    return [*zip(model.encoder.parameters(), other.encoder.net.parameters(), strict=True)]


def decoder_pairs(model: Any, other: Any) -> Pairs:
    return [*zip(model.decoder.parameters(), other.decoder.net.parameters(), strict=True)]


def pairs(model: Any, other: Any) -> Pairs:
    return encoder_pairs(model, other) + decoder_pairs(model, other)


def constant(model: Any, x: Tensor) -> float:
    """The part of -log p(x|z) that pythae leaves out."""
    return 0.0 if model.likelihood.unit_interval else model.nll(x, x).mean().item()


def named(quantity: str, off: float) -> str:
    return f"{quantity} without constant" if off else quantity


def equal_log_likelihood(row: Comparison, model: Any, other: Any, x: Tensor, n: int = 5) -> None:
    """Importance-sampled log p(x) of each sample."""
    draws = torch.randn(n, len(x), *model.code_shape)
    with noise([draws]):
        found = model.log_likelihood(x, n)
    row.equal(f"log-likelihood by {n} draws", found, [nll_of(other, x[i], n, draws[:, i]) for i in range(len(x))])


def nll_of(other: Any, x: Tensor, n: int, *draws: Tensor) -> float:
    """Their log-likelihood of one sample, which they call nll."""
    with noise(draws):
        return float(other.get_nll(x[None], n_samples=n, batch_size=n))


# ---- plain autoencoders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense_ae", "linear_ae", "conv_ae", "resnet_ae", "unet_ae"])
def test_losses_of_plain_autoencoders(compare, name):
    settings = {"likelihood": "gaussian", "latent_dim": LATENT} | ({} if name == "linear_ae" else {"hidden_dims": (8,)})
    model = aezoo.create_model(name, SHAPE, **settings).double()
    other = theirs("AE", model, deterministic, "gaussian")
    x = torch.rand(BATCH, *SHAPE)
    found, expected, row = model.loss(x), other({"data": x}), compare(name, "pythae", "AE")
    row.equal("loss without constant", found["loss"] - constant(model, x), expected.loss)
    row.equal_gradients(found["loss"], expected.loss, pairs(model, other))
    row.equal("code", model.encode(x), expected.z)
    row.equal("reconstruction", model(x), expected.recon_x)


# ---- Gaussian codes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LOSSES)
@pytest.mark.parametrize(("name", "kind", "beta"), [("vae", "VAE", 1.0), ("beta_vae", "BetaVAE", 4.0)])
def test_beta_vae_losses(compare, name, kind, beta, likelihood):
    model = ours(name, beta=beta, likelihood=likelihood)
    other = theirs(kind, model, likelihood=likelihood, **({} if beta == 1 else {"beta": beta}))
    x, draw = torch.rand(BATCH, *SHAPE), torch.randn(BATCH, LATENT)
    with noise([draw]):
        found = model.loss(x)
    with noise([draw]):
        expected = other({"data": x})
    row, off = compare(name, "pythae", kind), constant(model, x)
    row.equal(named("loss", off), found["loss"] - off, expected.loss)
    row.equal(named("nll", off), found["nll"] - off, expected.recon_loss)
    row.equal("kl", found["kl"], expected.reg_loss)
    row.equal_gradients(found["loss"], expected.loss, pairs(model, other))
    equal_log_likelihood(row, model, other, x)
    with noise([torch.zeros(1, LATENT)] * BATCH):
        at_mean = [other({"data": x_1}) for x_1 in x[:, None]]
    row.equal("code", model.encode(x), torch.cat([one.z for one in at_mean]))
    if beta == 1:
        row.equal(named("score", off), model.score(x) - off, [one.loss.item() for one in at_mean])
    with noise([draw]):
        drawn = model.sample(BATCH)
    with noise([draw]):
        row.equal("samples", drawn, samplers.NormalSampler(other).sample(BATCH))


@pytest.mark.parametrize("steps", [4, 40])
def test_capacity_of_annealed_vae(compare, steps):
    model = ours("annealed_vae", gamma=30.0, max_capacity=5.0, capacity_steps=10, per_sample=True)
    model.steps.fill_(steps)
    other = theirs("DisentangledBetaVAE", model, beta=30.0, C=5.0, warmup_epoch=9)
    x, draw = torch.rand(BATCH, *SHAPE), torch.randn(BATCH, LATENT)
    with noise([draw]):
        found = model.loss(x)
    with noise([draw]):
        expected = other({"data": x}, epoch=steps)
    row = compare("annealed_vae", "pythae", "DisentangledBetaVAE")
    row.equal("loss with per_sample", found["loss"], expected.loss)
    row.equal("nll", found["nll"], expected.recon_loss)
    row.equal("kl", found["kl"], expected.reg_loss)
    row.equal_gradients(found["loss"], expected.loss, pairs(model, other), "gradient with per_sample")
    model.per_sample = False
    # KLs on both sides of the capacity
    model.max_capacity = other.C = float(expected.reg_loss / min(steps / 10, 1))
    with noise([draw]):
        found = model.loss(x)
    with noise([draw]):
        expected = other({"data": x}, epoch=steps)
    reason = "by default the mean KL of the batch is held at C, not that of each sample as in equation 8"
    row.deviates("loss by default", found["loss"], expected.loss, reason, follows="theirs")


@pytest.mark.parametrize(("estimator", "use_mss"), [("mws", False), ("mss", True)])
def test_terms_of_beta_tcvae(compare, estimator, use_mss):
    n_data, weights = 50, {"alpha": 1.5, "beta": 6.0, "gamma": 0.7}
    model = ours("beta_tcvae", estimator=estimator, dataset_size=n_data, **weights)
    other = theirs("BetaTCVAE", model, use_mss=use_mss, **weights)
    x, draw = torch.rand(BATCH, *SHAPE), torch.randn(BATCH, LATENT)
    log_w = model.log_weights(draw, BATCH)
    row = compare("beta_tcvae", "pythae", "BetaTCVAE")
    given = ""
    if use_mss:
        reason = "the weight 1/N of a sample's own posterior is in the first column of their W, not on its diagonal"
        theirs_w = other._log_importance_weight_matrix(BATCH, n_data)
        row.deviates("weights of mss", log_w, theirs_w, f"{reason} as in appendix C.2", follows="ours")
        other._log_importance_weight_matrix = lambda *_: log_w
        given = " of mss with our weights"
    with noise([draw]):
        found = model.loss(x)

    def run() -> ModelOutput:
        with noise([draw]):
            return other({"data": x}, dataset_size=n_data)

    expected = run()
    row.equal(f"loss{given}", found["loss"], expected.loss)
    row.equal("nll", found["nll"], expected.recon_loss)
    row.equal_gradients(found["loss"], expected.loss, pairs(model, other), f"gradient{given}")
    for name, weight in {"mi": "alpha", "tc": "beta", "dwkl": "gamma"}.items():
        other.alpha, other.beta, other.gamma = (float(weight == of) for of in weights)
        row.equal(f"{name}{given}", found[name], run().reg_loss)


def test_losses_of_both_players_of_factor_vae(compare):
    model = ours("factor_vae", gamma=6.0, discriminator_dims=(8, 8))
    other = theirs("FactorVAE", model, gamma=6.0)
    net = copy.deepcopy(model.discriminator)
    # two logits, of which only the difference counts
    other.discriminator = nn.Sequential(net, nn.ConstantPad1d((0, 1), 0.0))
    x, draws = torch.rand(2 * BATCH, *SHAPE), torch.randn(2, BATCH, LATENT)
    with seeded():
        half = torch.randperm(2 * BATCH)[BATCH:]
    with noise([draws[0]]), seeded():
        found = model.loss(x[half])
    with noise(draws), seeded():
        expected = other({"data": x})
    row = compare("factor_vae", "pythae", "FactorVAE")
    row.equal("loss", found["loss"], expected.autoencoder_loss)
    row.equal("nll", found["nll"], expected.recon_loss)
    row.equal_gradients(found["loss"], expected.autoencoder_loss, pairs(model, other))
    reason = "the permuted codes are those of the same samples, not of a second batch as in algorithm 2"
    row.deviates("discriminator", found["discriminator"], expected.discriminator_loss, reason, follows="theirs")
    # both players on the same codes
    mu, log_var = model.posterior(x[half])
    z = mu + torch.exp(0.5 * log_var) * draws[0]
    with seeded():
        permuted = model.permute_dims(z.detach())
    with noise([draws[0]]), seeded():
        found = model.loss(x[half])
    _, _, discriminator = other.loss_function(expected.recon_x, x[half], mu, log_var, z, permuted)
    row.equal("discriminator on the same codes", found["discriminator"], discriminator)
    of_discriminator = [*zip(model.discriminator.parameters(), net.parameters(), strict=True)]
    row.equal_gradients(found["loss"], discriminator, of_discriminator, "gradient of discriminator")
    sgd = SimpleNamespace(
        autoencoder_optimizer=torch.optim.SGD([*other.encoder.parameters(), *other.decoder.parameters()], lr=0.0),
        discriminator_optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
    )
    AdversarialTrainer._optimizers_step(sgd, expected)
    found["loss"].backward()
    stepped = [torch.cat([p.grad.flatten() for p in of.parameters()]) for of in (model.encoder, other.encoder)]
    reason = "their z is not detached in the discriminator's loss, whose gradient their trainer adds to the encoder's"
    row.deviates("gradient of the encoder in a step", *stepped, f"{reason}, unlike algorithm 2", follows="ours")


@pytest.mark.parametrize("kernel", ["inverse_multiquadratic", "rbf"])
@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_kernels_of_info_vae(compare, kernel, alpha):
    model = ours("info_vae", alpha=alpha, mmd_weight=50.0, kernel=kernel, bandwidth=1.3)
    choice = {"inverse_multiquadratic": "imq", "rbf": "rbf"}[kernel]
    other = theirs("INFOVAE_MMD", model, alpha=alpha, lbd=50.0, kernel_choice=choice, kernel_bandwidth=1.3, scales=None)
    x, draws = torch.rand(BATCH, *SHAPE), torch.randn(2, BATCH, LATENT)

    def run(of: Callable[[], Any]) -> Any:
        with noise(draws):
            return of()

    expected = run(lambda: other({"data": x}))
    row = compare("info_vae", "pythae", "INFOVAE_MMD")
    reason = "the V-statistic of the MMD, with the pairs of a sample with itself, as theirs is without; the paper"
    found = run(lambda: model.loss(x))
    row.deviates("mmd", found["mmd"], expected.mmd_loss, f"{reason} names neither", follows="both")
    row.equal("nll", found["nll"], expected.recon_loss)
    row.equal("kl", found["kl"], expected.reg_loss)
    model.mmd = partial(divergences.mmd, kernel=model.k, unbiased=True)
    found = run(lambda: model.loss(x))
    row.equal("mmd as U-statistic", found["mmd"], expected.mmd_loss)
    row.equal("loss with the U-statistic", found["loss"], expected.loss)
    row.equal_gradients(found["loss"], expected.loss, pairs(model, other), "gradient with the U-statistic")


@pytest.mark.parametrize(("kernel", "scales"), [("inverse_multiquadratic", None), ("rbf", (1.0,))])
def test_losses_of_wae_mmd(compare, kernel, scales):
    model = ours("wae_mmd", mmd_weight=10.0, kernel=kernel, **({"kernel_scales": scales} if scales else {}))
    choice = {"inverse_multiquadratic": "imq", "rbf": "rbf"}[kernel]
    other = theirs("WAE_MMD", model, deterministic, "gaussian", kernel_choice=choice, reg_weight=10.0)
    x, draw = torch.rand(BATCH, *SHAPE), torch.randn(BATCH, LATENT)
    with noise([draw]):
        found = model.loss(x)
    with noise([draw]):
        expected = other({"data": x})
    row, off = compare("wae_mmd", "pythae", "WAE_MMD"), constant(model, x)
    row.equal("loss without constant", found["loss"] - off, expected.loss)
    row.equal("nll without constant", found["nll"] - off, expected.recon_loss)
    row.equal("mmd", found["mmd"], expected.mmd_loss)
    row.equal_gradients(found["loss"], expected.loss, pairs(model, other))
    row.equal("code", model.encode(x), expected.z)
    with noise([draw]):
        drawn = model.sample(BATCH)
    with noise([draw]):
        row.equal("samples", drawn, samplers.NormalSampler(other).sample(BATCH))


# ---- adversaries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [False, True], ids=["deterministic", "gaussian"])
@pytest.mark.parametrize(("name", "likelihood"), [("aae", "bernoulli"), ("wae_gan", "gaussian:1")])
def test_losses_of_both_players_of_aae(compare, name, likelihood, drawn):
    settings = {"adversarial_weight": 0.7, "discriminator_dims": (8, 8), "gaussian_posterior": drawn}
    model = ours(name, likelihood=likelihood, **settings)

    def head(out: Tensor) -> dict[str, Tensor]:
        return gaussian(out) if drawn else {"embedding": out, "log_covariance": torch.zeros_like(out)}

    networks = {"discriminator": Discriminator(model.discriminator)}
    settings = {"adversarial_loss_scale": 0.7, "deterministic_posterior": not drawn}
    other = theirs("Adversarial_AE", model, head, likelihood, networks, **settings)
    x, draws = torch.rand(BATCH, *SHAPE), torch.randn(2, BATCH, LATENT)
    with noise(draws[0 if drawn else 1 :]):
        found = model.loss(x)
    with noise(draws):
        expected = other({"data": x})
    row, off = compare(name, "pythae", "Adversarial_AE"), constant(model, x)
    of = " with gaussian_posterior" if drawn else ""
    row.equal(named("loss", off) + of, found["loss"] - off, expected.autoencoder_loss)
    row.equal(named("nll", off) + of, found["nll"] - off, expected.recon_loss)
    row.equal(f"discriminator{of}", found["discriminator"], expected.discriminator_loss)
    row.equal_gradients(found["loss"], expected.autoencoder_loss, pairs(model, other), f"gradient{of}")
    of_discriminator = [*zip(model.discriminator.parameters(), other.discriminator.parameters(), strict=True)]
    quantity = f"gradient of discriminator{of}"
    row.equal_gradients(found["loss"], expected.discriminator_loss, of_discriminator, quantity)
    if not drawn:
        row.equal("code", model.encode(x), expected.z)


def test_losses_of_three_players_of_vae_gan(compare):
    share = 0.6
    model = ours("vae_gan", gamma=(1 - share) / share, discriminator_dims=(8,))
    networks = {"discriminator": Discriminator(*model.discriminator.values())}
    other = theirs("VAEGAN", model, networks=networks, adversarial_loss_scale=share, reconstruction_layer=1)
    x, draws = torch.rand(BATCH, *SHAPE), torch.randn(2, BATCH, LATENT)

    def run(of: Callable[[], Any]) -> Any:
        with noise(draws):
            return of()

    expected, row = run(lambda: other({"data": x})), compare("vae_gan", "pythae", "VAEGAN")
    found = run(lambda: model.loss(x))
    reason = (
        "s^2 is the features' variance, not 1; theirs lacks the batch normalisation that makes it 1 for the authors"
    )
    row.deviates("feature_nll", found["feature_nll"], expected.recon_loss, reason, follows="theirs")
    reason = "theirs leaves log(1 - Dis(x~)), the term of reconstructions, out of algorithm 1"
    row.deviates("discriminator", found["discriminator"], expected.discriminator_loss, reason, follows="ours")
    model.variance = lambda f_BF: torch.ones(())
    found = run(lambda: model.loss(x))
    row.equal("loss at variance 1", found["loss"], expected.encoder_loss)
    row.equal("feature_nll at variance 1", found["feature_nll"], expected.recon_loss)
    row.equal("kl", found["kl"], expected.encoder_loss - expected.recon_loss)
    quantity = "gradient of encoder at variance 1"
    row.equal_gradients(found["loss"], expected.encoder_loss, encoder_pairs(model, other), quantity)
    left_out = nn.functional.binary_cross_entropy(
        other.discriminator(expected.recon_x).embedding, torch.zeros(BATCH, 1)
    )
    discriminator = expected.discriminator_loss + left_out
    row.equal("discriminator with that term", found["discriminator"], discriminator)
    of_discriminator = [*zip(model.discriminator.parameters(), other.discriminator.parameters(), strict=True)]
    quantity = "gradient of discriminator with that term"
    row.equal_gradients(found["loss"], discriminator, of_discriminator, quantity)
    row.equal_gradients(
        found["loss"],
        expected.decoder_loss - share * left_out,
        decoder_pairs(model, other),
        "gradient of decoder with that term",
        1 / share,
        "L_GAN has the weight 1 and the reconstruction gamma; theirs are weights of a mean, gamma = (1 - s) / s",
    )


# ---- priors and importance weights -----------------------------------------------------------------------------------


class PseudoInputs(nn.Module):
    """Copies of our pseudo-inputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pseudo_K, self.squash = copy.deepcopy(model.pseudo_K), model.likelihood.unit_interval

    def forward(self, _: Tensor) -> Tensor:
        return self.pseudo_K.sigmoid() if self.squash else self.pseudo_K


@pytest.mark.parametrize("likelihood", LOSSES)
def test_prior_of_vamp_vae(compare, likelihood):
    model = ours("vamp_vae", n_components=4, data_init=False, likelihood=likelihood)
    other = theirs("VAMP", model, likelihood=likelihood, number_components=4, linear_scheduling_steps=0)
    row = compare("vamp_vae", "pythae", "VAMP")
    if model.likelihood.unit_interval:
        other.pseudo_inputs[0].weight.data.copy_(model.pseudo_K.detach().flatten(1).T)
        other.pseudo_inputs[0].bias.data.zero_()
        reason = "a sigmoid of their parameters, not the hardtanh of the authors' code, whose gradient may be 0"
        theirs_K = other.pseudo_inputs(other.idle_input.double())
        row.deviates("pseudo-inputs", model.pseudo_inputs().flatten(1), theirs_K, reason, follows="theirs")
    other.pseudo_inputs = PseudoInputs(model)
    x, draw = torch.rand(BATCH, *SHAPE), torch.randn(BATCH, LATENT)
    with noise([draw[None]]):
        found = model.loss(x)
    with noise([draw]):
        expected = other({"data": x})
    off = constant(model, x)
    row.equal(named("loss", off), found["loss"] - off, expected.loss)
    row.equal(named("nll", off), found["nll"] - off, expected.recon_loss)
    row.equal("kl", found["kl"], expected.reg_loss)
    both = [*pairs(model, other), (model.pseudo_K, other.pseudo_inputs.pseudo_K)]
    row.equal_gradients(found["loss"], expected.loss, both)
    equal_log_likelihood(row, model, other, x)
    of_constant = 0.5 * LATENT * math.log(2 * math.pi)
    row.equal("log-density of the prior without constant", model.log_prior(draw) + of_constant, other._log_p_z(draw))


VALUE = "the value is the bound, of which theirs has only the gradient: it is minus the sum of w~ log w"


@pytest.mark.parametrize("likelihood", LOSSES)
@pytest.mark.parametrize(("name", "kind", "beta"), [("iwae", "IWAE", None), ("ciwae", "CIWAE", 0.3)])
def test_gradients_of_iwae(compare, name, kind, beta, likelihood):
    k, settings = 4, {} if beta is None else {"beta": beta}
    model = ours(name, n_samples=k, likelihood=likelihood, **settings)
    other = theirs(kind, model, likelihood=likelihood, number_samples=k, **settings)
    x, draw = torch.rand(BATCH, *SHAPE), torch.randn(BATCH, k, LATENT)
    with noise([draw]):
        found = model.loss(x)
    with noise([draw]):
        expected = other({"data": x})
    row, off = compare(name, "pythae", kind), constant(model, x)
    row.equal(named("nll", off), found["nll"] - off, expected.recon_loss.mean())
    row.equal("kl", found["kl"], expected.reg_loss.mean())
    row.deviates(named("loss", off), found["loss"] - off, expected.loss, VALUE, follows="ours")
    row.equal_gradients(found["loss"], expected.loss, pairs(model, other))
    equal_log_likelihood(row, model, other, x)
    if beta is not None:
        model.beta = other.beta = 1.0
        with noise([draw]):
            found = model.loss(x)
        with noise([draw]):
            expected = other({"data": x})
        row.equal(f"{named('loss', off)}, beta 1", found["loss"] - off, expected.loss)


GROUPS = "their weights are normalised over the M groups instead of the K samples of a group"


@pytest.mark.parametrize("likelihood", LOSSES)
def test_gradients_of_miwae(compare, likelihood):
    m, k = 2, 4
    model = ours("miwae", n_groups=m, n_samples=k, likelihood=likelihood)
    x, draw = torch.rand(BATCH, *SHAPE), torch.randn(BATCH, m, k, LATENT)
    with noise([draw.flatten(1, 2)]):
        found = model.loss(x)
    row, off = compare("miwae", "pythae", "MIWAE"), constant(model, x)
    settings = {"number_gradient_estimates": m, "number_samples": k}
    other = theirs("MIWAE", model, likelihood=likelihood, **settings)
    with noise([draw]):
        expected = other({"data": x})
    row.deviates(named("loss", off), found["loss"] - off, expected.loss, f"{GROUPS}; {VALUE}", follows="ours")
    row.equal(named("nll", off), found["nll"] - off, expected.recon_loss.mean())
    row.equal("kl", found["kl"], expected.reg_loss.mean())
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*of.parameters()], retain_graph=True)])
        for loss, of in ((found["loss"], model.encoder), (expected.loss, other.encoder))
    ]
    row.deviates("gradient of encoder", *gradients, GROUPS, follows="ours")
    settings = {"number_gradient_estimates": k, "number_samples": m}
    other = theirs("MIWAE", model, likelihood=likelihood, **settings)
    with noise([draw.transpose(1, 2)]):
        expected = other({"data": x})
    row.equal_gradients(found["loss"], expected.loss, pairs(model, other), "gradient, M and K of theirs exchanged")
    equal_log_likelihood(row, model, other, x)


@pytest.mark.parametrize("likelihood", LOSSES)
def test_gradients_of_both_networks_of_piwae(compare, likelihood):
    m, k = 2, 4
    model = ours("piwae", n_groups=m, n_samples=k, likelihood=likelihood)
    settings = {"number_gradient_estimates": k, "number_samples": m}
    other = theirs("PIWAE", model, likelihood=likelihood, **settings)
    x, draw = torch.rand(BATCH, *SHAPE), torch.randn(BATCH, m, k, LATENT)
    with noise([draw.flatten(1, 2)]):
        found = model.loss(x)
    with noise([draw.transpose(1, 2)]):
        expected = other({"data": x})
    row, off = compare("piwae", "pythae", "PIWAE"), constant(model, x)
    row.equal(named("nll", off), found["nll"] - off, expected.recon_loss.mean())
    row.equal("kl", found["kl"], expected.reg_loss.mean())
    row.deviates(named("loss", off), found["loss"] - off, expected.decoder_loss, VALUE, follows="ours")
    quantity = "gradient of encoder, M and K of theirs exchanged"
    row.equal_gradients(found["loss"], expected.encoder_loss, encoder_pairs(model, other), quantity)
    quantity = "gradient of decoder"
    row.equal_gradients(found["loss"], expected.decoder_loss, decoder_pairs(model, other), quantity)
    equal_log_likelihood(row, model, other, x)


# ---- Hamiltonian dynamics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LOSSES)
def test_leapfrog_steps_of_hvae(compare, likelihood):
    # get_nll takes images of this size only
    shape, n, beta_0 = (1, 28, 28), 5, 0.3
    settings = {"n_leapfrog": 3, "step_size": 0.05, "beta_0": beta_0, "likelihood": likelihood}
    model = aezoo.create_model("hvae", shape, latent_dim=LATENT, hidden_dims=(8,), **settings).double()
    other = theirs("HVAE", model, likelihood=likelihood, decode=identity, n_lf=3, eps_lf=0.05, beta_zero=beta_0)
    x, draws = torch.rand(2, *shape).round(), torch.randn(2, n, 2, LATENT)
    row, off = compare("hvae", "pythae", "HVAE"), constant(model, x)
    row.equal("cooling", model.cooling[1:], [other._tempering(k, 3).item() for k in (1, 2, 3)])
    z = draws[0, 0].clone().requires_grad_()
    row.equal("gradient of the potential", model.potential_gradient(x, z), other._dU_dz(z, x))
    with noise(draws[:, 0]):
        expected = other({"data": x}).loss
    with noise([torch.cat([*draws[:, 0]], 1)]):
        found = model.loss(x)["loss"] - off
    reason = (
        "their forward takes softplus of the log-variance as the deviation, steps along rho before its half step, does"
        " not cool it and leaves |gamma|^2 out"
    )
    row.deviates(named("loss", off), found, expected, reason, follows="ours")
    reached: list[Tensor] = []
    other.decoder.register_forward_hook(lambda _, inputs, __: reached.append(inputs[0]))
    nll, weighted = [], []
    for i in range(len(x)):
        with noise(draws[:, :, i : i + 1]):
            z, log_q = model.sample_posterior(x[i : i + 1], n)
        nll.append(nll_of(other, x[i], n, *draws[:, :, i]))
        row.equal("z_K in get_nll", z[:, 0], reached[-1])
        log_w = model.log_prior(z) - log_q - model.nll(model.decoder(z[:, 0]), x[[i] * n])[:, None]
        # log q holds (|rho|^2 - |gamma|^2) / 2
        _, log_var = model.posterior(x[i : i + 1])
        log_q_0 = -0.5 * (draws[0, :, i] ** 2 + log_var + math.log(2 * math.pi)).sum(1)
        gamma_2 = (draws[1, :, i] ** 2).sum(1)
        rho_2 = 2 * (log_q[:, 0] - log_q_0) + gamma_2
        exchanged = log_w[:, 0] + 0.5 * (math.sqrt(beta_0) * rho_2 - gamma_2)
        weighted.append((torch.logsumexp(exchanged, 0) - math.log(n)).item())
    with noise(draws):
        found = model.log_likelihood(x, n)
    reason = "their weight has sqrt(beta_0) |rho_K|^2 in the place of |gamma|^2, the density of rho_0"
    row.deviates(named("log-likelihood", off), found + off, nll, reason, follows="ours")
    row.equal(named("log-likelihood with that exchanged", off), torch.tensor(weighted) + off, nll)


def metric_of(model: Any, other: Any) -> nn.Module:
    """Give theirs our centroids, a copy of our metric's network, which is returned, and their own metric of these."""
    net = copy.deepcopy(model.metric)
    other.centroids_tens, other.M_tens = model.centroids_MD.clone(), net(model.centroids_MD)
    other.G, other.G_inv = create_metric(other), create_inverse_metric(other)
    return net


def turned(inverse: Tensor, gamma: Tensor) -> Tensor:
    """The noise for which L of G = L L' gives our momentum, which has another root: (B, D, D), (B, D) -> (B, D)."""
    momentum = torch.linalg.solve_triangular(torch.linalg.cholesky(inverse).mT, gamma[..., None], upper=True)
    return torch.linalg.solve(torch.linalg.cholesky(torch.linalg.inv(inverse)), momentum)[..., 0]


def partial_first_step(other: Any) -> Callable[..., Tensor]:
    """Their first step at a z of its own, on which rho does not depend."""
    step = other._leap_step_1

    def first(recon_x: Tensor, x: Tensor, z: Tensor, rho: Tensor, G_inv: Tensor, G_log_det: Tensor) -> Tensor:
        at = z.view_as(z)
        inverse = other.G_inv(at)
        found: Tensor = step(other.decoder(at).reconstruction, x, at, rho, inverse, -torch.logdet(inverse))
        return found

    return first


def implicit_second_step(other: Any) -> Callable[..., Tensor]:
    """Their second step with the metric of each iterate, of which the first is where ours starts its three."""

    def step(recon_x: Tensor, x: Tensor, z: Tensor, rho: Tensor, G_inv: Tensor, G_log_det: Tensor) -> Tensor:
        def velocity(at: Tensor) -> Tensor:
            return (other.G_inv(at) @ rho[..., None])[..., 0]

        moved = z
        for _ in range(4):
            moved = z + other.eps_lf / 2 * (velocity(z) + velocity(moved))
        return moved

    return step


BETA_0 = 0.3


def rhvae(n_steps: int, temperature: float) -> tuple[Any, Any, Pairs]:
    """Ours, theirs with our metric, and pairs of all parameters."""
    settings = {"n_centroids": 5, "metric_floor": 0.1, "step_size": 0.2, "beta_0": BETA_0}
    model = ours("rhvae", n_leapfrog=n_steps, temperature=temperature, **settings).eval()
    # they do not take the root of beta_zero
    settings = {"n_lf": n_steps, "beta_zero": math.sqrt(BETA_0), "regularization": 0.1}
    other = theirs("RHVAE", model, temperature=temperature, **settings).eval()
    net, step_D = metric_of(model, other), model.step_D.detach().clone().requires_grad_()
    other.eps_lf = 0.5 * torch.sigmoid(step_D)
    of_metric = zip(model.metric.parameters(), net.parameters(), strict=True)
    return model, other, [*pairs(model, other), *of_metric, (model.step_D, step_D)]


def start(other: Any, x: Tensor, eps: Tensor) -> Tensor:
    out = other.encoder(x)
    drawn: Tensor = out.embedding + torch.exp(0.5 * out.log_covariance) * eps
    return drawn


LEFT_OUT = "theirs leaves out log N(rho_0; 0, G(z_0)), which depends on the encoder and the metric"


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "curved"])
def test_generalised_leapfrog_steps_of_rhvae(compare, flat):
    model, other, _ = rhvae(3, 1e6 if flat else 1.5)
    x, eps, gamma = torch.rand(BATCH, *SHAPE), torch.randn(BATCH, LATENT), torch.randn(BATCH, LATENT)
    z_0 = start(other, x, eps)
    inverse = other.G_inv(z_0)
    row = compare("rhvae", "pythae", "RHVAE")
    row.equal("inverse metric", model.current_metric().inverse(z_0), inverse)

    def run() -> ModelOutput:
        with noise([eps, turned(inverse, gamma)]):
            return other({"data": x})

    z_K, _ = model.flow(x, z_0, gamma)
    of_first = "the first step of theirs takes the derivative of H by z through rho, too"
    of_second = "and the second has the metric of z on both sides, so that it is not implicit"
    where = "flat space" if flat else "curved space"
    row.deviates(f"z_K, {where}", z_K, run().z, of_first if flat else f"{of_first}, {of_second}", follows="ours")
    other._leap_step_1 = partial_first_step(other)
    where += ", the first step mended"
    if not flat:
        other._leap_step_2 = implicit_second_step(other)
        where = "curved space, both steps mended"
    with noise([torch.cat([eps, gamma], 1)]):
        found = model.loss(x)["loss"]
    expected = run()
    row.equal(f"z_K, {where}", z_K, expected.z)
    row.deviates(f"loss, {where}", found, expected.loss, LEFT_OUT, follows="ours")
    of_start = 0.5 * (-torch.logdet(inverse) + (gamma**2).sum(1)).mean()
    row.equal(f"loss with that term, {where}", found, expected.loss - of_start)
    draws, nll = torch.randn(2, 4, BATCH, LATENT), []
    with noise(draws):
        found = model.log_likelihood(x, 4)
    for i in range(BATCH):
        root = turned(other.G_inv(start(other, x[i : i + 1], draws[0, :, i])), draws[1, :, i])
        # they draw gamma twice
        nll.append(nll_of(other, x[i], 4, draws[0, :, i], draws[1, :, i], root))
    reason = "theirs leaves out the volume by which cooling scales, sqrt(beta_0)^D"
    row.deviates(f"log-likelihood, {where}", found, nll, reason, follows="ours")
    volume = 0.5 * LATENT * math.log(BETA_0)
    row.equal(f"log-likelihood with that factor, {where}", found, torch.tensor(nll) + volume)


def test_gradients_of_rhvae(compare):
    model, other, both = rhvae(1, 1e6)
    x, eps, gamma = torch.rand(BATCH, *SHAPE), torch.randn(BATCH, LATENT), torch.randn(BATCH, LATENT)
    inverse = other.G_inv(start(other, x, eps))
    with noise([eps, turned(inverse, gamma)]):
        expected = other({"data": x}).loss
    expected = expected - 0.5 * (-torch.logdet(inverse) + (gamma**2).sum(1)).mean()

    def run() -> Tensor:
        with noise([torch.cat([eps, gamma], 1)]):
            return model.loss(x)["loss"]

    row, reason = (
        compare("rhvae", "pythae", "RHVAE"),
        "theirs holds the derivatives of H constant in the first two steps",
    )
    of_decoders = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*of.parameters()], retain_graph=True)])
        for loss, of in ((run(), model.decoder), (expected, other.decoder))
    ]
    row.deviates("gradient of decoder, one step in flat space", *of_decoders, reason, follows="ours")
    potential, velocity, calls = model.potential_gradient, hamiltonian.velocity, []

    def held(*at: Tensor) -> Tensor:
        calls.append(at)
        found: Tensor = potential(*at)
        return found.detach() if len(calls) == 1 else found

    model.potential_gradient = held
    with mock.patch.object(hamiltonian, "velocity", lambda *at: velocity(*at).detach()):
        row.equal_gradients(run(), expected, both, "gradient with these held, one step in flat space")


def test_samples_of_rhvae(compare):
    row = compare("rhvae", "pythae", "RHVAESampler")
    for size in (1, LATENT):
        settings = {"latent_dim": size, "n_centroids": 5, "metric_floor": 0.1}
        model = ours("rhvae", **settings).eval()
        other = theirs("RHVAE", model, regularization=0.1).eval()
        metric_of(model, other)
        other.M_tens = other.M_tens.detach()
        metric, at = model.current_metric(), model.centroids_MD[:2] + 0.3
        log_density = partial(RHVAESampler.log_sqrt_det_G_inv, model=other)
        quantity = f"log-density of codes, D = {size}"
        row.equal(quantity, -half_log_det(metric.inverse(at)), log_density(at), 1e-8)
        exact = torch.func.grad(lambda z, metric=metric: -half_log_det(metric.inverse(z)).sum())(at)
        theirs_g = RHVAESampler.grad_log_prop(at, other)[..., 0]
        quantity = f"gradient of the log-density, D = {size}"
        if size > 1:
            reason = "theirs multiplies G and the M_i, of whose products the gradient of log det has the traces"
            row.deviates(quantity, exact, theirs_g, reason, follows="ours")
            continue
        row.equal(quantity, exact, theirs_g)
        # the constants of our sampler
        settings = {"mcmc_steps_nbr": 30, "n_lf": 10, "eps_lf": 0.05 * model.temperature}
        sampler = RHVAESampler(other, samplers.RHVAESamplerConfig(**settings))
        with seeded():
            drawn = model.sample(BATCH)
        with seeded():
            row.equal("samples, D = 1", drawn, sampler.sample(BATCH))


# ---- curved codes ----------------------------------------------------------------------------------------------------


def concentrated(offset: float) -> Callable[[Tensor], dict[str, Tensor]]:
    """Mean direction, and the parameter of which theirs makes our concentration: softplus plus an offset."""

    def head(out: Tensor) -> dict[str, Tensor]:
        kappa = LATENT * nn.functional.softplus(out[:, -1:])
        return {"embedding": out[:, :-1], "log_concentration": torch.log(torch.expm1(kappa - offset))}

    return head


@pytest.mark.parametrize("likelihood", LOSSES)
def test_losses_of_hyperspherical_vae(compare, likelihood):
    model = ours("hyperspherical_vae", posterior="vmf", likelihood=likelihood)
    other = theirs("SVAE", model, concentrated(1.0), likelihood)
    x, n = torch.rand(BATCH, *SHAPE), 5
    z = nn.functional.normalize(torch.randn(n, BATCH, LATENT), dim=2)
    model.family.sample, other._sample_von_mises = (lambda *_: z[0]), (lambda *_: z[0])
    found, expected = model.loss(x), other({"data": x})
    row, off = compare("hyperspherical_vae", "pythae", "SVAE"), constant(model, x)
    row.equal(named("loss", off), found["loss"] - off, expected.loss)
    row.equal(named("nll", off), found["nll"] - off, expected.recon_loss)
    row.equal("kl", found["kl"], expected.reg_loss)
    row.equal_gradients(found["loss"], expected.loss, pairs(model, other), "gradient for given draws")
    model.family.sample, other.encoder.head = (lambda *_: z), concentrated(0.0)
    nll = []
    for i in range(BATCH):
        other._sample_von_mises = lambda *_, i=i: z[:, i]
        nll.append(nll_of(other, x[i], n))
    quantity = named(f"log-likelihood for {n} given draws", off)
    row.equal(quantity, model.log_likelihood(x, n) + off, torch.tensor(nll) + off)
    other.encoder.head = lambda out: {"embedding": out[:, :-1], "log_concentration": out[:, -1:]}
    taken: list[Tensor] = []
    other._sample_von_mises = lambda _, kappa: taken.append(kappa) or z[0]
    other({"data": x})
    reason = (
        "D softplus(out), so that draws tend towards mu in any D; theirs, of the authors' code, is softplus(out) + 1"
    )
    row.deviates(
        "concentration", model.posterior(x)[1][:, :1], taken[0], f"{reason}; the paper has no formula", follows="both"
    )


def test_draws_of_hyperspherical_vae(compare):
    d, n = 5, 50_000
    model = ours("hyperspherical_vae", posterior="vmf", latent_dim=d)
    other = theirs("SVAE", model)
    row, draw = compare("hyperspherical_vae", "pythae", "SVAE"), torch.randn(BATCH, d)
    with noise([draw]):
        drawn = model.sample(BATCH)
    with noise([draw]):
        row.equal("samples", drawn, samplers.HypersphereUniformSampler(other).sample(BATCH))
    mu, kappa = nn.functional.normalize(torch.ones(n, d), dim=1), torch.full((n, 1), 2.0, requires_grad=True)
    drawn = (model.family.sample(mu, kappa[:, 0]), other._sample_von_mises(mu, kappa))
    slopes = [torch.autograd.grad((z * mu).sum(1).mean(), kappa)[0].sum() for z in drawn]
    reason = "ours is exact; theirs goes through accepted draws only, without the correction g_cor of appendix D"
    row.deviates("mean gradient of cos theta by kappa", *slopes, reason, follows="ours")


@pytest.mark.parametrize("likelihood", LOSSES)
@pytest.mark.parametrize("curvature", [1.0, 0.4])
def test_losses_of_poincare_vae(compare, curvature, likelihood):
    model = ours("poincare_vae", curvature=curvature, likelihood=likelihood)

    def head(out: Tensor) -> dict[str, Tensor]:
        mean, log_var = out.chunk(2, dim=1)
        return {"embedding": model.ball.from_normal(mean), "log_covariance": log_var}

    other = theirs("PoincareVAE", model, head, likelihood, curvature=curvature)
    x = torch.rand(BATCH, *SHAPE)
    with seeded():
        found = model.loss(x)
    with seeded():
        expected = other({"data": x})
    row, off = compare("poincare_vae", "pythae", "PoincareVAE"), constant(model, x)
    row.equal(named("loss", off), found["loss"] - off, expected.loss)
    row.equal(named("nll", off), found["nll"] - off, expected.recon_loss)
    row.equal("kl", found["kl"], expected.reg_loss)
    row.equal_gradients(found["loss"], expected.loss, pairs(model, other))
    row.equal("code", model.encode(x), other.encoder(x).embedding)
    likelihoods: tuple[list[float], list[float]] = ([], [])
    for x_1 in x:
        with seeded():
            likelihoods[0].append(model.log_likelihood(x_1[None], 5).item())
        with seeded():
            likelihoods[1].append(nll_of(other, x_1, 5))
    row.equal("log-likelihood by 5 draws", *likelihoods)
    with seeded():
        drawn = model.sample(BATCH)
    with seeded():
        row.equal("samples", drawn, samplers.PoincareDiskSampler(other).sample(BATCH))


# ---- flows -----------------------------------------------------------------------------------------------------------


def drawn_bound(model: Any, x: Tensor) -> Tensor:
    """-log p(x|z) + log q(z|x) - log p(z) of one draw, with its gradient."""
    return -type(model).log_likelihood.__wrapped__(model, x, 1).mean()


DRAWN = "the KL of q_0 is the closed form and not that of the draw, which has the same mean"


@pytest.mark.parametrize("likelihood", LOSSES)
def test_radial_flow_of_vae_flow(compare, likelihood):
    model = ours("vae_flow", flow="radial", n_flows=2, likelihood=likelihood)
    other = theirs("VAE_LinNF", model, likelihood=likelihood, flows=["Radial", "Radial"])

    def head(out: Tensor) -> dict[str, Tensor]:
        mean, log_var, *steps = out.split([LATENT, LATENT, *[LATENT, 1, 1] * 2], 1)
        for layer, (x0, a, b) in zip(other.net, (steps[:3], steps[3:]), strict=True):
            a = nn.functional.softplus(a) + 1e-3
            set_tensors(layer, x0=x0, log_alpha=a.log(), beta=torch.log(torch.expm1(a * (1 + above_minus_one(b)))))
        return {"embedding": mean, "log_covariance": log_var}

    other.encoder.head = head
    equal_flows(compare("vae_flow", "pythae", "VAE_LinNF (radial)"), model, other, torch.rand(BATCH, *SHAPE))


def test_planar_flow_of_vae_flow(compare):
    model = ours("vae_flow", flow="planar", n_flows=2)
    other = theirs("VAE_LinNF", model, flows=["Planar", "Planar"])

    def head(out: Tensor) -> dict[str, Tensor]:
        mean, log_var, *steps = out.split([LATENT, LATENT, *[LATENT, LATENT, 1] * 2], 1)
        for layer, (u, w, b) in zip(other.net, (steps[:3], steps[3:]), strict=True):
            # theirs takes u for u', which makes the step invertible
            w_u = (w * u).sum(1, keepdim=True)
            u = u + (above_minus_one(w_u) - w_u) * w / (w**2).sum(1, keepdim=True)
            # the parameters of a batch of one
            set_tensors(layer, u=u[:1], w=w[:1], b=b[0])
        return {"embedding": mean, "log_covariance": log_var}

    other.encoder.head = head
    row, x, draw = compare("vae_flow", "pythae", "VAE_LinNF (planar)"), torch.rand(1, *SHAPE), torch.randn(1, LATENT)
    with noise([draw[None]]):
        found = drawn_bound(model, x)
    with noise([draw]):
        expected = other({"data": x})
    log = torch.log
    with mock.patch("torch.log", lambda at: log(at - 1e-4)):
        equal_flows(row, model, other, x, " without that")
    with noise([draw]):
        nll = model.loss(x)["nll"]
    reason = "theirs adds 1e-4 to |det| in the logarithm"
    row.deviates("kl of that draw", found - nll, expected.reg_loss, reason, follows="ours")


def set_tensors(layer: nn.Module, **tensors: Tensor) -> None:
    """Give a layer tensors in the place of its parameters."""
    for name, tensor in tensors.items():
        layer._parameters.pop(name, None)
        setattr(layer, name, tensor)


def equal_flows(row: Comparison, model: Any, other: Any, x: Tensor, of: str = "") -> None:
    """The bound by the KL of a draw, its terms and gradients, and log-likelihoods."""
    draw, off = torch.randn(len(x), LATENT), constant(model, x)
    with noise([draw[None]]):
        found = drawn_bound(model, x)
    with noise([draw]):
        terms = model.loss(x)
    with noise([draw]):
        expected = other({"data": x})
    row.equal(named("nll", off) + of, terms["nll"] - off, expected.recon_loss)
    row.deviates(f"kl{of}", terms["kl"], expected.reg_loss, DRAWN, follows="both")
    row.equal(named(f"loss by that draw{of}", off), found - off, expected.loss)
    row.equal_gradients(found, expected.loss, pairs(model, other), f"gradient by that draw{of}")
    equal_log_likelihood(row, model, other, x)
