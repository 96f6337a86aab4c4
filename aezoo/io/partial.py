"""Partial results of a command, stored in a folder from which the same command continues after a kill.

A command writes its arrays block by block, at the positions of their samples in the source, and periodically a record
of finished blocks. Several processes write different blocks of the same arrays. Blocks are flushed to disk before they
are recorded, and the record is replaced atomically, so a kill or a power failure loses only a few seconds of work.

    folder/key.json           identifies the computation; a command with another key removes the folder
    folder/NAME.npy           an array of its final size
    folder/NAME-RANK.pieces   blocks of bytes of any length, in order
    folder/progress-RANK.npz  what a process has finished, also separately for named parts of the work
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import struct
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import torch

from aezoo.errors import AezooError
from aezoo.io import atomic_files, run_folder

Array = npt.NDArray[Any]

# seconds between two records, the work that a kill may lose
SECONDS = 5.0
# maximum bytes of an array in memory at a time
_CHUNK = 2**24
_KEY = "key.json"


def digest(*parts: object) -> str:
    """Return the SHA-256 of plain values and of the weights of modules among them."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for name, value in part.state_dict().items():
                found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                found.update(memoryview(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        else:
            found.update(json.dumps(part, sort_keys=True, default=str).encode())
    return found.hexdigest()


class Partial:
    """The folder of an unfinished command.

    Args:
        folder: created if it does not exist.
        key: identifies the computation, see `digest`; files of another key are removed.
        cure: advice in the error message if the folder cannot be written.
        rank: rank of this process. Rank zero must create its `Partial` before the other ranks.

    Raises:
        AezooError: the folder cannot be written, or another process is writing to it.
    """

    def __init__(self, folder: Path, key: str, cure: str, rank: int = 0) -> None:
        self.folder, self.cure, self.rank = folder, cure, rank
        self._saved, self._files = time.monotonic(), dict[str, RowFile | PieceFile]()
        self._lock = contextlib.ExitStack()
        if rank:
            return
        stays = run_folder.existing_parent(folder.parent)
        with contextlib.suppress(OSError):  # reported below
            folder.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(run_folder.locked(folder, stays, "choose another folder"))
        try:
            known = json.loads((folder / _KEY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = None
        if known != key:
            self._empty()
            atomic_files.write(folder / _KEY, lambda file: file.write(json.dumps(key).encode()), cure=cure, name=folder)

    def rows(self, name: str, n: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> "RowFile":
        """Open the array `name` of n rows, which other processes may open, too."""
        if name not in self._files:
            try:
                self._files[name] = RowFile(self.folder / f"{name}.npy", n, shape, np.dtype(dtype))
            except OSError as error:
                raise self._failed(name, error) from error
        return cast(RowFile, self._files[name])

    def write(self, name: str, rows: Sequence[int], values: Array, n: int) -> None:
        """Write rows, in ascending order, of an array of n rows."""
        try:
            self.rows(name, n, values.shape[1:], values.dtype).write(rows, values)
        except OSError as error:
            raise self._failed(name, error) from error

    def pieces(self, name: str, rank: int | None = None) -> "PieceFile":
        """Open the file of blocks of bytes that a process, by default this one, writes in order."""
        key = f"{name}-{self.rank if rank is None else rank}"
        if key not in self._files:
            try:
                self._files[key] = PieceFile(self.folder / f"{key}.pieces")
            except OSError as error:
                raise AezooError(f"cannot write {self.folder / key}.pieces: {error.strerror}; {self.cure}") from error
        return cast(PieceFile, self._files[key])

    def opened(self, name: str) -> "RowFile":
        """Open an array that was started by any process or before a kill."""
        if name not in self._files:
            known = np.load(self.folder / f"{name}.npy", mmap_mode="r")
            self.rows(name, len(known), known.shape[1:], known.dtype)
        return cast(RowFile, self._files[name])

    def progress(self, name: str = "", rank: int | None = None) -> dict[str, Array]:
        """Return the last saved state of a process, by default this one; empty at the beginning."""
        try:
            with np.load(self._record(name, self.rank if rank is None else rank)) as file:
                return dict(file)
        except (OSError, ValueError, zipfile.BadZipFile):
            return {}

    def save(self, state: Callable[[], Mapping[str, Any]], now: bool = False, name: str = "") -> None:
        """Record what this process has finished, if the last record is some seconds old or `now` is true."""
        if not now and time.monotonic() - self._saved < SECONDS:
            return
        for file in self._files.values():
            file.flush()
        arrays = {key: np.asarray(value) for key, value in state().items()}
        path = self._record(name, self.rank)
        atomic_files.write(path, lambda file: np.savez(file, **arrays), cure=self.cure)  # type: ignore[arg-type]
        self._saved = time.monotonic()

    def forget(self) -> None:
        """Make the next command start from the beginning."""
        (self.folder / _KEY).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the arrays and allow other processes to write to the folder."""
        self._close_files()
        self._lock.close()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def remove(self) -> None:
        """Remove the folder and its contents."""
        self._close_files()
        self._empty()
        self._lock.close()

    def _empty(self) -> None:
        for path in self.folder.glob("[!.]*"):
            path.unlink(missing_ok=True)

    def _record(self, name: str, rank: int) -> Path:
        return self.folder / f"progress{name and f'-{name}'}-{rank}.npz"

    def _failed(self, name: str, error: OSError) -> AezooError:
        return AezooError(f"cannot write {self.folder / name}.npy: {error.strerror or error}; {self.cure}")


class RowFile:
    """A .npy file of fixed size, whose rows are written by any process and in any order.

    Args:
        path: path of the file; opened if another process or an earlier run has created it.
        n: number of rows.
        shape: shape of a row.
        dtype: dtype of the values.
    """

    def __init__(self, path: Path, n: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.path, self.n, self.shape, self.dtype = path, n, shape, dtype
        self.row_bytes = dtype.itemsize * math.prod(shape)
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            # all processes write the same header
            write_header(self._file, (n, *shape), dtype)
            self._start = self._file.tell()
            reserve(self._file, self._start + n * self.row_bytes)
        except BaseException:
            self._file.close()
            raise

    def write(self, rows: Sequence[int], values: Array) -> None:
        """Write rows, with one write for each range of consecutive rows."""
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        starts = [0, *(i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), len(rows)]
        for i, j in itertools.pairwise(starts):
            self._file.seek(self._start + rows[i] * self.row_bytes)
            part = content[i * self.row_bytes : j * self.row_bytes]
            while part:
                part = part[self._file.write(part) :]

    def chunks(self) -> "Iterable[bytes]":
        """Yield the values, without the header, in chunks."""
        self._file.seek(self._start)
        while part := self._file.read(_CHUNK):
            yield part

    def flush(self) -> None:
        """Flush everything to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class PieceFile:
    """A file of blocks of bytes, each with some numbers.

    Args:
        path: path of the file; opened if another process or an earlier run has created it.

    Attributes:
        size: bytes of the recorded blocks; later bytes are overwritten.
    """

    _HEAD = struct.Struct("<QQ")

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")

    def append(self, content: bytes, figures: Sequence[float]) -> None:
        """Append a block.

        Raises:
            AezooError: the disk is full.
        """
        numbers = np.asarray(figures, "<f8").tobytes()
        try:
            self._file.seek(self.size)
            self._file.write(self._HEAD.pack(len(content), len(numbers)) + content + numbers)
            self._file.flush()
        except OSError as error:
            raise AezooError(f"cannot write {self.path}: {error.strerror or error}; free disk space") from error
        self.size += self._HEAD.size + len(content) + len(numbers)

    def read(self) -> Iterator[tuple[bytes, list[float]]]:
        """Yield all blocks with their numbers."""
        at = 0
        while at < self.size:
            self._file.seek(at)
            sizes = self._HEAD.unpack(self._file.read(self._HEAD.size))
            content, numbers = (self._file.read(size) for size in sizes)
            yield content, np.frombuffer(numbers, "<f8").tolist()
            at += self._HEAD.size + sum(sizes)

    def flush(self) -> None:
        """Flush everything to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Write the header of a .npy file."""
    header = {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
    np.lib.format.write_array_header_1_0(file, header)


def reserve(file: IO[bytes], size: int) -> None:
    """Allocate the space of a file, since a full disk would otherwise crash a process that has mapped the file.

    Raises:
        OSError: there is not enough space.
    """
    if os.fstat(file.fileno()).st_size < size:
        file.truncate(size)
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise


def write_npz(file: IO[bytes], members: Mapping[str, tuple[tuple[int, ...], np.dtype[Any], Iterable[bytes]]]) -> None:
    """Write a .npz file like `numpy.savez`, from the shape, dtype and chunks of values of each array."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, (shape, dtype, chunks) in members.items():
            # without a time stamp, so that equal contents give equal files
            entry = zipfile.ZipInfo(f"{name}.npy")
            with archive.open(entry, "w", force_zip64=True) as member:
                write_header(member, shape, dtype)
                for chunk in chunks:
                    member.write(chunk)
