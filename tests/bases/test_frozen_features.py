"""Tests of aezoo/bases/frozen_features.py."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from aezoo.bases.frozen_features import smoothed


@pytest.mark.parametrize("sigma", [0.0, 0.7, 2.5])
def test_smoothed_map_matches_scipy(sigma):
    maps = torch.rand(3, 12, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    wanted = np.stack([gaussian_filter(each, sigma, mode="mirror", truncate=4) for each in maps.numpy()])
    np.testing.assert_allclose(smoothed(maps, sigma), wanted, rtol=1e-9)
