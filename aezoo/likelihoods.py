"""Likelihoods p(x | z): how a decoder's output becomes a distribution over data.

A decoder gives one number a data value, `params` of shape (B, *input_shape). A likelihood reads it as the parameter of
a distribution, independent over data values, and answers three questions: `log_prob(params, x)` in nats per sample
(B,), summed over the sample's values; `mean(params)`, the reconstruction; and `sample(params)`.

Models name a likelihood by a plain string, with an optional argument after a colon:

    bernoulli               p(x=1) = sigmoid(params), x in [0, 1]; the summed binary cross-entropy
    continuous_bernoulli    its normalised version on [0, 1] (Loaiza-Ganem & Cunningham 2019)
    gaussian                N(params, 1/2): then -log p = ||x - params||^2 + D/2 log(pi), the squared error of textbooks
    gaussian:0.1            N(params, 0.1^2), fixed
    gaussian:learned        N(params, s^2), one s for all values, trained with the rest (Rybkin et al. 2021)
    laplace | laplace:0.1 | laplace:learned      density exp(-|x - params| / b) / (2 b); plain `laplace` has b = 1
    discretised_logistic | :0.05 | :learned      256 levels k/255 (Salimans et al. 2017); plain: learned from 0.05
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.errors import AezooError


def _sum(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


class Likelihood(nn.Module):
    """A distribution over data, given the decoder's output.

    Attributes:
        unit_interval: the data must lie in [0, 1].
        discrete: `log_prob` is a probability, so bits per dimension are a code length; else it is a density.
    """

    unit_interval: ClassVar[bool] = False
    discrete: ClassVar[bool] = False

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Log-likelihood of each sample in nats: (B, *shape), (B, *shape) -> (B,)."""
        raise NotImplementedError

    def mean(self, params: Tensor) -> Tensor:
        """E[x | params], the reconstruction in data space: (B, *shape) -> (B, *shape)."""
        raise NotImplementedError

    def sample(self, params: Tensor) -> Tensor:
        """One draw for each value: (B, *shape) -> (B, *shape)."""
        raise NotImplementedError


class Bernoulli(Likelihood):
    """p(x = 1) = sigmoid(params); for x between 0 and 1 the usual cross-entropy, which is then no density."""

    unit_interval = True
    discrete = True

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -_sum(F.binary_cross_entropy_with_logits(params, x, reduction="none"))

    def mean(self, params: Tensor) -> Tensor:
        return params.sigmoid()

    def sample(self, params: Tensor) -> Tensor:
        return torch.bernoulli(params.sigmoid())


class ContinuousBernoulli(Likelihood):
    """Density C(p) p^x (1 - p)^(1 - x) on [0, 1] with p = sigmoid(params).

    Loaiza-Ganem & Cunningham 2019, https://arxiv.org/abs/1907.06845. In the logit t = params the normaliser is
    C = t / tanh(t / 2) and the mean 1 / (1 - exp(-t)) - 1 / t; both are smooth at t = 0 (p = 1/2), where a
    Taylor series takes over.
    """

    unit_interval = True
    _NEAR = 0.05

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return _sum(self._log_normaliser(params) - F.binary_cross_entropy_with_logits(params, x, reduction="none"))

    def _log_normaliser(self, t: Tensor) -> Tensor:
        near = t.abs() < self._NEAR
        u = torch.where(near, 1.0, t.abs())
        # log(t / tanh(t/2)), with tanh(u/2) = (1 - exp(-u)) / (1 + exp(-u)) kept exact for large u
        far = torch.log(u) + torch.log1p(torch.exp(-u)) - torch.log(-torch.expm1(-u))
        s = torch.where(near, t, 0.0) ** 2
        return torch.where(near, math.log(2.0) + s / 12 - 7 * s**2 / 1440, far)

    def mean(self, params: Tensor) -> Tensor:
        # the two terms nearly cancel, too much so for half precision
        wide = params.to(torch.promote_types(params.dtype, torch.float32))
        near = wide.abs() < self._NEAR
        # by symmetry for t < 0, where exp(-t) overflows and leaves NaN in the gradient
        a = torch.where(near, 1.0, wide.abs())
        above = -1 / torch.expm1(-a) - 1 / a
        s = torch.where(near, wide, 0.0)
        far = torch.where(wide > 0, above, 1 - above)
        return torch.where(near, 0.5 + s / 12 - s**3 / 720, far).to(params.dtype)

    def sample(self, params: Tensor) -> Tensor:
        u = torch.rand_like(params)
        near = params.abs() < self._NEAR
        t = torch.where(near, 1.0, params)
        # inverse of the distribution function F(x) = (exp(t x) - 1) / (exp(t) - 1), by symmetry for t > 0
        a = -t.abs()
        x = torch.log1p(u * torch.expm1(a)) / a
        x = torch.where(t > 0, 1 - x, x)
        s = torch.where(near, params, 0.0)
        return torch.where(near, u + s * u * (u - 1) / -2, x).clamp(0, 1)


