"""stream: a set of any size in chunks on disk, as `litdata.optimize` writes them; only what is used is read.

    root/index.json, root/chunk-*.bin      one set, from which val and test are taken
    root/train/..., root/val/..., root/test/...     the splits, each a folder of this kind
    root/classes.json                      the names of the classes, ["cat", "dog"]; without it labels are numbers

The root is a folder, or s3://bucket/prefix if the user allows it: `aezoo.data.object_store` then downloads chunks when
their items are read, and everything else is the same.

An item is a dict, a tuple, or only the sample. The sample is its only image or, without images, its only array. The
label is its only number or text, or the one of several that is called label. `--data.column` and `--data.label_column`
name others; in a tuple, by position. Encoded images follow the rules of `aezoo.data.folder` and arrays those of
`aezoo.data.array`, except for `scale`: bytes are divided by 255, and floats must lie within 0 and 1 (unless `scale` is
none), because statistics would need all samples.

The order of litdata's loader depends on the number of workers. Here items are read by index, in an order that is a
function of (seed, epoch): an epoch takes the chunks in random order, `GROUP` at a time, and the items of a group in
random order. This shuffles less than a full permutation, so do not write items sorted by class. Each process maps the
chunks of a group into memory, which the machine stores only once, and every rank reads all chunks.

Pickled data are refused, since they could run code.
"""

import bisect
import contextlib
import inspect
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from aezoo.data.array import LayoutArgs, sample_shape, to_channels_first
from aezoo.data.image_folders import SPLITS
from aezoo.data.images import (
    GREY_MODES,
    MODES_16_BIT,
    EncodedImage,
    Header,
    ImageArgs,
    ImageFileArgs,
    check_pixels,
    read_header,
    read_image,
    resize,
    resized_shape,
    to_tensor,
)
from aezoo.data.in_memory import to_real_tensor
from aezoo.data.loaders import SHUFFLE_GROUP, collate
from aezoo.data.object_store import FileCache, ObjectFolder, ObjectStoreArgs, is_address
from aezoo.data.readers import ColumnArgs, MemoryLimitArgs, check_bytes
from aezoo.data.source import Batch, Options, Source, Stage, accepts, split_missing
from aezoo.errors import AezooError, install_hint

_LABELS = ("label", "labels", "class", "target", "y")
_LABEL = int | float | str | np.integer | np.floating | np.bool_
_ENCODED = ("jpeg", "image", "bytes")
_SAFE_KINDS = (
    *_ENCODED,
    "pil",
    "tensor",
    "no_header_tensor",
    "numpy",
    "no_header_numpy",
    "int",
    "float",
    "bool",
    "str",
    "text",
)
# containers of items; no defaultdict, as litdata imports the factory that an index names for it
_CONTAINERS = {"builtins.dict", "builtins.list", "builtins.tuple", "collections.OrderedDict", "collections.deque"}
# largest index.json and classes.json in an object store, in bytes
_MOST_JSON = 2**28
_SAFE = "images, arrays, text and Python's own numbers (float(x) or int(x) of NumPy numbers)"
# litdata also reads the text after the colon as the name of a decoder
_SAFE_KIND_PATTERN = re.compile(rf"({'|'.join(_SAFE_KINDS)})(:(\d+|jpe?g|png|webp|bmp|gif))?")


class _RawBytes:
    """Replaces litdata's decoder: returns the bytes of an image, which `aezoo.data.images` decodes."""

    def setup(self, metadata: Any) -> None:
        return

    def deserialize(self, data: Any) -> bytes:
        return bytes(data)


class _RefusePickle(_RawBytes):
    """Replaces the decoder that would unpickle objects."""

    def deserialize(self, data: Any) -> bytes:
        raise AezooError(f"it contains Python objects (pickle), which can run code: write only {_SAFE}")


def _unpacked_size(data: bytes) -> int:
    """The decompressed size that a frame of zstd declares (RFC 8878, section 3.1.1.1); -1 if it declares none."""
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 5:
        return -1
    descriptor = data[4]
    is_single, size_flag = descriptor >> 5 & 1, descriptor >> 6
    length = (is_single, 2, 4, 8)[size_flag]
    start = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]
    field = data[start : start + length]
    if not length or len(field) < length:
        return -1
    return int.from_bytes(field, "little") + (256 if length == 2 else 0)


