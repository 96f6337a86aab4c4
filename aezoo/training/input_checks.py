"""Checks of model inputs (batches, samples, codes, counts) and of results of losses, with one-line errors."""

import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.training import sizes
from aezoo.training.seeding import forked_rng

if TYPE_CHECKING:
    from aezoo.training.interface import ModelInterface

_GUARDED = "_aezoo_guarded"
# methods with data arguments, and the attribute with the data's shape
_SHAPES = {
    "encode": "input_shape",
    "decode": "code_shape",
    "forward": "input_shape",
    "score": "input_shape",
    "loss": "input_shape",
    # methods of some kinds of models
    "encode_indices": "input_shape",
    "encode_symbols": "input_shape",
    "reconstruct_from": "input_shape",
    "inpaint": "input_shape",
    "anomaly_map": "input_shape",
}
# errors of layers for unsuitable tensors
_COMPLAINTS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def unpack(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Return the samples and labels of a batch `x`, `(x,)` or `(x, y)`.

    Raises:
        AezooError: the batch has another structure.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        return batch[0], batch[1] if len(batch) > 1 else None
    what = f"a dict with {', '.join(map(repr, batch))}" if isinstance(batch, dict) else _kind(batch)
    raise AezooError(f"a batch must be x, (x,) or (x, y) of tensors, got {what}: have the data set return those")


def warn_unused_parts(batch: Any) -> None:
    """Warn about parts of a batch that no model uses."""
    if isinstance(batch, list | tuple) and len(batch) > 2:
        rank_zero_warn(
            f"a batch has {len(batch)} parts: the first is read as x, the second as y, the others are "
            "ignored. For weights or masks in the loss, write your own model"
        )


def not_finite(x: Tensor) -> Tensor:
    """Return which samples have values that are not finite, (B, ...) -> (B,) bool."""
    return (~x.isfinite()).flatten(1).any(1)


def check_batch(model: "ModelInterface", x: Tensor) -> None:
    """See `Autoencoder.check_batch`."""
    if tuple(x.shape[1:]) != model.input_shape:
        raise AezooError(
            f"the model expects samples of shape {_shape_text(model.input_shape)}, the data give "
            f"{_shape_text(x.shape[1:])}: build the model with that input_shape or change the data's size and channels"
        )
    if not x.is_floating_point():
        raise AezooError(f"the model expects float data, got {x.dtype}: scale it first, for images x.float() / 255")
    if _too_wide(model, x):
        raise AezooError(
            "the data are float64, but the model's weights are float32: give x.float(), or train all in float64 with "
            "Trainer(precision='64-true')"
        )
    if bool((bad := model.invalid_mask(x)).any()):
        if model.takes_missing:
            raise AezooError(
                f"sample {int(bad.nonzero()[0])} of the batch contains infinite values, or NaN in some values of a "
                "part or in all parts: clean it; a part is missing where all its values are NaN"
            )
        hint = ", or use a model of samples that lack whole parts, such as mvae; aezoo impute fills missing values"
        hint = hint if x.isnan().any() else ""
        raise AezooError(f"the data contain NaN or infinite values: clean them first{hint}")
    known = x.nan_to_num(0.5)  # replaces missing values
    low, high = float(known.min()), float(known.max())
    slack = 1e-6 if model.training else 10.0
    if model.likelihood.unit_interval and not (low >= -slack and high <= 1 + slack):
        raise AezooError(
            f"this likelihood needs data in [0, 1], got values from {low:.4g} to {high:.4g}: "
            "scale the data, or use likelihood='gaussian'"
        )


@contextmanager
def _trial(model: "ModelInterface") -> Iterator[Tensor]:
    """Provide a sample of zeros for a model in evaluation mode, and restore its mode and random state afterwards."""
    weight = next(model.parameters(), torch.zeros(()))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), forked_rng(weight.device):
            yield torch.zeros(1, *model.input_shape, device=weight.device, dtype=weight.dtype)
    finally:
        for module, training in modes.items():
            module.training = training


def code_shape(model: "ModelInterface") -> tuple[int, ...]:
    """Return the shape of the code of a sample of zeros.

    Raises:
        AezooError: the model cannot encode the sample.
    """
    try:
        with _trial(model) as x:
            return tuple(model.encode(x).shape[1:])
    except AezooError:
        raise
    except Exception as error:
        raise AezooError(
            f"{type(model).__name__} sets no code_shape, and encoding a sample of zeros fails "
            f"({type(error).__name__}: {' '.join(str(error).split())[:160]}): set self.code_shape in its constructor"
        ) from error


def check_reconstruction(model: "ModelInterface") -> None:
    """Check that a user's model reconstructs samples in the same shape, which its loss may not require.

    Raises:
        AezooError: the shape is different.
    """
    if type(model).__module__.startswith("aezoo."):
        return  # `aezoo.testing` checks these
    try:
        with _trial(model) as x:
            found = tuple(model(x).shape[1:])
    except Exception:  # the training loop explains errors
        return
    if found != model.input_shape:
        raise AezooError(
            f"{type(model).__name__}.decode gives samples of shape {_shape_text(found) or 'no size'}, the data are "
            f"{_shape_text(model.input_shape)}: have decode return (B, {', '.join(map(str, model.input_shape))})"
        )


