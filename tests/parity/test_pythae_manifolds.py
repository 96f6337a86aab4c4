"""Losses of pythae around copies of our networks: Hamiltonian dynamics and curved codes."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from comparison import noise, seeded
from pythae import samplers
from pythae.models.base.base_utils import ModelOutput
from pythae.models.rhvae.rhvae_utils import create_inverse_metric, create_metric
from pythae.samplers import RHVAESampler
from pythae_copies import BATCH, LATENT, LOSSES, SHAPE, Pairs, constant, identity, named, nll_of, ours, pairs, theirs
from torch import Tensor, nn

import aezoo
from aezoo.manifolds import hamiltonian
from aezoo.manifolds.riemannian import half_log_det

BETA_0 = 0.3
logsumexp = torch.logsumexp

# ---- Hamiltonian dynamics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LOSSES)
def test_leapfrog_steps_of_hvae(compare, likelihood):
    # get_nll only takes images of this size
    shape, n = (1, 28, 28), 5
    settings = {"n_leapfrog": 3, "step_size": 0.05, "beta_0": BETA_0, "likelihood": likelihood}
    model = aezoo.create_model("hvae", shape, latent_dim=LATENT, hidden_dims=(8,), **settings).double()
    other = theirs("HVAE", model, likelihood=likelihood, decode=identity, n_lf=3, eps_lf=0.05, beta_zero=BETA_0)
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
        " not cool it, and leaves the squares of gamma and eps out, whose means are constant"
    )
    row.deviates(named("loss", off), found, expected, reason, follows="ours")
    left_out = 0.5 * (draws[:, 0] ** 2).sum(2).mean(1).sum()
    row.equal(named("loss, their forward mended", off), found, mended_loss(other, x, *draws[:, 0]) - left_out)
    reached: list[Tensor] = []
    other.decoder.register_forward_hook(lambda _, inputs, __: reached.append(inputs[0]))
    nll, exchanged = [], []
    for i in range(len(x)):
        found, z = exchanged_likelihood(model, x[i : i + 1], draws[:, :, i : i + 1])
        exchanged.append(found.item())
        nll.append(nll_of(other, x[i], n, *draws[:, :, i]))
        row.equal("z_K in get_nll", z, reached[-1])
    with noise(draws):
        found = model.log_likelihood(x, n)
    reason = (
        "their weight has sqrt(beta_0) times the square of rho_K in the place of that of gamma, the density of rho_0"
    )
    row.deviates(named("log-likelihood", off), found + off, nll, reason, follows="ours")
    row.equal(named("log-likelihood with their density of rho_0", off), torch.tensor(exchanged) + off, nll)
    # differentiable before .item()
    step_D = model.step_D.detach().clone().requires_grad_()
    other._parameters.pop("eps_lf")
    other.eps_lf = 0.5 * torch.sigmoid(step_D)
    kept: list[Tensor] = []
    with mock.patch("torch.logsumexp", lambda *at: kept.append(logsumexp(*at)) or kept[-1]):
        nll_of(other, x[0], n, *draws[:, :, 0])
    both = [*pairs(model, other), (model.step_D, step_D)]
    gradients = [
        torch.autograd.grad(likelihood, step, retain_graph=True)[0]
        for likelihood, step in (
            (exchanged_likelihood(model, x[:1], draws[:, :, :1])[0], model.step_D),
            (kept[0], step_D),
        )
    ]
    reason = "theirs holds the gradient of the likelihood in z constant"
    row.deviates("gradient of the log-likelihood by eps", *gradients, reason, follows="ours")
    potential = model.potential_gradient
    model.potential_gradient = lambda x, z: (potential(x, z) - z).detach() + z
    found, _ = exchanged_likelihood(model, x[:1], draws[:, :, :1])
    row.equal_gradients(
        found, kept[0], both, "gradient of the log-likelihood with their density of rho_0 and held gradient in z"
    )


def mended_loss(other: Any, x: Tensor, eps: Tensor, gamma: Tensor) -> Tensor:
    """Their loss with the steps of their get_nll instead of those of their forward."""
    out, half = other.encoder(x), other.eps_lf / 2
    z_0 = z = out.embedding + torch.exp(0.5 * out.log_covariance) * eps
    rho, root = gamma / other.beta_zero_sqrt, other.beta_zero_sqrt
    for k in range(other.n_lf):
        rho = rho - half * other._dU_dz(z, x)
        z = z + other.eps_lf * rho
        root, before = other._tempering(k + 1, other.n_lf), root
        rho = before / root * (rho - half * other._dU_dz(z, x))
    loss: Tensor = other.loss_function(x, z, rho, z_0, out.embedding, out.log_covariance)
    return loss


def exchanged_likelihood(model: Any, x: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Our log-likelihood of a sample with their density of rho_0, and the codes z_K."""
    n = draws.shape[1]
    with noise(draws):
        z, log_q = (part[:, 0] for part in model.sample_posterior(x, n))
    log_w = model.log_prior(z) - log_q - model.nll(model.decoder(z), x.expand(n, *x.shape[1:]))
    # log q contains (|rho|^2 - |gamma|^2) / 2
    log_q_0 = -0.5 * (draws[0, :, 0] ** 2 + model.posterior(x)[1] + math.log(2 * math.pi)).sum(1)
    gamma_2 = (draws[1, :, 0] ** 2).sum(1)
    rho_2 = 2 * (log_q - log_q_0) + gamma_2
    weighted = log_w + 0.5 * (math.sqrt(BETA_0) * rho_2 - gamma_2)
    return torch.logsumexp(weighted, 0) - math.log(n), z


