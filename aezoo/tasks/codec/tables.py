"""Integer tables of probabilities, and how constriction's two entropy coders are used here.

A table of K symbols consists of K integer frequencies f_i >= 1 whose sum is 2^24. constriction takes floats w_i, and
gives symbol i the interval that starts at i + floor(scale * (w_0 + ... + w_{i-1})) with scale = (2^24 - K) / sum_i w_i.
Tables are passed as w_i = f_i - 1. These are integers below 2^24, so they are exact in float32. Their sum is 2^24 - K,
the scale is exactly 1, and the interval is exactly f_i wide. No rounding remains that could differ between machines.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from aezoo.errors import AezooError, install_hint

PRECISION = 24
TOTAL = 1 << PRECISION
# table entries in memory at a time: 8 MiB in float64
MAX_ENTRIES = 2**20

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.signedinteger[Any]]
Words = npt.NDArray[np.uint32]
# computes the tables of some of the rows of an array of symbols: (m, K)
Rows = Callable[[slice], npt.NDArray[np.float32]]


@functools.cache
def constriction_stream() -> Any:
    """The stream codes of constriction, after a check that it codes as the format requires.

    Raises:
        AezooError: it is not installed, or codes differently.
    """
    try:
        import constriction
    except ImportError as error:
        raise AezooError(f"compression needs constriction: {install_hint('codec')}") from error
    coder = constriction.stream.stack.AnsCoder(np.array([1, 2], dtype=np.uint32))
    table = to_weights(np.array([[5, 1, TOTAL - 6], [1, TOTAL - 2, 1]]))
    coder.encode_reverse(np.array([1, 2], dtype=np.int32), constriction.stream.model.Categorical(perfect=False), table)
    # the state is 2 * 2^32 + 1; symbol 2 with f = 1 starting at 2^24 - 1, then symbol 1 with f = 1 starting at 5
    if coder.get_compressed().tolist() != _KNOWN:
        raise AezooError("this version of constriction codes differently: pip install 'constriction>=0.4,<0.6'")
    return constriction.stream


def to_weights(frequencies: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Frequencies as constriction needs them, see above."""
    return (frequencies - 1).astype(np.float32)


def from_cdf(cdf: Floats) -> npt.NDArray[np.float32]:
    """Tables, as constriction takes them, from distribution functions.

    Symbol i starts at i + floor(F_i (2^24 - K)), so every symbol gets a non-empty interval.

    Args:
        cdf: (M, K - 1), F_1 ... F_{K-1}, the probability of all symbols before the first, second, ... inner border.

    Returns:
        (M, K)
    """
    m, k = len(cdf), cdf.shape[1] + 1
    starts = np.empty((m, k + 1), dtype=np.float64)
    starts[:, 0], starts[:, -1] = 0, TOTAL - k
    np.floor(cdf * (TOTAL - k), out=starts[:, 1:-1])
    # a computed distribution function may decrease by a last bit
    np.maximum.accumulate(starts, axis=1, out=starts)
    return np.diff(starts, axis=1).astype(np.float32)


def from_counts(counts: Integers, total: int) -> Integers:
    """Frequencies of at least 1 with the sum `total`, proportional to counts; integer arithmetic only."""
    k, n = len(counts), max(1, int(counts.sum()))
    before = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    starts = np.arange(k + 1) + before * (total - k) // n
    starts[-1] = total
    found: Integers = np.diff(starts)
    return found


