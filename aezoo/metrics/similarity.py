"""PSNR where data have a peak, errors by value, and SSIM in a memory layout that is fast on a CPU."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image import StructuralSimilarityIndexMeasure

# half the width of torchmetrics' Gaussian window of sigma 1.5, which is its padding: smaller images cannot be padded
_MARGIN = 5
# how far held-out values may lie outside of [0, 1], to which the training data are scaled
_OUTSIDE = 0.1


def has_peak(low: float, high: float) -> bool:
    """Whether data with these limits are scaled to [0, 1], so that their peak is 1; others have no PSNR.

    Standardised data are not: they span at least 2 (Popoviciu 1935).
    """
    return low >= -_OUTSIDE and high <= 1 + _OUTSIDE


def psnr(mse: float) -> float:
    """PSNR in dB of data that have a peak, see `has_peak`."""
    return -10 * math.log10(mse) if mse else math.inf


class Limits(Metric):
    """The smallest and the largest value of all data."""

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("low", torch.tensor(math.inf), dist_reduce_fx="min")
        self.add_state("high", torch.tensor(-math.inf), dist_reduce_fx="max")

    def update(self, x: Tensor) -> None:
        """Add values."""
        if x.numel():
            low, high = x.float().aminmax()
            self.low, self.high = self.low.minimum(low), self.high.maximum(high)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Both limits."""
        return self.low, self.high


class ValueErrors:
    """Errors of reconstructions and the variance of samples, value by value, where neither is NaN."""

    def __init__(self) -> None:
        self._sums: Any = 0

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """Add samples and their reconstructions, (B, *shape) each."""
        error = (x_hat.to(x) - x).double()
        known = ~error.isnan()
        x, error = (part.double().masked_fill(~known, 0) for part in (x, error))
        parts = (known.double(), x, x.square(), error.abs(), error.square())
        self._sums = self._sums + torch.stack([part.sum(0) for part in parts])

    @property
    def state(self) -> npt.NDArray[np.float64]:
        """The sums, (5, *shape), or 0 without samples."""
        return np.asarray(self._sums)

    def merge(self, states: Sequence[npt.NDArray[np.float64]]) -> None:
        """Take over the sums of several parts of the samples."""
        self._sums = sum(torch.from_numpy(state) if state.ndim else 0 for state in states)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mean absolute error, the mean square error and the variance of each value; NaN without data."""
        count, total, squares, absolute, squared = self._sums
        variance = squares / count - (total / count).square()
        # rounding leaves a little of values that are all equal
        return absolute / count, squared / count, variance.masked_fill(variance <= 1e-12 * squares / count, 0)

    def r2(self) -> float | None:
        """The share of the variance of all values that the reconstructions explain; None without any variance."""
        total, squared = float((self.compute()[2] * self._sums[0]).nansum()), float(self._sums[4].sum())
        return 1 - squared / total if total else None


class StructuralSimilarity(StructuralSimilarityIndexMeasure):
    """SSIM (Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861), the mean over images and their channels.

    torchmetrics' window works on each channel separately, so here all images of a batch become channels of one image.
    On a CPU this takes a fraction of the time that torchmetrics takes.

    Args:
        data_range: the largest value of the data minus the smallest.
    """

    similarity: Tensor
    total: Tensor

    def __init__(self, data_range: float) -> None:
        super().__init__(data_range=data_range)

    @staticmethod
    def supports(shape: tuple[int, ...]) -> bool:
        """Whether samples of this shape are (C, H, W) with both sides above 5."""
        return len(shape) == 3 and min(shape[1:]) > _MARGIN

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: (B, C, H, W), (B, C, H, W)."""
        images, others = (batch.contiguous().flatten(0, 1)[None] for batch in (preds, target))
        mean: Any = structural_similarity_index_measure(images, others, data_range=self.data_range)
        self.similarity += mean * len(preds)
        self.total += len(preds)
