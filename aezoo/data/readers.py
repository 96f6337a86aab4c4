"""Files of arrays, read without running code from them: .npy, .npz, .pt, .csv, .parquet."""

import array
import contextlib
import csv
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy
from torch import Tensor

from aezoo.errors import AezooError, install_hint
from aezoo.security.archives import check_tuples, unpacked_size
from aezoo.security.values import check_extent
from aezoo.training.keyword_groups import Argument

# a cell and its comma, at least two bytes, become a double, in an array that is copied as it grows, and a float
_CSV_MEMORY_FACTOR = 8
# stored as strings of fixed width, as in NumPy
_MOST_LABEL_BYTES = 2**30
_PARQUET_ROWS = 2**16
_PARQUET_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}
_MAX_EXACT_INTEGER = 2**53
# strings that mean a missing number
_MISSING = frozenset({"na", "n/a", "#n/a", "<na>", "none", "null", "missing", "unknown", "?", "-", "--", "."})
Arrays = Mapping[str, Any]


class MemoryLimitArgs(TypedDict, total=False):
    """Setting of sources that read whole files into memory."""

    max_bytes: Annotated[int, Argument(
        2**33, "Refuse files that need more bytes of memory than this (8 GiB).", 1
    )]  # fmt: skip


class LabelColumnArgs(TypedDict, total=False):
    """Setting of sources whose labels are a column of a table."""

    label_column: Annotated[str, Argument(
        "auto", "The column that contains the labels of hf, stream or a table (.csv, .parquet), by name; none: no "
        "labels; auto: the column of classes, or else the one called label."
    )]  # fmt: skip


class ColumnArgs(LabelColumnArgs, total=False):
    """Settings of sources whose samples are a column of a table, too."""

    column: Annotated[str, Argument(
        "auto", "The column that contains the samples of hf or stream, by name, or by number in a tuple; auto: the "
        "column of images, or else the column of arrays."
    )]  # fmt: skip


class TableArrays(dict[str, Any]):
    """Arrays of a table, and its column names of x; () without names.

    Args:
        arrays: x and y.
        columns: the names, in the order of the columns.
        label: the name of the label column; None without one.
        times: the time stamp of each row; () without.
    """

    def __init__(
        self, arrays: Arrays, columns: Sequence[str] = (), label: str | None = None, times: Sequence[str] = ()
    ) -> None:
        super().__init__(arrays)
        self.columns, self.label, self.times = tuple(columns), label, times


def read_arrays(
    path: Path,
    max_bytes: int = 2**33,
    label_column: str = "auto",
    streamed: bool = False,
    time_columns: Sequence[str] = (),
) -> Arrays:
    """The arrays in a file, by name; the size that it declares is checked before memory is allocated.

    Args:
        path: the file.
        max_bytes: the most memory that its arrays may take.
        label_column: of a table, see `DataModule`.
        streamed: the array of a .npy file is for `NpyDataset`: a read-only map of any size, unless its order is
            Fortran's, in which the values of a sample are spread over the file.
        time_columns: the first column of a table with one of these names, in any case, contains time stamps.

    Raises:
        AezooError: the file cannot be read, or takes more memory.
    """
    if path == Path():
        raise AezooError("arrays handed in from Python are not kept in a checkpoint: call DataModule.from_arrays again")
    readers: dict[str, Callable[[Path, int], Arrays]] = {
        ".npy": functools.partial(_read_npy, streamed=streamed), ".npz": _read_npz, ".pt": _read_pt, ".pth": _read_pt,
        ".csv": functools.partial(_read_csv, label_column=label_column, time_columns=time_columns),
        ".parquet": functools.partial(_read_parquet, label_column=label_column, time_columns=time_columns),
    }  # fmt: skip
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise AezooError(f"{path} {what}: give a file of arrays ({' '.join(readers)}) by --data.root")
    if path.suffix.lower() not in readers:
        raise AezooError(f"{path}: the array source reads {' '.join(readers)}, not {path.suffix or 'such files'!r}")
    try:
        arrays = readers[path.suffix.lower()](path, max_bytes)
        # a view can have many times the size of its memory
        held = [array for array in arrays.values() if not is_streamed(array)]
        check_bytes(path, sum(map(_array_bytes, held)), max_bytes)
        return arrays
    except AezooError:
        raise
    except PermissionError as error:
        raise AezooError(f"cannot read {path} ({error.strerror}): check its permissions") from None
    # every format raises other exceptions for a truncated or unknown file
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise AezooError(
            f"{path} cannot be read as {path.suffix} ({type(error).__name__}: {reason}): write it again"
        ) from None


