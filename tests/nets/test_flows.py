"""Tests of aezoo/nets/blocks/flows.py."""

import math

import pytest
import torch
from finite_differences import assert_gradients_match

from aezoo.nets.blocks import flows
from aezoo.nets.blocks.flows import MADE

# ---- determinants ----------------------------------------------------------------------------------------------------


def test_flow_steps_are_invertible_for_any_parameters() -> None:
    """And finite in float32, also for saturated softplus and tanh."""
    z = torch.linspace(-30, 30, 2001)[:, None]
    for scale in (1, 10, 100, 1e4):
        for step, size in flows.FLOWS.values():
            for seed in range(20):
                p = scale * torch.randn(1, size(1), generator=torch.Generator().manual_seed(seed))
                moved, log_det = step(z, p)
                assert moved.isfinite().all() and log_det.isfinite().all()
                assert (moved.diff(dim=0) >= -1e-5 * moved.abs().max()).all()
    # with u in place of u' a planar step is not monotone for w u = -3
    assert (z + -3.0 * torch.tanh(z)).diff(dim=0).min() < 0
    # nor is a radial step with b' = b < -a, here a = 1
    assert (z - 2 * z / (1 + z.abs())).diff(dim=0).min() < 0


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("name", flows.FLOWS)
def test_log_determinant_is_that_of_the_jacobian(name: str, d: int) -> None:
    step, size = flows.FLOWS[name]
    generator = torch.Generator().manual_seed(d)
    p = torch.randn(4, size(d), dtype=torch.float64, generator=generator)
    z = torch.randn(4, d, dtype=torch.float64, generator=generator)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z, p: step(z, p)[0]))(z, p)
    sign, expected = torch.linalg.slogdet(jacobian)
    assert (sign == 1).all() and expected.abs().max() > 0.01
    torch.testing.assert_close(step(z, p)[1], expected)


def test_above_minus_one_is_inverted_over_its_range() -> None:
    """From where the softplus is almost 0 to where it is linear."""
    t = torch.linspace(-12, 40, 101, dtype=torch.float64)
    m = flows.above_minus_one(t)
    assert (m > flows.FLOOR - 1).all() and (m.diff() > 0).all()
    torch.testing.assert_close(flows.inverse_above_minus_one(m), t)
    torch.testing.assert_close(flows.inverse_above_minus_one(torch.zeros(1)), torch.zeros(1))


def test_planar_step_matches_paper() -> None:
    z, u, w = torch.randn(3, 4, 5, dtype=torch.float64)
    b = torch.randn(4, 1, dtype=torch.float64)
    moved, log_det = flows.planar(z, torch.cat([u, w, b], 1))
    h = torch.tanh((w * z).sum(1, keepdim=True) + b)
    u_hat = (moved - z) / h
    # u' - u is parallel to w, and w u' = m(w u) > -1
    torch.testing.assert_close(u_hat - u, (u_hat - u) * w / w**2 * w)
    along = ((u_hat - u) * w).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True)
    torch.testing.assert_close(u_hat - u, along * w)
    w_u = (w * u).sum(1)
    m = torch.log1p(torch.exp(w_u + math.log(math.expm1(0.999)))) - 0.999
    torch.testing.assert_close((u_hat * w).sum(1), m)
    assert (m > -1).all()
    psi = (1 - h**2) * w
    torch.testing.assert_close(log_det, (1 + (u_hat * psi).sum(1)).abs().log())


@pytest.mark.parametrize("d", [1, 4, 10])
def test_sylvester_step_matches_paper(d: int) -> None:
    """With Q, R and S written out as matrices."""
    generator = torch.Generator().manual_seed(d)
    p = torch.randn(1, flows.FLOWS["sylvester"][1](d), dtype=torch.float64, generator=generator)
    z = torch.randn(3, d, dtype=torch.float64, generator=generator)
    both, s_diagonal, b, axes = p[0].split([d * d, d, d, d * min(d, 8)])
    both, eye = both.reshape(d, d), torch.eye(d, dtype=torch.float64)
    q = eye
    for v in axes.reshape(-1, d):
        q = q @ (eye - 2 * torch.outer(v, v) / (v @ v))
    torch.testing.assert_close(q @ q.T, eye)
    r = both.triu(1) + torch.diag(0.999 * both.diagonal().tanh())
    s = both.T.triu(1) + torch.diag(0.999 * s_diagonal.tanh())
    moved, log_det = flows.sylvester(z, p)
    inner = z @ q @ s.T + b
    torch.testing.assert_close(moved, z + torch.tanh(inner) @ r.T @ q.T)
    expected = (1 + (1 - torch.tanh(inner) ** 2) * r.diagonal() * s.diagonal()).log().sum(1)
    torch.testing.assert_close(log_det, expected)


def test_radial_flow_moves_along_rays() -> None:
    z, centre = torch.randn(2, 4, 3, dtype=torch.float64)
    a, b = torch.randn(2, 4, 1, dtype=torch.float64)
    moved, _ = flows.radial(z, torch.cat([centre, a, b], 1))
    r = (z - centre).norm(dim=1, keepdim=True)
    a_hat = torch.log1p(a.exp()) + 1e-3
    b_hat = a_hat * (torch.log1p(torch.exp(b + math.log(math.expm1(0.999)))) - 0.999)
    torch.testing.assert_close(moved, z + b_hat / (a_hat + r) * (z - centre))
    assert (b_hat > -a_hat).all()
    at_centre = flows.radial(centre.requires_grad_(), torch.cat([centre.detach(), a, b], 1))
    at_centre[1].sum().backward()
    assert at_centre[0].isfinite().all() and centre.grad is not None and centre.grad.isfinite().all()


# ---- autoregression --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "hidden"), [(1, 4), (5, 3), (5, 5), (5, 16)])
def test_autoregressive_net_depends_on_past_and_context(size: int, hidden: int) -> None:
    torch.manual_seed(0)
    made = MADE(size, hidden).double()
    z, context = torch.randn(size, dtype=torch.float64), torch.randn(hidden, dtype=torch.float64)
    for which in (0, 1):
        of_z, of_h = torch.autograd.functional.jacobian(
            lambda z, h, w=which: made(z[None], h[None])[w][0], (z, context)
        )
        assert torch.equal(of_z, of_z.tril(-1))
        assert (of_h.abs().sum(1) > 0).all()  # also of the first value, which depends on the context alone
        if hidden >= size:
            assert (of_z.tril(-1).abs() > 0).sum() == size * (size - 1) / 2


@pytest.mark.parametrize("name", flows.FLOWS)
def test_flow_gradients_match_finite_differences(name: str) -> None:
    step, size = flows.FLOWS[name]
    assert_gradients_match(step, torch.randn(3, 5), torch.randn(3, size(5)))


def test_masked_flow_gradients_match_finite_differences() -> None:
    flow = flows.AutoregressiveFlow(4, 2, 6)
    assert_gradients_match(flow, torch.randn(3, 4))
    assert_gradients_match(flow.inverse, torch.randn(3, 4))
    assert_gradients_match(MADE(4, 6), torch.randn(3, 4), torch.randn(3, 6))
