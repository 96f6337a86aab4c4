"""Hamiltonian dynamics: leapfrog integrators, and the Monte Carlo method that uses them.

    dz/dt = dH/dv     dv/dt = -dH/dz
    H(z, v) = U(z) + |v|^2 / 2                                         `leapfrog`, in flat space
    H(z, v) = U(z) + (log det G(z) + v' G(z)^-1 v) / 2                 `generalised_leapfrog`, under a metric G

Both integrators are reversible, preserve volume, and preserve H up to second order in the step size (Neal 2011,
https://arxiv.org/abs/1206.1901; Girolami & Calderhead 2011, https://doi.org/10.1111/j.1467-9868.2010.00765.x). They can
temper v between steps: with inverse temperatures beta_k, v is multiplied by sqrt(beta_(k-1) / beta_k) after step k, and
the volume by sqrt(beta_0 / beta_K)^D in total.

Shapes: B batch, D dimensions.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from aezoo.deprecated import renamed
from aezoo.manifolds.riemannian import half_log_det, velocity

Map = Callable[[Tensor], Tensor]
Integrator = Callable[[Tensor, Tensor, Map, Tensor | float, Sequence[float]], tuple[Tensor, Tensor]]


def quadratic_cooling(beta_0: float, n: int) -> list[float]:
    """Return the square roots of n + 1 inverse temperatures from beta_0 to 1 (Caterini et al. 2018, equation 6).

    1 / sqrt(beta_k) = 1 / sqrt(beta_0) + (1 - 1 / sqrt(beta_0)) k^2 / n^2, https://arxiv.org/abs/1805.11328
    """
    hottest = beta_0**-0.5
    return [1 / (hottest + (1 - hottest) * (k / n) ** 2) for k in range(n + 1)] if n else [1.0]


def leapfrog(
    z_BD: Tensor, v_BD: Tensor, gradient: Map, step: Tensor | float, cooling: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Integrate z and its momentum v in flat space by leapfrog steps: (B, D), (B, D) -> (B, D), (B, D).

    Args:
        z_BD: positions.
        v_BD: momenta.
        gradient: the gradient of U, (B, D) -> (B, D).
        step: length of a step, one number or (D,).
        cooling: sqrt(beta_0), ..., sqrt(beta_K); K steps are taken.
    """
    gradient_BD = gradient(z_BD)
    for before, after in pairwise(cooling):
        v_BD = v_BD - step / 2 * gradient_BD
        z_BD = z_BD + step * v_BD
        gradient_BD = gradient(z_BD)
        v_BD = before / after * (v_BD - step / 2 * gradient_BD)
    return z_BD, v_BD


def generalised_leapfrog(
    z_BD: Tensor,
    v_BD: Tensor,
    gradient: Map,
    step: Tensor | float,
    cooling: Sequence[float],
    *,
    inverse_metric: Map,
    n_fixed_point: int,
) -> tuple[Tensor, Tensor]:
    """Integrate z and its momentum v under a metric by leapfrog steps: (B, D), (B, D) -> (B, D), (B, D).

    Two of the three equations of a step are implicit and solved by fixed-point iteration. Volume and reversibility are
    preserved up to its convergence error.

    Args:
        z_BD: positions.
        v_BD: momenta.
        gradient: the gradient of U, (B, D) -> (B, D).
        step: length of a step, one number or (D,).
        cooling: sqrt(beta_0), ..., sqrt(beta_K); K steps are taken.
        inverse_metric: G^-1, (B, D) -> (B, D, D).
        n_fixed_point: number of iterations for each implicit equation.
    """
    gradient_BD = gradient(z_BD)
    for before, after in pairwise(cooling):
        half_BD = v_BD
        for _ in range(n_fixed_point):
            half_BD = v_BD - step / 2 * (gradient_BD + kinetic_gradient(z_BD, half_BD, inverse_metric))
        velocity_BD = velocity(inverse_metric(z_BD), half_BD)
        proposal_BD = z_BD + step * velocity_BD
        for _ in range(n_fixed_point):
            proposal_BD = z_BD + step / 2 * (velocity_BD + velocity(inverse_metric(proposal_BD), half_BD))
        z_BD = proposal_BD
        gradient_BD = gradient(z_BD)
        v_BD = before / after * (half_BD - step / 2 * (gradient_BD + kinetic_gradient(z_BD, half_BD, inverse_metric)))
    return z_BD, v_BD


def kinetic_gradient(z_BD: Tensor, v_BD: Tensor, inverse_metric: Map) -> Tensor:
    """Return the differentiable gradient in z of (log det G(z) + v' G(z)^-1 v) / 2: (B, D), (B, D) -> (B, D)."""

    def kinetic(z: Tensor) -> Tensor:
        G_inv_BDD = inverse_metric(z)
        return half_log_det(G_inv_BDD).sum() + 0.5 * (v_BD * velocity(G_inv_BDD, v_BD)).sum()

    found: Tensor = torch.func.grad(kinetic)(z_BD)
    return found


def hmc_step(
    z_BD: Tensor, log_density: Map, step: float, n_steps: int, gradient: Map | None = None
) -> tuple[Tensor, Tensor]:
    """Perform a Hamiltonian Monte Carlo step of each chain; return positions and acceptance: (B, D) -> (B, D), (B,).

    Args:
        z_BD: positions of the chains.
        log_density: the log-density to sample, up to a constant, (B, D) -> (B,).
        step: length of a leapfrog step.
        n_steps: number of leapfrog steps per proposal.
        gradient: the gradient of log_density, (B, D) -> (B, D); by default that of torch.func, which also works if
            gradients are disabled, but is slower for small matrices than autograd.
    """
    gradient = gradient or torch.func.grad(lambda at: log_density(at).sum())
    start_BD = torch.randn_like(z_BD)
    # consecutive half steps of v are merged
    proposal_BD, v_BD, gradient_BD = z_BD, start_BD + step / 2 * gradient(z_BD), torch.zeros_like(z_BD)
    for _ in range(n_steps):
        proposal_BD = proposal_BD + step * v_BD
        gradient_BD = gradient(proposal_BD)
        v_BD = v_BD + step * gradient_BD
    v_BD = v_BD - step / 2 * gradient_BD
    log_ratio_B = log_density(proposal_BD) - log_density(z_BD) + 0.5 * (start_BD**2 - v_BD**2).sum(1)
    accepted_B = torch.rand_like(log_ratio_B).log() < log_ratio_B
    return torch.where(accepted_B[:, None], proposal_BD, z_BD), accepted_B


__getattr__ = renamed(__name__)
