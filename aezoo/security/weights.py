"""Checks of weights from a file: tensors are complete, and the model is not larger than the weights."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from aezoo.errors import AezooError

# parameters and their number that a model may still have, by the thread that builds it
_left: dict[int, list[int]] = {}


def check_tensors(weights: Mapping[Any, Any], source: Path, name: str) -> dict[str, Tensor]:
    """The weights, after checking that each is a named tensor with all the memory that its shape needs.

    Args:
        weights: a state dict.
        source: the file that it comes from.
        name: name of the model that it is for.

    Raises:
        AezooError: a check fails.
    """
    for key, value in weights.items():
        reason = None
        if not isinstance(key, str):
            reason = f"the name {str(key)[:50]} is not a string"
        elif not isinstance(value, Tensor):
            reason = f"{key} is a {type(value).__name__}, not a tensor"
        elif value.layout != torch.strided or value.is_quantized or value.is_meta:
            reason = f"{key} is not a dense tensor"
        elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
            reason = f"{key} claims to have {value.numel()} values and has fewer"
        if reason:
            raise AezooError(f"the weights in {source} do not fit {name}: {reason}")
    return dict(weights)


@contextlib.contextmanager
def limit_parameters(weights: Mapping[str, Tensor], reason: str = "") -> Iterator[None]:
    """Stop building a model inside this context, for a reason, once it has far more parameters than the weights."""
    reason = reason or f"its hyperparameters ask for far more than the {len(weights)} tensors in the file"
    most = 2 * sum(weight.numel() for weight in weights.values()) + 10**7
    thread, left = threading.get_ident(), [most, 10 * len(weights) + 10_000]
    outer = _left.get(thread)
    _left[thread] = left

    def count(parent: Any, key: str, parameter: Any) -> None:
        if threading.get_ident() == thread and parameter is not None:
            left[0] -= parameter.numel()
            left[1] -= 1
            if min(left) < 0:
                raise AezooError(reason)

    hook = torch_module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
        if outer is None:
            del _left[thread]
        else:
            _left[thread] = outer


@contextlib.contextmanager
def separate_limit(most: int) -> Iterator[None]:
    """Within `limit_parameters`, set another limit for what is built inside this context.

    Args:
        most: parameters of a network of a library, which is built whole although the model keeps only its first layers.
    """
    left = _left.get(threading.get_ident())
    before = None if left is None else [*left]
    if left is not None:
        left[:] = [most, 10**6]
    try:
        yield
    finally:
        if left is not None and before is not None:
            left[:] = before
