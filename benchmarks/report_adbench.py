"""The page of results of `benchmarks.adbench`, and its pictures of ranks.

A value of a detector on a set is the mean over its seeds, and over the levels of a setting that has several.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import rankings
from .adbench import TUNING
from .adbench_detectors import DEFAULT
from .common import number, read_csv, write_errors_in_one_line
from .report_columns import Row, figures, markdown, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = npt.NDArray[Any]
Files = Mapping[str, tuple[Sequence[str], Sequence[Row]]]
PREFIX, PAGE, TITLE = "adbench-", "adbench.md", "Anomaly detection on tables"
_METRICS = ("auroc", "aupr")
# detectors in the table of single sets
_MOST_COLUMNS = 9
# fewest sets for which ranks and tests are meaningful
_LEAST_SETS = 2
# ratio of clock time to processor time of fits, above which the machine was not idle
_MOST_SLOWDOWN = 1.5
_SETTINGS = {
    "unsupervised": "Training on all rows of the training part, including anomalies.",
    "clean": "Training on only the normal rows of the training part.",
    "contamination": "Normal rows of the training part, and anomalies that are resampled until they are 10, 20 and "
    "30 % of the training rows. Values are means over the levels.",
    "noise": "Irrelevant uniform columns, 10 and 50 % of all columns; training as in unsupervised. Values are means "
    "over the levels.",
}
_TEXT = (
    "Sets are those of ADBench (Han et al. 2022): {max_rows} rows of each at most (anomalies at their share, but at "
    "least 20), 70 % for training and 30 % for the test, stratified, standardised on the training rows. Small "
    "sets are not filled up with copies of their rows, as ADBench does, since copies would be in both parts. "
    "`default` is `AutoencoderDetector()`, other plain names are models of the zoo in that estimator, `pyod.` is PyOD; "
    "all with their own defaults but for settings in a name.\n\n"
    "**Judged on** the sets that are not for choosing hyperparameters; those are {tuning}. The score, the code "
    "and the steps of `default` were chosen on these; other versions of it (other scores and weights in its "
    "combination, fewer and more steps) were run on all sets, too, so its judging sets are not quite unseen. AUROC and "
    "AUPR (average precision) are means over the judging sets; a set's value is the mean over its seeds. Rank: "
    "average over the judging sets, 1 is best. p: Wilcoxon's signed-rank test of the AUROC against `default`, with"
    " Holm's correction for the number of detectors. A fit that failed counts as chance: AUROC 0.5 and an AUPR of"
    " the share of anomalies. Fit: processor time, median over the fits on all sets; seconds by the clock in "
    "brackets, which other work on the machine lengthens. Critical difference: ranks that differ by less are not "
    "told apart by Nemenyi's test at 5 % (Demsar 2006)."
)


class Table(NamedTuple):
    """Results of the detectors that have a row for every set, level and seed of a setting.

    Attributes:
        sets: names in alphabetical order.
        detectors: names in the order of the file.
        values: AUROC and AUPR, each (sets, detectors).
        rows: all rows, by detector.
        seeds: of each fit.
        unfinished: detectors that are left out, with the number of missing rows.
    """

    sets: list[str]
    detectors: list[str]
    values: dict[str, Values]
    rows: dict[str, list[Row]]
    seeds: list[str]
    unfinished: dict[str, int]

    def judged(self) -> list[int]:
        """Indices of the sets that no hyperparameter is chosen on."""
        return [i for i, name in enumerate(self.sets) if name not in TUNING]


def table_of(rows: Sequence[Row]) -> Table:
    """Values of a setting's rows; a failed fit has the values of random scores."""
    share = {
        (row["dataset"], row["setting"], row["seed"]): int(row["test_anomalies"]) / int(row["test_rows"])
        for row in rows
        if row.get("test_rows")
    }
    cells = dict.fromkeys((row["dataset"], row["setting"], row["seed"]) for row in rows)
    sets = sorted({dataset for dataset, _, _ in cells}, key=str.lower)
    by_detector: dict[str, dict[tuple[str, str, str], Row]] = {}
    for row in rows:
        by_detector.setdefault(row["detector"], {})[row["dataset"], row["setting"], row["seed"]] = row
    unfinished = {name: len(cells) - len(own) for name, own in by_detector.items() if len(own) < len(cells)}
    detectors = [name for name in by_detector if name not in unfinished]
    values = {metric: np.zeros((len(sets), len(detectors))) for metric in _METRICS}
    for i, dataset in enumerate(sets):
        of_set = [cell for cell in cells if cell[0] == dataset]
        for j, name in enumerate(detectors):
            chance = {"auroc": [0.5] * len(of_set), "aupr": [share.get(cell, 0.0) for cell in of_set]}
            for metric, fallback in chance.items():
                found = [number(by_detector[name][cell], metric) for cell in of_set]
                values[metric][i, j] = np.mean(
                    [other if value is None else value for value, other in zip(found, fallback, strict=True)]
                )
    own_rows = {name: list(by_detector[name].values()) for name in detectors}
    return Table(sets, detectors, values, own_rows, sorted({cell[2] for cell in cells}, key=int), unfinished)


