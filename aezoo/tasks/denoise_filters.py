"""Baselines for denoising: filters without learning.

Each filter has a few strengths, in units of the known noise. `best_setting` takes the one with the smallest squared
error for the clean originals of a few samples, which are unknown in practice: the table favours the filters.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from aezoo.errors import install_hint

Arrays = npt.NDArray[np.float32]
# (B, *shape) -> (B, *shape)
Filter = Callable[[Arrays], Arrays]

# strengths in units of the noise; the best ones for digits, photographs and smooth blobs, at deviations from 0.02 to 1,
# lay from 0.5 to 3 and from 0.6 to 1.5
_TV_WEIGHTS = (0.5, 0.75, 1, 1.5, 2, 3, 4)
_NLM_H = (0.4, 0.6, 0.8, 1, 1.5)
MISSING = f"needs scikit-image: {install_hint('images')}"


def filters(shape: tuple[int, ...], sigma: float) -> dict[str, dict[str, Filter]]:
    """Filters for samples of a shape, by name and setting; none for vectors, which have no neighbours.

    Those of scikit-image are left out if it is not installed.

    Args:
        shape: shape of one sample: (C, L), (C, H, W) or (C, D, H, W).
        sigma: standard deviation of the noise.
    """
    if len(shape) == 1:
        return {}
    found: dict[str, dict[str, Filter]] = {
        "median filter": {f"size {size}": partial(median, size=size) for size in (3, 5, 7)}
    }
    if find_spec("skimage") is None:
        return found
    found["total variation"] = {
        f"weight {share:g} sigma": partial(total_variation, weight=share * sigma) for share in _TV_WEIGHTS
    }
    if len(shape) == 3:  # a volume would take minutes
        found["non-local means"] = {
            f"h {share:g} sigma": partial(non_local_means, sigma=sigma, h=share * sigma) for share in _NLM_H
        }
    return found


def missing(shape: tuple[int, ...]) -> list[str]:
    """Names of the filters that `filters` leaves out because scikit-image is not installed."""
    if len(shape) == 1 or find_spec("skimage") is not None:
        return []
    return ["total variation", "non-local means"] if len(shape) == 3 else ["total variation"]


def median(x: Arrays, size: int) -> Arrays:
    """The median of a window of `size` along each axis but the channel axis."""
    from scipy.ndimage import median_filter

    filtered: Arrays = median_filter(x, (1, 1, *[size] * (x.ndim - 2)))
    return filtered


def total_variation(x: Arrays, weight: float) -> Arrays:
    """Rudin, Osher & Fatemi 1992, by the algorithm of Chambolle 2004."""
    from skimage.restoration import denoise_tv_chambolle

    weight = max(weight, 1e-6)
    return np.stack([denoise_tv_chambolle(sample, weight=weight, channel_axis=0) for sample in x])


def non_local_means(x: Arrays, sigma: float, h: float) -> Arrays:
    """Buades et al. 2005, https://doi.org/10.1109/CVPR.2005.38; patches of 5 x 5 in a window of 13 x 13."""
    from skimage.restoration import denoise_nl_means

    options: dict[str, Any] = {
        "h": max(h, 1e-6), "sigma": sigma, "patch_size": 5, "patch_distance": 6, "fast_mode": True,
    }  # fmt: skip
    if x.shape[1] == 1:  # with channel_axis=0 scikit-image 0.26 returns images of one channel transposed
        return np.stack([denoise_nl_means(sample[0], **options)[None] for sample in x])
    return np.stack([denoise_nl_means(sample, channel_axis=0, **options) for sample in x])


def best_setting(settings: dict[str, Filter], noisy: Arrays, clean: Arrays) -> str:
    """The setting whose output is nearest to the clean samples."""
    errors = {name: float(np.square(run(noisy) - clean).mean()) for name, run in settings.items()}
    return min(errors, key=lambda name: errors[name])
