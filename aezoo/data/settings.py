"""The values that the DataModule's arguments take."""

import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from aezoo.errors import AezooError

Scaling = Literal["auto", "none", "unit", "standard"]
Binarising = Literal["none", "threshold", "static", "dynamic"]
Layout = Literal["auto", "vector", "sequence", "image", "image_last", "volume", "volume_last"]
Labels = Literal["auto", "required", "ignore"]
OnError = Literal["raise", "skip"]
Memory = Literal["auto", "on", "off"]
Weights = Literal["stored", "random"]
Positions = Literal["each", "mean", "max"]
FeatureAxis = Literal["auto", "first", "last"]
Missing = Literal["raise", "keep"]

_CHOICES = {
    "scale": Scaling,
    "binarise": Binarising,
    "layout": Layout,
    "labels": Labels,
    "on_error": OnError,
    "memory": Memory,
    "weights": Weights,
    "positions": Positions,
    "feature_axis": FeatureAxis,
    "missing": Missing,
}
# the least and the most of whole numbers
_WHOLE = {
    "batch_size": (1, math.inf),
    "seed": (0, math.inf),
    "num_workers": (0, 2**10),
    "max_pixels": (1, math.inf),
    "max_bytes": (1, math.inf),
    "size": (1, 2**14),
    "num_labels": (0, 10**9),
    "dictionary_samples": (1, 10**9),
    "dictionary_atoms": (1, 2**20),
    "dictionary_dim": (1, 2**20),
    "dictionary_streams": (1, 2**10),
}


def check(given: Mapping[str, Any]) -> None:
    """Refuse arguments of the DataModule that cannot work, by name and value.

    Raises:
        AezooError: the first of them, and what to give.
    """
    if not given["name"]:
        raise AezooError("--data.name is empty: give a set, a folder or a file of arrays")
    for key, (least, most) in _WHOLE.items():
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
    if not given["dictionary_active"] > 0:
        raise AezooError(f"--data.dictionary_active is {given['dictionary_active']!r}: give a number above 0")
    if not 0 <= given["dictionary_correlation"] < 1:
        raise AezooError(f"--data.dictionary_correlation is {given['dictionary_correlation']!r}: give a number from 0 "
                         "up to, but not including, 1")  # fmt: skip
    if given["dictionary_noise"] < 0:
        raise AezooError(f"--data.dictionary_noise is {given['dictionary_noise']!r}: give a number from 0")
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


def _one_of(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise AezooError(f"--data.{key} is {value!r}{hint}; choose from {', '.join(choices)}")
