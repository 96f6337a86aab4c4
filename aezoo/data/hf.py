"""hf: data sets of Hugging Face: one saved by `save_to_disk`, a folder as the hub holds them, or a name on the hub.

    --data hf --data.root saved           what `datasets` wrote by save_to_disk
    --data hf --data.root folder          parquet, arrow, csv or json files, or images with metadata, as on the hub
    --data hf --data.root owner/name      downloaded when the DataModule is made, which needs the shape;
                                          owner/name:config for one of several configurations

The samples are the only column of images; without images, the only column of arrays or of lists of numbers, all of one
shape. The labels are the only column of classes, or a plain one called label, labels, class, target or y.
`--data.column` and `--data.label_column` name others.

Images follow the rules of `aezoo.data.folder`, and arrays, which are loaded into memory, those of `aezoo.data.array`.
Splits called train, validation and test (or any name that a folder may have) are those of the set; missing ones are
taken from train. No code of a data set is ever run.
"""

import bz2
import contextlib
import gzip
import lzma
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.data.array import LayoutArgs, encode_labels, sample_shape, to_channels_first
from aezoo.data.folder import ImageSource
from aezoo.data.image_folders import SPLITS
from aezoo.data.images import EncodedImage, Header, ImageArgs, ImageFileArgs
from aezoo.data.in_memory import InMemory, LabelledArrays, MissingArgs, to_real_tensor
from aezoo.data.readers import ColumnArgs, MemoryLimitArgs, check_bytes, check_parquet
from aezoo.data.source import DEFAULT_ROOT, Options, Source, Stage, accepts
from aezoo.errors import AezooError, install_hint
from aezoo.security import yaml_text

_LABELS = ("label", "labels", "class", "target", "y")
_ON_HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^/:]+))?")
# all values that any version of huggingface_hub reads as true
_CARD = re.compile(r"^\s*---\s*?[\r\n]+([\S\s]*?)[\r\n]+---[ \t]*([\r\n]|$)")
_NUMBER = re.compile(r"u?int\d+|float\d+|bool")
_PART = 1024
# rows of each split by its stage
Sets = dict[Stage, Any]


class Row(NamedTuple):
    """One sample, named in messages by its position."""

    where: str
    stage: Stage
    number: int

    def __str__(self) -> str:
        return f"{self.where}, {self.stage}, row {self.number}"


@accepts(ImageArgs, ImageFileArgs, LayoutArgs, ColumnArgs, MemoryLimitArgs, MissingArgs)
def open_hf(options: Options) -> Source:
    """The source for the set that root names, by the kind of its column of samples."""
    sets = _sets_by_split(_load(options), options.root)
    features = sets["train"].features
    column = _sample_column(features, options)
    label = _label_column(features, options)
    for stage, rows in sets.items():
        for name in (column, label):
            if name is not None and (found := _describe_feature(rows.features.get(name))) != (
                kind := _describe_feature(features[name])
            ):
                raise AezooError(f"{options.root}: the column {name!r} is {found[:100]} for {stage} and "
                                 f"{kind[:100]} for train: cast one to the other and save the set again")  # fmt: skip
    y, names = _labels(sets, label, options.root)
    return (HfImages if _is_feature(features[column], "Image") else HfArrays)(options, sets, column, y, names)


