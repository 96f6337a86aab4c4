"""The settings of the DataModule: those of all sources, and checks of their values."""

import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from aezoo.data.activations import ActivationsArgs
from aezoo.data.array import LayoutArgs
from aezoo.data.images import ImageArgs, ImageFileArgs
from aezoo.data.in_memory import MissingArgs
from aezoo.data.object_store import ObjectStoreArgs
from aezoo.data.readers import ColumnArgs, MemoryLimitArgs
from aezoo.data.source import Options
from aezoo.data.source_registry import settings_of, sources_with
from aezoo.data.synthetic_dictionary import DictionaryArgs
from aezoo.data.windows import WindowArgs
from aezoo.errors import AezooError
from aezoo.training.keyword_groups import arguments_of

Scaling = Literal["auto", "none", "unit", "standard"]
Binarising = Literal["none", "threshold", "static", "dynamic"]
Labels = Literal["auto", "required", "ignore"]
Memory = Literal["auto", "on", "off"]


class SourceArgs(
    ImageArgs,
    ImageFileArgs,
    LayoutArgs,
    MemoryLimitArgs,
    DictionaryArgs,
    ActivationsArgs,
    ColumnArgs,
    MissingArgs,
    WindowArgs,
    ObjectStoreArgs,
    total=False,
):
    """Settings that only some sources take; a source names its settings by `accepts`."""


_ARGUMENTS = arguments_of(SourceArgs)
_CHOICES: dict[str, Any] = {"scale": Scaling, "binarise": Binarising, "labels": Labels, "memory": Memory}
_CHOICES |= {name: hint for name, hint in get_type_hints(SourceArgs).items() if get_origin(hint) is Literal}
# smallest and largest values of integers
_INTEGER_RANGES: dict[str, tuple[float, float]] = {
    "batch_size": (1, math.inf),
    "seed": (0, math.inf),
    "num_workers": (0, 2**10),
    "num_labels": (0, 10**9),
    **{
        name: (argument.minimum, math.inf if argument.maximum is None else argument.maximum)
        for name, argument in _ARGUMENTS.items()
        if argument.minimum is not None
    },
}


def check_settings(given: Mapping[str, Any]) -> None:
    """Refuse arguments of the DataModule that cannot work, by name and value.

    Raises:
        AezooError: names the first of them, and what to give.
    """
    if not given["name"]:
        raise AezooError("--data.name is empty: give a set, a folder or a file of arrays")
    for key, (least, most) in _INTEGER_RANGES.items():
        value = given[key]
        if value is not None and value < least:
            raise AezooError(f"--data.{key} is {value!r}: give a whole number of at least {least}")
        if value is not None and value > most:
            raise AezooError(f"--data.{key} is {value}: give at most {most}")
    val_fraction, test_fraction = given["val_fraction"], given["test_fraction"]
    for key in ("val_fraction", "test_fraction"):
        if not 0 <= given[key] < 1:
            raise AezooError(f"--data.{key} is {given[key]!r}: give a share from 0 up to, but not including, 1")
    if val_fraction + test_fraction >= 1:
        raise AezooError(f"--data.val_fraction {val_fraction} and --data.test_fraction {test_fraction} leave "
                         "nothing to train on: their sum must stay below 1")  # fmt: skip
    for key, choices in _CHOICES.items():
        _one_of(key, given[key], get_args(choices))
    if given["missing"] == "keep" and given["binarise"] != "none":
        raise AezooError(f"--data.missing keep and --data.binarise {given['binarise']} contradict each other: drop "
                         "one, as a missing value is neither 0 nor 1")  # fmt: skip
    if given["num_labels"] and given["labels"] == "ignore":
        raise AezooError(f"--data.num_labels {given['num_labels']} and --data.labels ignore contradict each other: "
                         "drop one")  # fmt: skip
    if given["train_classes"] == []:
        raise AezooError("--data.train_classes is empty: give classes by name or number, such as [0, 1]")
    if given["channels"] not in (None, 1, 3):
        raise AezooError(f"--data.channels is {given['channels']!r}: give 1 (grey) or 3 (coloured)")


def check_source_settings(options: Options) -> None:
    """Refuse a setting that the source does not take, unless it has its default.

    Raises:
        AezooError: names the setting, the sources that have it, and the most similar setting of this source.
    """
    accepted = settings_of(options.name, options.settings)
    for key, value in options.settings.items():
        if accepted is not None and key not in accepted and value != _ARGUMENTS[key].default:
            near = difflib.get_close_matches(key, accepted, n=1)
            cure = f"use --data.{near[0]}" if near else "drop it"
            raise AezooError(
                f"--data.{key} {value} does not apply to {options.name}, only to {sources_with(key)}: {cure}"
            )


def settings_of_source(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the DataModule without those that their source does not have."""
    try:
        accepted = settings_of(str(settings["name"]), settings)
    except (KeyError, AezooError):  # the DataModule reports the error in the name
        return dict(settings)
    return {
        key: value for key, value in settings.items() if accepted is None or key in accepted or key not in _ARGUMENTS
    }


def _one_of(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise AezooError(f"--data.{key} is {value!r}{hint}; choose from {', '.join(choices)}")
