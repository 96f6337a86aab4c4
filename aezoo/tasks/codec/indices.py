"""Indices of a model's code, entropy-coded with tables that are stored in the file.

A model whose code consists of indices has a fixed rate: nothing is quantised again, and the file decodes to
decode_indices(encode_indices(x)). autoregressive.py codes indices with a prior if the model has one.

There is one table for each codebook, over all its positions in all samples. With c_k of N indices equal to k, such a
table needs at least N H bits, H = -sum_k (c_k / N) log2 (c_k / N). The file contains a level for every k,

    l_k = 1 + round(r (24 + log2 (c_k / N)))    r in {1, 2, 4, 8}    l_k = 0 where k never occurs

packed by DEFLATE. Integer powers 2^(l_k / r) give the table in units of 2^-24. A coarse r makes a small table and
costs little otherwise, since a share that is wrong by a factor 1 + e costs e^2 / 2 nats: 0.03 bits per index for r = 1,
0.0005 for r = 8. The smallest total is used, which can also be no table and log2 K bits per index. With more than 2^16
codes in a codebook, indices are written as digits of at most 16 bits, lowest first, with one table for each digit.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.bases.entropy_coded import EntropyCoded
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.errors import AezooError
from aezoo.tasks.codec import tables
from aezoo.tasks.samples import reference_tensor
from aezoo.training.model_names import display_name

Indices = npt.NDArray[np.int64]
_DIGIT_BITS = 16  # bits of a digit, and of the largest table
_RESOLUTIONS = (0, 1, 2, 3)  # log2 r
_FRACTION_BITS = 8  # levels are rounded to 2^-8 of the smallest share


class TokenPrior(Protocol):
    """A distribution of a model's indices, token by token; see `aezoo.bases.token_prior`."""

    def to_tokens(self, indices: Tensor) -> Tensor:
        """(B, *index_shape) -> (B, T), the indices in the order in which they are sampled."""
        ...

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, *index_shape)."""
        ...

    def incremental_logits(self) -> Callable[[Tensor, int], Tensor]:
        """A function of (B, T) and increasing t: the logits of token t, (B, K), given the tokens before it."""
        ...

    def log_prob(self, indices: Tensor) -> Tensor:
        """(B, *index_shape) -> (B,), in nats."""
        ...


def lossy_mode(model: Autoencoder) -> str:
    """The lossy mode that codes a model: learned, prior, indices or lossy."""
    if isinstance(model, EntropyCoded):
        return "learned"
    if not isinstance(model, DiscreteAutoencoder):
        return "lossy"
    # checks for the method, so that priors of plug-ins count and no import is needed
    return "prior" if callable(getattr(model, "incremental_logits", None)) else "indices"


class IndexCodebook(NamedTuple):
    """Columns of a sample's indices, (D,), that come from one codebook, and its number of codes."""

    columns: Indices
    size: int


def model_codebooks(model: DiscreteAutoencoder) -> list[IndexCodebook]:
    """The codebooks of a model, and which of a sample's indices belong to them.

    Raises:
        AezooError: the indices of the codebooks are not those of the sample.
    """
    d = math.prod(model.index_shape)
    positions = torch.arange(d, device=model.device).reshape(1, *model.index_shape)
    codebooks = [
        IndexCodebook(part[0, q].flatten().cpu().numpy(), size)
        for part, sizes in model.codebooks(positions).values()
        for q, size in enumerate(sizes)
    ]
    if not np.array_equal(np.sort(np.concatenate([codebook.columns for codebook in codebooks])), np.arange(d)):
        raise AezooError(
            f"the codebooks of {display_name(type(model))} must hold each index of a sample once: fix its `codebooks`"
        )
    return codebooks


def index_sizes(model: DiscreteAutoencoder) -> Indices:
    """K of each index of a sample, (D,)."""
    sizes = np.empty(math.prod(model.index_shape), dtype=np.int64)
    for columns, size in model_codebooks(model):
        sizes[columns] = size
    return sizes


def encode(model: DiscreteAutoencoder, x: Tensor, sizes: Indices) -> Indices:
    """Indices of samples, (n, *input_shape) -> (n, D).

    Raises:
        AezooError: an index is not in its codebook.
    """
    found: Indices = model.encode_indices(x.to(reference_tensor(model))).flatten(1).cpu().numpy()
    if not ((found >= 0) & (found < sizes)).all():
        raise AezooError(f"{display_name(type(model))} gives indices that are not in its codebooks: train it again")
    return found