class _LimitedUnpacking:
    """litdata's decompression of items, within a limit of memory: it allocates the size that an item declares.

    Args:
        unpacker: litdata's decompressor.
        max_bytes: the limit.
    """

    def __init__(self, unpacker: Any, max_bytes: int) -> None:
        self._unpacker, self._max_bytes = unpacker, max_bytes

    def decompress(self, data: Any, *sizes: int, **named: int) -> Any:
        size = max([_unpacked_size(bytes(data[:18])), *sizes, *named.values()])
        if size < 0:
            raise AezooError("it is compressed and does not declare its size: write it again")
        check_bytes("a compressed item", size, self._max_bytes)
        return self._unpacker.decompress(data, *sizes, **named)


class ChunkedItems(Dataset[Any]):
    """The items of one folder, by index.

    Args:
        root: the folder.
        max_bytes: the most memory that a compressed item may take.
        cache: downloads the chunks into the folder, which belongs to it; by default they are already there.

    Attributes:
        names: the chunks.
        ends: the index after the last item of each chunk.
    """

    def __init__(self, root: str, max_bytes: int = 2**33, cache: FileCache | None = None) -> None:
        self.root, self.max_bytes, self.cache, self._open = root, max_bytes, cache, (0, None)
        self._below = ""
        sizes = None
        if cache is not None:
            self._below = "" if Path(root) == cache.folder else f"{Path(root).relative_to(cache.folder)}/"
            sizes = {path.removeprefix(self._below): found.size for path, found in cache.objects.objects.items()}
        self._shown = root if cache is None else f"{cache.objects.address}/{self._below}".rstrip("/")
        self.names, self.ends = _read_index(Path(root), self._shown, sizes)
        if cache is not None:
            # two groups, because workers may be in different ones
            cache.check([self._below + name for name in self.names], 2 * SHUFFLE_GROUP)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": (0, None)}

    def __getitem__(self, row: int) -> Any:
        """An item as it was written, with encoded images as bytes."""
        with contextlib.nullcontext() if self.cache is None else self.cache.held(self._path(row)):
            try:
                return self._reader()[row]
            # the error of a damaged item depends on its decoder
            except Exception as error:
                reason = str(error) if isinstance(error, AezooError) else f"{type(error).__name__}: {error}"
                raise AezooError(
                    f"{self.place(row)} cannot be read ({' '.join(reason.split())[:200]}): write the folder again"
                ) from None

    def place(self, row: int) -> str:
        """Where an item is, for a message."""
        return f"{self._shown}, item {row} ({self._name(row)})"

    def fetch(self, rows: Iterable[int]) -> None:
        """Download the chunks of some items at once, if they are in an object store."""
        if self.cache is not None:
            self.cache.fetch({self._path(row): None for row in rows})

    def _name(self, row: int) -> str:
        return self.names[bisect.bisect_right(self.ends, row)]

    def _path(self, row: int) -> str:
        return self._below + self._name(row)

    def _reader(self) -> Any:
        """The litdata reader, one per process, as it keeps files open."""
        process, reader = self._open
        if reader is None or process != os.getpid():
            self._open = (os.getpid(), _reader(self.root, self.max_bytes))
        return self._open[1]


def _reader(root: str, max_bytes: int = 2**33) -> Any:
    from litdata import StreamingDataset
    from litdata.streaming import item_loader
    from litdata.streaming.serializers import _SERIALIZERS

    # litdata compares the name with that in the index
    class PyTreeLoader(item_loader.PyTreeLoader):
        """litdata's loader with a limit on decompressed sizes."""

        def _framed_compressor(self) -> Any:
            return _LimitedUnpacking(super()._framed_compressor(), max_bytes)

    serializers: dict[str, Any] = {name: _RefusePickle() for name in _SERIALIZERS if name not in _SAFE_KINDS}
    serializers |= {name: _RawBytes() for name in _ENCODED}
    settings: dict[str, Any] = {
        "serializers": serializers,
        "max_pre_download": SHUFFLE_GROUP,
        "item_loader": PyTreeLoader(),
    }
    # by default litdata decodes 32 items for each one requested
    if "batch_decode" in inspect.signature(StreamingDataset).parameters:
        settings["batch_decode"] = 0
    return StreamingDataset(root, **settings)


