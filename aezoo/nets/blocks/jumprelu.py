"""JumpReLU with trained thresholds (Rajamanoharan et al. 2024), https://arxiv.org/abs/2407.14435

    f = pi H(pi - theta)

H is the unit step and theta >= 0. The derivative of a step in theta is 0, so it is estimated (section 4) with a
rectangle of width eps, K(u) = 1 for |u| < 1/2:

    df / dtheta = -theta / eps K((pi - theta) / eps)     dH(pi - theta) / dtheta = -1 / eps K((pi - theta) / eps)

Shapes: B batch, N latents.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class JumpReLU(nn.Module):
    """Mixin, before `Autoencoder`, for models with thresholds; it has no effect without `init_thresholds`.

    Attributes:
        theta_N: the thresholds, which stay float32 in a bf16 model.
        bandwidth: eps.
    """

    theta_N: nn.Parameter
    bandwidth: float

    def init_thresholds(self, latent_dim: int, threshold: float, bandwidth: float) -> None:
        """Add the thresholds; for constructors.

        Args:
            latent_dim: N, number of latents.
            threshold: initial theta.
            bandwidth: eps.
        """
        self.bandwidth = bandwidth
        self.theta_N = nn.Parameter(torch.full((latent_dim,), float(threshold)))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        thresholds: nn.Parameter | None = getattr(self, "theta_N", None)
        theta_N = None if thresholds is None else thresholds.data
        super()._apply(fn, recurse)
        if theta_N is not None and self.theta_N.dtype in (torch.bfloat16, torch.float16):  # small steps would be lost
            self.theta_N.data = theta_N.to(self.theta_N.device)
        return self

    def step(self, pi_BN: Tensor) -> Tensor:
        """Return H(pi - theta), with its estimated derivative in theta, (B, N) -> (B, N)."""
        above_BN = (pi_BN > self.theta_N).to(pi_BN.dtype)
        near_BN = ((pi_BN - self.theta_N).abs() < self.bandwidth / 2).to(pi_BN.dtype)
        slope_BN = -near_BN / self.bandwidth
        return above_BN + slope_BN * (self.theta_N - self.theta_N.detach())

    def jump(self, pi_BN: Tensor) -> Tensor:
        """Return pi H(pi - theta), with its estimated derivative in theta, (B, N) -> (B, N)."""
        step_BN = self.step(pi_BN)
        return pi_BN * step_BN.detach() + self.theta_N.detach() * (step_BN - step_BN.detach())

    @torch.no_grad()
    def clamp_thresholds(self) -> None:
        """Clamp thresholds to at least 0, after a step of the optimiser."""
        self.theta_N.clamp_(min=0)