def decode(model: DiscreteAutoencoder, indices: Indices, block: int) -> Any:
    """Outputs (n, *input_shape), float32, from indices (n, D); the model processes `block` samples at a time."""
    parts = [
        model.decode_indices(on_device(model, indices[start : start + block])).float().cpu().numpy()
        for start in range(0, len(indices), block)
    ]
    return np.concatenate(parts)


def on_device(model: DiscreteAutoencoder, indices: Indices) -> Tensor:
    """Convert (n, D) to the form that the model takes, (n, *index_shape)."""
    return torch.from_numpy(indices).to(model.device).unflatten(1, model.index_shape)


# ---- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndexTable:
    """Probabilities of one digit.

    Attributes:
        size: number of values that the digit can have.
        resolution: log2 r, for its levels.
        levels: (size,), see above; None if all values are equally likely.
    """

    size: int
    resolution: int = 0
    levels: npt.NDArray[np.uint8] | None = None

    @classmethod
    def fit(cls, counts: Indices) -> "IndexTable":
        """The table with the smallest total size, itself included, for the counts of each value, (size,)."""
        candidates = [cls(len(counts))]
        if len(counts) > 1 and counts.any():
            share = np.log2(np.maximum(counts, 1) / counts.sum())
            for resolution in _RESOLUTIONS:
                levels = np.maximum(1, 1 + np.rint((1 << resolution) * (tables.PRECISION + share)))
                candidates.append(cls(len(counts), resolution, np.where(counts > 0, levels, 0).astype(np.uint8)))
        return min(candidates, key=lambda table: table.bits(counts) + 8 * len(_pack_tables([table])))

    def bits(self, counts: Indices) -> float:
        """The code length of values with these counts, sum of -log2 p."""
        if self.levels is None:
            return float(counts.sum() * math.log2(self.size))
        occurs = counts > 0
        return float(np.sum(counts[occurs] * (tables.PRECISION - np.log2(self.frequencies()[occurs]))))

    def frequencies(self) -> tables.Integers:
        """Frequencies in units of 2^-24, from levels.

        Raises:
            ValueError: the levels are not those of a table.
        """
        assert self.levels is not None
        powers = np.array(_powers(self.resolution), dtype=np.int64)
        if self.levels.max(initial=0) >= len(powers):
            raise ValueError("a level is too high")
        weights = powers[self.levels]
        if weights.sum() > 2 << (tables.PRECISION + _FRACTION_BITS):
            raise ValueError("levels are too high")
        return tables.from_counts(weights, tables.TOTAL)

    def model(self) -> Any:
        """The table as a model of constriction."""
        if self.levels is None:
            return tables.constriction_stream().model.Uniform(self.size)
        return tables.constriction_stream().model.Categorical(tables.to_weights(self.frequencies()), perfect=False)


def _powers(resolution: int) -> list[int]:
    """The values of levels: 0, then 2^(8 + (l - 1) / r), rounded down by integer arithmetic."""
    powers = [0]
    for level in range(1 + (tables.PRECISION << resolution)):
        power = 1 << (level + (_FRACTION_BITS << resolution))
        for _ in range(resolution):
            power = math.isqrt(power)
        powers.append(power)
    return powers


def _pack_tables(stored_tables: list[IndexTable]) -> bytes:
    """Tables as stored in a file: a byte for each, 0 or 1 + fine, then all levels, if there are any, packed."""
    kinds = bytes(0 if table.levels is None else 1 + table.resolution for table in stored_tables)
    levels = b"".join(table.levels.tobytes() for table in stored_tables if table.levels is not None)
    pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return kinds + (pack.compress(levels) + pack.flush() if levels else b"")


