"""A prior for codes on the unit sphere: a mixture of von Mises-Fisher distributions, or the uniform distribution.

    p(z) = sum_k w_k C(kappa_k) exp(kappa_k (m_k . z - 1))     C as of `manifolds.sphere.VonMisesFisher`

fitted by expectation maximisation (Banerjee et al. 2005, https://www.jmlr.org/papers/v6/banerjee05a.html), kappa by two
Newton steps from their estimate (Sra 2012, https://doi.org/10.1007/s00180-011-0232-x). Without a component z is
uniform, the prior of a hyperspherical VAE itself.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aezoo.errors import AezooError
from aezoo.manifolds.sphere import VonMisesFisher, log_area
from aezoo.tasks.priors_base import Seed

Array = npt.NDArray[Any]

_MAX_CONCENTRATION = 1e5
_MAX_ITERATIONS, _TOLERANCE = 300, 1e-7
# rounding of codes that were normalised in bfloat16
_OFF_SPHERE = 0.02


class Sphere:
    """A mixture of von Mises-Fisher distributions.

    Args:
        codes: (N, D), unit vectors of at least 2 dimensions.
        n_components: K, distributions mixed; 0 is the uniform distribution.
        seed: of the start of the fit.

    Attributes:
        weights_K: share of each component.
        means_KD: mean directions.
        kappas_K: concentrations.

    Raises:
        AezooError: codes that are not unit vectors.
    """

    def __init__(self, codes: Array, n_components: int, seed: int) -> None:
        z_ND = codes.astype(np.float64)
        length_N1 = np.linalg.norm(z_ND, axis=1, keepdims=True)
        if z_ND.shape[1] < 2 or not np.allclose(length_N1, 1, rtol=0, atol=_OFF_SPHERE):
            raise AezooError(
                "prior sphere is for unit vectors, such as the codes of hyperspherical_vae: use gmm or maf"
            )
        self.size = z_ND.shape[1]
        self.weights_K, self.means_KD, self.kappas_K = np.zeros(0), np.zeros((0, self.size)), np.zeros(0)
        if n_components:
            self._fit(z_ND / length_N1, n_components, seed)

    def _fit(self, z_ND: Array, n_components: int, seed: int) -> None:
        from sklearn.cluster import KMeans

        k = min(n_components, len(np.unique(z_ND.round(6), axis=0)))
        labels = KMeans(k, n_init=4, random_state=seed).fit_predict(z_ND)
        share_NK, before = np.eye(k)[labels], -math.inf
        for _ in range(_MAX_ITERATIONS):
            count_K = share_NK.sum(0) + 1e-12
            sum_KD = share_NK.T @ z_ND
            length_K = np.linalg.norm(sum_KD, axis=1)
            self.weights_K, self.means_KD = count_K / count_K.sum(), sum_KD / (length_K[:, None] + 1e-300)
            self.kappas_K = concentration(length_K / count_K, self.size)
            log_NK = self._joint(z_ND)
            log_N = np.logaddexp.reduce(log_NK, axis=1)
            share_NK = np.exp(log_NK - log_N[:, None])
            if log_N.mean() - before < _TOLERANCE:
                break
            before = log_N.mean()

    def _joint(self, z_ND: Array) -> Array:
        """Log of w_k times the density of each component, (N, D) -> (N, K)."""
        vmf = VonMisesFisher(self.size)
        log_z_K, _ = vmf.normaliser(torch.from_numpy(self.kappas_K))
        log_c_K = vmf.log_z_0 - vmf.log_area - log_z_K.numpy()
        return np.asarray(np.log(self.weights_K) + log_c_K + self.kappas_K * (z_ND @ self.means_KD.T - 1))

    def sample(self, n: int, seed: Seed) -> Array:
        """Draw n codes, (n, D) float32."""
        from scipy.stats import vonmises_fisher

        rng = np.random.default_rng(seed)
        if not len(self.weights_K):
            z_ND = rng.standard_normal((n, self.size))
        else:
            z_ND = np.empty((n, self.size))
            drawn_N = rng.choice(len(self.weights_K), size=n, p=self.weights_K)
            for k in np.unique(drawn_N):
                rows = drawn_N == k
                mean_D = self.means_KD[k] / np.linalg.norm(self.means_KD[k])
                z_ND[rows] = vonmises_fisher(mean_D, self.kappas_K[k]).rvs(int(rows.sum()), random_state=rng)
        return np.asarray(z_ND / np.linalg.norm(z_ND, axis=1, keepdims=True), dtype=np.float32)

    def log_prob(self, codes: Array) -> Array:
        """Log-density of unit vectors on the sphere in nats, (N, D) -> (N,)."""
        if not len(self.weights_K):
            return np.full(len(codes), -log_area(self.size))
        return np.asarray(np.logaddexp.reduce(self._joint(codes.astype(np.float64)), axis=1))


def concentration(length: Array, size: int) -> Array:
    """The kappa for which unit vectors of `size` dimensions have a mean of this length."""
    r = np.clip(length, 1e-6, 1 - 1e-9)
    kappa = np.clip(r * (size - r**2) / (1 - r**2), 1e-6, _MAX_CONCENTRATION)
    for _ in range(2):
        a = 1 + VonMisesFisher(size).normaliser(torch.from_numpy(kappa))[1].numpy()  # E[mu . z]
        slope = 1 - a**2 - (size - 1) / kappa * a
        kappa = np.clip(kappa - (a - r) / np.maximum(slope, 1e-12), 1e-6, _MAX_CONCENTRATION)
    return np.asarray(kappa)
