"""Likelihoods p(x | z): distributions over data given a decoder's output.

A decoder outputs one number per data value: `params` of shape (B, *input_shape). A likelihood uses it as the parameter
of a distribution that is independent over data values. It provides `log_prob(params, x)` in nats per sample (B,),
summed over the sample's values; `mean(params)`, the reconstruction; `sample(params)`; and `deviance(params, x)`, the
difference of the log-likelihood to that of the best parameters for x.

Models specify a likelihood by a string, with an optional argument after a colon:

    bernoulli               p(x=1) = sigmoid(params), x in [0, 1]; the summed binary cross-entropy
    continuous_bernoulli    its normalised version on [0, 1] (Loaiza-Ganem & Cunningham 2019)
    gaussian                N(params, 1/2): then -log p = ||x - params||^2 + D/2 log(pi), the squared error
    gaussian:0.1            N(params, 0.1^2), fixed
    gaussian:learned        N(params, s^2), one s for all values, a trained parameter (Rybkin et al. 2021)
    sigmoid_gaussian | :0.1 | :learned           N(sigmoid(params), s^2), x in [0, 1]; plain: s^2 = 1/2
    laplace | laplace:0.1 | laplace:learned      density exp(-|x - params| / b) / (2 b); plain `laplace` has b = 1
    logcosh | logcosh:0.1 | logcosh:learned      density 1 / (pi s cosh((x - params) / s)); plain `logcosh` has s = 1
    discretised_logistic | :0.05 | :learned      256 levels k/255 (Salimans et al. 2017); plain: learned from 0.05
    beta_binomial | :2 | :learned                256 levels k/255 (Townsend et al. 2019); plain: learned from 2
    logit_laplace | :0.1 | :learned              density on an interval about [0, 1] (Ramesh et al. 2021); plain:
                                                 learned from 1
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.training.precision import at_least_float32
from aezoo.training.tracing import is_exporting

# Quadrature for the mean of LogitLaplace, Gauss-Legendre in v from 0 to 1: t = -log v^2 has the standard exponential
# density, u = logit(3 v^2 - 2 v^3) the standard logistic one; the former is used for small scales, the latter for large
# ones
_GAUSS = [
    ((1 + node) / 2, weight / 2)
    for node, weight in zip(*(part.tolist() for part in np.polynomial.legendre.leggauss(16)), strict=True)
]
_EXPONENTIAL = [(-2 * math.log(v), 2 * v * weight) for v, weight in _GAUSS]
_LOGISTIC = [
    (2 * math.log(v / (1 - v)) + math.log((3 - 2 * v) / (1 + 2 * v)), 6 * v * (1 - v) * weight) for v, weight in _GAUSS
]
_LARGE_SCALE = 3.0

_MAX_LOGIT = 16.0


def _logit(mean: Tensor) -> Tensor:
    """Return the logit of means clamped away from 0 and 1, where it is infinite."""
    return mean.clamp(0.01, 0.99).logit()


def _extreme_logit(x: Tensor) -> Tensor:
    """Return the logit, clamped to those of the float32 values next to 0 and 1."""
    return x.clamp(0, 1).logit().clamp(-_MAX_LOGIT, _MAX_LOGIT)


def _bisected(x: Tensor, rises: Callable[[Tensor, Tensor], Tensor], most: float) -> Tensor:
    """Return, for each value of x, the parameter in [-most, most] that maximises its log-probability, (B, *shape)."""
    # at most 256 levels for bytes; exported graphs do not support shapes that depend on values
    levels, which = (x, None) if is_exporting() else torch.unique(x, return_inverse=True)
    low, high = torch.full_like(levels, -most), torch.full_like(levels, most)
    for _ in range(40):
        middle = (low + high) / 2
        up = rises(middle, levels)
        low, high = torch.where(up, middle, low), torch.where(up, high, middle)
    return high if which is None else high[which]


def _sum_per_sample(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


class Likelihood(nn.Module):
    """A distribution over data, given the decoder's output.

    Attributes:
        unit_interval: whether the data must lie in [0, 1].
        as_deviance: whether a model's `nll` is the deviance, see `use_deviance`.
        discrete: whether `log_prob` is a probability, so that bits per dimension are a code length, or a density.
    """

    unit_interval: ClassVar[bool] = False
    discrete: ClassVar[bool] = False
    as_deviance: bool = False

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Return the log-likelihood of each sample in nats, (B, *shape), (B, *shape) -> (B,)."""
        raise NotImplementedError

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        """Return `log_prob`, for `torch.func.functional_call`."""
        return self.log_prob(params, x)

    def mean(self, params: Tensor) -> Tensor:
        """Return E[x | params], the reconstruction in data space, (B, *shape) -> (B, *shape)."""
        raise NotImplementedError

    def params_from_mean(self, mean: Tensor) -> Tensor:
        """Return initial parameters for data with this mean, (*shape) -> (*shape).

        Their mean is close to it. For a density on an interval, or a clipped density, it is further inside.
        """
        return mean

    def sample(self, params: Tensor) -> Tensor:
        """Draw one sample per value, (B, *shape) -> (B, *shape)."""
        raise NotImplementedError

    def best_params(self, x: Tensor) -> Tensor:
        """Return the parameters that maximise `log_prob` of each value, (B, *shape) -> (B, *shape).

        A scale shared by all values is not optimised, since the density would then be unbounded.
        """
        return self.params_from_mean(x)

    def deviance(self, params: Tensor, x: Tensor) -> Tensor:
        """Return log p(x | best_params(x)) - log p(x | params) in nats, (B, *shape), (B, *shape) -> (B,).

        This is at least 0, and half the deviance of a generalised linear model (McCullagh & Nelder 1989, section 2.3).
        Unlike -log p, it does not include the -log p of a perfect reconstruction, such as the entropy of grey values.
        """
        return self.log_prob(self.best_params(x), x) - self.log_prob(params, x)

    def nll_by_value(self, params: Tensor, x: Tensor) -> Tensor:
        """Return -log p of each value in nats, or its deviance within `use_deviance`, shaped like x.

        Values are independent given their parameters, so each is evaluated as a separate sample here. The sum over the
        values of a sample is its -log p. Missing values (NaN) contribute 0.
        """
        # there may be several parameters per value, in blocks along the channels
        params_ND = params.flatten(1).unflatten(1, (params.numel() // x.numel(), -1)).movedim(1, 2).flatten(0, 1)
        known_N1 = x.nan_to_num(0.0).reshape(-1, 1)
        nll_N = self.deviance(params_ND, known_N1) if self.as_deviance else -self.log_prob(params_ND, known_N1)
        return nll_N.reshape(x.shape).masked_fill(x.isnan(), 0.0)

    @contextmanager
    def use_deviance(self) -> Iterator[None]:
        """Context in which `nll` of models with this likelihood is the deviance."""
        before, self.as_deviance = self.as_deviance, True
        try:
            yield
        finally:
            self.as_deviance = before


class Bernoulli(Likelihood):
    """p(x = 1) = sigmoid(params); for x between 0 and 1, the cross-entropy, which is then not a density."""

    unit_interval = True
    discrete = True

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -_sum_per_sample(F.binary_cross_entropy_with_logits(params, x, reduction="none"))

    def mean(self, params: Tensor) -> Tensor:
        return params.sigmoid()

    def params_from_mean(self, mean: Tensor) -> Tensor:
        return _logit(mean)

    def sample(self, params: Tensor) -> Tensor:
        return torch.bernoulli(params.sigmoid())

    def best_params(self, x: Tensor) -> Tensor:
        return _extreme_logit(x)


class ContinuousBernoulli(Likelihood):
    """Density C(p) p^x (1 - p)^(1 - x) on [0, 1] with p = sigmoid(params).

    Loaiza-Ganem & Cunningham 2019, https://arxiv.org/abs/1907.06845. In terms of the logit t = params, the normaliser
    is C = t / tanh(t / 2) and the mean is 1 / (1 - exp(-t)) - 1 / t. Both are smooth at t = 0 (p = 1/2), where they are
    computed by Taylor series.
    """

    unit_interval = True
    _TAYLOR_BELOW = 0.05
    # for a mean of 1/510, half a level of uint8, since the density of 0 is unbounded in the logit
    _MAX_LOGIT = 510.0

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        cross_entropy = F.binary_cross_entropy_with_logits(params, x, reduction="none")
        return _sum_per_sample(self._log_normaliser(params) - cross_entropy)

    def _log_normaliser(self, t: Tensor) -> Tensor:
        use_taylor = t.abs() < self._TAYLOR_BELOW
        u = torch.where(use_taylor, 1.0, t.abs())
        # log(t / tanh(t/2)), with tanh(u/2) = (1 - exp(-u)) / (1 + exp(-u)) computed accurately for large u
        exact = torch.log(u) + torch.log1p(torch.exp(-u)) - torch.log(-torch.expm1(-u))
        s = torch.where(use_taylor, t, 0.0) ** 2
        return torch.where(use_taylor, math.log(2.0) + s / 12 - 7 * s**2 / 1440, exact)

    def mean(self, params: Tensor) -> Tensor:
        # the two terms almost cancel, which needs more than half precision
        t = at_least_float32(params)
        use_taylor = t.abs() < self._TAYLOR_BELOW
        # by symmetry for t < 0, where exp(-t) would overflow and give a NaN gradient
        a = torch.where(use_taylor, 1.0, t.abs())
        above = -1 / torch.expm1(-a) - 1 / a
        s = torch.where(use_taylor, t, 0.0)
        exact = torch.where(t > 0, above, 1 - above)
        return torch.where(use_taylor, 0.5 + s / 12 - s**3 / 720, exact).to(params.dtype)

    def params_from_mean(self, mean: Tensor) -> Tensor:
        return _logit(mean)

    def sample(self, params: Tensor) -> Tensor:
        u = torch.rand_like(params)
        use_taylor = params.abs() < self._TAYLOR_BELOW
        t = torch.where(use_taylor, 1.0, params)
        # inverse of the distribution function F(x) = (exp(t x) - 1) / (exp(t) - 1), by symmetry for t > 0
        a = -t.abs()
        x = torch.log1p(u * torch.expm1(a)) / a
        x = torch.where(t > 0, 1 - x, x)
        s = torch.where(use_taylor, params, 0.0)
        return torch.where(use_taylor, u + s * u * (u - 1) / -2, x).clamp(0, 1)

    def best_params(self, x: Tensor) -> Tensor:
        # log_prob is concave in the logit, with slope x - mean(t)
        return _bisected(x, lambda t, x: x > self.mean(t), self._MAX_LOGIT)


class _Scaled(Likelihood):
    """A location, the decoder's output, and one scale for all values, fixed or learned.

    Args:
        scale: the scale, or its initial value if it is learned.
        learned: train the log scale.
    """

    log_scale: Tensor

    def __init__(self, scale: float, learned: bool = False) -> None:
        super().__init__()
        log_scale = torch.tensor(math.log(scale))
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)

    @property
    def bounded_scale(self) -> Tensor:
        """Return the log scale, clamped to [-15, 10]: exp(-2 log scale) overflows float32 at about -44.

        The log-variance is then in [-30, 20], the same interval as in diffusers
        (https://github.com/huggingface/diffusers, DiagonalGaussianDistribution in models/autoencoders/vae.py).
        """
        return self.log_scale.clamp(-15, 10)

    def mean(self, params: Tensor) -> Tensor:
        return params


class _Normal(_Scaled):
    """A normal distribution about the mean."""

    def __init__(self, scale: float = math.sqrt(0.5), learned: bool = False) -> None:
        super().__init__(scale, learned)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        sse = _sum_per_sample((x - self.mean(params)) ** 2)
        d = x[0].numel()
        return -0.5 * sse * torch.exp(-2 * self.bounded_scale) - d * (self.bounded_scale + 0.5 * math.log(2 * math.pi))

    def sample(self, params: Tensor) -> Tensor:
        return self.mean(params) + torch.exp(self.bounded_scale) * torch.randn_like(params)


class Gaussian(_Normal):
    """N(params, s^2)."""


class SigmoidGaussian(_Normal):
    """N(sigmoid(params), s^2): the squared error of a decoder with a sigmoid output."""

    unit_interval = True

    def mean(self, params: Tensor) -> Tensor:
        return params.sigmoid()

    def params_from_mean(self, mean: Tensor) -> Tensor:
        return _logit(mean)

    def best_params(self, x: Tensor) -> Tensor:
        return _extreme_logit(x)


def _laplace_noise(like: Tensor) -> Tensor:
    """Draw Laplace noise of scale 1, by the inverse of the distribution function."""
    u = torch.rand_like(like) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.4999999))


