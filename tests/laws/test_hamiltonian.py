"""Laws of the Hamiltonian VAEs: reversible steps that keep volume, an exact bound, a metric that is what it says."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributions as D
from torch import Tensor

import aezoo
from aezoo import AezooError
from aezoo.manifolds.hamiltonian import kinetic_gradient
from aezoo.manifolds.riemannian import half_log_det, velocity
from aezoo.models.variational.hvae import HVAE

SHAPE = (2, 3, 3)


def small(name: str = "hvae", **settings: Any) -> Any:
    defaults = {"latent_dim": 4, "hidden_dims": (16,), "activation": "tanh"}
    return aezoo.create_model(name, SHAPE, **{**defaults, **settings}).double()


def images(n: int) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def normals(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


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


def test_the_leapfrog_s_jacobian_is_the_product_of_the_tempering_factors(shifted: Any) -> None:
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


def test_the_leapfrog_is_reversible_and_nearly_keeps_the_energy(shifted: Any) -> None:
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
    assert drift[0] < 0.2 and drift[1] < drift[0] / 2  # of second order, at a path half as long


def test_the_steps_are_those_of_the_paper(shifted: Any) -> None:
    """Algorithm 1 and equation 6, written with autograd and a loop of one's own."""
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


def draws_of(model: Any, x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """z_0, log q(z_0|x) and gamma of the next loss."""
    torch.manual_seed(seed)
    mu, log_var = model.posterior(x)
    eps, gamma = torch.randn(len(x), 2 * mu.shape[1], dtype=torch.float64).chunk(2, 1)
    q = D.Normal(mu, (0.5 * log_var).exp())
    z = mu + (0.5 * log_var).exp() * eps
    torch.manual_seed(seed)
    return z, q.log_prob(z).sum(1), gamma


@pytest.mark.parametrize("name", ["hvae", "rhvae"])
def test_no_step_is_the_vae(name: str, shifted: Any) -> None:
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


def test_the_bound_is_that_of_the_joint_density(shifted: Any) -> None:
    """Log p(x, z_K) + log N(rho_K) - log q(z_0) - log N(rho_0; 0, 1/beta_0) + D/2 log beta_0, the last the Jacobian."""
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


def test_the_bound_rises_with_the_steps_and_stays_below_the_evidence() -> None:
    """By the cooling alone: a flow that keeps p(x, z) N(rho) keeps the distance from it too."""
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


def test_importance_weights_of_the_flow_are_unbiased() -> None:
    """E[p / q] over draws is p(x): a wrong sign or factor in the momentum's term would show."""
    torch.manual_seed(0)
    model, x = linear(3, 6, n_leapfrog=3, step_size=0.15, beta_0=0.5), normals(4, 6)
    top = evidence(model, x)
    torch.testing.assert_close(model.log_likelihood(x, 20_000), top, rtol=0, atol=0.05)
    low = torch.stack([model.log_likelihood(x, 1) for _ in range(200)]).mean(0)
    assert (low < top).all()

    class Forgetful(HVAE):
        """Counts the momentum at the end alone."""

        def flow(self, x: Tensor, z_BD: Tensor, gamma_BD: Tensor) -> tuple[Tensor, Tensor]:
            z_BD, rho_BD = self.leapfrog(x, z_BD, gamma_BD * self.cooling[0] ** -1)
            return z_BD, 0.5 * (rho_BD**2).sum(1)

    model.__class__ = Forgetful
    assert (model.log_likelihood(x, 20_000) - top).abs().min() > 0.3


def test_the_gradient_passes_through_the_decoder_s_gradient(shifted: Any) -> None:
    """Of all parameters, step size and encoder included, against finite differences of the loss at fixed noise."""
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


@pytest.mark.parametrize("name", ["hvae", "rhvae"])
def test_the_score_is_the_bound_s_at_the_mean_with_no_momentum(name: str, shifted: Any) -> None:
    """With sigma^2 in place of the squared noise, as KL of the VAE has it at K = 0."""
    model, x = shifted(small(name, step_size=0.2)).double().eval(), images(5)
    mu, log_var = model.posterior(x)
    z, momentum = model.flow(x, mu, torch.zeros_like(mu))
    assert (z - mu).abs().max() > 1e-3
    assert momentum.abs().min() > 1e-4
    nll = -D.Bernoulli(logits=model.decoder(z), validate_args=False).log_prob(x).flatten(1).sum(1)
    q, p = D.Normal(z, (0.5 * log_var).exp()), D.Normal(torch.zeros_like(z), torch.ones_like(z))
    torch.testing.assert_close(model.score(x), nll + D.kl_divergence(q, p).sum(1) + momentum)
    torch.testing.assert_close(model.encode(x), mu)


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


def test_bad_settings_of_the_hvae_are_refused() -> None:
    for setting in ({"n_leapfrog": -1}, {"step_size": 0.0}, {"step_size": 0.5}, {"beta_0": 0.0}, {"beta_0": 1.1}):
        with pytest.raises(AezooError, match=next(iter(setting))):
            small(**setting)


# ---- the metric ------------------------------------------------------------------------------------------------------


def curved(**settings: Any) -> Any:
    """A model whose centroids lie among the codes, so that the metric bends there."""
    torch.manual_seed(4)
    model = small("rhvae", **{"n_centroids": 7, "latent_dim": 3, "metric_floor": 0.3, "step_size": 0.1, **settings})
    with torch.no_grad():
        for p in model.metric.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.eval()


def explicit_metric(model: Any, z: Tensor) -> Tensor:
    """G^-1 of one code, term by term."""
    d = len(z)
    total = model.metric_floor * torch.eye(d, dtype=torch.float64)
    for c in model.centroids_MD:
        entries = model.metric[2](model.metric[0](c).relu())
        L = torch.diag(torch.nn.functional.softplus(entries[:d]))
        rest = iter(entries[d:])
        for i in range(d):
            for j in range(i):
                L[i, j] = next(rest)
        total = total + L @ L.T * torch.exp(-(z - c).square().sum() / model.temperature**2)
    return total


def test_the_metric_is_the_sum_over_centroids_and_positive_definite() -> None:
    model, z = curved(), normals(5, 3)
    inverse = model.metric_now().inverse
    found = inverse(z)
    torch.testing.assert_close(found, torch.stack([explicit_metric(model, row) for row in z]))
    torch.testing.assert_close(found, found.mT)
    values = torch.linalg.eigvalsh(found)
    assert values.min() > 0.3 and values.max() > 0.6  # the floor, and more than that
    torch.testing.assert_close(half_log_det(found), 0.5 * torch.logdet(found.inverse()))
    torch.testing.assert_close(inverse(z + 100), 0.3 * torch.eye(3, dtype=torch.float64).expand(5, 3, 3))
    v = normals(5, 3)
    torch.testing.assert_close(velocity(found, v), torch.einsum("bij,bj->bi", found, v))


def test_the_slopes_are_those_of_the_hamiltonian() -> None:
    model, z, v = curved(), normals(4, 3).requires_grad_(), normals(4, 3)
    kinetic = sum(
        0.5 * torch.logdet(torch.linalg.inv(explicit_metric(model, a))) + 0.5 * b @ explicit_metric(model, a) @ b
        for a, b in zip(z, v, strict=True)
    )
    found = kinetic_gradient(z, v, model.metric_now().inverse)
    torch.testing.assert_close(found, torch.autograd.grad(kinetic, z)[0])


def test_the_generalised_leapfrog_is_reversible_and_keeps_volume() -> None:
    model, x, start = curved(n_leapfrog=2, beta_0=0.4, n_fixed_point=25), images(1), normals(6)
    metric = model.metric_now()
    metric = metric._replace(c_MD=metric.c_MD.detach(), S_MDD=metric.S_MDD.detach())

    def flow(state: Tensor) -> Tensor:
        return torch.cat(model.travel(x, state[None, :3], state[None, 3:], metric.inverse), 1)[0]

    jacobian = torch.autograd.functional.jacobian(flow, start)
    assert (flow(start) - start).abs().max() > 0.1
    assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(1.5 * math.log(0.4), abs=1e-8)
    model.cooling = [1.0, 1.0, 1.0]
    back = flow(flow(start) * torch.tensor([1, 1, 1, -1, -1, -1]))
    torch.testing.assert_close(back * torch.tensor([1, 1, 1, -1, -1, -1]), start, rtol=1e-8, atol=1e-8)


def test_a_flat_metric_is_the_hamiltonian_vae(shifted: Any) -> None:
    x = images(6)
    model = shifted(small("rhvae", n_centroids=5, metric_floor=1.0, step_size=0.1, beta_0=0.4)).double()
    plain = small("hvae", step_size=0.1, beta_0=0.4)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key in plain.state_dict()})
    found = []
    for moved in (0.0, 1e3):
        model.centroids_MD += moved
        torch.manual_seed(0)
        found.append(model.eval().loss(x))
    torch.manual_seed(0)
    expected = plain.loss(x)
    for term, value in expected.items():
        torch.testing.assert_close(found[1][term], value)
    assert (found[0]["loss"] - expected["loss"]).abs() > 1e-3
    torch.testing.assert_close(model.score(x), plain.score(x))


