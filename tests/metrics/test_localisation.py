"""Pixel AUROC and PRO against loops over regions and thresholds."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from aezoo.errors import AezooError
from aezoo.metrics.localisation import per_region_overlap, pixel_auroc

RNG = np.random.default_rng(3)


def masks():
    """Three samples: two regions that touch at a corner and so are one, two that do not touch, and none."""
    found = np.zeros((3, 9, 10), bool)
    found[0, 1:3, 1:4] = found[0, 3:5, 4:6] = True
    found[1, 0, :3] = found[1, 5:8, 5:9] = True
    return found


REGIONS = [
    [(0, y, x) for y in (1, 2) for x in (1, 2, 3)] + [(0, y, x) for y in (3, 4) for x in (4, 5)],
    [(1, 0, x) for x in range(3)],
    [(1, y, x) for y in (5, 6, 7) for x in (5, 6, 7, 8)],
]


def slow_pro(maps, truth, limit):
    """The curve at each threshold, and its area by linear interpolation on a fine grid."""
    points = [(0.0, 0.0)]
    for threshold in sorted({*maps.ravel()}, reverse=True):
        above = maps >= threshold
        overlap = np.mean([np.mean([above[place] for place in region]) for region in REGIONS])
        points.append((float(above[~truth].mean()), float(overlap)))
    x, y = np.array(points).T
    grid = np.linspace(0, limit, 200_001)
    return np.trapezoid(np.interp(grid, x, y), grid) / limit


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("levels", [4, 10_000], ids=["ties", "distinct"])
def test_pro_matches_slow_formula(limit, levels):
    truth = masks()
    maps = np.round((RNG.random(truth.shape) + 0.4 * truth) * levels) / levels
    assert per_region_overlap(maps, truth, limit) == pytest.approx(slow_pro(maps, truth, limit), abs=1e-4)


def test_pro_of_perfect_inverted_and_constant_maps():
    truth = masks()
    assert per_region_overlap(truth.astype(float), truth) == pytest.approx(1)
    assert per_region_overlap(1.0 - truth, truth) == pytest.approx(0, abs=1e-9)
    # a constant map gives the diagonal, whose normalised area is 0.3 / 2
    assert per_region_overlap(np.zeros(truth.shape), truth) == pytest.approx(0.15)
    # finding the small region counts as much as finding the large one
    small, large = np.zeros(truth.shape), np.zeros(truth.shape)
    for place in REGIONS[1]:
        small[place] = 1
    for place in REGIONS[2]:
        large[place] = 1
    assert per_region_overlap(small, truth) == pytest.approx(per_region_overlap(large, truth))


def test_pixel_auroc_matches_scikit_learn():
    truth = masks()
    maps = RNG.random(truth.shape) + 0.3 * truth
    above = (maps[truth][:, None] > maps[~truth][None]).mean()
    assert pixel_auroc(maps, truth) == pytest.approx(above) == pytest.approx(roc_auc_score(truth.ravel(), maps.ravel()))


@pytest.mark.parametrize("truth", [np.zeros((1, 4, 4), bool), np.ones((1, 4, 4), bool), np.zeros((2, 4, 4), bool)])
def test_constant_masks_and_wrong_shapes_are_refused(truth):
    for metric in (pixel_auroc, per_region_overlap):
        with pytest.raises(AezooError, match="masks"):
            metric(np.zeros((1, 4, 4)), truth)
    with pytest.raises(AezooError, match="fpr_limit is 0"):
        per_region_overlap(np.zeros((3, 9, 10)), masks(), 0)