class HfImages(ImageSource):
    """A column of images.

    Args:
        options: the DataModule's arguments.
        sets: rows by split.
        column: the images.
        y: labels by split, empty without.
        names: names of the labels.
    """

    def __init__(
        self, options: Options, sets: Sets, column: str, y: dict[Stage, Tensor], names: tuple[str, ...] | None
    ) -> None:
        from datasets import Image

        if y and names is None:
            raise AezooError(
                f"{options.root}: the labels are not classes: give --data.label_column none, or another column"
            )
        self._column = column
        # our rules decide which files Pillow opens
        encoded = Image(decode=False)
        self._sets = {stage: rows.select_columns([column]).cast_column(column, encoded) for stage, rows in sets.items()}
        files: dict[Stage, list[tuple[Any, int]]] = {}
        for stage, rows in sets.items():
            labels = y[stage].tolist() if y else [-1] * len(rows)
            files[stage] = [(Row(options.root, stage, i), label) for i, label in enumerate(labels)]
        super().__init__(options, options.root, files, names or ())

    def header(self, file: Row) -> Header:
        return super().header(self._file(file))

    def load(self, file: Row) -> Tensor:
        return super().load(self._file(file))

    def _file(self, row: Row) -> Path | EncodedImage:
        image = self._sets[row.stage][row.number][self._column] or {}
        if image.get("bytes") is not None:
            return EncodedImage(str(row), image["bytes"])
        path = image.get("path")
        if not path or not Path(path).is_file():
            what = f"names {path}, which is not on this machine" if path else "has no image"
            raise AezooError(f"{row} {what}: correct the set, or skip such rows with --data.on_error skip")
        return Path(path)


class HfArrays(InMemory):
    """A column of arrays or lists of numbers; arguments as for `HfImages`."""

    def __init__(
        self, options: Options, sets: Sets, column: str, y: dict[Stage, Tensor], names: tuple[str, ...] | None
    ) -> None:
        self._sets, self._column, self._y = sets, column, y
        first = _read_arrays(sets["train"], column, 0, 1, Row(options.root, "train", 0))
        self._dtype, self._shape = np.dtype(_dtype(sets["train"].features[column])), first.shape[1:]
        size = sum(map(len, sets.values())) * math.prod(self._shape) * self._dtype.itemsize
        check_bytes(Path(options.root), size, options.max_bytes)
        shape = sample_shape(first.astype(self._dtype), options.layout, f"{options.root}: column {column}")
        super().__init__(options, shape, len(names) if names else None)
        self.class_names = names

    def load(self) -> dict[Stage, LabelledArrays]:
        root, pairs = self.options.root, {}
        for stage, rows in self._sets.items():
            x = np.empty((len(rows), *self._shape), self._dtype)
            for start in range(0, len(x), _PART):
                part = _read_arrays(rows, self._column, start, start + _PART, Row(root, stage, start))
                if part.shape[1:] != self._shape:
                    raise _shape_error(Row(root, stage, start), part.shape[1:], self._shape)
                x[start : start + _PART] = part
            checked = to_real_tensor(x, f"{root}: column {self._column} for {stage}", missing=self.options.missing)
            pairs[stage] = LabelledArrays(to_channels_first(checked, self.options.layout), self._y.get(stage))
        return pairs


def _read_arrays(rows: Any, column: str, start: int, stop: int, place: Row) -> npt.NDArray[Any]:
    """The arrays of some rows, (n, ...); an error names the first that differs from the row before."""
    chosen, dtype = rows.select_columns([column]), np.dtype(_dtype(rows.features[column]))
    # by default it converts them to float32
    wide = {"dtype": np.float64} if dtype == np.float64 else {}
    try:
        part: Any = chosen.with_format("numpy", **wide)[start:stop][column]
    except ValueError:  # rows of unequal lengths, before datasets 4
        part = chosen.with_format(None)[start:stop][column]
    if not isinstance(part, np.ndarray) or part.dtype == object:
        part = _stack_rows(part, column, start, place)
    # missing integers become NaN
    if part.dtype.kind == "f" != dtype.kind and (gaps := np.isnan(part).reshape(len(part), -1).any(1)).any():
        raise AezooError(f"{place._replace(number=start + int(gaps.argmax()))} has missing values in column {column}: "
                         "fill or remove it")  # fmt: skip
    return part


def _stack_rows(part: Any, column: str, start: int, place: Row) -> npt.NDArray[Any]:
    shape: tuple[int, ...] | None = None
    for i, one in enumerate(part):
        row = place._replace(number=start + i)
        try:
            array = np.asarray(one)
        except ValueError:
            array = np.array(None)
        if one is None or array.dtype == object:
            what = "no value" if one is None else "lists of unequal length"
            raise AezooError(f"{row} has {what} in column {column}: fill or remove it")
        shape = array.shape if shape is None else shape
        if array.shape != shape:
            raise _shape_error(row, array.shape, shape)
    return np.stack(list(part))


