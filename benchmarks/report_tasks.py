"""The pages of results on the commands: tables, and above each table a sentence that names the best method.

A comparison is a command, or a part of a command whose figures have a different meaning; only methods of the same
comparison are compared. Rows are merged over seeds. `reference` rows, such as real samples or a bound, never count as
ahead.
"""

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from .common import Spread, number
from .report_columns import Column, Row, format_number, markdown, words

# rows with equal values in these columns are compared
SETTING = ("dataset", "task", "code_size", "budget", "fit_rows", "test_rows", "classes")
# peak signal-to-noise ratios, in dB, at which lossy methods are compared
TARGETS = (14, 17, 20, 25)


class Figure(NamedTuple):
    """A column of figures.

    Attributes:
        head: heading.
        name: the column of the CSV.
        direction: high, low, or empty if neither is better.
        unit: unit for the sentence.
    """

    head: str
    name: str
    direction: str = ""
    unit: str = ""


class Comparison(NamedTuple):
    """A comparison of methods.

    Attributes:
        command: the command of the CSV.
        task: prefix of the rows' column `task`, if a command has several.
        text: explanation of the figures.
        figures: columns.
        n_summarised: number of first figures that get a sentence; methods are sorted by the first.
        each_seed: computes the figures of a method and a seed from their rows.
    """

    command: str
    task: str
    text: str
    figures: tuple[Figure, ...]
    n_summarised: int
    each_seed: Callable[[Sequence[Row]], Row]


def first_row(rows: Sequence[Row]) -> Row:
    """The first row; several models may have measured the same row of a method and a seed, as with baselines."""
    return rows[0]


def mean_over_classes(rows: Sequence[Row]) -> Row:
    """Means over the classes, each of which is the normal one in turn and counts once."""
    classes = {row["class"]: row for row in rows}
    return rows[0] | {
        name: repr(statistics.fmean(values))
        for name in ("auroc", "aupr")
        if (values := [value for row in classes.values() if (value := number(row, name)) is not None])
    }


def bits_at_targets(rows: Sequence[Row]) -> Row:
    """The fewest bits that reach each of `TARGETS`, interpolated linearly between the measured quality settings.

    If the coarsest setting already exceeds a target, fewer bits might be enough, so its bits are marked as an upper
    bound.
    """
    points = sorted({(bits, psnr) for row in rows if (bits := number(row, "bits_per_dim")) is not None
                     and (psnr := number(row, "psnr")) is not None})  # fmt: skip
    found = dict(rows[0])
    for target in TARGETS:
        reached = [bits for bits, psnr in points if psnr >= target]
        for (low, below), (high, above) in pairwise(points):
            if below < target <= above:
                reached.append(low + (high - low) * (target - below) / (above - below))
        if reached:
            found[f"bits_{target}"] = repr(min(reached))
            found[f"bits_{target}_most"] = "≤ " if min(reached) == points[0][0] else ""
    return found | {"best_psnr": repr(max(psnr for _, psnr in points))} if points else found


_ERRORS = (Figure("mse", "mse", "low"), Figure("ssim", "ssim", "high"))
COMPARISONS = (
    Comparison(
        "reconstruct", "", "Error between test samples and their reconstructions. PCA has a code of the same size.",
        (Figure("psnr, dB", "psnr", "high", "dB"), *_ERRORS), 1, first_row,
    ),
    Comparison(
        "generate", "",
        "FID, KID, precision and recall are measured against training samples, in the features of a small classifier "
        "of the same data (named in the CSV; there are no Inception weights here). Closer: the probability that a "
        "sample is closer to the training samples than a held-out real sample is. 0.5 means equally close and 1 means "
        "a copy; blurred samples are closer too. Methods that stay near the training samples get a good FID, so read "
        "both figures.",
        (
            Figure("fid", "fid", "low", ""), Figure("kid", "kid", "low"), Figure("precision", "precision", "high"),
            Figure("recall", "recall", "high"), Figure("closer", "closer"), Figure("distance", "distance"),
        ), 1, first_row,
    ),
    Comparison(
        "denoise", "",
        "Test samples carry Gaussian noise with a standard deviation of 0.3. Filters use the setting that suits the "
        "clean originals best, which favours them. conv_denoising_ae was trained for this noise; the other models "
        "were not.",
        (Figure("psnr, dB", "psnr", "high", "dB"), *_ERRORS), 1, first_row,
    ),
    Comparison(
        "detect", "",
        "One-vs-rest: each class in turn is the only one seen in training, and the other classes are anomalies. "
        "Figures are means over classes.",
        (Figure("auroc", "auroc", "high", ""), Figure("aupr", "aupr", "high")), 1, mean_over_classes,
    ),
    Comparison(
        "embed", "",
        "The share of test samples whose class is predicted correctly from the code, by logistic regression (probe) "
        "and by the 5 nearest neighbours (knn).",
        (Figure("probe", "probe", "high", ""), Figure("knn", "knn", "high", ""), Figure("numbers", "size")),
        2, first_row,
    ),
    Comparison(
        "compress", "lossy",
        "The fewest bits per dimension that reach a PSNR, interpolated linearly between measured quality settings. "
        "Bytes include tables and headers, but not the model. ≤: the coarsest measured setting already exceeds this "
        "PSNR, so fewer bits might be enough.",
        (
            *(Figure(f"bits/dim at {target} dB", f"bits_{target}", "low", "bits/dim") for target in TARGETS),
            Figure("best psnr, dB", "best_psnr", "high"),
        ), len(TARGETS), bits_at_targets,
    ),
    Comparison(
        "compress", "lossless",
        "Whole files, with all samples in one file; the bytes of the model are not counted. For a model with a "
        "Bernoulli likelihood, values are first set to 0 or 1, for all methods.",
        (Figure("bits/dim", "bits_per_dim", "low", "bits/dim"), Figure("bytes", "bytes", "low")), 1, first_row,
    ),
)  # fmt: skip