def check_columns(what: str, columns: Sequence[str], trained: Sequence[str]) -> None:
    """Refuse a table whose column names, or their order, differ from those of the training data."""
    if not columns or not trained or list(columns) == list(trained):
        return
    missing, extra = ([name for name in a if name not in b] for a, b in ((trained, columns), (columns, trained)))
    if missing or extra or len(columns) != len(trained):
        found = [f"lacks {first_names(missing)}"] * bool(missing) + [f"has {first_names(extra)} besides"] * bool(extra)
        raise AezooError(
            f"{what} {' and '.join(found) or 'repeats some'} of the {len(trained)} columns of the training data: give "
            "it these columns, in their order, or no header if only the names differ"
        )
    place = next(i for i, name in enumerate(trained) if columns[i] != name)
    raise AezooError(
        f"{what} has the columns of the training data in another order, {columns[place]!r} where {trained[place]!r} "
        f"was: write them in the order {first_names(trained)}"
    )


def _label_position(names: Sequence[str], label_column: str) -> int | None:
    """The position of the labels: the column of that name, or for auto and none the one called `label`, in any case."""
    if label_column not in ("auto", "none"):
        return list(names).index(label_column) if label_column in names else None
    lower = [name.lower() for name in names]
    return lower.index("label") if "label" in lower else None


def _time_position(names: Sequence[str], time_columns: Sequence[str]) -> int | None:
    """The position of the time stamps, the first column with one of the names."""
    return next((i for i, name in enumerate(names) if name.lower() in time_columns), None)


def first_names(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join([repr(name) for name in names[:5]] + ["..."] * (len(names) > 5))


def check_bytes(path: Path | str, size: int, max_bytes: int) -> None:
    """Refuse a file whose content takes too much memory."""
    if size > max_bytes:
        raise AezooError(
            f"{path} takes {_format_bytes(size)} of memory, more than the limit of {_format_bytes(max_bytes)}: if it "
            "is what it should be, raise --data.max_bytes"
        )


def _format_bytes(size: int) -> str:
    if size >= 2**70:
        return "more than 1024 EiB"
    power = (max(size, 1).bit_length() - 1) // 10
    return f"{size / 2 ** (10 * power):.3g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[power]}"


def _array_bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize if isinstance(array, Tensor | np.ndarray) else 0


def _refuse_pickle(path: Path, error: ValueError) -> AezooError:
    if "pickle" in str(error) or "Python objects" in str(error):
        return AezooError(
            f"{path} contains Python objects (pickle), which can run code, or is damaged: save plain numbers, "
            "np.save(path, array.astype('float32'))"
        )
    return AezooError(f"{path} is damaged or not a NumPy file ({error}): write it again with np.save")


def is_streamed(array: Any) -> bool:
    """Whether `read_arrays` has only mapped the array, for `NpyDataset`."""
    return isinstance(array, np.memmap) and not array.flags.writeable


def _read_npy(path: Path, max_bytes: int, streamed: bool = False) -> Arrays:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        raise AezooError(f"{path} is a zip archive, not a .npy file: rename it to .npz if it is one")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if streamed and array.flags.c_contiguous:
            return {"x": array}
        # first, since the system refuses a writable map of more memory than there is
        check_bytes(path, array.nbytes, max_bytes)
        # "c": read from disk when used, and never written back
        return {"x": np.load(path, mmap_mode="c", allow_pickle=False)}
    except ValueError as error:
        raise _refuse_pickle(path, error) from None


def _read_npz(path: Path, max_bytes: int) -> Arrays:
    check_bytes(path, unpacked_size(path) or 0, max_bytes)
    try:
        # opened here, because np.load does not close a damaged archive
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile) or file.zip is None:
                raise AezooError(f"{path} is not an archive of arrays: rename it to .npy if it is one array")
            for name in file.zip.namelist():
                _check_header(path, file.zip.open(name), max_bytes)
            return _name_single_array({name: file[name] for name in file.files})
    except ValueError as error:
        raise _refuse_pickle(path, error) from None


