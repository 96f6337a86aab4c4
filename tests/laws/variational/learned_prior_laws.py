"""Laws of learned priors: densities against torch.distributions and quadrature, neutral limits, known mistakes.

Models are in float64 and away from their initial weights.
"""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from torch import Tensor

import aezoo
from aezoo.callbacks.annealing import BetaAnnealing

# the model of each case, for conftest.py
MODEL_OF = {"realnvp": "flow_prior_vae", "maf": "flow_prior_vae"}


MIXTURES = ("mixture_vae", "vamp_vae")


FLOWS = ("realnvp", "maf")


def small(name: str, latent_dim: int = 3, **settings: Any) -> Any:
    """A float64 model away from its initial weights, with components that differ."""
    if name in FLOWS:
        name, settings = "flow_prior_vae", {"prior": name, "n_flows": 3, "flow_width": 8, **settings}
    elif name in MIXTURES:
        settings = {"n_components": 4, **settings}
    torch.manual_seed(7)
    size = {"input_shape": (2, 3, 3), "latent_dim": latent_dim, "hidden_dims": (12,), "activation": "tanh"}
    model = aezoo.create_model(name, **size, **settings).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.4 * torch.randn_like(parameter)
    return model


def data(n: int = 5) -> Tensor:
    return torch.rand(n, 2, 3, 3, dtype=torch.float64)


def normal(mu: Tensor, log_var: Tensor) -> D.Distribution:
    return D.Independent(D.Normal(mu, (0.5 * log_var).exp()), 1)


def mixture(model: Any) -> D.Distribution:
    """The prior by torch.distributions, from its parameters or from the posteriors of the pseudo-inputs."""
    if hasattr(model, "pseudo_K"):
        u = model.pseudo_K.sigmoid() if model.likelihood.unit_interval else model.pseudo_K
        logits, (mu, log_var) = torch.zeros(len(u), dtype=u.dtype), model.posterior(u)
    else:
        logits, mu, log_var = model.weight_K, model.mean_KD, model.log_var_KD
    return D.MixtureSameFamily(D.Categorical(logits=logits), normal(mu, log_var))


def density(model: Any, z: Tensor) -> Tensor:
    """The prior's log p(z) by torch.distributions, for flows with the Jacobian by autograd: (B, D) -> (B,)."""
    if not hasattr(model, "flow"):
        return mixture(model).log_prob(z)

    def forward(one: Tensor) -> Tensor:
        for layer in model.flow:
            one = layer(one)[0]
        return one

    jacobian = torch.func.vmap(torch.func.jacrev(forward))(z)
    return D.Normal(0.0, 1.0).log_prob(forward(z)).sum(1) + torch.linalg.slogdet(jacobian)[1]


def draw(model: Any, x: Tensor, seed: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    """The loss terms and the decoded codes."""
    seen: list[Tensor] = []
    handle = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(seed)
    terms = model.loss(x)
    handle.remove()
    return terms, seen[0]


def gradients(model: Any, value: Tensor) -> Tensor:
    found = torch.autograd.grad(value, [*model.parameters()], retain_graph=True)
    return torch.cat([part.flatten() for part in found])


def plane(half: float, side: int) -> tuple[Tensor, float]:
    """The points of a square grid, and the area of each."""
    line = torch.linspace(-half, half, side, dtype=torch.float64)
    return torch.cartesian_prod(line, line), float(line[1] - line[0]) ** 2


# ---- mixtures: Tomczak & Welling 2017 --------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian:0.3"])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_prior_matches_torch_distributions(name: str, likelihood: str) -> None:
    model = small(name, n_components=4, likelihood=likelihood)
    z = 2 * torch.randn(6, 5, 3, dtype=torch.float64)
    expected = mixture(model).log_prob(z)
    torch.testing.assert_close(model.log_prior(z), expected)
    # also far from the components, where each density underflows
    torch.testing.assert_close(model.log_prior(100 * z), mixture(model).log_prob(100 * z))
    # the misplaced parenthesis of PyTorch-VAE, where the log-variance is divided by the variance as well
    log_w, mu, log_var = model.mixture()
    exponent = -0.5 * (log_var + (z[..., None, :] - mu) ** 2) / log_var.exp()
    wrong = torch.logsumexp(log_w + exponent.sum(-1), -1) - 1.5 * math.log(2 * math.pi)
    assert (wrong - expected).abs().mean() > 0.1
    # a mixture without its weights
    assert (torch.logsumexp(model.log_joint(z[0], 0 * z[0]) - log_w, 1) - expected[0]).abs().min() > 0.1


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_log_prob_is_independent_of_chunk_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, z = small(name, n_components=4), torch.randn(7, 3, dtype=torch.float64)
    whole = model.log_prior(z)
    monkeypatch.setattr("aezoo.bases.mixture_prior._MAX_VALUES", 25)
    torch.testing.assert_close(model.log_prior(z), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MIXTURES, *FLOWS])