def _shape_error(row: Row, found: tuple[int, ...], wanted: tuple[int, ...]) -> AezooError:
    return AezooError(f"{row} has shape {found}, the rows before it have {wanted}: give all rows the same shape")


def _is_feature(feature: Any, name: str) -> bool:
    return type(feature).__name__ == name


def _describe_feature(feature: Any) -> str:
    """Properties that must be equal for all splits."""
    if feature is None:
        return "missing"
    if _is_feature(feature, "ClassLabel"):
        return f"of the classes {', '.join(map(str, feature.names))}"
    return f"of arrays of {dtype}" if (dtype := _dtype(feature)) else f"of type {type(feature).__name__}"


def _dtype(feature: Any) -> str | None:
    """The dtype of an array or a nested list of numbers; None for anything else."""
    name = type(feature).__name__
    if re.fullmatch(r"Array\dD", name):
        return str(feature.dtype)
    inner: Any = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    if _is_feature(inner, "Value"):
        return str(inner.dtype) if _NUMBER.fullmatch(inner.dtype) else None
    return None if inner is None else _dtype(inner)


def _sample_column(features: Mapping[str, Any], options: Options) -> str:
    images = [name for name, feature in features.items() if _is_feature(feature, "Image")]
    arrays = [name for name, feature in features.items() if _dtype(feature)]
    if options.column != "auto":
        if options.column not in images + arrays:
            what = (
                "does not exist" if options.column not in features else "contains neither images nor arrays of numbers"
            )
            raise AezooError(f"{options.root}: the column {options.column!r} {what}: choose from "
                             f"{_listed(images + arrays)}")  # fmt: skip
        return options.column
    found = images or arrays
    if len(found) != 1:
        cure = "choose one with --data.column" if found else "read a table of numbers with --data array"
        kind = "images" if images else "arrays" if arrays else "images or arrays"
        raise AezooError(f"{options.root} has {len(found) or 'no'} column(s) of {kind}, "
                         f"{_listed(found or list(features))}: {cure}")  # fmt: skip
    return found[0]


def _label_column(features: Mapping[str, Any], options: Options) -> str | None:
    wanted = options.label_column
    if wanted == "none":
        return None
    classes = [name for name, feature in features.items() if _is_feature(feature, "ClassLabel")]
    plain = [name for name, feature in features.items() if _is_feature(feature, "Value")]
    if wanted != "auto":
        if wanted not in classes + plain:
            raise AezooError(f"{options.root} has no column of labels {wanted!r}: choose from "
                             f"{_listed([*classes, *plain, 'none'])}")  # fmt: skip
        return wanted
    if len(classes) > 1 and "label" not in classes:
        raise AezooError(f"{options.root} has {len(classes)} columns of classes, {_listed(classes)}: choose one with "
                         "--data.label_column, or none")  # fmt: skip
    if classes:
        return "label" if "label" in classes else classes[0]
    return next((name for name in _LABELS if name in plain), None)


def _labels(sets: Sets, column: str | None, where: str) -> tuple[dict[Stage, Tensor], tuple[str, ...] | None]:
    """Labels by split, -1 for rows without one, and their names."""
    if column is None:
        return {}, None
    found = {stage: rows.select_columns([column]).with_format(None)[:][column] for stage, rows in sets.items()}
    feature = sets["train"].features[column]
    if not _is_feature(feature, "ClassLabel"):
        for stage, values in found.items():
            if None in values:
                raise AezooError(f"{Row(where, stage, values.index(None))} has no {column}: fill or remove it")
        return encode_labels({stage: np.array(values) for stage, values in found.items()}, f"{where}: ")
    y = {stage: torch.tensor([-1 if v is None else v for v in values]) for stage, values in found.items()}
    for stage, values in y.items():
        beyond = ((values < -1) | (values >= feature.num_classes)).nonzero()
        if len(beyond):
            row = int(beyond[0])
            last = feature.num_classes - 1
            raise AezooError(f"{Row(where, stage, row)} has class {int(values[row])}, not 0 to {last}: correct it")
    return y, tuple(map(str, feature.names))


