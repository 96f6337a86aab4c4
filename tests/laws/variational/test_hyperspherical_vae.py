"""Laws of the hyperspherical VAE (Davidson et al. 2018)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from geometry_helpers import (
    directions,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from scipy import special, stats
from torch import Tensor

import aezoo
from aezoo import AezooError
from aezoo.manifolds import sphere as manifold
from aezoo.models.variational.hyperspherical_vae import START

FAMILIES = ("power_spherical", "vmf")


KAPPAS = (1e-6, 0.3, 2.0, 40.0, 3e3)


def sphere(d: int, family: str, **settings: Any) -> Any:
    return aezoo.create_model(
        "hyperspherical_vae", (2, 3, 3), latent_dim=d, posterior=family, hidden_dims=(16,), **settings
    ).double()


def family_of(d: int, family: str) -> Any:
    return manifold.FAMILIES[family](d)


def concentrations(kappa: float, n: int) -> Tensor:
    return torch.full((n,), kappa, dtype=torch.float64)


def spread(kappa: float, like: Tensor) -> Tensor:
    return torch.full_like(like, kappa)


def reference_entropy(d: int, family: str, kappa: float) -> float:
    """The entropy of the density on the sphere, by scipy."""
    if family == "vmf":
        return float(stats.vonmises_fisher(np.eye(d)[0], kappa).entropy())
    a, b = (d - 1) / 2 + kappa, (d - 1) / 2  # De Cao & Aziz 2020, equations 6 and 17
    log_n = (a + b) * math.log(2) + b * math.log(math.pi) + special.gammaln(a) - special.gammaln(a + b)
    return float(log_n - kappa * (math.log(2) + special.digamma(a) - special.digamma(a + b)))


# ---- the sphere ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_to_uniform_is_log_area_minus_entropy(family: str) -> None:
    for d in (2, 3, 5, 16, 64):
        log_area = math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)
        mu = directions(1, d)
        for kappa in KAPPAS:
            found = sphere(d, family).kl(mu, spread(kappa, mu)).item()
            expected = log_area - reference_entropy(d, family, kappa)
            assert found == pytest.approx(expected, rel=1e-8, abs=1e-8), (d, kappa)
        assert sphere(d, family).kl(mu, spread(1e-6, mu)).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_gradient_matches_reference(family: str) -> None:
    for d, kappa in ((2, 0.7), (5, 2.0), (16, 30.0)):
        mu = directions(1, d)
        concentration = spread(kappa, mu).requires_grad_()
        found = torch.autograd.grad(sphere(d, family).kl(mu, concentration).sum(), concentration)[0].sum().item()
        low, high = (-reference_entropy(d, family, kappa * (1 + step)) for step in (-1e-4, 1e-4))
        assert found == pytest.approx((high - low) / (2e-4 * kappa), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_density_integrates_to_one_over_the_sphere(family: str) -> None:
    q, mu = family_of(3, family), directions(1, 3)
    heights = torch.linspace(-1, 1, 2001, dtype=torch.float64)[:-1] + 5e-4
    turns = torch.arange(400, dtype=torch.float64) * 2 * math.pi / 400
    height, turn = torch.meshgrid(heights, turns, indexing="ij")
    ring = (1 - height**2).sqrt()
    grid = torch.stack([ring * turn.cos(), ring * turn.sin(), height], -1).reshape(-1, 1, 3)
    for kappa in (0.0001, 1.0, 25.0):
        total = q.log_prob(grid, mu, concentrations(kappa, 1)).exp().mean().item() * 4 * math.pi
        assert total == pytest.approx(1, abs=1e-4)
    wide, mu = sphere(8, family), directions(1, 8)
    uniform = directions(400_000, 8)[:, None]
    weights = (wide.family.log_prob(uniform, mu, concentrations(4.0, 1)) - wide.log_prior(uniform)).exp()
    assert weights.mean().item() == pytest.approx(1, abs=0.02)
    assert wide.log_prior(uniform).exp()[0].item() * 2 * math.pi**4 / math.gamma(4) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_finite_at_any_concentration(family: str) -> None:
    for d in (2, 3, 10, 64):
        model = sphere(d, family).float()
        for kappa in (1e-6, 1e-2, 1.0, 1e3, 1e6):
            mu = torch.cat([directions(4, d).float(), torch.eye(d)[:1], -torch.eye(d)[:1]]).requires_grad_()
            k = torch.full_like(mu, kappa).requires_grad_()
            z, kl = model.family.sample(mu, k[:, 0]), model.kl(mu, k)
            assert kl.min() > -1e-6 and (z.norm(dim=1) - 1).abs().max() < 1e-6
            assert model.family.log_prob(z, mu, k[:, 0]).isfinite().all()
            for grad in torch.autograd.grad((z * torch.randn(d)).sum() + kl.sum(), (mu, k)):
                assert grad.isfinite().all(), (d, kappa)
        with torch.no_grad():
            model.encoder[-2].bias += 1e30
        assert all(value.isfinite() for value in model.loss(torch.rand(3, 2, 3, 3)).values())


@pytest.mark.parametrize(("scale", "factor"), [(None, 4.0), (1.0, 1.0), (2.5, 2.5)])
def test_concentration_is_a_scaled_softplus(scale: float | None, factor: float) -> None:
    model, x = sphere(4, "vmf", kappa_scale=scale), torch.rand(3, 2, 3, 3, dtype=torch.float64)
    expected = factor * torch.nn.functional.softplus(model.encoder(x)[:, -1:]) + 1
    torch.testing.assert_close(model.posterior(x)[1], expected.expand(3, 4))
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(AezooError, match="kappa_scale"):
            sphere(4, "vmf", kappa_scale=wrong)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_hyperspherical_elbo_is_the_mean_log_weight(family: str, shifted: Any) -> None:
    """Draws, log q, log p, KL and likelihood are consistent; codes are on the sphere."""
    model, x = shifted(sphere(4, family, beta=3.0)).double().eval(), torch.rand(3, 2, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        model.encoder[-2].bias[-1] -= START  # importance weights of wide posteriors vary little
    mu, kappa = model.posterior(x)
    torch.testing.assert_close(mu.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(model.encode(x), mu)
    z, log_q = model.sample_posterior(x, 20_000)
    kl = model.kl(mu, kappa)
    torch.testing.assert_close((log_q - model.log_prior(z)).mean(0), kl, rtol=0, atol=0.03)
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    terms = model.loss(x)
    nll = -D.Bernoulli(logits=model.decoder(seen[0]), validate_args=False).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(terms["nll"], nll.mean())
    torch.testing.assert_close(terms["loss"], nll.mean() + 3 * kl.mean())
    torch.testing.assert_close(terms["elbo"], -nll.mean() - kl.mean())
    at_mu = -D.Bernoulli(logits=model.decoder(mu), validate_args=False).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(model.score(x), at_mu + kl)
    torch.testing.assert_close(model.decode(mu * torch.tensor([[0.1], [3.0], [1.0]])), model.decode(mu))
    prior = model.sample_prior(50_000)
    torch.testing.assert_close(prior.norm(dim=1), torch.ones(50_000, dtype=torch.float64))
    torch.testing.assert_close(prior.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=0.02)
    log_px = [-model.nll(model.decoder(prior), x[i : i + 1].expand(50_000, 2, 3, 3)).detach() for i in range(3)]
    evidence = torch.stack(log_px).logsumexp(1) - math.log(50_000)
    # the weights of power_spherical have no finite variance, since its density is 0 at -mu
    torch.testing.assert_close(model.log_likelihood(x, 20_000), evidence, rtol=0, atol=0.15)


@pytest.mark.parametrize("d", [2, 3, 8])
def test_prior_draws_are_uniform_on_the_sphere(d: int) -> None:
    """Unit vectors with (1 + z_i) / 2 from Beta((D - 1) / 2, (D - 1) / 2) and covariance I / D."""
    torch.manual_seed(0)
    n, a = 4000, (d - 1) / 2
    z = sphere(d, "vmf").sample_prior(n)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(n, dtype=torch.float64))
    for z_n in z.T:
        assert stats.kstest((1 + z_n.numpy()) / 2, stats.beta(a, a).cdf).pvalue > 1e-4
    assert (z.T @ z / n - torch.eye(d) / d).abs().max() < 5 * math.sqrt(2 / n) / d


def test_kappa_starts_large_and_is_at_least_one() -> None:
    """The KL pulls untrained models towards a uniform q(z|x), from which no gradient would lead back."""
    x = torch.rand(20, 1, 8, 8)
    for net, d in (("mlp", 2), ("conv", 5), ("vit", 40)):
        model: Any = aezoo.create_model("hyperspherical_vae", (1, 8, 8), latent_dim=d, posterior="vmf", net=net)
        mu, kappa = model.posterior(x)
        assert ((kappa - 1) / d - 8).abs().max() < 2
        assert (model.family.sample(mu, kappa[:, 0]) * mu).sum(1).mean() > 0.85
        with torch.no_grad():
            [*model.encoder.parameters()][-1][-1] = -1e4
        mu, kappa = (part.detach() for part in model.posterior(x))
        assert torch.equal(kappa, torch.ones(20, d))
        along = (model.family.sample(mu.expand(50, 20, d), kappa[:, 0].expand(50, 20)) * mu).sum(2)
        expected = special.ive(d / 2, 1) / special.ive(d / 2 - 1, 1)  # Mardia & Jupp 2000, section 9.3
        assert along.mean().item() == pytest.approx(expected, abs=5 / math.sqrt(1000 * d))


def test_weights_without_least_kappa_load_with_zero() -> None:
    model, other = sphere(3, "vmf"), sphere(3, "vmf")
    state = {key: value for key, value in model.state_dict().items() if key != "least_kappa"}
    other.load_state_dict(state)
    x = torch.rand(4, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(other.posterior(x)[1], model.posterior(x)[1] - 1)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(other.posterior(x)[1], model.posterior(x)[1])


def test_invalid_sphere_settings_are_refused() -> None:
    with pytest.raises(AezooError, match="at least 2"):
        sphere(1, "vmf")
    with pytest.raises(AezooError, match="power_spherical, vmf"):
        sphere(3, "gaussian")
