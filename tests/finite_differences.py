"""Comparison of gradients of functions, modules and networks with finite differences, in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from aezoo import nets


def assert_gradients_match(function: Callable[..., Any], *inputs: Tensor, **fixed: Any) -> None:
    """Check all outputs of a function, or of a module, whose parameters are changed at random and checked as well."""
    given = [x.detach().double().requires_grad_() for x in inputs]
    if not isinstance(function, nn.Module):
        assert gradcheck(lambda *values: function(*values, **fixed), given, fast_mode=True)
        return
    module = function.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(*values: Tensor) -> Any:
        return functional_call(module, dict(zip(names, values[len(given) :], strict=True)), values[: len(given)], fixed)

    assert gradcheck(run, [*given, *parameters], fast_mode=True)


def assert_network_gradients_match(name: str, shape: Sequence[int] = (2, 6, 5)) -> None:
    """Check the encoder and decoder of a network."""
    shape = tuple(shape)
    assert_gradients_match(nets.encoder(name, shape, (3,), (8, 8), "silu"), torch.rand(2, *shape))
    assert_gradients_match(nets.decoder(name, (3,), shape, (8, 8), "silu"), torch.rand(2, 3))
