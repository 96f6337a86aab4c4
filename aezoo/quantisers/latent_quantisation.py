"""Latent quantisation (Hsu et al. 2023), https://arxiv.org/abs/2305.18378

    z_q,d = v_dk    k = argmin_j |z_d - v_dj|

Each channel d has K learned values, initially evenly spaced from -1/2 to 1/2. Only the codebook term trains
them: the gradient of z_q goes to z.

Shapes: N rows, D channels, K values of each.
"""

import torch
from torch import Tensor, nn

from aezoo.quantisers.base import Quantiser, Rows
from aezoo.quantisers.estimators import ste


class LatentQuantisation(Quantiser):
    """Maps each channel to its nearest learned value; one index per channel. Terms: commitment and codebook.

    Args:
        dim: D, channels of z.
        size: K, number of values per channel.

    Raises:
        AezooError: an invalid value.
    """

    def __init__(self, dim: int, size: int = 10) -> None:
        super().__init__(dim, (size,) * dim)
        self.value_DK = nn.Parameter(torch.linspace(-0.5, 0.5, size).repeat(dim, 1))

    def _quantise_rows(self, z_ND: Tensor, rows_per_sample: int = 1) -> Rows:
        index_ND = (z_ND[:, :, None] - self.value_DK.to(self.exact_dtype)).abs().argmin(2)
        q_ND = self._lookup_rows(index_ND)
        terms = {
            "commitment": (z_ND - q_ND.detach()).square().sum(1),
            "codebook": (z_ND.detach() - q_ND).square().sum(1),
        }
        return ste(z_ND, q_ND), index_ND, terms

    def _lookup_rows(self, index_NQ: Tensor) -> Tensor:
        return self.value_DK.to(self.exact_dtype).T.gather(0, index_NQ)
