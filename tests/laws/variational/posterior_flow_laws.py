"""Laws of flow posteriors: determinants against autograd and areas, neutral limits, quadrature, known mistakes.

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
MODEL_OF = {"planar": "vae_flow", "radial": "vae_flow", "sylvester": "vae_flow", "iaf": "vae_iaf"}


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "planar": ("vae_flow", {"flow": "planar"}),
    "radial": ("vae_flow", {"flow": "radial"}),
    "sylvester": ("vae_flow", {"flow": "sylvester"}),
    "iaf": ("vae_iaf", {"flow_width": 12}),
}


def small(kind: str, latent_dim: int = 3, **settings: Any) -> Any:
    """A float64 model away from its initial weights, with flow steps far from the identity."""
    name, own = KINDS.get(kind, (kind, {}))
    torch.manual_seed(7)
    size = {"input_shape": (2, 3, 3), "latent_dim": latent_dim, "hidden_dims": (12,), "activation": "tanh"}
    flows = {} if name == "vae" else {"n_flows": 3}
    model = aezoo.create_model(name, **size, **own, **flows | settings).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return model


def data(n: int = 5) -> Tensor:
    return torch.rand(n, 2, 3, 3, dtype=torch.float64)


def jacobians(model: Any, z_BD: Tensor, steps_BP: Tensor, create_graph: bool = False) -> Tensor:
    """Jacobian of the whole flow for each sample, by autograd: (B, D, D)."""
    rows = [
        torch.autograd.functional.jacobian(
            lambda z, i=i: model.flow(z[None], steps_BP[i : i + 1])[0][0], z_BD[i], create_graph=create_graph
        )
        for i in range(len(z_BD))
    ]
    return torch.stack(rows)


# ---- determinants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_dim", [1, 2, 5, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_log_determinant_matches_autograd_jacobian(kind: str, latent_dim: int) -> None:
    model = small(kind, latent_dim)
    steps = model.amortised(data())[2]
    z = 2 * torch.randn(5, latent_dim, dtype=torch.float64)
    sign, expected = torch.linalg.slogdet(jacobians(model, z, steps))
    assert (sign > 0).all()
    found = model.flow(z, steps)[1]
    torch.testing.assert_close(found, expected)
    assert expected.abs().max() > 0.05 and expected.std() > 0.01
    # all draws of a sample use its flow parameters
    many = model.flow(torch.stack([z + 1, z]), steps)
    torch.testing.assert_close(many[1][1], expected)
    torch.testing.assert_close(many[0][1], model.flow(z, steps)[0])


def lines(model: Any, steps: Tensor) -> float:
    """The integral of the density of z_T over the images of the segments of a line of z_0."""
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None]
    moved, log_det = model.flow(z, steps)
    log_q = D.Normal(0.0, 1.0).log_prob(z[:, 0]) - log_det
    lengths = moved[1:, 0] - moved[:-1, 0]
    assert (lengths > 0).all()  # the flow is injective
    return float((0.5 * (log_q[1:].exp() + log_q[:-1].exp()) * lengths).sum().detach())


def quadrangles(model: Any, steps: Tensor) -> float:
    """The integral of the density of z_T over the images of a grid's squares, with areas by the shoelace formula."""
    line = torch.linspace(-6.5, 6.5, 500, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    moved, log_det = (part.detach() for part in model.flow(grid.reshape(-1, 2), steps))
    moved = moved.reshape(grid.shape)
    log_q = D.Normal(0.0, 1.0).log_prob(grid).sum(-1) - log_det.reshape(grid.shape[:2])
    a, b, c, d = moved[:-1, :-1], moved[1:, :-1], moved[1:, 1:], moved[:-1, 1:]
    first, second = c - a, d - b
    areas = 0.5 * (first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0])
    assert (areas != 0).all() and len(areas.sign().unique()) == 1
    q = log_q.exp()
    return float((0.25 * (q[:-1, :-1] + q[1:, :-1] + q[1:, 1:] + q[:-1, 1:]) * areas.abs()).sum())


