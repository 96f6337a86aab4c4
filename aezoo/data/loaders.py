"""Batches in an order that depends only on (seed, epoch): not on workers or earlier draws.

For samples that are not in memory; `aezoo.data.resident` gives the same batches for those that are.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler, Subset, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from aezoo.data.source import Batch
from aezoo.errors import AezooError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


# chunks of files that are shuffled together, and that a process has open at a time
SHUFFLE_GROUP = 16


class EpochSampler(DistributedSampler[Any]):
    """Row indices of one rank, `order[rank::world]`, with order = f(seed, epoch).

    With `chunk`, ranks take this many consecutive rows in turn instead of one, so that their batches are those that one
    process would read, for any number of ranks. With blocks, which are rows of the same file, rows are shuffled within
    groups of `SHUFFLE_GROUP` random blocks.

    Lightning replaces all samplers except a DistributedSampler, hence the base class. Shuffled (training): every rank
    gets len // world rows; up to world - 1 rows are left out, different ones in each epoch. Not shuffled: no row is
    left out or read twice, unless there are fewer rows than ranks; then each rank reads all of them, so that means
    over ranks are exact.

    Attributes:
        skip: (epoch, rows): the next pass of that epoch skips this many of its first rows, on which a resumed run has
            already trained.
        first: how many rows the current pass skipped at its beginning.
        current: (n,) the rows of the current pass, in order.
    """

    def __init__(
        self,
        n: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        blocks: Tensor | None = None,
        chunk: int = 1,
    ) -> None:
        sized = cast(Dataset[Any], range(n))
        super().__init__(sized, num_replicas=world, rank=rank, shuffle=shuffle, seed=seed, drop_last=shuffle)
        self.n, self.blocks, self.chunk = n, blocks, chunk
        self.skip, self.first = (-1, 0), 0
        self.current = torch.empty(0, dtype=torch.int64)
        if shuffle:
            self.num_samples = n // world
        else:
            self.num_samples = n if n < world else int(self._is_own(torch.arange(n)).sum())

    def rows(self) -> Tensor:
        """The row indices of the current epoch, without those to skip."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.n, generator=generator)
            if self.blocks is not None and self.n:
                group = torch.randperm(int(self.blocks.max()) + 1, generator=generator) // SHUFFLE_GROUP
                order = order[group[self.blocks[order]].argsort(stable=True)]
        else:
            order = torch.arange(self.n)
        everything = not self.shuffle and self.n < self.num_replicas
        mine = order if everything else order[self._is_own(torch.arange(self.n))]
        epoch, done = self.skip
        self.skip, self.first = (-1, 0), done if epoch == self.epoch else 0
        self.current = mine[self.first : self.num_samples]
        return self.current

    def _is_own(self, places: Tensor) -> Tensor:
        """Which positions of the order belong to this rank, (N,) bool."""
        return places // self.chunk % self.num_replicas == self.rank

    def __iter__(self) -> Iterator[int]:
        # a generator: the epoch is read at the first next(), since Lightning calls set_epoch after iter()
        for part in self.rows().split(2**16):  # a list of all would take 40 bytes per row
            yield from part.tolist()


class SequentialEpochSampler(EpochSampler, SequentialSampler):
    """The sampler without shuffling; Lightning only recognises this by the class SequentialSampler.

    With `overfit_batches`, Lightning replaces other loaders, with a sampler that does not distribute rows to ranks.
    """


def epoch_sampler(n: int, *, shuffle: bool, **rest: Any) -> EpochSampler:
    """The sampler of a split, shuffled or not; `rest` are the other arguments of `EpochSampler`."""
    return (EpochSampler if shuffle else SequentialEpochSampler)(n, shuffle=shuffle, **rest)


Transform = Callable[[Iterator[Batch], EpochSampler], Iterator[Batch]]


class Transforms:
    """Several transforms, one after the other.

    Args:
        parts: in their order.
    """

    def __init__(self, *parts: Transform) -> None:
        self.parts = parts

    def __call__(self, batches: Iterator[Batch], sampler: EpochSampler) -> Iterator[Batch]:
        for part in self.parts:
            batches = part(batches, sampler)
        return batches