def merge_rows(comparison: Comparison, rows: Sequence[Row]) -> list[list[Row]]:
    """Groups of comparable rows, one row per method: median, lowest and highest over seeds, best first."""
    groups: dict[tuple[str, ...], dict[tuple[str, str], dict[str, list[Row]]]] = {}
    for row in rows:
        if row.get("task", "").startswith(comparison.task):
            methods = groups.setdefault(tuple(row.get(name, "") for name in SETTING), {})
            seeds = methods.setdefault((row["method"], row["kind"]), {})
            seeds.setdefault(row["seed"], []).append(row)
    lead = comparison.figures[0]

    def order(row: Row) -> float:
        value = number(row, lead.name)
        return float("inf") if value is None else -value if lead.direction == "high" else value

    return [
        sorted((_merge_seeds(comparison, [*seeds.values()]) for seeds in methods.values()), key=order)
        for methods in groups.values()
    ]


def _merge_seeds(comparison: Comparison, seeds: Sequence[Sequence[Row]]) -> Row:
    # a mean over classes without a failed one would not be comparable
    good = [comparison.each_seed(rows) for rows in seeds if not any(row.get("error") for row in rows)]
    found = {name: value for name, value in seeds[0][0].items() if name in (*SETTING, "method", "kind")}
    for figure in comparison.figures:
        values = [value for row in good if (value := number(row, figure.name)) is not None]
        # a figure that is missing for a seed has no median
        if values and len(values) == len(good):
            spread = Spread.from_data(values)
            found |= {figure.name: repr(spread.median)}
            found |= {f"{figure.name}_low": repr(spread.low), f"{figure.name}_high": repr(spread.high)}
            found |= {f"{figure.name}_most": max(row.get(f"{figure.name}_most", "") for row in good)}
    errors = [row["error"] for rows in seeds for row in rows if row.get("error")]
    return found | {"seeds": str(len(good)), "errors": "; ".join(dict.fromkeys(errors))}


def best(rows: Sequence[Row], kind: str, figure: Figure) -> Row | None:
    """The best row of a kind by a figure; None if no row has the figure."""
    known = [row for row in rows if row["kind"] == kind and number(row, figure.name) is not None]
    sign = -1 if figure.direction == "high" else 1
    return min(known, key=lambda row: sign * float(row[figure.name]), default=None)


def comparison_text(figure: Figure, rows: Sequence[Row]) -> str:
    """Which method is ahead by a figure, and by how much."""
    ours, baseline = (best(rows, kind, figure) for kind in ("ours", "baseline"))
    if ours is None or baseline is None:
        present, missing = (baseline, "model") if ours is None else (ours, "baseline")
        return (
            f"no {missing} has a figure"
            if present is None
            else f"no {missing} gets there, {_shown(present, figure)} does"
        )
    gap = float(ours[figure.name]) - float(baseline[figure.name])
    if gap == 0:
        return f"the best model, {_shown(ours, figure)}, and the best baseline, {_shown(baseline, figure)}, are equal"
    ours_ahead = (gap > 0) == (figure.direction == "high")
    first, second = (ours, baseline) if ours_ahead else (baseline, ours)
    first_text, second_text = ("a model", "the best baseline") if ours_ahead else ("a baseline", "the best model")
    most = "at most " if second.get(f"{figure.name}_most") else ""
    by = most + " ".join(filter(None, [format_number(abs(gap), 3), figure.unit]))
    text = f"{first_text}, {_shown(first, figure)}, is ahead of {second_text}, {_shown(second, figure)}, by {by}"
    return text + (", within the spread of the seeds" if _overlap(first, second, figure.name) else "")


