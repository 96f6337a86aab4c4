"""Codes of any model, quantised and entropy-coded under histograms.

Dimension d of a code becomes the integer q = round((z_d - offset_d) / step_d), and is restored as offset_d + q step_d.

Steps: rounding adds an error of step^2 / 12 to a dimension (Bennett 1948). The decoder multiplies it by s_d^2, the
squared sensitivity E ||d g / d z_d||^2, in the output. At a high rate, it is optimal that every dimension adds the same
error (reverse water-filling, Cover & Thomas, Elements of Information Theory, 10.3.3), so

    step_d = 2^-quality R / s_d,        R = max_d s_d deviation_d

At quality 0, the step of the most important dimension is its standard deviation. A dimension that the decoder ignores
gets a large step and hence no bits. One more unit of quality adds one bit to each dimension that matters.

Histograms: the values of q in the codes used for fitting, in bins between their quantiles; a frequent value has a bin
of one value. The probability of a bin is a multiple of 2^-12; within a bin all values are equally likely. So a
table stays small however fine the steps are. Tables are stored in the file as integers.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aezoo.errors import AezooError
from aezoo.tasks.codec import tables

Floats = npt.NDArray[np.float32]
Symbols = npt.NDArray[np.int64]
Decode = Callable[[Floats], npt.NDArray[Any]]
Slopes = Callable[[Floats, Decode, npt.NDArray[np.float64]], npt.NDArray[np.float64]]
STEPS = ("fitted", "deviation")
_SHARE_BITS = 12  # a bin's share is a multiple of 2^-12
_MAX_BINS = 64
_MAX_VALUES = 2**20  # in one bin, so that no value has a probability below 2^-32
_MAX_PROBES = 2**14
# offset, step, number of bins and lowest value of a dimension; width and share of a bin
_DIMENSION = np.dtype([("offset", "<f4"), ("step", "<f4"), ("bins", "<u2"), ("low", "<i4")])
_BIN = np.dtype([("width", "<u4"), ("share", "<u2")])


@dataclass(frozen=True)
class ScalarQuantiser:
    """Offset and step of each dimension, (D,); a step of 0 fixes the dimension at its offset."""

    offset: Floats
    step: Floats

    @classmethod
    def fit(
        cls, codes: Floats, decode: Decode, quality: float, steps: str = "fitted", slopes: Slopes | None = None
    ) -> "ScalarQuantiser":
        """Fit to codes.

        Args:
            codes: (N, D).
            decode: maps codes to outputs.
            quality: bits, see above.
            steps: fitted, by the decoder's sensitivity as above; or deviation, step_d = 2^-quality deviation_d.
            slopes: another measure of the sensitivity than `sensitivity`.
        """
        # one of the values, so that a dimension that is constant, or mostly 0, is restored exactly
        offset = np.quantile(codes, 0.5, axis=0, method="lower").astype(np.float32)
        deviation = codes.std(axis=0, dtype=np.float64)
        if steps == "deviation":
            return cls(offset, (deviation * 2.0**-quality).astype(np.float32))
        slope = (slopes or sensitivity)(codes, decode, deviation)
        scale = float(np.max(slope * deviation))
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.where(slope * deviation > 0, 2.0**-quality * scale / slope, 0)
        # the limit of float32; a dimension with such a step is never coded
        return cls(offset, np.where(step < 1e30, step, 0).astype(np.float32))

    def symbols(self, codes: Floats) -> Symbols:
        """(n, D) numbers -> (n, D) integers.

        Raises:
            AezooError: the steps are too small for these numbers.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            q = np.rint((codes.astype(np.float64) - self.offset) / self.step.astype(np.float64))
        q = np.where(self.step > 0, q, 0)
        if not (np.abs(q) < 2**31).all():
            raise AezooError("the steps are too small for these codes, or codes are NaN: give a lower quality")
        return q.astype(np.int64)

    def codes(self, symbols: Symbols) -> Floats:
        """(n, D) integers -> (n, D) numbers; one product and one sum in float64, the same on every machine."""
        with np.errstate(over="ignore"):  # for forged files
            return (self.offset.astype(np.float64) + symbols * self.step.astype(np.float64)).astype(np.float32)