class Stack:
    """An ANS coder (Duda 2013, https://arxiv.org/abs/1311.2540) from which bits can be taken: last in, first out.

    Args:
        words: the initial content.
        seed: source of the bits that `reserve` puts under the stack; None for a stack that is only decoded.
    """

    def __init__(self, words: Words | None = None, seed: bytes | None = None) -> None:
        self._ans = constriction_stream().stack.AnsCoder
        self._seed = seed
        if words is None:
            # sealed: a last word of 1 keeps zero words below it
            self._coder = self._ans(initial_words(seed or b"", 2), seal=True)
        else:
            self._coder = self._ans(words)
        self.given = self.untouched = 2 if words is None else 0

    def reserve(self, symbols: int) -> None:
        """Put initial bits under the stack, so that it cannot run empty while this many symbols are taken from it."""
        missing = symbols * PRECISION // 32 + 4 - self._coder.num_words()
        if missing > 0:
            below = initial_words(self._seed or b"", self.given + missing)[:missing]
            self._coder = self._ans(np.concatenate([below, self._coder.get_compressed()]))
            self.given += missing
            self.untouched += missing

    def push(self, symbols: npt.NDArray[np.int32], table: Rows, k: int) -> None:
        """Encode symbols (M,), each with a table of k frequencies."""
        family, size = constriction_stream().model.Categorical(perfect=False), max(1, MAX_ENTRIES // k)
        for start in reversed(range(0, len(symbols), size)):
            rows = slice(start, min(start + size, len(symbols)))
            self._coder.encode_reverse(symbols[rows], family, table(rows))

    def pop(self, m: int, table: Rows, k: int) -> npt.NDArray[np.int32]:
        """Decode m symbols, each with a table of k frequencies."""
        family, size = constriction_stream().model.Categorical(perfect=False), max(1, MAX_ENTRIES // k)
        parts = [self._coder.decode(family, table(slice(i, min(i + size, m)))) for i in range(0, m, size)]
        self._note()
        return np.concatenate(parts)

    def push_uniform(self, symbols: npt.NDArray[np.int32], bits: int) -> None:
        """Encode symbols that are uniform over 2^bits values."""
        self._coder.encode_reverse(symbols, constriction_stream().model.Uniform(1 << bits))

    def pop_uniform(self, m: int, bits: int) -> npt.NDArray[np.int32]:
        """Decode m symbols that are uniform over 2^bits values."""
        found: npt.NDArray[np.int32] = self._coder.decode(constriction_stream().model.Uniform(1 << bits), m)
        self._note()
        return found

    def _note(self) -> None:
        # the top two words are the coder's state
        self.untouched = max(0, min(self.untouched, self._coder.num_words() - 2))

    @property
    def is_exhausted(self) -> bool:
        """Whether less is left than after any `encode`: then decoding would not return encoded symbols."""
        return bool(self._coder.num_words() < 2)

    @property
    def bits(self) -> int:
        """Number of bits on the stack, including initial bits."""
        return int(self._coder.num_valid_bits())

    def words(self) -> Words:
        """The content of the stack, without the initial bits that were not used."""
        found: Words = self._coder.get_compressed()[self.untouched :]
        return found

    def unseal(self) -> Words | None:
        """The initial words if nothing else is left; otherwise None."""
        try:
            found: Words = self._coder.get_compressed(unseal=True)
        except Exception:  # an assertion of constriction
            return None
        return found


def initial_words(seed: bytes, n: int) -> Words:
    """Random words determined by a seed; the last of n are the same for every n."""
    words = np.frombuffer(hashlib.shake_256(seed).digest(4 * n), dtype="<u4").astype(np.uint32)
    return words[::-1].copy()


def to_bytes(words: Words) -> bytes:
    """Words as bytes, the lowest byte first."""
    return words.astype("<u4").tobytes()


def from_bytes(content: bytes) -> Words:
    """Words from bytes; an incomplete word at the end is dropped."""
    return np.frombuffer(content, dtype="<u4", count=len(content) // 4).astype(np.uint32)


# by hand: the state s = 2 * 2^32 + 1 is below f * 2^40 = 2^40, so no word is output; s <- (s // 1) 2^24 + 2^24 - 1 =
# 2^57 + 2^25 - 1; that is above 2^40, so its low word is output and s <- 2^25; finally s <- 2^25 * 2^24 + 5
_KNOWN = [2**25 - 1, 5, 2**17]
