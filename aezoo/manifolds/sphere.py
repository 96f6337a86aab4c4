"""The unit sphere S^(D-1), and distributions on it that depend only on the angle to a mean direction.

    q(z) = exp(kappa h(theta)) / (Z |S^(D-2)|)     theta: angle between z and mu, kappa: concentration
    Z = integral of exp(kappa h(theta)) sin(theta)^(D-2) over theta
    h = cos theta - 1              `VonMisesFisher`    (Mardia & Jupp 2000, section 9.3)
    h = log((1 + cos theta) / 2)   `PowerSpherical`    (De Cao & Aziz 2020, https://arxiv.org/abs/2006.04437)

For PowerSpherical, Z and E[h] have closed forms. For VonMisesFisher, they are Bessel functions of order D/2, which
overflow or underflow. They are therefore computed as Poisson's integral (https://dlmf.nist.gov/10.32#E2), by
quadrature.

Samples are reparameterised: theta is the quantile of uniform noise, so that its gradient in kappa is exact for both.
Published code takes the gradient through the accepted samples of a rejection sampler, which is 13 % too small at D = 5,
kappa = 2. A Householder reflection then maps the sample about an axis to one about mu. All computations are in float64.

Shapes: D dimensions, P panels of the integral over theta, N nodes per panel; ... are the batch dimensions.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aezoo.deprecated import renamed

_PANELS, _NEWTON_STEPS = 16, 6
_NODES, _WEIGHTS = ((part / 2).tolist() for part in np.polynomial.legendre.leggauss(6))
# range of theta in standard deviations from its mode; less than 1e-12 of the mass is outside
_REACH = 12.0


def log_area(d: int) -> float:
    """Return log |S^(D-1)|; -log_area is the log-density of the uniform distribution."""
    return math.log(2) + 0.5 * d * math.log(math.pi) - math.lgamma(d / 2)


class RotationallySymmetric:
    """A distribution about a mean direction; subclasses define h, and the mode and scale of theta.

    Args:
        d: D, at least 2.

    Attributes:
        log_z_0: log Z of the uniform distribution, kappa = 0.
        log_area: log |S^(D-1)|.
    """

    def __init__(self, d: int) -> None:
        self.d, self.rest, self.log_area = d, d - 2, log_area(d)
        self.log_z_0 = 0.5 * math.log(math.pi) + math.lgamma((d - 1) / 2) - math.lgamma(d / 2)

    def h(self, theta: Tensor) -> Tensor:
        """Return the log-density of an angle for kappa = 1, up to a constant: 0 at 0, and decreasing."""
        raise NotImplementedError

    def mode_and_scale(self, kappa: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mode of theta and its standard deviation: (...) -> (...), (...)."""
        raise NotImplementedError

    def normaliser(self, kappa: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z and E[h], in float64: (...) -> (...), (...)."""
        kappa = kappa.double()
        edge_P, width_1, top_1 = self._panels(kappa)
        theta_PN, weight_PN = _nodes(edge_P, width_1)
        f_PN = weight_PN * torch.exp(self._log_f(theta_PN, kappa[..., None, None]) - top_1[..., None])
        total = f_PN.sum((-2, -1))
        return total.log() + top_1[..., 0], (f_PN * self.h(theta_PN)).sum((-2, -1)) / total

    def log_prob(self, z: Tensor, mu: Tensor, kappa: Tensor) -> Tensor:
        """Return the log-density of unit vectors in nats: (..., D), (..., D), (...) -> (...)."""
        # arcsin of half the chord is precise for small angles
        theta = 2 * torch.asin(((z.double() - mu.double()).norm(dim=-1) / 2).clamp(max=1))
        log_z, _ = self.normaliser(kappa)
        return (kappa.double() * self.h(theta) - log_z + self.log_z_0 - self.log_area).to(mu.dtype)

    def sample(self, mu: Tensor, kappa: Tensor) -> Tensor:
        """Draw a reparameterised unit vector for each mu: (..., D), (...) -> (..., D)."""
        axis, kappa = mu.double(), kappa.double()
        theta_1 = self.quantile(kappa, torch.rand_like(kappa))[..., None]
        side = F.normalize(torch.randn_like(axis[..., 1:]), dim=-1)
        # the end of the axis that is farther from mu, since the reflection is singular at the other end
        sign = torch.where(axis[..., :1] > 0, -1.0, 1.0).to(axis)
        w = torch.cat([sign * theta_1.cos(), theta_1.sin() * side], -1)
        across = F.pad(sign, (0, self.rest + 1)) - axis
        z = w - 2 * across * (across * w).sum(-1, keepdim=True) / (across**2).sum(-1, keepdim=True)
        return z.to(mu.dtype)

    def quantile(self, kappa: Tensor, u: Tensor) -> Tensor:
        """Return the u-quantile of theta, with implicit gradient in kappa: (...), (...) -> (...)."""
        kappa = kappa.double()
        edge_P, width_1, top_1 = self._panels(kappa)

        def mass(start: Tensor, width: Tensor) -> Tensor:
            theta, weight = _nodes(start, width)
            return (weight * torch.exp(self._log_f(theta, kappa[..., None, None]) - top_1[..., None])).sum(-1)

        mass_P = mass(edge_P, width_1)
        below_P = mass_P.cumsum(-1)
        with torch.no_grad():
            goal_1 = u[..., None] * below_P[..., -1:]
            p_1 = (below_P < goal_1).sum(-1, keepdim=True).clamp(max=_PANELS - 1)
            start_1, mass_1 = edge_P.gather(-1, p_1), mass_P.gather(-1, p_1)
            goal_1 = goal_1 - (below_P.gather(-1, p_1) - mass_1)
            step_1 = width_1 * (goal_1 / mass_1).clamp(0, 1)
            for _ in range(_NEWTON_STEPS):
                f_1 = torch.exp(self._log_f(start_1 + step_1, kappa[..., None]) - top_1)
                off_1 = (mass(start_1, step_1) - goal_1) / f_1.clamp(min=1e-300)
                step_1 = torch.minimum((step_1 - off_1).clamp(min=0), width_1)
            theta = (start_1 + step_1)[..., 0]
            f = torch.exp(self._log_f(theta, kappa) - top_1[..., 0]).clamp(min=1e-300) / below_P[..., -1]
        cdf_1 = below_P.gather(-1, p_1) - mass_P.gather(-1, p_1) + mass(start_1, step_1)
        cdf = (cdf_1 / below_P[..., -1:])[..., 0]
        return theta - (cdf - cdf.detach()) / f

    def _log_f(self, theta: Tensor, kappa: Tensor) -> Tensor:
        """Return the log-density of an angle without Z, kappa h + (D - 2) log sin theta."""
        return kappa * self.h(theta) + (self.rest * torch.log(torch.sin(theta).clamp(min=1e-300)) if self.rest else 0)

    @torch.no_grad()
    def _panels(self, kappa: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the range of theta: lower edges, width, maximum log_f; (...) -> (..., P), (..., 1), (..., 1)."""
        mode, std = self.mode_and_scale(kappa)
        low_1 = (mode - _REACH * std).clamp(min=0)[..., None]
        width_1 = ((mode + _REACH * std).clamp(max=math.pi)[..., None] - low_1) / _PANELS
        edge_P = low_1 + width_1 * torch.arange(_PANELS, device=kappa.device)
        return edge_P, width_1, self._log_f(mode, kappa)[..., None]


class PowerSpherical(RotationallySymmetric):
    """h = log((1 + cos theta) / 2); the density is 0 opposite mu.

    Args:
        d: D, at least 2.
    """

    def h(self, theta: Tensor) -> Tensor:
        return 2 * torch.log(torch.cos(theta / 2))

    def mode_and_scale(self, kappa: Tensor) -> tuple[Tensor, Tensor]:
        a = (2 * kappa + self.rest).clamp(min=1e-9)
        return 2 * torch.atan(torch.sqrt(self.rest / a)), torch.sqrt(2 / a)

    def normaliser(self, kappa: Tensor) -> tuple[Tensor, Tensor]:
        # (1 + cos theta) / 2 ~ Beta(a, b)
        a, b = (self.d - 1) / 2 + kappa.double(), torch.full_like(kappa.double(), (self.d - 1) / 2)
        log_z = self.rest * math.log(2) + torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        return log_z, torch.digamma(a) - torch.digamma(a + b)


class VonMisesFisher(RotationallySymmetric):
    """h = cos theta - 1, the normal distribution's restriction to the sphere.

    Args:
        d: D, at least 2.
    """

    def h(self, theta: Tensor) -> Tensor:
        return torch.cos(theta) - 1

    def mode_and_scale(self, kappa: Tensor) -> tuple[Tensor, Tensor]:
        root = self.rest + torch.sqrt(self.rest**2 + 4 * kappa**2)
        cos = 2 * kappa / root
        return torch.acos(cos.clamp(max=1)), torch.rsqrt(kappa * cos + root / 2)


FAMILIES: dict[str, type[RotationallySymmetric]] = {"power_spherical": PowerSpherical, "vmf": VonMisesFisher}


def _nodes(start: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Return Gauss-Legendre nodes and weights of intervals, (...) -> (..., N)."""
    node_N, weight_N = (torch.tensor(part, dtype=start.dtype, device=start.device) for part in (_NODES, _WEIGHTS))
    return start[..., None] + width[..., None] * (0.5 + node_N), width[..., None] * weight_N


__getattr__ = renamed(__name__)
