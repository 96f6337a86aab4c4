"""Samples as input of a model, read one batch at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset, Subset

from aezoo.autoencoder import Autoencoder
from aezoo.data import DataModule, binarise
from aezoo.data.array import to_channels_first
from aezoo.data.classes import labels_of, original_labels, paths_of, subset
from aezoo.data.columns import Columns, column_names
from aezoo.data.in_memory import as_real_array, to_real_tensor
from aezoo.data.loaders import DecodingDataset, collate, default_num_workers, local_processes, make_loader
from aezoo.data.readers import check_columns
from aezoo.data.resident import load_into_memory
from aezoo.data.source import ArrayDataset, Stage, byte_divisor, to_float32
from aezoo.data.windows import Spans
from aezoo.errors import AezooError
from aezoo.io import partial
from aezoo.tasks.result_store import Samples, SeparateArrays
from aezoo.training.data_units import DataUnits
from aezoo.training.seeding import forked_rng

# samples by which two sets are distinguished
_COMPARED = 64
# samples whose values are checked before a task begins, and values that are then in memory at a time
_MAX_CHECKED, _MAX_VALUES = 1024, 2**24
# an array with larger values than this, which scaling would make smaller, is not scaled yet
_OUTSIDE = 10.0
# columns of tables of results
_OWN_NAMES = {"index", "file", "label", "mse", "mae", "score", "p_value", "is_anomaly", "largest_error"}
_OWN_NAMES |= {"rank", "neighbour", "distance", "start", "end"}


class SeparateSamples(DecodingDataset):
    """Pictures of several sizes, held in memory.

    Args:
        x: (C, H, W) each, uint8 or float32.
    """

    def __init__(self, x: Sequence[Tensor]) -> None:
        self.x, self.shapes = x, [tuple(picture.shape) for picture in x]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (self.x[index],)


@dataclass(frozen=True)
class Origin:
    """Where samples come from whose `dataset` holds the values of the data, in the data's units.

    Attributes:
        path: the file of arrays; None of a DataFrame.
        layout: how its axes were read, see `aezoo.data.array`.
        label_column: how its labels were found, see `DataModule`.
    """

    path: Path | None = None
    layout: str = "auto"
    label_column: str = "auto"


class SampleSet:
    """Samples in float32, scaled for a model, read on demand; of one shape, or pictures of several sizes.

    Args:
        dataset: gives (x,) or (x, y), x of uint8 or float32; with `__getitems__` it is read in batches.
        levels: divisor of bytes: 255, or 1 for data that keep their values.
        scaling: offset and factor of the training split, not yet applied to `dataset`.
        class_names: names of the labels 0, 1, ....
        name: their name in messages.
        num_workers: processes that decode files ahead; None for one per free core, up to 8.
        columns: those of a table; None for other samples.
        units: the units of the data that `dataset` was made of, if a model's may differ from them.
        spans: positions of samples in a time series; None for other samples.
        read_masks: returns the masks of defects in some files, see `aezoo.data.source.Source.pixel_masks`.
        origin: for samples whose values are those of a file or a DataFrame; None if they were scaled before.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        levels: int = 255,
        scaling: dict[str, Tensor] | None = None,
        class_names: tuple[str, ...] | None = None,
        name: str = "the data",
        num_workers: int | None = None,
        columns: Columns | None = None,
        units: DataUnits | None = None,
        spans: Spans | None = None,
        read_masks: Callable[[Sequence[str]], Tensor | None] | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.spans, self.read_masks = spans, read_masks
        self.dataset, self.class_names, self.name, self.num_workers = dataset, class_names, name, num_workers
        self.columns, self.units = columns, units
        self.levels, self.scaling = levels, scaling
        self.origin = origin
        self._y: Tensor | None = None
        self._mask: SampleSet | None = None

    @classmethod
    def from_data(
        cls,
        x: "SampleSet | DataModule | Tensor | np.ndarray[Any, Any] | Sequence[Any]",
        split: Stage = "test",
        allow_missing: bool = False,
    ) -> "SampleSet":
        """Samples from `SampleSet`, a DataModule, a tensor or an array.

        Args:
            x: samples; a DataModule, of which `split` is taken; a DataFrame, in the units of its columns; or a tensor
                or an array (N, *shape), scaled for the model: bytes are divided by 255, floats do not change. (N, H, W)
                bytes become images of one channel. A list of such pictures, (C, H, W) each, may have several sizes.
                uint8 and float32 in the computer's byte order are not copied.
            split: train, val or test.
            allow_missing: whether a tensor or an array may contain NaN for missing values.

        Raises:
            AezooError: not numbers, or no samples.
        """
        if isinstance(x, SampleSet):
            return x
        if isinstance(x, DataModule):
            name = f"{x.name} ({split})"
            named = x.source.class_names, name, x.num_workers, x.columns
            dataset, spans = x.dataset(split), x.source.spans.get(split)
            # --data.train_classes takes some out
            spans = spans if spans is not None and len(spans.first) == len(cast(Any, dataset)) else None
            return cls(dataset, byte_divisor(x.scale), None, *named, x.units, spans, x.source.pixel_masks)
        if isinstance(x, list | tuple) and len({tuple(np.shape(part)) for part in x}) > 1:
            pictures = [cls.from_data(part[None], allow_missing=allow_missing).rows([0])[0] for part in x]
            if any(picture.ndim < 2 or len(picture) != len(pictures[0]) for picture in pictures):
                raise AezooError("x has rows of unequal shape: only the sizes of pictures may differ")
            return cls(SeparateSamples(pictures), name="x", num_workers=0)
        if isinstance(x, LightningDataModule):
            raise AezooError(f"a {type(x).__name__} cannot be read: give an aezoo.DataModule, an array or a tensor")
        shape = tuple(as_real_array(x, "x").shape)
        if len(shape) < 2 or 0 in shape:
            raise AezooError(f"x has shape {shape}: give samples (N, *shape), one sample as x[None]")
        missing = "keep" if allow_missing else "raise"
        dataset = ArrayDataset(to_channels_first(to_real_tensor(x, "x", copy=False, missing=missing), "auto"))
        if not hasattr(x, "columns") or len(shape) != 2:
            return cls(dataset, name="x")
        names = column_names(x)
        units = DataUnits(columns=names, is_table=True)
        return cls(dataset, name="x", columns=Columns(names, {}, shape[1]), units=units, origin=Origin())

    def __len__(self) -> int:
        return len(cast(Any, self.dataset))

    def __repr__(self) -> str:
        return f"SampleSet({self.name}: {len(self):,} of {'x'.join(map(str, self.shape))})"

    @property
    def shapes(self) -> Sequence[tuple[int, ...]] | None:
        """The shape of each of several sizes of pictures; None of samples of one shape."""
        return getattr(self.dataset, "shapes", None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, the first."""
        dataset = self.dataset
        x = dataset.x[0] if isinstance(dataset, ArrayDataset) else dataset[0][0]
        return tuple(x.shape)

    @property
    def y(self) -> Tensor | None:
        """All labels, (N,) on the CPU; None without labels."""
        if self._y is None:
            self._y = labels_of(self.dataset)
        return self._y

    @property
    def labels(self) -> Tensor | None:
        """Labels (N,); None without labels or with several per sample."""
        y = self.y
        return None if y is None or y.ndim != 1 else y

    @property
    def pixel_masks(self) -> Tensor | None:
        """Which pixels belong to a defect, (N, H, W) bool; None if the data have no masks."""
        paths = paths_of(self.dataset)
        return None if paths is None or self.read_masks is None else self.read_masks(paths)

    @property
    def notes(self) -> dict[str, Sequence[Any]]:
        """Further columns for tables of samples: the file, the first and last step of a window, the label; or {}."""
        paths, y = paths_of(self.dataset), self.labels
        ends = {} if self.spans is None else self.spans.ends
        return (
            ({} if paths is None else {"file": paths})
            | ends
            | ({} if y is None else {"label": original_labels(y, self.class_names)})
        )

    @property
    def kind(self) -> str:
        """The kind of files that `decompress` writes for them: csv for a table, png for picture files, or npy."""
        pictures = len(self.shape) == 3 and self.shape[0] in (1, 3) and paths_of(self.dataset) is not None
        return "png" if pictures else "npy" if self.columns is None else "csv"

    @property
    def fields(self) -> dict[str, Sequence[Any]]:
        """`notes`, and before them the values of a table by column, in its units."""
        if self.columns is None:
            return self.notes
        values = self.columns.values(torch.cat([*self.batches(_MAX_CHECKED)])).T.tolist()
        # a column may have the name of one of ours
        names = [f"{name}_value" if name in _OWN_NAMES else name for name in self.columns.names]
        return dict(zip(names, values, strict=True)) | self.notes

    @property
    def identity(self) -> str:
        """A digest of the samples: of their files' names, sizes and times, or of some of their values."""
        n, paths = len(self), paths_of(self.dataset)
        scaling = {name: value.tolist() for name, value in (self.scaling or {}).items()}
        about: list[Any] = [n, self.shape, self.levels, scaling]
        if paths is None or not all(Path(path).exists() for path in paths):
            values = [self.rows([i]) for i in sorted({n * i // _COMPARED for i in range(_COMPARED)} if n else ())]
            return partial.digest(about, [float(part.double().nansum()) for part in values])
        stats = [Path(path).stat() for path in paths]
        return partial.digest(about, [*paths], [(found.st_size, found.st_mtime_ns) for found in stats])

    def rows(self, index: Tensor | list[int] | range) -> Tensor:
        """The samples with these indices, (n, *shape), on the CPU; the middle that all have, if their sizes differ."""
        index = torch.as_tensor(list(index) if isinstance(index, range) else index)
        if self.shapes is not None:
            dataset: Any = self.dataset
            return middles([self._as_float(dataset[i][0]) for i in index.tolist()])
        return self.from_raw(self.raw_rows(index), index)

    def raw_rows(self, index: Tensor) -> Tensor:
        """The samples of one shape with these indices as `dataset` holds them, before any scaling or mask."""
        dataset: Any = self.dataset
        if not hasattr(dataset, "__getitems__"):
            return torch.stack([dataset[i][0] for i in index.tolist()])
        items = dataset.__getitems__(index.tolist())
        x: Tensor = (items if isinstance(items, tuple) else collate(items, labels=False))[0]
        return x

    def from_raw(self, x: Tensor, index: Tensor) -> Tensor:
        """What `rows` gives for these indices, of what `raw_rows` gives for them."""
        x = self._as_float(x)
        if self._mask is None:
            return x
        mask = self._mask.rows(index if len(self._mask) > 1 else torch.zeros_like(index)) != 0
        return x.masked_fill((mask if mask.ndim == x.ndim else mask[:, None]).expand_as(x), math.nan)

    def raw_values(self, x: Tensor) -> Tensor:
        """Samples in the scale of the model as values of `dataset`, in float64; the inverse of what `rows` does."""
        if not self.scaling:
            return x.double() * (self.levels if self.raw_rows(torch.tensor([0])).dtype == torch.uint8 else 1)
        return x.double() * self.scaling["factor"].double() + self.scaling["offset"].double()

    def masked(self, mask: "SampleSet") -> "SampleSet":
        """The same samples with NaN where a mask is not 0.

        Args:
            mask: one for each sample or one for all, of the shape of a sample, or of one channel that holds for all.

        Raises:
            AezooError: it has another shape, or is that of another number of samples.
        """
        shape, n = self.shape, len(self)
        if mask.shapes is not None or mask.shape not in (shape, (1, *shape[1:]), shape[1:]) or len(mask) not in (1, n):
            raise AezooError(f"the mask {mask.name} has {len(mask):,} rows of shape {mask.shape}, but there are {n:,} "
                             f"samples of shape {shape}: give one mask for each sample or one for all, of their "
                             "shape")  # fmt: skip
        found = copy(self)
        found._mask = mask
        return found

    def _as_float(self, x: Tensor) -> Tensor:
        if self.scaling:
            # as `aezoo.data.in_memory.Scale` does with the training split's statistics
            return ((x.to(self.scaling["offset"].dtype) - self.scaling["offset"]) / self.scaling["factor"]).float()
        return to_float32(x, self.levels)

    def batches(self, size: int, title: str = "", start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """All samples in their order, or those from `start` to before `stop`, on the CPU.

        Args:
            size: samples at a time; of pictures of several sizes it is one.
            title: that of the progress bar; none is shown without it.
            start: the first sample.
            stop: the end, by default that of the samples.
        """
        size, stop = size if self.shapes is None else 1, len(self) if stop is None else stop
        with progress_bar(title, stop - start) as advance:
            for x in self._batches(size, start, stop):
                yield x
                advance(len(x))

    def _batches(self, size: int, start: int, stop: int) -> Iterator[Tensor]:
        if isinstance(self.dataset, ArrayDataset):
            yield from (self.rows(range(i, min(i + size, stop))) for i in range(start, stop, size))
        elif start < stop:  # files, which several processes decode ahead
            n_workers = default_num_workers(local_processes()) if self.num_workers is None else self.num_workers
            whole = (start, stop) == (0, len(self))
            part = self.dataset if whole else Subset(self.dataset, range(start, stop))
            loader = make_loader(part, batch_size=size, num_workers=n_workers, labels=False)
            for batch in loader:
                yield self.from_raw(batch[0], torch.arange(start, start + len(batch[0])))
                start += len(batch[0])

    def subsample(self, n: int, seed: int = 0) -> "SampleSet":
        """At most n samples, drawn without replacement, in their order."""
        if n >= len(self):
            return self
        index = random_rows(len(self), n, seed)
        y = self.y
        dataset = ArrayDataset(self.rows(index), None if y is None else y[index])
        return SampleSet(dataset, class_names=self.class_names, name=self.name, columns=self.columns, units=self.units)

    def subset(self, index: Tensor) -> "SampleSet":
        """The samples with these indices, read on demand."""
        dataset = subset(self.dataset, index)
        named = self.class_names, self.name, self.num_workers, self.columns, self.units
        spans = None if self.spans is None else self.spans[index.numpy()]
        return SampleSet(dataset, self.levels, self.scaling, *named, spans)

    def binarised(self, rule: str, seed: int) -> "SampleSet":
        """Binarised samples, in memory, by a rule of `--data.binarise`; random ones are drawn once.

        Raises:
            AezooError: values outside of [0, 1].
        """
        dataset = self.dataset if isinstance(self.dataset, ArrayDataset) else load_into_memory(self.dataset, self.name)
        x = self._as_float(dataset.x) if self.scaling else dataset.x
        binarise.check_probabilities(x, self.name, "give values in this range")
        binary = binarise.binarise_dataset(ArrayDataset(x, dataset.y, dataset.paths), rule, seed)
        return SampleSet(binary, self.levels, None, self.class_names, self.name, columns=self.columns, units=self.units)

    def check(self, model: Autoencoder, sized: Callable[[tuple[int, ...]], Autoencoder] | None = None) -> "SampleSet":
        """The same samples in the scale of the model's training data, if the model can use them.

        A table is scaled like the table that the model was trained on; an array is not scaled.

        Args:
            model: the model.
            sized: returns the model for samples of another shape; without it they must have the model's shape.

        Raises:
            AezooError: no samples, another shape or other columns, values outside the range of the model's likelihood,
                or an array in the units of the data instead of the model's scale.
        """
        return self.in_model_scale(model, sized).check_values(model, sized)

    def in_model_scale(
        self, model: Autoencoder, sized: Callable[[tuple[int, ...]], Autoencoder] | None = None
    ) -> "SampleSet":
        """What `check` returns, without checks of the values."""
        if not len(self):
            raise AezooError(f"{self.name} contains no samples")
        if model.training:
            model.eval()
        # before scaling, which is of the training data's shape
        if sized is not None:
            sized(self.shape)
        elif other := [shape for shape in self.shapes or [self.shape] if shape != model.input_shape]:
            model.check_batch(torch.zeros(1, *other[0]))
        if model.data_units is not None and self._table_units is not None:
            return self._in_units(model.data_units, self._table_units)
        return self

    @property
    def _table_units(self) -> DataUnits | None:
        return self.units if self.units is not None and self.units.is_table else None

    def _in_units(self, trained: DataUnits, own: DataUnits) -> "SampleSet":
        """Samples of a table that is not scaled, scaled like those that a model was trained on."""
        check_columns(self.name, own.columns, trained.columns)
        if not trained.is_table or own.has_scaling(trained.scaling):
            return self
        # first back to the units of the data
        (offset, factor), (own_offset, own_factor) = trained.offset_and_factor, own.offset_and_factor
        scaling = {"offset": (offset - own_offset) / own_factor, "factor": factor / own_factor}
        columns = Columns(trained.columns or own.columns, trained.scaling, self.shape[0])
        named = self.class_names, self.name, self.num_workers, columns
        return SampleSet(self.dataset, self.levels, scaling, *named, trained, origin=self.origin)

    def check_values(
        self,
        model: Autoencoder,
        sized: Callable[[tuple[int, ...]], Autoencoder] | None = None,
        fills_missing: bool = False,
    ) -> "SampleSet":
        """The same samples, if the model can use their values, except NaN with `fills_missing`."""
        n, step = min(len(self), _MAX_CHECKED), max(1, _MAX_VALUES // math.prod(self.shape))
        step = step if self.shapes is None else 1
        for start in range(0, n, step):
            x = self.rows(range(start, min(start + step, n)))
            if self.units is None and not start and not self.scaling:
                self._check_scale(x, model)
            x = x.masked_fill(x.isnan(), 0.5) if fills_missing else x  # which every likelihood takes
            (model if sized is None else sized(tuple(x.shape[1:]))).check_batch(x)
        return self

    def _check_scale(self, x: Tensor, model: Autoencoder) -> None:
        units = model.data_units
        if units is None or not units.scaling or x.shape[1:] != model.input_shape:
            return
        offset, factor = units.offset_and_factor
        given, scaled = (
            float(part.flatten(1).abs().nanmean(1).nanmedian()) for part in (x.double(), (x.double() - offset) / factor)
        )
        if given > _OUTSIDE * max(1.0, scaled):
            raise AezooError(
                f"{self.name} seems to be in the units of the data (absolute values of {given:.3g}): give a DataFrame, "
                "an aezoo.DataModule, or (x - offset) / factor of model.data_units.scaling"
            )


def middles(x: Sequence[Tensor]) -> Tensor:
    """The middle that samples of one or several sizes all have, (n, C, *size)."""
    sides = [min(sides) for sides in zip(*(sample.shape[1:] for sample in x), strict=True)]
    for axis, side in enumerate(sides, start=1):
        x = [sample.narrow(axis, (sample.shape[axis] - side) // 2, side) for sample in x]
    return torch.stack(list(x))


def rows_of(x: Samples, index: Tensor) -> Tensor:
    """The samples of a result with these indices, (n, *shape); the middle that all have, if their sizes differ."""
    if isinstance(x, SeparateArrays):
        return middles([torch.from_numpy(x[i]) for i in index.tolist()])
    return torch.from_numpy(np.asarray(x[index.numpy()]))


def random_rows(n: int, max_rows: int | None, seed: int) -> Tensor:
    """At most `max_rows` indices below n, drawn without replacement, in ascending order."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:max_rows].sort().values


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Any]:
    """A progress bar on a terminal, which calls of the yielded function advance. Silent without a title."""
    if not title:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.advance(task, n)


def reference_tensor(model: Autoencoder) -> Tensor:
    """An empty tensor on the model's device and of its dtype."""
    tensors = (value for value in chain(model.parameters(), model.buffers()) if value.is_floating_point())
    return next(tensors, torch.empty(0, device=model.device)).detach().new_empty(0)


@contextmanager
def evaluation_mode(model: Autoencoder, seed: int = 0) -> Iterator[Tensor]:
    """Evaluation mode, no gradients and a fixed seed inside; yields the model's `reference_tensor`.

    Restores modes and random states afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with forked_rng(model.device), torch.no_grad():
            torch.manual_seed(seed)
            yield reference_tensor(model)
    finally:
        for module, training in modes:
            module.training = training
