"""Tests of aezoo/nets/blocks/channel_stats.py."""

import math

import numpy as np
import pytest
import torch

from aezoo.nets.blocks.channel_stats import Standardiser

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- standardised codes ----------------------------------------------------------------------------------------------


def test_standardiser_moments_match_all_observed_codes() -> None:
    module, seen = Standardiser(3).double(), []
    for step in range(9):
        seen.append(torch.randn(5, 3, 4, 2, dtype=torch.float64) * (step + 1) + step)
        module.observe(seen[-1], lambda values: values.mean(0))
    codes = np.concatenate([part.numpy() for part in seen])
    np.testing.assert_allclose(module.mean_C.numpy(), codes.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(module.std_C.numpy(), codes.std((0, 2, 3)), rtol=1e-9)
    z = torch.from_numpy(codes)
    np.testing.assert_allclose(module(z).numpy().mean((0, 2, 3)), 0, atol=1e-9)
    np.testing.assert_allclose(module(z).numpy().std((0, 2, 3)), 1, rtol=1e-9)
    torch.testing.assert_close(module.restore(module(z)), z)


def test_later_moments_are_moving_averages_of_100_steps() -> None:
    module = Standardiser(1).double()
    z = torch.tensor([[[2.0, 4.0]]], dtype=torch.float64)  # mean 3, variance 1
    module.count.fill_(5000)
    module.observe(z, lambda values: values.mean(0))
    assert module.mean_C.item() == pytest.approx(0.03)
    # 0.99 (1 + 0) + 0.01 (1 + 9) - 0.03^2
    assert module.std_C.item() == pytest.approx(math.sqrt(0.99 + 0.1 - 0.0009))


def test_constant_codes_can_be_standardised() -> None:
    module = Standardiser(2)
    module.observe(torch.ones(3, 2, 4), lambda values: values.mean(0))
    assert module(torch.ones(3, 2, 4)).abs().max() < 1e-3
