"""Likelihoods against torch.distributions, scipy and quadrature."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributions as D
from finite_differences import assert_gradients_match
from scipy import special, stats
from scipy.integrate import quad

from aezoo.distributions.likelihoods import LIKELIHOODS, Likelihood, LogitLaplace, likelihood
from aezoo.errors import AezooError
from aezoo.models.quantised.dvae import LogitLaplaceWithScale

LEVELS = torch.arange(256, dtype=torch.float64) / 255
SHIFT = 0.37  # added to a learned log scale, to test away from its initial value


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)


def build(name: str) -> Likelihood:
    made = likelihood(name).double()
    if name.endswith("learned"):
        with torch.no_grad():
            made.log_scale += SHIFT
    return made


def one(made: Likelihood, t: float, x: float) -> float:
    """Log-density of one value."""
    return made.log_prob(torch.tensor([[t]], dtype=torch.float64), torch.tensor([[x]], dtype=torch.float64)).item()


def scale_of(made: Likelihood) -> float:
    return float(made.log_scale.detach().exp())


def logistic_levels(t: torch.Tensor, x: torch.Tensor, scale: float) -> torch.Tensor:
    """Log-probability of a level: a difference of scipy's distribution functions, with open end bins."""
    t_np, x_np = t.numpy(), x.numpy()
    upper = np.where(x_np > 254.5 / 255, np.inf, x_np + 0.5 / 255)
    lower = np.where(x_np < 0.5 / 255, -np.inf, x_np - 0.5 / 255)
    # from the smaller tail, to avoid cancellation
    left = stats.logistic.cdf(upper, t_np, scale) - stats.logistic.cdf(lower, t_np, scale)
    right = stats.logistic.sf(lower, t_np, scale) - stats.logistic.sf(upper, t_np, scale)
    return torch.from_numpy(np.log(np.where(x_np > t_np, right, left)))