def test_the_density_of_a_prior_integrates_to_one(name: str) -> None:
    model = small(name, latent_dim=2)
    z, area = plane(20, 601)
    assert model.log_prior(z).exp().sum().item() * area == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_prior_samples_have_its_moments(name: str) -> None:
    model = small(name, n_components=3)
    expected, z = mixture(model), model.sample_prior(100_000)
    scale = expected.variance.sqrt()
    assert ((z.mean(0) - expected.mean) / scale).abs().max() < 0.02
    assert (z.std(0) / scale - 1).abs().max() < 0.02
    # the mean of -log p(z) estimates the entropy, as do draws of torch.distributions
    entropy = -expected.log_prob(expected.sample((100_000,))).mean()
    assert -model.log_prior(z).mean().item() == pytest.approx(entropy.item(), abs=0.02)
    assert model.sample(3).shape == (3, 2, 3, 3)


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("name", [*MIXTURES, *FLOWS])
def test_loss_and_gradients_match_formula(name: str, beta: float) -> None:
    """For VampPrior including the gradient through the pseudo-inputs and the encoder in the prior."""
    model, x = small(name, beta=beta), data()
    terms, drawn = draw(model, x)
    mu, log_var = model.posterior(x)
    z = mu + (0.5 * log_var).exp() * ((drawn - mu) / (0.5 * log_var).exp()).detach()
    log_px = D.Bernoulli(logits=model.decoder(z), validate_args=False).log_prob(x).flatten(1).sum(1)
    log_q = normal(mu, log_var).log_prob(z)
    if name in FLOWS:  # only KL(q || N(0, I)) has a closed form
        standard = normal(torch.zeros_like(mu), torch.zeros_like(mu))
        log_q = D.kl_divergence(normal(mu, log_var), standard) + standard.log_prob(z)
    kl = (log_q - density(model, z)).mean()
    torch.testing.assert_close(terms["kl"], kl)
    torch.testing.assert_close(terms["nll"], -log_px.mean())
    torch.testing.assert_close(terms["elbo"], log_px.mean() - kl)
    torch.testing.assert_close(terms["loss"], beta * kl - log_px.mean())
    found, expected = gradients(model, terms["loss"]), gradients(model, beta * kl - log_px.mean())
    torch.testing.assert_close(found, expected)
    if name == "vamp_vae":
        # with a constant prior the encoder's gradient differs
        with torch.no_grad():
            constant = mixture(model)
        wrong = normal(mu, log_var).log_prob(z).mean() - constant.log_prob(z).mean() - log_px.mean()
        encoder = [*model.encoder.parameters()]
        one, two = (torch.autograd.grad(v, encoder[0], retain_graph=True)[0] for v in (terms["loss"], wrong))
        assert (one - two).abs().max() > 1e-3


