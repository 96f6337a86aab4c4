"""Integers of a model's code in the bit streams of the library CompressAI.

Its coder is rANS (Duda 2013, https://arxiv.org/abs/1311.2540) in the form of ryg_rans (Giesen 2014, rans64.h): a state
x of 63 bits, words of 32 bits, frequencies f_k of 2^16 with starts c_k. The last integer is encoded first,

    x >= f_k 2^47:  write the low word of x, x <- x >> 32        x <- (x // f_k) 2^16 + c_k + x % f_k

and ends with the two words of x; decoding reads from the end of what was written. An integer outside its table is the
last entry of it, followed by how far outside it is, 2 d above and 2 d - 1 below, as the number of its digits and its
digits, of 4 bits each and of equal probability, the lowest first.

A sample has a stream for the code and, if the model has side information, one for that. `encode_strings` and
`decode_strings` exchange them with CompressAI. A frame of aezoo's file has the digest of its integers, then for each
block the streams of the side information of its samples and those of their codes, each after its size in 4 bytes.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from aezoo.bases.entropy_coded import Distribution, EntropyCoded, SymbolReader, read_in_order
from aezoo.distributions.frequency_tables import PRECISION, FrequencyTables
from aezoo.errors import AezooError
from aezoo.tasks.codec import entropy_model
from aezoo.tasks.codec.autoregressive import DIGEST, digest
from aezoo.tasks.codec.entropy_model import EntropyModelCoder, Symbols
from aezoo.tasks.samples import evaluation_mode
from aezoo.training.model_names import display_name

_LOW = 1 << 31  # smallest state between two integers
_WORD, _WORD_BITS = (1 << 32) - 1, 32
_DIGIT_BITS = 4
_DIGIT = (1 << _DIGIT_BITS) - 1
# of an integer of 32 bits
_MAX_DIGITS = 8
_MAX_SYMBOL = 2**29
_SIZE = 4  # bytes of a stream's size


def encode(symbols: Symbols, rows: Symbols, tables: FrequencyTables) -> bytes:
    """The stream of integers, (T,), each under the table of its row, (T,)."""
    cdf, length, offset = (part.numpy().astype(np.int64) for part in tables)
    last, value = length[rows] - 2, symbols - offset[rows]
    outside = (value < 0) | (value >= last)
    entry = np.where(outside, last, value)
    starts = cdf[rows, entry]
    frequencies = (cdf[rows, entry + 1] - starts).tolist()
    # how far outside, after the entry
    excess = np.where(value < 0, -2 * value - 1, 2 * (value - last))
    state, words = _LOW, list[int]()
    for i, start in zip(range(len(symbols) - 1, -1, -1), starts[::-1].tolist(), strict=True):
        if outside[i]:
            for digit in reversed(_digits(int(excess[i]))):
                if state >= 1 << (63 - _DIGIT_BITS):
                    words.append(state & _WORD)
                    state >>= _WORD_BITS
                state = state << _DIGIT_BITS | digit
        frequency = frequencies[i]
        if state >= frequency << (63 - PRECISION):
            words.append(state & _WORD)
            state >>= _WORD_BITS
        quotient, rest = divmod(state, frequency)
        state = (quotient << PRECISION) + rest + start
    words += [state >> _WORD_BITS, state & _WORD]
    return np.array(words[::-1], dtype="<u4").tobytes()


def _digits(excess: int) -> list[int]:
    """The number of digits of a number, then its digits, the lowest first."""
    count = -(-excess.bit_length() // _DIGIT_BITS)
    return [count, *(excess >> _DIGIT_BITS * i & _DIGIT for i in range(count))]


class Decoder:
    """Reads a stream.

    Args:
        content: the stream.
        tables: the tables as lists, without unused entries at their ends.
        offset: the integer of each table's first entry.
    """

    def __init__(self, content: bytes, tables: list[list[int]], offset: list[int]) -> None:
        self._words = np.frombuffer(content, dtype="<u4", count=len(content) // 4).tolist()[::-1]
        self._tables, self._offset = tables, offset
        low = self._word()
        self._state = self._word() << _WORD_BITS | low

    def decode(self, rows: Sequence[int]) -> list[int]:
        """The next integers, each under the table of its row.

        Raises:
            ValueError: the stream is damaged.
        """
        found, mask = [], (1 << PRECISION) - 1
        for row in rows:
            cdf, state = self._tables[row], self._state
            entry = bisect_right(cdf, state & mask) - 1
            start = cdf[entry]
            state = (cdf[entry + 1] - start) * (state >> PRECISION) + (state & mask) - start
            self._state = state if state >= _LOW else state << _WORD_BITS | self._word()
            last = len(cdf) - 2
            found.append((self._outside(last) if entry == last else entry) + self._offset[row])
        return found

    def _outside(self, last: int) -> int:
        count = self._digit()
        if count > _MAX_DIGITS:
            raise ValueError("an integer has too many digits")
        excess = sum(self._digit() << _DIGIT_BITS * i for i in range(count))
        return -(excess >> 1) - 1 if excess & 1 else (excess >> 1) + last

    def _digit(self) -> int:
        digit, state = self._state & _DIGIT, self._state >> _DIGIT_BITS
        self._state = state if state >= _LOW else state << _WORD_BITS | self._word()
        return digit

    def _word(self) -> int:
        if not self._words:
            raise ValueError("the stream ends too early")
        word: int = self._words.pop()
        return word


class RansCoder(EntropyModelCoder):
    """Codes the integers of a model as CompressAI does, each sample separately.

    Args:
        model: a model with `frequency_tables`.
        block: number of samples that it processes at a time.
    """

    def __init__(self, model: EntropyCoded, block: int) -> None:
        self._model, self._block = model, block
        tables = model.frequency_tables()
        assert tables is not None  # checked by `coder_of`
        self._frequencies = tables
        self._offset: list[int] = tables.offset.tolist()
        self._lists = [row[:n] for row, n in zip(tables.cdf.tolist(), tables.length.tolist(), strict=True)]

    def encode(self, symbols: Symbols) -> bytes:
        content = [digest(symbols)]
        for start in range(0, len(symbols), self._block):
            for stream in itertools.chain(*self.streams(symbols[start : start + self._block])):
                content += [len(stream).to_bytes(_SIZE, "little"), stream]
        return b"".join(content)

    def streams(self, symbols: Symbols) -> list[list[bytes]]:
        """Streams of a block, (n, T) integers: those of the side information, if there is any, and those of the code.

        Raises:
            AezooError: an integer is too large for the format.
        """
        if (abs(symbols) >= _MAX_SYMBOL).any():
            raise AezooError(
                f"{display_name(type(self._model))} gives codes above {_MAX_SYMBOL:,}, which its format cannot store"
            )
        known, rows = torch.from_numpy(symbols), list[Symbols]()
        in_order = read_in_order(known)

        def read(distribution: Distribution) -> Tensor:
            rows.append(distribution.table.flatten(1).cpu().numpy())
            return in_order(distribution)

        self._model.code_latents(SymbolReader(read), None, len(known))
        first = rows[0].shape[1]
        parts = [(symbols[:, :first], rows[0])]
        if len(rows) > 1:
            parts.append((symbols[:, first:], np.concatenate(rows[1:], 1)))
        return [[encode(*sample, self._frequencies) for sample in zip(*part, strict=True)] for part in parts]

    def read_streams(self, streams: Iterator[bytes], n: int) -> Symbols:
        """The integers of a block of n samples, (n, T), from its streams in the order of `streams`.

        Raises:
            ValueError: a stream is damaged, or there are too few.
        """
        found, decoders = list[Symbols](), list[Decoder]()

        def read(distribution: Distribution) -> Tensor:
            if len(found) < 2:  # what follows the first part is the code, in one or in many
                decoders[:] = [Decoder(_next(streams), self._lists, self._offset) for _ in range(n)]
            rows = distribution.table.flatten(1).tolist()
            symbols = [decoder.decode(row) for decoder, row in zip(decoders, rows, strict=True)]
            found.append(np.array(symbols, dtype=np.int64))
            return torch.from_numpy(found[-1]).view(distribution.mean.shape)

        self._model.code_latents(SymbolReader(read), None, n)
        return np.concatenate(found, 1)

    def _blocks(self, content: bytes, n: int) -> Iterator[Symbols]:
        streams = _split(content)
        for start in range(0, n, self._block):
            yield self.read_streams(streams, min(self._block, n - start))


def _next(streams: Iterator[bytes]) -> bytes:
    stream = next(streams, None)
    if stream is None:
        raise ValueError("there are too few streams")
    return stream


def _split(content: bytes) -> Iterator[bytes]:
    position = DIGEST
    while position < len(content):
        start = position + _SIZE
        position = start + int.from_bytes(content[position:start], "little")
        yield content[start:position]


def coder_of(model: EntropyCoded, block: int) -> EntropyModelCoder:
    """The coder of a model's integers.

    Args:
        model: a model with distributions.
        block: number of samples that it processes at a time.
    """
    return (EntropyModelCoder if model.frequency_tables() is None else RansCoder)(model, block)


def encode_strings(model: EntropyCoded, x: Tensor) -> list[list[bytes]]:
    """The streams of pictures, (n, C, H, W), as `strings` in what CompressAI's `compress` returns.

    Each picture is coded separately, so that strings equal those of CompressAI for a batch of one.

    Args:
        model: a `compressai`, of the pictures' size.
        x: the pictures. CompressAI itself takes sides that are multiples of 64; its programs pad others, and
            `compressai` does as they do.

    Raises:
        AezooError: the model writes no such streams.
    """
    strings: list[list[bytes]] = []
    with evaluation_mode(model):
        coder = _strings_coder(model)
        for i in range(len(x)):
            streams = coder.streams(entropy_model.encode(model, x[i : i + 1]))[::-1]
            strings = [known + new for known, new in zip(strings or [[] for _ in streams], streams, strict=True)]
    return strings


def decode_strings(model: EntropyCoded, strings: Sequence[Sequence[bytes]]) -> Tensor:
    """The pictures, (n, C, H, W), of `strings` from CompressAI's `compress` or from `encode_strings`.

    Unlike those of CompressAI's `decompress`, values are not limited to [0, 1].

    Args:
        model: a `compressai`, of the pictures' size.
        strings: those of the code, and those of the side information if there is any, each for n pictures.

    Raises:
        AezooError: the model reads no such streams, or they are damaged or of another model.
    """
    pictures: list[Tensor] = []
    with evaluation_mode(model):
        coder = _strings_coder(model)
        try:
            for streams in zip(*strings, strict=True):
                symbols = coder.read_streams(iter(streams[::-1]), 1)
                pictures.append(torch.from_numpy(entropy_model.decode(model, symbols, 1)))
        except ValueError as error:
            raise AezooError(f"these strings do not belong to this model and size: {error}") from error
    if not pictures:
        raise AezooError("there are no strings: give those of the code, and of the side information if there is any")
    return torch.cat(pictures)


def _strings_coder(model: EntropyCoded) -> RansCoder:
    coder = coder_of(model, 1)
    if not isinstance(coder, RansCoder):
        raise AezooError(f"{display_name(type(model))} has no streams of CompressAI: use the model compressai")
    return coder
