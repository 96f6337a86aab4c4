"""Gradient estimators for quantisers, whose gradient is 0 almost everywhere: rows z and their codes q to z_q.

    ste        z_q = z + sg(q - z)                    dL/dz = dL/dz_q (Bengio et al. 2013, arXiv:1308.3432)
    rotation   z_q = sg(||q|| / ||z|| R) z = q        R rotates z onto the direction of q: a gradient keeps its angle to
                                                      the code (Fifty et al. 2024, https://arxiv.org/abs/2410.06424)
    diveq      z_q = z + ||q - z|| sg(v / ||v||)      v = q - z + noise: the gradient reaches the code as well, with no
                                                      term of its own (2025, https://arxiv.org/abs/2509.26469)

sg stops the gradient. The first two return q exactly. The fourth estimator, gumbel, also chooses the code: see `vq`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ste(z: Tensor, q: Tensor) -> Tensor:
    """Return q with the gradient of z, the straight-through estimator, (..., D), (..., D) -> (..., D)."""
    return q.detach() + (z - z.detach())  # z + (q - z) would equal q only up to rounding


def rotation(z: Tensor, q: Tensor) -> Tensor:
    """Return q, computed as z rotated and rescaled by a constant matrix, (..., D), (..., D) -> (..., D)."""
    with torch.no_grad():
        from_D, to_D = F.normalize(z, dim=-1), F.normalize(q, dim=-1)
        between_D = F.normalize(from_D + to_D, dim=-1)
        norm = z.norm(dim=-1, keepdim=True)
        scale = torch.where(norm > 0, q.norm(dim=-1, keepdim=True) / norm.clamp(min=torch.finfo(z.dtype).tiny), 1)
    # section 4.2: R = I - 2 r r' + 2 q^ e^', with r the normalised sum of both directions
    along = (z * between_D).sum(-1, keepdim=True)
    onto = (z * from_D).sum(-1, keepdim=True)
    turned = scale * (z - 2 * along * between_D + 2 * onto * to_D)
    return ste(turned, q)


def diveq(z: Tensor, q: Tensor, sigma: float, noise: Tensor | None = None) -> Tensor:
    """Move z by its distance from q, in roughly the direction of q, (..., D), (..., D) -> (..., D).

    Args:
        z: the vectors to quantise.
        q: codes of the vectors, with gradient.
        sigma: standard deviation of the noise in the direction.
        noise: standard normal noise; drawn if None.
    """
    noise = torch.randn_like(z) if noise is None else noise
    towards = F.normalize((q - z).detach() + sigma * noise, dim=-1, eps=torch.finfo(z.dtype).tiny)
    return z + (q - z).norm(dim=-1, keepdim=True) * towards