@pytest.mark.slow
@pytest.mark.parametrize(("latent_dim", "integral"), [(1, lines), (2, quadrangles)])
@pytest.mark.parametrize("kind", KINDS)
def test_flow_posterior_density_integrates_to_one(kind: str, latent_dim: int, integral: Any) -> None:
    """Without derivatives: lengths and areas are those of the images of a grid."""
    model = small(kind, latent_dim)
    steps = model.amortised(data(1))[2]
    assert integral(model, steps) == pytest.approx(1, abs=2e-3)
    # a log-determinant of the wrong sign is far off
    flow = model.flow
    model.flow = lambda z, p: (flow(z, p)[0], -flow(z, p)[1])
    assert abs(integral(model, steps) - 1) > 0.01


# ---- the loss --------------------------------------------------------------------------------------------------------


def normal(mu: Tensor, log_var: Tensor) -> D.Distribution:
    return D.Independent(D.Normal(mu, (0.5 * log_var).exp()), 1)


def draw(model: Any, x: Tensor, seed: int = 3) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The loss terms, the decoded codes, and their noise."""
    seen: list[Tensor] = []
    handle = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(seed)
    terms = model.loss(x)
    handle.remove()
    torch.manual_seed(seed)
    return terms, seen[0], torch.randn(1, len(x), *model.code_shape, dtype=x.dtype)[0]


def gradients(model: Any, value: Tensor) -> Tensor:
    found = torch.autograd.grad(value, [*model.parameters()], retain_graph=True)
    return torch.cat([part.flatten() for part in found])


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_match_formula(kind: str, beta: float) -> None:
    model, x = small(kind, beta=beta), data()
    terms, z, eps = draw(model, x)
    mu, log_var, steps = model.amortised(x)
    start = mu + (0.5 * log_var).exp() * eps
    torch.testing.assert_close(z, model.flow(start, steps)[0])
    log_px = D.Bernoulli(logits=model.decoder(z), validate_args=False).log_prob(x).flatten(1).sum(1)
    log_det = torch.linalg.slogdet(jacobians(model, start, steps, create_graph=True))[1]
    standard = normal(torch.zeros_like(mu), torch.zeros_like(mu))
    change = standard.log_prob(start) - log_det - standard.log_prob(z)
    kl = (D.kl_divergence(normal(mu, log_var), standard) + change).mean()
    torch.testing.assert_close(terms["nll"], -log_px.mean())
    torch.testing.assert_close(terms["kl"], kl)
    torch.testing.assert_close(terms["elbo"], log_px.mean() - kl)
    torch.testing.assert_close(terms["loss"], beta * kl - log_px.mean())
    torch.testing.assert_close(gradients(model, terms["loss"]), gradients(model, beta * kl - log_px.mean()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mean_kl_matches_paper(kind: str) -> None:
    model, x = small(kind), data(1)
    with torch.no_grad():
        kl = torch.stack([model.loss(x.expand(50, 2, 3, 3))["kl"] for _ in range(400)])
        z, log_q = model.sample_posterior(x, 40_000)
        expected = (log_q - D.Normal(0.0, 1.0).log_prob(z).sum(-1))[:, 0]
    assert kl.mean().item() == pytest.approx(expected.mean().item(), abs=5 * kl.std().item() / 400**0.5)


def vae_with_weights_of(model: Any) -> Any:
    """A VAE with the model's mean, log-variance and decoder."""
    vae = small("vae", model.code_shape[0])
    own = vae.state_dict()
    given = {key: value[: len(own[key])] for key, value in model.state_dict().items() if key in own}
    vae.load_state_dict(given)
    return vae


