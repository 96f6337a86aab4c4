"""Likelihoods in a fit have the same values and derivatives, without copies of images."""

from typing import Any

import pytest
import torch
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


class Noted(TorchDispatchMode):
    """Records operations by name."""

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
    # also if only one of the two has this layout
    torch.testing.assert_close(own.log_prob(params, last[1]), found)


def test_cross_entropy_is_computed_in_memory_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel copies tensors of other layouts, which is not visible in the operations."""
    seen, real = [], torch.nn.functional.binary_cross_entropy_with_logits

    def noted(*args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.extend(t.is_contiguous() for t in args)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy_with_logits", noted)
    params, x = (torch.rand(3, 2, 4, 5).contiguous(memory_format=torch.channels_last) for _ in range(2))
    likelihood("bernoulli").log_prob(params, x)
    assert seen == [True, True]