def reference(name: str, made: Likelihood, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    kind = name.partition(":")[0]
    if kind == "bernoulli":
        return D.Bernoulli(logits=t).log_prob(x)
    if kind == "continuous_bernoulli":
        return D.ContinuousBernoulli(logits=t).log_prob(x)
    if kind == "gaussian":
        return D.Normal(t, t.new_tensor(scale_of(made))).log_prob(x)
    if kind == "sigmoid_gaussian":
        return D.Normal(t.sigmoid(), t.new_tensor(scale_of(made))).log_prob(x)
    if kind == "laplace":
        return D.Laplace(t, t.new_tensor(scale_of(made))).log_prob(x)
    if kind == "logit_laplace":
        into = D.AffineTransform(-1 / 8, 1 / 0.8)  # from y = 0.8 x + 0.1 back to x
        own = D.TransformedDistribution(D.Laplace(t, t.new_tensor(scale_of(made))), [D.SigmoidTransform(), into])
        return own.log_prob(x)
    if kind == "logcosh":
        return torch.from_numpy(stats.hypsecant.logpdf(x.numpy(), t.numpy(), scale_of(made)))
    if kind == "beta_binomial":
        m, c = t.sigmoid().numpy(), scale_of(made)
        k = (x * 255).round().numpy()
        return torch.from_numpy(stats.betabinom.logpmf(k, 255, c * m, c * (1 - m)))
    return logistic_levels(t, x, scale_of(made))


# likelihoods of 256 levels with a learned scale
BYTES = ("discretised_logistic", "beta_binomial")
NAMES = (
    *("bernoulli", "continuous_bernoulli", "gaussian", "gaussian:0.1", "gaussian:learned"),
    *("sigmoid_gaussian", "sigmoid_gaussian:0.3", "sigmoid_gaussian:learned"),
    *("laplace", "laplace:0.3", "laplace:learned", "discretised_logistic", "discretised_logistic:0.2"),
    *("discretised_logistic:learned", "beta_binomial", "beta_binomial:30", "beta_binomial:learned"),
    *("logcosh", "logcosh:0.3", "logcosh:learned"),
    *("logit_laplace", "logit_laplace:0.2", "logit_laplace:learned"),
)


@pytest.mark.parametrize("shape", [(7,), (2, 5), (3, 4, 4), (1, 2, 3, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_log_prob_matches_reference_summed_per_sample(name: str, shape: tuple[int, ...]) -> None:
    made = build(name)
    x = LEVELS[torch.randint(256, (6, *shape))]
    if name == "bernoulli":
        x = x.round()
    t = torch.randn(6, *shape, dtype=torch.float64) * (0.5 if "logistic" in name else 3)
    expected = reference(name, made, t, x).flatten(1).sum(1)
    found = made.log_prob(t.detach(), x)
    assert found.shape == (6,)
    # torch's continuous Bernoulli expands to second order around 1/2
    rtol, atol = (1e-5, 1e-5) if name == "continuous_bernoulli" else (1e-9, 1e-9)
    torch.testing.assert_close(found.detach(), expected, rtol=rtol, atol=atol)


def test_documented_constants_are_correct() -> None:
    x, t = torch.rand(5, 3, 4, dtype=torch.float64), torch.randn(5, 3, 4, dtype=torch.float64)
    sse = ((x - t) ** 2).flatten(1).sum(1)
    torch.testing.assert_close(-build("gaussian").log_prob(t, x), sse + 6 * math.log(math.pi))
    assert scale_of(build("laplace")) == 1.0
    assert scale_of(build("gaussian:0.1")) == pytest.approx(0.1)
    assert scale_of(build("logcosh")) == 1.0
    assert scale_of(build("discretised_logistic")) == pytest.approx(0.05)
    zeros = torch.zeros(2, 7, dtype=torch.float64)
    torch.testing.assert_close(build("bernoulli").log_prob(zeros, x.flatten(1)[:2, :7]), -zeros[:, 0] - 7 * math.log(2))


LOGITS = (-60.0, -5.0, -0.06, -0.049, -0.01, 0.0, 1e-4, 0.02, 0.0499, 0.0501, 0.7, 9.0, 60.0)


@pytest.mark.parametrize("t", LOGITS)
def test_continuous_bernoulli_is_normalised_with_its_mean(t: float) -> None:
    made = build("continuous_bernoulli")
    near = [0.0, 1 / 60, 0.5, 59 / 60, 1.0]
    total = sum(quad(lambda x: math.exp(one(made, t, x)), a, b)[0] for a, b in pairwise(near))
    mean = sum(quad(lambda x: x * math.exp(one(made, t, x)), a, b)[0] for a, b in pairwise(near))
    assert total == pytest.approx(1, abs=1e-8)
    assert made.mean(torch.tensor([[t]], dtype=torch.float64)).item() == pytest.approx(mean, abs=1e-8)


def test_continuous_bernoulli_mean_is_finite_in_bf16() -> None:
    made = likelihood("continuous_bernoulli")
    t = torch.tensor([[-200.0, -100.0, -0.01, 0.0, 0.06, 100.0, 200.0]], requires_grad=True)
    made.mean(t).sum().backward()
    assert torch.isfinite(t.grad).all()
    assert (t.grad > 0).all()
    grid = torch.linspace(-6, 6, 601)[None]
    assert (made.mean(grid.bfloat16()).float() - made.mean(grid.bfloat16().float())).abs().max() < 2.5e-3


@pytest.mark.parametrize(
    "name",
    [
        *("gaussian", "gaussian:0.1", "gaussian:learned", "laplace", "laplace:learned"),
        *("logcosh", "logcosh:0.1", "logcosh:learned"),
    ],
)
def test_densities_are_normalised_with_their_mean(name: str) -> None:
    made, t = build(name), 0.3
    cuts = [t - 40 * scale_of(made), t, t + 40 * scale_of(made)]
    parts = list(pairwise(cuts))
    assert sum(quad(lambda x: math.exp(one(made, t, x)), *p)[0] for p in parts) == pytest.approx(1, abs=1e-8)
    mean = sum(quad(lambda x: x * math.exp(one(made, t, x)), *p)[0] for p in parts)
    assert made.mean(torch.tensor([[t]])).item() == pytest.approx(mean, abs=1e-7)


@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
def test_logcosh_is_quadratic_near_and_linear_far(scale: float) -> None:
    made, t = build(f"logcosh:{scale}"), 0.3
    scale = scale_of(made)  # rounded to float32
    top = -math.log(math.pi * scale)
    for e in (0.0, 1e-3, -0.02):
        assert top - one(made, t, t + scale * e) == pytest.approx(e**2 / 2, rel=1e-4, abs=1e-14)
    for e in (20.0, -300.0, 1e6):
        assert top - one(made, t, t + scale * e) == pytest.approx(abs(e) - math.log(2), rel=1e-12)


def test_logcosh_gradient_is_tanh_without_overflow() -> None:
    e = torch.tensor([[-1e4, -100.0, -3.0, -1e-3, 0.0, 0.4, 50.0, 1e4]], requires_grad=True)
    log_p = likelihood("logcosh").log_prob(e, torch.zeros_like(e))
    log_p.sum().backward()
    assert log_p.isfinite().all()
    torch.testing.assert_close(e.grad, -e.detach().tanh())


def integrate_over_interval(made: Likelihood, t: float, of: Callable[[float, float], float]) -> float:
    """The integral of of(x, p(x)) over x from -1/8 to 9/8, by quadrature in the logit of y = 0.8 x + 0.1.

    The density of the logit is negligible beyond 60 b from t; that of x is infinite at the ends for b > 1.
    """

    def integrand(logit: float) -> float:
        y = 1 / (1 + math.exp(-logit))
        x = (y - 0.1) / 0.8
        return of(x, math.exp(one(made, t, x))) * y * (1 - y) / 0.8

    reach = min(60 * scale_of(made), 13 - abs(t))  # `_from_data` clamps y nearer to the ends
    cuts = [t - reach, t - reach / 9, t, t + reach / 9, t + reach]
    return sum(quad(integrand, a, b)[0] for a, b in pairwise(cuts))


@pytest.mark.parametrize("scale", [0.02, 0.3, 0.8])
@pytest.mark.parametrize("t", [-2.0, -0.3, 0.0, 1.7])
def test_logit_laplace_is_normalised_with_its_mean(t: float, scale: float) -> None:
    made = build(f"logit_laplace:{scale}")
    assert integrate_over_interval(made, t, lambda x, p: p) == pytest.approx(1, abs=2e-6)
    mean = made.mean(torch.tensor([[t]], dtype=torch.float64)).item()
    assert mean == pytest.approx(integrate_over_interval(made, t, lambda x, p: x * p), abs=5e-6)
    if t and scale > 0.1:  # the paper decodes to the median, which differs from the mean
        assert abs(mean - (1 / (1 + math.exp(-t)) - 0.1) / 0.8) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_logit_laplace_mean_matches_quantile_average(scale: float) -> None:
    """Including a scale for which the density is infinite at the ends."""
    made, t = build(f"logit_laplace:{scale}"), torch.linspace(-6, 6, 13, dtype=torch.float64)[:, None]
    quantiles = stats.laplace.ppf((np.arange(400_000) + 0.5) / 400_000, 0, scale_of(made))
    wanted = [(stats.logistic.cdf(one_t + quantiles).mean() - 0.1) / 0.8 for one_t in t[:, 0].tolist()]
    torch.testing.assert_close(made.mean(t)[:, 0], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=3e-5)


class WithoutLogitJacobian(LogitLaplace):
    """Omits d logit(y) / dy = 1 / (y (1 - y))."""

    def log_prob(self, params: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = 0.8 * x + 0.1
        return super().log_prob(params, x) + torch.log(y * (1 - y)).flatten(1).sum(1)


class WithoutScaleJacobian(LogitLaplace):
    """Omits dy / dx = 0.8."""

    def log_prob(self, params: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return super().log_prob(params, x) - x[0].numel() * math.log(0.8)


@pytest.mark.parametrize("rival", [WithoutLogitJacobian, WithoutScaleJacobian])
def test_wrong_logit_laplace_densities_are_detected(rival: type[LogitLaplace]) -> None:
    made = rival(0.3, learned=False).double()
    assert abs(integrate_over_interval(made, 0.7, lambda x, p: p) - 1) > 0.1
    x, t = LEVELS[torch.randint(256, (6, 3))], torch.randn(6, 3, dtype=torch.float64)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(made.log_prob(t, x), reference("logit_laplace", made, t, x).sum(1))


def test_logit_laplace_is_finite_outside_interval() -> None:
    made, params = likelihood("logit_laplace"), torch.randn(5, 1, requires_grad=True)
    x = torch.tensor([[-10.0], [-0.125], [0.5], [1.125], [11.0]])
    log_p = made.log_prob(params, x)
    log_p.sum().backward()
    assert log_p.isfinite().all() and params.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("t", [-3.0, -0.05, 0.0, 0.301, 0.5, 1.0, 1.1, 4.0])
def test_discretised_logistic_sums_to_1_over_256_levels(t: float, scale: float) -> None:
    made = build(f"discretised_logistic:{scale}")
    p = made.log_prob(torch.full((256, 1), t, dtype=torch.float64), LEVELS[:, None]).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-10)
    mean = made.mean(torch.tensor([[t]], dtype=torch.float64)).item()
    assert mean == pytest.approx((p * LEVELS).sum().item(), abs=0.5 / 255 if scale < 0.01 else 2e-5)


@pytest.mark.parametrize("scale", [1e-3, 0.05])
@pytest.mark.parametrize("t", [-1e5, -1e3, 1e3, 1e5])
def test_discretised_logistic_is_finite_far_out(t: float, scale: float) -> None:
    made = likelihood(f"discretised_logistic:{scale}")
    params = torch.full((256, 1), t, requires_grad=True)
    log_p = made.log_prob(params, LEVELS.float()[:, None])
    log_p.sum().backward()
    assert torch.isfinite(log_p).all()
    assert torch.isfinite(params.grad).all()
    assert log_p.max() == 0  # all mass at the nearest level


@pytest.mark.parametrize("c", [1e-2, 0.5, 2.0, 300.0])
@pytest.mark.parametrize("t", [-40.0, -3.0, 0.0, 1.1, 20.0])
def test_beta_binomial_sums_to_1_over_256_levels(t: float, c: float) -> None:
    made = build(f"beta_binomial:{c}")
    p = made.log_prob(torch.full((256, 1), t, dtype=torch.float64), LEVELS[:, None]).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    mean = made.mean(torch.tensor([[t]], dtype=torch.float64)).item()
    assert mean == pytest.approx((p * LEVELS).sum().item(), abs=1e-9)


@pytest.mark.parametrize("log_c", [-100.0, -3.0, 0.0, 3.0, 100.0])
@pytest.mark.parametrize("t", [-1e5, -30.0, 0.3, 30.0, 1e5])
def test_beta_binomial_is_accurate_for_extreme_parameters(t: float, log_c: float) -> None:
    made = likelihood("beta_binomial")
    with torch.no_grad():
        made.log_scale.fill_(log_c)
    params = torch.full((256, 1), t, requires_grad=True)
    log_p = made.log_prob(params, LEVELS.float()[:, None])
    log_p.sum().backward()
    assert params.grad.isfinite().all() and made.log_scale.grad.isfinite()
    exact = made.double().log_prob(params.detach().double(), LEVELS[:, None])
    torch.testing.assert_close(log_p.detach().double(), exact, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_best_params_minimise_the_deviance(name: str) -> None:
    made, x = build(name), LEVELS[::5, None]
    best = made.best_params(x).detach()
    # small and large offsets; the continuous Bernoulli has no finite best logit for 0 and 1
    reach = 100 if name == "continuous_bernoulli" else 15
    for u in torch.linspace(-1, 1, 9, dtype=torch.float64):
        t = (best + reach * u**3).clamp(-510, 510)
        deviance = made.deviance(t, x).detach()
        assert deviance.min() > -2e-7
        if name != "bernoulli":  # torch.distributions.Bernoulli takes 0 and 1 only
            apart = reference(name, made, best, x) - reference(name, made, t, x)
            known = (torch.maximum(best.abs(), t.abs()) < 30)[:, 0]  # beyond, the references round the mean to 0 or 1
            # torch's continuous Bernoulli is within 1e-5, as above
            torch.testing.assert_close(deviance[known], apart[known, 0].detach(), rtol=1e-5, atol=2e-5)
    assert made.deviance(best, x).abs().max() < 1e-9


@pytest.mark.parametrize(
    "name", ["bernoulli", "continuous_bernoulli", "sigmoid_gaussian", "discretised_logistic", "logit_laplace"]
)
def test_deviance_is_finite_just_outside_the_interval(name: str) -> None:
    # new samples may lie outside [0, 1] after scaling by the range of the training data
    x, t = torch.tensor([[-0.2], [-0.01], [1.01], [1.2]]), torch.randn(4, 1)
    deviance = likelihood(name).deviance(t, x)
    assert deviance.isfinite().all() and deviance.min() > 0


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "gaussian:0.1", "gaussian:learned", "laplace:0.3"])
def test_deviance_has_its_closed_form(name: str) -> None:
    made, x, t = build(name), torch.rand(6, 3, 4, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64)
    x[0], x[1] = 0, 1
    e, p = (x - t).abs(), t.sigmoid()
    if name == "bernoulli":
        expected = torch.from_numpy(special.kl_div(x.numpy(), p.numpy()) + special.kl_div(1 - x.numpy(), 1 - p.numpy()))
    else:
        s = scale_of(made)
        expected = e / s if name.startswith("laplace") else e**2 / (2 * s**2)
    torch.testing.assert_close(made.deviance(t, x).detach(), expected.flatten(1).sum(1), rtol=1e-6, atol=1e-5)
    if name != "bernoulli":  # the nll up to a constant
        apart = made.deviance(t, x) + made.log_prob(t, x)
        torch.testing.assert_close(apart.detach(), apart[:1].expand(6).detach())


@pytest.mark.parametrize("t", [-2.0, 0.2, 0.8])
@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_moments_of_log_prob(name: str, t: float) -> None:
    made, n = build(name), 100_000
    x = made.sample(torch.full((n, 1), t, dtype=torch.float64)).squeeze(1).detach()
    if name == "bernoulli":
        grid = torch.tensor([0.0, 1.0], dtype=torch.float64)
    elif name.startswith("continuous"):
        grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    elif name.startswith(BYTES):
        grid = LEVELS
    elif name.startswith("logit_laplace"):
        logit = t + scale_of(made) * torch.linspace(-30, 30, 60_001, dtype=torch.float64)
        logit = logit[logit.abs() < 13]
        grid = (logit.sigmoid() - 0.1) / 0.8
    else:
        grid = t + scale_of(made) * torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    p = made.log_prob(torch.full((len(grid), 1), t, dtype=torch.float64), grid[:, None]).exp().detach()
    if name.startswith("logit_laplace"):
        p = p * logit.sigmoid() * (-logit).sigmoid()  # density of the logit
    p = p / p.sum()
    mean = (p * grid).sum()
    moments = [(p * (grid - mean) ** k).sum().item() for k in (2, 4)]
    assert abs(x.mean() - mean) < 5 * math.sqrt(moments[0] / n) + 1e-6
    spread = math.sqrt(max(moments[1] - moments[0] ** 2, 0) / n)
    assert abs(((x - mean) ** 2).mean() - moments[0]) < 5 * spread + 1e-6
    if made.unit_interval and not name.startswith("sigmoid_gaussian"):  # only its means are in [0, 1]
        margin = 1 / 8 if name.startswith("logit_laplace") else 0
        assert -margin <= x.min() <= x.max() <= 1 + margin
    if name.startswith(BYTES):
        torch.testing.assert_close(x * 255, (x * 255).round(), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("gaussian:learned", lambda e: e.square().mean().sqrt()),  # sigma-VAE, arXiv 2006.13202: sigma^2 = MSE
        ("laplace:learned", lambda e: e.abs().mean()),
    ],
)
def test_learned_scale_optimum_matches_theory(name: str, best: object) -> None:
    made = build(name)
    x, t = torch.rand(40, 6, dtype=torch.float64), torch.rand(40, 6, dtype=torch.float64)
    gradients = []
    for factor in (0.8, 1.0, 1.25):
        with torch.no_grad():
            made.log_scale.copy_((best(x - t) * factor).log())
        made.zero_grad()
        (-made.log_prob(t, x).mean()).backward()
        gradients.append(made.log_scale.grad.item())
    assert gradients[0] < -0.5
    assert abs(gradients[1]) < 1e-12
    assert gradients[2] > 0.5


def test_log_prob_gradients_match_finite_differences() -> None:
    x = LEVELS[torch.tensor([[0, 1, 100, 254, 255]])]
    t = torch.tensor([[0.1, -0.2, 0.03, 1.3, 0.9]], dtype=torch.float64, requires_grad=True)
    for name in NAMES:
        made = build(name)
        assert torch.autograd.gradcheck(lambda t, made=made: made.log_prob(t, x), (t,), atol=1e-6)


def test_flags_state_data_range_and_discreteness() -> None:
    flags = {name: (likelihood(name).unit_interval, likelihood(name).discrete) for name in LIKELIHOODS}
    assert flags == {
        "bernoulli": (True, True),
        "continuous_bernoulli": (True, False),
        "gaussian": (False, False),
        "sigmoid_gaussian": (True, False),
        "laplace": (False, False),
        "logcosh": (False, False),
        "discretised_logistic": (True, True),
        "beta_binomial": (True, True),
        "logit_laplace": (True, False),
    }


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_params_from_mean_invert_the_mean(name: str) -> None:
    own, mean = likelihood(name), torch.linspace(0, 1, 11)
    params = own.params_from_mean(mean)
    assert params.isfinite().all()
    # the mean of a density on a bounded interval, or of a clipped one, does not reach the ends
    near = 0.35 if name in ("continuous_bernoulli", "discretised_logistic", "logit_laplace") else 0.011
    torch.testing.assert_close(own.mean(params), mean, rtol=0, atol=near)
    assert (own.mean(params).diff() > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_only_a_learned_scale_is_trained(name: str) -> None:
    learned = name.endswith(":learned") or name in (*BYTES, "logit_laplace")
    assert len(list(likelihood(name).parameters())) == learned


@pytest.mark.parametrize(
    "name",
    [
        *("", "bernouli", "gauss", "bernoulli:0.1", "gaussian:", "bernoulli:", "gaussian:0", "gaussian:-1"),
        *("gaussian:nan", "gaussian:inf", "gaussian:many", "laplace:learn", "Gaussian"),
        *("continuous_bernoulli:learned", ":0.1"),
    ],
)
def test_a_bad_name_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(AezooError) as error:
        likelihood(name)
    assert "\n" not in str(error.value)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("learned")])
def test_learned_scale_gradients_match_finite_differences(name: str) -> None:
    assert_gradients_match(likelihood(name), torch.randn(3, 4), torch.rand(3, 4))


@pytest.mark.parametrize("share", [-0.999, -0.5, 0.5, 0.999])
def test_continuous_bernoulli_series_inverts_the_distribution(share: float) -> None:
    """For small logits, where the exact inverse loses precision, x is a series in the logit that solves F(x) = u."""
    made = build("continuous_bernoulli")
    params = torch.full((1000, 1), share * made._TAYLOR_BELOW, dtype=torch.float64)
    torch.manual_seed(0)
    u = torch.rand_like(params)
    torch.manual_seed(0)
    x = made.sample(params)
    torch.testing.assert_close(torch.expm1(params * x) / torch.expm1(params), u, rtol=0, atol=2e-4)
    assert (x - u).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*LIKELIHOODS, "gaussian:learned", "laplace:0.2"])
