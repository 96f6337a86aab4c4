"""Losses of pythae around copies of our networks: Gaussian codes."""

import copy
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparison import noise, seeded
from pythae import samplers
from pythae.models.base.base_utils import ModelOutput
from pythae.trainers import AdversarialTrainer
from pythae_copies import (
    BATCH,
    LATENT,
    LOSSES,
    SHAPE,
    Discriminator,
    constant,
    decoder_pairs,
    deterministic,
    encoder_pairs,
    equal_log_likelihood,
    gaussian,
    named,
    ours,
    pairs,
    theirs,
)
from torch import Tensor, nn

import aezoo
from aezoo.distributions import divergences

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
    model = ours("annealed_vae", gamma=30.0, capacity_steps=10, per_sample=True)
    model.steps.fill_(steps)
    other = theirs("DisentangledBetaVAE", model, beta=30.0, warmup_epoch=9)
    x, draw = torch.rand(BATCH, *SHAPE), torch.randn(BATCH, LATENT)
    # KLs of samples on both sides of C
    model.max_capacity = other.C = float(model.kl(*model.posterior(x)).mean() / min(steps / 10, 1))
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
    with noise([draw]):
        found = model.loss(x)
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
    # two logits, of which only the difference matters
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
    row.equal("discriminator, theirs with log(1 - Dis(x~))", found["discriminator"], discriminator)
    of_discriminator = [*zip(model.discriminator.parameters(), other.discriminator.parameters(), strict=True)]
    quantity = "gradient of discriminator, theirs with log(1 - Dis(x~))"
    row.equal_gradients(found["loss"], discriminator, of_discriminator, quantity)
    row.equal_gradients(
        found["loss"],
        expected.decoder_loss - share * left_out,
        decoder_pairs(model, other),
        "gradient of decoder, theirs with log(1 - Dis(x~))",
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
    x, draw = torch.rand(BATCH, *SHAPE), 2 * torch.randn(BATCH, m, k, LATENT)
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
