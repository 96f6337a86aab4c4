"""Windows of time series: samples of several steps, which a series (T, C) of T steps and C channels is cut into.

    x_i = series[i S : i S + L].T      (C, L), L = --data.window_length, S = --data.window_step

A series is split in time before it is cut, the first steps for training, then those for validation, then those for
test, so that no two splits share a step. The label of a window is the largest one of its steps: 1 if any is an anomaly.

Shapes: T steps, C channels, N windows of L steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.data.source import STAGES, Stage
from aezoo.errors import AezooError
from aezoo.training.keyword_groups import Argument

# names of columns of time stamps, in any case
TIME_COLUMNS = ("timestamp", "time", "datetime", "date", "ds")
# float64
_WIDTH = 8


class WindowArgs(TypedDict, total=False):
    """Settings of sources of arrays that may be time series."""

    window_length: Annotated[int, Argument(
        0, "Read an array or a table as one time series with one step per row. Samples are windows of this many "
        "steps, (columns, steps); 0: each row is a sample. The last steps are for validation and test.", 0, 2**24
    )]  # fmt: skip
    window_step: Annotated[int, Argument(1, "Steps from the beginning of one window to that of the next.", 1, 2**31)]


@dataclass(frozen=True)
class Spans:
    """Where windows lie in their series.

    Attributes:
        first: (N,) the first step of each, counted in the series.
        length: L.
        times: (T,) the time stamp of each step of the series; () without.
    """

    first: npt.NDArray[np.int64]
    length: int
    times: Sequence[str] = ()

    def __getitem__(self, index: Any) -> "Spans":
        return Spans(self.first[index], self.length, self.times)

    @property
    def ends(self) -> dict[str, Sequence[Any]]:
        """The first and the last step of each window by their time stamps, or by their numbers without these."""
        steps = {"start": self.first, "end": self.first + self.length - 1}
        return {name: [self.times[i] for i in steps[name]] if self.times else steps[name].tolist() for name in steps}

    def step_scores(self, scores: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The steps in any window, and for each the mean score of the windows that contain it: (N,) -> (T',), (T',)."""
        sums, counts = np.zeros((2, int(self.first.max()) + self.length))
        for k in range(self.length):
            np.add.at(sums, self.first + k, scores)
            np.add.at(counts, self.first + k, 1)
        steps = np.flatnonzero(counts)
        return steps, sums[steps] / counts[steps]


def windows(series: Any, length: int, step: int = 1) -> npt.NDArray[Any]:
    """The windows of a series, a view of its memory: (T,) or (T, C) -> (N, C, length).

    Raises:
        AezooError: it is not a series, or too short.
    """
    values = np.asarray(series)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2:
        raise AezooError(f"a series of shape {values.shape}: give steps (T,) or steps and channels (T, C)")
    if len(values) < length:
        raise AezooError(f"a series of {len(values):,} steps has no window of {length:,}: give more steps, or a lower "
                         "--data.window_length")  # fmt: skip
    return np.lib.stride_tricks.sliding_window_view(values, length, axis=0)[::step]


def cut(
    arrays: Mapping[str, Any],
    fractions: tuple[float, float],
    length: int,
    step: int,
    max_bytes: int,
    what: str,
    times: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[Stage, Spans]]:
    """The windows of the arrays x_train, y_train and so on, and their positions.

    Args:
        arrays: series (T,) or (T, C), and labels (T,).
        fractions: shares of the steps for validation and for test, if there are no separate series for these.
        length: of a window.
        step: from one window to the next.
        max_bytes: the most memory that windows may take.
        what: the series' name in messages.
        times: the time stamp of each step of x_train; () without.

    Raises:
        AezooError: a split is too short, or windows take too much memory.
    """
    found: dict[str, Any] = {}
    spans: dict[Stage, Spans] = {}
    stop = len(arrays["x_train"])
    sizes = dict(zip(("val", "test"), (round(stop * share) for share in fractions), strict=True))
    # (of which array, first step, last step and one)
    parts: dict[Stage, tuple[Stage, int, int]] = {}
    for stage in reversed(STAGES[1:]):
        if f"x_{stage}" in arrays:
            parts[stage] = (stage, 0, len(arrays[f"x_{stage}"]))
        elif sizes[stage]:
            parts[stage] = ("train", stop - sizes[stage], stop)
            stop -= sizes[stage]
    parts["train"] = ("train", 0, stop)
    total = 0
    for stage in STAGES:
        if stage not in parts:
            continue
        of, start, end = parts[stage]
        try:
            x = windows(arrays[f"x_{of}"][start:end], length, step)
        except AezooError as error:
            raise AezooError(f"{what}{stage}: {error}") from None
        total += x.size * _WIDTH
        if total > max_bytes:
            raise AezooError(f"{what}windows of {length:,} steps take {total / 2**30:.3g} GiB or more: raise "
                             "--data.window_step or --data.max_bytes")  # fmt: skip
        found[f"x_{stage}"] = x
        spans[stage] = Spans(start + step * np.arange(len(x)), length, times if of == "train" else ())
        if f"y_{of}" in arrays:
            found[f"y_{stage}"] = label_of_windows(arrays[f"y_{of}"][start:end], length, step)
    return found, spans


def label_of_windows(y: Any, length: int, step: int) -> Tensor:
    """The largest label of the steps of each window, (T,) -> (N,).

    Raises:
        AezooError: labels are not numbers, so they have no order.
    """
    labels = np.asarray(y)
    if labels.ndim != 1 or labels.dtype.kind not in "biuf":
        raise AezooError("labels of the steps of a series must be numbers, such as 0 and 1, as the label of a "
                         "window is the largest of its steps: write such numbers, or give --data.label_column "
                         "none")  # fmt: skip
    return torch.from_numpy(np.array(windows(labels, length, step)[:, 0].max(1)))