def metric_of(model: Any, other: Any) -> nn.Module:
    """Give theirs our centroids, a copy of our metric's network, and a metric from both; returns the copy."""
    net = copy.deepcopy(model.metric)
    other.centroids_tens, other.M_tens = model.centroids_MD.clone(), net(model.centroids_MD)
    other.G, other.G_inv = create_metric(other), create_inverse_metric(other)
    return net


def turned(inverse: Tensor, gamma: Tensor) -> Tensor:
    """The noise with which L of G = L L' gives our momentum, from another root of G: (B, D, D), (B, D) -> (B, D)."""
    momentum = torch.linalg.solve_triangular(torch.linalg.cholesky(inverse).mT, gamma[..., None], upper=True)
    return torch.linalg.solve(torch.linalg.cholesky(torch.linalg.inv(inverse)), momentum)[..., 0]


def partial_first_step(other: Any) -> Callable[..., Tensor]:
    """Their first step at a view of z, on which rho does not depend."""
    step = other._leap_step_1

    def first(recon_x: Tensor, x: Tensor, z: Tensor, rho: Tensor, G_inv: Tensor, G_log_det: Tensor) -> Tensor:
        at = z.view_as(z)
        inverse = other.G_inv(at)
        found: Tensor = step(other.decoder(at).reconstruction, x, at, rho, inverse, -torch.logdet(inverse))
        return found

    return first


def implicit_second_step(other: Any) -> Callable[..., Tensor]:
    """Their second step with the metric at each iterate; its first iterate is the start of our three."""

    def step(recon_x: Tensor, x: Tensor, z: Tensor, rho: Tensor, G_inv: Tensor, G_log_det: Tensor) -> Tensor:
        def velocity(at: Tensor) -> Tensor:
            return (other.G_inv(at) @ rho[..., None])[..., 0]

        moved = z
        for _ in range(4):
            moved = z + other.eps_lf / 2 * (velocity(z) + velocity(moved))
        return moved

    return step


def rhvae(n_steps: int, temperature: float) -> tuple[Any, Any, Pairs]:
    """Ours, theirs with our metric, and pairs of all parameters."""
    settings = {"n_centroids": 5, "metric_floor": 0.1, "step_size": 0.2, "beta_0": BETA_0}
    model = ours("rhvae", n_leapfrog=n_steps, temperature=temperature, **settings).eval()
    # theirs does not take the root of beta_zero
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
    row.equal(f"loss, log N(rho_0) added to theirs, {where}", found, expected.loss - of_start)
    draws, nll = torch.randn(2, 4, BATCH, LATENT), []
    with noise(draws):
        found = model.log_likelihood(x, 4)
    for i in range(BATCH):
        root = turned(other.G_inv(start(other, x[i : i + 1], draws[0, :, i])), draws[1, :, i])
        # theirs draws gamma twice
        nll.append(nll_of(other, x[i], 4, draws[0, :, i], draws[1, :, i], root))
    reason = "theirs leaves out the volume by which cooling scales, sqrt(beta_0)^D"
    row.deviates(f"log-likelihood, {where}", found, nll, reason, follows="ours")
    volume = 0.5 * LATENT * math.log(BETA_0)
    row.equal(f"log-likelihood, the volume added to theirs, {where}", found, torch.tensor(nll) + volume)


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
        row.equal_gradients(run(), expected, both, "gradient with held derivatives of H, one step in flat space")


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
    """Mean direction, and their parameter for our concentration: softplus plus an offset."""

    def head(out: Tensor) -> dict[str, Tensor]:
        kappa = LATENT * nn.functional.softplus(out[:, -1:]) + 1
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
    reason = "D softplus(out) + 1, for any D, where theirs, of the authors' code, is softplus(out) + 1"
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
    reason = "ours is exact; theirs goes through accepted draws only, without the correction g_cor of the paper"
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
