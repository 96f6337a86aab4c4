"""Laws of the Poincare VAE (Mathieu et al. 2019)."""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from geometry_helpers import (
    directions,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from torch import Tensor

import aezoo
from aezoo import AezooError
from aezoo.callbacks.annealing import BetaAnnealing

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
    """Moebius addition as in the paper."""
    xy, xx, yy = c * (x * y).sum(-1, keepdim=True), c * (x * x).sum(-1, keepdim=True), c * (y * y).sum(-1, keepdim=True)
    return ((1 + 2 * xy + yy) * x + (1 - xx) * y) / (1 + 2 * xy + xx * yy)


def poincare(d: int, c: float, **settings: Any) -> Any:
    return aezoo.create_model(
        "poincare_vae", (2, 3, 3), latent_dim=d, curvature=c, hidden_dims=(16,), **settings
    ).double()


@pytest.mark.parametrize("c", [0.01, 1.0, 4.0])
def test_exp_and_log_maps_are_inverse_isometries(c: float) -> None:
    ball = poincare(3, c).ball
    scale = 1 / math.sqrt(c)
    x, y = points(40, 3, c, torch.linspace(0, 6, 40).double() * scale), points(40, 3, c).flip(0)
    torch.testing.assert_close(ball.add(x, y), moebius(x, y, c), rtol=1e-6, atol=1e-9)
    v = ball.log(x, y)
    torch.testing.assert_close(ball.exp(x, v), y, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(v.norm(dim=1), distance(x, y, c), rtol=1e-6, atol=1e-7)
    # the exponential map as defined: exp_x(u) = x + tanh(sqrt(c) lambda |u| / 2) u / (sqrt(c) |u|), u = v / lambda
    u = v * (1 - c * x.square().sum(1, keepdim=True)) / 2
    size = u.norm(dim=1, keepdim=True)
    reach = torch.tanh(math.sqrt(c) * size / (1 - c * x.square().sum(1, keepdim=True))) * u / (math.sqrt(c) * size)
    torch.testing.assert_close(moebius(x, reach, c), y, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ball.exp_0(ball(y)), y)
    torch.testing.assert_close(ball(y).norm(dim=1), distance(y, torch.zeros_like(y), c))


def test_maps_stay_inverse_and_finite_at_the_boundary() -> None:
    """At distance 24 a code is 1e-10 from the boundary; the largest distance in float32 is 17."""
    ball = poincare(3, 1.0).ball
    far = points(20, 3, 1.0, torch.linspace(12, 24, 20).double())
    torch.testing.assert_close(ball.exp_0(ball(far)), far, rtol=1e-12, atol=0)
    torch.testing.assert_close(ball(far).norm(dim=1), torch.linspace(12, 24, 20).double(), rtol=1e-5, atol=0)
    assert torch.atanh(far.float().norm(dim=1)).isinf().any()  # with atanh, as in other implementations
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


@pytest.mark.slow
@pytest.mark.parametrize("c", [0.05, 1.0, 3.0])
def test_the_wrapped_normal_integrates_to_one_over_the_ball(c: float) -> None:
    """In polar coordinates about the centre, where the volume is (sinh(sqrt(c) r) / sqrt(c))^(D-1) dr."""
    model = poincare(2, c)
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


@pytest.mark.slow
def test_samples_match_reported_density() -> None:
    """The log q of a draw is that at its code, E_q[p / q] = 1, and the density for c -> 0 is torch's normal."""
    for c in (0.2, 1.0):
        model = poincare(3, c)
        mean = torch.tensor([[0.5, -0.3, 0.2]], dtype=torch.float64)
        log_var = torch.tensor([[0.3, 0.1, 0.4]], dtype=torch.float64)
        model.posterior = lambda x, given=(mean, log_var): given
        z, log_q = model.sample_posterior(torch.zeros(1, 2, 3, 3, dtype=torch.float64), 200_000)
        again = model.ball.log_density(model.ball.log(model.ball.exp_0(mean), z), log_var)
        torch.testing.assert_close(again, log_q, rtol=1e-6, atol=1e-6)
        assert (model.log_prior(z) - log_q).exp().mean().item() == pytest.approx(1, abs=0.03)
    flat = poincare(3, 1e-6)
    v = torch.randn(5, 3, dtype=torch.float64)
    expected = D.Normal(torch.zeros(3).double(), (0.5 * log_var).exp()).log_prob(v).sum(1)
    torch.testing.assert_close(flat.ball.log_density(v, log_var), expected, rtol=0, atol=1e-5)


def test_zero_curvature_limit_equals_vae(shifted: Any) -> None:
    x = torch.rand(6, 2, 3, 3, dtype=torch.float64)
    flat = shifted(poincare(5, 1e-6, beta=2.0)).double()
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
    assert kl == pytest.approx(expected[0]["kl"].item(), abs=0.03)  # estimated from draws
    assert found[0]["loss"].item() == pytest.approx((found[0]["nll"] + 2 * found[0]["kl"]).item())
    torch.manual_seed(1)
    one = flat.log_likelihood(x, 50)
    torch.manual_seed(1)
    torch.testing.assert_close(one, vae.log_likelihood(x, 50), rtol=1e-4, atol=0)


def test_the_poincare_elbo_is_the_mean_log_weight(shifted: Any) -> None:
    model, x = shifted(poincare(3, 1.0)).double().eval(), torch.rand(3, 2, 3, 3, dtype=torch.float64)
    z, log_q = model.sample_posterior(x, 20_000)
    log_px = [-model.nll(model.decoder(z[:, i]), x[i : i + 1].expand(20_000, 2, 3, 3)) for i in range(3)]
    weights = torch.stack(log_px, 1) + model.log_prior(z) - log_q
    elbo = torch.stack([model.loss(x.repeat(500, 1, 1, 1))["elbo"] for _ in range(5)]).mean()
    assert elbo.item() == pytest.approx(weights.mean().item(), abs=0.05)
    # the score's KL is a deterministic approximation
    kl = (log_q - model.log_prior(z)).mean(0)
    torch.testing.assert_close(model.kl(*model.posterior(x)), kl, rtol=0.05, atol=0.02)
    at_mu = -D.Bernoulli(model(x), validate_args=False).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(model.score(x) - model.kl(*model.posterior(x)), at_mu)
    prior = model.sample_prior(100_000)
    torch.testing.assert_close(model.ball(prior).square().mean(0), torch.ones(3).double(), rtol=0, atol=0.03)
    zero = torch.zeros(1, 3, dtype=torch.float64)
    assert model.kl(zero, zero).item() == pytest.approx(0, abs=1e-9)


def test_negative_sampled_kl_is_not_clamped() -> None:
    """The gradient of the loss is that of the KL for both signs; the model has no capacity."""
    model, x = poincare(3, 1.0, beta=2.0), torch.rand(2, 2, 3, 3, dtype=torch.float64)
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


def test_map_gradients_match_finite_differences() -> None:
    for c in (0.3, 2.0):
        model = poincare(3, c)
        mean, v = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
        log_var = torch.randn(4, 3, dtype=torch.float64)

        def kl(mean: Tensor, v: Tensor, log_var: Tensor, ball: Any = model.ball) -> Tensor:
            at_0 = ball(ball.exp(ball.exp_0(mean), v))
            return ball.log_density(v, log_var) - ball.log_density(at_0, torch.zeros_like(at_0))

        inputs = [part.requires_grad_() for part in (mean, v, log_var)]
        assert torch.autograd.gradcheck(kl, inputs, atol=1e-6, rtol=1e-4)
        places = [points(4, 3, c).requires_grad_(), inputs[1].tanh() / 4]
        assert torch.autograd.gradcheck(model.ball.log, places, atol=1e-5)


def test_boundary_codes_stay_finite() -> None:
    for c in (1e-6, 1.0, 1e6):
        for size in (0.0, 1e-20, 1.0, 50.0, 1e4, 1e30):
            model = poincare(4, c).float()
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


def test_zero_curvature_is_refused() -> None:
    with pytest.raises(AezooError, match="near 0 take vae"):
        poincare(3, 0.0)
