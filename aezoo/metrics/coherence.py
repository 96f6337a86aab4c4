"""Coherence of samples with parts (Shi et al. 2019, https://arxiv.org/abs/1911.03393): do all have the same class?

    CrossCoherence   for each i, share of samples whose part i, generated from other parts, is of the sample's class
    JointCoherence   share of samples, drawn from a prior, whose parts are all of the same class

Both take the logits of classifiers that were trained on real parts. Classifiers make errors, so a perfect model
reaches only their accuracy on real parts. JointCoherence is also 1 if all samples are of one class, so it does not
measure their variety.

Shapes: B batch, M parts, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from aezoo.errors import AezooError


class _Fractions(Metric):
    """Shares of samples, of all batches and ranks.

    Args:
        n: how many shares.
    """

    correct: Tensor
    total: Tensor
    is_differentiable = False
    full_state_update = False
    higher_is_better = True

    def __init__(self, n: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", torch.zeros(n, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def add(self, correct: Tensor) -> None:
        """Count samples, (B, n) bool."""
        self.correct += correct.sum(0)
        self.total += len(correct)

    def compute(self) -> Tensor:
        """The shares, (n,), or () for a single one; NaN before any sample."""
        return self.correct / self.total


class CrossCoherence(_Fractions):
    """Share of samples whose parts, each generated from other parts, are of the sample's class: (M,).

    Args:
        n_parts: M.
    """

    def update(self, logits: Sequence[Tensor], y: Tensor) -> None:
        """Add a batch: the logits (B, K) of each part, and the classes (B,), -1 if unknown."""
        classes_BM = _classes(logits)
        if classes_BM.shape != (len(y), len(self.correct)) or y.ndim != 1:
            b, m = classes_BM.shape
            raise AezooError(f"CrossCoherence takes logits of {len(self.correct)} parts and y (B,) of as many samples, "
                             f"got {m} parts of {b} samples and y {tuple(y.shape)}")  # fmt: skip
        self.add((classes_BM == y[:, None])[y >= 0])


class JointCoherence(_Fractions):
    """Share of samples whose parts are all of one class: ()."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(1, **kwargs)

    def update(self, logits: Sequence[Tensor]) -> None:
        """Add a batch: the logits (B, K) of each part."""
        classes_BM = _classes(logits)
        self.add((classes_BM == classes_BM[:, :1]).all(1, keepdim=True))


def _classes(logits: Sequence[Tensor]) -> Tensor:
    """The class of each part, (B, M)."""
    if not len(logits) or any(part.ndim != 2 or len(part) != len(logits[0]) for part in logits):
        raise AezooError(f"logits must be (B, K) for each part, got {[tuple(part.shape) for part in logits]}")
    return torch.stack([part.argmax(1) for part in logits], 1)