def comparable(rows: Sequence[Row]) -> list[Row]:
    """The rows with the most frequent cap of rows."""
    caps = [row["max_rows"] for row in rows]
    return [row for row in rows if row["max_rows"] == max(dict.fromkeys(caps), key=caps.count)]


def summary(table: Table) -> str:
    """The table of detectors, the best average rank first."""
    judged, auroc, aupr = table.judged(), table.values["auroc"], table.values["aupr"]
    tuned = [i for i in range(len(table.sets)) if i not in judged]
    ranks = {metric: rankings.average_ranks(table.values[metric][judged]).tolist() for metric in _METRICS if judged}
    p_values = {part: _p_values(table, rows) for part, rows in (("judged", judged), ("all", [*range(len(auroc))]))}
    levels = list(dict.fromkeys(row["setting"] for row in table.rows[table.detectors[0]]))
    lines: list[Row] = []
    for j, name in enumerate(table.detectors):
        own = table.rows[name]
        line = {"detector": name, "all": _mean(auroc[:, j]), "aupr_all": _mean(aupr[:, j])}
        if judged:
            line |= {"auroc": _mean(auroc[judged, j]), "aupr": _mean(aupr[judged, j])}
            line |= {f"rank_{metric}": repr(found[j]) for metric, found in ranks.items()}
        line |= {"tuning": _mean(auroc[tuned, j])} if tuned else {}
        line |= {f"p_{part}": repr(found[name]) for part, found in p_values.items() if name in found}
        line |= {"fit": _fit_text(own), "failed": str(sum(bool(row.get("error")) for row in own) or "")}
        for level in levels if len(levels) > 1 else ():
            at = [number(row, "auroc") for row in own if row["setting"] == level and row["dataset"] not in TUNING]
            line[level] = _mean([0.5 if value is None else value for value in at]) if at else ""
        lines.append(line)
    lines.sort(key=lambda line: float(line.get("rank_auroc", 0)))
    columns = [
        *(words("detector", "detector"), figures("AUROC", "auroc", digits=3), figures("AUPR", "aupr", digits=3)),
        *(figures("rank", "rank_auroc", digits=3), figures("rank, AUPR", "rank_aupr", digits=3)),
        *(figures("p", "p_judged", digits=2), figures("AUROC, all sets", "all", digits=3)),
        *(figures("AUPR, all sets", "aupr_all", digits=3), figures("p, all sets", "p_all", digits=2)),
        *(figures("AUROC, tuning sets", "tuning", digits=3), words("fit, s", "fit"), words("failed fits", "failed")),
        *(figures(f"AUROC, {level}", level, digits=3) for level in levels if len(levels) > 1),
    ]
    return markdown(columns, lines)


def _p_values(table: Table, rows: Sequence[int]) -> dict[str, float]:
    """p-values of each detector, compared with the default one."""
    if DEFAULT not in table.detectors or len(rows) < _LEAST_SETS:
        return {}
    values = table.values["auroc"][rows]
    first = values[:, table.detectors.index(DEFAULT)]
    others = [name for name in table.detectors if name != DEFAULT]
    found = [rankings.wilcoxon_p(values[:, table.detectors.index(name)], first) for name in others]
    return dict(zip(others, rankings.holm(found), strict=True))


def _mean(values: Values | Sequence[float]) -> str:
    return repr(float(np.mean(values)))


def _slowdown(rows: Sequence[Row]) -> float:
    """Seconds by the clock of all fits, as a multiple of processor time on all threads; 1 on an idle machine."""
    pairs = [(number(row, "fit_seconds"), number(row, "fit_cpu_seconds")) for row in rows]
    measured = [(clock, used) for clock, used in pairs if clock is not None and used]
    return sum(clock for clock, _ in measured) / sum(used for _, used in measured) if measured else 1.0


def _fit_text(rows: Sequence[Row]) -> str:
    medians = [
        float(np.median(found))
        for name in ("fit_cpu_seconds", "fit_seconds")
        if (found := [value for row in rows if (value := number(row, name)) is not None])
    ]
    return f"{medians[0]:.3g} ({medians[1]:.3g})" if len(medians) > 1 else ""


def set_table(table: Table) -> str:
    """AUROC of single sets, of the default detector and of those with the best ranks."""
    judged = table.judged()
    ranks = rankings.average_ranks(table.values["auroc"][judged or slice(None)])
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    chosen = sorted(order, key=lambda j: table.detectors[j] != DEFAULT)[:_MOST_COLUMNS]
    first = {row["dataset"]: row for row in reversed([row for own in table.rows.values() for row in own])}
    lines: list[Row] = []
    for i, name in enumerate(table.sets):
        row = first[name]
        line = {"set": f"{name} (tuning)" if name in TUNING else name, "features": row.get("features", "")}
        line["rows"] = f"{row.get('train_rows', '')} + {row.get('test_rows', '')}"
        line["anomalies"] = f"{row.get('train_anomalies', '')} + {row.get('test_anomalies', '')}"
        lines.append(line | {table.detectors[j]: repr(float(table.values["auroc"][i, j])) for j in chosen})
    columns = [words(name, name) for name in ("set", "features", "rows", "anomalies")]
    return markdown([*columns, *(figures(table.detectors[j], table.detectors[j], digits=3) for j in chosen)], lines)


