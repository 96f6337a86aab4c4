"""Splits in memory: a split is one tensor, in memory or on the GPU, and a batch is one indexing operation.

A split is loaded into memory if it takes at most a quarter of the free memory, which the processes of the machine
share. Data that are always in memory, such as arrays, are moved to the GPU by the same rule. Samples keep their dtype,
so bytes are only converted to floats in the training step.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from aezoo.data.classes import paths_of
from aezoo.data.loaders import Transform, collate, epoch_sampler, rank_batches, reads_whole_batches
from aezoo.data.source import ArrayDataset, Batch
from aezoo.errors import AezooError

MEMORY_SHARE = 0.25


class ResidentLoader:
    """Batches of one rank, gathered from tensors: the same as `make_loader` gives for the same arguments.

    Args:
        x: (N, *input_shape), all samples of the split.
        y: (N,) labels or None.
        batch_size: samples per batch and rank.
        shuffle: a new order each epoch, for training; else the order of the data set.
        seed: fixes the orders of all epochs.
        rank: this process.
        world: number of processes.
        drop_last: leave out an incomplete last batch.
        pin_memory: page-locked batches, which reach a GPU faster.
        blocks: (N,) see `sample_blocks`.
        by_batch: see `rank_batches`.

    Attributes:
        transform: transforms the batches of an epoch.
    """

    transform: Transform | None = None

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        pin_memory: bool = False,
        blocks: Tensor | None = None,
        by_batch: bool = False,
    ) -> None:
        self.x, self.y = x, y
        self.batch_size, chunk = rank_batches(len(x), world, batch_size, shuffle, by_batch)
        self.drop_last, self.pin_memory = drop_last, pin_memory
        # Lightning looks for a shuffling sampler in one, and sets the epoch of the other
        self.batch_sampler = None
        of_rank = {"seed": seed, "rank": rank, "world": world}
        self.sampler = epoch_sampler(len(x), shuffle=shuffle, blocks=blocks, chunk=chunk, **of_rank)

    def __len__(self) -> int:
        rows = len(self.sampler)
        return rows // self.batch_size if self.drop_last else math.ceil(rows / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        batches = self._batches()
        return batches if self.transform is None else self.transform(batches, self.sampler)

    def _batches(self) -> Iterator[Batch]:
        # a generator, so that the epoch is read at the first next(): Lightning sets it after iter()
        rows = self.sampler.rows().to(self.x.device)
        for chosen in rows.split(self.batch_size):
            # split returns one part even without rows
            if len(chosen) < (self.batch_size if self.drop_last else 1):
                return
            x = self.x.index_select(0, chosen)
            y = None if self.y is None else self.y.index_select(0, chosen)
            if self.pin_memory:
                x, y = x.pin_memory(), None if y is None else y.pin_memory()
            yield (x,) if y is None else (x, y)

    def state_dict(self) -> dict[str, Any]:
        """Empty, because the DataModule saves the position. Lightning warns of a loader without this method."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""


