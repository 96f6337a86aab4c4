"""Tests of aezoo/nets/blocks/levels.py."""

import torch
import torch.distributions as D
from finite_differences import assert_gradients_match
from torch import Tensor

from aezoo.nets.blocks.levels import Level, gaussian


def normal(mu: Tensor, log_var: Tensor) -> D.Normal:
    return D.Normal(mu, torch.exp(0.5 * log_var))


# ---- KL divergence ---------------------------------------------------------------------------------------------------


def test_level_kl_matches_torch_distributions() -> None:
    mu, log_var, m, log_s2 = (torch.randn(4, 6, 5).double().requires_grad_() for _ in range(4))
    found = Level(mu, mu, mu, log_var, m, log_s2).kl()
    expected = D.kl_divergence(normal(mu, log_var), normal(m, log_s2)).sum(-1)
    torch.testing.assert_close(found, expected)
    weights = torch.rand(4, 6).double()
    variables = (mu, log_var, m, log_s2)
    for a, b in zip(
        torch.autograd.grad((weights * found).sum(), variables),
        torch.autograd.grad((weights * expected).sum(), variables),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    # also where a float32 variance would overflow
    far = torch.full((1, 1), 20.0)
    assert Level(far, far, far, far, -far, -far).kl().isfinite()


def test_level_gradients_match_finite_differences() -> None:
    def densities(values: Tensor, others: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        level = Level.from_distributions(gaussian(values), gaussian(others))
        return level.z, level.kl(), level.log_q(), level.log_p()

    assert_gradients_match(densities, torch.randn(3, 8), torch.randn(3, 8))
