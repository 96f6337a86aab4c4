"""The random projection quantiser of BEST-RQ (Chiu et al. 2022), https://arxiv.org/abs/2202.01855

    k = argmin_j || e_j / ||e_j|| - A z / ||A z|| ||    z_q = e_k / ||e_k||

A (Xavier) and e (standard normal) are drawn once and never trained. For data with mean 0 and standard deviation 1, the
indices are targets for a model that predicts masked parts. There is no gradient and no loss term.

Shapes: N rows, D channels of z, C channels of a code, K codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.quantisers.base import Quantiser, Rows
from aezoo.quantisers.common import nearest, split_for_tf32, uses_tf32


class RandomProjection(Quantiser):
    """Maps a random projection of z to the nearest of K random directions.

    Args:
        dim: D, channels of z.
        size: K, number of codes.
        code_dim: C, channels of a code.
    """

    projection_DC: Tensor
    code_KC: Tensor

    def __init__(self, dim: int, size: int = 8192, code_dim: int = 16) -> None:
        super().__init__(dim, (size,), code_dim)
        self.register_float32_buffer("projection_DC", nn.init.xavier_uniform_(torch.empty(dim, code_dim)))
        self.register_float32_buffer("code_KC", F.normalize(torch.randn(size, code_dim), dim=1))

    def _quantise_rows(self, z_ND: Tensor, rows_per_sample: int = 1) -> Rows:
        z_ND, rows_CD = z_ND.detach(), self.projection_DC.T
        if uses_tf32(z_ND):
            z_ND, rows_CD = split_for_tf32(z_ND, rows_CD)
        y_NC = F.normalize(z_ND @ rows_CD.T, dim=1)
        index_N = nearest(y_NC, self.code_KC)
        return F.embedding(index_N, self.code_KC), index_N[:, None], {}

    def _lookup_rows(self, index_NQ: Tensor) -> Tensor:
        return F.embedding(index_NQ[:, 0], self.code_KC)
