"""Residual FSQ: `fsq`, with the rounding error quantised again, level by level.

Level 1 is FSQ (Mentzer et al. 2023, https://arxiv.org/abs/2309.15505). Its error is at most half a step, so the cell
has a known size. Each further level splits the cell of a channel into as many equal cells as the channel has values,
and selects the middle of one cell. So the error of a channel is at most

    1 / (2 L^(l-1))    steps of FSQ after l levels

and no scale of residuals needs to be estimated. Values are bounded once, before the first level, and one
straight-through estimator passes the gradient. Quantiser dropout is as in `residual_vq`.

Shapes: N rows, D channels, Q = depth levels.
"""

import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.quantisers.base import Rows
from aezoo.quantisers.common import level_dropout_mask, to_digits, to_index
from aezoo.quantisers.estimators import ste
from aezoo.quantisers.fsq import FSQ


class ResidualFSQ(FSQ):
    """FSQ of the error of earlier levels; one index per level.

    Args:
        levels: L of each channel, the same at every level.
        depth: number of levels.
        dropout: fraction of training samples that keep only their first levels.

    Raises:
        AezooError: an invalid value.
    """

    L_D: Tensor

    def __init__(self, levels: tuple[int, ...] = (8, 5, 5, 5), depth: int = 2, *, dropout: float = 0.0) -> None:
        super().__init__(levels)
        if depth < 1 or not 0 <= dropout <= 1:
            raise AezooError(f"ResidualFSQ needs depth of 1 or more and dropout in [0, 1], got {depth} and {dropout}")
        self.depth, self.dropout, self.codebook_sizes = depth, dropout, self.codebook_sizes * depth
        self.register_float32_buffer("L_D", torch.tensor(levels, dtype=torch.get_default_dtype()), persistent=False)

    def _quantise_rows(self, z_ND: Tensor, rows_per_sample: int = 1) -> Rows:
        bounded_ND = self.bound(z_ND)
        left_ND, indices = bounded_ND.detach(), []
        for level in range(self.depth):
            digit_ND = left_ND.round() if level == 0 else self._cell(left_ND, level)
            left_ND = left_ND - (digit_ND if level == 0 else self._middle(digit_ND, level))
            indices.append(to_index(digit_ND.long(), self.levels))
        index_NQ = torch.stack(indices, 1)
        if self.training and self.dropout:
            index_NQ = index_NQ.where(level_dropout_mask(z_ND, rows_per_sample, self.depth, self.dropout), -1)
        return ste(self.value(bounded_ND), self._lookup_rows(index_NQ)), index_NQ, {}

    def _lookup_rows(self, index_NQ: Tensor) -> Tensor:
        total_ND = torch.zeros_like(self.zero_D)
        for level in range(self.depth):
            digit_ND = to_digits(index_NQ[:, level].clamp(min=0), self.levels).to(self.exact_dtype)
            part_ND = self.value(digit_ND) if level == 0 else self._middle(digit_ND, level) / self.width_D
            total_ND = total_ND + part_ND * (index_NQ[:, level] >= 0)[:, None]
        return total_ND

    def _cell(self, left_ND: Tensor, level: int) -> Tensor:
        """Return the index of the cell at a level, 0..L-1."""
        cell_ND = ((left_ND * self.L_D ** (level - 1) + 0.5) * self.L_D).floor()
        return cell_ND.clamp(torch.zeros_like(self.L_D), self.L_D - 1)

    def _middle(self, cell_ND: Tensor, level: int) -> Tensor:
        """Return the position of a cell's middle, relative to the middle of its parent cell."""
        return ((cell_ND + 0.5) / self.L_D - 0.5) / self.L_D ** (level - 1)
