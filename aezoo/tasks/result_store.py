"""Output of results: arrays that may be larger than memory, tables, pictures; files are written atomically."""

import csv
import io
import math
import mmap
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.errors import AezooError, install_hint
from aezoo.io import atomic_files
from aezoo.io.partial import reserve
from aezoo.io.terminal import printable
from aezoo.tasks.passes import CURE, Passes, current
from aezoo.training.data_units import DataUnits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
# rows of a table that are in memory at a time
_TABLE_ROWS = 2**16
# samples that are brought into their units at a time
_ROWS = 2**10


class SeparateArrays(Sequence[npt.NDArray[Any]]):
    """Samples of several shapes, one after the other in one array.

    Args:
        flat: memory for the values of all samples.
        shapes: the shape of each sample.
    """

    def __init__(self, flat: npt.NDArray[Any], shapes: Sequence[tuple[int, ...]]) -> None:
        self.flat, self.shapes = flat, shapes
        self._ends = np.cumsum([math.prod(shape) for shape in shapes])
        self.base, self.dtype, self.size = flat.base, flat.dtype, flat.size

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        shape = self.shapes[index]
        end = int(self._ends[index])
        return self.flat[end - math.prod(shape) : end].reshape(shape)

    def __setitem__(self, index: slice, values: npt.NDArray[Any]) -> None:
        """Set one sample, (1, *shape)."""
        self[index.start][...] = values[0]

    def min(self) -> Any:
        """The smallest value."""
        return self.flat.min()

    def max(self) -> Any:
        """The largest value."""
        return self.flat.max()


Samples = npt.NDArray[Any] | SeparateArrays


