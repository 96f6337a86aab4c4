"""Decoder-only Transformer, GPT-2 (Radford et al. 2019), https://openai.com/index/better-language-models/

A prior over the indices k of a quantised model with indices of any shape, by causal attention over their sequence:

    L = -sum_t log p(k_t | k_1 .. k_{t-1})        positions in raster order, the Q indices of each in turn

    h_t = e(k_{t-1}) + position_t,  k_0 a learned start      h <- h + attention(norm(h))     h <- h + mlp(norm(h))
    p(k_t = j) = softmax_j(e_j . norm(h_t))

e_j is the vector of code j, both as input and as output, from a separate table for each of the Q indices of a position.

Shapes: B batch, T indices of a sample, Q of a position, P positions, K codes of the largest codebook, W width.
"""

from collections.abc import Callable
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.bases.token_prior import IndexPrior, IndexPriorArgs
from aezoo.nets.transformer import Block


class IndexTransformer(IndexPrior, defaults={"lr": 3e-3}, tags=("generation",)):
    """Learns a small GPT over the indices of a quantised model.

    Args:
        input_shape: shape of one sample; any that the tokenizer accepts.
        width: W, channels of a token; heads have 16 channels if the width is a multiple of 16.
        depth: number of blocks.
        dropout: share of a token's channels that are dropped in training, after the embedding.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, within a block.
        **kwargs: see `IndexPrior`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        width: int = 64,
        depth: int = 3,
        dropout: float = 0.1,
        activation: str = "gelu",
        **kwargs: Unpack[IndexPriorArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.check_net(width, depth, dropout)
        # the standard deviation that GPT-2 uses for embeddings
        self.book_QKW = nn.Parameter(0.02 * torch.randn(self.index_shape[0], self.n_codes, width))
        self.start_W = nn.Parameter(0.02 * torch.randn(width))
        self.position_TW = nn.Parameter(0.02 * torch.randn(self.n_tokens, width))
        self.blocks = nn.Sequential(
            nn.Dropout(dropout), *(Block(width, activation, causal=True) for _ in range(depth)), nn.LayerNorm(width)
        )

    def token_logits(self, tokens: Tensor) -> Tensor:
        h_BTW = self.blocks(self.embedded(tokens[:, :-1]))
        logits_BPQK = torch.einsum("bpqw,qkw->bpqk", h_BTW.unflatten(1, (-1, self.index_shape[0])), self.book_QKW)
        return logits_BPQK.flatten(1, 2)

    def embedded(self, before: Tensor) -> Tensor:
        """Return the input vectors that predict each token from those before it, (B, t) -> (B, t + 1, W)."""
        q, k, _ = self.book_QKW.shape
        offset_T = k * torch.arange(q, device=before.device).repeat(self.n_tokens // q)[: before.shape[1]]
        embedded_BTW = F.embedding(before + offset_T, self.book_QKW.flatten(0, 1))
        start_B1W = self.start_W.expand(len(before), 1, -1)
        return torch.cat([start_B1W, embedded_BTW], 1) + self.position_TW[: before.shape[1] + 1]

    def incremental_logits(self) -> Callable[[Tensor, int], Tensor]:
        dropout, *blocks, norm = self.blocks
        kept: list[list[Tensor]] = [[] for _ in blocks]
        done = 0

        def next_logits(tokens: Tensor, t: int) -> Tensor:
            nonlocal done
            h_BLW = dropout(self.embedded(tokens[:, :t])[:, done:])
            done = t + 1
            for block, of_block in zip(blocks, kept, strict=True):
                h_BLW = block(h_BLW, kept=of_block)
            of = t % len(self.book_QKW)
            return self.mask_unused_codes(norm(h_BLW[:, -1]) @ self.book_QKW[of].T, self.unused_QK[of])

        return next_logits
