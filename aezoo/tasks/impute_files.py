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
        store.write(f"{NAME}{kind}", lambda file: fill(file, path, origin.label_column, samples, x_hat))
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
    return (_part(samples, x_hat, rows) for rows in _slices(x_hat))


def _part(samples: SampleSet, x_hat: Arrays, rows: slice) -> _Part:
    columns = samples.columns
    completed, index = np.array(x_hat[rows]), torch.arange(rows.start, rows.stop)
    release(x_hat)
    given = samples.raw_rows(index)
    missing, raw = samples.from_raw(given, index).isnan().numpy(), given.numpy()
    values = samples.raw_values(torch.from_numpy(completed)).numpy() if columns is None else columns.values(completed)
    if samples.origin is None:
        return _Part(values, missing)
    if raw.dtype == np.uint8:
        values = np.clip(np.rint(values), 0, 255)
    return _Part(np.where(missing, values.astype(raw.dtype), raw), missing)


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


def _fill_csv(file: IO[bytes], path: Path, label_column: str, samples: SampleSet, x_hat: Arrays) -> None:
    """The text of a table, in which only the cells of missing values change."""
    table = CsvTable(path, label_column)
    text = io.StringIO()
    writer = csv.writer(text, delimiter=table.separator, lineterminator="\n")
    if table.header:
        writer.writerow(table.first)
    rows = table.rows()
    for part in _parts(samples, x_hat):
        for values, missing in zip(part.values.tolist(), part.missing, strict=True):
            row = next(rows)
            features = [i for i in range(len(row)) if i != table.label]
            for i in np.flatnonzero(missing):
                row[features[i]] = repr(values[i])
            writer.writerow(row)
        file.write(text.getvalue().encode())
        text.seek(0)
        text.truncate()


def _fill_parquet(file: IO[bytes], path: Path, label_column: str, samples: SampleSet, x_hat: Arrays) -> None:
    """A table in which the columns of features are completed, and all others are as they were."""
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
    import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

    with pq.ParquetFile(path) as given:
        schema = given.schema_arrow
        names = parquet_columns(schema, label_column)[0]
        places = [schema.get_field_index(name) for name in names]
        whole = [i for i, place in enumerate(places) if not pa.types.is_floating(schema.field(place).type)]
        incomplete = np.zeros(len(names), bool)
        for part in _parts(samples, x_hat) if whole else ():
            incomplete |= part.missing.any(0)
        for i in whole:
            if incomplete[i]:  # a whole number would round what is filled in
                schema = schema.set(places[i], schema.field(places[i]).with_type(pa.float64()))
        with pq.ParquetWriter(file, schema) as writer:
            start = 0
            for batch in given.iter_batches(max(1, _MAX_VALUES // len(names))):
                part, columns = _part(samples, x_hat, slice(start, start + len(batch))), batch.columns
                for i in np.flatnonzero(part.missing.any(0)).tolist():
                    columns[places[i]] = pa.array(part.values[:, i]).cast(schema.field(places[i]).type)
                columns = [column.cast(kind) for column, kind in zip(columns, schema.types, strict=True)]
                writer.write_batch(pa.record_batch(columns, schema=schema))
                start += len(batch)
