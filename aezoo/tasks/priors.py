"""Priors fitted to codes, for sampling from models without a prior or with a poor one.

    gaussian    N(mean, covariance) of the codes
    gmm         mixture of Gaussians with full covariances, as Ghosh et al. 2020 fit it after training, 10 of them
                (section 4, https://arxiv.org/abs/1903.12436)
    maf         masked autoregressive flow (Papamakarios et al. 2017, https://arxiv.org/abs/1705.07057)
    two_stage   a second VAE, of codes, with a separate scale of noise (Dai & Wipf 2019, section 4,
                https://arxiv.org/abs/1903.05789)
    vamp        the mean of the posteriors of training samples, the optimal prior for a VAE's bound (Tomczak & Welling
                2017, https://arxiv.org/abs/1705.07120); for codes without posteriors, kernels of one width,
                `priors_vamp`
    riemannian  uniform on the manifold of the codes, by a metric of the codes, drawn by Hamiltonian Monte Carlo
                (Chadebec et al. 2021, https://arxiv.org/abs/2105.00026), `priors_riemannian`
    sphere      mixture of von Mises-Fisher distributions, for unit vectors, `priors_sphere`
    poincare    mixture of Gaussians in normal coordinates, for codes in a Poincare ball, `priors_poincare`
    knn         z = a + u (b - a), u ~ U(0, 1), a any code, b one of its k nearest neighbours: SMOTE (Chawla et al.
                2002, https://doi.org/10.1613/jair.953)

Codes are vectors, (N, D): a feature map is one vector of all its channels and positions, which are drawn together.

Those up to riemannian describe t, the code's principal components scaled to variance 1. The remainder outside these
components is Gaussian, with the covariance of the codes; for codes of few dimensions there is no remainder:

    z = mean + t S^1/2 V + r        S, V: variances and directions of the components kept; r: Gaussian, orthogonal to V
"""

import math

import numpy as np

from aezoo.errors import AezooError
from aezoo.tasks.priors_base import Array, Prior, Seed
from aezoo.tasks.priors_poincare import Poincare
from aezoo.tasks.priors_principal import principal
from aezoo.tasks.priors_sphere import Sphere
from aezoo.tasks.priors_vamp import Posteriors

GENERAL_PRIORS = ("gaussian", "gmm", "maf", "knn", "two_stage", "vamp", "riemannian")
NAMES = (*GENERAL_PRIORS, "sphere", "poincare")


def fit(
    name: str,
    codes: Array,
    *,
    n_components: int = 10,
    n_neighbours: int = 5,
    radius: float = math.inf,
    log_vars: Array | None = None,
    seed: int = 0,
) -> Prior:
    """Fit a prior to codes.

    Args:
        name: one of `NAMES`.
        codes: (N, D), at least two.
        n_components: distributions in the mixtures of gmm, sphere and poincare.
        n_neighbours: neighbours that knn chooses from.
        radius: radius of the ball of codes, for poincare.
        log_vars: (N, D), for vamp, of the Gaussian posteriors with the codes as means; None without posteriors.
        seed: of random draws in the fit.

    Raises:
        AezooError: an unknown name, fewer than two codes, or codes that are not finite or outside the prior's support.
    """
    if name not in NAMES:
        raise AezooError(f"unknown prior {name!r}: choose from {', '.join(NAMES)}")
    if len(codes) < 2:
        raise AezooError(f"a prior is fitted to at least 2 codes, got {len(codes)}: give more samples as fit_on")
    if n_components < 1 or n_neighbours < 1:
        raise AezooError(f"n_components and n_neighbours must be at least 1, got {n_components} and {n_neighbours}")
    if not np.isfinite(codes).all():
        raise AezooError("some codes are NaN or infinite: the model is broken, train it again with a lower rate")
    if name == "knn":
        return Neighbours(codes, n_neighbours)
    if name == "vamp" and log_vars is not None:
        return Posteriors(codes, log_vars)
    if name == "sphere":
        return Sphere(codes, n_components, seed)
    if name == "poincare":
        return Poincare(codes, n_components, seed, radius)
    return principal(name, codes, n_components, seed)


class Neighbours:
    """z = a + u (b - a), see above.

    Args:
        codes: (N, D).
        k: neighbours that b is chosen from.
    """

    def __init__(self, codes: Array, k: int) -> None:
        from sklearn.neighbors import NearestNeighbors

        self.codes = codes.astype(np.float64)
        self.k = min(k, len(codes) - 1)
        self._search = NearestNeighbors(n_neighbors=self.k + 1).fit(self.codes)

    def sample(self, n: int, seed: Seed) -> Array:
        rng = np.random.default_rng(seed)
        a = rng.integers(len(self.codes), size=n)
        near = self._search.kneighbors(self.codes[a], return_distance=False)
        # a itself is among them, unless k others equal it
        others = np.stack([line[line != row][: self.k] for line, row in zip(near, a, strict=True)])
        b = others[np.arange(n), rng.integers(self.k, size=n)]
        u = rng.random((n, 1))
        return (self.codes[a] + u * (self.codes[b] - self.codes[a])).astype(np.float32)