class Store:
    """Arrays and files of one task, in a folder or, without one, arrays in memory.

    Use it in a `with` block: all files get their names when it succeeds, and are removed if it fails, so that existing
    files stay unchanged.

    Args:
        folder: created if it does not exist; None keeps arrays in memory and writes nothing.
        units: the units in which files of samples are written; None does not convert samples.

    Attributes:
        files: the files written, in order.
    """

    def __init__(self, folder: str | Path | None, units: DataUnits | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.files: list[Path] = []
        self._token = secrets.token_hex(4)
        self._written: dict[Path, Path] = {}
        self._mapped: list[Any] = []
        self._units = units
        # files that several processes write, and that a later call continues
        self._passes = Passes() if self.folder is None else current.get()
        # samples in the model's scale, and the files of the same samples in their units
        self._scaled: list[tuple[DataUnits, npt.NDArray[Any], npt.NDArray[Any]]] = []
        if self.folder is not None:
            # a unique name, since another process may test the folder at the same time
            probe = self.folder / f".tmp-{os.getpid()}.part"
            atomic_files.write(probe, lambda file: None, cure=CURE)
            probe.unlink()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None and not self._passes.rank:
                self._commit()
        finally:
            for temporary in self._written.values():
                if temporary.parent == self.folder:  # others are parts, which a later call continues
                    temporary.unlink(missing_ok=True)
            self._written.clear()
            self._mapped.clear()
            self._scaled.clear()

    def _commit(self) -> None:
        for units, scaled, in_units in self._scaled:
            for i in range(0, len(scaled), _ROWS):
                in_units[i : i + _ROWS] = units.values(scaled[i : i + _ROWS])
                release(scaled)
                release(in_units)
        for array in self._mapped:
            array.flush()
        if self._passes.parts is not None:
            self._passes.parts.forget()  # a later call could not continue files that were moved
        for path, temporary in self._written.items():
            try:
                temporary.replace(path)
            except OSError as error:
                raise AezooError(f"cannot write {path}: {error.strerror or error}; {CURE}") from error

    def array(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """An empty array to fill: `folder/name.npy`, memory-mapped, or plain memory."""
        if self.folder is None:
            try:
                return np.empty(shape, dtype)
            except (MemoryError, ValueError) as error:
                raise AezooError(
                    f"{name} of shape {shape} does not fit in memory: reduce it, or give out, a folder"
                ) from error
        path, is_empty = self.folder / f"{name}.npy", math.prod(shape) == 0
        if is_empty:  # which cannot be mapped
            in_memory = np.empty(shape, dtype)
            self.write(path.name, lambda file: np.save(file, in_memory))
            return in_memory
        if self._passes.parts is not None:
            array = self._passes.array(shape, dtype, name)
            self._mapped.append(array)
            self._register(path, Path(array.filename))  # type: ignore[attr-defined]
            return array
        temporary = self._temporary(path)
        try:
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.dtype(dtype), shape=shape)
            with temporary.open("r+b") as file:
                reserve(file, temporary.stat().st_size)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            size = math.prod(shape) * np.dtype(dtype).itemsize / 2**30
            raise AezooError(
                f"cannot write {path}, {size:,.1f} GiB: {error.strerror}; free disk space, reduce it, or choose "
                "another folder with --out"
            ) from error
        self._mapped.append(array)
        self._register(path, temporary)
        return array

    def samples(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """An empty array to fill with samples in the model's scale, whose file has them in the units of the data."""
        if self.folder is None or self._units is None or not self._units.scaling:
            return self.array(name, shape, dtype)
        wide = self._units.scaling["offset"].dtype == torch.float64
        scaled = self.scratch(shape, dtype)
        self._scaled.append((self._units, scaled, self.array(name, shape, np.float64 if wide else np.float32)))
        return scaled

    def separate(self, shapes: Sequence[tuple[int, ...]], dtype: npt.DTypeLike = np.float32) -> SeparateArrays:
        """Empty samples of several shapes to fill, in a file without a name or in memory."""
        return SeparateArrays(self.scratch((sum(map(math.prod, shapes)),), dtype), shapes)

    def each_sample(self, name: str, x: Samples, kind: str = "png") -> None:
        """Write each sample as `folder/name000000.png`, or as .npy if it is not a picture or kind is npy.

        PNGs have the values of the training data. If these are scaled and their white is unknown, black and white are
        the smallest and the largest value.
        """
        from PIL import Image

        units, low, high = self._units or DataUnits(), 0.0, 1.0
        if units.scaling and units.white is None and x.size and x.dtype != np.uint8:
            low, high = min(low, float(x.min())), max(high, float(x.max()))
        for i, image in enumerate(x):
            content = io.BytesIO()
            if kind == "png" and image.ndim == 3 and len(image) in (1, 3):
                shares = (units.shares_of_white(image) - low) / (high - low)
                pixels = np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8)
                Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(content, "PNG")
                self.file(f"{name}{i:06d}.png", content.getvalue())
            else:
                np.save(content, units.values(image).astype(np.float32) if units.scaling else image)
                self.file(f"{name}{i:06d}.npy", content.getvalue())

    def scratch(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """An empty array in a file without a name, or in memory."""
        if self.folder is None or math.prod(shape) == 0:
            return np.empty(shape, dtype)
        if self._passes.parts is not None:
            return self._passes.array(shape, dtype)
        with tempfile.TemporaryFile(dir=self.folder) as file:  # the memory map outlives it
            return np.memmap(file, dtype, "w+", shape=shape)

    def arrays(self, name: str, arrays_by_name: dict[str, npt.NDArray[Any]]) -> None:
        """Write arrays by name as `folder/name.npz`."""
        self.write(f"{name}.npz", lambda file: np.savez(file, **arrays_by_name))  # type: ignore[arg-type]

    def table(self, name: str, rows: Iterable[Row], kind: str = "csv") -> None:
        """Write `folder/name.csv` or, with kind "parquet", `folder/name.parquet`, a part of the rows at a time."""
        write_rows = write_csv if kind == "csv" else _write_parquet
        self.write(f"{name}.{kind}", lambda file: write_rows(file, rows))

    def file(self, name: str, content: bytes) -> None:
        """Write bytes as `folder/name`."""
        self.write(name, lambda file: file.write(content))

    def write(self, name: str, write_content: Callable[[IO[bytes]], object]) -> int:
        """Write `folder/name`, whose content `write_content` writes into the open file; returns its size."""
        if self.folder is None or self._passes.rank:
            return 0
        path = self.folder / name
        temporary = self._temporary(path)
        atomic_files.write(temporary, write_content, cure=CURE, name=path)
        self._register(path, temporary)
        return temporary.stat().st_size

    def picture(self, name: str, draw: "Callable[[], Figure]") -> None:
        """Write the figure that is drawn as `folder/name.png`."""
        from aezoo.callbacks.plotting import png_bytes

        if self.folder is not None and not self._passes.rank:
            png = png_bytes(draw())
            self.write(f"{name}.png", lambda file: file.write(png))

    def _temporary(self, path: Path) -> Path:
        return path.with_name(f".tmp-{self._token}-{path.name}.part")

    def _register(self, path: Path, temporary: Path) -> None:
        self._written[path] = temporary
        self.files.append(path)


def row_of(columns: Mapping[str, Sequence[Any]], i: int) -> Row:
    """Row i of columns."""
    return {name: column[i] for name, column in columns.items()}


def write_csv(file: IO[bytes], rows: Iterable[Row]) -> None:
    """Write a CSV with the keys of the first row as header; numbers with all digits."""
    remaining = iter(rows)
    part = list(islice(remaining, _TABLE_ROWS))
    names = list(part[0]) if part else []
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writerow({name: spreadsheet_cell(name) for name in names})
    while True:
        writer.writerows({name: spreadsheet_cell(cell) for name, cell in row.items()} for row in part)
        # names of files may contain bytes that are not valid text
        file.write(text.getvalue().encode("utf-8", "backslashreplace"))
        text.seek(0)
        text.truncate()
        if not (part := list(islice(remaining, _TABLE_ROWS))):
            return


def spreadsheet_cell(cell: Any) -> Any:
    """A cell of a CSV; a text that spreadsheets would run as a formula gets a leading apostrophe."""
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def check_table(kind: str, kinds: Sequence[str]) -> None:
    """Refuse a format of tables that is unknown or, as parquet may, lacks its package."""
    if kind not in kinds:
        raise AezooError(f"table is {kind!r}: use {', '.join(kinds[:-1])} or {kinds[-1]}")
    if kind == "parquet" and find_spec("pyarrow") is None:
        raise AezooError(f"writing .parquet needs pyarrow: {install_hint('parquet')}")


def _write_parquet(file: IO[bytes], rows: Iterable[Row]) -> None:
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
    import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

    remaining = ({name: _text(cell) for name, cell in row.items()} for row in rows)
    table = pa.Table.from_pylist(list(islice(remaining, _TABLE_ROWS)))
    with pq.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table)
        while part := list(islice(remaining, _TABLE_ROWS)):
            writer.write_table(pa.Table.from_pylist(part, table.schema))


def _text(cell: Any) -> Any:
    return cell.encode("utf-8", "backslashreplace").decode() if isinstance(cell, str) else cell


def table_text(rows: Sequence[Row]) -> str:
    """Rows as lines of aligned columns with a header; numbers right-aligned."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    numeric = [any(isinstance(row.get(name), int | float) for row in rows) for name in names]
    lines = [
        "  ".join(
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool | str):
        return printable(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def write_batch(array: Samples, start: int, values: Tensor) -> None:
    """Write a batch of results to its position; a mapped file does not stay in this process's memory."""
    values = values.detach()
    array[start : start + len(values)] = (values.float() if values.is_floating_point() else values).cpu().numpy()
    release(array)


def release(array: Samples) -> None:
    """Free the memory of a mapped file in this process; what is not on the disk yet is in the system's cache."""
    base = array.base
    while isinstance(base, np.ndarray):  # of a view
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def resolve_device(name: str) -> torch.device:
    """A device by name; `auto` takes a GPU if there is one.

    Raises:
        AezooError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AezooError(
            f"no device {name!r} on this machine: give --device cpu or auto ({str(error).splitlines()[0]})"
        ) from error
    return device


def concatenate(parts: Iterable[Tensor]) -> Tensor:
    """Batches as one tensor on the CPU."""
    return torch.cat([part.detach().cpu() for part in parts])
