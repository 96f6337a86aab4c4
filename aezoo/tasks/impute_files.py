"""Completed samples in the format and the units of the file they came from."""

import csv
import io
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.data.array import SAMPLES, from_channels_first
from aezoo.data.in_memory import as_real_array
from aezoo.data.readers import CsvTable, parquet_columns, read_arrays
from aezoo.tasks.result_store import Store, release
from aezoo.tasks.samples import SampleSet

NAME = "imputed"
# values in memory at a time
_MAX_VALUES = 2**20
Arrays = npt.NDArray[Any]


def write_completed(store: Store, samples: SampleSet, x_hat: Arrays) -> None:
    """Write `imputed` in the format that samples were given in, or else as .npy, .csv or pictures.

    Args:
        store: of the results.
        samples: what was given, in which missing values are NaN.
        x_hat: the completed samples, in the scale that the model sees.
    """
    origin, columns = samples.origin, samples.columns
    path = None if origin is None else origin.path
    kind = "" if path is None else path.suffix.lower()
    if store.folder is None:
        return
    if samples.kind == "png":
        store.each_sample(f"{NAME}/", x_hat)
    elif origin is not None and path is not None and columns is not None:
        fill = _fill_csv if kind == ".csv" else _fill_parquet
        store.write(f"{NAME}{kind}", lambda file: fill(file, path, origin.label_column, _parts(samples, x_hat)))
    elif columns is not None:
        parts = _parts(samples, x_hat)
        store.table(
            NAME, (dict(zip(columns.names, row, strict=True)) for part in parts for row in part.values.tolist())
        )
    elif origin is None or path is None:
        array = store.samples(NAME, x_hat.shape)
        for rows in _slices(x_hat):
            array[rows] = x_hat[rows]
            release(array)
            release(x_hat)
    else:
        _write_array(store, samples, path, origin.layout, x_hat)


@dataclass(frozen=True)
class _Part:
    """Consecutive completed samples.

    Attributes:
        values: (n, *shape), in the units of the data; those that are not missing are what was given, unless it had been
            scaled before.
        missing: (n, *shape), which values are missing.
    """

    values: Arrays
    missing: Arrays


def _slices(x: Arrays) -> Iterator[slice]:
    n = max(1, _MAX_VALUES // math.prod(x.shape[1:]))
    return (slice(start, min(start + n, len(x))) for start in range(0, len(x), n))


def _parts(samples: SampleSet, x_hat: Arrays) -> Iterator[_Part]:
    columns = samples.columns
    for rows in _slices(x_hat):
        part, index = np.array(x_hat[rows]), torch.arange(rows.start, rows.stop)
        release(x_hat)
        given = samples.raw_rows(index)
        missing, raw = samples.from_raw(given, index).isnan().numpy(), given.numpy()
        values = samples.raw_values(torch.from_numpy(part)).numpy() if columns is None else columns.values(part)
        if samples.origin is None:
            yield _Part(values, missing)
            continue
        if raw.dtype == np.uint8:
            values = np.clip(np.rint(values), 0, 255)
        yield _Part(np.where(missing, values.astype(raw.dtype), raw), missing)


def _write_array(store: Store, samples: SampleSet, path: Path, layout: str, x_hat: Arrays) -> None:
    """A file of arrays with the axes and, for floats and bytes, the dtype of the one that was read; .npy for .pt."""
    arrays = read_arrays(path, sys.maxsize, streamed=True)
    name = next(key for key in SAMPLES if key in arrays)
    given = as_real_array(arrays[name], str(path))
    given = given.numpy() if isinstance(given, Tensor) else given
    shape, dtype = given.shape, given.dtype
    is_bytes, is_npz = dtype == np.uint8, path.suffix.lower() == ".npz"
    raw = samples.raw_rows(torch.tensor([0])).numpy()
    if not (is_bytes or dtype.kind == "f"):
        dtype = raw.dtype  # a whole number would round what is filled in
    has_axes = math.prod(shape[1:]) == raw.size  # else images were resized
    written = shape if has_axes else (len(samples), *raw.shape[1:])
    completed = np.empty(written, dtype) if is_npz else store.array(NAME, written, dtype)
    start = 0
    for part in _parts(samples, x_hat):
        values = from_channels_first(part.values, shape, is_bytes, layout) if has_axes else part.values
        completed[start : start + len(values)] = values
        start += len(values)
        release(completed)
    if is_npz:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
        own = {name: arrays[name] for name in names} if len(names) > 1 else {}
        store.arrays(NAME, own | {name if own else names[0]: completed})


def _fill_csv(file: IO[bytes], path: Path, label_column: str, parts: Iterator[_Part]) -> None:
    """The text of a table, in which only the cells of missing values change."""
    table = CsvTable(path, label_column)
    text = io.StringIO()
    writer = csv.writer(text, delimiter=table.separator, lineterminator="\n")
    if table.header:
        writer.writerow(table.first)
    rows = table.rows()
    for part in parts:
        for values, missing in zip(part.values.tolist(), part.missing, strict=True):
            row = next(rows)
            features = [i for i in range(len(row)) if i != table.label]
            for i in np.flatnonzero(missing):
                row[features[i]] = repr(values[i])
            writer.writerow(row)
        file.write(text.getvalue().encode())
        text.seek(0)
        text.truncate()


def _fill_parquet(file: IO[bytes], path: Path, label_column: str, parts: Iterator[_Part]) -> None:
    """A table in which the columns of features are completed, and all others are as they were."""
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
    import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

    pairs = zip(*((part.values, part.missing) for part in parts), strict=True)
    values, missing = (np.concatenate(both) for both in pairs)
    table = pq.read_table(path)
    for column, name in enumerate(parquet_columns(table.schema, label_column)[0]):
        if missing[:, column].any():
            kind = table.schema.field(name).type
            place = table.schema.get_field_index(name)
            kind = kind if pa.types.is_floating(kind) else pa.float64()
            completed = pa.array(values[:, column]).cast(kind)
            table = table.set_column(place, pa.field(name, kind), completed)
    pq.write_table(table, file)
