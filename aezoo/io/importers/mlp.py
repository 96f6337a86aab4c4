"""Multilayer perceptrons of other libraries: checks of settings and weights, and conversion to `mlp`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.io.importers.sparse_dictionary import value_of
from aezoo.registry import create_model
from aezoo.security.weights import limit_parameters

Layer = tuple[Tensor, Tensor]


def shape_of(value: Any, what: str) -> tuple[int, ...]:
    """Return the shape of samples in a configuration.

    Args:
        value: the value in the configuration.
        what: name and file of the value, for messages.

    Raises:
        AezooError: the value is not a list of 1 to 4 integers above 0 and below 2^31.
    """
    if (
        not isinstance(value, list)
        or not 1 <= len(value) <= 4
        or any(type(n) is not int or not 1 <= n < 2**31 for n in value)
    ):
        raise AezooError(
            f"{what} must be a list of 1 to 4 whole numbers above 0 and below 2^31, got {str(value)[:50]!r}"
        )
    return tuple(value)


class Settings:
    """Values of a configuration, each checked when it is read.

    Args:
        values: values by name.
        label: the file.

    Raises:
        AezooError: (methods) a value is missing and has no default, has another type, or is out of range.
    """

    def __init__(self, values: Mapping[str, Any], label: str) -> None:
        self.values, self.label = values, label

    def text(self, key: str) -> str:
        """Return a string."""
        found: str = value_of(self.values, key, str, self.label)
        return found

    def flag(self, key: str, default: bool) -> bool:
        """Return a bool."""
        found: bool = value_of(self.values, key, bool, self.label, default)
        return found

    def number(self, key: str, default: float) -> float:
        """Return a finite number."""
        return self._finite(key, value_of(self.values, key, float, self.label, default))

    def above_zero(self, key: str, default: float) -> float:
        """Return a finite number above 0."""
        found = self.number(key, default)
        if found <= 0:
            raise AezooError(f"{self.label}: {key} must be above 0 for a loss of the zoo, got {found:g}")
        return found

    def count(self, key: str, default: int | None = None) -> int:
        """Return an integer above 0."""
        found: int = value_of(self.values, key, int, self.label, default)
        if not 1 <= found < 2**31:
            raise AezooError(f"{self.label}: {key} must be a whole number above 0, got {str(found)[:50]!r}")
        return found

    def choice(self, key: str, default: str, meanings: Mapping[str, str]) -> str:
        """Return the meaning of a string."""
        found = value_of(self.values, key, str, self.label, default)
        if found not in meanings:
            raise AezooError(f"{self.label}: {key} must be {' or '.join(meanings)}, got {found[:50]!r}")
        return meanings[found]

    def numbers(self, key: str, default: Sequence[float]) -> tuple[float, ...]:
        """Return finite numbers from a list; (1,) for null."""
        found = self.values.get(key, default)
        if found is None:
            return (1.0,)
        if not isinstance(found, list | tuple) or any(type(value) not in (int, float) for value in found):
            raise AezooError(f"{self.label}: {key} must be a list of numbers, got {str(found)[:50]!r}")
        return tuple(self._finite(key, value) for value in found)

    def _finite(self, key: str, value: float) -> float:
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if not math.isfinite(found):
            raise AezooError(f"{self.label}: {key} must be a finite number")
        return found


class Weights:
    """Access to the layers among the tensors of a file.

    Args:
        tensors: tensors by name.
        label: the file.
    """

    def __init__(self, tensors: Mapping[str, Tensor], label: str) -> None:
        self.tensors, self.label = tensors, label

    def layer(self, name: str, inputs: int, outputs: int | None = None) -> Layer:
        """Return weight and bias of a linear layer.

        Args:
            name: name of the layer.
            inputs: number of inputs.
            outputs: number of outputs; any if None.

        Raises:
            AezooError: the numbers of inputs or outputs differ.
        """
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        found = tuple(weight.shape)
        if weight.ndim != 2 or found[1] != inputs or outputs not in (None, found[0]) or bias.shape != found[:1]:
            wanted = f"({'any number' if outputs is None else outputs}, {inputs})"
            raise AezooError(
                f"{self.label}: {name} has the shapes {found} and {tuple(bias.shape)}; configuration and other layers "
                f"require {wanted}: they do not belong to one model"
            )
        return weight, bias


def names(*layers: str) -> list[str]:
    """Return the names of the tensors of linear layers."""
    return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


def build(name: str, input_shape: tuple[int, ...], weights: Weights, label: str, **settings: Any) -> Any:
    """Build a model for given weights.

    Args:
        name: registry name.
        input_shape: shape of a sample.
        weights: weights of the file, which limit the model's size.
        label: the configuration, for messages.
        **settings: arguments of the model.

    Raises:
        AezooError: the constructor rejects a setting.
    """
    try:
        with limit_parameters(weights.tensors):
            return create_model(name, input_shape, **settings)
    except AezooError as error:
        raise AezooError(f"{label}: {error}") from error


@torch.no_grad()
def fill(net: nn.Module, layers: Sequence[Layer]) -> None:
    """Copy weights and biases to the linear layers of a network, in order."""
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    for module, (weight, bias) in zip(linear, layers, strict=True):
        if module.weight.shape != weight.shape:  # copy_ would broadcast
            raise ValueError(f"a layer of {tuple(module.weight.shape)} cannot contain {tuple(weight.shape)}")
        module.weight.copy_(weight)
        module.bias.copy_(bias)