def _sets_by_split(sets: Mapping[str, Any], where: str) -> Sets:
    stages = {SPLITS[name.lower()]: name for name in sets if name.lower() in SPLITS}
    if "train" not in stages:
        if len(sets) != 1:
            raise AezooError(f"{where} has the splits {_listed(list(sets))} and none called train: rename one")
        stages = {"train": next(iter(sets))}
    unused = [name for name in sets if name not in stages.values()]
    if unused:
        warnings.warn(f"{where}: the splits {_listed(unused)} are not used", stacklevel=2)
    # a set still has the format in which it was saved
    found = {stage: sets[name].with_format(None) for stage, name in stages.items() if len(sets[name])}
    if "train" not in found:
        raise AezooError(f"{where}: the training split is empty: give at least one row")
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "(none)"


def _load(options: Options) -> Mapping[str, Any]:
    """The data set by split name."""
    try:
        import datasets
    except ImportError:
        raise AezooError(f"the data of --data hf needs the package datasets: {install_hint('hf')}") from None
    path, named = Path(options.root).expanduser(), _ON_HUB.fullmatch(options.root)
    if path.is_file():
        raise AezooError(f"{path} is a file: give the folder that contains it, or the file to --data array")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
        elif path.is_dir():
            _check_card(path)
            _check_packed(path, options.max_bytes)
            with _offline():
                found = datasets.load_dataset(str(path), trust_remote_code=False)
        elif named and options.root != DEFAULT_ROOT:
            with contextlib.nullcontext() if options.download else _offline():
                found = datasets.load_dataset(named["name"], named["config"], trust_remote_code=False)
        else:
            raise AezooError(f"no such folder: {path}: give a folder or a name of the hub, such as ylecun/mnist, with "
                             "--data.root")  # fmt: skip
    # each file format and the hub raise their own exceptions
    except Exception as error:
        if isinstance(error, AezooError):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:250]
        if path.is_dir():
            raise AezooError(f"{path} cannot be read as a data set of Hugging Face ({reason}): save it again with "
                             "save_to_disk, or give a folder of .parquet files") from None  # fmt: skip
        where = "on the hub" if options.download else "in the cache of the hub (--data.download false)"
        raise AezooError(f"{options.root} is not a folder, and no data set of that name is {where} ({reason}): check "
                         "the name and the network, or give a folder that save_to_disk wrote") from None  # fmt: skip
    return found if isinstance(found, Mapping) else {"train": found}


def _check_card(folder: Path) -> None:
    """Refuse a folder whose card gives URLs of data files, which datasets would open even offline."""
    texts = []
    if (folder / "README.md").is_file():
        found = _CARD.search((folder / "README.md").read_text())
        texts = [found[1]] if found else []
    if (folder / ".huggingface.yaml").is_file():
        texts.append((folder / ".huggingface.yaml").read_text())
    for text in texts:
        card = yaml_text.load(text)
        for one in _strings(card.get("configs") if isinstance(card, Mapping) else None):
            if "://" in one or "::" in one:
                raise AezooError(f"the card of {folder} names {one[:100]!r}, and addresses are not opened "
                                 "(SECURITY.md): download it, and give its path")  # fmt: skip


def _check_packed(folder: Path, max_bytes: int) -> None:
    """Refuse files that exceed the limit when datasets decompresses them, or reads a line or row group at once."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".zip" and path.is_file():
            with zipfile.ZipFile(path) as archive:
                check_bytes(path, sum(member.file_size for member in archive.infolist()), max_bytes)
        elif path.suffix == ".parquet" and path.is_file():
            check_parquet(path, max_bytes)
        elif path.suffix in _UNPACKERS and path.is_file():
            size = 0
            with _UNPACKERS[path.suffix](path) as file:
                while block := file.read(2**20):
                    size += len(block)
                    check_bytes(path, size, max_bytes)


def _unpack_zstd(path: Path) -> Any:
    import zstandard

    return zstandard.open(path, "rb")


_UNPACKERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _unpack_zstd,
}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _strings(part)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Restrict the hub's packages to their cache; they read these variables when they are imported."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