class Laplace(_Scaled):
    """Density exp(-|x - params| / b) / (2 b)."""

    def __init__(self, scale: float = 1.0, learned: bool = False) -> None:
        super().__init__(scale, learned)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        d = x[0].numel()
        return -_sum_per_sample((x - params).abs()) * torch.exp(-self.bounded_scale) - d * (
            self.bounded_scale + math.log(2.0)
        )

    def sample(self, params: Tensor) -> Tensor:
        noise = _laplace_noise(params)
        return params + torch.exp(self.bounded_scale) * noise


class LogCosh(_Scaled):
    """Density 1 / (pi s cosh((x - params) / s)), the hyperbolic secant: log cosh(e / s) is -log p up to a constant.

    It approaches e^2 / (2 s^2) near 0, as for a Gaussian, and |e| / s - log 2 far from 0, as for a Laplace density. The
    slope in e is tanh(e / s) / s. Chen et al. 2019, https://openreview.net/forum?id=rkglvsC9Ym, with a = 1 / s.
    """

    def __init__(self, scale: float = 1.0, learned: bool = False) -> None:
        super().__init__(scale, learned)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        u = (x - params) * torch.exp(-self.bounded_scale)
        log_cosh = u + F.softplus(-2 * u) - math.log(2.0)  # cosh would overflow
        return -_sum_per_sample(log_cosh) - x[0].numel() * (self.bounded_scale + math.log(math.pi))

    def sample(self, params: Tensor) -> Tensor:
        u = torch.rand_like(params).clamp(1e-6, 1 - 1e-6)
        return params + torch.exp(self.bounded_scale) * torch.log(torch.tan(math.pi / 2 * u))


