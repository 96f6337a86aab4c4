"""Laws of the VAEs whose reconstruction term is a distance of images: MS-SSIM and perceptual."""

from typing import Any

import pytest
import torch
import torch.distributions as D
from torch import Tensor

from aezoo.models.variational.msssim_vae import MSSSIMVAE
from aezoo.models.variational.perceptual_vae import PerceptualVAE
from aezoo.models.variational.vae import VAE

SHAPE, CODE = (1, 8, 8), 4


DISTANCES: list[Any] = [MSSSIMVAE, PerceptualVAE]


def small(make: Any, shape: tuple[int, ...] = SHAPE, **settings: Any) -> Any:
    return make(shape, latent_dim=CODE, hidden_dims=(16,), **settings).double()


def images(n: int = 6, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def model_and_vae(make: Any, shifted: Any, parent: dict[str, Any], **settings: Any) -> tuple[Any, Any]:
    model, vae = small(make, **settings), shifted(small(VAE, **parent))
    model.load_state_dict(vae.state_dict())
    return model, vae


def losses(*models: Any, training: bool = True) -> list[dict[str, Tensor]]:
    """The loss of each model with the same noise; gradients are in `grad` of the parameters."""
    found, x = [], images()
    for each in models:
        torch.manual_seed(3)
        each.zero_grad()
        found.append(each.train(training).loss(x))
        found[-1]["loss"].backward()
    return found


def same(model: Any, vae: Any, training: bool = True) -> None:
    mine, theirs = losses(model, vae, training=training)
    assert mine.keys() == theirs.keys()
    for term in theirs:
        torch.testing.assert_close(mine[term], theirs[term], rtol=1e-10, atol=1e-12)
    for p, q in zip(model.parameters(), vae.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def decoded(model: Any, call: Any) -> tuple[Any, Tensor]:
    """The result of a call, and the decoder's output in it."""
    seen: list[Tensor] = []
    hook = model.decoder.register_forward_hook(lambda *args: seen.append(args[2]))
    found = call()
    hook.remove()
    return found, seen[0]


# ---- both distances --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", DISTANCES)
def test_the_loss_is_the_weighted_distance_and_the_kl(make: Any, shifted: Any) -> None:
    model, x = shifted(small(make, beta=0.7)), images()
    terms, params = decoded(model, lambda: model.loss(x))
    torch.testing.assert_close(terms["nll"], model.nll(params, x).mean())
    mu, log_var = model.posterior(x)
    q, p = D.Normal(mu, (0.5 * log_var).exp()), D.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    kl_B = D.kl_divergence(q, p).sum(1)
    torch.testing.assert_close(terms["kl"], kl_B.mean())
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.7 * kl_B.mean())
    model.eval()
    torch.testing.assert_close(model.score(x), model.nll(model.decoder(mu), x) + kl_B)
    model.beta, model.capacity = 2.0, 1000.0
    (terms,) = losses(model)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 2 * (1000 - terms["kl"]))
    doubled = small(make, weight=2 * model.weight)
    torch.testing.assert_close(doubled.nll(params, x), 2 * model.nll(params, x))


@pytest.mark.parametrize("make", DISTANCES)
def test_elbo_and_log_likelihood_are_absent(make: Any) -> None:
    model = small(make)
    assert "elbo" not in model.loss(images())
    assert model.log_likelihood is None


@pytest.mark.parametrize("make", DISTANCES)
def test_distance_is_zero_only_for_perfect_reconstruction(make: Any) -> None:
    model, x = small(make), 0.1 + 0.8 * images()
    torch.testing.assert_close(model.nll(torch.logit(x), x), torch.zeros(6, dtype=x.dtype), atol=1e-9, rtol=0)
    assert (model.nll(torch.logit(x) + torch.randn_like(x), x) > 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("make", DISTANCES)
def test_training_by_the_distance_reconstructs_digits(make: Any, digits: Tensor, adam: Any) -> None:
    x = digits[:512].float()
    model = make(SHAPE, latent_dim=8, hidden_dims=(64,))
    adam(model, x, steps=300, lr=5e-3, batch=64)
    with torch.no_grad():
        mse = (model(x) - x).square().mean()
    assert mse < 0.6 * (x.mean(0) - x).square().mean()


@pytest.mark.parametrize("make", DISTANCES)
def test_only_likelihood_mean_is_used(make: Any) -> None:
    x, params = images(), torch.randn(6, *SHAPE, dtype=torch.float64)
    for likelihood, x_hat in (("bernoulli", params.sigmoid()), ("gaussian:learned", params), ("laplace", params)):
        model = small(make, likelihood=likelihood)
        same_as = small(make, likelihood="gaussian")
        torch.testing.assert_close(model.nll(params, x), same_as.nll(x_hat, x))
        terms = model.loss(x)
        terms["loss"].backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert not any(p.requires_grad for p in model.likelihood.parameters())
