"""FSQ, finite scalar quantisation (Mentzer et al. 2023), https://arxiv.org/abs/2309.15505

    f(z) = tanh(z + s) (L - 1)(1 - eps) / 2 - o    z_q = round(f(z)) / floor(L / 2)

for each channel with its L values; o = 1/2 and s = tan(2 o / ((L - 1)(1 - eps))) if L is even, else 0 (appendix A.1).
For L = 2 this shift would be outside the range of tanh, so it is 0: the values -1 and 1 are separated at z = 0. The
gradient is that of f, with straight-through rounding. Nothing is learned, and there is no loss term. eps is 0.001, but
at most 0.98 / (L - 1): for L above 1,001, the rounded bound would not reach the outermost values.

Shapes: N rows, D channels.
"""

import math

import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.quantisers.base import Quantiser, Rows
from aezoo.quantisers.common import to_digits, to_index
from aezoo.quantisers.estimators import ste

EPS = 1e-3
# maximum distance of the bound from the outermost value, in steps; half a step would round to the previous value
_MAX_GAP = 0.49
# maximum number of bits of a 64-bit index
MAX_BITS = 62


class FSQ(Quantiser):
    """Rounds each channel to one of a few values in [-1, 1]; one index for all channels.

    Args:
        levels: L of each channel; the paper advises 5 or more.

    Raises:
        AezooError: an invalid value.
    """

    half_D: Tensor
    shift_D: Tensor
    offset_D: Tensor
    lowest_D: Tensor
    zero_D: Tensor
    width_D: Tensor

    def __init__(self, levels: tuple[int, ...] = (8, 5, 5, 5)) -> None:
        if not levels or min(levels) < 2 or math.log2(math.prod(levels)) > MAX_BITS:
            raise AezooError(f"FSQ takes levels of 2 or more, of at most {MAX_BITS} bits together, got {levels}")
        super().__init__(len(levels), (math.prod(levels),))
        self.levels = tuple(levels)
        L_D = torch.tensor(levels, dtype=torch.float64)
        half_D = (L_D - 1) / 2 - (EPS * (L_D - 1) / 2).clamp(max=_MAX_GAP)
        offset_D = torch.where(L_D % 2 == 1, 0.0, 0.5)
        constants = {
            "half_D": half_D,
            "offset_D": offset_D,
            "shift_D": torch.where(L_D > 2, (offset_D / half_D).tan(), 0),
            "lowest_D": L_D // 2,
            # converts digits 0..L-1 to values: (digit - zero) / width
            "zero_D": torch.where(L_D > 2, L_D // 2, 0.5),
            "width_D": torch.where(L_D > 2, L_D // 2, 0.5),
        }
        for name, values in constants.items():
            self.register_float32_buffer(name, values.to(torch.get_default_dtype()), persistent=False)

    def bound(self, z_ND: Tensor) -> Tensor:
        """Return f(z) relative to the lowest value, within half a step of the digits 0..L-1, (N, D) -> (N, D)."""
        return torch.tanh(z_ND + self.shift_D) * self.half_D - self.offset_D + self.lowest_D

    def value(self, digit_ND: Tensor) -> Tensor:
        """Convert digits, integer or not, to values in [-1, 1], (N, D) -> (N, D)."""
        return (digit_ND - self.zero_D) / self.width_D

    def _quantise_rows(self, z_ND: Tensor, rows_per_sample: int = 1) -> Rows:
        bounded_ND = self.bound(z_ND)
        digit_ND = bounded_ND.detach().round()
        z_q_ND = ste(self.value(bounded_ND), self.value(digit_ND))
        return z_q_ND, to_index(digit_ND.long(), self.levels)[:, None], {}

    def _lookup_rows(self, index_NQ: Tensor) -> Tensor:
        return self.value(to_digits(index_NQ[:, 0], self.levels).to(self.exact_dtype))