def _check_header(path: Path, stream: Any, max_bytes: int) -> None:
    """Refuse an array whose header declares more than the limit; NumPy would allocate that memory first."""
    with stream:
        version = npy.read_magic(stream) if stream.peek(6)[:6] == b"\x93NUMPY" else None
        if version is not None:
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(stream)
            check_bytes(path, math.prod(shape) * dtype.itemsize, max_bytes)


def _read_pt(path: Path, max_bytes: int) -> Arrays:
    check_bytes(path, unpacked_size(path) or 0, max_bytes)
    check_tuples(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n", 1)[0][:100]
        raise AezooError(
            f"{path} is damaged or contains more than tensors ({reason}): torch.save a tensor, (x, y) or "
            "{'x': x, 'y': y}"
        ) from None
    check_extent(content, str(path))
    for key, value in content.items() if isinstance(content, Mapping) else ():
        _check_list(path, key, value)
    if isinstance(content, tuple | list) and len(content) == 2 and all(isinstance(part, Tensor) for part in content):
        return {"x": content[0], "y": content[1]}
    if isinstance(content, Mapping):
        return _name_single_array({str(key): value for key, value in content.items()})
    if not isinstance(content, Tensor):
        raise AezooError(f"{path} contains a {type(content).__name__}: save a tensor, (x, y) or {{'x': x, 'y': y}}")
    return {"x": content}


def _check_list(path: Path, key: Any, value: Any) -> None:
    """Refuse a list for which NumPy would need far more time or memory than the file has bytes."""
    if isinstance(value, list | tuple):
        if any(isinstance(part, list | tuple | dict | set) for part in value):
            raise AezooError(
                f"{path} contains lists of lists in {str(key)[:50]!r}: save them as a tensor, or leave it out"
            )
        _check_texts([part for part in value if isinstance(part, str)])


def _name_single_array(arrays: dict[str, Any]) -> Arrays:
    return {"x": next(iter(arrays.values()))} if len(arrays) == 1 else arrays


class CsvTable:
    """The text of a CSV file, whose separator is a comma, semicolon or tab; rows are read one by one.

    Args:
        path: the file.
        label_column: see `DataModule`.
        time_columns: see `read_arrays`.

    Attributes:
        first: the cells of the first row.
        header: whether these are names.
        counts: whether they count the columns from 0 on.
        label: the position of the labels; None without.
        time: the position of the time stamps; None without.

    Raises:
        AezooError: it is empty or not text.
    """

    def __init__(self, path: Path, label_column: str, time_columns: Sequence[str] = ()) -> None:
        self._path = path
        line = next(self._lines(), None)
        if line is None:
            raise AezooError(f"{path} is empty: give one row per sample")
        self.separator = max(",;\t", key=line.count)
        self.first = first = [cell.strip() for cell in next(csv.reader(self._lines(), delimiter=self.separator))]
        # an empty cell is a missing value
        self.counts = len(first) > 1 and first == [str(i) for i in range(len(first))]
        self.header = self.counts or not all(_is_number(cell) for cell in first if cell)
        self.label = _label_position(first, label_column) if self.header else None
        time = _time_position(first, time_columns) if self.header else None
        self.time = None if time == self.label else time

    def rows(self) -> Iterator[list[str]]:
        """The cells of each row, without the header."""
        return itertools.islice(csv.reader(self._lines(), delimiter=self.separator), int(self.header), None)

    def _lines(self) -> Iterator[str]:
        """The lines that are not empty, read as they are needed."""
        with self._path.open(encoding="utf-8-sig") as file:
            try:
                yield from (line for line in file if line.strip())
            except UnicodeDecodeError as error:
                raise AezooError(f"{self._path} is not UTF-8 text ({error.reason}): save it as CSV in UTF-8") from None


def _read_csv(path: Path, max_bytes: int, label_column: str, time_columns: Sequence[str] = ()) -> Arrays:
    """Features, and labels if the header names them.

    A header is a first row with a text cell, or one that numbers the columns, 0,1,2 and so on, as pandas writes for
    columns without names; a 0 above a single column is a sample.
    """
    check_bytes(path, path.stat().st_size * _CSV_MEMORY_FACTOR, max_bytes)
    table = CsvTable(path, label_column, time_columns)
    separator, first, header, label, time = table.separator, table.first, table.header, table.label, table.time
    # the text of the columns that are not features; the last one is removed from a row first
    texts: dict[int, list[str]] = {i: [] for i in sorted((i for i in (label, time) if i is not None), reverse=True)}
    columns = [name for i, name in enumerate(first) if i not in texts] if header else []
    # row by row, since the texts of all cells would take ten times the memory of their numbers
    values, beginnings, broken = array.array("d"), [], None
    number = -1
    for number, row in enumerate(table.rows()):
        if len(row) != len(first):
            raise AezooError(
                f"{path}, row {number}: {len(row)} columns, the first line has {len(first)}: correct the row"
            )
        for i, cells in texts.items():
            cells.append(row.pop(i).strip())
        beginnings.append(row[0] if row and not first[0] else "")
        if broken is None:
            try:
                values.extend([*map(float, row)])
            except ValueError:
                if all(_is_number(cell) for cell in row if cell.strip()):
                    values.extend([float(cell) if cell.strip() else math.nan for cell in row])
                else:
                    broken = number, row
    width = len(first) - len(texts)
    if number < 0 or not width:
        raise AezooError(f"{path} has only a header: give one row per sample")
    named = header or first[1:] == [str(i) for i in range(len(first) - 1)]
    if len(first) > 1 and not first[0] and named and _is_row_index(beginnings[not header :]):
        raise AezooError(
            f"{path}: the first column has no name and numbers the rows, as pandas writes its index: save the table "
            "without it, frame.to_csv(path, index=False), or name the column if it is a feature"
        )
    if broken is not None:
        number, row = broken
        column = next(i for i, cell in enumerate(row) if cell.strip() and not _is_number(cell))
        is_comma = separator != "," and _is_number(row[column].replace(",", "."))
        is_missing = row[column].strip().lower() in _MISSING
        cure = "write a decimal point instead of the comma" if is_comma else "encode or drop the column"
        cure = "leave it empty for aezoo impute, or fill it" if is_missing and not is_comma else cure
        cure += ", or say by --data.label_column which column contains the classes" * (label is None and not is_comma)
        place = f"column {column + 1} of the features" + (f", {columns[column]}" if columns else "")
        raise AezooError(f"{path}, row {number}, {place}: {row[column]!r} is not a number: {cure}")
    x = np.frombuffer(values).reshape(number + 1, width)
    if table.counts and (x == np.floor(x)).all():
        warnings.warn(f"{path}: the first row, {separator.join(first)[:40]}, is read as a header, although all rows "
                      "hold whole numbers: write 0.0 for its 0 if it is a sample", stacklevel=2)  # fmt: skip
    y = parse_labels(texts[label]) if label is not None and label_column != "none" else None
    times = () if time is None else texts[time]
    return TableArrays({"x": x, "y": y}, columns, None if label is None else first[label], times)


def _read_parquet(path: Path, max_bytes: int, label_column: str, time_columns: Sequence[str] = ()) -> Arrays:
    """All columns but labels and time stamps as features."""
    try:
        import pandas  # noqa: F401  (for to_pandas)
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise AezooError(f"{path}: reading .parquet needs pandas and pyarrow: {install_hint('parquet')}") from None
    with parquet.ParquetFile(path) as file:
        about, schema = file.metadata, file.schema_arrow
        features, label, time = parquet_columns(schema, label_column, time_columns)
        names = [name for name in schema.names if name in {*features, label, time}]
        # lists and strings may take any amount of memory, independently of what the file declares
        text = [name for name in features if not _holds_numbers(schema.field(name).type)]
        if text or not features:
            raise AezooError(f"{path}: the columns {', '.join(text) or '(none)'} contain no numbers: drop or encode "
                             "them, or say by --data.label_column which contains the classes")  # fmt: skip
        if time is not None and pyarrow.types.is_nested(schema.field(time).type):
            raise AezooError(f"{path}: the column {time} contains lists, not time stamps: drop or rename it")
        if label is not None and pyarrow.types.is_nested(schema.field(label).type):
            raise AezooError(f"{path}: the column {label} contains lists, not classes: choose another with "
                             "--data.label_column")  # fmt: skip
        declared = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        # a column that repeats one value takes no space in the file
        check_bytes(path, max(declared, 8 * about.num_rows * len(names)), max_bytes)
    # each string once, not once per row
    with parquet.ParquetFile(path, read_dictionary=None if label is None else [label]) as file:
        batches, rows = [], 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=names):
            rows += len(batch)
            check_bytes(path, max(8 * rows * len(names), batch.nbytes), max_bytes)
            batches.append(batch)
        frame = (pyarrow.Table.from_batches(batches) if batches else file.read(columns=names)).to_pandas()
    column = None if label is None else frame.pop(label)
    y = None if column is None or label_column == "none" else _labels(column)
    times = () if time is None else [str(stamp) for stamp in frame.pop(time)]
    names = [str(name) for name in frame.columns]
    return TableArrays({"x": frame_values(frame), "y": y}, names, label and str(label), times)