class _Scaled(Likelihood):
    """A location given by the decoder and one scale for all values, fixed or learned.

    Args:
        scale: the scale, or where learning it starts.
        learned: train log scale with the other parameters.
    """

    log_scale: Tensor

    def __init__(self, scale: float, learned: bool = False) -> None:
        super().__init__()
        log_scale = torch.tensor(math.log(scale))
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)

    def mean(self, params: Tensor) -> Tensor:
        return params


class Gaussian(_Scaled):
    """N(params, s^2)."""

    def __init__(self, scale: float = math.sqrt(0.5), learned: bool = False) -> None:
        super().__init__(scale, learned)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        sse = _sum((x - params) ** 2)
        d = x[0].numel()
        return -0.5 * sse * torch.exp(-2 * self.log_scale) - d * (self.log_scale + 0.5 * math.log(2 * math.pi))

    def sample(self, params: Tensor) -> Tensor:
        return params + torch.exp(self.log_scale) * torch.randn_like(params)


class Laplace(_Scaled):
    """Density exp(-|x - params| / b) / (2 b)."""

    def __init__(self, scale: float = 1.0, learned: bool = False) -> None:
        super().__init__(scale, learned)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        d = x[0].numel()
        return -_sum((x - params).abs()) * torch.exp(-self.log_scale) - d * (self.log_scale + math.log(2.0))

    def sample(self, params: Tensor) -> Tensor:
        u = torch.rand_like(params) - 0.5
        noise = -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.4999999))
        return params + torch.exp(self.log_scale) * noise


class DiscretisedLogistic(_Scaled):
    """Probability of the level k/255: a logistic density integrated over its bin, the end bins open.

    Salimans et al. 2017, https://arxiv.org/abs/1701.05517, section 2.1, on data in [0, 1] with one component.
    """

    unit_interval = True
    discrete = True

    def __init__(self, scale: float = 0.05, learned: bool = True) -> None:
        super().__init__(scale, learned)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        inverse = torch.exp(-self.log_scale)
        upper = (x + 0.5 / 255 - params) * inverse
        lower = (x - 0.5 / 255 - params) * inverse
        # log(sigmoid(u) - sigmoid(l)) = log(1 - exp(l - u)) - softplus(-u) - softplus(l): exact far in the tails,
        # with l - u written out, since the difference of the two rounds to 0 there
        inside = torch.log(-torch.expm1(-inverse / 255)) - F.softplus(-upper) - F.softplus(lower)
        log_p = torch.where(
            x < 0.5 / 255, F.logsigmoid(upper), torch.where(x > 254.5 / 255, -F.softplus(lower), inside)
        )
        return _sum(log_p)

    def mean(self, params: Tensor) -> Tensor:
        # E[clip(X, 0, 1)] = integral of P(X > t) over [0, 1]; rounding to levels moves it by less than half a level
        scale = torch.exp(self.log_scale)
        return scale * (F.softplus(params / scale) - F.softplus((params - 1) / scale))

    def sample(self, params: Tensor) -> Tensor:
        u = torch.rand_like(params).clamp(1e-6, 1 - 1e-6)
        x = params + torch.exp(self.log_scale) * torch.logit(u)
        return (x.clamp(0, 1) * 255).round() / 255


_PLAIN: dict[str, type[Likelihood]] = {"bernoulli": Bernoulli, "continuous_bernoulli": ContinuousBernoulli}
_SCALED: dict[str, type[Gaussian | Laplace | DiscretisedLogistic]] = {
    "gaussian": Gaussian,
    "laplace": Laplace,
    "discretised_logistic": DiscretisedLogistic,
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
        raise AezooError(f"likelihood {name!r}: after the colon write a scale above 0 or 'learned', as in {kind}:0.1")
    raise AezooError(
        f"unknown likelihood {name!r}: take one of {', '.join(LIKELIHOODS)}; "
        f"{', '.join(_SCALED)} accept a scale, as in gaussian:0.1 or gaussian:learned"
    )