def test_the_riemannian_bound_is_that_of_the_joint_density() -> None:
    """With N(v; 0, G) by torch.distributions at both ends."""
    model, x = curved(n_leapfrog=2, beta_0=0.5, n_fixed_point=30), images(6)
    z, log_q, gamma = draws_of(model, x, 5)
    terms = model.loss(x)
    inverse = model.metric_now().inverse

    def momentum(z: Tensor, heat: float) -> D.Distribution:
        return D.MultivariateNormal(torch.zeros(3).double(), precision_matrix=inverse(z) / heat)

    root = torch.linalg.cholesky(inverse(z))
    v = torch.stack([torch.linalg.inv(a).T @ b for a, b in zip(root, gamma, strict=True)]) / 0.5**0.5
    z_k, v_k = model.travel(x, z, v, inverse)
    log_px = D.Bernoulli(logits=model.decoder(z_k), validate_args=False).log_prob(x).flatten(1).sum(1)
    bound = log_px + D.Normal(0, 1).log_prob(z_k).sum(1) + momentum(z_k, 1.0).log_prob(v_k)
    bound = bound - log_q - momentum(z, 2.0).log_prob(v) + 1.5 * math.log(0.5)
    torch.testing.assert_close(terms["elbo"], bound.mean())


def test_importance_weights_of_the_riemannian_flow_are_unbiased() -> None:
    """E[w] = p(x), which sums over all binary images to one."""
    torch.manual_seed(0)
    model = aezoo.create_model(
        "rhvae", (3,), latent_dim=2, hidden_dims=(), n_centroids=4, n_fixed_point=8, metric_floor=0.5, step_size=0.1
    ).double()
    with torch.no_grad():
        model.decoder[1].weight *= 3
        model.encoder[1].weight *= 0.3
    images = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)
    total = model.log_likelihood(images, 2500).exp().sum().item()
    assert total == pytest.approx(1, abs=0.05)


