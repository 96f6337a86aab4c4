"""Baselines for imputation: the mean, nearest neighbours and regressions, fitted to samples of the training data."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = npt.NDArray[Any]
# above, the regressions of all values on all others take minutes
_MAX_REGRESSIONS = 100
_NEIGHBOURS = 5
_MAX_ROUNDS = 10


@dataclass(frozen=True)
class Baseline:
    """A method that completes samples.

    Attributes:
        run: completed samples, given training samples and samples, in both of which missing values are NaN:
            (N, *shape), (B, *shape) -> (B, *shape).
        setting: in words.
    """

    run: Callable[[Arrays, Arrays], Arrays]
    setting: str = ""


def baselines_of(shape: tuple[int, ...], seed: int) -> dict[str, Baseline | str]:
    """The baselines by name, for samples of this shape; a string is the reason why one is left out."""
    regressions: Baseline | str = f"more than {_MAX_REGRESSIONS} values"
    if int(np.prod(shape)) <= _MAX_REGRESSIONS:
        regressions = Baseline(partial(_regressions, seed=seed), f"{_MAX_ROUNDS} rounds")
    return {
        "mean": Baseline(partial(_completed, _mean_imputer)),
        "knn": Baseline(partial(_completed, _knn_imputer), f"{_NEIGHBOURS} neighbours"),
        "regressions": regressions,
    }


def _completed(imputer: Callable[[], Any], fitted: Arrays, x: Arrays) -> Arrays:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about values without data, and regressions that have not converged
        found = imputer().fit(fitted.reshape(len(fitted), -1))
        completed: Arrays = found.transform(x.reshape(len(x), -1)).reshape(x.shape)
    return completed


def _mean_imputer() -> Any:
    from sklearn.impute import SimpleImputer

    return SimpleImputer(keep_empty_features=True)


def _knn_imputer() -> Any:
    from sklearn.impute import KNNImputer

    return KNNImputer(n_neighbors=_NEIGHBOURS, keep_empty_features=True)


def _regressions(fitted: Arrays, x: Arrays, seed: int) -> Arrays:
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    return _completed(
        lambda: IterativeImputer(max_iter=_MAX_ROUNDS, random_state=seed, keep_empty_features=True), fitted, x
    )
