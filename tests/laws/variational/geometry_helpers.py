"""Laws of the VAEs whose codes lie on a sphere or in hyperbolic space: densities, KL, exact gradients, maps, limits."""

import torch
from torch import Tensor
from torch.nn import functional as F


def directions(n: int, d: int) -> Tensor:
    return F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1)