def picture(table: Table, setting: str) -> "Figure | None":
    """Average ranks on the judging sets, with the critical difference; None for one detector or set."""
    from .plots_ranks import critical_differences

    judged = table.judged()
    if len(table.detectors) < 2 or len(judged) < _LEAST_SETS:
        return None
    ranks = rankings.average_ranks(table.values["auroc"][judged])
    difference = rankings.critical_difference(len(table.detectors), len(judged))
    title = f"{setting}: average rank by AUROC on {len(judged)} sets, {_seeds(table)}"
    return critical_differences(dict(zip(table.detectors, ranks.tolist(), strict=True)), difference, title)


def _seeds(table: Table) -> str:
    return "one seed" if len(table.seeds) == 1 else f"{len(table.seeds)} seeds"


def tables_of(files: Files) -> dict[str, Table]:
    """Tables of the CSVs that contain all rows of at least one detector, by their stems."""
    found = {stem: table_of(comparable(rows)) for stem, (_, rows) in files.items() if rows}
    stems = [stem for setting in _SETTINGS for stem in found if _setting(stem) == setting and found[stem].detectors]
    return {stem: found[stem] for stem in stems}


def _setting(stem: str) -> str:
    return stem.removeprefix(PREFIX).partition("-")[0]


def pages(files: Files, pictures: Path, place: Path) -> dict[str, str]:
    """The page, by the name of its file; empty without complete rows.

    Args:
        files: commands and rows of the CSVs, by their stems.
        pictures: folder of the pictures.
        place: folder of the page, from which its links lead.
    """
    found = tables_of(files)
    if not found:
        return {}
    caps = dict.fromkeys(row["max_rows"] for table in found.values() for own in table.rows.values() for row in own)
    parts = [_TEXT.format(max_rows=" or ".join(f"{int(cap):,}" for cap in caps), tuning=", ".join(TUNING))]
    for stem, table in found.items():
        setting, judged = _setting(stem), table.judged()
        rows = [row for own in table.rows.values() for row in own]
        parts += [f"### {stem}", "```bash\n" + "\n".join(files[stem][0]) + "\n```"]
        versions = sorted({row["version"] for row in rows if row.get("version")})
        threads = sorted({row["threads"] for row in rows if row.get("threads")})
        processors = sorted({row["processor"] for row in rows if row.get("processor")})
        facts = f"{len(table.sets)} sets, {len(judged)} of them judge; "
        facts += f"seed{'s' * (len(table.seeds) > 1)} {', '.join(table.seeds)}"
        facts += ", which does not show how far seeds differ" if len(table.seeds) == 1 else ""
        facts += f"; {', '.join(versions)}; threads: {', '.join(threads)}; processor: {', '.join(processors)}."
        parts.append(f"{_SETTINGS[setting]} {facts}")
        slowdown = _slowdown(rows)
        if slowdown > _MOST_SLOWDOWN:
            parts.append(
                f"The machine was busy with other work: by the clock, fits took {slowdown:.2g} times their processor "
                "time. Times by the clock do not compare."
            )
        if table.unfinished:
            missing = ", ".join(f"{name} ({count})" for name, count in table.unfinished.items())
            parts.append(f"Left out, since rows are missing: {missing}.")
        parts.append(summary(table))
        if len(table.detectors) > 1 and len(judged) >= _LEAST_SETS:
            test = rankings.friedman(rankings.average_ranks(table.values["auroc"][judged]), len(judged))
            parts.append(f"Friedman's test with Iman and Davenport's correction: F = {test.f:.3g}, p = {test.p:.2g}.")
        file = pictures / f"{stem}.png"
        if picture(table, setting) is not None:
            parts.append(f"![average ranks and critical difference]({Path(os.path.relpath(file, place)).as_posix()})")
        if setting == "unsupervised":
            parts.append("AUROC of each set; rows and anomalies of training + test, of the first seed:")
            parts.append(set_table(table))
    return {PAGE: "\n\n".join(parts)}


def draw(files: Files, folder: Path) -> dict[Path, str]:
    """Draw the pictures into a folder; return files and their descriptions."""
    drawn = {}
    for stem, table in tables_of(files).items():
        figure = picture(table, _setting(stem))
        if figure is not None:
            path = folder / f"{stem}.png"
            with write_errors_in_one_line(path):
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=150)
            drawn[path] = f"average ranks of anomaly detectors, {_setting(stem)}"
    return drawn


def read(folder: Path) -> dict[str, tuple[list[str], list[Row]]]:
    """Commands and rows of the CSVs of this benchmark, by their stems."""
    return {path.stem: read_csv(path) for path in sorted(folder.glob(f"{PREFIX}*.csv"))}
