"""The interface of data sources, and how a set without splits is split.

A factory takes `Options` and returns a `Source`, whose constructor is cheap and needs no network; `split` reads the
data. It declares its settings by `accepts`. A plug-in registers its factory as an entry point of the group
`aezoo.data`; without `accepts` it accepts all settings of the built-in sources.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from aezoo.deprecated import renamed
from aezoo.errors import AezooError
from aezoo.training.keyword_groups import arguments_of

if TYPE_CHECKING:
    from aezoo.data.windows import Spans

Stage = Literal["train", "val", "test"]
Batch = tuple[Tensor] | tuple[Tensor, Tensor]
STAGES: tuple[Stage, ...] = ("train", "val", "test")
DEFAULT_ROOT = "data"


Factory = TypeVar("Factory", bound=Callable[..., Any])
# all settings that `accepts` has declared
DEFAULTS: dict[str, Any] = {}


def accepts(*groups: type, nested_source: str = "") -> Callable[[Factory], Factory]:
    """Declare the settings of a source: `@accepts(ImageArgs)` above its class or factory.

    Args:
        *groups: TypedDicts, see `aezoo.training.keyword_groups`.
        nested_source: the setting that names another source, whose settings this one accepts as well.
    """
    defaults = {name: argument.default for group in groups for name, argument in arguments_of(group).items()}
    DEFAULTS.update(defaults)

    def mark(factory: Factory) -> Factory:
        factory.settings, factory.nested_source = frozenset(defaults), nested_source  # type: ignore[attr-defined]
        return factory

    return mark


class Options:
    """The DataModule's settings as a source gets them.

    Attributes:
        name: name of the source.
        settings: those of this source; each is also an attribute, which has its default if it is not given.
    """

    def __init__(
        self,
        name: str,
        root: str = DEFAULT_ROOT,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        scale: str = "auto",
        memory: str = "auto",
        download: bool = True,
        allow_remote: bool = False,
        **settings: Any,
    ) -> None:
        self.name, self.root, self.seed, self.download = name, root, seed, download
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.scale, self.memory, self.allow_remote = scale, memory, allow_remote
        self.settings = settings

    def __getattr__(self, name: str) -> Any:
        # __dict__, since a copy is made without its attributes
        own = self.__dict__.get("settings", {})
        if name in own or name in DEFAULTS:
            return own.get(name, DEFAULTS.get(name))
        raise AttributeError(f"data sources have no setting {name!r}")

    def for_source(self, name: str, root: str) -> "Options":
        """The same settings for another source."""
        shared = {key: value for key, value in vars(self).items() if key not in ("name", "root", "settings")}
        return Options(name, root, **shared, **self.settings)


class Source(ABC):
    """A set of samples in three splits.

    Attributes:
        input_shape: shape of one sample, set by the constructor.
        num_classes: number of classes, None without labels; set by the constructor.
        class_names: names of the labels 0, 1, ..., if known.
        columns: column names of a table; () without names.
        is_table: whether samples are the rows of a table, vectors of its columns.
        value_range: the range of the training values, None if it has no bounds.
        white: value of white in its pictures before scaling: 255 for bytes, 1 for floats from 0 to 1; None if unknown.
            Set by the first `split`.
        derived_splits: the splits that were taken from the training samples because the set does not have them, and the
            remaining training split. Set by the first `split` of arrays and folders.
        spans: where the samples of a split lie in a time series, see `aezoo.data.windows`; {} for other samples.
        processes: how many processes of this machine read the set, each into separate memory; the DataModule sets it.
        reads_once: whether each sample is used only once, so that decoded files need not be kept in memory; the
            DataModule sets it.
    """

    input_shape: tuple[int, ...]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    columns: tuple[str, ...] = ()
    is_table: bool = False
    value_range: tuple[float, float] | None = (0.0, 1.0)
    white: int | None = None
    derived_splits: frozenset[Stage] = frozenset()
    spans: "Mapping[Stage, Spans]" = MappingProxyType({})
    processes: int = 1
    reads_once: bool = False

    def prepare(self) -> None:
        """Download missing files; called by one process per machine."""
        return

    def is_unbounded(self) -> bool:
        """Whether values are outside the range from 0 to 1 before any scaling; bytes are divided by white first."""
        return self.value_range is None

    def pixel_masks(self, paths: Sequence[str]) -> Tensor | None:
        """Which pixels of some files belong to a defect, (N, H, W) bool; None if the set has no masks."""
        return None

    @abstractmethod
    def split(self, stage: Stage) -> Dataset[Any] | None:
        """The samples of a split, (x,) or (x, y) each, x uint8 (of 255) or float32; None without this split."""


class ArrayDataset(Dataset[Batch]):
    """Samples in one tensor, read in batches.

    Args:
        x: (N, *input_shape), uint8 or float32.
        y: (N,) labels.
        paths: (N,) the file of each sample; None unless each sample has a separate file.
    """

    def __init__(self, x: Tensor, y: Tensor | None = None, paths: Sequence[str] | None = None) -> None:
        self.x, self.y, self.paths = x, y, paths

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Batch:
        return (self.x[index],) if self.y is None else (self.x[index], self.y[index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch in one gather; torch's loader prefers this method to one call per sample."""
        rows = torch.as_tensor(indices)
        # index_select copies whole rows, x[rows] single values
        x = self.x.index_select(0, rows)
        return (x,) if self.y is None else (x, self.y.index_select(0, rows))


