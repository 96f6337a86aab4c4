"""How well maps of anomaly locate defects: the area under the ROC curve of pixels, and per-region overlap (PRO).

For a threshold, PRO is the mean, over the connected regions of all masks, of the share of a region above it. The
figure is the area under PRO over the false positive rate of pixels, from 0 to a limit, divided by the limit (Bergmann
et al. 2020, https://arxiv.org/abs/1911.02357): a small region counts as much as a large one. Pixels that touch at a
side or a corner are one region, as in the evaluation code of MVTec AD.
"""

import numpy as np
import numpy.typing as npt

from aezoo.errors import AezooError

Maps = npt.NDArray[np.floating]
Masks = npt.NDArray[np.bool_]
FPR_LIMIT = 0.3


def pixel_auroc(maps: Maps, masks: Masks) -> float:
    """The probability that a pixel of a defect has a larger value than another pixel; ties count half.

    Args:
        maps: (N, H, W), larger is more anomalous.
        masks: (N, H, W), pixels of defects.

    Raises:
        AezooError: there are no pixels of one of the two kinds.
    """
    from sklearn.metrics import roc_auc_score

    _check(maps, masks)
    return float(roc_auc_score(masks.ravel(), maps.ravel()))


def per_region_overlap(maps: Maps, masks: Masks, fpr_limit: float = FPR_LIMIT) -> float:
    """The normalised area under PRO up to a false positive rate of pixels, from 0 to 1.

    Args:
        maps: (N, H, W), larger is more anomalous.
        masks: (N, H, W), pixels of defects.
        fpr_limit: above 0, at most 1.

    Raises:
        AezooError: there are no pixels of one of the two kinds.
    """
    _check(maps, masks)
    if not 0 < fpr_limit <= 1:
        raise AezooError(f"fpr_limit is {fpr_limit}: give a share above 0 and of at most 1")
    share = _region_shares(masks).ravel()
    order = np.argsort(-maps.ravel(), kind="stable")
    # of each pixel that is added as the threshold falls
    overlap = np.cumsum(share[order])
    false_positives = np.cumsum(~masks.ravel()[order])
    # equal values pass a threshold together
    last = np.flatnonzero(np.append(np.diff(maps.ravel()[order]) != 0, True))
    x = np.concatenate([[0.0], false_positives[last] / false_positives[-1]])
    y = np.concatenate([[0.0], overlap[last]])
    inside = x < fpr_limit
    x, y = np.append(x[inside], fpr_limit), np.append(y[inside], _at(fpr_limit, x, y))
    return min(1.0, float(np.trapezoid(y, x) / fpr_limit))  # beyond 1 is rounding


def _at(limit: float, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """The value of the curve at a limit; where the curve is vertical, its lower end."""
    right = int(np.searchsorted(x, limit))
    if x[right] == limit:
        return float(y[right])
    step = (limit - x[right - 1]) / (x[right] - x[right - 1])
    return float(y[right - 1] + step * (y[right] - y[right - 1]))


def _region_shares(masks: Masks) -> npt.NDArray[np.float64]:
    """The increase of PRO by each pixel above the threshold: (N, H, W); the sum is 1."""
    from scipy.ndimage import label

    shares, n_regions = np.zeros(masks.shape), 0
    for mask, found in zip(masks, shares, strict=True):
        regions, n = label(mask, structure=np.ones((3, 3)))
        sizes = np.bincount(regions.ravel(), minlength=n + 1)
        found[mask] = 1 / sizes[regions[mask]]
        n_regions += n
    return shares / n_regions


def _check(maps: Maps, masks: Masks) -> None:
    if maps.shape != masks.shape or maps.ndim != 3:
        raise AezooError(f"maps {maps.shape} and masks {masks.shape} must have one shape, (N, H, W)")
    if not masks.any() or masks.all():
        raise AezooError("masks must have pixels of defects and others: give samples of both kinds")
