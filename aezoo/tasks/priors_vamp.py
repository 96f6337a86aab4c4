"""The optimal prior for a VAE's bound, the mean of the posteriors of training samples, and its analogue for any code.

    p(z) = 1/N sum_n N(z; mu_n, diag sigma_n^2)     posteriors of training samples (Tomczak & Welling 2017, section 3,
                                                    https://arxiv.org/abs/1705.07120, with data for pseudo-inputs)
    p(t) = 1/N sum_n N(t; t_n, h^2 I)               codes without a posterior, in principal components; h makes the rest
                                                    of the codes likeliest: leave-one-out (Duin 1976,
                                                    https://doi.org/10.1109/TC.1976.1674577)

Shapes: N codes, D their dimensions, K principal components.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from aezoo.distributions.gaussians import LOG_2PI
from aezoo.tasks.priors_base import Seed

Array = npt.NDArray[Any]

# codes left out in turn, and the range of h if t has variance 1: with smaller values, copies of a code would give 0
_LEFT_OUT, _LEAST, _MOST = 500, 1e-2, 2.0
# numbers of differences held at a time
_MAX_VALUES = 2**24


class Posteriors:
    """A mean of diagonal Gaussians.

    Args:
        means_ND: their means.
        log_vars_ND: the logarithms of their variances.
    """

    def __init__(self, means_ND: Array, log_vars_ND: Array) -> None:
        self.means_ND, self.log_vars_ND = means_ND.astype(np.float64), log_vars_ND.astype(np.float64)

    def sample(self, n: int, seed: Seed) -> Array:
        """Draw n codes, (n, D) float32."""
        rng = np.random.default_rng(seed)
        chosen = rng.integers(len(self.means_ND), size=n)
        noise = rng.standard_normal((n, self.means_ND.shape[1]))
        return (self.means_ND[chosen] + np.exp(0.5 * self.log_vars_ND[chosen]) * noise).astype(np.float32)

    def log_prob(self, codes: Array) -> Array:
        """Log-density of each code in nats, (M, D) -> (M,)."""
        count, size = self.means_ND.shape
        of_each = []
        for z in np.array_split(codes.astype(np.float64), -(-len(codes) * count * size // _MAX_VALUES) or 1):
            square = (z[:, None] - self.means_ND) ** 2 * np.exp(-self.log_vars_ND)
            log_MN = -0.5 * (square + self.log_vars_ND + LOG_2PI).sum(2)
            of_each.append(np.logaddexp.reduce(log_MN, axis=1) - math.log(count))
        return np.concatenate(of_each)


class Kernel:
    """A Gaussian of one width about each code.

    Args:
        t: (N, K), of variance 1.
        seed: fixes which codes are left out.

    Attributes:
        width: h.
    """

    def __init__(self, t: Array, seed: int) -> None:
        from scipy.optimize import minimize_scalar
        from scipy.spatial.distance import cdist
        from sklearn.neighbors import KernelDensity

        left_out = np.random.default_rng(seed).permutation(len(t))[:_LEFT_OUT]
        square = cdist(t[left_out], t, "sqeuclidean")
        square[np.arange(len(left_out)), left_out] = np.inf

        def loss(log_h: float) -> float:
            log_p = np.logaddexp.reduce(-0.5 * square * math.exp(-2 * log_h), axis=1) - t.shape[1] * log_h
            return -float(log_p.mean())

        found = minimize_scalar(loss, bounds=(math.log(_LEAST), math.log(_MOST)), method="bounded")
        self.width = math.exp(found.x)
        self._density = KernelDensity(bandwidth=self.width).fit(t)

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """Draw n of t, (n, K)."""
        drawn: Array = self._density.sample(n, random_state=int(rng.integers(2**32)))
        return drawn

    def log_prob(self, t: Array) -> Array:
        """Log-density of each, in nats."""
        return np.asarray(self._density.score_samples(t))
