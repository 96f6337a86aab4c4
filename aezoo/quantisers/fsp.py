"""FSP, finite scalar perturbation (Zhai et al. 2026), https://arxiv.org/abs/2602.17133, section 3.3

    p = g(z) in [0, 1]    z_q = sqrt(12) ((l + 1/2) / L - 1/2)    l = floor(L p) of the L intervals of a channel

The middle of an interval is the best value for a uniform p; z_q then has variance 1. In training, a number is quantised
with some probability, with a straight-through gradient. Otherwise it is perturbed by similar noise, if it stays in [0,
1]:

    p <- p + u    u ~ U(-eta / 2L, eta / 2L)

p is uniform if z has the distribution function g. The terms pull the moments of z to those of g, over all ranks' rows:

    code_mean = ||mu||^2    code_variance = ||sigma^2 - sigma_g^2||^2

with sigma_g^2 of 1 for normal, pi^2 / 12 for tanh and pi^2 / 3 for sigmoid. Whether a number is quantised and whether
its move is accepted are decided separately for each number, as in the authors' code; equation 17 decides per vector.

Shapes: N rows, D channels.
"""

import math

import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.quantisers.base import Quantiser, Rows
from aezoo.quantisers.common import to_digits, to_index
from aezoo.quantisers.estimators import ste
from aezoo.quantisers.fsq import MAX_BITS
from aezoo.training.limits import check_at_least

# g and sigma_g^2 by name
SQUASHES = {
    "tanh": (lambda z: (torch.tanh(z) + 1) / 2, math.pi**2 / 12),
    "sigmoid": (torch.sigmoid, math.pi**2 / 3),
    "normal": (torch.special.ndtr, 1.0),
}


class FSP(Quantiser):
    """Replaces each channel by the middle of its interval; in training, perturbs it within the width of an interval.

    Args:
        levels: L of each channel.
        squash: g: tanh, sigmoid or normal.
        eta: width of a perturbation relative to that of an interval.
        quantised: probability that a number is quantised in training.

    Raises:
        AezooError: an invalid value.
    """

    L_D: Tensor

    def __init__(
        self, levels: tuple[int, ...] = (8, 5, 5, 5), *, squash: str = "tanh", eta: float = 1.0, quantised: float = 0.5
    ) -> None:
        if not levels or min(levels) < 2 or math.log2(math.prod(levels)) > MAX_BITS:
            raise AezooError(f"FSP takes levels of 2 or more, of at most {MAX_BITS} bits together, got {levels}")
        if squash not in SQUASHES:
            raise AezooError(f"squash must be one of {', '.join(SQUASHES)}, got {squash!r}")
        check_at_least(0, eta=eta)
        if not 0 <= quantised <= 1:
            raise AezooError(f"quantised must lie between 0 and 1, got {quantised}")
        super().__init__(len(levels), (math.prod(levels),))
        self.levels, self.squash, self.eta, self.quantised = tuple(levels), squash, eta, quantised
        self.register_float32_buffer("L_D", torch.tensor(levels, dtype=torch.get_default_dtype()), persistent=False)

    def middle(self, digit_ND: Tensor) -> Tensor:
        """Return the middles of intervals, in [0, 1], (N, D) -> (N, D)."""
        return (digit_ND + 0.5) / self.L_D

    def value(self, p_ND: Tensor) -> Tensor:
        """Return scaled values, with mean 0 and variance 1 if p is uniform, (N, D) -> (N, D)."""
        return math.sqrt(12) * (p_ND - 0.5)

    def _quantise_rows(self, z_ND: Tensor, rows_per_sample: int = 1) -> Rows:
        squash, variance = SQUASHES[self.squash]
        p_ND = squash(z_ND)
        digit_ND = (p_ND.detach() * self.L_D).floor().minimum(self.L_D - 1)
        quantised_ND = ste(p_ND, self.middle(digit_ND))
        if self.training:
            of_samples = p_ND.detach().unflatten(0, (-1, rows_per_sample))  # random numbers are drawn per sample
            u_ND, coin_ND = (torch.rand_like(of_samples).flatten(0, 1) for _ in range(2))
            moved_ND = p_ND + self.eta * (2 * u_ND - 1) / (2 * self.L_D)
            moved_ND = torch.where((moved_ND > 0) & (moved_ND < 1), moved_ND, p_ND)
            quantised_ND = torch.where(coin_ND < self.quantised, quantised_ND, moved_ND)
        index_N = to_index(digit_ND.long(), self.levels)
        return self.value(quantised_ND), index_N[:, None], self.moments(z_ND, variance)

    def _lookup_rows(self, index_NQ: Tensor) -> Tensor:
        return self.value(self.middle(to_digits(index_NQ[:, 0], self.levels).to(self.exact_dtype)))