def _read_index(root: Path, shown: str, found: Mapping[str, int] | None) -> tuple[list[str], list[int]]:
    """The chunk names and the index of the item after each; all chunks must exist and be readable.

    Args:
        root: the folder.
        shown: the folder in messages.
        found: the bytes of the files that exist; by default those in the folder.
    """
    path = f"{shown}/index.json"
    try:
        content = json.loads((root / "index.json").read_text())
        about, chunks = content["config"], content["chunks"]
        names = [str(chunk["filename"]) for chunk in chunks]
        sizes, lengths = [int(chunk["chunk_bytes"]) for chunk in chunks], [int(chunk["chunk_size"]) for chunk in chunks]
        kinds = {str(kind) for kind in about["data_format"]}
        containers = set(_container_types(json.loads(about.get("data_spec") or "null")))
        whole = about.get("compression") and about.get("compression_level") not in ("batch", "sample")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise AezooError(f"{path} is not an index of litdata ({reason}): run litdata.optimize again") from None
    if about.get("format") or about.get("encryption") or about.get("item_loader", "PyTreeLoader") != "PyTreeLoader":
        raise AezooError(f"{path} lists chunks for another reader: write them with litdata.optimize")
    others = sorted(kind for kind in kinds if not _SAFE_KIND_PATTERN.fullmatch(kind))
    if others:
        raise AezooError(f"{path} lists items of {', '.join(others)}, which may be pickled and run code: write "
                         f"only {_SAFE}")  # fmt: skip
    if others := sorted(containers - _CONTAINERS):
        raise AezooError(f"{path} lists items in a {', '.join(others)[:100]}, which may import code: write only "
                         "dicts, lists and tuples")  # fmt: skip
    if whole:
        # litdata puts the decompressed chunk into the folder and deletes the compressed one
        raise AezooError(f"{path} lists chunks that are compressed as a whole: write them without compression, or with "
                         "compression_level='batch'")  # fmt: skip
    for name, size, length in zip(names, sizes, lengths, strict=True):
        if Path(name).name != name:
            raise AezooError(f"{path} names {name!r}, which is not in its folder: write the folder again")
        # litdata waits for minutes for a file to become complete
        if found is not None:
            held = found.get(name)
        else:
            held = (root / name).stat().st_size if (root / name).is_file() else None
        if held is None or held < size:
            state = "is missing" if held is None else f"has {held} of {size} bytes"
            raise AezooError(f"{shown}/{name} {state}: copy it again, or write the folder again")
        # the position of each item takes four bytes
        if length < 0 or (length > size and not about.get("compression")):
            raise AezooError(f"{path} lists {length} items in the {size} bytes of {name}: write the folder again")
    ends = list(itertools.accumulate(lengths))
    if not ends or not ends[-1]:
        raise AezooError(f"{path} lists no items: write at least one")
    return names, ends


def _container_types(spec: Any) -> Iterator[str]:
    """The types of containers in the structure of an item."""
    if isinstance(spec, Mapping) and spec.get("type") is not None:
        yield str(spec["type"])
    for part in spec.values() if isinstance(spec, Mapping) else spec if isinstance(spec, list) else ():
        yield from _container_types(part)


