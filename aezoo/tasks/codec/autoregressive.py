"""Indices of a model's code, entropy-coded with the model's prior.

    p(indices) = prod_t p(token_t | tokens before t)    in as many bits as -log2 p(indices)

Writer and reader call the same network token by token on the same blocks of samples, in T steps per block, with 0 for
unknown tokens, so both compute the same floats. They become multiples of 2^-24. A machine that computes other floats
is detected early: one byte after each block is from the digest of its tokens, and 8 bytes before the words of a frame
are from the digest of all its indices.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import ClassVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.errors import AezooError
from aezoo.tasks.codec import reproducibility, tables
from aezoo.tasks.codec.indices import Indices, TokenPrior, index_sizes, on_device
from aezoo.training.model_names import display_name

Advance = Callable[[float], object]
_MAX_CODES = 1 << 16
DIGEST = 8  # bytes


class AutoregressiveCoder:
    """Codes indices with a model's prior.

    Args:
        model: a model with a prior.
        block: samples that it processes at a time.
        advance: is called with the number of coded samples, a T-th of a block after each token.

    Raises:
        AezooError: a codebook is too large.
    """

    mode: ClassVar[str] = "prior"

    def __init__(self, model: DiscreteAutoencoder, block: int, advance: Advance = lambda n: None) -> None:
        self._model, self._block, self._advance = model, block, advance
        self._prior = cast(TokenPrior, model)
        # the largest symbols, in the order of tokens, as for the indices themselves
        largest = self._prior.to_tokens(on_device(model, index_sizes(model)[None] - 1))
        self._sizes = [int(symbol) + 1 for symbol in largest[0]]
        if max(self._sizes) > _MAX_CODES:
            raise AezooError(
                f"{display_name(type(model))} has a codebook of {max(self._sizes):,} codes, and under a prior at most "
                f"{_MAX_CODES:,} can be coded: use smaller codebooks"
            )

    def encode(self, indices: Indices) -> bytes:
        """Encode (n, D) indices as bytes."""
        coder, family = (
            tables.constriction_stream().queue.RangeEncoder(),
            tables.constriction_stream().model.Categorical(perfect=False),
        )
        for start in range(0, len(indices), self._block):
            known = self._prior.to_tokens(on_device(self._model, indices[start : start + self._block])).cpu().numpy()

            def code(t: int, table: tables.Rows, rows: slice, known: Indices = known) -> npt.NDArray[np.int32]:
                symbols = known[rows, t].astype(np.int32)
                coder.encode(symbols, family, table(rows))
                return symbols

            self._code_tokens(len(known), code)
            coder.encode(_check(known), tables.constriction_stream().model.Uniform(256))
        return digest(indices) + tables.to_bytes(coder.get_compressed())

    def decode(self, content: bytes, n: int) -> Indices | None:
        """Decode bytes to (n, D) indices; None if they are not what was encoded."""
        indices = np.concatenate([*self._blocks(content, n)])
        return indices if len(indices) == n and digest(indices) == content[:DIGEST] else None

    def decodes_to(self, content: bytes, indices: Indices) -> bool:
        """Whether the first block of bytes decodes to (n, D) indices, which fails if arithmetic is not repeatable."""
        first = next(AutoregressiveCoder(self._model, self._block)._blocks(content, len(indices)))
        return np.array_equal(first, indices[: self._block])

    def _blocks(self, content: bytes, n: int) -> Iterator[Indices]:
        """The indices of each block; a block that differs from the encoded one is empty, (0, D), and the last one."""
        coder = tables.constriction_stream().queue.RangeDecoder(tables.from_bytes(content[DIGEST:]))
        family = tables.constriction_stream().model.Categorical(perfect=False)

        def code(t: int, table: tables.Rows, rows: slice) -> npt.NDArray[np.int32]:
            symbols: npt.NDArray[np.int32] = coder.decode(family, table(rows))
            return symbols

        for start in range(0, n, self._block):
            try:
                tokens = self._code_tokens(min(self._block, n - start), code)
                same = np.array_equal(
                    coder.decode(tables.constriction_stream().model.Uniform(256), 1), _check(tokens.cpu().numpy())
                )
            except AssertionError:  # raised by constriction: no symbol matches the bits
                same = False
            if not same:
                yield np.empty((0, len(self._sizes)), dtype=np.int64)
                return
            yield self._prior.from_tokens(tokens).flatten(1).cpu().numpy()

    def bound(self, indices: Indices) -> float:
        """-log2 p(indices) of (n, D), by the `log_prob` of the prior."""
        parts = (indices[start : start + self._block] for start in range(0, len(indices), self._block))
        return -sum(
            float(self._prior.log_prob(on_device(self._model, part)).cpu().double().sum()) for part in parts
        ) / math.log(2)

    def _code_tokens(self, n: int, code: Callable[[int, tables.Rows, slice], npt.NDArray[np.int32]]) -> Tensor:
        """Process a block token by token: `code` gets the tables of some rows and returns their tokens."""
        tokens = torch.zeros(n, len(self._sizes), dtype=torch.long, device=self._model.device)
        next_logits = self._prior.incremental_logits()
        for t, k in enumerate(self._sizes):
            if k > 1:
                table = self._table(next_logits(tokens, t), k)
                size = max(1, tables.MAX_ENTRIES // k)
                parts = [code(t, table, slice(i, min(i + size, n))) for i in range(0, n, size)]
                tokens[:, t] = torch.from_numpy(np.concatenate(parts)).to(tokens)
            self._advance(n / len(self._sizes))
        return tokens

    def _table(self, logits: Tensor, k: int) -> tables.Rows:
        """The tables of one token, from its logits (n, at least k) without codes outside its codebook."""

        def rows(part: slice) -> npt.NDArray[np.float32]:
            selected = logits[part, :k].cpu().double().numpy()
            with np.errstate(invalid="ignore"):
                cdf = np.exp(selected - selected.max(1, keepdims=True)).cumsum(1)
            if selected.shape[1] != k or not np.isfinite(cdf).all():
                raise AezooError(
                    f"the prior of {display_name(type(self._model))} does not give {k} probabilities for a token: "
                    "train it again"
                )
            return tables.from_cdf(cdf[:, :-1] / cdf[:, -1:])

        return rows


def digest(indices: Indices) -> bytes:
    """The digest of indices, 8 bytes."""
    return hashlib.sha256(reproducibility.little_endian_bytes(indices)).digest()[:DIGEST]


def _check(tokens: Indices) -> npt.NDArray[np.int32]:
    """The value that checks a block's tokens, (1,)."""
    return np.array([digest(tokens)[0]], dtype=np.int32)