def _shown(row: Row, figure: Figure) -> str:
    return f"{row['method']} ({row.get(f'{figure.name}_most', '')}{format_number(float(row[figure.name]))})"


def _overlap(a: Row, b: Row, name: str) -> bool:
    return max(float(row[f"{name}_low"]) for row in (a, b)) <= min(float(row[f"{name}_high"]) for row in (a, b))


def sentences(comparison: Comparison, rows: Sequence[Row]) -> Iterator[str]:
    """One line for each of the leading figures."""
    first = rows[0]
    about = ", ".join(filter(None, [first["dataset"], first.get("task", "").removeprefix("lossless, ")]))
    for figure in comparison.figures[: comparison.n_summarised]:
        by = f", {figure.head}" if comparison.n_summarised > 1 else ""
        first_of = f", the first {first['classes']} classes" if first.get("classes") else ""
        setting = f"codes of {first['code_size']} numbers, {first['budget']}{first_of}"
        yield f"- {about} ({setting}){by}: {comparison_text(figure, rows)}."


def table(comparison: Comparison, groups: Sequence[Sequence[Row]]) -> str:
    """One table of all groups; the best value of each figure is bold."""
    leaders = {
        (i, figure.name): row
        for i, rows in enumerate(groups)
        for figure in comparison.figures
        if figure.direction and (row := _best_of_all(rows, figure)) is not None
    }
    shown = [row | {"group": str(i)} for i, rows in enumerate(groups) for row in rows]

    def cell(figure: Figure) -> Column:
        def text(row: Row) -> str:
            values = [number(row, f"{figure.name}{end}") for end in ("", "_low", "_high")]
            middle, low, high = values
            if middle is None or low is None or high is None:
                return ""
            found = (
                row.get(f"{figure.name}_most", "")
                + format_number(middle)
                + ("" if low == high else f" ({format_number(low)} to {format_number(high)})")
            )
            leader = leaders.get((int(row["group"]), figure.name), {})
            return (
                f"**{found}**" if (leader.get("method"), leader.get("kind")) == (row["method"], row["kind"]) else found
            )

        return Column(figure.head, text)

    task = [words("task", "task")] if len({row.get("task") for row in shown}) > 1 else []
    return markdown(
        [words("data", "dataset"), *task, words("method", "method"), words("kind", "kind"), words("seeds", "seeds"),
         *map(cell, comparison.figures), words("errors", "errors")], shown,
    )  # fmt: skip


def _best_of_all(rows: Sequence[Row], figure: Figure) -> Row | None:
    known = [row for kind in ("ours", "baseline") if (row := best(rows, kind, figure)) is not None]
    return min(known, key=lambda row: float(row[figure.name]) * (-1 if figure.direction == "high" else 1), default=None)


def section(files: Mapping[str, tuple[list[str], list[Row]]], folder: Path, home: Path) -> str:
    """The text of all pages on the commands.

    Args:
        files: command lines and rows of the CSVs by stem, `tasks-COMMAND-...`.
        folder: folder of the CSVs, with the pictures below it.
        home: folder of the text.
    """
    parts = [
        "## Commands for trained models",
        "Uses of a trained model, compared with what a user would use without one (`baseline`). A `reference` is "
        "neither a model nor a baseline. Figures are of the test split, as the median over seeds (lowest to highest); "
        "the best is in bold, and rows are sorted by the first figure.",
    ]
    for stem, (command_lines, rows) in files.items():
        command = stem.split("-")[1]
        comparisons = [comparison for comparison in COMPARISONS if comparison.command == command]
        parts += [f"### {command}", f"`{stem}.csv`", "\n".join(["```bash", *command_lines, "```"])]
        picture = folder / "pictures" / f"task-{command}.png"
        parts += [f"![{command}]({os.path.relpath(picture, home)})"] if picture.is_file() else []
        for comparison in comparisons:
            groups = merge_rows(comparison, rows)
            if groups:
                parts += [f"#### {comparison.task}"] if len(comparisons) > 1 else []
                parts += [comparison.text, "\n".join(line for rows in groups for line in sentences(comparison, rows))]
                parts += [table(comparison, groups)]
    return "\n\n".join(parts)
