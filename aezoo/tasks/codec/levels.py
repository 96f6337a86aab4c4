"""Data values as integers, and the probability of each."""

import copy
import math
from typing import cast

import numpy as np
import numpy.typing as npt
from torch import Tensor, from_numpy, uint8

from aezoo.distributions.likelihoods import Bernoulli, BetaBinomial, DiscretisedLogistic, Likelihood
from aezoo.tasks.codec.tables import Floats

Levels = npt.NDArray[np.uint8]


def to_levels(x: Tensor, levels: int) -> Levels | None:
    """Samples as integers k with exactly x = k / (levels - 1); None if there are none."""
    k = (x * (levels - 1)).round()
    if not bool(((k >= 0) & (k < levels) & (k / (levels - 1) == x)).all()):
        return None
    return k.to(uint8).cpu().numpy()


def reason(levels: int) -> str:
    """Why samples that do not correspond to integers cannot be coded."""
    if levels == 2:
        return "lossless with likelihood bernoulli needs values 0 and 1: give --binarise true, or use mode lossy"
    return "lossless needs bytes, or values k/255 in float32: give images of 8 bits, or use mode lossy"


def level_cdf(likelihood: Likelihood, params: Floats) -> Floats:
    """P(k <= 0), P(k <= 1), ... without the last, which is 1: (M,) -> (M, levels - 1)."""
    from scipy.special import expit

    if isinstance(likelihood, Bernoulli):
        return cast(Floats, expit(-params)[:, None])
    if isinstance(likelihood, BetaBinomial):
        here = copy.deepcopy(likelihood).cpu()  # moving a module is in place, and this one belongs to the user
        return _beta_binomial_cdf(*(shape.double().numpy() for shape in here.shapes(from_numpy(params))))
    scale = math.exp(float(cast(DiscretisedLogistic, likelihood).bounded_scale))
    return cast(Floats, expit(((np.arange(255) + 0.5) / 255 - params[:, None]) / scale))


def _beta_binomial_cdf(a: Floats, b: Floats) -> Floats:
    """By ratios, p(k + 1) / p(k) = (255 - k) (k + a) / ((k + 1) (254 - k + b)), from p(0) = B(a, 255 + b) / B(a, b)."""
    from scipy.special import betaln

    k = np.arange(254)
    a, b = a[:, None], b[:, None]
    log_ratio = np.log((255 - k) / (k + 1) * (k + a) / (254 - k + b))
    log_p = np.concatenate([betaln(a, 255 + b) - betaln(a, b), log_ratio], axis=1).cumsum(1)
    return cast(Floats, np.exp(log_p).cumsum(1).clip(0, 1))
