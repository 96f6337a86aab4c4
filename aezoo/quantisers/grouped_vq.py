"""Grouped VQ, or product quantisation (Jégou et al. 2011), https://doi.org/10.1109/TPAMI.2010.57

    z = (z^1, ..., z^G)    z_q = (VQ_1(z^1), ..., VQ_G(z^G))

G codebooks of K codes give K^G vectors, at the cost of one search per codebook.

Shapes: N rows, D channels, K codes per group, Q = G groups.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.quantisers.base import Quantiser, Rows
from aezoo.quantisers.vq import VQ


class GroupedVQ(Quantiser):
    """Separate VQ for each group of channels. Terms: those of `VQ`, summed over groups.

    Args:
        dim: D, channels of z.
        groups: G, a divisor of D.
        size: K, number of codes of each group.
        **options: options of each `VQ`.

    Raises:
        AezooError: an invalid value.
    """

    def __init__(self, dim: int, groups: int, size: int = 512, **options: Any) -> None:
        if groups < 1 or dim % groups:
            raise AezooError(f"{groups} groups do not divide {dim} channels: give a divisor of {dim}")
        super().__init__(dim, (size,) * groups)
        self.groups = nn.ModuleList(VQ(dim // groups, size, **options) for _ in range(groups))

    def _quantise_rows(self, z_ND: Tensor, rows_per_sample: int = 1) -> Rows:
        parts = [group._quantise_rows(part, rows_per_sample) for group, part in self._split(z_ND)]
        codes, indices, terms = zip(*parts, strict=True)
        sums = {name: torch.stack([of_group[name] for of_group in terms]).sum(0) for name in terms[0]}
        return torch.cat(codes, 1), torch.cat(indices, 1), sums

    def _lookup_rows(self, index_NQ: Tensor) -> Tensor:
        return torch.cat([group._lookup_rows(part) for group, part in self._split(index_NQ)], 1)

    def _init_rows(self, z_ND: Tensor) -> None:
        for group, part in self._split(z_ND):
            group._init_rows(part)

    def _split(self, rows: Tensor) -> list[tuple[VQ, Tensor]]:
        return [*zip(cast(list[VQ], self.groups), rows.split(rows.shape[1] // len(self.groups), 1), strict=True)]
