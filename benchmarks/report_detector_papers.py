"""Detectors in the settings of their papers: a table of classes, and one of means over classes."""

import statistics
from collections.abc import Sequence

from .common import number
from .report_columns import Column, Row, figures, markdown, spread, words

COLUMNS: tuple[Column, ...] = (
    *(words("model", "model"), words("data", "data"), words("normal", "normal"), words("seeds", "seeds")),
    *(figures("published", "published"), spread("AUROC", "auroc"), spread("AUROC of predictions", "predictions")),
    *(spread("AUPR", "aupr"), words("training samples", "train_rows"), words("epochs", "epochs")),
)
_MEASURES = ("auroc", "predictions", "aupr")


def merge_seeds(rows: Sequence[Row]) -> list[Row]:
    """A row for each model, data set and normal class: the mean, lowest and highest figures of its seeds."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("model", "data", "normal")), []).append(row)
    merged = []
    for group in groups.values():
        found = group[0] | {"seeds": str(len(group))}
        for name in _MEASURES:
            if values := [value for row in group if (value := number(row, name)) is not None]:
                found[name] = repr(statistics.mean(values))
                found |= {f"{name}_low": repr(min(values)), f"{name}_high": repr(max(values))}
        merged.append(found)
    return merged


def tables(rows: Sequence[Row]) -> str:
    """The published and the measured mean over classes, with their difference."""
    from .detector_papers import PAPERS

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in merge_seeds(rows):
        groups.setdefault((row["model"], row["data"]), []).append(row)
    means = []
    for paper in PAPERS:
        data = paper.data.partition(":")[2] or paper.data
        if group := groups.get((paper.model, data)):
            known = [paper.published[row["normal"]] for row in group if row["normal"] in paper.published]
            published = paper.published.get("mean", statistics.mean(known) if known else None)
            reached = statistics.mean(float(row["auroc"]) for row in group)
            row = {"model": paper.model, "data": data, "classes": str(len(group)), "reached": repr(reached)}
            if published is not None:
                row |= {"published": repr(published), "difference": f"{reached - published:+.4f}"}
            means.append(row | {"source": paper.source})
    columns = (
        *(words("model", "model"), words("data", "data"), words("classes", "classes")),
        *(figures("published", "published"), figures("AUROC", "reached"), words("difference", "difference")),
        words("source", "source"),
    )
    return f"Means over the normal classes\n\n{markdown(columns, means)}"
