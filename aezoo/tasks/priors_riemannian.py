"""A prior that is uniform on the manifold of the codes, by a metric of the codes.

    G^-1(z) = sum_i S_i exp(-|z - c_i|^2 / T^2) + lam exp(-|z|^2 / D) I         c_i: centres, S_i: spread around c_i
    p(z) ~ sqrt(det G^-1(z))                                    (Chadebec et al. 2021, https://arxiv.org/abs/2105.00026)

The density is the inverse volume element: large near the centres, where the metric is small; far from all of them it is
lam^(D/2) exp(-|z|^2 / 2), while with the paper's constant lam it could not be normalised. In the paper the S_i are
learned with the model; here they are covariances of the codes, so any code has such a prior, as in Chadebec &
Allassonniere 2022 (https://arxiv.org/abs/2209.07370), who take those of the posteriors. Draws come from parallel chains
of Hamiltonian Monte Carlo, each started at a centre.

Codes are t of `aezoo.tasks.priors`: principal components scaled to variance 1.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.manifolds import hamiltonian
from aezoo.manifolds.riemannian import half_log_det
from aezoo.training.seeding import forked_rng

Array = npt.NDArray[Any]

_MAX_CENTRES, _CODES_PER_CENTRE = 200, 20
# lam as a share of the spreads' size
_LAM = 1e-3
# chains side by side, steps before the first draw is kept and between two of a chain, leapfrog steps of each
_CHAINS, _BURN_IN, _THINNING, _LEAPFROG = 256, 100, 10, 10
# a share of the width of the kernel; halved until enough proposals are accepted
_STEP, _ACCEPTED = 0.3, 0.6


class Riemannian:
    """Uniform with respect to the Riemannian volume of the inverse metric above.

    Args:
        t: (N, D) codes.
        seed: of the centres.

    Attributes:
        centres: c, (K, D).
        spreads: S, (K, D, D).
        width: T.
        lam: lam.
        accepted: share of accepted proposals in the last chains.
    """

    def __init__(self, t: Array, seed: int) -> None:
        from sklearn.cluster import KMeans

        k = max(1, min(_MAX_CENTRES, len(t) // _CODES_PER_CENTRE, len(np.unique(t.round(6), axis=0))))
        found = KMeans(k, n_init=1, random_state=seed).fit(t)
        self.centres = torch.from_numpy(found.cluster_centers_).double()
        overall = np.cov(t.T, bias=True).reshape(t.shape[1], t.shape[1])
        spreads = []
        for i in range(k):
            own = t[found.labels_ == i]
            # adding as many codes of the whole set as dimensions gives the covariance of a small cluster full rank
            near = (own - found.cluster_centers_[i]).T @ (own - found.cluster_centers_[i])
            spreads.append((near + t.shape[1] * overall / k) / (len(own) + t.shape[1]))
        # so that equal codes have a determinant, too
        self.spreads = torch.from_numpy(np.stack(spreads)).double() + 1e-9 * torch.eye(t.shape[1]).double()
        size = torch.linalg.slogdet(self.spreads)[1].median() / t.shape[1]
        self.lam = _LAM * float(size.exp())
        distance = torch.cdist(self.centres, self.centres)
        distance.fill_diagonal_(math.inf)
        # so that each centre is in reach of another, as the authors choose it
        self.width = float(distance.amin(1).max()) if k > 1 else 1.0
        self.accepted = 1.0

    def inverse_metric(self, z: Tensor) -> Tensor:
        """G^-1, (B, D) -> (B, D, D)."""
        weight_BK = torch.exp(-(torch.cdist(z, self.centres) ** 2) / self.width**2)
        far_B = self.lam * torch.exp(-(z**2).mean(1))
        eye = torch.eye(z.shape[1], dtype=z.dtype)
        return torch.einsum("bk,kij->bij", weight_BK, self.spreads) + far_B[:, None, None] * eye

    def log_density(self, z: Tensor) -> Tensor:
        """Log p(z) up to a constant, (B, D) -> (B,)."""
        return -half_log_det(self.inverse_metric(z))

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """Draw n codes, (n, D)."""
        with forked_rng(torch.device("cpu")):
            torch.manual_seed(int(rng.integers(2**32)))
            chains = min(n, _CHAINS)
            z = self.centres[torch.randint(len(self.centres), (chains,))]
            z, step = self._tune_step(z)
            drawn: list[Tensor] = []
            while sum(map(len, drawn)) < n:
                for _ in range(_THINNING):
                    z, _ = self._move(z, step)
                drawn.append(z)
            return torch.cat(drawn)[:n].numpy()

    def _tune_step(self, z: Tensor) -> tuple[Tensor, float]:
        """Burn in the chains, and adapt the step size."""
        step = _STEP * self.width
        for i in range(_BURN_IN):
            z, accepted = self._move(z, step)
            self.accepted = accepted
            # only in the first half, because the returned draws must come from a chain that does not adapt
            if i < _BURN_IN // 2 and accepted < _ACCEPTED:
                step /= 2
        return z, step

    def _move(self, z: Tensor, step: float) -> tuple[Tensor, float]:
        """One step of Hamiltonian Monte Carlo; returns the share of accepted proposals."""
        z, is_accepted = hamiltonian.hmc_step(z, self.log_density, step, _LEAPFROG, self._gradient)
        return z, float(is_accepted.cpu().double().mean())

    def _gradient(self, z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (found,) = torch.autograd.grad(self.log_density(z).sum(), z)
        return found
