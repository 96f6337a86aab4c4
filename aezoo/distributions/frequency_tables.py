"""Tables of cumulative frequencies for a 16-bit rANS coder, identical to those of the library CompressAI.

A table of L entries c_0 = 0 < c_1 < ... < c_{L-1} = 2^16 codes L - 2 consecutive integers, starting at its offset. The
k-th of them has frequency c_{k+1} - c_k. The last frequency is that of all other integers, which are written after it.
Probabilities are computed in float32 in the same order of operations as in
https://github.com/InterDigitalInc/CompressAI, so that the tables are identical on the same machine.

Shapes: K tables, L entries of the longest table.
"""

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.errors import AezooError

PRECISION = 16
# probability of the values outside of a table, on both sides together
TAIL_MASS = 1e-9
# maximum entries of a table, each of which has a probability of at least 2^-16
MAX_ENTRIES = 2**15


class FrequencyTables(NamedTuple):
    """Tables, of which only the first `length` entries are used.

    Attributes:
        cdf: (K, L), int32.
        length: (K,), int32.
        offset: the integer of the first frequency, (K,), int32.
    """

    cdf: Tensor
    length: Tensor
    offset: Tensor

    def check(self) -> str | None:
        """Return a message if the tables are invalid, else None."""
        length, (rows, width) = self.length.long(), self.cdf.shape
        if rows != len(length) or rows != len(self.offset) or not rows:
            return f"there are {rows} tables, {len(length)} lengths and {len(self.offset)} offsets"
        if int(length.min()) < 3 or int(length.max()) > width:
            return f"table lengths are {int(length.min())} to {int(length.max())}, but tables have width {width}"
        if int(self.offset.abs().max()) > MAX_ENTRIES:
            return f"the offset of a table, {int(self.offset.abs().max())}, is too far from 0"
        counted = torch.arange(width) < length[:, None]
        ends = self.cdf.gather(1, length[:, None] - 1)
        rising = (self.cdf.diff(dim=1) > 0) | ~counted[:, 1:]
        if self.cdf[:, 0].any() or bool((ends != 1 << PRECISION).any()) or not bool(rising.all()):
            return f"a table does not increase from 0 to {1 << PRECISION}"
        return None


def join(parts: list[FrequencyTables]) -> FrequencyTables:
    """Concatenate tables, padded to the maximum width."""
    width = max(part.cdf.shape[1] for part in parts)
    wide = [torch.nn.functional.pad(part.cdf, (0, width - part.cdf.shape[1])) for part in parts]
    return FrequencyTables(*map(torch.cat, (wide, [part.length for part in parts], [part.offset for part in parts])))


def quantise(mass: Tensor, tails: Tensor, length: Tensor, offset: Tensor) -> FrequencyTables:
    """Quantise probabilities to tables.

    Args:
        mass: probabilities of integers, (K, L), float32.
        tails: probability of all other integers, (K,), float32.
        length: number of probabilities used, (K,), int32.
        offset: the first integer, (K,), int32.
    """
    cdf = torch.zeros(len(mass), int(length.max()) + 2, dtype=torch.int32)
    for row, probabilities, tail, n in zip(cdf, mass.numpy(), tails.numpy(), length.tolist(), strict=True):
        row[: n + 2] = torch.from_numpy(quantised_cdf(np.append(probabilities[:n], tail)))
    return FrequencyTables(cdf, length + 2, offset)


def quantised_cdf(mass: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Return cumulative sums of frequencies, each at least 1, with the sum 2^16, (K,) -> (K + 1,).

    A frequency of 0 becomes 1, taken from the first of the smallest frequencies above 1 (ryg_rans, Giesen 2014).

    Raises:
        AezooError: probabilities are negative or not finite, or there are too many.
    """
    total = 1 << PRECISION
    valid = len(mass) <= MAX_ENTRIES and bool(np.isfinite(mass).all()) and bool((mass >= 0).all())
    counts = np.floor(mass.astype(np.float64) * total + 0.5).astype(np.int64) if valid else np.zeros(1, np.int64)
    if not counts.any():
        raise AezooError(
            f"cannot create a table of {len(mass)} probabilities: some are negative, not finite or all 0, or there are "
            "too many; the weights of the distributions are damaged or not fully trained"
        )
    cdf = np.append(0, (total * counts // counts.sum()).cumsum())
    cdf[-1] = total
    for i in range(len(mass)):
        if cdf[i] == cdf[i + 1]:
            frequency = np.diff(cdf)
            richest = int(np.where(frequency > 1, frequency, total + 1).argmin())
            if richest < i:
                cdf[richest + 1 : i + 1] -= 1
            else:
                cdf[i + 1 : richest + 1] += 1
    return cdf.astype(np.int32)


def scale_table(low: float, high: float, n: int) -> Tensor:
    """Return scales with equally spaced logarithms, (n,), float32."""
    return torch.linspace(float(np.log(low)), float(np.log(high)), n, dtype=torch.float32).exp()


@functools.lru_cache(maxsize=4)
def _gaussian_tables(scales: tuple[float, ...]) -> FrequencyTables:
    from scipy.special import ndtri

    scale = torch.tensor(scales, dtype=torch.float32)
    reach = torch.ceil(scale * -ndtri(TAIL_MASS / 2)).int()
    distance = (torch.arange(2 * int(reach.max()) + 1).int() - reach[:, None]).abs().float()
    upper, lower = (0.5 * torch.erfc(-(2**-0.5) * ((half - distance) / scale[:, None])) for half in (0.5, -0.5))
    return quantise(upper - lower, 2 * lower[:, 0], 2 * reach + 1, -reach)


def gaussian_tables(scale: Tensor) -> FrequencyTables:
    """Return the tables of N(0, s^2) for scales s, (K,)."""
    return _gaussian_tables(tuple(scale.tolist()))