def sensitivity(codes: Floats, decode: Decode, deviation: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """s_d, the root mean square of ||g(z + h e_d) - g(z)|| / h with h a quarter of the deviation, over a few codes."""
    d = codes.shape[1]
    subset = codes[np.linspace(0, len(codes) - 1, max(1, min(len(codes), 32, _MAX_PROBES // d))).astype(int)]
    base = decode(subset).reshape(len(subset), -1).astype(np.float64)
    result = np.zeros(d)
    for i in np.flatnonzero(deviation > 0):
        perturbed = subset.copy()
        perturbed[:, i] += 0.25 * deviation[i]
        change = decode(perturbed).reshape(len(subset), -1) - base
        result[i] = math.sqrt(float((change**2).sum(1).mean())) / (0.25 * deviation[i])
    return result


@dataclass(frozen=True)
class Histogram:
    """Probabilities of integers in one dimension.

    Attributes:
        low: the lowest integer.
        width: number of integers in each bin.
        share: probability of each bin, in units of 2^-12.
    """

    low: int
    width: npt.NDArray[np.int64]
    share: npt.NDArray[np.int64]

    @classmethod
    def fit(cls, values: Symbols, low: int, high: int, bins: int) -> "Histogram":
        """Fit to integers.

        Args:
            values: (N,).
            low: an integer that must be possible, like all between it, `high` and the values.
            high: another one.
            bins: number of bins, if no integer is frequent.
        """
        ordered = np.sort(values)
        low, high = min(low, int(ordered[0])), max(high, int(ordered[-1]))
        if high - low < bins:
            borders = np.arange(low, high + 2)
        else:
            inner = ordered[np.arange(1, bins) * len(ordered) // bins]
            frequent = inner[:-1][inner[:-1] == inner[1:]]
            borders = np.unique(np.concatenate([[low], inner, frequent + 1, [high + 1]]))
        width = np.diff(borders)
        if width.max() > _MAX_VALUES:
            raise AezooError(f"a histogram would have {high - low:,} values: give a lower quality")
        counts = np.diff(np.searchsorted(ordered, borders))
        return cls(low, width, tables.from_counts(counts, 1 << _SHARE_BITS))

    def bits(self, values: Symbols) -> float:
        """The code length of integers, sum of -log2 p."""
        index = self._bin_index(values)
        return float(np.sum(_SHARE_BITS - np.log2(self.share[index]) + np.log2(self.width[index])))

    def encode(self, coder: Any, values: Symbols) -> None:
        """Put values (n,) into a range coder: their bins, then their positions in bins of more than one integer."""
        index = self._bin_index(values)
        if len(self.width) > 1:
            coder.encode(index.astype(np.int32), self._model())
        position = values - self.low - self._bin_starts[index]
        wide = self.width[index] > 1
        if wide.any():
            coder.encode(
                position[wide].astype(np.int32), tables.constriction_stream().model.Uniform(), self._widths(index[wide])
            )

    def decode(self, coder: Any, n: int) -> Symbols:
        """Decode the n values that `encode` has encoded."""
        index = coder.decode(self._model(), n).astype(np.int64) if len(self.width) > 1 else np.zeros(n, np.int64)
        values = self.low + self._bin_starts[index]
        wide = self.width[index] > 1
        if wide.any():
            values[wide] += coder.decode(tables.constriction_stream().model.Uniform(), self._widths(index[wide]))
        found: Symbols = values
        return found

    @property
    def _bin_starts(self) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = np.cumsum(self.width) - self.width
        return found

    def _bin_index(self, values: Symbols) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = np.searchsorted(self._bin_starts, values - self.low, side="right") - 1
        return found

    def _model(self) -> Any:
        return tables.constriction_stream().model.Categorical(
            tables.to_weights(self.share << (tables.PRECISION - _SHARE_BITS)), perfect=False
        )

    def _widths(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        return self.width[index].astype(np.int32)


@dataclass(frozen=True)
class Codec:
    """A quantiser, and a histogram for each dimension."""

    quantiser: ScalarQuantiser
    histograms: list[Histogram]

    @classmethod
    def fit(cls, codes: Floats, quantiser: ScalarQuantiser, low: Floats, high: Floats, n: int) -> "Codec":
        """Fit histograms to codes.

        Args:
            codes: (N, D).
            quantiser: fitted.
            low: (D,) the smallest values that must be possible.
            high: (D,) the largest.
            n: number of codes to be coded; a table with more bins would cost more than it saves.
        """
        bins = max(2, min(_MAX_BINS, math.ceil(2 * n ** (1 / 3))))  # Rice's rule
        symbols = quantiser.symbols(codes)
        lows, highs = quantiser.symbols(low[None])[0], quantiser.symbols(high[None])[0]
        return cls(
            quantiser,
            [Histogram.fit(symbols[:, d], int(lows[d]), int(highs[d]), bins) for d in range(codes.shape[1])],
        )

    def encode(self, symbols: Symbols) -> bytes:
        """Encode (n, D) integers as bytes."""
        coder = tables.constriction_stream().queue.RangeEncoder()
        for d, histogram in enumerate(self.histograms):
            histogram.encode(coder, symbols[:, d])
        return tables.to_bytes(coder.get_compressed())

    def decodes_to(self, content: bytes, symbols: Symbols) -> bool:
        """Whether bytes decode to (n, D) integers."""
        return np.array_equal(self.decode(content, len(symbols)), symbols)

    def decode(self, content: bytes, n: int) -> Symbols:
        """Decode bytes to (n, D) integers."""
        coder = tables.constriction_stream().queue.RangeDecoder(tables.from_bytes(content))
        found = np.empty((n, len(self.histograms)), dtype=np.int64)
        for d, histogram in enumerate(self.histograms):
            found[:, d] = histogram.decode(coder, n)
        return found

    def to_bytes(self) -> bytes:
        """Steps and tables, as stored in a file."""
        dimensions = np.empty(len(self.histograms), _DIMENSION)
        dimensions["offset"], dimensions["step"] = self.quantiser.offset, self.quantiser.step
        dimensions["bins"] = [len(histogram.width) for histogram in self.histograms]
        dimensions["low"] = [histogram.low for histogram in self.histograms]
        bins = np.empty(int(dimensions["bins"].sum(dtype=np.int64)), _BIN)
        bins["width"] = np.concatenate([histogram.width for histogram in self.histograms])
        bins["share"] = np.concatenate([histogram.share for histogram in self.histograms])
        # field by field, which compresses better
        parts = [part[name].tobytes() for part in (dimensions, bins) for name in part.dtype.names or ()]
        return zlib.compress(b"".join(parts), 9)

    @classmethod
    def from_bytes(cls, content: bytes, d: int) -> "Codec":
        """The inverse of `to_bytes`, for d dimensions.

        Raises:
            ValueError: the content is not from `to_bytes`.
        """
        max_size = d * (_DIMENSION.itemsize + 2 * _MAX_BINS * _BIN.itemsize)
        unpacked = zlib.decompressobj().decompress(content, max_size + 1)
        dimensions, used = _columns(unpacked, 0, d, _DIMENSION)
        total = int(dimensions["bins"].sum(dtype=np.int64))
        bins, used = _columns(unpacked, used, total, _BIN)
        first = np.cumsum(dimensions["bins"], dtype=np.int64) - dimensions["bins"]
        is_valid = used == len(unpacked) and (dimensions["bins"] >= 1).all() and (bins["share"] >= 1).all()
        is_valid = is_valid and (bins["width"] >= 1).all() and (bins["width"] <= _MAX_VALUES).all()
        if not is_valid or (np.add.reduceat(bins["share"].astype(np.int64), first) != 1 << _SHARE_BITS).any():
            raise ValueError("tables are damaged")
        if not (np.isfinite(dimensions["offset"]).all() and np.isfinite(dimensions["step"]).all()):
            raise ValueError("steps are damaged")
        width, share = bins["width"].astype(np.int64), bins["share"].astype(np.int64)
        histograms = [
            Histogram(int(low), width[start : start + size], share[start : start + size])
            for low, start, size in zip(dimensions["low"], first, dimensions["bins"], strict=True)
        ]
        return cls(ScalarQuantiser(dimensions["offset"].copy(), dimensions["step"].copy()), histograms)


def _columns(content: bytes, start: int, n: int, kind: np.dtype[Any]) -> tuple[npt.NDArray[Any], int]:
    """Records that were written field by field, and the position where they end."""
    if start + n * kind.itemsize > len(content):
        raise ValueError("tables are cut off")
    found = np.empty(n, kind)
    for name in kind.names or ():
        part = kind[name]
        found[name] = np.frombuffer(content, part, n, start)
        start += n * part.itemsize
    return found, start