@accepts(ImageArgs, ImageFileArgs, LayoutArgs, ColumnArgs, MemoryLimitArgs, ObjectStoreArgs)
class Stream(Source):
    """Chunks of litdata.

    Args:
        options: the DataModule's arguments; root is the folder or its address.
    """

    def __init__(self, options: Options) -> None:
        if options.scale not in ("auto", "none"):
            raise AezooError(
                f"--data.scale {options.scale} needs a data set in memory, which {options.name} is not: use auto"
            )
        if options.on_error == "skip":
            raise AezooError(
                "--data.on_error skip does not apply to stream, whose items are read when they are used: use raise"
            )
        # otherwise early versions ask the package index for a newer one
        os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
        try:
            import litdata  # noqa: F401
        except ImportError:
            raise AezooError(f"--data stream needs the package litdata: {install_hint('stream')}") from None
        self.options = options
        folder, shown, cache = Path(options.root).expanduser(), options.root, None
        if is_address(options.root):
            cache = _cache_of(options)
            folder, shown = cache.folder, cache.objects.address
        parts = _folders(folder, shown)
        self.chunks = {stage: ChunkedItems(root, options.max_bytes, cache) for stage, root in parts.items()}
        self.class_names = _class_names(folder, shown)
        self.num_classes = len(self.class_names) if self.class_names else None
        self.value_range = (0.0, 1.0) if options.scale == "auto" else None
        item, place = self.chunks["train"][0], self.chunks["train"].place(0)
        fields = _fields(item)
        self._column = _choose_column(fields, options.column, place)
        self._label = _choose_label(fields, self._column, options.label_column, place)
        self._set_shape(fields[self._column], place)

    def split(self, stage: Stage) -> Dataset[Any] | None:
        sizes = {own: len(chunks) for own, chunks in self.chunks.items()}
        fractions = (self.options.val_fraction, self.options.test_fraction)
        rows = split_missing(sizes, None, fractions, self.options.seed)[stage]
        chunks = self.chunks.get(stage, self.chunks["train"])
        rows = torch.arange(len(chunks)) if rows is None else rows
        return StreamDataset(self, chunks, rows) if len(rows) else None

    @property
    def has_labels(self) -> bool:
        """Whether items have labels."""
        return self._label is not None

    def sample(self, item: Any, place: str) -> tuple[Any, ...]:
        """(x,) or (x, label) of an item, x (*input_shape) in uint8 or float32."""
        fields = _fields(item)
        for name in (self._column, self._label):
            if name is not None and name not in fields:
                raise AezooError(f"{place} has no {name!r}, unlike the first item: give all items the same parts")
        x = self._read(fields[self._column], place)
        if tuple(x.shape) != self.input_shape:
            found, first = ("x".join(map(str, shape)) for shape in (x.shape, self.input_shape))
            raise AezooError(
                f"{place} is {found}, but the first item is {first}: give --data.size, or items of one shape"
            )
        if (x.dtype == torch.uint8) != (self.white == 255):
            raise AezooError(f"{place} contains {x.dtype}, unlike the first item: give all items the same dtype")
        return (x,) if self._label is None else (x, self._number(fields[self._label], place))

    def _set_shape(self, first: Any, place: str) -> None:
        options = self.options
        if isinstance(first, bytes | Image.Image):
            (height, width), mode, _ = self._header(first, place)
            self.white, self._grey = 1 if mode in MODES_16_BIT else 255, mode in GREY_MODES
            channels = options.channels or (1 if self._grey else 3)
            self.input_shape = (channels, *((options.size, options.size) if options.size else (height, width)))
            return
        self._raw, shape = tuple(first.shape), sample_shape(first[None], options.layout, place)
        self.input_shape = resized_shape(shape, options.size, options.channels)
        self.white = 255 if str(first.dtype).removeprefix("torch.") == "uint8" else None

    def _header(self, image: Any, place: str) -> Header:
        limit = self.options.max_pixels
        if isinstance(image, bytes):
            return read_header(EncodedImage(place, image), limit)
        check_pixels(place, image.size, limit)
        return Header((image.height, image.width), image.mode)

    def _read(self, value: Any, place: str) -> Tensor:
        options = self.options
        if not isinstance(value, bytes | Image.Image):
            return self._array(value, place)
        mode = self._header(value, place).mode
        if options.channels is None and (mode in GREY_MODES) != self._grey:
            kinds = ("grey", "coloured") if mode in GREY_MODES else ("coloured", "grey")
            raise AezooError(f"{place} is {kinds[0]} and the first item is {kinds[1]}: choose --data.channels 1 or "
                             "--data.channels 3")  # fmt: skip
        if isinstance(value, bytes):
            x = read_image(EncodedImage(place, value), options.size, self.input_shape[0], options.max_pixels)
        else:
            try:
                x = to_tensor(value, options.size, self.input_shape[0])
            except ValueError as error:
                raise AezooError(f"{place} is not a readable image ({error}): write it again") from None
        return x.float() / 255 if self.white == 1 and x.dtype == torch.uint8 else x

    def _array(self, value: Any, place: str) -> Tensor:
        if not isinstance(value, Tensor | np.ndarray):
            raise AezooError(
                f"{place} contains a {type(value).__name__}, but the first item an array: give items of one kind"
            )
        # a copy: litdata's tensors are views of a file that it may close
        x = to_real_tensor(value[None].clone() if isinstance(value, Tensor) else np.array(value)[None], place)
        if tuple(x.shape[1:]) != self._raw:
            sample_shape(x, self.options.layout, place)
        x = to_channels_first(x, self.options.layout)
        x = resize(x, self.options.size, self.options.channels)[0] if x.ndim == 4 else x[0]
        if x.dtype == torch.uint8:
            return x
        if self.options.scale == "auto" and not (x.min() >= 0 and x.max() <= 1):
            raise AezooError(f"{place} has values from {x.min():.3g} to {x.max():.3g}: write values from 0 to 1, or "
                             "give --data.scale none")  # fmt: skip
        return x.float()

    def _number(self, label: Any, place: str) -> int | float:
        names = self.class_names
        if isinstance(label, str):
            if names is None or label not in names:
                raise AezooError(f"{place} is of class {label!r}, which classes.json does not name: list all classes "
                                 "there, beside the chunks")  # fmt: skip
            return names.index(label)
        number = label.item() if _is_scalar(label) else label
        if not isinstance(number, int | float) or (names and not -1 <= number < len(names)):
            raise AezooError(
                f"{place} has the label {number!r}: give a number of a class in classes.json, or -1 for none"
            )
        return float(number) if isinstance(number, float) else int(number)


