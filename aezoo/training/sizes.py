"""One model for samples of any size: the same weights in networks that are built for another grid."""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.security.weights import limit_parameters
from aezoo.training.model_names import display_name
from aezoo.training.seeding import forked_rng

if TYPE_CHECKING:
    from aezoo.training.interface import ModelInterface

Model = TypeVar("Model", bound="ModelInterface")
# attributes that are set on a model, in addition to its weights and hyperparameters
_SETTINGS = ("compile_mode", "importance_samples", "data_units", "takes_bytes", "quality")
_FIXED = (
    "its weights belong to this size; resize the data (--data.size), or train a convolutional model whose code is a "
    "map, such as vq_vae, or conv_ae with latent_map"
)
# a multiple of all strides, to measure one
_LARGE = 1024


def at_size(model: Model, size: Sequence[int]) -> Model:
    """The same model for samples of another size; it shares the weights.

    The weights of convolutions do not depend on the size of a sample, so a convolutional model whose code is a map
    accepts any. Each stage halves each side, rounded up, and the decoder restores exactly the same sides: nothing is
    padded or cropped.

    Args:
        model: a model of (C, L), (C, H, W) or (C, D, H, W).
        size: (L,), (H, W) or (D, H, W); the channels stay.

    Returns:
        A new model, or the given one if it has this size.

    Raises:
        AezooError: weights of the model belong to the size that it was built for, or it refuses this one.
    """
    shape = (model.input_shape[0], *map(int, size))
    return model if shape == model.input_shape else rebuilt(model, shape)


def rebuilt(model: Model, shape: tuple[int, ...], device: str | None = None) -> Model:
    """A new model for samples of a shape that shares the weights, or has none that can be used, on the device meta."""
    if len(shape) != len(model.input_shape) or len(shape) < 2 or min(shape) < 1:
        raise _refusal(model, shape, f"it needs {len(model.input_shape) - 1} numbers above 0")
    weights = model.state_dict(keep_vars=True)
    try:
        with limit_parameters(weights, _FIXED):
            # before memory is allocated, since a dense layer has as many weights as a sample has values
            with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):
                trial = _check_weights(_construct(model, shape), weights)
                if device == "meta":
                    return trial
            with forked_rng(torch.device("cpu")):
                sized = _check_weights(_construct(model, shape), weights)
    except AezooError as error:
        raise _refusal(model, shape, str(error)) from error
    like = next((value for value in weights.values() if value.is_floating_point()), torch.zeros(()))
    sized.to(like.device, like.dtype).load_state_dict(weights, assign=True)
    for name in _SETTINGS:
        if {name, f"_{name}"} & vars(model).keys():
            setattr(sized, name, getattr(model, name))
    return sized.train(model.training)


def takes_any_size(model: "ModelInterface") -> bool:
    """Whether the model takes samples of other sizes."""
    try:
        rebuilt(model, (model.input_shape[0], *(2 * n for n in model.input_shape[1:])), "meta")
    except AezooError:
        return False
    return True


def stride_of(model: "ModelInterface") -> tuple[int, ...] | None:
    """Points of a sample for each position of the code, along each side; None if the code is not such a map."""
    if len(model.code_shape) != len(model.input_shape) or len(model.input_shape) < 2:
        return None
    sides = model.input_shape[1:]
    code = rebuilt(model, (model.input_shape[0], *(_LARGE for _ in sides)), "meta").code_shape[1:]
    strides = tuple(_LARGE // n for n in code)
    return strides if model.code_shape[1:] == code_grid(sides, strides) else None


def code_grid(size: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The positions of the code of a sample of this size."""
    return tuple(-(-n // stride) for n, stride in zip(size, strides, strict=True))


def for_samples(model: Model, shape: tuple[int, ...]) -> Model | None:
    """The model for samples of this shape; None if they have other channels or dimensions.

    Raises:
        AezooError: it accepts no other size.
    """
    own = model.input_shape
    return at_size(model, shape[1:]) if len(own) == len(shape) > 1 and own[0] == shape[0] else None


def for_codes(model: Model, shape: tuple[int, ...]) -> Model | None:
    """The model whose codes have this shape: for samples of the number of points of its positions.

    Raises:
        AezooError: it accepts no other size.
    """
    own = model.code_shape
    if len(own) != len(shape) or own[0] != shape[0] or (strides := stride_of(model)) is None:
        return None
    return at_size(model, [places * stride for places, stride in zip(shape[1:], strides, strict=True)])


def _construct(model: Model, shape: tuple[int, ...]) -> Model:
    arguments = {key: value for key, value in dict(model.hparams).items() if not key.startswith("_")}
    return type(model)(**arguments | {"input_shape": shape})


def _check_weights(sized: Model, weights: dict[str, Any]) -> Model:
    found: dict[str, Tensor] = sized.state_dict()
    if {key: value.shape for key, value in found.items()} != {key: value.shape for key, value in weights.items()}:
        raise AezooError(_FIXED)
    return sized


def _refusal(model: "ModelInterface", shape: tuple[int, ...], reason: str) -> AezooError:
    own, asked = ("x".join(map(str, sides[1:])) for sides in (model.input_shape, shape))
    name = display_name(type(model))
    return AezooError(f"{name} was built for samples of {own or 'one vector'} and does not take {asked}: {reason}")
