"""Helpers of the laws of the hyperspherical and the Poincare VAE."""

import torch
from torch import Tensor
from torch.nn import functional as F


def directions(n: int, d: int) -> Tensor:
    return F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1)
