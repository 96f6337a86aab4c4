"""Laws of learned priors: densities against torch.distributions and quadrature, neutral limits, rivals' mistakes.

Models are in float64 and away from their initial weights; what a reference needs of them is their posterior alone.
"""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from torch import Tensor

import aezoo
from aezoo.callbacks.annealing import BetaAnnealing
from aezoo.models.variational.vae import VAE

MIXTURES = ("mixture_vae", "vamp_vae")
FLOWS = ("realnvp", "maf")


def small(name: str, latent_dim: int = 3, **settings: Any) -> Any:
    """Away from the start, with components that differ, in float64."""
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
    """The prior by torch.distributions, from the parameters alone or from the encoder's view of the pseudo-inputs."""
    if hasattr(model, "pseudo_K"):
        u = model.pseudo_K.sigmoid() if model.likelihood.unit_interval else model.pseudo_K
        logits, (mu, log_var) = torch.zeros(len(u), dtype=u.dtype), model.posterior(u)
    else:
        logits, mu, log_var = model.weight_K, model.mean_KD, model.log_var_KD
    return D.MixtureSameFamily(D.Categorical(logits=logits), normal(mu, log_var))


def density(model: Any, z: Tensor) -> Tensor:
    """Log p(z) by torch.distributions, for flows by autograd's Jacobian: (B, D) -> (B,)."""
    if not hasattr(model, "flow"):
        return mixture(model).log_prob(z)

    def forward(one: Tensor) -> Tensor:
        for layer in model.flow:
            one = layer(one)[0]
        return one

    jacobian = torch.func.vmap(torch.func.jacrev(forward))(z)
    return D.Normal(0.0, 1.0).log_prob(forward(z)).sum(1) + torch.linalg.slogdet(jacobian)[1]


