"""Sources whose samples fit in memory: split, resize and scale, in that order."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.data.images import resize, resized_shape
from aezoo.data.readers import first_names, frame_values, text_columns
from aezoo.data.source import STAGES, ArrayDataset, Options, Source, Stage, split_missing
from aezoo.deprecated import renamed
from aezoo.errors import AezooError
from aezoo.training.keyword_groups import Argument

# values that are checked at a time
_CHUNK = 2**22


class MissingArgs(TypedDict, total=False):
    """Setting of sources of arrays in which values may be missing."""

    missing: Annotated[Literal["raise", "keep"], Argument(
        "raise", "keep reads NaN in arrays and tables as missing values, for models of samples that may lack whole "
        "parts, such as mvae; raise refuses it."
    )]  # fmt: skip


class LabelledArrays(NamedTuple):
    """Samples (N, *shape) and their labels."""

    x: Tensor
    y: Tensor | None = None


class InMemory(Source):
    """A source that loads everything at once.

    Args:
        options: the DataModule's arguments.
        shape: shape of one sample as `load` returns it.
        num_classes: number of classes, None without labels.

    Attributes:
        per_channel: whether each channel of samples (C, L) is scaled separately.
    """

    per_channel = False

    def __init__(self, options: Options, shape: tuple[int, ...], num_classes: int | None) -> None:
        self.options = options
        self.input_shape = resized_shape(shape, options.size, options.channels)
        self.num_classes = num_classes
        self.set_scale(options.scale)
        self.scaling: Scale | None = None
        # whether `load` returns values that are still in their file
        self.mapped = False
        self._splits: dict[Stage, LabelledArrays] | None = None

    def set_scale(self, rule: str) -> None:
        """Choose the rule `--data.scale` before the first `split`."""
        self.options.scale = rule
        self.value_range = (0.0, 1.0) if rule in ("auto", "unit") else None

    @abstractmethod
    def load(self) -> dict[Stage, LabelledArrays]:
        """The existing splits of the set, at least "train", from which missing ones are taken."""

    def split(self, stage: Stage) -> ArrayDataset | None:
        if self._splits is None:
            self._splits = self._build()
        return ArrayDataset(*self._splits[stage]) if stage in self._splits else None

    def _build(self) -> dict[Stage, LabelledArrays]:
        own, options = self.load(), self.options
        sizes: dict[Stage, int] = {stage: len(pair.x) for stage, pair in own.items()}
        rows = split_missing(sizes, own["train"].y, (options.val_fraction, options.test_fraction), options.seed)
        self.derived_splits = frozenset({stage for stage, index in rows.items() if index is not None})
        splits: dict[Stage, LabelledArrays] = {}
        for stage in STAGES:
            x, y = own[stage] if stage in own else own["train"]
            index = rows[stage]
            if index is not None and len(index) < len(x):
                x, y = x.index_select(0, index), None if y is None else y[index]
            elif self.mapped:
                x = x.clone()
            if len(x):
                splits[stage] = LabelledArrays(resize(x, options.size, options.channels) if x.ndim == 4 else x, y)
        if "train" not in splits:
            raise AezooError(f"{options.name}: the training split is empty: give at least one sample")
        own.clear()
        self.scaling = scale = Scale(splits["train"].x, options.scale, self.per_channel)
        self.white = scale.white
        for stage in list(splits):
            # one split at a time, so that its unscaled samples are freed
            splits[stage] = LabelledArrays(scale(splits[stage].x), splits[stage].y)
        return splits


class Scale:
    """The rule `--data.scale`, with the statistics of the training split.

    auto      uint8 is divided by 255 (on the device); floats within [0, 1] stay; anything else as `unit`
    unit      (x - min) / (max - min), which fills [0, 1]
    standard  (x - mean) / standard deviation
    none      unchanged values

    Minimum, maximum, mean and standard deviation are those of the values that are not missing, per feature for vectors
    (N, D), otherwise over all. A constant feature becomes 0. Values of val and test outside the training range are not
    clipped.

    Args:
        train: the training samples.
        rule: one of the four names.
        per_channel: samples (C, L) have statistics for each channel.

    Attributes:
        white: see `Source`; it is 1 for floats within [0, 1], as with auto.
    """

    def __init__(self, train: Tensor, rule: str, per_channel: bool = False) -> None:
        self.bytes = train.dtype == torch.uint8
        self.keep_bytes = rule == "auto" and self.bytes
        gaps = bool(train.isnan().any())
        known = train.nan_to_num(0.5) if gaps else train
        self.white = 255 if self.bytes else 1 if known.min() >= 0 and known.max() <= 1 else None
        self.offset: Tensor | None = None
        self.factor: Tensor | None = None
        if rule == "none" or self.keep_bytes:
            return
        # float64 stays float64: 1e9 + 1 and 1e9 + 2 are one number in float32
        x = train if train.dtype == torch.float64 else train.float()
        x = x.movedim(1, -1).flatten(0, -2) if per_channel else x if x.ndim == 2 else x.reshape(-1, 1)
        low = (x.nan_to_num(math.inf) if gaps else x).amin(0)
        high = (x.nan_to_num(-math.inf) if gaps else x).amax(0)
        if empty := (low > high).nonzero().flatten().tolist():
            raise AezooError(f"column {empty[0] + 1} has no value in the training split: leave it out")
        if rule == "auto" and low.min() >= 0 and high.max() <= 1:
            return
        if rule == "standard":
            deviation, mean = nan_std_mean(x.double()) if gaps else torch.std_mean(x.double(), 0, correction=0)
            self.offset, factor = mean.to(x.dtype), deviation.to(x.dtype)
        else:
            self.offset, factor = low, high - low
        self.factor = torch.where(high > low, factor, 1)
        if per_channel:
            self.offset, self.factor = self.offset[:, None], self.factor[:, None]

    def state(self) -> dict[str, Tensor]:
        """Tensors with which other samples are scaled in the same way; {} if nothing depends on the training split."""
        return {} if self.offset is None or self.factor is None else {"offset": self.offset, "factor": self.factor}

    def __call__(self, x: Tensor) -> Tensor:
        if self.bytes != (x.dtype == torch.uint8):
            raise AezooError("some splits are uint8 and some are not: give all of them one dtype")
        if self.keep_bytes:
            return x
        if self.offset is not None and self.factor is not None:
            x = (x.to(self.offset.dtype) - self.offset).div_(self.factor)
        return x.float()


def nan_std_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Deviation and mean of each column without its NaN, (N, D) -> (D,), (D,)."""
    mean = x.nanmean(0)
    return (x - mean).square().nanmean(0).sqrt(), mean