class StreamDataset(Dataset[Any]):
    """Rows of a folder of chunks, as samples.

    Args:
        source: makes a sample of an item.
        chunks: the items.
        rows: the indices of this split's items, in ascending order.
    """

    def __init__(self, source: Stream, chunks: ChunkedItems, rows: Tensor) -> None:
        self.source, self.chunks, self.rows = source, chunks, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        row = int(self.rows[index])
        return self.source.sample(self.chunks[row], self.chunks.place(row))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch, read chunk by chunk."""
        self.chunks.fetch(self.rows[torch.as_tensor(indices)].tolist())
        found = {index: self[index] for index in sorted(indices)}
        return collate([found[index] for index in indices], labels=True)

    @property
    def blocks(self) -> Tensor:
        """The chunk of each sample, (N,)."""
        return torch.bucketize(self.rows, torch.tensor(self.chunks.ends), right=True)


def _cache_of(options: Options) -> FileCache:
    """The local folder for the files of an address, with its index and class files."""
    objects = ObjectFolder(options.root, options.allow_remote)
    cache = FileCache(objects, options.cache_dir, options.cache_bytes)
    for path in objects.objects:
        *folder, name = path.split("/")
        is_index = name == "index.json" and (not folder or (len(folder) == 1 and folder[0].lower() in SPLITS))
        if is_index or path == "classes.json":
            cache.keep(path, _MOST_JSON)
    return cache


def _folders(path: Path, shown: str) -> dict[Stage, str]:
    """The folder of each split; messages show `shown` instead of the path."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise AezooError(f"the folder {shown} {what}: give one that litdata.optimize wrote with --data.root")
    if (path / "index.json").is_file():
        return {"train": str(path)}
    found: dict[Stage, str] = {
        SPLITS[child.name.lower()]: str(child)
        for child in sorted(path.iterdir())
        if child.name.lower() in SPLITS and (child / "index.json").is_file()
    }
    if "train" not in found:
        raise AezooError(f"no index.json in {shown}, nor in {shown}/train: give a folder that litdata.optimize wrote")
    return found


def _class_names(folder: Path, shown: str) -> tuple[str, ...] | None:
    file, path = folder / "classes.json", f"{shown}/classes.json"
    if not file.is_file():
        return None
    try:
        names = json.loads(file.read_text())
    except ValueError as error:
        raise AezooError(f'{path} is not valid JSON ({error}): write a list of names, ["cat", "dog"]') from None
    if not isinstance(names, list) or len(names) < 2 or len({str(name) for name in names}) < len(names):
        raise AezooError(f'{path} is not a list of two or more names: write ["cat", "dog"]')
    return tuple(map(str, names))


def _fields(item: Any) -> dict[str, Any]:
    if isinstance(item, Mapping):
        return {str(name): value for name, value in item.items()}
    return {str(i): value for i, value in enumerate(item if isinstance(item, tuple | list) else (item,))}


def _choose_column(fields: Mapping[str, Any], wanted: str, place: str) -> str:
    images = [name for name, value in fields.items() if isinstance(value, bytes | Image.Image)]
    arrays = [name for name, value in fields.items() if isinstance(value, Tensor | np.ndarray) and value.ndim]
    known = images + arrays
    found = (images or arrays) if wanted == "auto" else [name for name in known if name == wanted]
    if len(found) != 1:
        chosen = "" if wanted == "auto" else f" called {wanted!r}"
        raise AezooError(f"{place} has {len(found) or 'no'} image(s) or array(s){chosen}: choose one of "
                         f"{', '.join(known) or 'none'} with --data.column")  # fmt: skip
    return found[0]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray | np.generic) and not value.ndim


def _choose_label(fields: Mapping[str, Any], column: str, wanted: str, place: str) -> str | None:
    if wanted == "none":
        return None
    numbers = [
        name for name, value in fields.items() if (isinstance(value, _LABEL) or _is_scalar(value)) and name != column
    ]
    found = numbers if wanted == "auto" else [name for name in numbers if name == wanted]
    if wanted == "auto" and len(found) != 1:
        found = [name for name in _LABELS if name in numbers][:1]
        if not found:
            return None
    if not found:
        raise AezooError(f"{place} has no label {wanted!r}: its labels are {', '.join(numbers) or 'none'}")
    return found[0]
