"""Detectors of image anomalies, compared with published figures."""

import statistics
from collections.abc import Sequence

from .common import number
from .report_columns import Column, Row, markdown, merge_groups, spread, words

COLUMNS: tuple[Column, ...] = (
    *(words("data", "data"), words("normal", "normal"), words("method", "method"), words("epochs", "epochs")),
    *(words("seeds", "seeds"), spread("AUROC", "auroc"), spread("AUPR", "aupr")),
    *(words("training samples", "train_rows"), words("test samples", "test_rows")),
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


def merge_seeds(rows: Sequence[Row]) -> list[Row]:
    """A row for each data set, normal class, method and budget: the median, lowest and highest figures of its seeds."""
    return merge_groups(rows, ("data", "normal", "method", "epochs"), ("auroc", "aupr"), statistics.median)


def tables(rows: Sequence[Row]) -> str:
    """The means over normal classes, and the published figures."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in merge_seeds(rows):
        groups.setdefault((row["data"], row["method"], row["epochs"]), []).append(number(row, "auroc") or 0.0)
    means = [
        {"data": data, "method": method, "epochs": epochs, "classes": str(len(v)), "auroc": f"{statistics.mean(v):.3f}"}
        for (data, method, epochs), v in groups.items()
    ]
    columns = (
        *(words("data", "data"), words("method", "method"), words("epochs", "epochs")),
        *(words("normal classes", "classes"), words("mean AUROC", "auroc")),
    )
    return f"Means over the normal classes\n\n{markdown(columns, means)}\n\n{published_table(rows)}"


def published_table(rows: Sequence[Row]) -> str:
    """Published figures of the zoo's models, measured by another package."""
    columns = (
        *(words("model", "model"), words("network", "network"), words("image AUROC", "image")),
        *(words("pixel AUROC", "pixel"), words("source", "source")),
    )
    head = "Published, on whole maps of features of MVTec AD (mean of 15 classes), which this page does not measure"
    return f"{head}\n\n" + markdown(columns, [row | {"source": _SOURCE} for row in PUBLISHED])
