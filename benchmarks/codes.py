"""Figures of a code: active units, non-zero entries, and PCA of the same size.

Codes are arrays of shape (N, D); N samples, D numbers in a code.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# the same as in the callback CodeStatistics
_POSTERIOR_THRESHOLD = 0.01
_L0_THRESHOLD = 1e-3


def active_units(code: Array, posterior: bool) -> int:
    """The number of active dimensions.

    For a posterior's mean, a dimension is active if its variance exceeds 0.01 (Burda et al. 2015,
    https://arxiv.org/abs/1509.00519); the prior's variance of 1 sets the scale. Other codes have no fixed scale, so a
    dimension is active if its variance exceeds a hundredth of the largest one.
    """
    variance = code.astype(np.float64).var(axis=0)
    return int((variance > (_POSTERIOR_THRESHOLD if posterior else 1e-2 * variance.max())).sum())


def l0(code: Array) -> float:
    """Mean number of active entries in a code."""
    return float((np.abs(code) > _L0_THRESHOLD).sum(axis=1).mean())


def pca(train: Array, test: Array, size: int) -> tuple[float, Array, Array]:
    """PCA with `size` components, fitted on `train`: the lowest error that a linear code of this size can reach.

    Returns:
        The mean squared error of `test`'s reconstruction, and the codes of both.
    """
    from sklearn.decomposition import PCA

    # sklearn picks an exact solver where it is fast and a randomised one otherwise
    fitted = PCA(size, random_state=0).fit(train)
    code = fitted.transform(test)
    return _error(fitted, code, test), fitted.transform(train), code


def pca_of_bytes(train: Array, test: Array, size: int) -> float:
    """The error of PCA's code of `size` numbers, each rounded to one of 256 values between those of `train`."""
    from sklearn.decomposition import PCA

    fitted = PCA(size, random_state=0).fit(train)
    code = fitted.transform(train)
    low, step = code.min(0), (code.max(0) - code.min(0)) / 255
    code = fitted.transform(test)
    return _error(fitted, low + step * np.round((code - low) / step).clip(0, 255), test)


def _error(fitted: Any, code: Array, x: Array) -> float:
    return float(np.square(fitted.inverse_transform(code).astype(np.float64) - x).mean())
