"""Detectors of image anomalies: means over normal classes, a table of classes for each set, and published figures."""

import statistics
from collections.abc import Sequence

from .common import number
from .report_columns import Column, Row, figures, markdown, merge_groups, words

COLUMNS: tuple[Column, ...] = (
    *(words("data", "data"), words("method", "method"), words("normal classes", "classes"), words("seeds", "seeds")),
    *(figures("mean AUROC", "auroc"), figures("mean AUPR", "aupr"), words("trainings", "ended")),
    figures("seconds to fit", "seconds"),
)
_SOURCE = "anomalib 2.7's README of the model"
# mean over the 15 classes of MVTec AD at 256 x 256 pixels, from whole maps of features
PUBLISHED: tuple[Row, ...] = (
    {"model": "padim", "network": "ResNet-18", "image": "0.891", "pixel": "0.968"},
    {"model": "padim", "network": "Wide ResNet-50", "image": "0.950", "pixel": "0.979"},
    {"model": "patchcore", "network": "ResNet-18", "image": "0.973", "pixel": "0.976"},
    {"model": "patchcore", "network": "Wide ResNet-50", "image": "0.980", "pixel": "0.980"},
    {"model": "student_teacher", "network": "ResNet-18", "image": "0.893", "pixel": "0.951"},
    {"model": "reverse_distillation", "network": "Wide ResNet-50", "image": "0.985", "pixel": "0.969"},
    {"model": "fre", "network": "Wide ResNet-50", "image": "0.947", "pixel": ""},
)


def _merge_seeds(rows: Sequence[Row]) -> list[Row]:
    """A row for each data set, normal class and method: the medians over its seeds."""
    return merge_groups(rows, ("data", "normal", "method"), ("auroc", "aupr", "seconds"), statistics.median)


def means(rows: Sequence[Row]) -> list[Row]:
    """A row for each data set and method: means over classes, how many trainings converged, median seconds of a fit."""
    found = []
    for (data, method), group in _grouped(rows, "data", "method").items():
        classes = _merge_seeds(group)
        row = {"data": data, "method": method, "classes": str(len(classes)), "seeds": classes[0]["seeds"]}
        for name in ("auroc", "aupr"):
            row[name] = repr(statistics.mean(number(each, name) or 0.0 for each in classes))
        row["seconds"] = repr(statistics.median(number(each, "seconds") or 0.0 for each in group))
        endings = [ended for each in group if (ended := each.get("stopped"))]
        row["ended"] = ", ".join(f"{endings.count(ended)} {ended}" for ended in dict.fromkeys(endings))
        found.append(row)
    return found


def tables(rows: Sequence[Row]) -> str:
    """The AUROC of each class, a table for each data set, and the published figures."""
    parts = []
    for (data,), group in _grouped(rows, "data").items():
        lines: dict[str, Row] = {}
        for row in _merge_seeds(group):
            lines.setdefault(row["method"], {"method": row["method"]})[row["normal"]] = row["auroc"]
        classes = dict.fromkeys(row["normal"] for row in group)
        columns = words("method", "method"), *(figures(name.removeprefix("MVTec-AD_"), name) for name in classes)
        parts.append(f"AUROC of each normal class of {data}\n\n{markdown(columns, [*lines.values()])}")
    return "\n\n".join([*parts, published_table(rows)])


def _grouped(rows: Sequence[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def published_table(rows: Sequence[Row]) -> str:
    """Published figures of the zoo's models, measured by another package."""
    columns = (
        *(words("model", "model"), words("network", "network"), words("image AUROC", "image")),
        *(words("pixel AUROC", "pixel"), words("source", "source")),
    )
    head = "Published, on whole maps of features of MVTec AD (mean of 15 classes), which this page does not measure"
    return f"{head}\n\n" + markdown(columns, [row | {"source": _SOURCE} for row in PUBLISHED])
