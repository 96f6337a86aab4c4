"""Samples of a .npy file of any size, read in batches."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Dataset

from aezoo.data.array import to_channels_first
from aezoo.data.images import resize
from aezoo.data.in_memory import as_tensor, chunk_rows
from aezoo.data.source import Batch
from aezoo.errors import AezooError


class NpyDataset(Dataset[Batch]):
    """Samples of a .npy file; only those that are requested are in memory.

    They are read from the file, not from a map of it: mapped pages count as memory of the process, and a file that
    becomes shorter while it is mapped ends the process without a message.

    Args:
        array: a map of the file, (N, ...) in C order.
        layout: see `aezoo.data.array`.
        size: see `aezoo.data.images.resize`, for images.
        channels: as size.
    """

    def __init__(
        self, array: "np.memmap[Any, Any]", layout: str = "auto", size: int | None = None, channels: int | None = None
    ) -> None:
        self.path, self._start = Path(str(array.filename)), array.offset
        self._length, self._shape, self._dtype = len(array), array.shape[1:], array.dtype
        self._row_bytes = array.nbytes // len(array)
        self._layout, self._size, self._channels = layout, size, channels
        self._identity = _identity(self.path.stat())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        return (self.__getitems__([index])[0][0],)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        x = to_channels_first(as_tensor(self._read(indices), copy=False), self._layout)
        return (resize(x, self._size, self._channels) if x.ndim == 4 else x,)

    def values(self) -> Iterator[Tensor]:
        """All values as they are in the file, in parts (n, *shape)."""
        n = chunk_rows(self._shape)
        for start in range(0, len(self), n):
            yield as_tensor(self._read(range(start, min(start + n, len(self)))), copy=False)

    def _read(self, indices: Sequence[int]) -> npt.NDArray[Any]:
        rows = np.asarray(indices, np.int64)
        content = np.empty((len(rows), self._row_bytes), np.uint8)
        # rows that follow one another are read together
        starts = [*np.flatnonzero(np.diff(rows, prepend=-2) != 1).tolist(), len(rows)]
        try:
            with self.path.open("rb") as file:
                whole = _identity(os.fstat(file.fileno())) == self._identity
                for start, stop in itertools.pairwise(starts):
                    file.seek(self._start + int(rows[start]) * self._row_bytes)
                    part = content[start:stop]
                    whole = whole and file.readinto(part.data) == part.nbytes
        except OSError as error:
            raise AezooError(f"cannot read {self.path}: {error.strerror or error}") from error
        if not whole:
            raise AezooError(f"{self.path} was changed while it was read: run the command again")
        return content.view(self._dtype).reshape(len(rows), *self._shape)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