def parquet_columns(
    schema: Any, label_column: str, time_columns: Sequence[str] = ()
) -> tuple[list[str], str | None, str | None]:
    """The columns of features, of labels and of time stamps of a pyarrow schema, without the index of pandas."""
    index = (schema.pandas_metadata or {}).get("index_columns", ())
    names = [name for name in schema.names if name not in index]
    place = _label_position(names, label_column)
    label = None if place is None else names[place]
    place = _time_position(names, time_columns)
    time = None if place is None or names[place] == label else names[place]
    return [name for name in names if name not in (label, time)], label, time


def check_parquet(path: Path, max_bytes: int) -> None:
    """Refuse a .parquet file with a row group larger than the limit; `datasets` reads a row group at once.

    Numbers and texts that repeat take hardly any space in the file, however many there are.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        about = file.metadata
    for i in range(about.num_row_groups):
        columns = [about.row_group(i).column(j) for j in range(about.num_columns)]
        size, repeated = 0, []
        for j, column in enumerate(columns):
            width = _PARQUET_WIDTHS.get(column.physical_type, about.schema.column(j).length)
            if column.physical_type != "BYTE_ARRAY":
                size += column.num_values * width
            elif column.has_dictionary_page or "DELTA_BYTE_ARRAY" in column.encodings:
                repeated.append(column)  # statistics of whole texts, or of their beginnings
            else:
                size += column.total_uncompressed_size
        check_bytes(path, size, max_bytes)
        if size + sum(column.num_values * column.total_uncompressed_size for column in repeated) > max_bytes:
            names = [column.path_in_schema for column in repeated]
            longest = max(column.total_uncompressed_size for column in repeated)
            rows = max(1, min(_PARQUET_ROWS, max_bytes // max(1, longest * len(names))))
            # each string once, not once per row
            dictionaries = [column.path_in_schema for column in repeated if column.has_dictionary_page]
            with parquet.ParquetFile(path, read_dictionary=dictionaries) as file:
                for batch in file.iter_batches(rows, row_groups=[i], columns=names):
                    size += sum(map(_text_bytes, batch.columns))
                    check_bytes(path, size, max_bytes)


def _text_bytes(column: Any) -> int:
    """Bytes of all texts of a column, each counted as often as it occurs."""
    from pyarrow import compute, types

    kind = column.type
    if types.is_struct(kind):
        return sum(_text_bytes(part) for part in column.flatten())
    if types.is_dictionary(kind):
        lengths = compute.binary_length(column.dictionary)
        return int(compute.sum(compute.cast(lengths.take(column.indices), "int64")).as_py() or 0)
    return _text_bytes(column.flatten()) if types.is_nested(kind) else int(column.nbytes)


def _labels(column: Any) -> Any:
    """The labels of a pandas column, (N,)."""
    missing, categories = column.isna().to_numpy(), getattr(column.dtype, "categories", None)
    if categories is not None and categories.dtype.kind not in "biuf":
        names = [str(name) for name in categories]  # each string once, for any dtype that pandas would choose
        return parse_labels(["" if code < 0 else names[code] for code in column.cat.codes.to_numpy()])
    y = column.to_numpy()
    if missing.any() or y.dtype.kind not in "biuf":
        return parse_labels(["" if lacks else str(label) for label, lacks in zip(y, missing, strict=True)])
    return y


def _holds_numbers(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def frame_values(frame: Any) -> npt.NDArray[Any]:
    """The values of a DataFrame, (N, D); float with NaN for booleans mixed with numbers and for missing numbers."""
    values: npt.NDArray[Any] = frame.to_numpy()
    if values.dtype.kind == "O":
        with contextlib.suppress(TypeError, ValueError):  # some values are strings
            values = frame.to_numpy(np.float64, na_value=math.nan)
    return values


def text_columns(values: Any) -> list[str]:
    """The columns of a DataFrame that do not contain numbers; [] for anything else."""
    kinds: Any = getattr(values, "dtypes", {})
    if not (hasattr(values, "columns") and hasattr(kinds, "items")):
        return []
    # pandas' own dtypes of numbers with missing values also have a kind
    return [str(name) for name, kind in kinds.items() if getattr(kind, "kind", "O") not in "biuf"]


def parse_labels(texts: list[str]) -> Any:
    """Numbers if all texts are numbers and exact, else the texts, (N,); masked where empty."""
    _check_texts(texts)
    missing = np.array([not text for text in texts])
    numbers = [float(text or 0) for text in texts] if all(_is_number(text) for text in texts if text) else []
    # larger integers are not exact as floats
    names = not numbers or any(_MAX_EXACT_INTEGER <= abs(number) < math.inf for number in numbers)
    labels = np.array(texts if names else numbers)
    return np.ma.array(labels, mask=missing) if missing.any() else labels


def _check_texts(texts: list[str]) -> None:
    """Refuse labels that are too long for names of classes."""
    longest = max(map(len, texts), default=0)
    if 4 * longest * len(texts) > _MOST_LABEL_BYTES:
        raise AezooError(f"{len(texts):,} labels of up to {longest:,} characters are not names of classes: choose "
                         "their column with --data.label_column")  # fmt: skip


def _is_row_index(cells: list[str]) -> bool:
    """Whether the cells are distinct whole numbers."""
    return bool(cells) and all(cell.strip().isdigit() for cell in cells) and len(set(cells)) == len(cells)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
