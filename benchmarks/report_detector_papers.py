"""Detectors in the settings of their papers: a table of classes, and one of means over classes."""

import statistics
from collections.abc import Sequence

from .report_columns import Column, Row, figures, markdown, merge_groups, spread, words

COLUMNS: tuple[Column, ...] = (
    *(words("model", "model"), words("data", "data"), words("normal", "normal"), words("seeds", "seeds")),
    *(figures("published", "published"), spread("AUROC", "auroc"), spread("AUROC of predictions", "predictions")),
    *(spread("AUPR", "aupr"), words("training samples", "train_rows"), words("epochs", "epochs")),
)


def merge_seeds(rows: Sequence[Row]) -> list[Row]:
    """A row for each model, data set and normal class: the mean, lowest and highest figures of its seeds."""
    return merge_groups(rows, ("model", "data", "normal"), ("auroc", "predictions", "aupr"), statistics.mean)


def tables(rows: Sequence[Row]) -> str:
    """The published and the measured mean over classes, with their difference."""
    from .detector_papers import PAPERS

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in merge_seeds(rows):
        groups.setdefault((row["model"], row["data"]), []).append(row)
    means = []
    for paper in PAPERS:
        if group := groups.get((paper.model, paper.set_name)):
            known = [paper.published[row["normal"]] for row in group if row["normal"] in paper.published]
            published = paper.published.get("mean", statistics.mean(known) if known else None)
            reached = statistics.mean(float(row["auroc"]) for row in group)
            row = {"model": paper.model, "data": paper.set_name, "classes": str(len(group)), "reached": repr(reached)}
            if published is not None:
                row |= {"published": repr(published), "difference": f"{reached - published:+.4f}"}
            means.append(row | {"source": paper.source})
    columns = (
        *(words("model", "model"), words("data", "data"), words("classes", "classes")),
        *(figures("published", "published"), figures("AUROC", "reached"), words("difference", "difference")),
        words("source", "source"),
    )
    return f"Means over the normal classes\n\n{markdown(columns, means)}"
