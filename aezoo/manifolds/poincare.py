"""The Poincare ball |z| < 1 / sqrt(c) of curvature -c: hyperbolic space, and the wrapped normal distribution in it.

    v -> exp_mu(v / lambda_mu) = mu + tanh(s / 2) v / s     s = sqrt(c) |v|     lambda_mu = 2 / (1 - c |mu|^2)
    log N_W(z; mu, Sigma) = log N(v; 0, Sigma) - (D - 1) log(sinh(s) / s)     v = lambda_mu log_mu(z)

where + is Moebius addition (Mathieu et al. 2019, https://arxiv.org/abs/1901.06033, section 2). v are normal coordinates
at mu, in which distances from mu are Euclidean. N_W is a density with respect to the Riemannian volume (Nagano et al.
2019, https://arxiv.org/abs/1902.02992). float32 is not precise enough near the boundary, so float64 should be used.

Shapes: D dimensions; ... are the batch dimensions.
"""

import math

import torch
from torch import Tensor, nn

from aezoo.distributions.gaussians import LOG_2PI


def safe_norm(v: Tensor) -> Tensor:
    """Return |v| with a finite gradient at 0, (..., D) -> (..., 1)."""
    return torch.sqrt((v**2).sum(-1, keepdim=True) + 1e-60)


class Ball(nn.Module):
    """The ball of curvature -c; as a module, it maps codes to normal coordinates at its centre. All are (..., D).

    Args:
        c: the curvature is -c.
    """

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c, self.root = c, math.sqrt(c)

    def forward(self, z: Tensor) -> Tensor:
        """Return the normal coordinates 2 log_0(z)."""
        return self.log_0(z.double(), self.limit(z.dtype)).to(z.dtype)

    @staticmethod
    def limit(dtype: torch.dtype) -> float:
        """Return the maximum sqrt(c) |z| of a code in this precision."""
        return 1 - 4 * torch.finfo(dtype).eps

    def project(self, z: Tensor, limit: float) -> Tensor:
        """Project codes beyond the limit onto it."""
        return z * (limit / (self.root * safe_norm(z))).clamp(max=1)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the Moebius sum, in a form without cancellation for y near -x."""
        sum_, x2, y2 = x + y, self.c * (x**2).sum(-1, keepdim=True), self.c * (y**2).sum(-1, keepdim=True)
        sum2 = self.c * (sum_**2).sum(-1, keepdim=True)
        return ((1 - x2) * sum_ + sum2 * x) / (sum2 + (1 - x2) * (1 - y2))

    def from_normal(self, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the code at normal coordinates v at the centre, inside the ball in the precision dtype or v's."""
        dtype = dtype or v.dtype
        return self.project(self.exp_0(v.double()), self.limit(dtype)).to(dtype)

    def exp_0(self, v: Tensor) -> Tensor:
        """Return the code at distance |v| from the centre: exp of v / 2 at 0."""
        s = self.root * safe_norm(v)
        return torch.tanh(s / 2) / s * v

    def log_0(self, z: Tensor, limit: float) -> Tensor:
        """Return the inverse of exp_0: twice log at 0 of z."""
        s = self.root * safe_norm(z)
        inner = s.clamp(max=limit)
        return (torch.log1p(inner) - torch.log1p(-inner)) / s * z

    def exp(self, mu: Tensor, v: Tensor) -> Tensor:
        """Return the code at distance |v| from mu, exp_mu(v / lambda_mu)."""
        limit = self.limit(v.dtype)
        return self.project(self.add(mu, self.project(self.exp_0(v), limit)), limit)

    def log(self, mu: Tensor, z: Tensor) -> Tensor:
        """Return the inverse of exp, lambda_mu log_mu(z)."""
        return self.log_0(self.add(-mu, z), self.limit(z.dtype))

    def log_density(self, v: Tensor, log_var: Tensor) -> Tensor:
        """Return log N_W with respect to Riemannian volume at normal coordinates v, (..., D) -> (...)."""
        s = self.root * safe_norm(v)[..., 0]
        log_sinh_s = s + torch.log(-torch.expm1(-2 * s)) - torch.log(2 * s)  # log(sinh(s) / s)
        log_normal = -0.5 * (v**2 * torch.exp(-log_var) + log_var + LOG_2PI).sum(-1)
        return log_normal - (v.shape[-1] - 1) * log_sinh_s
