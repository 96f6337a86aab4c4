"""Residual VQ (Zeghidour et al. 2021), https://arxiv.org/abs/2107.03312

    r_1 = z    q_l = the code of level l that is nearest to r_l    r_{l+1} = r_l - q_l    z_q = sum_l q_l

With quantiser dropout, a training sample keeps only its first n levels with probability `dropout`, where n is uniform
on 1..L, so that a prefix of the levels is also a code. A dropped level has index -1 and adds 0, and its codebook is not
updated by that sample.

The terms are summed over levels, each computed for its residual. The gradient of a residual goes only to z. There is
one straight-through gradient from z_q to z, instead of one per level.

Shapes: N rows, D channels, K codes per level, Q = L levels.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.quantisers.base import Quantiser, Rows
from aezoo.quantisers.common import level_dropout_mask, nearest
from aezoo.quantisers.vq import VQ


class ResidualVQ(Quantiser):
    """VQ of the residual of earlier levels. Terms: those of `VQ`, summed over levels.

    Args:
        dim: D, channels of z.
        levels: L, number of codebooks.
        size: K, number of codes of each codebook.
        dropout: fraction of training samples that keep only their first levels.
        **options: options of each `VQ`, except cosine, since the norm of a residual matters.

    Raises:
        AezooError: an invalid value.
    """

    def __init__(self, dim: int, levels: int, size: int = 512, *, dropout: float = 0.0, **options: Any) -> None:
        super().__init__(dim, (size,) * levels)
        if not 0 <= dropout <= 1 or options.get("cosine"):
            raise AezooError(
                f"ResidualVQ needs dropout in [0, 1] and takes no cosine, got {dropout} and "
                f"{options.get('cosine', False)}: norms of residuals count"
            )
        self.dropout = dropout
        self.levels = nn.ModuleList(VQ(dim, size, **options) for _ in range(levels))

    def _quantise_rows(self, z_ND: Tensor, rows_per_sample: int = 1) -> Rows:
        kept_NQ = None
        if self.training and self.dropout:
            kept_NQ = level_dropout_mask(z_ND, rows_per_sample, len(self.levels), self.dropout)
        left_ND, total_ND, indices = z_ND, torch.zeros_like(z_ND), []
        sums: dict[str, Tensor] = {}
        for i, level in enumerate(self._levels()):
            # every rank must run every level, since each level exchanges sums between ranks
            kept_N = None if kept_NQ is None else kept_NQ[:, i]
            q_ND, index_N, terms = level.select_codes(left_ND, rows_per_sample, kept_N)
            left_ND = left_ND - q_ND.detach()
            if kept_N is not None:
                q_ND, index_N = q_ND * kept_N[:, None], torch.where(kept_N, index_N, -1)
                terms = {name: term * kept_N for name, term in terms.items()}
            total_ND = total_ND + q_ND
            indices.append(index_N)
            sums = {name: sums.get(name, 0) + term for name, term in terms.items()}
        return self._levels()[0].apply_estimator(z_ND, total_ND, rows_per_sample), torch.stack(indices, 1), sums

    def _lookup_rows(self, index_NQ: Tensor) -> Tensor:
        kept_NQ = index_NQ >= 0
        total_ND: Tensor | int = 0
        for i, level in enumerate(self._levels()):
            total_ND = total_ND + level._lookup_rows(index_NQ[:, i : i + 1].clamp(min=0)) * kept_NQ[:, i : i + 1]
        return cast(Tensor, total_ND)

    def _init_rows(self, z_ND: Tensor) -> None:
        for level in self._levels():
            level._init_rows(z_ND)
            code_KD = level.codebook()
            z_ND = z_ND - code_KD[nearest(z_ND, code_KD)]

    def _levels(self) -> list[VQ]:
        return cast(list[VQ], [*self.levels])
