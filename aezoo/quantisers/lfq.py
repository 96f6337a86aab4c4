"""LFQ, lookup-free quantisation (Yu et al. 2023), https://arxiv.org/abs/2310.05737

    z_q = sign(z)    index = sum_i [z_i > 0] 2^i

with a codebook of K = 2^D codes that needs no search. Each channel is 1 with probability
p = sigmoid(4 z / temperature), which is softmax_c(2 z.c / temperature) over all codes c, and

    entropy = E[H(p(c|z))]    diversity = H(E[p(c|z)])    commitment = ||z - sg(z_q)||^2

The loss uses entropy - gamma diversity, over the samples of all ranks: each z is close to one code, and all codes are
used. H(p(c|z)) is the sum over channels. H(E p) is exact for up to 10 channels; more channels are split into groups of
at most 10, and the sum of the groups' entropies is an upper bound.

Shapes: N rows, D channels, G channels of a group.
"""

import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.quantisers.base import Quantiser, Rows
from aezoo.quantisers.common import binary_entropy, entropy, group_sizes, to_digits, to_index
from aezoo.quantisers.estimators import ste
from aezoo.quantisers.fsq import MAX_BITS

# maximum number of channels for which all codes are enumerated
EXACT = 10


class LFQ(Quantiser):
    """The signs of the channels; one index of D bits. Terms: entropy, diversity and commitment.

    Args:
        dim: D, channels of z and bits of an index.
        temperature: temperature of the code probabilities.

    Raises:
        AezooError: an invalid value.
    """

    def __init__(self, dim: int, *, temperature: float = 0.01) -> None:
        if not 1 <= dim <= MAX_BITS or not temperature > 0:
            raise AezooError(
                f"{type(self).__name__} takes 1 to {MAX_BITS} channels, a bit each, and a temperature above 0, got "
                f"{dim} and {temperature}"
            )
        super().__init__(dim, (2**dim,))
        self.temperature, self.scale = temperature, 1.0
        self.sizes = group_sizes(dim, EXACT)

    def project(self, z_ND: Tensor) -> Tensor:
        """Project z to the space of comparison with codes, (N, D) -> (N, D)."""
        return z_ND

    def _quantise_rows(self, z_ND: Tensor, rows_per_sample: int = 1) -> Rows:
        u_ND = self.project(z_ND)
        bit_ND = (u_ND > 0).long()
        q_ND = self._bits_to_codes(bit_ND)
        terms = {
            "entropy": binary_entropy(4 * self.scale * u_ND / self.temperature).sum(1),
            "diversity": self.diversity(u_ND),
            "commitment": (u_ND - q_ND).square().sum(1),
        }
        return ste(u_ND, q_ND), to_index(bit_ND, (2,) * self.dim)[:, None], terms

    def _lookup_rows(self, index_NQ: Tensor) -> Tensor:
        return self._bits_to_codes(to_digits(index_NQ[:, 0], (2,) * self.dim))

    def _bits_to_codes(self, bit_ND: Tensor) -> Tensor:
        return (2 * bit_ND - 1).to(self.exact_dtype) * self.scale

    def diversity(self, u_ND: Tensor) -> Tensor:
        """Return H(E[p(c|z)]) in nats, summed over groups of channels, (N, D) -> ()."""
        # Apple's GPUs have no float64; elsewhere float32 products may be computed in TF32
        exact = torch.float32 if u_ND.device.type == "mps" else torch.float64
        total = u_ND.new_zeros(())
        for p_NG in torch.sigmoid(4 * self.scale * u_ND / self.temperature).to(exact).split(self.sizes, 1):
            # p(c|z) is a product over channels, so its mean over rows is a product of two halves
            half = p_NG.shape[1] // 2
            mean_KK = (
                _probability_of_each_code(p_NG[:, :half]).T @ _probability_of_each_code(p_NG[:, half:]) / p_NG.shape[0]
            )
            total = total + entropy(self.all_reduce_mean(mean_KK.flatten())).to(total)
        return total


def _probability_of_each_code(p_NG: Tensor) -> Tensor:
    """Return the probabilities of all codes of a group, from each channel's probability of 1, (N, G) -> (N, 2^G)."""
    p_NK = torch.ones_like(p_NG[:, :0].sum(1, keepdim=True))
    for p_N in p_NG.unbind(1):
        p_NK = torch.cat([p_NK * (1 - p_N[:, None]), p_NK * p_N[:, None]], 1)
    return p_NK
