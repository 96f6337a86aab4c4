"""Tests of aezoo/nets/gdn.py."""

import copy

import numpy as np
import pytest
import torch
from finite_differences import assert_network_gradients_match

from aezoo.nets.gdn import GDN

# ---- generalised divisive normalisation ------------------------------------------------------------------------------


def test_gdn_and_its_inverse_match_formula() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    layer, inverse_layer = GDN(3).double(), GDN(3, inverse=True).double()
    with torch.no_grad():
        for part in (layer, inverse_layer):
            part.root_beta_C.copy_(torch.tensor([0.5, 1.0, 2.0]))
            part.root_gamma_CC.copy_(torch.tensor([[0.3, -0.2, 0.1], [0.4, 0.6, 0.0], [0.2, 0.1, 0.5]]))
    beta, gamma = np.array([0.25, 1.0, 4.0]) + 1e-6, layer.root_gamma_CC.detach().numpy() ** 2
    size = np.empty(x.shape)
    for i in range(3):
        size[:, i] = beta[i] + sum(gamma[i, j] * x[:, j].numpy() ** 2 for j in range(3))
    np.testing.assert_allclose(layer(x).detach().numpy(), x.numpy() / np.sqrt(size))
    np.testing.assert_allclose(inverse_layer(x).detach().numpy(), x.numpy() * np.sqrt(size))


@pytest.mark.parametrize("inverse", [False, True])
def test_float16_gdn_handles_overflowing_squares(inverse: bool) -> None:
    """300^2 exceeds 65,504, the largest float16."""
    x = torch.tensor([300.0, -20.0, 1000.0]).repeat(2, 1)[..., None].requires_grad_()
    layer, sign = GDN(3, inverse), torch.tensor([1.0, -1.0, 1.0])[:, None]
    exact = layer(x)
    for given, autocast in ((layer, True), (copy.deepcopy(layer).half(), False)):
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            found = given(x.half())
        assert found.dtype == torch.float16
        scale = 1e-3 if inverse else 1.0
        small = exact.abs() < 6e4  # the inverse maps 1000 beyond the range of float16
        torch.testing.assert_close((scale * found.float())[small], (scale * exact)[small], rtol=5e-3, atol=1e-3)
        (slope,) = torch.autograd.grad((sign * found.float())[small].sum(), x)
        assert bool(slope.isfinite().all())


@pytest.mark.parametrize("grid", [(7,), (4, 5), (2, 3, 4)])
def test_inverse_gdn_undoes_gdn_for_zero_gamma(grid: tuple[int, ...]) -> None:
    """Exact for gamma = 0 only; otherwise the inverse layer is one step of a fixed-point iteration."""
    x = torch.randn(2, 3, *grid, dtype=torch.float64)
    layer, inverse_layer = GDN(3).double(), GDN(3, inverse=True).double()
    with torch.no_grad():
        for part in (layer, inverse_layer):
            part.root_beta_C.uniform_(0.5, 2).copy_(torch.tensor([0.6, 1.1, 1.7]))
            part.root_gamma_CC.zero_()
    torch.testing.assert_close(inverse_layer(layer(x)), x)
    with torch.no_grad():
        inverse_layer.root_gamma_CC.fill_(0.3)
        layer.root_gamma_CC.fill_(0.3)
    assert not torch.allclose(inverse_layer(layer(x)), x, atol=1e-2)


def test_gradients_match_finite_differences() -> None:
    assert_network_gradients_match("gdn")
