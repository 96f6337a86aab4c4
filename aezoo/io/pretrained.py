"""`create_model(NAME, pretrained=TAG)`: a model with the weights of a tag and other settings."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from aezoo import registry
from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.io.checkpoint import load_model

Model = TypeVar("Model", bound=Autoencoder)


def create(
    name: str, tag: str, input_shape: Iterable[int] | None = None, hyperparameters: Mapping[str, Any] | None = None
) -> Autoencoder:
    """Create a model with the weights of a tag, in eval mode and float32.

    Args:
        name: registry name.
        tag: the part of the tag after the name, or the whole tag.
        input_shape: shape of one sample; None uses that of the weights.
        hyperparameters: hyperparameters that differ from those of the weights, such as the learning rate.

    Raises:
        AezooError: there is no such tag; its weights are for samples of another shape; the weights do not fit the
            hyperparameters; or as in `load_model`.
    """
    known = registry.tags_of(name)
    found = next((each for each in known if tag in (each.name, each.name.partition(".")[2])), None)
    if found is None:
        some = ", ".join(each.name.partition(".")[2] for each in known)
        if not some:
            raise AezooError(f"{name} has no pretrained weights: `aezoo list --pretrained` shows those of other models")
        raise AezooError(f"{name} has no weights {tag!r}, it has {some}: {registry.suggest_tags(f'{name}.{tag}')}")
    shape = found.input_shape if input_shape is None else tuple(input_shape)
    if shape != found.input_shape:
        taken = dict.fromkeys(_text(each.input_shape) for each in known)
        raise AezooError(
            f"{found.name} is for samples of shape {_text(found.input_shape)}, not {_text(shape)}: omit input_shape, "
            f"or resize the data; weights of {name} exist for {', '.join(taken)}"
        )
    return with_hyperparameters(load_model(found.name), hyperparameters or {}, found.name)


def with_hyperparameters(model: Model, hyperparameters: Mapping[str, Any], source: str) -> Model:
    """Return the model itself, or a model with its weights and other hyperparameters, in eval mode.

    Args:
        model: a model in eval mode.
        hyperparameters: hyperparameters that differ from those of the model, such as the learning rate.
        source: origin of the weights, for messages.

    Raises:
        AezooError: the model does not have a hyperparameter, or the weights do not fit it.
    """
    own = dict(model.hparams)
    given = {key: value for key, value in hyperparameters.items() if key not in own or own[key] != value}
    if not given:
        return model
    registry.check_hyperparameters(
        type(model), given.keys() - {"input_shape"}, registry.name_of(type(model)) or type(model).__name__
    )
    changed = type(model)(**(own | given))
    try:
        changed.load_state_dict(model.state_dict())
    except RuntimeError as error:
        values = ", ".join(f"{key} {own.get(key)!r}, not {value!r}" for key, value in given.items())
        raise AezooError(
            f"the weights of {source} were trained with {values}: omit settings that do not fit them"
        ) from error
    changed.data_units, changed.data_statistics = model.data_units, model.data_statistics
    return changed.eval()


def _text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
