"""Laws of the VAE with Gamma codes: KL, exact gradients of draws, densities, bounds, limits, known mistakes."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from scipy import integrate, special, stats
from torch import Tensor

import aezoo
from aezoo import AezooError
from aezoo.models.variational.gamma_vae import GammaVAE

SHAPE, CODE = (2, 3, 3), 4


def small(make: Any = GammaVAE, **settings: Any) -> Any:
    return make(SHAPE, **{"latent_dim": CODE, "hidden_dims": (16,), **settings}).double()


def images(n: int = 5) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def posteriors(n: int = 6) -> tuple[Tensor, Tensor]:
    """Shapes and rates over a few orders of magnitude."""
    return tuple((1.5 * torch.randn(n, CODE, dtype=torch.float64)).exp() + 0.1 for _ in range(2))  # type: ignore[return-value]


def reference_kl(alpha: Tensor, rho: Tensor, a: float, b: float) -> Tensor:
    prior = D.Gamma(torch.full_like(alpha, a), torch.full_like(rho, b))
    return D.kl_divergence(D.Gamma(alpha, rho), prior).sum(-1)


def drawn(model: Any, alpha: Tensor, rho: Tensor, n: int) -> Tensor:
    """The codes of one loss whose n samples have the same posterior, (n, D), with their gradient."""
    model.posterior = lambda x: (alpha.expand(n, -1), rho.expand(n, -1))
    seen: list[Tensor] = []
    hook = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.loss(torch.rand(n, *SHAPE, dtype=alpha.dtype))
    hook.remove()
    return seen[0]


class PyTorchVAE(GammaVAE):
    """Draws Gamma(alpha + 8) without a gradient by alpha; its KL swaps shapes with rates, and q with the prior."""

    def kl(self, alpha_BD: Tensor, rho_BD: Tensor) -> Tensor:  # type: ignore[override]
        prior = D.Gamma(torch.full_like(rho_BD, self.prior_rate), torch.full_like(alpha_BD, self.prior_shape))
        return D.kl_divergence(prior, D.Gamma(rho_BD, alpha_BD)).sum(1)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        alpha, rho = self.posterior(x)
        z = D.Gamma(alpha.detach() + 8, 1.0).sample() / rho
        nll, kl = self.nll(self.decoder(z.to(x.dtype)), x).mean(), self.kl(alpha, rho).mean()
        return {"loss": nll + kl, "nll": nll, "kl": kl, "elbo": -(nll + kl)}


class Rejection(GammaVAE):
    """Marsaglia and Tsang's rejection sampler for shapes above 1, without the gradient of the acceptance."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        alpha, rho = self.posterior(x)
        d = alpha - 1 / 3
        z = D.Gamma(alpha.detach(), 1.0).sample()
        eps = ((z / d.detach()) ** (1 / 3) - 1) * (9 * d.detach()).sqrt()
        nll = self.nll(self.decoder(d * (1 + eps / (9 * d).sqrt()) ** 3 / rho), x).mean()
        return {"loss": nll, "nll": nll}


# ---- KL --------------------------------------------------------------------------------------------------------------