class DiscretisedLogistic(_Scaled):
    """Probability of the level k/255: a logistic density integrated over its bin; the end bins are open.

    Salimans et al. 2017, https://arxiv.org/abs/1701.05517, section 2.1, on data in [0, 1] with one component.
    """

    unit_interval = True
    discrete = True

    def __init__(self, scale: float = 0.05, learned: bool = True) -> None:
        super().__init__(scale, learned)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        inverse = torch.exp(-self.bounded_scale)
        upper = (x + 0.5 / 255 - params) * inverse
        lower = (x - 0.5 / 255 - params) * inverse
        # log(sigmoid(u) - sigmoid(l)) = log(1 - exp(l - u)) - softplus(-u) - softplus(l) is accurate far in the
        # tails; l - u is computed directly, since the difference of u and l rounds to 0 there
        inside = torch.log(-torch.expm1(-inverse / 255)) - F.softplus(-upper) - F.softplus(lower)
        log_p = torch.where(
            x < 0.5 / 255, F.logsigmoid(upper), torch.where(x > 254.5 / 255, -F.softplus(lower), inside)
        )
        return _sum_per_sample(log_p)

    def mean(self, params: Tensor) -> Tensor:
        # E[clip(X, 0, 1)] = integral of P(X > t) over [0, 1]; rounding to levels changes it by less than half a level
        scale = torch.exp(self.bounded_scale)
        return scale * (F.softplus(params / scale) - F.softplus((params - 1) / scale))

    def sample(self, params: Tensor) -> Tensor:
        u = torch.rand_like(params).clamp(1e-6, 1 - 1e-6)
        x = params + torch.exp(self.bounded_scale) * torch.logit(u)
        return (x.clamp(0, 1) * 255).round() / 255

    def best_params(self, x: Tensor) -> Tensor:
        # the probability of an open end bin increases with the distance
        beyond = _MAX_LOGIT * torch.exp(self.bounded_scale)
        return torch.where(x < 0.5 / 255, x - beyond, torch.where(x > 254.5 / 255, x + beyond, x))