def guard(cls: type["ModelInterface"]) -> None:
    """Make a class raise one-line errors for unsuitable inputs, instead of errors from its layers.

    In evaluation mode, inputs are checked before the call, and a convolutional model accepts inputs of another size,
    see `aezoo.training.sizes`; in training, and for a loss, inputs are only checked after an error.

    Raises:
        AezooError: the loss cannot be called with samples and labels.
    """
    try:
        inspect.signature(cls.loss).bind(None, None, None)
    except TypeError as error:
        raise AezooError(f"{cls.__name__}.loss must take self, x and y: def loss(self, x, y=None)") from error
    for name, shape in _SHAPES.items():
        if hasattr(cls, name):
            _replace(cls, name, functools.partial(_check_data, shape=shape))
    _replace(cls, "sample", _check_count)


def _replace(cls: type, name: str, wrapper: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
    method = getattr(cls, name)
    if not hasattr(method, _GUARDED):
        guarded = wrapper(method)
        setattr(guarded, _GUARDED, True)
        setattr(cls, name, guarded)


def _check_data(method: Callable[..., Any], shape: str) -> Callable[..., Any]:
    is_loss = method.__name__ == "loss"  # the training loop checks its batches

    @functools.wraps(method)
    def guarded(self: "ModelInterface", x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(self, x, *args, **kwargs)
        if not (is_loss or self.training):
            if (sized := _at_size_of(self, x, shape)) is not None:
                return getattr(sized, method.__name__)(x, *args, **kwargs)
            _check(self, method.__name__, x, shape)
        try:
            result = method(self, x, *args, **kwargs)
        except _COMPLAINTS as error:
            if not isinstance(error, AezooError):
                check_parts(self, error)
                _check(self, method.__name__, x, shape, error)
            raise
        if is_loss and not (isinstance(result, dict) and "loss" in result):
            got = f"only {', '.join(map(repr, result))}" if isinstance(result, dict) and result else _kind(result)
            name = f"{type(self).__name__}.loss"
            raise AezooError(f"{name} must return named scalars, {{'loss': ..., 'nll': ...}}, got {got}")
        return result

    return guarded


def _at_size_of(model: "ModelInterface", x: Any, shape: str) -> "ModelInterface | None":
    """Return the model for inputs of another size; None if they have the model's size or are invalid."""
    if not isinstance(x, Tensor) or tuple(x.shape[1:]) == getattr(model, shape):
        return None
    for_inputs = sizes.for_samples if shape == "input_shape" else sizes.for_codes
    return for_inputs(model, tuple(x.shape[1:]))


def check_parts(model: "ModelInterface", failed: Exception) -> None:
    """Explain an error caused by a missing encoder or decoder.

    Raises:
        AezooError: the error has this cause.
    """
    kind = type(model).__name__
    for part, method in (("encoder", "encode"), ("decoder", "decode")):
        if isinstance(failed, AttributeError) and f"{kind!r} object has no attribute {part!r}" in str(failed):
            raise AezooError(
                f"{kind} sets no {part}: set self.{part} in its constructor, or write {method} without it"
            ) from failed


def _check(model: "ModelInterface", name: str, x: Any, shape: str, failed: Exception | None = None) -> None:
    if not isinstance(x, Tensor):
        raise AezooError(
            f"{name} expects a tensor, got {_kind(x)}: give torch.as_tensor(x, dtype=torch.float32)"
        ) from failed
    expected: tuple[int, ...] = getattr(model, shape)
    if tuple(x.shape[1:]) != expected:
        what = "samples" if shape == "input_shape" else "codes"
        raise AezooError(
            f"{name} expects {what} of shape Bx{_shape_text(expected)}, got {_shape_text(x.shape)}: one sample needs a "
            "batch dimension too, x[None]; another size needs another model, or resized data"
        ) from failed
    if not x.is_floating_point():
        raise AezooError(f"{name} expects float data, got {x.dtype}: for images x.float() / 255") from failed
    if _too_wide(model, x):
        raise AezooError(
            f"{name} expects float32 like the model's weights, got float64: give x.float(), or use model.double()"
        ) from failed
    if failed is None:  # finding a weight takes as long as a small layer
        return
    weight = next(model.parameters(), x)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise AezooError(
            f"{name} expects {weight.dtype} like the model's weights, got {x.dtype}: give x.to({weight.dtype}), or "
            "use model.float()"
        ) from failed


def _check_count(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(method)
    def guarded(self: "ModelInterface", n: int, *args: Any, **kwargs: Any) -> Tensor:
        try:
            count = operator.index(n)
        except TypeError:
            count = -1
        if count < 0:
            raise AezooError(f"sample takes a whole number of samples, at least 0, got {n!r}")
        return method(self, count, *args, **kwargs)

    return guarded


def _too_wide(model: "ModelInterface", x: Tensor) -> bool:
    if x.dtype != torch.float64:
        return False
    weight = next(model.parameters(), None)
    return weight is not None and weight.dtype == torch.float32


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {_shape_text(value.shape)}" if value.ndim else "one tensor"
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__} of shape {_shape_text(shape)}" if isinstance(shape, tuple) else type(value).__name__


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)
