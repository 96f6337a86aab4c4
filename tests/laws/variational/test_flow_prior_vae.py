"""Laws of the VAE with a normalising-flow prior (Dinh et al. 2016)."""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from learned_prior_laws import (  # noqa: F401
    FLOWS,
    data,
    density,
    draw,
    plane,
    small,
    test_beta_can_be_annealed_but_capacity_is_refused,
    test_importance_likelihood_matches_prior_integral,
    test_invalid_values_are_refused,
    test_loss_and_gradients_match_formula,
    test_the_density_of_a_prior_integrates_to_one,
)
from torch import Tensor

# ---- flows: Dinh et al. 2016, Papamakarios et al. 2017 ---------------------------------------------------------------


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
@pytest.mark.parametrize("name", FLOWS)
def test_log_determinant_matches_autograd_jacobian(name: str, latent_dim: int) -> None:
    model, z = small(name, latent_dim=latent_dim), 2 * torch.randn(6, latent_dim, dtype=torch.float64)
    expected = density(model, z)
    torch.testing.assert_close(model.log_prior(z), expected)
    torch.testing.assert_close(model.log_prior(torch.stack([z + 1, z]))[1], expected)
    wrong = 2 * D.Normal(0.0, 1.0).log_prob(through(model, z)).sum(1) - expected  # with the inverse determinant
    assert (wrong - expected).abs().max() > 0.1


def through(model: Any, z: Tensor) -> Tensor:
    for layer in model.flow:
        z = layer(z)[0]
    return z


def test_realnvp_matches_zuko() -> None:
    import zuko

    model, z = small("realnvp", latent_dim=5), torch.randn(6, 5, dtype=torch.float64)
    flow = zuko.flows.RealNVP(5, transforms=3, hidden_features=(8, 8), activation=torch.nn.ELU).double()
    with torch.no_grad():
        for layer, theirs in zip(model.flow, flow.transform.transforms, strict=True):
            first, _, second, _, last = layer.net
            kept = theirs.mask
            rows = torch.stack([torch.arange(5), 5 + torch.arange(5)], 1)[~kept].flatten()  # zuko interleaves m and a
            given = [first.weight[:, kept], first.bias, second.weight, second.bias, last.weight[rows], last.bias[rows]]
            for parameter, value in zip(theirs.hyper.parameters(), given, strict=True):
                parameter.copy_(value)
            assert torch.equal(first.mask.any(0), kept)
            assert torch.equal(last.mask.any(1), (~kept).repeat(2))
    torch.testing.assert_close(model.log_prior(z), flow().log_prob(z))


@pytest.mark.parametrize("name", FLOWS)
def test_flow_jacobian_has_autoregressive_structure(name: str) -> None:
    model, z = small(name, latent_dim=4), torch.randn(4, dtype=torch.float64)
    for t, layer in enumerate(model.flow):
        jacobian = torch.autograd.functional.jacobian(lambda one, layer=layer: layer(one)[0], z)
        if name == "maf":
            jacobian = jacobian.flip(0, 1) if t % 2 else jacobian
            assert torch.equal(jacobian, jacobian.tril()) and (jacobian.tril(-1) != 0).sum() == 6
        else:
            kept = torch.arange(4) % 2 == t % 2
            assert torch.equal(jacobian[kept], torch.eye(4, dtype=torch.float64)[kept])
            assert torch.equal(jacobian[~kept][:, ~kept] != 0, torch.eye(2, dtype=torch.bool))
            assert (jacobian[~kept][:, kept] != 0).all()


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
@pytest.mark.parametrize("name", FLOWS)
def test_flow_inverse_undoes_forward(name: str, latent_dim: int) -> None:
    model, z = small(name, latent_dim=latent_dim), torch.randn(3, 7, latent_dim, dtype=torch.float64)
    for layer in model.flow:
        torch.testing.assert_close(layer.inverse(layer(z)[0]), z)
        torch.testing.assert_close(layer(layer.inverse(z))[0], z)
    torch.manual_seed(0)
    drawn = model.sample_prior(9)
    torch.manual_seed(0)
    torch.testing.assert_close(through(model, drawn), torch.randn(9, latent_dim, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOWS)
def test_flow_samples_match_density(name: str) -> None:
    """Moments and entropy of draws, against quadrature over the density."""
    model = small(name, latent_dim=2)
    points, area = plane(20, 601)
    with torch.no_grad():
        log_p, drawn = model.log_prior(points), model.sample_prior(200_000)
        p = log_p.exp() * area
        mean = (p[:, None] * points).sum(0)
        covariance = (points - mean).T @ (p[:, None] * (points - mean))
        scale = covariance.diagonal().sqrt()
        assert ((drawn.mean(0) - mean) / scale).abs().max() < 0.02
        assert ((torch.cov(drawn.T) - covariance) / torch.outer(scale, scale)).abs().max() < 0.04
        assert model.log_prior(drawn).mean().item() == pytest.approx((p * log_p).sum().item(), abs=0.02)


@pytest.mark.parametrize("n_flows", [0, 3])
@pytest.mark.parametrize("name", FLOWS)
def test_identity_layers_equal_vae(name: str, n_flows: int) -> None:
    model, vae, x = small(name, n_flows=n_flows), small("vae"), data()
    with torch.no_grad():
        for layer in model.flow:
            layer.net[-1].weight.zero_()
            layer.net[-1].bias.zero_()
    own = vae.state_dict()
    vae.load_state_dict({key: value for key, value in model.state_dict().items() if key in own})
    (terms, z), (vae_terms, vae_z) = draw(model, x), draw(vae, x)
    torch.testing.assert_close(z, vae_z)
    torch.testing.assert_close(terms, vae_terms)
    torch.testing.assert_close(model.score(x), vae.score(x))
    for call in (lambda one: one.sample(4), lambda one: one.log_likelihood(x, 20)):
        found, expected = ([torch.manual_seed(0), call(one)][1] for one in (model, vae))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", FLOWS)
def test_score_evaluates_flow_at_posterior_mean(name: str) -> None:
    model, x = small(name), data()
    with torch.no_grad():
        model.encoder[-2].weight[3:] = 0
        model.encoder[-2].bias[3:] = -25.0  # so narrow that the flow is linear under q
        mu, log_var = model.posterior(x)
        entropy = 0.5 * (1 + log_var + math.log(2 * math.pi)).sum(1)
        expected = model.nll(model.decoder(mu), x) - entropy - density(model, mu)
        torch.testing.assert_close(model.score(x), expected)
        assert torch.equal(model.score(x), model.score(x))