def kl_law(make: Any) -> None:
    """KL and its gradients are those of torch.distributions; 0 only if q is the prior."""
    for a, b in ((2.0, 1.0), (0.3, 0.3), (1.0, 4.0), (30.0, 0.5)):
        model = small(make, prior_shape=a, prior_rate=b)
        alpha, rho = (t.requires_grad_() for t in posteriors(40))
        found, expected = model.kl(alpha, rho), reference_kl(alpha, rho, a, b)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert found.min() > 0.01
        for mine, theirs in zip(*(torch.autograd.grad(v.sum(), (alpha, rho)) for v in (found, expected)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
        at = torch.full((1, CODE), a, dtype=torch.float64), torch.full((1, CODE), b, dtype=torch.float64)
        assert model.kl(*at).item() == pytest.approx(0, abs=1e-12)


def test_kl_matches_torch_distributions() -> None:
    kl_law(GammaVAE)


def test_wrong_kl_is_detected() -> None:
    with pytest.raises(AssertionError):
        kl_law(PyTorchVAE)


@pytest.mark.parametrize(("alpha", "rho"), [(0.4, 2.0), (1.0, 0.2), (3.0, 3.0), (25.0, 5.0)])
def test_the_kl_is_the_integral_of_the_log_ratio(alpha: float, rho: float) -> None:
    model = small(latent_dim=1, prior_shape=0.7, prior_rate=1.5)
    q, p = stats.gamma(alpha, 0, 1 / rho), stats.gamma(0.7, 0, 1 / 1.5)

    def integrand(t: float) -> float:  # over log z, where the density has no pole
        z = math.exp(t)
        return float(q.pdf(z) * z * (q.logpdf(z) - p.logpdf(z)))

    expected = integrate.quad(integrand, -80, math.log(q.ppf(1 - 1e-15)), limit=500, points=[-2, 0, 2])[0]
    found = model.kl(*(torch.full((1, 1), v, dtype=torch.float64) for v in (alpha, rho))).item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_kl_tends_to_gaussian_kl_for_large_shapes() -> None:
    """Standardised Gamma(a, b) tends to N(0, 1) with an error of order 1 / sqrt(a)."""
    mu, sigma = torch.tensor([[0.7, -1.2, 0.0, 2.0]]).double(), torch.tensor([[1.0, 0.3, 2.0, 0.6]]).double()
    expected = D.kl_divergence(D.Normal(mu, sigma), D.Normal(0.0, 1.0)).sum().item()
    off = []
    for a in (1e4, 1e6, 1e8):
        model, b = small(prior_shape=a, prior_rate=3.0), 3.0
        mean, variance = (a + mu * math.sqrt(a)) / b, sigma**2 * a / b**2
        off.append(abs(model.kl(mean**2 / variance, mean / variance).item() - expected))
    assert off[-1] < 1e-3 < off[0]
    assert all(a / b == pytest.approx(10, rel=0.1) for a, b in pairwise(off))


# ---- draws -----------------------------------------------------------------------------------------------------------


def gradient_law(make: Any, shapes: tuple[float, ...] = (0.3, 1.0, 2.5, 12.0), n: int = 60_000) -> None:
    """d/dalpha and d/drho of E[z] = alpha / rho and of E[log z] = psi(alpha) - log rho, within 5 standard errors."""
    alpha = torch.tensor([shapes], dtype=torch.float64).requires_grad_()
    rho = torch.tensor([[0.5, 2.0, 1.0, 6.0]], dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        each_alpha, each_rho = alpha.expand(n, -1).clone(), rho.expand(n, -1).clone()
    each_alpha.requires_grad_(), each_rho.requires_grad_()
    z = drawn(small(make), each_alpha, each_rho, n)
    for value, expected in ((z, alpha / rho), (z.log(), torch.digamma(alpha) - rho.log())):
        found = torch.autograd.grad(value.sum(), (each_alpha, each_rho), retain_graph=True, allow_unused=True)
        for per_draw, exact in zip(found, torch.autograd.grad(expected.sum(), (alpha, rho)), strict=True):
            assert per_draw is not None
            error = 5 * per_draw.std(0) / math.sqrt(n) + 1e-3 * exact[0].abs()
            assert ((per_draw.mean(0) - exact[0]).abs() < error).all()


def test_gamma_draw_gradients_match_closed_forms() -> None:
    gradient_law(GammaVAE)


@pytest.mark.parametrize("mistake", [PyTorchVAE, Rejection])
def test_wrong_draw_gradients_are_detected(mistake: Any) -> None:
    with pytest.raises(AssertionError):
        gradient_law(mistake, (1.0, 1.0, 1.5, 2.0))


def test_draw_gradient_is_quantile_derivative() -> None:
    """dz/dalpha at constant F(z) of each draw, by scipy; dz/drho is -z / rho."""
    alpha = torch.tensor([[0.2, 0.9, 4.0, 70.0]], dtype=torch.float64).expand(200, -1).clone().requires_grad_()
    rho = torch.full_like(alpha, 2.0).requires_grad_()
    z = drawn(small(), alpha, rho, 200)
    in_alpha, in_rho = torch.autograd.grad(z.sum(), (alpha, rho))
    torch.testing.assert_close(in_rho, -z.detach() / 2)
    at, level = alpha.detach().numpy(), special.gammainc(alpha.detach().numpy(), 2 * z.detach().numpy())
    sound = (level > 1e-3) & (level < 1 - 1e-3)
    expected = (special.gammaincinv(at * 1.001, level) - special.gammaincinv(at * 0.999, level)) / (0.002 * at) / 2
    np.testing.assert_allclose(in_alpha.numpy()[sound], expected[sound], rtol=5e-3)


def test_all_draws_are_gamma_distributed() -> None:
    """Those of the loss, importance samples and samples of the prior, by the Kolmogorov-Smirnov test."""
    alpha, rho = torch.tensor([[0.3, 1.0, 5.0, 40.0]]).double(), torch.tensor([[3.0, 1.0, 0.2, 8.0]]).double()
    model = small(prior_shape=0.6, prior_rate=2.5)
    of_loss = drawn(model, alpha, rho, 4000)
    model.posterior = lambda x: (alpha, rho)
    for z in (of_loss, model.sample_posterior(images(1), 4000)[0][:, 0]):
        for d in range(CODE):
            q = stats.gamma(alpha[0, d].item(), 0, 1 / rho[0, d].item())
            assert stats.kstest(z[:, d].numpy(), q.cdf).pvalue > 1e-3
        assert torch.corrcoef(z.T).fill_diagonal_(0).abs().max() < 5 / math.sqrt(4000)
    prior = model.sample_prior(4000)
    assert prior.dtype == torch.float64 and prior.shape == (4000, CODE)
    assert stats.kstest(prior.flatten().numpy(), stats.gamma(0.6, 0, 1 / 2.5).cdf).pvalue > 1e-3


def test_densities_match_scipy() -> None:
    model, x = small(prior_shape=0.6, prior_rate=2.5), images(7)
    z, log_q = model.sample_posterior(x, 5)
    alpha, rho = (p.detach().numpy() for p in model.posterior(x))
    expected = stats.gamma(alpha, 0, 1 / rho).logpdf(z.detach().numpy()).sum(-1)
    np.testing.assert_allclose(log_q.detach().numpy(), expected, rtol=1e-9)
    expected = stats.gamma(0.6, 0, 1 / 2.5).logpdf(z.detach().numpy()).sum(-1)
    np.testing.assert_allclose(model.log_prior(z).detach().numpy(), expected, rtol=1e-9)


def test_sharp_posterior_densities_are_exact_in_float32() -> None:
    alpha, rho = torch.full((3, CODE), 2e5), torch.full((3, CODE), 1e5)
    z = D.Gamma(alpha, rho).sample()
    expected = stats.gamma(2e5, 0, 1e-5).logpdf(z.double().numpy()).sum(-1)
    np.testing.assert_allclose(GammaVAE.log_density(z, alpha, rho).numpy(), expected, rtol=1e-6)
    found = small(prior_shape=1.5).float().kl(alpha, rho)
    np.testing.assert_allclose(found, reference_kl(alpha.double(), rho.double(), 1.5, 1.0), rtol=1e-6)


# ---- the model -------------------------------------------------------------------------------------------------------


def test_the_elbo_is_the_mean_log_weight(shifted: Any) -> None:
    """Draws, log q, log p, KL and likelihood are consistent; the code is the mean."""
    model, x = shifted(small(beta=3.0)).eval(), images(3)
    alpha, rho = model.posterior(x)
    assert torch.equal(model.encode(x), alpha / rho) and torch.equal(model.encode(x), model.encode(x))
    assert alpha.min() > 0 and rho.min() > 0
    z, log_q = model.sample_posterior(x, 100_000)
    kl = reference_kl(alpha, rho, 2.0, 1.0)
    torch.testing.assert_close((log_q - model.log_prior(z)).mean(0), kl, rtol=0, atol=0.03)
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    terms = model.loss(x)

    def nll(code: Tensor) -> Tensor:
        return -D.Bernoulli(logits=model.decoder(code), validate_args=False).log_prob(x).flatten(1).sum(1)

    at_z = nll(seen[0]).mean()
    torch.testing.assert_close(terms["nll"], at_z)
    torch.testing.assert_close(terms["loss"], at_z + 3 * kl.mean())
    torch.testing.assert_close(terms["elbo"], -at_z - kl.mean())
    torch.testing.assert_close(model.score(x), nll(alpha / rho) + kl)
    torch.testing.assert_close(model(x), model.decoder(alpha / rho).sigmoid())


@pytest.mark.slow
def test_elbo_iwae_and_evidence_are_ordered(shifted: Any) -> None:
    """With log p(x) by a mean over a grid of the prior's quantiles."""
    model, x = shifted(small(latent_dim=2, prior_shape=0.8, prior_rate=0.5)).eval(), images(4)
    with torch.no_grad():
        model.decoder[1].weight *= 2
    n = 300
    levels = stats.gamma(0.8, 0, 2).ppf((np.arange(n) + 0.5) / n)
    grid = torch.cartesian_prod(*[torch.from_numpy(levels)] * 2)
    with torch.no_grad():
        logits = model.decoder(grid)
        log_px = [-model.nll(logits, one.expand(len(grid), *SHAPE)).detach() for one in x]
        evidence = (torch.stack(log_px).logsumexp(1) - 2 * math.log(n)).mean().item()
        low = model.loss(x.repeat(2000, 1, 1, 1))["elbo"].item()
    ladder = [torch.stack([model.log_likelihood(x, k) for _ in range(2000 // k)]).mean().item() for k in (1, 4, 40)]
    assert ladder[0] == pytest.approx(low, abs=0.08)
    assert low + 0.1 < evidence
    assert all(b > a + 0.02 for a, b in pairwise(ladder))
    assert ladder[-1] < evidence + 0.02
    assert model.log_likelihood(x, 20_000).mean().item() == pytest.approx(evidence, abs=0.03)


def test_prior_rate_only_rescales_codes(shifted: Any) -> None:
    one, four = shifted(small()), small(prior_rate=4.0)
    four.load_state_dict(one.state_dict())
    with torch.no_grad():
        four.decoder[1].weight *= 4
    x, found = images(), []
    for model in (one, four):
        torch.manual_seed(3)
        terms = model.loss(x)
        found.append([*terms.values(), model.score(x), model.log_likelihood(x, 7), model.sample(3)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(four.encode(x) * 4, one.encode(x))


@pytest.mark.parametrize("shift", [-1e38, -100.0, -5.0, 100.0, 1e38])
@pytest.mark.parametrize("part", [slice(0, CODE), slice(CODE, None), slice(None)], ids=["shape", "rate", "both"])
def test_extreme_posterior_stays_finite(part: slice, shift: float) -> None:
    for prior_shape in (0.1, 2.0, 1e5):
        model = small(prior_shape=prior_shape).float()
        with torch.no_grad():
            model.encoder[-2].bias[part] = shift
        x = torch.rand(50, *SHAPE)
        terms = model.loss(x)
        terms["loss"].backward()
        values = [*terms.values(), *(p.grad for p in model.parameters()), model.score(x), model.log_likelihood(x, 3)]
        assert all(v.isfinite().all() for v in values)
        assert terms["kl"] > -1e-3


@pytest.mark.slow
def test_training_through_gamma_draws_beats_constant_code(adam: Any, digits: Tensor) -> None:
    model = aezoo.create_model("gamma_vae", (1, 8, 8), latent_dim=6, hidden_dims=(48,))
    x = digits[:600].float()
    mean = x.mean(0).clamp(1e-6, 1 - 1e-6)
    blind = (x * mean.log() + (1 - x) * (1 - mean).log()).flatten(1).sum(1).mean()  # of a constant
    adam(model, x, steps=350, lr=5e-3, batch=100)
    terms = model.loss(x)
    assert terms["elbo"].item() > blind.item() + 1
    assert terms["kl"] > 1


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"prior_shape": 0.05}, "prior_shape"), ({"prior_rate": 0.0}, "prior_rate"), ({"latent_dim": 0}, "latent_dim")],
)
def test_invalid_values_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(AezooError, match=word):
        small(**settings)
