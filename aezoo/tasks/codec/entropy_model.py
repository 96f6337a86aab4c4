"""Integers of a model's code, entropy-coded with learned distributions; see `aezoo.bases.entropy_coded`.

    v^ = m + k    P(k) = F(m + k + 1/2) - F(m + k - 1/2)    in as many bits as -log2 P

Writer and reader pass the same `code_latents` of the model over blocks of samples of the same size, so both compute the
same distributions. A distribution selects one of the model's tables: a learned one for each channel, or that of the
nearest of 64 scales of a Gaussian, in multiples of 2^-24. Integers under one table are coded together, in
increasing order of tables. An integer outside its table is coded as an escape, the last entry, and 32 bits after the
integers of that table. Under a mixture, each integer has its own table. Integers with tables of one size are coded
together, 2^20 table entries at a time.

A machine that computes other distributions decodes other integers: the first 8 bytes of a frame are from their digest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.bases.entropy_coded import (
    Distribution,
    EntropyCoded,
    Mixtures,
    ProbabilityTable,
    SymbolReader,
    read_in_order,
)
from aezoo.errors import AezooError
from aezoo.tasks.codec import tables
from aezoo.tasks.codec.autoregressive import DIGEST, digest
from aezoo.tasks.samples import reference_tensor
from aezoo.training.model_names import display_name

Symbols = npt.NDArray[np.int64]
_HALF_BITS = 16  # bits of each half of an escaped integer
_MAX_SYMBOL = 2**31
_MAX_ENTRIES = 2**20  # table entries at a time, 8 MiB in float64; part of the format, since their escapes follow them
# raised by constriction or by rANS: no integers have these bits
_NO_SUCH_BITS = (AssertionError, ValueError)


class _SymbolTable(NamedTuple):
    """The table or tables that integers are coded under.

    Attributes:
        low: the integer of the first entry.
        size: number of entries without the escape.
        model: model of constriction.
        rows: the table of each integer, as constriction takes it; None if all share one.
    """

    low: int
    size: int
    model: Any
    rows: npt.NDArray[np.float32] | None = None


# integers with one table or with a table each: those to encode, or as many zeros to decode
Code = Callable[[_SymbolTable, Symbols], Symbols]


@contextmanager
def at_quality(model: EntropyCoded, quality: float) -> Iterator[None]:
    """Set the model to another quality within the context, and restore the old one afterwards.

    Raises:
        AezooError: the model has no such quality.
    """
    if not 0 <= quality <= model.max_quality:
        raise AezooError(f"quality is {quality:g}: give a number from 0 to {model.max_quality:g} for this model")
    before = model.quality
    try:
        model.quality = quality
        yield
    finally:
        model.quality = before


def n_symbols(model: EntropyCoded) -> int:
    """T, number of integers that represent a sample."""
    coded_parts: list[int] = []

    def read(distribution: Distribution) -> Tensor:
        coded_parts.append(distribution.mean.numel())
        return torch.zeros_like(distribution.mean)

    model.code_latents(SymbolReader(read), None, 1)
    return sum(coded_parts)


def encode(model: EntropyCoded, x: Tensor) -> Symbols:
    """Integers of samples, (n, *input_shape) -> (n, T).

    Raises:
        AezooError: codes are not finite, or too large.
    """
    result: Symbols = model.encode_symbols(x.to(reference_tensor(model))).cpu().numpy()
    if not ((result > -_MAX_SYMBOL) & (result < _MAX_SYMBOL)).all():  # -2^40 means NaN
        raise AezooError(
            f"{display_name(type(model))} gives codes that are NaN, infinite or above 2^31: train it again"
        )
    return result


def decode(model: EntropyCoded, symbols: Symbols, block: int) -> Any:
    """Outputs (n, *input_shape), float32, from integers (n, T); the model processes `block` samples at a time."""
    parts = []
    for start in range(0, len(symbols), block):
        z = model.codes(torch.from_numpy(symbols[start : start + block]).to(model.device))
        parts.append(model.decode(z.to(reference_tensor(model))).float().cpu().numpy())
    return np.concatenate(parts)


class EntropyModelCoder:
    """Codes the integers of a model.

    Args:
        model: a model with distributions.
        block: samples that it processes at a time.
    """

    mode: ClassVar[str] = "learned"

    def __init__(self, model: EntropyCoded, block: int) -> None:
        self._model, self._block = model, block
        self._tables = [_shared_table(table) for table in model.tables()]

    def encode(self, symbols: Symbols) -> bytes:
        """Encode (n, T) integers as bytes."""
        coder, halves = (
            tables.constriction_stream().queue.RangeEncoder(),
            tables.constriction_stream().model.Uniform(1 << _HALF_BITS),
        )

        def code(symbol_table: _SymbolTable, values: Symbols) -> Symbols:
            entries = values - symbol_table.low
            escaped = (entries < 0) | (entries >= symbol_table.size)
            rows = () if symbol_table.rows is None else (symbol_table.rows,)
            coder.encode(np.where(escaped, symbol_table.size, entries).astype(np.int32), symbol_table.model, *rows)
            if escaped.any():
                coder.encode(_split_halves(values[escaped]), halves)
            return values

        for start in range(0, len(symbols), self._block):
            part = torch.from_numpy(symbols[start : start + self._block])
            self._code_block(len(part), code, read_in_order(part))
        return digest(symbols) + tables.to_bytes(coder.get_compressed())

    def decode(self, content: bytes, n: int) -> Symbols | None:
        """Decode bytes to (n, T) integers; None if they are not what was encoded."""
        try:
            symbols = np.concatenate([*self._blocks(content, n)])
        except _NO_SUCH_BITS:
            return None
        return symbols if digest(symbols) == content[:DIGEST] else None

    def decodes_to(self, content: bytes, symbols: Symbols) -> bool:
        """Whether the first block of bytes decodes to (n, T) integers."""
        try:
            first = next(self._blocks(content, len(symbols)))
        except _NO_SUCH_BITS:
            return False
        return np.array_equal(first, symbols[: self._block])

    def bound(self, symbols: Symbols) -> float:
        """-log2 P of (n, T) integers, by the distributions themselves."""
        bits = 0.0
        for start in range(0, len(symbols), self._block):
            part = torch.from_numpy(symbols[start : start + self._block]).to(self._model.device)
            coder = SymbolReader(read_in_order(part))
            self._model.code_latents(coder, None, len(part))
            bits += float(coder.rate_B.cpu().double().sum()) / np.log(2)
        return bits

    def _blocks(self, content: bytes, n: int) -> Iterator[Symbols]:
        coder = tables.constriction_stream().queue.RangeDecoder(tables.from_bytes(content[DIGEST:]))
        halves = tables.constriction_stream().model.Uniform(1 << _HALF_BITS)

        def code(symbol_table: _SymbolTable, values: Symbols) -> Symbols:
            entries = coder.decode(
                symbol_table.model, len(values) if symbol_table.rows is None else symbol_table.rows
            ).astype(np.int64)
            escaped = entries == symbol_table.size
            result: Symbols = entries + symbol_table.low
            if escaped.any():
                result[escaped] = _join_halves(coder.decode(halves, 2 * int(escaped.sum())))
            return result

        def unknown(distribution: Distribution) -> Tensor:
            return torch.zeros(distribution.mean.shape, dtype=torch.long)

        for start in range(0, n, self._block):
            yield self._code_block(min(self._block, n - start), code, unknown)

    def _code_block(self, n: int, code: Code, known: Callable[[Distribution], Tensor]) -> Symbols:
        """The integers of a block, (n, T): `code` gets those of one table after another."""
        coded_parts: list[Symbols] = []

        def read(distribution: Distribution) -> Tensor:
            table = distribution.table
            numbers, symbols = (tensor.cpu().numpy().reshape(-1) for tensor in (table, known(distribution)))
            order = np.argsort(numbers, kind="stable")
            first = np.flatnonzero(np.diff(numbers[order], prepend=-1))
            coded = np.empty(len(order), dtype=np.int64)
            for start, end in pairwise([*first, len(order)]):
                for index, symbol_table in self._symbol_tables(
                    distribution, int(numbers[order[start]]), order[start:end]
                ):
                    coded[index] = code(symbol_table, symbols[index])
            coded_parts.append(coded.reshape(n, -1))
            return torch.from_numpy(coded).view(table.shape).to(table.device)

        self._model.code_latents(SymbolReader(read), None, n)
        return np.concatenate(coded_parts, 1)

    def _symbol_tables(
        self, distribution: Distribution, number: int, index: Symbols
    ) -> Iterator[tuple[Symbols, _SymbolTable]]:
        """The tables for the integers at `index`, which share a table number; mixtures give them in several parts."""
        if not isinstance(distribution, Mixtures):
            yield index, self._tables[number]
            return
        family, chunk = (
            tables.constriction_stream().model.Categorical(perfect=False),
            max(1, _MAX_ENTRIES >> (number + 1)),
        )
        for start in range(0, len(index), chunk):
            part = index[start : start + chunk]
            table = distribution.tables_at(number, part)
            yield part, _SymbolTable(table.low, table.mass.shape[1], family, _weights(table.mass))


def _weights(mass: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Tables with their escapes, (N, K) -> (N, K + 1), as constriction takes them."""
    return tables.from_cdf(mass.cumsum(1).clip(0, 1))


def _shared_table(table: ProbabilityTable) -> _SymbolTable:
    model = tables.constriction_stream().model.Categorical(_weights(table.mass[None])[0], perfect=False)
    return _SymbolTable(table.low, len(table.mass), model)


def _split_halves(numbers: Symbols) -> npt.NDArray[np.int32]:
    unsigned = numbers + _MAX_SYMBOL
    return np.stack([unsigned >> _HALF_BITS, unsigned & ((1 << _HALF_BITS) - 1)], 1).reshape(-1).astype(np.int32)


def _join_halves(halves: npt.NDArray[np.int32]) -> Symbols:
    high, low = halves.astype(np.int64).reshape(-1, 2).T
    result: Symbols = (high << _HALF_BITS) + low - _MAX_SYMBOL
    return result
