"""Base class of metrics of codes and known factors: collects both, checks them, and removes constant dimensions.

Shapes: B batch, N samples, D dimensions of a code, F factors.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from aezoo.errors import AezooError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class FactorMetric(Metric):
    """Collects codes (B, ...) and factors (B, F); on several ranks it computes the score from all of them.

    Samples are stored on the metric's device (`Metric.to`), by default the CPU. The score is computed on the CPU.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    codes: list[Tensor]
    factors: list[Tensor]
    # the number of factors below which the score has no meaning
    min_factors = 1
    # columns of factors without an order, for metrics that treat these differently
    categorical: tuple[int, ...] = ()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"dist_sync_fn": gather_rows} | kwargs)
        self.add_state("codes", [], dist_reduce_fx="cat")
        self.add_state("factors", [], dist_reduce_fx="cat")

    def update(self, codes: Tensor, factors: Tensor) -> None:
        """Add a batch: the codes, and the factor values as integers."""
        codes, factors = check_codes(codes, "codes").flatten(1), torch.as_tensor(factors).detach()
        if factors.ndim != 2 or len(factors) != len(codes):
            raise AezooError(f"factors must have shape ({len(codes)}, F) for {len(codes)} codes, "
                             f"got {tuple(factors.shape)}")  # fmt: skip
        if factors.is_floating_point() and not bool((factors == factors.round()).all()):
            raise AezooError("factors must be whole numbers, the number of each value: bin a continuous factor first")
        for new, stored, name in ((codes, self.codes, "codes"), (factors, self.factors, "factors")):
            if stored and stored[0].shape[1] != new.shape[1]:
                raise AezooError(f"{name} had {stored[0].shape[1]} columns before, got {new.shape[1]}")
        self.codes.append(codes.to(self.device))
        self.factors.append(factors.long().to(self.device))

    def compute(self) -> Any:
        """The score as a 0-dimensional float tensor, or a dictionary of such tensors."""
        if not len(self.codes):
            raise AezooError(f"{type(self).__name__} has seen no codes: call update first")
        codes = dim_zero_cat(self.codes).double().cpu().numpy()
        factors = dim_zero_cat(self.factors).cpu().numpy()
        sizes = [len(np.unique(column)) for column in factors.T]
        if 1 in sizes:
            raise AezooError(
                f"factor {sizes.index(1)} has one value in all {len(factors)} samples: leave its column out"
            )
        if len(sizes) < self.min_factors:
            raise AezooError(f"{type(self).__name__} needs {self.min_factors} factors, got {len(sizes)}")
        if not set(self.categorical) <= set(range(len(sizes))):
            raise AezooError(f"categorical factors must be columns 0 to {len(sizes) - 1}, got {self.categorical}")
        minimum = self.min_samples(sizes)
        if len(codes) < minimum:
            raise AezooError(f"{type(self).__name__} needs {minimum} samples of these factors, got {len(codes)}")
        return to_tensors(self.score(drop_constant(codes), factors))

    def min_samples(self, sizes: Sequence[int]) -> int:
        """The number of samples needed for factors with so many values: here 10 per value of the largest factor."""
        return 10 * max(2, *sizes)

    @abstractmethod
    def score(self, codes: Floats, factors: Ints) -> Any:
        """The score of codes (N, D), without constant dimensions (D may be 0), and factors (N, F)."""


def gather_rows(rows: Tensor, group: Any = None) -> list[Tensor]:
    """The rows (N, D) of each rank, N = 0 for one without samples.

    In that case torchmetrics sends an empty vector of floats, which gloo refuses if others send matrices or integers.
    """
    own = torch.tensor([rows.shape[1] if rows.ndim == 2 else 0, not rows.is_floating_point()], device=rows.device)
    columns, whole = torch.stack(gather_all_tensors(own.long(), group)).amax(0).tolist()
    if rows.ndim == 1:
        rows = rows.new_zeros((0, columns), dtype=torch.long if whole else torch.float32)
    return gather_all_tensors(rows, group)


def drop_constant(codes: Floats) -> Floats:
    """The dimensions that are not the same for all samples."""
    return codes[:, np.ptp(codes, axis=0) > 0]


def standardise(codes: Floats) -> Floats:
    """The dimensions that change, scaled to mean 0 and variance 1."""
    return (codes - codes.mean(0)) / codes.std(0)


def check_codes(codes: Tensor, name: str) -> Tensor:
    """A batch as finite float32 numbers."""
    codes = torch.as_tensor(codes).detach().float()
    if codes.ndim < 2:
        raise AezooError(f"{name} must have shape (B, D), got {tuple(codes.shape)}")
    if not bool(codes.isfinite().all()):
        raise AezooError(f"{name} contain NaN or infinity: the model diverged")
    return codes


def check_at_least(metric: Metric, name: str, value: int, minimum: int) -> int:
    """Return the value if it is an integer of at least `minimum`."""
    if not isinstance(value, int) or value < minimum:
        raise AezooError(f"{type(metric).__name__}: {name} must be a whole number of at least {minimum}, got {value}")
    return value


def to_tensors(score: Any) -> Any:
    """Convert numbers to 0-dimensional float tensors, as torchmetrics' other metrics return."""
    if isinstance(score, dict):
        return {name: torch.tensor(value, dtype=torch.float32) for name, value in score.items()}
    return torch.as_tensor(score, dtype=torch.float32)
