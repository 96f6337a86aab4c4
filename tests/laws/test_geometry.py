"""Laws of the VAEs whose codes lie on a sphere or in hyperbolic space: densities, KL, exact gradients, maps, limits."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from scipy import integrate, special, stats
from torch import Tensor
from torch.nn import functional as F

import aezoo
from aezoo import AezooError
from aezoo.callbacks.annealing import BetaAnnealing
from aezoo.manifolds import sphere as manifold

FAMILIES = ("power_spherical", "vmf")
KAPPAS = (1e-6, 0.3, 2.0, 40.0, 3e3)


def sphere(d: int, family: str, **settings: Any) -> Any:
    return aezoo.create_model(
        "hyperspherical_vae", (2, 3, 3), latent_dim=d, posterior=family, hidden_dims=(16,), **settings
    ).double()


def about_mean(d: int, family: str) -> Any:
    return manifold.FAMILIES[family](d)


def concentrations(kappa: float, n: int) -> Tensor:
    return torch.full((n,), kappa, dtype=torch.float64)


def directions(n: int, d: int) -> Tensor:
    return F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1)


def spread(kappa: float, like: Tensor) -> Tensor:
    return torch.full_like(like, kappa)


def reference_entropy(d: int, family: str, kappa: float) -> float:
    """Of the density on the sphere, by scipy."""
    if family == "vmf":
        return float(stats.vonmises_fisher(np.eye(d)[0], kappa).entropy())
    a, b = (d - 1) / 2 + kappa, (d - 1) / 2  # De Cao & Aziz 2020, equations 6 and 17
    log_n = (a + b) * math.log(2) + b * math.log(math.pi) + special.gammaln(a) - special.gammaln(a + b)
    return float(log_n - kappa * (math.log(2) + special.digamma(a) - special.digamma(a + b)))


def mean_cosine(d: int, family: str, kappa: float) -> float:
    """E[mu . z]."""
    if family == "vmf":
        return float(special.ive(d / 2, kappa) / special.ive(d / 2 - 1, kappa))
    return kappa / (kappa + d - 1)


# ---- the sphere ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_to_the_uniform_is_the_area_s_logarithm_less_the_entropy(family: str) -> None:
    for d in (2, 3, 5, 16, 64):
        log_area = math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)
        mu = directions(1, d)
        for kappa in KAPPAS:
            found = sphere(d, family).kl(mu, spread(kappa, mu)).item()
            expected = log_area - reference_entropy(d, family, kappa)
            assert found == pytest.approx(expected, rel=1e-8, abs=1e-8), (d, kappa)
        assert sphere(d, family).kl(mu, spread(1e-6, mu)).item() == pytest.approx(0, abs=1e-9)


def test_no_bessel_function_of_large_order_underflows() -> None:
    """At order 249 scipy's is 0; of that order I_nu(k) = (k/2)^nu / Gamma(nu + 1) * 0F1(nu + 1, k^2/4)."""
    d, kappa = 500, 1.0
    assert special.ive(d / 2 - 1, kappa) == 0
    log_z, mean_h = about_mean(d, "vmf").normaliser(concentrations(kappa, 1))
    series = special.hyp0f1(d / 2, kappa**2 / 4)
    log_z_0 = 0.5 * math.log(math.pi) + math.lgamma((d - 1) / 2) - math.lgamma(d / 2)
    assert log_z.item() == pytest.approx(math.log(series) + log_z_0 - kappa, abs=1e-8)
    assert mean_h.item() + 1 == pytest.approx(kappa / d * special.hyp0f1(d / 2 + 1, kappa**2 / 4) / series, abs=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kl_s_gradient_is_that_of_the_reference(family: str) -> None:
    for d, kappa in ((2, 0.7), (5, 2.0), (16, 30.0)):
        mu = directions(1, d)
        concentration = spread(kappa, mu).requires_grad_()
        found = torch.autograd.grad(sphere(d, family).kl(mu, concentration).sum(), concentration)[0].sum().item()
        low, high = (-reference_entropy(d, family, kappa * (1 + step)) for step in (-1e-4, 1e-4))
        assert found == pytest.approx((high - low) / (2e-4 * kappa), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_density_integrates_to_one_over_the_sphere(family: str) -> None:
    q, mu = about_mean(3, family), directions(1, 3)
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


def test_the_vmf_density_is_scipy_s() -> None:
    for d, kappa in ((2, 3.0), (4, 0.5), (7, 60.0)):
        mu, z = directions(1, d), directions(20, d)
        found = about_mean(d, "vmf").log_prob(z, mu, concentrations(kappa, 1))
        np.testing.assert_allclose(found, stats.vonmises_fisher(mu[0].numpy(), kappa).logpdf(z.numpy()), atol=1e-8)


def levels(n: int) -> Tensor:
    """Noise with no noise in it: the middles of n equal parts of [0, 1]."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("family", FAMILIES)
def test_the_angle_is_the_quantile_of_its_marginal(family: str) -> None:
    u = levels(400)
    for d in (2, 3, 8, 33):
        q = about_mean(d, family)
        for kappa in (1e-3, 1.0, 20.0, 2e3):
            theta = q.quantile(torch.full_like(u, kappa), u).numpy()
            if family == "power_spherical":
                below = special.betainc((d - 1) / 2, (d - 1) / 2 + kappa, np.sin(theta / 2) ** 2)
                np.testing.assert_allclose(below, u, atol=1e-4 if d == 2 else 1e-5)
            else:
                t = np.linspace(1e-12, min(math.pi, 3 * float(theta[-1])), 200_001)
                log_f = kappa * (np.cos(t) - 1) + (d - 2) * np.log(np.abs(np.sin(t)))
                cdf = integrate.cumulative_simpson(np.exp(log_f - log_f.max()), x=t, initial=0)
                np.testing.assert_allclose(np.interp(theta, t, cdf / cdf[-1]), u, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_are_unit_vectors_around_mu(family: str) -> None:
    """E[z] = E[mu . z] mu, and all directions across mu are alike; wherever mu is, the pole included."""
    d, kappa, n = 5, 6.0, 30_000
    q = about_mean(d, family)
    for mu in (torch.eye(d, dtype=torch.float64)[0], -torch.eye(d, dtype=torch.float64)[0], *directions(1, d)):
        z = q.sample(mu.expand(n, d), concentrations(kappa, n))
        torch.testing.assert_close(z.norm(dim=1), torch.ones(n, dtype=torch.float64))
        cosine = mean_cosine(d, family, kappa)
        torch.testing.assert_close(z.mean(0), cosine * mu, rtol=0, atol=0.012)
        across = z - (z @ mu)[:, None] * mu
        share = (1 - (z @ mu).square().mean().item()) / (d - 1)
        expected = share * (torch.eye(d, dtype=torch.float64) - torch.outer(mu, mu))
        torch.testing.assert_close(across.T @ across / n, expected, rtol=0, atol=0.012)


def rejection_gradient(d: int, kappa: float, n: int) -> float:
    """d/dkappa of the mean accepted draw of Wood's sampler, without a correction for who is accepted (rivals' slip)."""
    k = torch.full((n,), kappa, dtype=torch.float64, requires_grad=True)
    b = (-2 * k + torch.sqrt(4 * k**2 + (d - 1) ** 2)) / (d - 1)
    x = (1 - b) / (1 + b)
    c = k * x + (d - 1) * torch.log(1 - x**2)
    half = torch.tensor((d - 1) / 2, dtype=torch.float64)
    eps = D.Beta(half, half).sample((n,))
    w = (1 - (1 + b) * eps) / (1 - (1 - b) * eps)
    taken = k * w + (d - 1) * torch.log(1 - x * w) - c >= torch.rand(n, dtype=torch.float64).log()
    return float(torch.autograd.grad(w[taken].sum(), k)[0].sum() / taken.sum())


def test_the_gradient_in_kappa_is_unbiased() -> None:
    """d/dkappa E[mu . z] at D = 5, kappa = 2 is 0.1474; through a rejection sampler it is 0.1277."""
    d, kappa = 5, 2.0
    exact = (mean_cosine(d, "vmf", kappa + 1e-4) - mean_cosine(d, "vmf", kappa - 1e-4)) / 2e-4
    assert exact == pytest.approx(0.1474, abs=1e-4)
    k = torch.full((20_000,), kappa, dtype=torch.float64, requires_grad=True)
    mean = about_mean(d, "vmf").quantile(k, levels(20_000)).cos()
    assert mean.mean().item() == pytest.approx(mean_cosine(d, "vmf", kappa), abs=1e-5)
    found = torch.autograd.grad(mean.sum(), k)[0].mean().item()
    assert found == pytest.approx(exact, abs=1e-5)
    assert rejection_gradient(d, kappa, 400_000) == pytest.approx(0.1277, abs=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draw_s_gradient_is_the_derivative_of_the_quantile(family: str) -> None:
    u = levels(50)
    for d in (2, 3, 9, 40):
        q = about_mean(d, family)
        for kappa in (0.5, 10.0, 1e3):
            k = torch.full_like(u, kappa).requires_grad_()
            found = torch.autograd.grad(q.quantile(k, u).sum(), k)[0]
            with torch.no_grad():
                step = 1e-3 * kappa
                expected = (q.quantile(k + step, u) - q.quantile(k - step, u)) / (2 * step)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_in_mu_is_unbiased(family: str) -> None:
    """d/dmu E[(c . z)^2] across mu, where E[z z'] = s I + (E[t^2] - s) mu mu'."""
    d, kappa, n = 3, 4.0, 60_000
    q, mu, c = about_mean(d, family), directions(1, d)[0], torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    mu = mu.requires_grad_()
    z = q.sample(F.normalize(mu, dim=0).expand(n, d), concentrations(kappa, n))
    found = torch.autograd.grad((z @ c).square().mean(), mu)[0]
    squared = (z @ mu).square().mean().item()
    slope = 2 * (squared - (1 - squared) / (d - 1)) * (c @ mu) * (c - (c @ mu) * mu)
    torch.testing.assert_close(found, slope.detach(), rtol=0, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_nan_at_any_concentration(family: str) -> None:
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hyperspherical_elbo_is_the_mean_log_weight(family: str, shifted: Any) -> None:
    """Draws, log q, log p, KL and likelihood belong together; codes stay on the sphere."""
    model, x = shifted(sphere(4, family, beta=3.0)).double().eval(), torch.rand(3, 2, 3, 3, dtype=torch.float64)
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
    # power_spherical's weights have no variance, since it is 0 opposite mu
    torch.testing.assert_close(model.log_likelihood(x, 20_000), evidence, rtol=0, atol=0.15)


def test_a_sphere_needs_two_dimensions_and_a_family() -> None:
    with pytest.raises(AezooError, match="at least 2"):
        sphere(1, "vmf")
    with pytest.raises(AezooError, match="power_spherical, vmf"):
        sphere(3, "gaussian")


# ---- the Poincare ball -----------------------------------------------------------------------------------------------


def points(n: int, d: int, c: float, radii: Tensor | None = None) -> Tensor:
    """Codes at these distances from the centre, in random directions."""
    radii = torch.linspace(0.1, 6, n, dtype=torch.float64) if radii is None else radii
    return torch.tanh(math.sqrt(c) * radii / 2)[:, None] / math.sqrt(c) * directions(n, d)


def distance(x: Tensor, y: Tensor, c: float) -> Tensor:
    """Mathieu et al. 2019, section 2, by arcosh."""
    gap = 2 * c * (x - y).square().sum(-1) / ((1 - c * x.square().sum(-1)) * (1 - c * y.square().sum(-1)))
    return torch.acosh(1 + gap) / math.sqrt(c)


def moebius(x: Tensor, y: Tensor, c: float) -> Tensor:
    """Addition as the paper prints it."""
    xy, xx, yy = c * (x * y).sum(-1, keepdim=True), c * (x * x).sum(-1, keepdim=True), c * (y * y).sum(-1, keepdim=True)
    return ((1 + 2 * xy + yy) * x + (1 - xx) * y) / (1 + 2 * xy + xx * yy)


def disc(d: int, c: float, **settings: Any) -> Any:
    return aezoo.create_model(
        "poincare_vae", (2, 3, 3), latent_dim=d, curvature=c, hidden_dims=(16,), **settings
    ).double()


@pytest.mark.parametrize("c", [0.01, 1.0, 4.0])
def test_exponential_and_logarithm_are_inverse_and_measure_distances(c: float) -> None:
    ball = disc(3, c).ball
    scale = 1 / math.sqrt(c)
    x, y = points(40, 3, c, torch.linspace(0, 6, 40).double() * scale), points(40, 3, c).flip(0)
    torch.testing.assert_close(ball.add(x, y), moebius(x, y, c), rtol=1e-6, atol=1e-9)
    v = ball.log(x, y)
    torch.testing.assert_close(ball.exp(x, v), y, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(v.norm(dim=1), distance(x, y, c), rtol=1e-6, atol=1e-7)
    # the straight way by its definition: exp_x(u) = x + tanh(sqrt(c) lambda |u| / 2) u / (sqrt(c) |u|), u = v / lambda
    u = v * (1 - c * x.square().sum(1, keepdim=True)) / 2
    size = u.norm(dim=1, keepdim=True)
    reach = torch.tanh(math.sqrt(c) * size / (1 - c * x.square().sum(1, keepdim=True))) * u / (math.sqrt(c) * size)
    torch.testing.assert_close(moebius(x, reach, c), y, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ball.exp_0(ball(y)), y)
    torch.testing.assert_close(ball(y).norm(dim=1), distance(y, torch.zeros_like(y), c))


def test_maps_stay_inverse_and_finite_at_the_boundary() -> None:
    """At the distance 24 a code is 1e-10 from the boundary; float32 ends at 17."""
    ball = disc(3, 1.0).ball
    far = points(20, 3, 1.0, torch.linspace(12, 24, 20).double())
    torch.testing.assert_close(ball.exp_0(ball(far)), far, rtol=1e-12, atol=0)
    torch.testing.assert_close(ball(far).norm(dim=1), torch.linspace(12, 24, 20).double(), rtol=1e-5, atol=0)
    assert torch.atanh(far.float().norm(dim=1)).isinf().any()  # rivals' form
    step = torch.randn(20, 3, dtype=torch.float64)
    torch.testing.assert_close(
        ball.log(far[:8], ball.exp(far[:8], step[:8])).norm(dim=1), step[:8].norm(dim=1), rtol=1e-2, atol=1e-2
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        beyond = (
            torch.cat([directions(5, 3) * size for size in (0, 1 - 1e-9, 1.0, 7.0, 1e4)]).to(dtype).requires_grad_()
        )
        out = ball(beyond)
        assert out.isfinite().all() and out.norm(dim=1).max() < 40
        assert torch.autograd.grad(out.sum(), beyond)[0].isfinite().all()


@pytest.mark.parametrize("c", [0.05, 1.0, 3.0])
def test_the_wrapped_normal_integrates_to_one_over_the_ball(c: float) -> None:
    """In polar coordinates about the centre, where the volume is (sinh(sqrt(c) r) / sqrt(c))^(D-1) dr."""
    model = disc(2, c)
    radii = torch.linspace(0, 14 / math.sqrt(c) + 6, 1401, dtype=torch.float64)[:-1] + 0.005
    width = float(radii[1] - radii[0])
    turns = torch.arange(720, dtype=torch.float64) * 2 * math.pi / 720
    r, turn = torch.meshgrid(radii[radii * math.sqrt(c) < 30], turns, indexing="ij")
    z = torch.tanh(math.sqrt(c) * r / 2)[..., None] / math.sqrt(c) * torch.stack([turn.cos(), turn.sin()], -1)
    volume = torch.sinh(math.sqrt(c) * r) / math.sqrt(c) * width * 2 * math.pi / 720
    assert (model.log_prior(z).exp() * volume).sum().item() == pytest.approx(1, abs=1e-3)
    mu, log_var = points(1, 2, c, torch.tensor([0.8]).double()), torch.tensor([-1.0, -0.2], dtype=torch.float64)
    v = model.ball.log(mu.expand_as(z), z)
    assert (model.ball.log_density(v, log_var).exp() * volume).sum().item() == pytest.approx(1, abs=2e-3)


def test_draws_have_the_density_that_is_claimed() -> None:
    """E_q[p / q] = 1, with log q from the draw or from its place, and E_q[log q] against torch's normal at c -> 0."""
    for c in (0.2, 1.0):
        model = disc(3, c)
        mean = torch.tensor([[0.5, -0.3, 0.2]], dtype=torch.float64)
        log_var = torch.tensor([[0.3, 0.1, 0.4]], dtype=torch.float64)
        model.posterior = lambda x, given=(mean, log_var): given
        z, log_q = model.sample_posterior(torch.zeros(1, 2, 3, 3, dtype=torch.float64), 200_000)
        again = model.ball.log_density(model.ball.log(model.ball.exp_0(mean), z), log_var)
        torch.testing.assert_close(again, log_q, rtol=1e-6, atol=1e-6)
        assert (model.log_prior(z) - log_q).exp().mean().item() == pytest.approx(1, abs=0.03)
    flat = disc(3, 1e-6)
    v = torch.randn(5, 3, dtype=torch.float64)
    expected = D.Normal(torch.zeros(3).double(), (0.5 * log_var).exp()).log_prob(v).sum(1)
    torch.testing.assert_close(flat.ball.log_density(v, log_var), expected, rtol=0, atol=1e-5)


def test_a_flat_ball_is_the_vae(shifted: Any) -> None:
    x = torch.rand(6, 2, 3, 3, dtype=torch.float64)
    flat = shifted(disc(5, 1e-6, beta=2.0)).double()
    vae = aezoo.create_model("vae", (2, 3, 3), latent_dim=5, hidden_dims=(16,), beta=2.0).double()
    vae.load_state_dict({name.replace("decoder.1.", "decoder."): value for name, value in flat.state_dict().items()})
    torch.testing.assert_close(flat(x), vae(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(flat.score(x), vae.score(x), rtol=1e-4, atol=0)
    torch.testing.assert_close(2 * flat.encode(x), vae.encode(x), rtol=1e-4, atol=1e-6)
    found, expected = [], []
    for model, terms in ((flat, found), (vae, expected)):
        torch.manual_seed(0)
        terms += [model.loss(x), *(model.loss(x.repeat(300, 1, 1, 1)) for _ in range(4))]
    assert found[0]["nll"].item() == pytest.approx(expected[0]["nll"].item(), rel=1e-4)
    kl = torch.stack([terms["kl"] for terms in found[1:]]).mean().item()
    assert kl == pytest.approx(expected[0]["kl"].item(), abs=0.03)  # of draws, in place of the closed form
    assert found[0]["loss"].item() == pytest.approx((found[0]["nll"] + 2 * found[0]["kl"]).item())
    torch.manual_seed(1)
    one = flat.log_likelihood(x, 50)
    torch.manual_seed(1)
    torch.testing.assert_close(one, vae.log_likelihood(x, 50), rtol=1e-4, atol=0)


def test_the_poincare_elbo_is_the_mean_log_weight(shifted: Any) -> None:
    model, x = shifted(disc(3, 1.0)).double().eval(), torch.rand(3, 2, 3, 3, dtype=torch.float64)
    z, log_q = model.sample_posterior(x, 20_000)
    log_px = [-model.nll(model.decoder(z[:, i]), x[i : i + 1].expand(20_000, 2, 3, 3)) for i in range(3)]
    weights = torch.stack(log_px, 1) + model.log_prior(z) - log_q
    elbo = torch.stack([model.loss(x.repeat(500, 1, 1, 1))["elbo"] for _ in range(5)]).mean()
    assert elbo.item() == pytest.approx(weights.mean().item(), abs=0.05)
    # the score's KL has no noise and little error
    kl = (log_q - model.log_prior(z)).mean(0)
    torch.testing.assert_close(model.kl(*model.posterior(x)), kl, rtol=0.05, atol=0.02)
    at_mu = -D.Bernoulli(model(x), validate_args=False).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(model.score(x) - model.kl(*model.posterior(x)), at_mu)
    prior = model.sample_prior(100_000)
    torch.testing.assert_close(model.ball(prior).square().mean(0), torch.ones(3).double(), rtol=0, atol=0.03)
    zero = torch.zeros(1, 3, dtype=torch.float64)
    assert model.kl(zero, zero).item() == pytest.approx(0, abs=1e-9)


def test_a_draw_s_hyperbolic_kl_below_zero_counts_as_it_is() -> None:
    """Its gradient is that of the KL, whatever the sign; there is no capacity that it could be at a distance from."""
    model, x = disc(3, 1.0, beta=2.0), torch.rand(2, 2, 3, 3, dtype=torch.float64)
    mean = torch.full((2, 3), 0.1, dtype=torch.float64, requires_grad=True)
    log_var = torch.full((2, 3), -0.2, dtype=torch.float64, requires_grad=True)
    model.posterior, signs = (lambda x: (mean, log_var)), set()
    for seed in range(20):
        torch.manual_seed(seed)
        terms = model.loss(x)
        signs.add(terms["kl"].sign().item())
        torch.testing.assert_close(terms["loss"], terms["nll"] + 2 * terms["kl"])
        torch.testing.assert_close(terms["elbo"], -(terms["nll"] + terms["kl"]))
        found = torch.autograd.grad(terms["loss"] - terms["nll"], (mean, log_var), retain_graph=True)
        for a, e in zip(found, torch.autograd.grad(terms["kl"], (mean, log_var)), strict=True):
            torch.testing.assert_close(a, 2 * e, rtol=1e-6, atol=1e-9)
    assert signs == {-1.0, 1.0}
    BetaAnnealing("linear", n_steps=5).setup(None, model, "fit")
    with pytest.raises(AezooError, match="needs a model with a number"):
        BetaAnnealing("capacity", n_steps=5).setup(None, model, "fit")


def test_gradients_of_the_maps_are_those_of_finite_differences() -> None:
    for c in (0.3, 2.0):
        model = disc(3, c)
        mean, v = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
        log_var = torch.randn(4, 3, dtype=torch.float64)

        def kl(mean: Tensor, v: Tensor, log_var: Tensor, ball: Any = model.ball) -> Tensor:
            at_0 = ball(ball.exp(ball.exp_0(mean), v))
            return ball.log_density(v, log_var) - ball.log_density(at_0, torch.zeros_like(at_0))

        inputs = [part.requires_grad_() for part in (mean, v, log_var)]
        assert torch.autograd.gradcheck(kl, inputs, atol=1e-6, rtol=1e-4)
        places = [points(4, 3, c).requires_grad_(), inputs[1].tanh() / 4]
        assert torch.autograd.gradcheck(model.ball.log, places, atol=1e-5)


def test_nothing_is_nan_with_codes_at_the_boundary() -> None:
    for c in (1e-6, 1.0, 1e6):
        for size in (0.0, 1e-20, 1.0, 50.0, 1e4, 1e30):
            model = disc(4, c).float()
            with torch.no_grad():
                model.encoder[-2].bias[:4] = size
                model.encoder[-2].weight *= size > 0
            x = torch.rand(3, 2, 3, 3)
            terms = model.loss(x)
            terms["loss"].backward()
            assert all(value.isfinite() for value in terms.values()), (c, size)
            assert all(p.grad.isfinite().all() for p in model.parameters()), (c, size)
            assert model.score(x).isfinite().all() and model.log_likelihood(x, 3).isfinite().all()
            assert model(x).isfinite().all() and model.encode(x).norm(dim=1).max() * math.sqrt(c) < 1


def test_a_curvature_is_positive() -> None:
    with pytest.raises(AezooError, match="near 0 take vae"):
        disc(3, 0.0)
