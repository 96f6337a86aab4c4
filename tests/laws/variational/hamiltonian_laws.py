"""Laws of both Hamiltonian VAEs: the limit of zero steps, the score, evaluation without gradients."""

from typing import Any

import pytest
import torch
import torch.distributions as D
from torch import Tensor

import aezoo

SHAPE = (2, 3, 3)


def small(name: str = "hvae", **settings: Any) -> Any:
    defaults = {"latent_dim": 4, "hidden_dims": (16,), "activation": "tanh"}
    return aezoo.create_model(name, SHAPE, **{**defaults, **settings}).double()


def images(n: int) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def normals(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- the bound -------------------------------------------------------------------------------------------------------


def draws_of(model: Any, x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """z_0, log q(z_0|x) and gamma as the next loss will draw them."""
    torch.manual_seed(seed)
    mu, log_var = model.posterior(x)
    eps, gamma = torch.randn(len(x), 2 * mu.shape[1], dtype=torch.float64).chunk(2, 1)
    q = D.Normal(mu, (0.5 * log_var).exp())
    z = mu + (0.5 * log_var).exp() * eps
    torch.manual_seed(seed)
    return z, q.log_prob(z).sum(1), gamma


@pytest.mark.parametrize("name", ["hvae", "rhvae"])
def test_zero_leapfrog_steps_equal_vae(name: str, shifted: Any) -> None:
    model, x = shifted(small(name, n_leapfrog=0)).double(), images(6)
    vae = small("vae")
    vae.load_state_dict({key: value for key, value in model.state_dict().items() if key in vae.state_dict()})
    model.eval()
    z, log_q, _ = draws_of(model, x, 3)
    terms = model.loss(x)
    nll = -D.Bernoulli(logits=vae.decoder(z), validate_args=False).log_prob(x).flatten(1).sum(1)
    kl = log_q - D.Normal(0, 1).log_prob(z).sum(1)
    torch.testing.assert_close(terms["nll"], nll.mean())
    torch.testing.assert_close(terms["kl"], kl.mean())
    torch.testing.assert_close(terms["loss"], (nll + kl).mean())
    torch.testing.assert_close(model.score(x), vae.score(x))
    torch.testing.assert_close(model(x), vae(x))
    many = x.repeat(2000, 1, 1, 1)
    assert model.loss(many)["elbo"].item() == pytest.approx(vae.loss(many)["elbo"].item(), abs=0.05)


@pytest.mark.parametrize("name", ["hvae", "rhvae"])
def test_score_is_bound_at_mean_without_momentum(name: str, shifted: Any) -> None:
    """With the KL in closed form, as in the VAE, which the score equals for K = 0."""
    model, x = shifted(small(name, step_size=0.2)).double().eval(), images(5)
    mu, log_var = model.posterior(x)
    z, momentum = model.flow(x, mu, torch.zeros_like(mu))
    assert (z - mu).abs().max() > 1e-3
    assert momentum.abs().min() > 1e-4
    nll = -D.Bernoulli(logits=model.decoder(z), validate_args=False).log_prob(x).flatten(1).sum(1)
    q, p = D.Normal(z, (0.5 * log_var).exp()), D.Normal(torch.zeros_like(z), torch.ones_like(z))
    torch.testing.assert_close(model.score(x), nll + D.kl_divergence(q, p).sum(1) + momentum)
    torch.testing.assert_close(model.encode(x), mu)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hvae", "rhvae"])
def test_evaluation_needs_no_gradients(name: str, shifted: Any) -> None:
    model, x = shifted(small(name, step_size=0.1)).double().eval(), images(5)

    def figures() -> list[Tensor]:
        torch.manual_seed(0)
        terms = model.loss(x)
        return [terms["loss"], terms["kl"], model.score(x), model.log_likelihood(x, 3), model(x)]

    wanted = figures()
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            found = figures()
        assert not any(value.requires_grad for value in found)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b.detach())
    with torch.inference_mode():
        inner = x.clone()
        torch.testing.assert_close(model.score(inner), wanted[2])
    assert torch.equal(model.score(x), model.score(x))