def test_nll_by_value_sums_to_nll(name: str) -> None:
    made, x = build(name), (torch.rand(3, 2, 4, dtype=torch.float64) * 255).round() / 255
    params = torch.randn_like(x)
    terms = made.nll_by_value(params, x)
    assert torch.allclose(terms.sum((1, 2)), -made.log_prob(params, x))
    assert terms[1, 1, 2].item() == pytest.approx(-one(made, params[1, 1, 2].item(), x[1, 1, 2].item()))
    with made.use_deviance():
        deviances = made.nll_by_value(params, x)
        assert torch.allclose(deviances.sum((1, 2)), made.deviance(params, x)) and deviances.min() > -1e-9
        x[0, 1, 3] = torch.nan
        lacking = made.nll_by_value(params, x)
    assert lacking[0, 1, 3] == 0 and torch.equal(lacking[1:], deviances[1:])


def test_nll_by_value_supports_two_parameters_per_value() -> None:
    made, x = LogitLaplaceWithScale().double(), torch.rand(2, 3, 4, dtype=torch.float64)
    params = torch.randn(2, 6, 4, dtype=torch.float64)
    terms = made.nll_by_value(params, x)
    assert torch.allclose(terms.sum((1, 2)), -made.log_prob(params, x))
    pair = torch.stack([params[1, 2, 3], params[1, 5, 3]])[None]
    assert torch.allclose(terms[1, 2, 3], -made.log_prob(pair, x[1, 2, 3].view(1, 1)).squeeze())