class BetaBinomial(_Scaled):
    """Probability of the level k/255: k ~ Binomial(255, p) with p ~ Beta(c m, c (1 - m)) and m = sigmoid(params).

    p(k) = C(255, k) B(k + c m, 255 - k + c (1 - m)) / B(c m, c (1 - m)). A small concentration c concentrates the mass
    on the end levels, which most pixels of digits have; for large c, the distribution is binomial. Townsend et al.
    2019, section 3.2, https://arxiv.org/abs/1901.04866, with one c for all values.
    """

    unit_interval = True
    discrete = True

    def __init__(self, scale: float = 2.0, learned: bool = True) -> None:
        super().__init__(scale, learned)

    @property
    def bounded_scale(self) -> Tensor:
        """Return log c, clamped to [-7, 7]: outside, differences of log-gamma are imprecise in float32."""
        return self.log_scale.clamp(-7, 7)

    def shapes(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return c m and c (1 - m) of the beta distribution, without underflow to 0, the pole of log-gamma."""
        c, t = torch.exp(self.bounded_scale), params.clamp(-50, 50)
        return c * t.sigmoid(), c * (-t).sigmoid()

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        a, b = self.shapes(params)
        k, n = 255 * x, torch.tensor(255.0, device=x.device, dtype=x.dtype)
        log_choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
        return _sum_per_sample(log_choose + _log_beta(k + a, n - k + b) - _log_beta(a, b))

    def mean(self, params: Tensor) -> Tensor:
        return params.sigmoid()

    def params_from_mean(self, mean: Tensor) -> Tensor:
        return _logit(mean)

    def sample(self, params: Tensor) -> Tensor:
        p = torch.distributions.Beta(*self.shapes(params)).sample()
        return torch.binomial(torch.full_like(p, 255), p) / 255

    def best_params(self, x: Tensor) -> Tensor:
        def rises(t: Tensor, x: Tensor) -> Tensor:
            # log_prob is concave in m: a sum of terms log(j + c m) and log(j + c (1 - m))
            a, b = self.shapes(t)
            return (255 * x + a).digamma() - a.digamma() > (255 - 255 * x + b).digamma() - b.digamma()

        return _bisected(x, rises, 50.0)


class LogitLaplace(_Scaled):
    """The logit of y = 0.8 x + 0.1 is Laplace: density 0.8 exp(-|logit y - params| / b) / (2 b y (1 - y)) of x.

    Ramesh et al. 2021, appendix A.3, https://arxiv.org/abs/2102.12092, omit the constant 0.8. With this map, x in [0,
    1] is away from the poles of the logit at -1/8 and 9/8, between which all of the density lies.
    """

    unit_interval = True
    _MARGIN = 0.1

    def __init__(self, scale: float = 1.0, learned: bool = True) -> None:
        super().__init__(scale, learned)

    def split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return location and log b of each value: two tensors that can be broadcast to (B, *shape)."""
        return params, self.bounded_scale

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mu, log_b = self.split(params)
        y = self._from_data(x)
        log_p = -(y.logit() - mu).abs() * torch.exp(-log_b) - log_b - math.log(2.0) - torch.log(y * (1 - y))
        return _sum_per_sample(log_p + math.log(1 - 2 * self._MARGIN))

    def mean(self, params: Tensor) -> Tensor:
        # E[sigmoid(mu + b e)], e Laplace, is P(u < mu + b e), u logistic; the error of the quadrature is at most 1e-4
        mu, log_b = self.split(at_least_float32(params))
        b, y, y_large = torch.exp(log_b), torch.zeros_like(mu), torch.zeros_like(mu)
        for t, weight in _EXPONENTIAL:
            y = y + weight / 2 * ((mu + b * t).sigmoid() + (mu - b * t).sigmoid())
        for u, weight in _LOGISTIC:
            s = (mu - u) / b
            y_large = y_large + weight / 2 * (1 - s.sign() * torch.expm1(-s.abs()))
        return self._to_data(torch.where(b < _LARGE_SCALE, y, y_large)).to(params.dtype)

    def params_from_mean(self, mean: Tensor) -> Tensor:
        return ((1 - 2 * self._MARGIN) * mean + self._MARGIN).logit()

    def sample(self, params: Tensor) -> Tensor:
        mu, log_b = self.split(params)
        noise = _laplace_noise(mu)
        return self._to_data((mu + torch.exp(log_b) * noise).sigmoid())

    def best_params(self, x: Tensor) -> Tensor:
        return self._from_data(x).logit()

    def _from_data(self, x: Tensor) -> Tensor:
        return ((1 - 2 * self._MARGIN) * x + self._MARGIN).clamp(1e-6, 1 - 1e-6)

    def _to_data(self, y: Tensor) -> Tensor:
        return (y - self._MARGIN) / (1 - 2 * self._MARGIN)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


