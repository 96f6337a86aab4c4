"""The models of each data set by error and training speed, for the pictures of the report and of the site."""

from collections.abc import Sequence
from typing import NamedTuple

from . import common

Row = dict[str, str]

# models of textbooks, which are named in each panel
TEXTBOOK = ("dense_ae", "conv_ae", "denoising_ae", "sparse_ae_l1", "vae")
# largest number of models in a panel that can all be named
_MAX_NAMED = 20


class Point(NamedTuple):
    """A model in a panel.

    Attributes:
        row: of the CSV, median over seeds.
        speed: samples per second of training, of the fastest seed.
        error: mean squared error on the test split.
        label: its name, with the size of its code where that differs from the panel's; empty if it is not named.
        compared: whether it was measured on the processor of most models, so that it can be on the front.
    """

    row: Row
    speed: float
    error: float
    label: str
    compared: bool


class Panel(NamedTuple):
    """A data set.

    Attributes:
        dataset: its name.
        code_size: the most common number of numbers in a code.
        points: a point for each model.
        front: (speed, error) of the models that no other one beats in both, the fastest first.
        pca: error of PCA with a code of this size; None if unknown.
    """

    dataset: str
    code_size: str
    points: list[Point]
    front: list[tuple[float, float]]
    pca: float | None


def panels(rows: Sequence[Row]) -> list[Panel]:
    """A panel for each data set, of rows with `mse` and `samples_per_s`, at the most common code size.

    If there are many models, only those on the front and five of textbooks are named. Codes that could contain the
    whole sample are left out.
    """
    sets: dict[str, list[Row]] = {}
    for row in rows:
        if not row.get("error") and min(_number(row, "mse"), _number(row, "samples_per_s")) > 0:
            sets.setdefault(row["dataset"], []).append(row)
    return [_panel(dataset, part) for dataset, part in sets.items()]


def _panel(dataset: str, rows: Sequence[Row]) -> Panel:
    sizes = [row.get("code_size", "") for row in rows]
    code_size = max(dict.fromkeys(sizes), key=sizes.count)
    by_model: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: abs(_number(row, "code_size") - float(code_size or 0))):
        by_model.setdefault(row["model"], row)
    models = [by_model[name] for name in dict.fromkeys(row["model"] for row in rows)]
    models = [row for row in models if _number(row, "pca_mse") > 0] or models
    processors = [row.get("processor", "") for row in models]
    processor = max(dict.fromkeys(processors), key=processors.count)
    points = [Point(row, _speed(row), _number(row, "mse"), "", row.get("processor", "") == processor) for row in models]
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (-point.speed, point.error)):
        if point.compared and (not front or point.error < front[-1][1]):
            front.append((point.speed, point.error))
    points = [
        point._replace(label=_label(point.row, code_size))
        if len(points) <= _MAX_NAMED or (point.speed, point.error) in front or point.row["model"] in TEXTBOOK
        else point
        for point in points
    ]
    pca = [_number(row, "pca_mse") for row in rows if row.get("code_size") == code_size]
    return Panel(dataset, code_size, points, front, next((value for value in pca if value > 0), None))


def _label(row: Row, code_size: str) -> str:
    size = row.get("code_size", "")
    return row["model"] + ("" if size == code_size else f" ({size})")


def _number(row: Row, name: str) -> float:
    return common.number(row, name) or 0.0


def _speed(row: Row) -> float:
    """Samples per second of the fastest seed: other load on a machine slows a run and never speeds it up."""
    return _number(row, "samples_per_s_high") or _number(row, "samples_per_s")
