"""BSQ, binary spherical quantisation (Zhao et al. 2024), https://arxiv.org/abs/2406.07548

    u = z / ||z||    z_q = sign(u) / sqrt(D)    index = sum_i [u_i > 0] 2^i

LFQ on the unit sphere. z_q is also on the sphere, so the error is bounded. The terms are those of `lfq`, computed for u
with the codes +-1 / sqrt(D): a channel is 1 with probability sigmoid(4 u / (sqrt(D) temperature)).

Shapes: N rows, D channels.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from aezoo.quantisers.lfq import LFQ


class BSQ(LFQ):
    """The signs of the channels on the unit sphere; one index of D bits. Terms: entropy, diversity and commitment.

    Args:
        dim: D, channels of z and bits of an index.
        temperature: temperature of the code probabilities.

    Raises:
        AezooError: an invalid value.
    """

    def __init__(self, dim: int, *, temperature: float = 0.01) -> None:
        super().__init__(dim, temperature=temperature)
        self.scale = 1 / math.sqrt(dim)

    def project(self, z_ND: Tensor) -> Tensor:
        return F.normalize(z_ND, dim=1)