def as_real_array(values: object, what: str) -> Tensor | npt.NDArray[Any]:
    """The values unchanged, a tensor or an array, or the reason why they are not real numbers."""
    if isinstance(values, Tensor):
        if values.is_complex():
            raise AezooError(f"{what} contains complex numbers: give the real and imaginary part as two channels")
        if values.layout != torch.strided or values.is_quantized:
            raise AezooError(f"{what} is a sparse or quantised tensor: give a dense one (x.to_dense(), x.dequantize())")
        return values
    try:
        array = frame_values(values) if hasattr(values, "columns") else np.asarray(values)
    except ValueError:
        raise AezooError(f"{what} has rows of unequal shape: give an array of one shape") from None
    if array.dtype.kind not in "biuf":
        kinds = {"O": "Python objects", "c": "complex numbers", "U": "text", "S": "text"}
        kind = kinds.get(array.dtype.kind, f"dtype {array.dtype}")
        if texts := text_columns(values):
            raise AezooError(f"{what}: the columns {first_names(texts)} contain no numbers: encode or drop them")
        raise AezooError(f"{what} contains {kind}: give an array of real numbers, uint8 or float")
    return array


def to_real_tensor(
    values: object, what: str, columns: Sequence[str] = (), copy: bool = True, missing: str = "raise"
) -> Tensor:
    """Real, finite numbers as a CPU tensor of dtype uint8, float32 or float64, or the reason why not.

    Args:
        values: samples (N, ...).
        what: their name in messages.
        columns: the column names of a table.
        copy: always copy floats, because the caller may change them later.
        missing: raise refuses NaN; keep accepts it as a missing value, but no row may have only missing values.

    Raises:
        AezooError: they are not real, finite numbers.
    """
    tensor = as_tensor(as_real_array(values, what), copy)
    if tensor.dtype != torch.uint8:
        # in parts, since the checks allocate memory
        check_values(tensor.split(chunk_rows(tensor.shape[1:])), what, columns, missing)
    return tensor