def digit_sizes(size: int) -> list[int]:
    """Number of values of each digit of an index below `size`, lowest digit first."""
    bits = (size - 1).bit_length()
    count = max(1, -(-bits // _DIGIT_BITS))
    if count == 1:
        return [size]
    low = -(-bits // count)
    return [1 << low] * (count - 1) + [-(-size // (1 << low * (count - 1)))]


@dataclass(frozen=True)
class TableCoder:
    """Codes indices under a table for each codebook, or for each digit of a large codebook.

    Attributes:
        codebooks: as returned by `model_codebooks`.
        digit_tables: tables of all digits of all codebooks.
        bits: size of the indices that it was fitted to, without the tables.
        least: N H of their digits.
    """

    mode: ClassVar[str] = "indices"
    codebooks: list[IndexCodebook]
    digit_tables: list[IndexTable]
    bits: float = 0.0
    entropy_bits: float = 0.0

    @classmethod
    def fit(cls, codebooks: list[IndexCodebook], parts: Iterator[Indices]) -> "TableCoder":
        """Fit tables to indices, which come in parts (n, D)."""
        return cls.fit_sizes(codebooks, ((codebooks, part) for part in parts))

    @classmethod
    def fit_sizes(
        cls, codebooks: list[IndexCodebook], parts: Iterable[tuple[list[IndexCodebook], Indices]]
    ) -> "TableCoder":
        """Fit tables to indices of samples of several sizes: each part has the same codebooks at other positions."""
        counts = [np.zeros(base, dtype=np.int64) for codebook in codebooks for base in digit_sizes(codebook.size)]
        for places, part in parts:
            for count, digit in zip(counts, _digits(places, part), strict=True):
                count += np.bincount(digit, minlength=len(count))
        digit_tables = [IndexTable.fit(count) for count in counts]
        bits = sum(table.bits(count) for table, count in zip(digit_tables, counts, strict=True))
        return cls(codebooks, digit_tables, bits, sum(_entropy_bits(count) for count in counts))

    def encode(self, indices: Indices) -> bytes:
        """Encode (n, D) indices as bytes."""
        coder = tables.constriction_stream().queue.RangeEncoder()
        for table, digit in zip(self.digit_tables, _digits(self.codebooks, indices), strict=True):
            if table.size > 1:
                coder.encode(digit.astype(np.int32), table.model())
        return tables.to_bytes(coder.get_compressed())

    def decodes_to(self, content: bytes, indices: Indices) -> bool:
        """Whether bytes decode to (n, D) indices."""
        return np.array_equal(self.decode(content, len(indices)), indices)

    def decode(self, content: bytes, n: int) -> Indices:
        """Decode bytes to (n, D) indices.

        Raises:
            ValueError: the digits do not form an index of a codebook.
        """
        coder = tables.constriction_stream().queue.RangeDecoder(tables.from_bytes(content))
        decoded = np.empty((n, sum(len(codebook.columns) for codebook in self.codebooks)), dtype=np.int64)
        digit_tables = iter(self.digit_tables)
        for columns, size in self.codebooks:
            index, radix = np.zeros(n * len(columns), dtype=np.int64), 1
            for base in digit_sizes(size):
                table = next(digit_tables)
                if base > 1:
                    index += radix * coder.decode(table.model(), len(index)).astype(np.int64)
                radix *= base
            if index.max(initial=0) >= size:
                raise ValueError("an index is not in its codebook")
            decoded[:, columns] = index.reshape(n, -1)
        return decoded

    def to_bytes(self) -> bytes:
        """The tables as stored in a file."""
        return _pack_tables(self.digit_tables)

    @classmethod
    def from_bytes(cls, content: bytes, codebooks: list[IndexCodebook]) -> "TableCoder":
        """The inverse of `to_bytes`.

        Raises:
            ValueError: the content is not from `to_bytes`.
        """
        sizes = [base for codebook in codebooks for base in digit_sizes(codebook.size)]
        kinds = content[: len(sizes)]
        if len(kinds) < len(sizes) or max(kinds) > len(_RESOLUTIONS):
            raise ValueError("tables are damaged")
        total = sum(size for size, kind in zip(sizes, kinds, strict=True) if kind)
        rest, levels = content[len(sizes) :], b""
        if total:
            unpack = zlib.decompressobj(-zlib.MAX_WBITS)
            levels = unpack.decompress(rest, total + 1)
            rest = unpack.unused_data if unpack.eof else rest
        if len(levels) != total or rest:
            raise ValueError("tables are cut off, or followed by other data")
        digit_tables, start = [], 0
        for size, kind in zip(sizes, kinds, strict=True):
            if kind:
                digit_tables.append(IndexTable(size, kind - 1, np.frombuffer(levels, np.uint8, size, start)))
                digit_tables[-1].frequencies()
                start += size
            else:
                digit_tables.append(IndexTable(size))
        return cls(codebooks, digit_tables)


def _digits(codebooks: list[IndexCodebook], indices: Indices) -> Iterator[Indices]:
    """The digits of all codebooks for indices (n, D), each (n x columns,)."""
    for columns, size in codebooks:
        rest = np.ascontiguousarray(indices[:, columns]).reshape(-1)
        for base in digit_sizes(size):
            yield rest % base
            rest = rest // base


def _entropy_bits(counts: Indices) -> float:
    """N H."""
    positive = counts[counts > 0].astype(np.float64)
    return float(np.sum(positive * np.log2(positive.sum() / positive)))
