"""How sparse a code is, the errors of its reconstructions, and whether a dictionary contains known atoms.

    L0                   mean number of entries of a code that are not 0
    DeadShare            share of latents that are 0 for every sample
    FVU                  E||x - x_hat||^2 / (E||x||^2 - ||E x||^2), the fraction of variance unexplained: 1 - R^2
    Cosine               E[cos(x, x_hat)], 0 for a sample or a reconstruction of zeros
    Shrinkage            E[||x_hat|| / ||x||], over the samples that are not zero; below 1 if penalties shrink codes
    ReconstructionBias   E||x_hat||^2 / E<x, x_hat>: by this factor, x_hat is too large for the smallest error, gamma in
                         Rajamanoharan et al. 2024, https://arxiv.org/abs/2404.16014
    Recovery             mcc: mean over atoms of |cos| to the matched latent, for the best one-to-one matching;
                         uniqueness: number of atoms that are the nearest of a latent, divided by that of latents

All but the last are ratios of sums over samples. The sums are accumulated in float64 over batches and ranks, so the
result does not depend on how samples are split. A mean of the FVUs of batches would depend on it: each
batch's variance is about its own mean, and the mean of ratios is not the ratio of means.

Shapes: B batch, X data dimensions, N latents or atoms.
"""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from aezoo.errors import AezooError
from aezoo.metrics.disentanglement_base import check_at_least


