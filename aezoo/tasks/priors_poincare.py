"""A prior for codes in a Poincare ball: a wrapped mixture of Gaussians (Nagano et al. 2019, Mathieu et al. 2019).

    z = R tanh(|v| / 2R) v / |v|     v = 2 R artanh(|z| / R) z / |z|     v ~ sum_k w_k N(m_k, C_k)

v are normal coordinates at the ball's centre, see `manifolds.poincare`, in which hyperbolic distances from the centre
are Euclidean; R is the ball's radius, 1 / sqrt(c) for the curvature -c. One Gaussian N(0, I) is the model's prior.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aezoo.errors import AezooError
from aezoo.manifolds.poincare import Ball
from aezoo.tasks.priors_base import Seed
from aezoo.tasks.priors_principal import principal

Array = npt.NDArray[Any]


class Poincare:
    """A mixture of Gaussians in normal coordinates.

    Args:
        codes: (N, D), in the ball.
        n_components: Gaussians.
        seed: of random draws in the fit.
        radius: R.

    Raises:
        AezooError: codes outside the ball.
    """

    def __init__(self, codes: Array, n_components: int, seed: int, radius: float) -> None:
        length = np.linalg.norm(codes.astype(np.float64), axis=1)
        if not np.isfinite(radius):
            raise AezooError("prior poincare is for codes in a ball, such as those of poincare_vae: use gmm or maf")
        if length.max() >= radius:
            raise AezooError(
                f"some codes lie outside the ball of radius {radius:.4g}: prior poincare needs codes inside"
            )
        self.ball = Ball(radius**-2)
        # of float32, in which codes are kept: nearer to the boundary they are on it
        self.limit = self.ball.limit(torch.float32)
        self.flat = principal("gmm", self.to_flat(codes), n_components, seed)

    def to_flat(self, z: Array) -> Array:
        """Codes to normal coordinates, (N, D) -> (N, D) float64."""
        flat: Array = self.ball.log_0(torch.from_numpy(z.astype(np.float64)), self.limit).numpy()
        return flat

    def from_flat(self, v: Array) -> Array:
        """Normal coordinates to codes, (N, D) -> (N, D) float64."""
        codes: Array = self.ball.project(self.ball.exp_0(torch.from_numpy(v.astype(np.float64))), self.limit).numpy()
        return codes

    def sample(self, n: int, seed: Seed) -> Array:
        """Draw n codes, (n, D) float32."""
        return self.from_flat(self.flat.sample(n, seed)).astype(np.float32)