def standard(name: str, **settings: Any) -> tuple[Any, Any]:
    """A model whose only component is N(0, I), and a VAE with the same weights."""
    size = {"input_shape": (2, 3, 3), "latent_dim": 3, "hidden_dims": (), **settings}
    model, vae = (aezoo.create_model(which, **size, **extra).double() for which, extra in pair(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        if name == "vamp_vae":
            # a linear encoder that maps the pseudo-input to mean 0 and log-variance 0
            linear = model.encoder[1]
            linear.bias.copy_(-linear.weight @ model.pseudo_inputs().flatten())
        else:
            model.mean_KD.zero_()
            model.log_var_KD.zero_()
    own = vae.state_dict()
    vae.load_state_dict({key: value for key, value in model.state_dict().items() if key in own})
    return model, vae


def pair(name: str) -> tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]:
    return (name, {"n_components": 1}), ("vae", {})


@pytest.mark.parametrize("name", MIXTURES)
def test_single_standard_component_equals_vae(name: str) -> None:
    model, vae = standard(name)
    x = data()
    (terms, z), (vae_terms, vae_z) = draw(model, x), draw(vae, x)
    torch.testing.assert_close(z, vae_z)
    torch.testing.assert_close(terms["nll"], vae_terms["nll"])
    sampled = (normal(*vae.posterior(x)).log_prob(z) - D.Normal(0.0, 1.0).log_prob(z).sum(1)).mean()
    torch.testing.assert_close(terms["kl"], sampled)
    torch.testing.assert_close(terms["loss"] - sampled + vae_terms["kl"], vae_terms["loss"])
    torch.testing.assert_close(model.score(x), vae.score(x))
    torch.manual_seed(0)
    found = model.log_likelihood(x, 20)
    torch.manual_seed(0)
    torch.testing.assert_close(found, vae.log_likelihood(x, 20))


@pytest.mark.parametrize("name", MIXTURES)
def test_score_bounds_kl_tightly_for_far_components(name: str) -> None:
    model, x = small(name, n_components=3), data(4)
    mu, log_var = model.posterior(x)
    z = normal(mu, log_var).sample((20_000,))
    kl = (normal(mu, log_var).log_prob(z) - mixture(model).log_prob(z)).mean(0)
    bound = model.score(x) - model.nll(model.decoder(mu), x)
    assert (bound - kl).min() > -0.05
    assert torch.equal(model.score(x), model.score(x))
    # with the KL of each component by torch.distributions
    log_w, m, s = model.mixture()
    each = torch.stack([D.kl_divergence(normal(mu, log_var), normal(a, b)) for a, b in zip(m, s, strict=True)], 1)
    torch.testing.assert_close(bound, -torch.logsumexp(log_w - each, 1))
    if name == "mixture_vae":
        with torch.no_grad():
            model.mean_KD.copy_(torch.tensor([[30.0], [0.0], [-30.0]]).expand(3, 3))
        kl = (normal(mu, log_var).log_prob(z) - mixture(model).log_prob(z)).mean(0)
        bound = model.score(x) - model.nll(model.decoder(mu), x)
        torch.testing.assert_close(bound, kl, rtol=0.02, atol=0.05)


def integral(model: Any, x: Tensor) -> Tensor:
    """The exact log p(x) of a model with one code dimension, by quadrature over z."""
    z = torch.linspace(-15, 15, 6001, dtype=torch.float64)[:, None]
    log_px = torch.stack([-model.nll(model.decoder(z), one.expand(len(z), *one.shape)) for one in x], 1)
    return torch.logsumexp(log_px + model.log_prior(z)[:, None], 0) + math.log(float(z[1] - z[0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MIXTURES, *FLOWS])
def test_importance_likelihood_matches_prior_integral(name: str) -> None:
    model, x = small(name, latent_dim=1), data(3)
    with torch.no_grad():
        model.encoder[-2].bias[1] += 5 if name in FLOWS else 2  # a posterior that covers the prior
        exact = integral(model, x)
        torch.testing.assert_close(model.log_likelihood(x, 20_000), exact, rtol=0, atol=0.05)
        elbo = torch.stack([model.loss(x)["elbo"] for _ in range(400)]).mean()
        assert elbo < exact.mean()


# ---- invalid values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("mixture_vae", {"n_components": 0}, "n_components must be at least 1"),
        ("vamp_vae", {"n_components": 0}, "n_components must be at least 1"),
        ("vamp_vae", {"latent_dim": 0}, "latent_dim"),
        ("flow_prior_vae", {"prior": "nsf"}, "choose from realnvp, maf"),
        ("flow_prior_vae", {"n_flows": 257}, "n_flows must be from 0 to 256"),
        ("flow_prior_vae", {"flow_width": 0}, "flow_width must be at least 1"),
    ],
)
def test_invalid_values_are_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        aezoo.create_model(name, input_shape=(4,), **settings)


@pytest.mark.parametrize("name", ["mixture_vae", "vamp_vae", "flow_prior_vae"])
def test_beta_can_be_annealed_but_capacity_is_refused(name: str) -> None:
    model = aezoo.create_model(name, input_shape=(4,))
    BetaAnnealing("linear", n_steps=5).setup(None, model, "fit")
    with pytest.raises(aezoo.AezooError, match="needs a model with a number"):
        BetaAnnealing("capacity", n_steps=5).setup(None, model, "fit")
