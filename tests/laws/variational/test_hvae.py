"""Laws of the Hamiltonian VAE (Caterini et al. 2018)."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from hamiltonian_laws import (  # noqa: F401
    draws_of,
    images,
    normals,
    small,
    test_evaluation_needs_no_gradients,
    test_score_is_bound_at_mean_without_momentum,
    test_zero_leapfrog_steps_equal_vae,
)
from torch import Tensor

import aezoo
from aezoo import AezooError
from aezoo.models.variational.hvae import HVAE


def linear(k: int, dims: int, **settings: Any) -> Any:
    """A linear decoder with orthogonal columns; the encoder is off the posterior in mean and variance."""
    model = aezoo.create_model(
        "hvae", (dims,), latent_dim=k, hidden_dims=(), likelihood="gaussian:learned", **settings
    ).double()
    lengths = torch.linspace(0.5, 2, k, dtype=torch.float64)
    with torch.no_grad():
        W = torch.linalg.qr(normals(dims, k))[0] * lengths
        c = normals(dims)
        model.likelihood.log_scale.fill_(-0.4)
        s2 = math.exp(-0.8)
        model.decoder[1].weight.copy_(W)
        model.decoder[1].bias.copy_(c)
        gain = W.T / (lengths**2 + s2)[:, None]
        model.encoder[1].weight.copy_(torch.cat([gain, 0 * gain]))
        model.encoder[1].bias.copy_(torch.cat([-gain @ c + 0.3, (s2 / (lengths**2 + s2)).log() + 0.7]))
    return model


def evidence(model: Any, x: Tensor) -> Tensor:
    """Log p(x) under a linear decoder, by torch.distributions."""
    W, c = model.decoder[1].weight.detach(), model.decoder[1].bias.detach()
    variance = (2 * model.likelihood.log_scale.detach()).exp().expand(len(c))
    return D.LowRankMultivariateNormal(c, W, variance).log_prob(x)


def bounds(model: Any, x: Tensor, draws: int) -> Tensor:
    """The ELBO averaged over draws."""
    with torch.no_grad():
        return model.loss(x.repeat(draws, 1))["elbo"]


# ---- the leapfrog ----------------------------------------------------------------------------------------------------


def test_leapfrog_jacobian_is_product_of_tempering(shifted: Any) -> None:
    for n_leapfrog, beta_0 in ((1, 1.0), (3, 0.3), (4, 0.8)):
        model = shifted(small(n_leapfrog=n_leapfrog, beta_0=beta_0, step_size=0.2)).double()
        x, start = images(1), normals(8)

        def flow(state: Tensor, model: Any = model, x: Tensor = x) -> Tensor:
            return torch.cat(model.leapfrog(x, state[None, :4], state[None, 4:]), 1)[0]

        jacobian = torch.autograd.functional.jacobian(flow, start)
        assert (flow(start) - start).abs().max() > 0.1
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(4 * 0.5 * math.log(beta_0), abs=1e-9)
        factors = [before / after for before, after in pairwise(model.cooling)]
        assert len(factors) == n_leapfrog and math.prod(factors) == pytest.approx(beta_0**0.5)
        assert model.cooling[-1] == 1 and model.cooling[0] == pytest.approx(beta_0**0.5)


def test_leapfrog_is_reversible_and_nearly_conserves_energy(shifted: Any) -> None:
    model, x = shifted(small(n_leapfrog=5, beta_0=1.0, step_size=0.05)).double(), images(6)
    z, rho = normals(6, 4), normals(6, 4)
    there = model.leapfrog(x, z, rho)
    back = model.leapfrog(x, there[0], -there[1])
    assert (there[0] - z).abs().min() > 1e-4
    torch.testing.assert_close(back[0], z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(-back[1], rho, rtol=1e-9, atol=1e-9)

    def energy(z: Tensor, rho: Tensor) -> Tensor:
        nll = -D.Bernoulli(logits=model.decoder(z), validate_args=False).log_prob(x).flatten(1).sum(1)
        return nll + 0.5 * (z**2 + rho**2).sum(1)

    drift = []
    for step_size in (0.04, 0.02):
        with torch.no_grad():
            model.step_D.fill_(math.log(step_size / (0.5 - step_size)))
        assert model.step().tolist() == pytest.approx([step_size] * 4)
        drift.append((energy(*model.leapfrog(x, z, rho)) - energy(z, rho)).abs().max().item())
    assert drift[0] < 0.2 and drift[1] < drift[0] / 2  # of second order, for a path of half the length


def test_leapfrog_steps_match_paper(shifted: Any) -> None:
    """Algorithm 1 and equation 6, written with autograd and a separate loop."""
    model, x = shifted(small(n_leapfrog=3, beta_0=0.4, step_size=0.1)).double(), images(5)
    z, gamma = normals(5, 4), normals(5, 4)
    beta = [(((1 - 1 / 0.4**0.5) * (k / 3) ** 2 + 1 / 0.4**0.5) ** -1) ** 2 for k in range(4)]

    def slope(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        nll = -D.Bernoulli(logits=model.decoder(at), validate_args=False).log_prob(x).sum()
        return torch.autograd.grad(nll - D.Normal(0, 1).log_prob(at).sum(), at)[0]

    at, rho, step = z, gamma / beta[0] ** 0.5, model.step().detach()
    for k in range(1, 4):
        half = rho - step / 2 * slope(at)
        at = at + step * half
        rho = (beta[k - 1] / beta[k]) ** 0.5 * (half - step / 2 * slope(at))
    found, momentum = model.flow(x, z, gamma)
    torch.testing.assert_close(found, at)
    torch.testing.assert_close(momentum, 0.5 * (rho**2 - gamma**2).sum(1))


# ---- the bound -------------------------------------------------------------------------------------------------------


def test_bound_matches_joint_density(shifted: Any) -> None:
    """Log p(x, z_K) + log N(rho_K) - log q(z_0) - log N(rho_0; 0, 1/beta_0) + D/2 log beta_0 (the Jacobian)."""
    model, x = shifted(small(n_leapfrog=3, beta_0=0.3, step_size=0.1)).double(), images(6)
    z, log_q, gamma = draws_of(model, x, 5)
    terms = model.loss(x)
    rho = gamma / 0.3**0.5
    z_k, rho_k = model.leapfrog(x, z, rho)
    log_px = D.Bernoulli(logits=model.decoder(z_k), validate_args=False).log_prob(x).flatten(1).sum(1)
    normal, hot = D.Normal(0.0, 1.0), D.Normal(0.0, 0.3**-0.5)
    bound = log_px + (normal.log_prob(z_k) + normal.log_prob(rho_k) - hot.log_prob(rho)).sum(1) - log_q
    bound = bound + 4 / 2 * math.log(0.3)
    torch.testing.assert_close(terms["elbo"], bound.mean())
    torch.testing.assert_close(terms["loss"], -bound.mean())
    torch.testing.assert_close(terms["nll"], -log_px.mean())


@pytest.mark.slow
def test_bound_rises_with_steps_below_evidence() -> None:
    """By the cooling only: a flow that preserves p(x, z) N(rho) does not change the distance from it."""
    x = normals(8, 6)
    gaps = []
    for k in (0, 2, 4, 8, 16):
        torch.manual_seed(0)
        model = linear(3, 6, n_leapfrog=k, step_size=0.1, beta_0=0.2)
        with torch.no_grad():
            model.encoder[1].bias[:3] += 0.5
        gaps.append(evidence(model, x).mean().item() - bounds(model, x, 4000).item())
    assert min(gaps) > -0.02
    assert all(a - b > 0.1 for a, b in pairwise(gaps))
    assert gaps[-1] < 0.7 * gaps[0]


@pytest.mark.slow
def test_importance_weights_of_the_flow_are_unbiased() -> None:
    """E[p / q] over draws is p(x): a wrong sign or factor of the momentum term would be detected."""
    torch.manual_seed(0)
    model, x = linear(3, 6, n_leapfrog=3, step_size=0.15, beta_0=0.5), normals(4, 6)
    top = evidence(model, x)
    torch.testing.assert_close(model.log_likelihood(x, 20_000), top, rtol=0, atol=0.05)
    low = torch.stack([model.log_likelihood(x, 1) for _ in range(200)]).mean(0)
    assert (low < top).all()

    class Forgetful(HVAE):
        """Without the initial momentum."""

        def flow(self, x: Tensor, z_BD: Tensor, gamma_BD: Tensor) -> tuple[Tensor, Tensor]:
            z_BD, rho_BD = self.leapfrog(x, z_BD, gamma_BD * self.cooling[0] ** -1)
            return z_BD, 0.5 * (rho_BD**2).sum(1)

    model.__class__ = Forgetful
    assert (model.log_likelihood(x, 20_000) - top).abs().min() > 0.3


def test_loss_gradient_matches_finite_differences(shifted: Any) -> None:
    """For all parameters, including the step size and the encoder, at fixed noise."""
    model, x = shifted(small(n_leapfrog=2, step_size=0.1)).double(), images(4)

    def loss() -> Tensor:
        torch.manual_seed(2)
        found: Tensor = model.loss(x)["loss"]
        return found

    loss().backward()
    for p in model.parameters():
        way = torch.randn_like(p)
        with torch.no_grad():
            p += 1e-5 * way
            high = loss()
            p -= 2e-5 * way
            low = loss()
            p += 1e-5 * way
        assert p.grad is not None
        assert (p.grad * way).sum().item() == pytest.approx(((high - low) / 2e-5).item(), rel=1e-4, abs=1e-7)


def test_invalid_hvae_settings_are_refused() -> None:
    for setting in ({"n_leapfrog": -1}, {"step_size": 0.0}, {"step_size": 0.5}, {"beta_0": 0.0}, {"beta_0": 1.1}):
        with pytest.raises(AezooError, match=next(iter(setting))):
            small(**setting)