def free_memory(device: torch.device) -> int:
    """Free bytes on a GPU, or bytes that the machine has available without swapping; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (AttributeError, ValueError, OSError):
            return 0
    # a container may have less memory than its machine
    group = Path("/sys/fs/cgroup")
    for limit, used in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
        for folder in (group, group / "memory"):
            try:
                numbers = [int((folder / f"memory.{name}").read_text()) for name in (limit, used)]
            except (OSError, ValueError):
                continue
            free = min(free, numbers[0] - numbers[1] + _reclaimable_cache(folder))
    return max(0, free)


def _reclaimable_cache(group: Path) -> int:
    """Bytes of cached files that a container counts as used and frees on demand."""
    try:
        entries = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(entries["active_file"]) + int(entries["inactive_file"])
    except (OSError, ValueError, KeyError):
        return 0


def fits_in_memory(size: int, device: torch.device, processes: int) -> bool:
    """Whether `size` bytes for each process that shares the memory are within the limit."""
    return not memory_excess(size, device, processes)


def memory_excess(size: int, device: torch.device, processes: int) -> str:
    """The reason why they are not, as a short text; empty if they are."""
    free = free_memory(device)
    if size * processes <= MEMORY_SHARE * free:
        return ""
    times = f"{processes} times " if processes > 1 else ""
    where = "" if device.type == "cpu" else f" on {device}"
    return f"{times}{size / 2**20:,.1f} MiB, more than a quarter of {free / 2**20:,.1f} MiB free{where}"


def dataset_bytes(dataset: Dataset[Any]) -> int:
    """Bytes of all samples, estimated from the first."""
    if isinstance(dataset, ArrayDataset):
        return dataset.x.nbytes
    return len(cast(Any, dataset)) * int(cast(Tensor, dataset[0][0]).nbytes)


def to_device(dataset: ArrayDataset, device: torch.device, name: str) -> ArrayDataset:
    """The same samples in the memory of a GPU.

    Raises:
        AezooError: they do not fit.
    """
    try:
        return ArrayDataset(dataset.x.to(device), None if dataset.y is None else dataset.y.to(device))
    except torch.OutOfMemoryError as error:
        raise _too_large(name, len(dataset), dataset.x.nbytes, f"memory on {device}") from error


def lacks_memory(error: BaseException) -> bool:
    """Whether the memory of the host or of a GPU was not enough."""
    allocator = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return allocator or isinstance(error, MemoryError | torch.OutOfMemoryError)


def allocate(name: str, n: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for n decoded samples, (n, *shape), not filled yet; logs a line if filling it takes a while.

    Raises:
        AezooError: there is too little memory. The system grants memory before it is used, and kills a process that
            then uses too much without a message.
    """
    size = n * math.prod(shape) * dtype.itemsize
    if 0 < free_memory(torch.device("cpu")) < size:
        raise _too_large(name, n, size, "memory")
    if n > 2000:
        rank_zero_info(
            f"{name}: decoding {n} samples once, into {size / 2**20:,.0f} MiB of memory; "
            "--data.memory off reads them as they are used"
        )
    try:
        return torch.empty(n, *shape, dtype=dtype)
    except (MemoryError, RuntimeError) as error:
        raise _too_large(name, n, size, "memory") from error


def _too_large(name: str, n: int, size: int, where: str) -> AezooError:
    return AezooError(
        f"{name}: {n} samples take {size / 2**20:,.0f} MiB of {where}, which is more than is free: give "
        "--data.memory off or auto, or smaller samples with --data.size"
    )


def load_into_memory(dataset: Dataset[Any], name: str) -> ArrayDataset:
    """All samples of a data set, which are read one by one, in one tensor.

    Args:
        dataset: gives (x,) or (x, y) for an index.
        name: its name in messages.

    Raises:
        AezooError: there are none, or more than fit into memory.
    """
    n = len(cast(Any, dataset))
    if n == 0:
        raise AezooError(f"{name}: a split is empty")
    first = dataset[0]
    x = allocate(name, n, tuple(first[0].shape), first[0].dtype)
    y = torch.empty(n, dtype=torch.as_tensor(first[1]).dtype) if len(first) > 1 else None

    if reads_whole_batches(dataset):
        for rows in torch.arange(n).split(4096):
            batch: Any = collate(cast(Any, dataset).__getitems__(rows.tolist()), labels=y is not None)
            x[rows] = batch[0]
            if y is not None:
                y[rows] = batch[1]
        return ArrayDataset(x, y, paths_of(dataset))

    def fill(i: int) -> None:
        sample = dataset[i]
        x[i] = sample[0]
        if y is not None:
            y[i] = sample[1]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # list, so that an error of a thread is raised here
        list(pool.map(fill, range(n)))
    return ArrayDataset(x, y, paths_of(dataset))
