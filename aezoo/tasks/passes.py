"""Passes of a model over samples: by one process or several, resumed after a kill, in the memory of a batch.

A command processes samples in blocks of one batch each. On the command line the blocks are distributed over the
processes of `--devices`, each of which takes consecutive blocks and runs the same command, and arrays are files that
all of them write. Finished blocks are recorded every few seconds (`aezoo.io.partial`), so that the same command
continues after a kill. Random numbers in a block depend only on the seed and the block. So results do not depend on the
number of processes or on a kill, bit for bit if numbers of threads are equal; only totals are summed in another order.

In Python there is one process, and nothing is recorded.
"""

import contextlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.io.partial import Partial, PieceFile
from aezoo.training.seeding import mix

if TYPE_CHECKING:
    from aezoo.tasks.samples import SampleSet

CURE = "free disk space, or choose a writable folder with --out"
# seconds between two checks of the other processes, and for them to end by themselves
_WAIT, _GRACE = 0.1, 30.0


class Total(Protocol):
    """What a pass adds up over samples."""

    @property
    def state(self) -> npt.NDArray[Any]:
        """What has been added up by this process."""
        ...

    def merge(self, states: Sequence[npt.NDArray[Any]]) -> None:
        """Take over what all processes have added up, each in turn."""
        ...


class Range:
    """The smallest and the largest of all values; infinite without values.

    Attributes:
        low, high: both.
    """

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def add(self, x: Tensor) -> None:
        """Add values, of which none is NaN."""
        if x.numel():
            low, high = x.float().aminmax()
            self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    @property
    def state(self) -> npt.NDArray[Any]:
        return np.array([self.low, self.high])

    def merge(self, states: Sequence[npt.NDArray[Any]]) -> None:
        self.low, self.high = min(float(state[0]) for state in states), max(float(state[1]) for state in states)


class _Size:
    """The bytes of a file of pieces, which count from the beginning and after a kill up to what was recorded.

    Attributes:
        of_ranks: that of each process.
    """

    def __init__(self, file: PieceFile) -> None:
        self._file, self.of_ranks = file, [0]

    @property
    def state(self) -> npt.NDArray[Any]:
        return np.array([self._file.size])

    def merge(self, states: Sequence[npt.NDArray[Any]]) -> None:
        self.of_ranks = [int(state[0]) for state in states]
        if len(states) == 1:  # what this process had recorded
            self._file.size = self.of_ranks[0]


