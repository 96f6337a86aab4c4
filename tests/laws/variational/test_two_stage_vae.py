"""Laws of the two-stage VAE (Dai & Wipf 2019)."""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from learned_prior_laws import (
    data,
    draw,
    normal,
    small,
)
from torch import Tensor

import aezoo
from aezoo.callbacks.annealing import BetaAnnealing
from aezoo.models.variational.vae import VAE

# ---- two stages: Dai & Wipf 2019 -------------------------------------------------------------------------------------


def two_stages(latent_dim: int = 3, **settings: Any) -> tuple[Any, Any]:
    """A two-stage model, and a VAE with the weights of its first stage."""
    model = small("two_stage_vae", latent_dim, second_hidden_dims=(10,), **settings)
    vae = small("vae", latent_dim, likelihood="gaussian:learned")
    vae.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("second.")})
    return model, vae


def first_stage(model: Any) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if not name.startswith("second.")]


def test_first_stage_has_vae_loss_and_gradient() -> None:
    model, vae = two_stages()
    x = data()
    (terms, z), (vae_terms, vae_z) = draw(model, x), draw(vae, x)
    torch.testing.assert_close(z, vae_z)
    torch.testing.assert_close(terms["nll"] + terms["kl"], vae_terms["loss"])
    found = torch.autograd.grad(terms["loss"], first_stage(model), retain_graph=True)
    for one, two in zip(found, torch.autograd.grad(vae_terms["loss"], [*vae.parameters()]), strict=True):
        assert torch.equal(one, two)
    second = terms["code_nll"] + terms["code_kl"]
    parts = torch.autograd.grad(second, first_stage(model), retain_graph=True, allow_unused=True)
    assert all(part is None for part in parts)
    torch.testing.assert_close(terms["loss"], vae_terms["loss"] + second)
    # without the detach the loss of the second stage would have a gradient for the encoder
    torch.manual_seed(3)
    joint = model.second.loss(model.sample_posterior(x, 1)[0][0])["loss"]
    assert torch.autograd.grad(joint, model.encoder[1].weight)[0].abs().max() > 1e-3
    torch.testing.assert_close(model.score(x), vae.score(x))


def test_second_stage_does_not_affect_the_first() -> None:
    model, vae = two_stages()
    for one in (model, vae):
        optimizer = torch.optim.Adam(one.parameters(), 1e-2)
        for step in range(5):
            torch.manual_seed(step)  # as in the training loop
            optimizer.zero_grad()
            one.loss(data())["loss"].backward()
            optimizer.step()
    for one, two in zip(first_stage(model), vae.parameters(), strict=True):
        assert torch.equal(one, two)


def test_second_stage_is_vae_of_codes_with_joint_elbo() -> None:
    model, x = two_stages()[0], data()
    assert model.second.input_shape == model.second.code_shape == (3,)
    terms, z = draw(model, x)
    torch.manual_seed(3)
    torch.randn_like(z)  # the first stage's noise
    eps = torch.randn_like(z)
    mu, log_var = model.second.posterior(z)
    u = mu + (0.5 * log_var).exp() * eps
    log_pz = normal(model.second.decoder(u), 2 * model.second.likelihood.log_scale.expand_as(z)).log_prob(z)
    torch.testing.assert_close(terms["code_nll"], -log_pz.mean())
    prior = normal(torch.zeros_like(u), torch.zeros_like(u))
    kl = D.kl_divergence(normal(mu, log_var), prior).mean()
    torch.testing.assert_close(terms["code_kl"], kl)
    log_qz = normal(*model.posterior(x)).log_prob(z).mean()
    torch.testing.assert_close(terms["elbo"], log_pz.mean() - kl - log_qz - terms["nll"])


def linear_stages() -> tuple[Any, D.Distribution, D.Distribution]:
    """A model with linear decoders, and its distributions of z and x in closed form."""
    torch.manual_seed(7)
    model = aezoo.create_model(
        "two_stage_vae", (4,), latent_dim=2, hidden_dims=(), second_hidden_dims=(), likelihood="gaussian:0.5"
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        # posteriors that cover the priors
        for encoder in (model.encoder, model.second.encoder):
            encoder[-2].weight *= 0.2
            encoder[-2].bias[2:] += 2
        a, b = model.decoder[1].weight, model.decoder[1].bias
        w, c = model.second.decoder[1].weight, model.second.decoder[1].bias
        eye = torch.eye(4, dtype=torch.float64)
        of_z = w @ w.T + (2 * model.second.likelihood.log_scale).exp() * eye[:2, :2]
        z = D.MultivariateNormal(c, of_z)
        return model, z, D.MultivariateNormal(a @ c + b, a @ of_z @ a.T + 0.25 * eye)


def test_linear_stages_match_closed_form() -> None:
    model, of_z, of_x = linear_stages()
    drawn = model.sample_prior(100_000)
    assert (drawn.mean(0) - of_z.mean).abs().max() < 0.03
    assert (torch.cov(drawn.T) - of_z.covariance_matrix).abs().max() < 0.05  # including the noise of p(z|u)
    z, x = of_z.sample((4,)), of_x.sample((4,))
    found = torch.logsumexp(model.log_prior(z.expand(20_000, 4, 2)), 0) - math.log(20_000)
    torch.testing.assert_close(found, of_z.log_prob(z), rtol=0, atol=0.05)
    torch.testing.assert_close(model.log_likelihood(x, 40_000), of_x.log_prob(x), rtol=0, atol=0.1)
    with torch.no_grad():
        assert model.loss(x.repeat(2000, 1))["elbo"] < of_x.log_prob(x).mean()
    # a standard normal prior would differ
    wrong = VAE.log_prior(model, z)
    assert (wrong - of_z.log_prob(z)).abs().max() > 0.1


def test_samples_pass_through_both_decoders() -> None:
    model = two_stages()[0]
    seen: list[Tensor] = []
    for net in (model.second.decoder, model.decoder):
        net.register_forward_hook(lambda _, given, found: seen.extend((given[0], found)))
    torch.manual_seed(0)
    x = model.sample(4)
    u, mean, z, found = seen
    torch.manual_seed(0)
    torch.testing.assert_close(u, torch.randn(4, 3, dtype=u.dtype))
    torch.testing.assert_close(z, mean + model.second.likelihood.log_scale.exp() * torch.randn_like(mean))
    torch.testing.assert_close(x, found)


# ---- annealing -------------------------------------------------------------------------------------------------------


def test_annealing_of_two_stages_is_refused() -> None:
    for mode in ("linear", "capacity"):
        with pytest.raises(aezoo.AezooError, match="needs a model with a number"):
            BetaAnnealing(mode, n_steps=5).setup(None, aezoo.create_model("two_stage_vae", input_shape=(4,)), "fit")
