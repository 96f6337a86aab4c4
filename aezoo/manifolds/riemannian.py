"""Riemannian metrics whose inverse is a sum of kernels at centroids, and derived quantities.

    G(z)^-1 = sum_i S_i exp(-|z - c_i|^2 / T^2) + lam I     S_i positive definite

(Chadebec et al. 2022, https://arxiv.org/abs/2105.00026). Distances are short near centroids; far from all centroids,
space is flat.

Shapes: B batch, D dimensions, M centroids.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aezoo.training.precision import at_least_float32

_WIDTH = 64


class CentroidMetric(NamedTuple):
    """The metric above.

    Attributes:
        c_MD: centroids.
        S_MDD: S, positive definite.
        temperature: T, the width of the kernels.
        floor: lam, the inverse metric far from all centroids.
    """

    c_MD: Tensor
    S_MDD: Tensor
    temperature: float
    floor: float

    def inverse(self, z_BD: Tensor) -> Tensor:
        """Return G^-1, (B, D) -> (B, D, D)."""
        weight_BM = torch.exp(-(z_BD[:, None] - self.c_MD).square().sum(2) / self.temperature**2)
        floor = self.floor * torch.eye(z_BD.shape[1], device=z_BD.device, dtype=z_BD.dtype)
        with torch.autocast(z_BD.device.type, enabled=False):  # autocast would round the metric to half precision
            return (weight_BM @ self.S_MDD.flatten(1)).unflatten(1, floor.shape) + floor


class Gram(nn.Sequential):
    """A network with one hidden layer for S = L L', L lower triangular with a positive diagonal: (M, D) -> (M, D, D).

    Args:
        size: D.
    """

    def __init__(self, size: int) -> None:
        super().__init__(nn.Linear(size, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, size * (size + 1) // 2))

    def forward(self, c_MD: Tensor) -> Tensor:
        d, entries = c_MD.shape[1], at_least_float32(super().forward(c_MD))
        with torch.autocast(entries.device.type, enabled=False):
            L_MDD = entries.new_zeros(len(entries), d, d)
            row, column = torch.tril_indices(d, d, -1, device=entries.device)
            L_MDD[:, row, column] = entries[:, d:]
            L_MDD = L_MDD + torch.diag_embed(F.softplus(entries[:, :d]))
            return L_MDD @ L_MDD.mT


def cholesky_factor(G_inv_BDD: Tensor) -> Tensor:
    """Return lower triangular A with A A' = G^-1, or NaN if the factorisation fails: (B, D, D) -> (B, D, D)."""
    A_BDD, info_B = torch.linalg.cholesky_ex(G_inv_BDD)
    return A_BDD.masked_fill(info_B[:, None, None] > 0, float("nan"))


def half_log_det(G_inv_BDD: Tensor) -> Tensor:
    """Return 1/2 log det G, the logarithm of the volume element: (B, D, D) -> (B,)."""
    return -cholesky_factor(G_inv_BDD).diagonal(dim1=1, dim2=2).log().sum(1)


def velocity(G_inv_BDD: Tensor, v_BD: Tensor) -> Tensor:
    """Return G^-1 v, the velocity of a momentum: (B, D, D), (B, D) -> (B, D)."""
    return (G_inv_BDD * v_BD[:, None]).sum(2)