class Passes:
    """The passes of one call of a command.

    Args:
        parts: where arrays and records are; None for neither.
        argv: the command, which the other processes run.
        rank: this process.
        world: number of processes.
    """

    def __init__(self, parts: Partial | None = None, argv: Sequence[str] = (), rank: int = 0, world: int = 1) -> None:
        self.parts, self.rank, self.world = parts, rank, world
        self._argv, self._n_passes, self._n_arrays = argv, 0, 0
        self._others: list[tuple[subprocess.Popen[bytes], Path]] = []
        self._ends, self._launcher = contextlib.ExitStack(), os.getppid()

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike, name: str = "scratch") -> npt.NDArray[Any]:
        """A file that all processes write, mapped into memory; for calls with parts, and at least one value."""
        assert self.parts is not None
        self._n_arrays += 1
        file = self.parts.rows(f"{self._n_arrays}-{name}", shape[0], shape[1:], dtype)
        return np.lib.format.open_memmap(file.path, "r+")

    def blocks(
        self, samples: "SampleSet | int", batch_size: int, seed: int, title: str = "", totals: Sequence[Total] = ()
    ) -> Iterator[tuple[int, Any]]:
        """The blocks that this process has to compute; the iteration ends when all processes have done theirs.

        Args:
            samples: the samples, or their number.
            batch_size: samples in a block; one for pictures of several sizes.
            seed: of random numbers in the blocks.
            title: title of a progress bar; without it, none is shown.
            totals: values that the caller adds up; at the end they are the sums over all processes.

        Yields:
            The index of the first sample, and the samples, (B, *shape), on the CPU, or how many they are.
        """
        self._n_passes += 1
        name = f"pass{self._n_passes}"
        n = samples if isinstance(samples, int) else len(samples)
        size = batch_size if isinstance(samples, int) or samples.shapes is None else 1
        n_blocks = math.ceil(n / size)
        ends = [n_blocks * (rank + 1) // self.world for rank in range(self.world)]
        done, last = n_blocks * self.rank // self.world, ends[self.rank]
        if self.world > 1 and not self.rank and not self._others:
            self._start_others()
        if self.parts is not None and (state := self.parts.progress(name)):
            done = int(state["blocks"])
            for i, total in enumerate(totals):
                total.merge([state[f"total{i}"]])

        def record() -> Mapping[str, Any]:
            return {"blocks": done} | {f"total{i}": total.state for i, total in enumerate(totals)}

        start, stop = done * size, min(last * size, n)
        batches: Iterator[Any]
        if isinstance(samples, int):
            batches = (min(size, stop - i) for i in range(start, stop, size))
        else:
            batches = samples.batches(size, "" if self.rank else title, start, stop)
        self._seed(seed, done)
        for batch in batches:
            yield done * size, batch
            done += 1
            if self.parts is not None:
                self.parts.save(record, name=name)
            self._seed(seed, done)
        if self.parts is not None:
            self.parts.save(record, name=name, now=True)
            for i, states in enumerate(zip(*self._records(name, ends, len(totals)), strict=True)):
                totals[i].merge(states)
        self._seed(seed, n_blocks)

    def pieces(
        self,
        samples: "SampleSet | int",
        batch_size: int,
        seed: int,
        make: Callable[[int, Any], tuple[bytes, Sequence[float]]],
        title: str = "",
    ) -> Iterator[tuple[bytes, Sequence[float]]]:
        """What `make` returns for each block, bytes and some numbers, in the order of the blocks; only on rank zero.

        Without parts, a block is computed when its piece is needed; otherwise all are computed before this returns.
        """
        if self.parts is None:
            return (make(start, batch) for start, batch in self.blocks(samples, batch_size, seed, title))
        name = f"pieces{self._n_passes + 1}"
        written = self.parts.pieces(name)
        size = _Size(written)
        for start, batch in self.blocks(samples, batch_size, seed, title, (size,)):
            written.append(*make(start, batch))
        return iter(()) if self.rank else self._read_pieces(name, size.of_ranks)

    def _read_pieces(self, name: str, sizes: Sequence[int]) -> Iterator[tuple[bytes, Sequence[float]]]:
        assert self.parts is not None
        for rank, size in enumerate(sizes):
            of_rank = self.parts.pieces(name, rank)
            of_rank.size = size
            yield from of_rank.read()

    def _seed(self, seed: int, block: int) -> None:
        torch.manual_seed(mix(seed, self._n_passes, block) if block else seed)

    @property
    def has_begun(self) -> bool:
        """Whether something has been recorded for a later call."""
        return self.parts is not None and any(self.parts.folder.glob("progress-*"))

    def discard(self) -> None:
        """Remove recorded results that are no longer needed."""
        if self.parts is not None and not self.rank:
            self.parts.remove()

    def finish(self) -> None:
        """Declare that no pass follows: the other processes end here, and rank zero writes the results."""
        if self.rank:
            raise SystemExit(0)
        # they may not have read the last records yet, which are removed with the folder
        self._wait_for_others()

    def close(self) -> None:
        """End the other processes."""
        self._wait_for_others(0.0 if sys.exception() else _GRACE)
        for other, _ in self._others:
            other.kill()
            other.wait()
        self._others.clear()
        self._ends.close()
        if self.parts is not None:
            self.parts.close()

    def _wait_for_others(self, seconds: float = _GRACE) -> None:
        limit = time.monotonic() + seconds
        for other, _ in self._others:
            with contextlib.suppress(subprocess.TimeoutExpired):
                other.wait(max(0.0, limit - time.monotonic()))

    def _records(self, name: str, ends: Sequence[int], n_totals: int) -> list[list[npt.NDArray[Any]]]:
        """What each process has added up; waits until all have done their blocks."""
        assert self.parts is not None
        found = []
        for rank, end in enumerate(ends):
            while int((state := self.parts.progress(name, rank)).get("blocks", -1)) < end:
                self._check_others()
                time.sleep(_WAIT)
            found.append([state[f"total{i}"] for i in range(n_totals)])
        return found

    def _start_others(self) -> None:
        folder = self._ends.enter_context(tempfile.TemporaryDirectory())
        for rank in range(1, self.world):
            log = Path(folder, f"{rank}.log")
            of_rank = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(self.world)}
            command = [sys.executable, "-m", "aezoo", *self._argv]
            with log.open("wb") as file:
                other = subprocess.Popen(command, env=os.environ | of_rank, stdout=subprocess.DEVNULL, stderr=file)
            self._others.append((other, log))

    def _check_others(self) -> None:
        """Report a process that has ended before its work was done.

        Raises:
            AezooError: with its last message.
            SystemExit: the process that started this one has ended.
        """
        if self.rank and os.getppid() != self._launcher:
            raise SystemExit(1)
        for rank, (other, log) in enumerate(self._others, start=1):
            if (code := other.poll()) is not None:
                said = log.read_text(errors="replace").strip().splitlines()
                reason = said[-1].removeprefix("aezoo: ")[:300] if said else f"it ended with code {code}"
                raise AezooError(f"process {rank} of --devices {self.world}: {reason}")


current: ContextVar[Passes] = ContextVar("passes", default=Passes())  # noqa: B039
