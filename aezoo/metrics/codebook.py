"""How much of a codebook is in use, over all batches and all ranks.

    CodebookUsage        share of codes that were chosen at least once
    CodebookPerplexity   exp(H(p)), p the codes' relative frequencies: from 1 (only one code) to K (all equally often)

Both count choices, so the result does not depend on how samples are split into batches. A mean of the batches'
perplexities does, and it is bounded by the batch size.

Shapes: B batch, Q codebooks, K codes of a codebook.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from aezoo.errors import AezooError

# choices are counted for each code
_MAX_CODES = 2**24


class _Counts(Metric):
    """Counts how often each code of each codebook was chosen, with all codebooks in one row.

    Args:
        codebook_sizes: K of each of the Q indices of a position.
    """

    name: str
    counts: Tensor
    is_differentiable = False
    full_state_update = False
    higher_is_better = True

    def __init__(self, codebook_sizes: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not codebook_sizes or min(codebook_sizes) < 1 or sum(codebook_sizes) > _MAX_CODES:
            raise AezooError(
                f"{type(self).__name__} counts codebooks of one code or more, {_MAX_CODES} codes together at most, got "
                f"{codebook_sizes}: of larger codebooks count the digits of an index"
            )
        self.codebook_sizes = tuple(codebook_sizes)
        self.add_state("counts", torch.zeros(sum(codebook_sizes), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """Add indices, (B, Q, *positions) long; -1 is ignored."""
        if indices.ndim < 2 or indices.shape[1] != len(self.codebook_sizes):
            raise AezooError(
                f"{type(self).__name__} takes indices (B, {len(self.codebook_sizes)}, ...), got {tuple(indices.shape)}"
            )
        for counts_K, chosen in zip(self.counts.split(self.codebook_sizes), indices.unbind(1), strict=True):
            chosen = chosen.flatten()
            counts_K.index_add_(0, chosen.clamp(min=0), (chosen >= 0).to(counts_K))

    def compute(self) -> dict[str, Tensor]:
        """The mean over codebooks, and the value of each codebook if there are several, () each."""
        if not self.counts.any():
            raise AezooError(f"{type(self).__name__} has seen no indices: call update first")
        values_Q = torch.stack([self.from_counts(counts_K) for counts_K in self.counts.split(self.codebook_sizes)])
        values = {self.name: values_Q.mean()}
        if len(values_Q) > 1:
            values |= {f"{self.name}_{i}": value for i, value in enumerate(values_Q)}
        return values

    @abstractmethod
    def from_counts(self, counts_K: Tensor) -> Tensor:
        """The value for one codebook, (K,) -> ()."""


class CodebookUsage(_Counts):
    """Share of codes that were chosen, `usage`; with several codebooks also `usage_0`, ..., one for each."""

    name = "usage"

    def from_counts(self, counts_K: Tensor) -> Tensor:
        return (counts_K > 0).float().mean()


class CodebookPerplexity(_Counts):
    """The exponential of the entropy of choices, `perplexity`; with several codebooks also `perplexity_0`, ...

    The perplexity of a codebook of which no code was chosen is 1.
    """

    name = "perplexity"

    def from_counts(self, counts_K: Tensor) -> Tensor:
        counts_K = counts_K.float()
        p_K = counts_K / counts_K.sum().clamp(min=1)
        return torch.special.entr(p_K).sum().exp()


def codebook_metrics(codebook_sizes: tuple[int, ...], postfix: str = "") -> MetricCollection:
    """Usage and perplexity of the same indices, with names that end in `postfix`; none if codebooks are too large.

    Args:
        codebook_sizes: K of each of the Q indices of a position.
        postfix: distinguishes the names from those of other codebooks.
    """
    metrics: list[Metric | MetricCollection] = []
    if sum(codebook_sizes) <= _MAX_CODES:
        metrics = [CodebookUsage(codebook_sizes), CodebookPerplexity(codebook_sizes)]
    return MetricCollection(metrics, postfix=postfix)