def draw(model: Any, x: Tensor, seed: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of one draw, and the code that was decoded."""
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
def test_the_prior_is_the_mixture_of_torch_distributions(name: str, likelihood: str) -> None:
    model = small(name, n_components=4, likelihood=likelihood)
    z = 2 * torch.randn(6, 5, 3, dtype=torch.float64)
    expected = mixture(model).log_prob(z)
    torch.testing.assert_close(model.log_prior(z), expected)
    # far out too, where each density underflows
    torch.testing.assert_close(model.log_prior(100 * z), mixture(model).log_prob(100 * z))
    # PyTorch-VAE's parenthesis: the log-variance is divided by the variance as well
    log_w, mu, log_var = model.mixture()
    exponent = -0.5 * (log_var + (z[..., None, :] - mu) ** 2) / log_var.exp()
    wrong = torch.logsumexp(log_w + exponent.sum(-1), -1) - 1.5 * math.log(2 * math.pi)
    assert (wrong - expected).abs().mean() > 0.1
    # and a mixture that forgets its weights
    assert (torch.logsumexp(model.log_joint(z[0], 0 * z[0]) - log_w, 1) - expected[0]).abs().min() > 0.1


@pytest.mark.parametrize("name", MIXTURES)
def test_many_codes_are_compared_with_the_components_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, z = small(name, n_components=4), torch.randn(7, 3, dtype=torch.float64)
    whole = model.log_prior(z)
    monkeypatch.setattr("aezoo.bases.mixture_prior._MAX_VALUES", 25)
    torch.testing.assert_close(model.log_prior(z), whole)


@pytest.mark.parametrize("name", [*MIXTURES, *FLOWS])
def test_the_density_of_a_prior_integrates_to_one(name: str) -> None:
    model = small(name, latent_dim=2)
    z, area = plane(20, 601)
    assert model.log_prior(z).exp().sum().item() * area == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_codes_drawn_from_a_mixture_have_its_moments(name: str) -> None:
    model = small(name, n_components=3)
    expected, z = mixture(model), model.sample_prior(100_000)
    scale = expected.variance.sqrt()
    assert ((z.mean(0) - expected.mean) / scale).abs().max() < 0.02
    assert (z.std(0) / scale - 1).abs().max() < 0.02
    # the mean log-density of draws is minus the entropy of a distribution, here against draws of torch's
    entropy = -expected.log_prob(expected.sample((100_000,))).mean()
    assert -model.log_prior(z).mean().item() == pytest.approx(entropy.item(), abs=0.02)
    assert model.sample(3).shape == (3, 2, 3, 3)


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("name", [*MIXTURES, *FLOWS])
def test_the_loss_and_all_its_gradients_are_those_of_the_formula(name: str, beta: float) -> None:
    """Of the pseudo-inputs and, by way of them, of the encoder as well."""
    model, x = small(name, beta=beta), data()
    terms, drawn = draw(model, x)
    mu, log_var = model.posterior(x)
    z = mu + (0.5 * log_var).exp() * ((drawn - mu) / (0.5 * log_var).exp()).detach()
    log_px = D.Bernoulli(logits=model.decoder(z), validate_args=False).log_prob(x).flatten(1).sum(1)
    log_q = normal(mu, log_var).log_prob(z)
    if name in FLOWS:  # all that is known in closed form
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
        # a prior that is taken for a constant moves the encoder elsewhere
        with torch.no_grad():
            held = mixture(model)
        wrong = normal(mu, log_var).log_prob(z).mean() - held.log_prob(z).mean() - log_px.mean()
        encoder = [*model.encoder.parameters()]
        one, two = (torch.autograd.grad(v, encoder[0], retain_graph=True)[0] for v in (terms["loss"], wrong))
        assert (one - two).abs().max() > 1e-3


def standard(name: str, **settings: Any) -> tuple[Any, Any]:
    """A model whose one component is N(0, I), and a VAE of the same weights."""
    size = {"input_shape": (2, 3, 3), "latent_dim": 3, "hidden_dims": (), **settings}
    model, vae = (aezoo.create_model(which, **size, **extra).double() for which, extra in pair(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        if name == "vamp_vae":
            # a linear encoder that takes the pseudo-input to mean 0 and log-variance 0
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
def test_a_single_standard_component_is_the_vae(name: str) -> None:
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


def test_with_the_data_as_pseudo_inputs_the_prior_is_the_mean_of_the_posteriors() -> None:
    x = data(4).clamp(0.01, 0.99)
    for n in (1, 4):
        model = small("vamp_vae", n_components=n)
        with torch.no_grad():
            model.pseudo_K.copy_(x[:n].logit())
        z = torch.randn(6, 3, dtype=torch.float64)
        each = torch.stack([normal(*(p[i] for p in model.posterior(x[:n]))).log_prob(z) for i in range(n)])
        torch.testing.assert_close(model.log_prior(z), each.exp().mean(0).log())
    alone = small("vamp_vae", n_components=1)
    with torch.no_grad():
        alone.pseudo_K.copy_(x[:1].logit())
    terms = alone.loss(x[:1])
    assert terms["kl"].abs() < 1e-9 and terms["nll"] > 1  # p(z) = q(z|x): the code costs nothing


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretised_logistic", "gaussian", "laplace:learned"])
def test_pseudo_inputs_lie_where_data_lie(likelihood: str) -> None:
    model = small("vamp_vae", n_components=50, likelihood=likelihood)
    with torch.no_grad():
        model.pseudo_K.mul_(20)
    u = model.pseudo_inputs()
    assert u.shape == (50, 2, 3, 3)
    inside = bool((u >= 0).all() and (u <= 1).all())
    assert inside == model.likelihood.unit_interval
    # unlike a hardtanh's, the gradient does not die at the ends
    (slope,) = torch.autograd.grad((0.01 * u).sum(), model.pseudo_K)
    assert bool((slope > 0).any(0).all())


@pytest.mark.parametrize("name", MIXTURES)
def test_the_score_holds_a_bound_on_the_kl_that_is_tight_for_components_far_apart(name: str) -> None:
    model, x = small(name, n_components=3), data(4)
    mu, log_var = model.posterior(x)
    z = normal(mu, log_var).sample((20_000,))
    kl = (normal(mu, log_var).log_prob(z) - mixture(model).log_prob(z)).mean(0)
    bound = model.score(x) - model.nll(model.decoder(mu), x)
    assert (bound - kl).min() > -0.05
    assert torch.equal(model.score(x), model.score(x))
    # by the closed form of torch.distributions
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
    """Log p(x) of a model with one code dimension, by quadrature over its prior's density."""
    z = torch.linspace(-15, 15, 6001, dtype=torch.float64)[:, None]
    log_px = torch.stack([-model.nll(model.decoder(z), one.expand(len(z), *one.shape)) for one in x], 1)
    return torch.logsumexp(log_px + model.log_prior(z)[:, None], 0) + math.log(float(z[1] - z[0]))


@pytest.mark.parametrize("name", [*MIXTURES, *FLOWS])
def test_the_importance_sampled_likelihood_is_the_integral_over_the_prior(name: str) -> None:
    model, x = small(name, latent_dim=1), data(3)
    with torch.no_grad():
        model.encoder[-2].bias[1] += 5 if name in FLOWS else 2  # a posterior that covers the prior
        exact = integral(model, x)
        torch.testing.assert_close(model.log_likelihood(x, 20_000), exact, rtol=0, atol=0.05)
        elbo = torch.stack([model.loss(x)["elbo"] for _ in range(400)]).mean()
        assert elbo < exact.mean()


def test_a_mixture_starts_with_the_mean_and_the_covariance_of_the_standard_normal() -> None:
    torch.manual_seed(0)
    model = aezoo.create_model("mixture_vae", input_shape=(4,), latent_dim=2, n_components=3000)
    z = model.sample_prior(50_000)
    assert z.mean(0).abs().max() < 0.05 and (torch.cov(z.T) - torch.eye(2)).abs().max() < 0.06


# ---- flows: Dinh et al. 2016, Papamakarios et al. 2017 ---------------------------------------------------------------


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
@pytest.mark.parametrize("name", FLOWS)
def test_the_log_determinant_is_that_of_autograd_s_jacobian(name: str, latent_dim: int) -> None:
    model, z = small(name, latent_dim=latent_dim), 2 * torch.randn(6, latent_dim, dtype=torch.float64)
    expected = density(model, z)
    torch.testing.assert_close(model.log_prior(z), expected)
    torch.testing.assert_close(model.log_prior(torch.stack([z + 1, z]))[1], expected)
    wrong = 2 * D.Normal(0.0, 1.0).log_prob(through(model, z)).sum(1) - expected  # of a determinant upside down
    assert (wrong - expected).abs().max() > 0.1


def through(model: Any, z: Tensor) -> Tensor:
    for layer in model.flow:
        z = layer(z)[0]
    return z


def test_the_realnvp_is_zuko_s() -> None:
    zuko = pytest.importorskip("zuko")
    model, z = small("realnvp", latent_dim=5), torch.randn(6, 5, dtype=torch.float64)
    flow = zuko.flows.RealNVP(5, transforms=3, hidden_features=(8, 8), activation=torch.nn.ELU).double()
    with torch.no_grad():
        for layer, theirs in zip(model.flow, flow.transform.transforms, strict=True):
            first, _, second, _, last = layer.net
            kept = theirs.mask
            rows = torch.stack([torch.arange(5), 5 + torch.arange(5)], 1)[~kept].flatten()  # they interleave m and a
            given = [first.weight[:, kept], first.bias, second.weight, second.bias, last.weight[rows], last.bias[rows]]
            for parameter, value in zip(theirs.hyper.parameters(), given, strict=True):
                parameter.copy_(value)
            assert torch.equal(first.mask.any(0), kept)
            assert torch.equal(last.mask.any(1), (~kept).repeat(2))
    torch.testing.assert_close(model.log_prior(z), flow().log_prob(z))


@pytest.mark.parametrize("name", FLOWS)
def test_an_element_is_moved_as_its_predecessors_say(name: str) -> None:
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
def test_the_inverse_of_a_flow_is_its_inverse(name: str, latent_dim: int) -> None:
    model, z = small(name, latent_dim=latent_dim), torch.randn(3, 7, latent_dim, dtype=torch.float64)
    for layer in model.flow:
        torch.testing.assert_close(layer.inverse(layer(z)[0]), z)
        torch.testing.assert_close(layer(layer.inverse(z))[0], z)
    torch.manual_seed(0)
    drawn = model.sample_prior(9)
    torch.manual_seed(0)
    torch.testing.assert_close(through(model, drawn), torch.randn(9, latent_dim, dtype=torch.float64))


@pytest.mark.parametrize("name", FLOWS)
def test_codes_drawn_from_a_flow_have_its_density(name: str) -> None:
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
def test_without_layers_and_with_layers_that_do_nothing_it_is_the_vae(name: str, n_flows: int) -> None:
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
def test_the_score_takes_what_the_flow_changes_at_the_posterior_s_mean(name: str) -> None:
    model, x = small(name), data()
    with torch.no_grad():
        model.encoder[-2].weight[3:] = 0
        model.encoder[-2].bias[3:] = -25.0  # no noise: the change is the same everywhere under q
        mu, log_var = model.posterior(x)
        entropy = 0.5 * (1 + log_var + math.log(2 * math.pi)).sum(1)
        expected = model.nll(model.decoder(mu), x) - entropy - density(model, mu)
        torch.testing.assert_close(model.score(x), expected)
        assert torch.equal(model.score(x), model.score(x))


# ---- two stages: Dai & Wipf 2019 -------------------------------------------------------------------------------------


def two_stages(latent_dim: int = 3, **settings: Any) -> tuple[Any, Any]:
    """A model of two stages, and a VAE of its first one's weights."""
    model = small("two_stage_vae", latent_dim, second_hidden_dims=(10,), **settings)
    vae = small("vae", latent_dim, likelihood="gaussian:learned")
    vae.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("second.")})
    return model, vae