_PLAIN: dict[str, type[Likelihood]] = {"bernoulli": Bernoulli, "continuous_bernoulli": ContinuousBernoulli}
_SCALED: dict[str, type[_Normal | Laplace | LogCosh | DiscretisedLogistic | BetaBinomial | LogitLaplace]] = {
    "gaussian": Gaussian,
    "sigmoid_gaussian": SigmoidGaussian,
    "laplace": Laplace,
    "logcosh": LogCosh,
    "discretised_logistic": DiscretisedLogistic,
    "beta_binomial": BetaBinomial,
    "logit_laplace": LogitLaplace,
}
LIKELIHOODS = (*_PLAIN, *_SCALED)


def likelihood(name: str) -> Likelihood:
    """Build a likelihood from its name, e.g. `bernoulli`, `gaussian`, `gaussian:0.1`, `gaussian:learned`.

    Raises:
        AezooError: the name or the argument after the colon is not one of those above.
    """
    kind, colon, argument = name.partition(":")
    if kind in _PLAIN and not colon:
        return _PLAIN[kind]()
    if kind in _SCALED:
        scaled = _SCALED[kind]
        if not colon:
            return scaled()
        if argument == "learned":
            return scaled(learned=True)
        try:
            scale = float(argument)
        except ValueError:
            scale = math.nan
        if 0 < scale < math.inf:
            return scaled(scale, learned=False)
        raise AezooError(
            f"likelihood {name!r}: a colon must be followed by a scale above 0 or 'learned', as in {kind}:0.1"
        )
    raise AezooError(
        f"unknown likelihood {name!r}: use one of {', '.join(LIKELIHOODS)}; "
        f"{', '.join(_SCALED)} accept a scale, as in gaussian:0.1 or gaussian:learned"
    )
