"""array: samples from one .npy, .npz, .pt, .csv or .parquet file, or from tensors and arrays in Python.

    axes        read as (--data.layout auto)                                      layout names
    (N, D)      a vector of D features                                            vector
    (N, A, B)   a grey image if the values are uint8 or A = B, else a sequence    image, sequence
                of A channels and B steps
    (N, A, B, C) an image; the channels are the last axis when that has 1, 3      image (channels first), image_last,
                or 4 and the first does not                                        volume (one channel)
    (N, ..., 4 axes) a volume; channels found in the same way                     volume, volume_last

    .npz, .pt   x or x_train, y or y_train, x_val, y_val, x_test, y_test (or one array of any name; .pt also x alone
                or a tuple (x, y)). Pickled objects are never loaded.
    .csv        numbers, with or without a header; the classes are in the column named label or --data.label_column
                (none ignores them). A first row of 0,1,2 ... is a header, as pandas writes it, unless it has decimal
                points
    .parquet    columns of numbers and an optional column of classes, as in .csv

With --data.window_length, one array (T, C) is a time series, and samples are its windows, see `aezoo.data.windows`; a
column of time stamps (timestamp, time, datetime, date, ds) is not a channel.

Values are scaled by `aezoo.data.in_memory.Scale`. Class labels may be any integers or texts: unless they are already
0..K-1, they are numbered in sorted order, and `class_names` has the originals. Labels with fractions stay numbers. A
sample with an empty label gets -1.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.data.classes import UNLABELLED
from aezoo.data.images import ImageArgs
from aezoo.data.in_memory import InMemory, LabelledArrays, MissingArgs, as_real_array, chunk_rows, to_real_tensor
from aezoo.data.readers import LabelColumnArgs, MemoryLimitArgs, TableArrays, first_names, parse_labels, read_arrays
from aezoo.data.source import STAGES, Options, Stage, accepts
from aezoo.data.windows import TIME_COLUMNS, WindowArgs, cut
from aezoo.errors import AezooError
from aezoo.training.data_units import TABLES
from aezoo.training.keyword_groups import Argument

# of samples with channels first, by the number of their dimensions
LAYOUTS = {1: "vector", 2: "sequence", 3: "image", 4: "volume"}
# the names of samples in a file, the one to be read by itself first
SAMPLES = ("x", "x_test", "x_val", "x_train")
_AXES = {"vector": (2,), "sequence": (3,), "image": (3, 4), "image_last": (4,), "volume": (4, 5), "volume_last": (5,)}
_COLOUR_CHANNELS = (1, 3, 4)


class LayoutArgs(TypedDict, total=False):
    """Setting of sources of arrays and of folders."""

    layout: Annotated[
        Literal["auto", "vector", "sequence", "image", "image_last", "volume", "volume_last", "mvtec", "visa"],
        Argument(
            "auto", "What the axes of an array mean; auto reads (N, D) as vectors, (N, A, B) as grey images if uint8 "
            "or square and else as sequences, four axes as images and five as volumes. For a folder: mvtec or visa, "
            "with good samples, defects and their masks."
        ),
    ]  # fmt: skip


@accepts(ImageArgs, LayoutArgs, LabelColumnArgs, MemoryLimitArgs, MissingArgs, WindowArgs)
class Array(InMemory):
    """Arrays from a file under root, or given as arguments.

    Args:
        options: the DataModule's arguments; root is the file.
        arrays: x, y, x_val, y_val, x_test, y_test instead of a file.
    """

    def __init__(self, options: Options, arrays: Mapping[str, Any] | None = None) -> None:
        path = Path(options.root).expanduser()
        self.title = "" if arrays is not None else f"{path}: "
        wanted = options.label_column
        times = TIME_COLUMNS if options.window_length else ()
        raw = read_arrays(path, options.max_bytes, wanted, time_columns=times) if arrays is None else arrays
        stamps = getattr(raw, "times", ())
        self.columns = raw.columns if isinstance(raw, TableArrays) else ()
        if wanted not in ("auto", "none") and (not isinstance(raw, TableArrays) or raw.label is None):
            present = (
                f"there are {first_names(self.columns)}" if self.columns else "columns have names in .csv and .parquet"
            )
            raise AezooError(f"{self.title or 'arrays: '}no column {wanted!r} (--data.label_column): {present}")
        given = {"x": "x_train", "y": "y_train"}
        raw = {given.get(key, key): value for key, value in raw.items() if value is not None}
        unknown = [key for key in raw if key not in {f"{a}_{stage}" for a in "xy" for stage in STAGES}]
        if unknown or "x_train" not in raw:
            raise AezooError(
                f"{self.title or 'arrays: '}found {', '.join(sorted(raw)) or 'nothing'}: name the arrays x and y, or "
                "x_train, y_train, x_val, y_val, x_test, y_test"
            )
        if options.window_length:
            raw = self._cut(options, raw, stamps)
        self._x: dict[Stage, Any] = {stage: raw[f"x_{stage}"] for stage in STAGES if f"x_{stage}" in raw}
        labels = {stage: raw[f"y_{stage}"] for stage in STAGES if f"y_{stage}" in raw}
        self._y, names = encode_labels(labels, self.title)
        shapes = {stage: sample_shape(x, options.layout, self._what(stage)) for stage, x in self._x.items()}
        for stage, shape in shapes.items():
            if shape != shapes["train"]:
                raise AezooError(
                    f"{self._what(stage)} has samples of shape {shape}, the training samples have {shapes['train']}: "
                    "give all splits one shape"
                )
        super().__init__(options, shapes["train"], len(names) if names else None)
        self.class_names = names
        # a table without a header has no names of columns
        from_table = hasattr(raw["x_train"], "columns") if arrays is not None else path.suffix.lower() in TABLES
        self.is_table = from_table and len(self.input_shape) == 1

    def _cut(self, options: Options, raw: Mapping[str, Any], times: Sequence[str]) -> dict[str, Any]:
        """The windows of a series instead of its steps."""
        if options.layout not in ("auto", "sequence"):
            raise AezooError(f"--data.window_length makes sequences of a series: drop --data.layout {options.layout}")
        options.settings["layout"] = "sequence"
        series = {
            key: as_real_array(values, f"{self.title}{key}") if key.startswith("x") else values
            for key, values in raw.items()
        }
        fractions = options.val_fraction, options.test_fraction
        size, step, limit = options.window_length, options.window_step, options.max_bytes
        found, self.spans = cut(series, fractions, size, step, limit, self.title, times)
        # names are those of channels, and samples are not rows of a table
        self.columns, self.per_channel = (), True
        return found

    def load(self) -> dict[Stage, LabelledArrays]:
        splits = {}
        for stage, values in self._x.items():
            self.mapped = self.mapped or isinstance(values, np.memmap)
            x = to_real_tensor(
                values, self._what(stage), self.columns, copy=not self.title, missing=self.options.missing
            )
            y = self._y.get(stage)
            check_length(x, y, self._what(stage))
            splits[stage] = LabelledArrays(to_channels_first(x, self.options.layout), y)
        if self._y and set(self._y) != set(splits):
            raise AezooError(f"{self.title}labels are given for {', '.join(self._y)} only: give them for all or none")
        return splits

    def is_unbounded(self) -> bool:
        values = as_real_array(self._x["train"], self._what("train"))
        if values.dtype in (torch.uint8, np.uint8):
            return False
        n = chunk_rows(values.shape[1:])
        parts = (torch.as_tensor(np.asarray(values[i : i + n], dtype=np.float32)) for i in range(0, len(values), n))
        return any(bool(((part < 0) | (part > 1)).any()) for part in parts)

    def _build(self) -> dict[Stage, LabelledArrays]:
        splits = super()._build()
        self._x.clear()  # otherwise the arrays of the file would stay in memory in addition to the splits
        return splits

    def _what(self, stage: Stage) -> str:
        return f"{self.title}x" if stage == "train" else f"{self.title}x_{stage}"


def sample_shape(values: Any, layout: str, what: str) -> tuple[int, ...]:
    """Shape of one sample after `to_channels_first`, from shape and dtype alone."""
    values = as_real_array(values, what)
    shape = tuple(values.shape)
    if layout != "auto" and layout not in _AXES:
        raise AezooError(f"--data.layout {layout} is for folders of images, not for {what}: drop it")
    axes = (2, 3, 4, 5) if layout == "auto" else _AXES[layout]
    if len(shape) not in axes:
        hint = "give a vector as (N, D)" if len(shape) < 2 else "see --data.layout"
        raise AezooError(f"{what} has shape {shape}, and layout {layout} takes {axes} axes, samples first: {hint}")
    if 0 in shape:
        raise AezooError(f"{what} is empty (shape {shape}): give at least one sample")
    is_bytes = str(values.dtype).removeprefix("torch.") == "uint8"
    # the same function is applied to a placeholder without data
    stand_in = torch.empty(1, dtype=torch.uint8 if is_bytes else torch.float32).expand(1, *shape[1:])
    return tuple(to_channels_first(stand_in, layout).shape[1:])


def check_length(x: Tensor, y: Tensor | None, what: str) -> None:
    """Refuse labels if there are more or fewer of them than samples."""
    if y is not None and len(y) != len(x):
        raise AezooError(f"{what} has {len(x)} samples but {len(y)} labels: give one label per sample")


def to_channels_first(x: Tensor, layout: str) -> Tensor:
    """Samples with their channel axis in its place; see the table above."""
    layout = _layout_of(tuple(x.shape), x.dtype == torch.uint8, layout)
    if layout.endswith("_last"):
        return x.movedim(-1, 1).contiguous()
    if (layout, x.ndim) in (("image", 3), ("volume", 4)):
        return x[:, None]
    return x


def from_channels_first(x: npt.NDArray[Any], shape: tuple[int, ...], is_bytes: bool, layout: str) -> npt.NDArray[Any]:
    """The inverse of `to_channels_first`, for samples of an array of this shape and layout."""
    if _layout_of(shape, is_bytes, layout).endswith("_last"):
        return np.moveaxis(x, 1, -1)
    return x.reshape(len(x), *shape[1:])


def _layout_of(shape: tuple[int, ...], is_bytes: bool, layout: str) -> str:
    """The layout that auto selects for an array (N, ...); auto itself for vectors."""
    if layout != "auto" or len(shape) < 3:
        return layout
    if len(shape) == 3:
        return "image" if is_bytes or shape[1] == shape[2] else "sequence"
    last = shape[-1] in _COLOUR_CHANNELS and shape[1] not in _COLOUR_CHANNELS
    return ("image" if len(shape) == 4 else "volume") + ("_last" if last else "")


def _is_missing(label: Any) -> bool:
    return label is None or type(label).__name__ == "NAType" or (isinstance(label, float) and math.isnan(label))


def _is_label(label: Any) -> bool:
    return isinstance(label, str | int | float | np.integer) or _is_missing(label)


def encode_labels(raw: Mapping[Stage, Any], title: str) -> tuple[dict[Stage, Tensor], tuple[str, ...] | None]:
    """Labels as int64 classes 0..K-1 with their names, or float32 without names if they have fractions.

    If there are at least two other classes, -1 marks a sample without a label, as in scikit-learn, and stays -1; masked
    labels become -1.
    """
    arrays: dict[Stage, Any] = {}
    given: dict[Stage, Any] = {}
    for stage, values in raw.items():
        array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
        array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
        if array.dtype.kind == "O" and array.ndim == 1 and all(map(_is_label, array)):
            # the dtype of strings in pandas
            values = array = parse_labels(["" if _is_missing(label) else str(label) for label in array])
        if array.dtype.kind not in "biufUS" or (array.dtype.kind in "US" and array.ndim != 1) or array.ndim == 0:
            raise AezooError(f"{title}labels of dtype {array.dtype} and shape {array.shape}: give integers or strings")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise AezooError(f"{title}the labels contain NaN or infinity: fill or remove those rows")
        if array.dtype.kind == "f" and (abs(array) >= 2**63).any():
            raise AezooError(f"{title}a label is {array[abs(array) >= 2**63][0]:.3g}: give integers or strings")
        arrays[stage] = array
        given[stage] = np.broadcast_to(~np.ma.getmask(values), np.shape(values)).reshape(array.shape)
    if not arrays:
        return {}, None
    whole = all(a.dtype.kind != "f" or (a == np.floor(a)).all() for a in arrays.values())
    if not whole or any(a.ndim > 1 for a in arrays.values()):
        if not all(present.all() for present in given.values()):
            raise AezooError(f"{title}some labels are empty, others have fractions: fill or remove those rows")
        return {stage: torch.from_numpy(a.astype(np.float32)) for stage, a in arrays.items()}, None
    everything = np.concatenate([a.astype(np.int64) if a.dtype.kind in "bf" else a for a in arrays.values()])
    labelled = np.concatenate([*given.values()])
    names, classes = np.unique(everything[labelled], return_inverse=True)
    if not len(names):
        raise AezooError(f"{title}all labels are empty: fill them, or give --data.label_column none")
    if everything.dtype.kind in "iu" and len(names) > 2 and names[0] == UNLABELLED:
        names, classes = names[1:], classes - 1
    numbers = np.full(len(everything), UNLABELLED)
    numbers[labelled] = classes
    parts = np.split(numbers, np.cumsum([len(a) for a in arrays.values()])[:-1])
    return dict(zip(arrays, map(torch.from_numpy, parts), strict=True)), tuple(str(name) for name in names)
