"""Likelihoods as a fit computes them: the same values and derivatives, without copies of images."""

import math
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from aezoo.distributions import likelihoods
from aezoo.distributions.likelihoods import Likelihood
from aezoo.speed.layers import swap_in

NAMES = (*likelihoods.LIKELIHOODS, "gaussian:learned", "gaussian:0.3")


def likelihood(name: str) -> Likelihood:
    """A likelihood with the faster class swapped in."""
    made = likelihoods.likelihood(name)
    assert swap_in(made, channels_last=True) == [made]
    return made


@pytest.mark.parametrize("name", ["bernoulli", "continuous_bernoulli"])
def test_compiled_cross_entropy_equals_eager(name: str) -> None:
    made = likelihood(name)
    t = torch.linspace(-60, 60, 241)[:, None].repeat(1, 3).requires_grad_()
    x = torch.tensor([0.0, 0.3, 1.0]).repeat(241, 1).requires_grad_()
    # of each value alone, so that none hides behind a larger one
    compiled = torch.compile(lambda t, x: made.log_prob(t.reshape(-1, 1), x.reshape(-1, 1)), backend="eager")
    found, wanted = compiled(t, x), made.log_prob(t.double().reshape(-1, 1), x.double().reshape(-1, 1))
    weights = torch.rand_like(found)
    slopes, wanted_slopes = (torch.autograd.grad(v, (t, x), weights.to(v.dtype)) for v in (found, wanted))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    for slope, right in zip(slopes, wanted_slopes, strict=True):
        torch.testing.assert_close(slope, right, rtol=1e-5, atol=1e-6)


def test_compiled_cross_entropy_is_exact_when_small() -> None:
    t = torch.linspace(-80, 10, 1001)[:, None]
    compiled = torch.compile(likelihood("bernoulli").log_prob, backend="eager", dynamic=False)
    exact = torch.log1p(torch.exp(t.double())).sum(1)
    torch.testing.assert_close(-compiled(t, torch.zeros_like(t)).double(), exact, rtol=3e-7, atol=0)


@pytest.mark.parametrize("shape", [(64, 784), (8, 3, 64, 64), (64, 3, 16, 16)])
def test_cross_entropy_matches_torch_with_derivatives(shape: tuple[int, ...]) -> None:
    made, draw = likelihood("bernoulli"), torch.Generator().manual_seed(0)
    t, x = 8 * torch.randn(shape, generator=draw), torch.rand(shape, generator=draw)
    t[0], x[0] = 1e4, 1
    t[1], x[1] = -1e4, 1
    t[2] = 0
    if len(shape) == 4:
        t, x = (a.contiguous(memory_format=torch.channels_last) for a in (t, x))
    weights = torch.rand(len(t), generator=draw)

    def derivatives(t: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, again: bool) -> list[torch.Tensor]:
        inputs = [a.detach().requires_grad_() for a in (t, x)]
        found = made.log_prob(*inputs)
        first = torch.autograd.grad(found, inputs, weights, create_graph=again)
        second = torch.autograd.grad(first[0].square().sum(), inputs) if again else ()
        return [found.detach(), *first, *second]

    for again in (False, True):
        exact = derivatives(t.double(), x.double(), weights.double(), again)
        for found, wanted in zip(derivatives(t, x, weights, again), exact, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert type(made.log_prob(t.requires_grad_(), x).grad_fn.next_functions[0][0]).__name__ == "_CrossEntropyBackward"


def test_batched_cross_entropy_is_as_exact_as_torch() -> None:
    t, x = torch.full((64, 784), -20.0), torch.zeros(64, 784)
    exact = 784 * math.log1p(math.exp(-20.0))
    assert (-likelihood("bernoulli").log_prob(t, x) - exact).abs().max() < 2e-6
    t, x = 8 * torch.randn(64, 784), torch.rand(64, 784)
    by_torch = torch.nn.functional.binary_cross_entropy_with_logits
    wanted = by_torch(t.double(), x.double(), reduction="none").sum(1)
    own, others = -likelihood("bernoulli").log_prob(t, x), by_torch(t, x, reduction="none").sum(1)
    assert (own - wanted).square().mean() < 2 * (others - wanted).square().mean()


def test_cross_entropy_supports_batched_gradients() -> None:
    made, weights = likelihood("bernoulli"), torch.rand(2, 48)
    inputs = [torch.randn(48, 784).requires_grad_(), torch.rand(48, 784).requires_grad_()]
    many = torch.autograd.grad(made.log_prob(*inputs), inputs, weights, is_grads_batched=True)
    each = [torch.autograd.grad(made.log_prob(*inputs), inputs, weight) for weight in weights]
    for found, *wanted in zip(many, *each, strict=True):
        torch.testing.assert_close(found, torch.stack(wanted))


def test_cross_entropy_traces_with_symbolic_sizes() -> None:
    made, samples = likelihood("bernoulli"), (torch.zeros(48, 784), torch.ones(48, 784))
    traced = make_fx(lambda t, x: made.log_prob(t, x), tracing_mode="symbolic")(*samples)
    t, x = torch.randn(3, 5), torch.rand(3, 5)
    torch.testing.assert_close(traced(t, x), made.log_prob(t, x))


class Noted(TorchDispatchMode):
    """Operations by name."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self.names: list[str] = []
        return super().__enter__()


@pytest.mark.parametrize("name", NAMES)
def test_images_with_channels_last_are_not_copied(name: str) -> None:
    own, shape = likelihood(name).double(), (3, 2, 4, 5)
    params, x = torch.randn(shape, dtype=torch.float64), torch.randint(256, shape) / torch.tensor(255.0).double()
    last = [t.contiguous(memory_format=torch.channels_last) for t in (params, x)]
    last[0].requires_grad_()
    with Noted() as noted:
        found = own.log_prob(*last)
        torch.autograd.grad(found.sum(), last[0])
    torch.testing.assert_close(found, own.log_prob(params, x))
    assert "clone" not in noted.names
    # and where only one of the two lies so
    torch.testing.assert_close(own.log_prob(params, last[1]), found)


def test_cross_entropy_follows_memory_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel copies others, where no test sees it."""
    seen, real = [], torch.nn.functional.binary_cross_entropy_with_logits

    def noted(*args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.extend(t.is_contiguous() for t in args)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy_with_logits", noted)
    params, x = (torch.rand(3, 2, 4, 5).contiguous(memory_format=torch.channels_last) for _ in range(2))
    likelihood("bernoulli").log_prob(params, x)
    assert seen == [True, True]