class _Sums(Metric):
    """Accumulates sums, in float64 unless `set_dtype` has chosen another type, for a device without float64."""

    is_differentiable = False
    full_state_update = False

    def __init__(self, *sizes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sum("total", *sizes)
        self._add_sum("count")

    def _add_sum(self, name: str, *sizes: int) -> None:
        # MetricCollection merges two metrics whose sums have the same names and happen to have the same values
        self.add_state(f"{type(self).__name__}_{name}", torch.zeros(sizes, dtype=torch.float64), dist_reduce_fx="sum")

    def _state(self, name: str) -> Tensor:
        state: Tensor = getattr(self, f"{type(self).__name__}_{name}")
        return state

    def _accumulate(self, **sums: Tensor | float) -> None:
        for name, value in sums.items():
            setattr(self, f"{type(self).__name__}_{name}", self._state(name) + value)

    def _flat(self, *batches: Tensor) -> list[Tensor]:
        """Batches of one shape as (B, X), in the precision of the sums."""
        if batches[0].shape != batches[-1].shape or batches[0].ndim < 2:
            shapes = " and ".join(str(tuple(batch.shape)) for batch in batches)
            raise AezooError(f"{type(self).__name__} takes batches (B, ...) of one shape, got {shapes}")
        return [batch.detach().flatten(1).to(self._state("total")) for batch in batches]

    def _check_updated(self) -> None:
        if not self._state("count"):
            raise AezooError(f"{type(self).__name__} has seen no samples: call update first")


class L0(_Sums):
    """Mean number of entries of a code that are not 0.

    Args:
        threshold: an entry counts when its absolute value is above it.
    """

    higher_is_better = False

    def __init__(self, threshold: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold

    def update(self, code: Tensor) -> None:
        """Add codes, (B, ...)."""
        (code_BN,) = self._flat(code)
        self._accumulate(total=(code_BN.abs() > self.threshold).sum(), count=len(code_BN))

    def compute(self) -> Tensor:
        """Over all samples, ()."""
        self._check_updated()
        return self._state("total") / self._state("count")


class DeadShare(_Sums):
    """Share of latents that are 0 for every sample.

    Args:
        latents: N, size of a code.
        threshold: an entry counts when its absolute value is above it.
    """

    higher_is_better = False

    def __init__(self, latents: int, threshold: float = 0.0, **kwargs: Any) -> None:
        super().__init__(check_at_least(self, "latents", latents, 1), **kwargs)
        self.threshold = threshold

    def update(self, code: Tensor) -> None:
        """Add codes, (B, ...)."""
        (code_BN,) = self._flat(code)
        _check_size(self, code_BN, len(self._state("total")))
        self._accumulate(total=(code_BN.abs() > self.threshold).sum(0), count=len(code_BN))

    def compute(self) -> Tensor:
        """Over all samples, ()."""
        self._check_updated()
        return (self._state("total") == 0).to(self._state("total")).mean()


class FVU(_Sums):
    """Fraction of variance unexplained: 0 is perfect, 1 is no better than the mean of all samples.

    Args:
        features: X, size of a sample.
    """

    higher_is_better = False

    def __init__(self, features: int, **kwargs: Any) -> None:
        super().__init__(check_at_least(self, "features", features, 1), **kwargs)
        self._add_sum("squares")
        self._add_sum("errors")

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add samples and their reconstructions, (B, ...) both."""
        x_BX, x_hat_BX = self._flat(x, x_hat)
        _check_size(self, x_BX, len(self._state("total")))
        errors = (x_BX - x_hat_BX).square().sum()
        self._accumulate(total=x_BX.sum(0), squares=x_BX.square().sum(), errors=errors, count=len(x_BX))

    def compute(self) -> Tensor:
        """Over all samples, (); meaningless if they do not vary, since the divisor is then only rounding error."""
        self._check_updated()
        return self._state("errors") / (
            self._state("squares") - self._state("total").square().sum() / self._state("count")
        )


class _Ratio(_Sums):
    """A ratio of two sums; a subclass defines `ratio_terms`, which returns both for a batch."""

    @abstractmethod
    def ratio_terms(self, x_BX: Tensor, x_hat_BX: Tensor) -> tuple[Tensor, Tensor | float]:
        """The batch's contributions to the numerator and the denominator."""

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add samples and their reconstructions, (B, ...) both."""
        numerator, denominator = self.ratio_terms(*self._flat(x, x_hat))
        self._accumulate(total=numerator, count=denominator)

    def compute(self) -> Tensor:
        """Over all samples, (); NaN if all of them, or all reconstructions, are zeros."""
        if not self.update_called:
            self._check_updated()
        return self._state("total") / self._state("count")


class Cosine(_Ratio):
    """Mean cosine between a sample and its reconstruction."""

    higher_is_better = True

    def ratio_terms(self, x_BX: Tensor, x_hat_BX: Tensor) -> tuple[Tensor, float]:
        return (_unit(x_BX) * _unit(x_hat_BX)).sum(), len(x_BX)


class Shrinkage(_Ratio):
    """Mean ratio of a reconstruction's norm to its sample's norm."""

    higher_is_better = None

    def ratio_terms(self, x_BX: Tensor, x_hat_BX: Tensor) -> tuple[Tensor, Tensor]:
        norm_B, norm_hat_B = x_BX.norm(dim=1), x_hat_BX.norm(dim=1)
        counts_B = norm_B > 0
        return (norm_hat_B / norm_B).where(counts_B, 0).sum(), counts_B.sum()


class ReconstructionBias(_Ratio):
    """E||x_hat||^2 / E<x, x_hat>: below 1 where reconstructions are too small."""

    higher_is_better = None

    def ratio_terms(self, x_BX: Tensor, x_hat_BX: Tensor) -> tuple[Tensor, Tensor]:
        return x_hat_BX.square().sum(), (x_BX * x_hat_BX).sum()


class Recovery(_Sums):
    """How well dictionaries contain the atoms of a known one: mcc and uniqueness, means over the dictionaries added.

    An atom without a latent, because there are fewer latents, counts as 0 in mcc, and so does a latent of norm 0. Equal
    latents share their nearest atom, which lowers uniqueness.

    Args:
        atoms: (N, ...) the known atoms, whose norms are not 0.
    """

    higher_is_better = True

    def __init__(self, atoms: Tensor, **kwargs: Any) -> None:
        super().__init__(2, **kwargs)
        if atoms.ndim < 2 or not bool(atoms.flatten(1).norm(dim=1).gt(0).all()):
            raise AezooError(f"Recovery takes atoms (N, ...), none of them zeros, got shape {tuple(atoms.shape)}")
        self.atoms = _unit(atoms.detach().flatten(1).cpu().double())

    def update(self, directions: Tensor) -> None:
        """Add the directions of a dictionary's latents, (M, ...)."""
        from scipy.optimize import linear_sum_assignment

        directions_NX = directions.detach().flatten(1).cpu().double()
        _check_size(self, directions_NX, self.atoms.shape[1])
        cosine_NM = (self.atoms @ _unit(directions_NX).T).abs()
        mcc = cosine_NM[linear_sum_assignment(cosine_NM, maximize=True)].sum() / len(self.atoms)
        unique = len(cosine_NM.argmax(0).unique()) / len(directions_NX)
        self._accumulate(
            total=torch.tensor([float(mcc), unique], dtype=torch.float64).to(self._state("total")), count=1
        )

    def compute(self) -> dict[str, Tensor]:
        """Both figures, () each."""
        self._check_updated()
        mcc, uniqueness = self._state("total") / self._state("count")
        return {"mcc": mcc, "uniqueness": uniqueness}


def sparse_metrics(input_shape: tuple[int, ...], code_shape: tuple[int, ...]) -> MetricCollection:
    """The metrics reported for models with a sparse code: call `update(code=..., x=..., x_hat=...)`.

    Args:
        input_shape: shape of one sample.
        code_shape: shape of one code.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "l0": L0(),
        "dead_share": DeadShare(math.prod(code_shape)),
        "fvu": FVU(math.prod(input_shape)),
        "cosine": Cosine(),
        "shrinkage": Shrinkage(),
        "reconstruction_bias": ReconstructionBias(),
    }
    return MetricCollection(metrics)


def _unit(rows: Tensor) -> Tensor:
    """Rows scaled to norm 1; zero rows stay zero."""
    norm = rows.norm(dim=1, keepdim=True)
    return rows / norm.where(norm > 0, 1)


def _check_size(metric: Metric, batch: Tensor, size: int) -> None:
    if batch.shape[1] != size:
        raise AezooError(f"{type(metric).__name__} was made for {size} numbers per row, got {batch.shape[1]}")
