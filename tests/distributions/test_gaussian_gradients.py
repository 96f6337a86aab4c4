"""Gradients of aezoo/distributions/gaussians.py against finite differences."""

import torch
from finite_differences import assert_gradients_match
from torch import Tensor

from aezoo.distributions import gaussians


def test_gaussian_gradients_match_finite_differences() -> None:
    mu, log_var, other_mu, other_log_var = torch.randn(4, 3, 2, 4)
    assert_gradients_match(gaussians.kl, mu, log_var, other_mu, other_log_var)
    assert_gradients_match(gaussians.product, mu, log_var)
    assert_gradients_match(gaussians.mixture_moments, mu, log_var, torch.rand(3, 2))
    assert_gradients_match(gaussians.product_of_posteriors, mu, torch.randn(3, 2, 4, 4) / 4)

    def draw(mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return gaussians.rsample(mu, log_var, 5)

    assert_gradients_match(draw, mu, log_var)


def test_mixture_gradients_match_finite_differences() -> None:
    def density(z: Tensor, phi: Tensor, mu: Tensor, root: Tensor) -> Tensor:
        return gaussians.mixture_log_density(z, phi.softmax(0), mu, root @ root.mT)

    assert_gradients_match(density, torch.randn(5, 3), torch.randn(2), torch.randn(2, 3), torch.randn(2, 3, 3))