class LazyLoader(DataLoader[Any]):
    """A DataLoader that starts at the first `next`: workers started at `iter` would run ahead with the old epoch.

    Attributes:
        transform: transforms the batches of an epoch, in this process.
    """

    transform: Transform | None = None

    def state_dict(self) -> dict[str, Any]:
        """Empty, because the DataModule saves the position. Lightning warns of a loader without this method."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""

    def __iter__(self) -> Any:
        def batches() -> Iterator[Any]:
            found = super(LazyLoader, self).__iter__()
            try:
                yield from found if self.transform is None else self.transform(found, cast(EpochSampler, self.sampler))
            except AezooError as error:
                # the message of a worker's error begins with the traceback of its process
                _, traced, reason = str(error).rpartition(f"{AezooError.__module__}.AezooError: ")
                if not traced:
                    raise
                raise AezooError(reason.rstrip()) from None

        return batches()


def local_processes(trainer: "Trainer | None" = None) -> int:
    """Processes of the run on this machine, which share its memory and cores."""
    # Lightning's launchers set no variable for it; under torchrun a task without a trainer has no other information
    launched = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return launched if trainer is None else max(launched, trainer.num_devices)


def available_cores() -> int:
    """Cores of the CPU that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_num_workers(processes: int) -> int:
    """Reading processes for each of these: one per remaining core, up to 8, at least one."""
    return min(8, max(1, available_cores() // processes - 1))


def worker_failure(error: BaseException) -> str | None:
    """The message if torch's error is about a worker process that has died or cannot start; otherwise None."""
    message = f"{error.__cause__}\n{error}"  # either of these errors may contain the signal
    died = r"DataLoader worker \(pid.*\) (is killed by signal: [\w ]*\w|exited unexpectedly)"
    found = re.search(rf"{died}|unable to allocate shared memory", message)
    return found and (
        f"a data worker {found[1] or 'has failed'}, usually because memory or /dev/shm is full: read without "
        "workers by --data.num_workers 0, or provide more memory, for example with docker run --shm-size 4g"
    )


def collate(samples: Batch | Sequence[Any], *, labels: bool) -> Batch:
    """A batch (x,) or (x, y) from a batch of the data set, or from a list of samples."""
    if isinstance(samples, tuple):
        x, y = samples[0], samples[1] if len(samples) > 1 else None
    else:
        pairs = [sample if isinstance(sample, tuple | list) else (sample,) for sample in samples]
        x = torch.stack([pair[0] for pair in pairs])
        y = torch.stack([torch.as_tensor(pair[1]) for pair in pairs]) if len(pairs[0]) > 1 else None
    batch = (x, cast(Tensor, y)) if labels and y is not None else (x,)
    if get_worker_info() is not None:
        # if /dev/shm has no space for a batch, the pinning thread loses it and all processes wait for it
        for part in batch:
            part.share_memory_()
    return batch


class DecodingDataset(Dataset[Any]):
    """Samples that are decoded one by one, when they are used; `__getitem__` gives (x,) or (x, label)."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch at once; torch's loader prefers this method to one call per sample."""
        return collate([self[i] for i in indices], labels=True)


def reads_whole_batches(dataset: Dataset[Any]) -> bool:
    """Whether reading a whole batch costs less than reading its samples one by one, so no worker is needed."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return hasattr(dataset, "__getitems__") and not isinstance(dataset, DecodingDataset)


def sample_blocks(dataset: Dataset[Any]) -> Tensor | None:
    """The block of each sample, such as a file of many samples, (N,); None without blocks."""
    if isinstance(dataset, Subset):
        blocks = sample_blocks(dataset.dataset)
        return None if blocks is None else blocks[torch.as_tensor(dataset.indices)]
    return getattr(dataset, "blocks", None)


def even_batch_size(n: int, world: int, batch_size: int) -> int:
    """The largest size up to `batch_size` (or the next larger one) that gives every rank the same number of batches.

    DistributedDataParallel hangs if one rank evaluates more batches than another. Shares of n // world and
    n // world + 1 rows differ in their number of batches only if the size divides the smaller one.
    """
    if n % world == 0 or n < world:
        return batch_size
    sizes = [*range(batch_size, 0, -1), *range(batch_size + 1, n + 2)]
    return next(size for size in sizes if (n // world) % size)


def rank_batches(n: int, world: int, batch_size: int, shuffle: bool, by_batch: bool) -> tuple[int, int]:
    """The batch size, and how many consecutive rows each rank gets at a time.

    Args:
        n: number of samples.
        world: number of processes.
        batch_size: the size asked for.
        shuffle: whether the order is random.
        by_batch: give whole batches to ranks in turn, at least one to each; ranks may then differ by a batch.
    """
    if by_batch:
        size = min(batch_size, max(1, n // world))
        return size, size
    return (batch_size if shuffle else even_batch_size(n, world, batch_size)), 1


def make_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    drop_last: bool = False,
    pin_memory: bool = False,
    labels: bool = True,
    blocks: Tensor | None = None,
    by_batch: bool = False,
) -> LazyLoader:
    """The loader of one split for one rank.

    Args:
        dataset: a sized, map-style data set; `__getitems__`, if it has that, reads whole batches.
        batch_size: samples per batch and rank.
        shuffle: a new order each epoch, for training; else the order of the data set.
        seed: fixes the orders of all epochs.
        rank: this process.
        world: number of processes.
        num_workers: processes that read ahead; they do not change the batches.
        drop_last: leave out an incomplete last batch.
        pin_memory: page-locked batches, which reach a GPU faster.
        labels: keep the labels in the batches.
        blocks: (N,) see `sample_blocks`.
        by_batch: see `rank_batches`.
    """
    n = len(cast(Any, dataset))
    size, chunk = rank_batches(n, world, batch_size, shuffle, by_batch)
    return LazyLoader(
        dataset,
        batch_size=size,
        sampler=epoch_sampler(n, shuffle=shuffle, seed=seed, rank=rank, world=world, blocks=blocks, chunk=chunk),
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        collate_fn=partial(collate, labels=labels),
        # a separate generator: an iteration must not advance the global one, which draws the model's noise
        generator=torch.Generator().manual_seed(seed),
    )
