"""What a code is worth: units in use, entries that are not zero, classes that can be read from it, and PCA's figures.

Codes are arrays of shape (N, D); N samples, D numbers in a code.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# as in the callback CodeStatistics
_POSTERIOR_THRESHOLD = 0.01
_L0_THRESHOLD = 1e-3


def active_units(code: Array, posterior: bool) -> int:
    """Dimensions in use.

    Of a posterior's mean those whose variance exceeds 0.01 (Burda et al. 2015, https://arxiv.org/abs/1509.00519): the
    prior's variance of 1 sets the scale. Other codes have a scale of their own, so that a dimension counts there if
    its variance exceeds a hundredth of the largest one.
    """
    variance = code.astype(np.float64).var(axis=0)
    return int((variance > (_POSTERIOR_THRESHOLD if posterior else 1e-2 * variance.max())).sum())


def l0(code: Array) -> float:
    """Mean number of entries in use in a code."""
    return float((np.abs(code) > _L0_THRESHOLD).sum(axis=1).mean())


def pca(train: Array, test: Array, size: int) -> tuple[float, Array, Array]:
    """PCA with `size` components, fitted on `train`: the error that a linear code of this size leaves.

    Returns:
        The mean squared error of `test`'s reconstruction, and the codes of both.
    """
    from sklearn.decomposition import PCA

    # sklearn picks an exact solver where it is quick, and else a randomised one
    fitted = PCA(size, random_state=0).fit(train)
    code = fitted.transform(test)
    error = float(np.square(fitted.inverse_transform(code).astype(np.float64) - test).mean())
    return error, fitted.transform(train), code


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of data with range 1, as torchmetrics has it."""
    return -10 * math.log10(mse) if mse > 0 else math.inf