def as_tensor(values: Tensor | npt.NDArray[Any], copy: bool = True) -> Tensor:
    """Real numbers as a CPU tensor of dtype uint8, float32 or float64; `copy` as for `to_real_tensor`."""
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
    else:
        if values.dtype != np.uint8:
            # in the machine's byte order; torch lacks many of NumPy's dtypes
            wide = _float_dtype(values.dtype.itemsize, values.dtype.kind == "f", np.float64, np.float32)
            values = values.astype(wide, copy=copy)
        values = np.ascontiguousarray(values)
        if copy and not values.flags.writeable:
            values = values.copy()
        with warnings.catch_warnings():
            # samples are only read
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            tensor = torch.from_numpy(values)
    if tensor.dtype == torch.uint8:
        return tensor
    return tensor.to(_float_dtype(tensor.element_size(), tensor.is_floating_point(), torch.float64, torch.float32))


def chunk_rows(shape: Sequence[int]) -> int:
    """How many samples of this shape are checked at a time."""
    return max(1, _CHUNK // max(1, math.prod(shape)))


def check_values(
    parts: Iterable[Tensor], what: str, columns: Sequence[str] = (), missing: str = "raise"
) -> tuple[float, float]:
    """The smallest and the largest value; infinity is refused, and NaN depending on `missing`.

    Args:
        parts: samples in their order, (n, *shape) each.
        what: their name in messages.
        columns: the column names of a table.
        missing: as for `to_real_tensor`.

    Raises:
        AezooError: some values are not allowed.
    """
    kept, n, low, high = missing == "keep", 0, math.inf, -math.inf
    n_bad, first_bad, first_empty, has_nan = 0, -1, -1, False
    wrong_columns: set[int] = set()
    for part in parts:
        if part.numel():
            least, largest = map(float, part.aminmax())
            if not (math.isfinite(least) and math.isfinite(largest)):
                rows = part.reshape(len(part), -1)
                wrong, nan = rows.isinf() if kept else ~rows.isfinite(), rows.isnan()
                if first_empty < 0 and (empty := nan.all(1)).any():
                    first_empty = n + int(empty.nonzero()[0])
                if wrong.any():
                    first_bad = n + int(wrong.any(1).nonzero()[0]) if not n_bad else first_bad
                    n_bad += int(wrong.any(1).sum())
                    wrong_columns |= set(wrong.any(0).nonzero().flatten().tolist() if columns else ())
                has_nan = has_nan or bool(nan.any())
                known = rows[rows.isfinite()]
                least, largest = map(float, known.aminmax()) if len(known) else (low, high)
            low, high = min(low, least), max(high, largest)
        n += len(part)
    if kept and first_empty >= 0:
        raise AezooError(f"{what} has no value at all in row {first_empty}: remove such rows")
    if n_bad:
        # for a table, the message names columns
        place = f", in {first_names([columns[i] for i in sorted(wrong_columns)])}" if columns else ""
        cure = "fill or remove them"
        if not kept and has_nan:
            cure += (
                ", or give --data.missing keep to a model of samples that lack whole parts, such as mvae; aezoo impute "
                "fills them with a trained model"
            )
        raise AezooError(
            f"{what} has {'infinity' if kept else 'NaN or infinity'} in {n_bad} of {n} rows, the first is row "
            f"{first_bad}{place}: {cure}"
        )
    return low, high


def _float_dtype(size: int, is_float: bool, wide: Any, narrow: Any) -> Any:
    """float32 if this is exact: for floats of up to 4 bytes and integers of up to 2; otherwise float64."""
    return narrow if size <= (4 if is_float else 2) else wide


__getattr__ = renamed(__name__)
