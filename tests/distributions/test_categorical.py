"""Tests of aezoo/distributions/categorical.py."""

import torch
import torch.distributions as D
from scipy.stats import ks_2samp

from aezoo.distributions.categorical import sample_gumbel

# ---- the relaxation --------------------------------------------------------------------------------------------------


def test_gumbel_noise_has_its_distribution() -> None:
    noise = sample_gumbel(torch.zeros(20_000))
    wanted = D.Gumbel(0.0, 1.0).sample((20_000,))
    assert ks_2samp(noise.numpy(), wanted.numpy()).pvalue > 1e-4