def first_stage(model: Any) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if not name.startswith("second.")]


def test_the_first_stage_has_the_loss_and_the_gradient_of_a_vae() -> None:
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
    # codes that are not detached would pull the encoder to where the second stage likes them
    torch.manual_seed(3)
    joint = model.second.loss(model.sample_posterior(x, 1)[0][0])["loss"]
    assert torch.autograd.grad(joint, model.encoder[1].weight)[0].abs().max() > 1e-3
    torch.testing.assert_close(model.score(x), vae.score(x))


def test_trained_side_by_side_the_first_stage_is_the_one_trained_alone() -> None:
    model, vae = two_stages()
    for one in (model, vae):
        optimizer = torch.optim.Adam(one.parameters(), 1e-2)
        for step in range(5):
            torch.manual_seed(step)  # as the loop does
            optimizer.zero_grad()
            one.loss(data())["loss"].backward()
            optimizer.step()
    for one, two in zip(first_stage(model), vae.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_second_stage_is_a_vae_of_the_codes_and_the_elbo_that_of_both() -> None:
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
    """Two stages with linear decoders, and what z and x are distributed as then, in closed form."""
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


def test_of_linear_stages_codes_and_likelihoods_are_known_in_closed_form() -> None:
    model, of_z, of_x = linear_stages()
    drawn = model.sample_prior(100_000)
    assert (drawn.mean(0) - of_z.mean).abs().max() < 0.03
    assert (torch.cov(drawn.T) - of_z.covariance_matrix).abs().max() < 0.05  # with the noise at z
    z, x = of_z.sample((4,)), of_x.sample((4,))
    found = torch.logsumexp(model.log_prior(z.expand(20_000, 4, 2)), 0) - math.log(20_000)
    torch.testing.assert_close(found, of_z.log_prob(z), rtol=0, atol=0.05)
    torch.testing.assert_close(model.log_likelihood(x, 40_000), of_x.log_prob(x), rtol=0, atol=0.1)
    with torch.no_grad():
        assert model.loss(x.repeat(2000, 1))["elbo"] < of_x.log_prob(x).mean()
    # a standard normal prior in its place is another model
    wrong = VAE.log_prior(model, z)
    assert (wrong - of_z.log_prob(z)).abs().max() > 0.1


def test_samples_go_by_way_of_both_decoders() -> None:
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


# ---- what cannot work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("mixture_vae", {"n_components": 0}, "n_components must be at least 1"),
        ("vamp_vae", {"n_components": 0}, "n_components must be at least 1"),
        ("vamp_vae", {"latent_dim": 0}, "latent_dim"),
        ("flow_prior_vae", {"prior": "nsf"}, "take one of realnvp, maf"),
        ("flow_prior_vae", {"n_flows": 257}, "n_flows must be from 0 to 256"),
        ("flow_prior_vae", {"flow_width": 0}, "flow_width must be at least 1"),
    ],
)
def test_values_that_cannot_work_are_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        aezoo.create_model(name, input_shape=(4,), **settings)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_pseudo_inputs_start_at_the_first_samples_once_and_copies_differ(likelihood: str) -> None:
    torch.manual_seed(0)
    model: Any = aezoo.create_model("vamp_vae", (2, 3, 3), n_components=7, likelihood=likelihood).train()
    x = data(5).float()
    noise = model.pseudo_K.detach().clone()
    model.begin_step(x, 0)
    u = torch.cat([x, x[:2]])
    expected = torch.sigmoid(noise + torch.logit(u.clamp(0.05, 0.95))) if likelihood == "bernoulli" else noise + u
    torch.testing.assert_close(model.pseudo_inputs(), expected)
    assert (model.pseudo_inputs()[0] - model.pseudo_inputs()[5]).abs().max() > 0.01
    before = model.pseudo_K.detach().clone()
    model.begin_step(x + 1, 1)
    assert torch.equal(model.pseudo_K, before)
    untouched: Any = aezoo.create_model("vamp_vae", (2, 3, 3), n_components=7, data_init=False).train()
    before = untouched.pseudo_K.detach().clone()
    untouched.begin_step(x, 0)
    assert torch.equal(untouched.pseudo_K, before)


@pytest.mark.parametrize("name", ["mixture_vae", "vamp_vae", "flow_prior_vae"])
def test_the_kl_s_weight_may_rise_but_there_is_no_capacity(name: str) -> None:
    model = aezoo.create_model(name, input_shape=(4,))
    BetaAnnealing("linear", n_steps=5).setup(None, model, "fit")
    with pytest.raises(aezoo.AezooError, match="needs a model with a number"):
        BetaAnnealing("capacity", n_steps=5).setup(None, model, "fit")


def test_two_stages_have_no_weight_to_anneal() -> None:
    for mode in ("linear", "capacity"):
        with pytest.raises(aezoo.AezooError, match="needs a model with a number"):
            BetaAnnealing(mode, n_steps=5).setup(None, aezoo.create_model("two_stage_vae", input_shape=(4,)), "fit")