def neutral(kind: str) -> list[Any]:
    """A model without steps, and one whose steps are the identity."""
    model = small(kind)
    with torch.no_grad():
        if kind == "iaf":  # two reversals restore the order
            for step in model.steps:
                step.gate.weight.zero_()
                step.gate.bias.fill_(60)
        else:
            last = model.encoder[-2]
            last.weight[6:] = 0
            last.bias[6:] = 0
    return [small(kind, n_flows=0), model]


@pytest.mark.parametrize("kind", KINDS)
def test_identity_flow_steps_equal_vae(kind: str) -> None:
    x = data()
    for model in neutral(kind):
        vae = vae_with_weights_of(model)
        (terms, z, _), (vae_terms, vae_z, _) = draw(model, x), draw(vae, x)
        torch.testing.assert_close(z, vae_z)
        torch.testing.assert_close(terms, vae_terms)
        torch.testing.assert_close(model.score(x), vae.score(x))
        torch.testing.assert_close(model.encode(x), vae.encode(x))
        found, expected = ([torch.manual_seed(0), one.log_likelihood(x, 20)][1] for one in (model, vae))
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_importance_likelihood_matches_prior_integral(kind: str) -> None:
    """Which requires the exact density of q(z|x); the ELBO is below the integral."""
    model, x = small(kind, 1), data(3)
    with torch.no_grad():
        # a posterior that covers the prior
        model.encoder[-2].bias[1] += 7 if kind == "iaf" else 2
        for step in getattr(model, "steps", ()):
            step.gate.bias += 3
        z = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
        log_px = torch.stack([-model.nll(model.decoder(z), one.expand(len(z), *one.shape)) for one in x], 1)
        log_p = D.Normal(0.0, 1.0).log_prob(z) + log_px
        exact = torch.logsumexp(log_p, 0) + math.log(float(z[1] - z[0]))
        found = model.log_likelihood(x, 20_000)
        torch.testing.assert_close(found, exact, rtol=0, atol=0.05)
        assert torch.stack([model.loss(x)["elbo"] for _ in range(200)]).mean() < exact.mean()
        flow = model.flow
        model.flow = lambda z, p: (flow(z, p)[0], -flow(z, p)[1])  # the wrong sign
        assert (model.log_likelihood(x, 20_000) - exact).abs().max() > 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scores_use_noise_free_posterior(kind: str) -> None:
    model, x = small(kind), data()
    assert torch.equal(model.score(x), model.score(x))
    with torch.no_grad():
        mu, _, steps = model.amortised(x)
        torch.testing.assert_close(model.encode(x), model.flow(mu, steps)[0])
        last = model.encoder[-2]
        last.weight[3:6] = 0
        last.bias[3:6] = -25.0  # sigma of 4e-6
        z = model.encode(x)
        # a mean over eps^2, which the score has in closed form
        log_q = model.sample_posterior(x, 10_000)[1].mean(0)
        expected = model.nll(model.decoder(z), x) + log_q - model.log_prior(z)
        torch.testing.assert_close(model.score(x), expected, atol=0.05, rtol=0)


# ---- invalid values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("vae_flow", {"flow": "spline"}, "planar, radial, sylvester"),
        ("vae_flow", {"n_flows": -1}, "n_flows must be from 0 to 256"),
        ("vae_iaf", {"n_flows": 257}, "n_flows must be from 0 to 256"),
        ("vae_iaf", {"flow_width": 0}, "flow_width must be at least 1"),
    ],
)
def test_invalid_values_are_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        aezoo.create_model(name, input_shape=(4,), **settings)


@pytest.mark.parametrize("name", ["vae_flow", "vae_iaf"])
def test_beta_can_be_annealed_but_capacity_is_refused(name: str) -> None:
    model = aezoo.create_model(name, input_shape=(4,))
    BetaAnnealing("linear", n_steps=5).setup(None, model, "fit")
    with pytest.raises(aezoo.AezooError, match="needs a model with a number"):
        BetaAnnealing("capacity", n_steps=5).setup(None, model, "fit")