def byte_divisor(scale: str) -> int:
    """The divisor of bytes for a rule of `--data.scale`: 255, or 1 if they are not scaled."""
    return 1 if scale == "none" else 255


def to_float32(x: Tensor, levels: int) -> Tensor:
    """Samples as input of a model, in float32: bytes divided by `levels`, others unchanged."""
    return x.float().div_(levels) if x.dtype == torch.uint8 else x.float()


def split_rows(n: int, labels: Tensor | None, fractions: tuple[float, float], seed: int) -> dict[Stage, Tensor]:
    """Row indices of train, val and test: disjoint, together all of `range(n)`, fixed by the seed.

    With class labels the split is stratified: the rows are shuffled, sorted by class, and taken at equal distances.
    """
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if labels is not None and not labels.is_floating_point() and labels.ndim == 1:
        rows = rows[labels[rows].argsort(stable=True)]
    n_val, n_test = (max(1, round(n * f)) if f else 0 for f in fractions)
    if n_val + n_test >= n:
        raise AezooError(
            f"{n} samples are too few for {n_val} of validation and {n_test} of test: give more data, "
            "or switch a split off with --data.val_fraction 0 or --data.test_fraction 0"
        )
    rows, test = _take_evenly(rows, n_test)
    rows, val = _take_evenly(rows, n_val)
    return {"train": rows.sort().values, "val": val.sort().values, "test": test.sort().values}


def _take_evenly(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    selected = torch.zeros(len(rows), dtype=torch.bool)
    if k:
        selected[((torch.arange(k, dtype=torch.float64) + 0.5) * len(rows) / k).long()] = True
    return rows[~selected], rows[selected]


def split_missing(
    sizes: dict[Stage, int], labels: Tensor | None, fractions: tuple[float, float], seed: int
) -> dict[Stage, Tensor | None]:
    """Rows of the training part that become val and test if the set does not have these (not in `sizes`).

    Returns rows of the training part for each split taken from it, and None for a split of the set itself.
    """
    missing = tuple(0.0 if stage in sizes else f for stage, f in zip(("val", "test"), fractions, strict=True))
    rows = split_rows(sizes["train"], labels, (missing[0], missing[1]), seed)
    return {stage: None if stage != "train" and stage in sizes else rows[stage] for stage in STAGES}


__getattr__ = renamed(__name__)