def test_centroids_are_the_codes_seen_last() -> None:
    model = small("rhvae", n_centroids=5).train()
    before = model.centroids_MD.clone()
    x, other = images(2), images(2)
    model.loss(x)
    torch.testing.assert_close(model.centroids_MD, torch.cat([before[2:], model.posterior(x)[0]]))
    model.loss(other)
    kept = torch.cat([before[4:], model.posterior(x)[0], model.posterior(other)[0]])
    torch.testing.assert_close(model.centroids_MD, kept)
    model.eval().loss(images(3))
    torch.testing.assert_close(model.centroids_MD, kept)
    many = images(9)
    model.train().loss(many)
    torch.testing.assert_close(model.centroids_MD, model.posterior(many)[0][-5:])


def test_samples_follow_the_root_of_the_inverse_metric_s_determinant() -> None:
    """Around a single centroid of one dimension it is a Gaussian of standard deviation T, down to the floor."""
    model = small("rhvae", latent_dim=1, n_centroids=1, temperature=0.7, metric_floor=1e-6)
    model.centroids_MD.fill_(2.0)
    z = model.sample_prior(3000)[:, 0]
    inner = z[(z - 2).abs() < 2]
    assert len(inner) > 0.98 * len(z)
    assert inner.mean().item() == pytest.approx(2, abs=0.05)
    assert inner.std().item() == pytest.approx(0.7, abs=0.04)
    assert model.sample(4).shape == (4, *SHAPE)


def test_bad_settings_of_the_rhvae_are_refused() -> None:
    for setting in ({"n_centroids": 0}, {"temperature": 0.0}, {"metric_floor": 0.0}, {"n_fixed_point": 0}):
        with pytest.raises(AezooError, match=next(iter(setting))):
            small("rhvae", **setting)
