"""The figures in `aezoo info NAME`: the model's measured row, and the better models. Written to aezoo/results.json.

A model is compared by the measure of each of its tags, in the first kind of table below that has it, and there with all
rows of the same data, budget and size of code, baselines included. If a rival has rows with several options, its best
row is used. Figures are medians over seeds, of anomaly detection means over the classes or sets. A model that has a
larger error than PCA when it has converged gets the flags with which it has not, see `benchmarks.causes`.
"""

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aezoo import registry

from . import report_zoo
from .causes import CAUSES
from .common import PACKAGE, number
from .report_columns import Row

# rivals that are named
_MOST_NAMED = 3
# models that learn from labels, which the models they are compared with do not use
WITH_LABELS = frozenset(
    ("ada_gvae", "conditional_vae", "mlvae", "semi_supervised_m1", "semi_supervised_vae", "triplet_ae", "triplet_vae")
)
# the set in the package comes first
_PREFERRED = "mnist5k"
# figures of a model's row, in order, and how they are written
ROW_FIGURES = {
    "mse": "mse {}",
    "psnr": "psnr {} dB",
    "ssim": "ssim {}",
    "bits_per_dim": "{} bits/dim",
    "log_likelihood": "log p(x) {} nats",
    "fid": "FID {}",
    "probe": "linear probe {}",
    "knn": "kNN {}",
    "l0": "L0 {}",
}


class Measure(NamedTuple):
    """The measure by which two models are compared.

    Attributes:
        table: the kind of table, see `TABLES`.
        column: its column.
        name: how a value is written.
        higher: whether a higher value is better.
    """

    table: str
    column: str
    name: str
    higher: bool = True


ERROR = Measure("quality", "mse", "mse {}", higher=False)
# by tag, the first that a model has a figure of; models with none of these are compared by `ERROR`
MEASURES: dict[str, tuple[Measure, ...]] = {
    "anomaly": (Measure("detect", "auroc", "AUROC {}"), Measure("adbench", "auroc", "AUROC {}")),
    "generation": (
        Measure("quality", "fid", "FID {}", higher=False),
        Measure("quality", "log_likelihood", "log p(x) {} nats"),
    ),
    "compression": (Measure("compress", "psnr", "psnr {} dB"),),
    "representation": (Measure("quality", "probe", "linear probe {}"),),
    "disentanglement": (Measure("disentangle", "mig", "MIG {}"),),
    "interpretability": (Measure("dictionaries", "mcc", "MCC with known atoms {}"),),
    "tokenizer": (Measure("bits", "mse", "mse {}", higher=False),),
    "denoising": (Measure("denoise", "psnr", "psnr {} dB"),),
}


class Entry(NamedTuple):
    """A row of a table.

    Attributes:
        model: its name in the registry, or the name of a baseline.
        label: how it is named as a rival.
        data: the data set.
        setting: the settings that all compared rows have in common, in words.
        row: its figures.
    """

    model: str
    label: str
    data: str
    setting: str
    row: Row


def entries(files: Mapping[str, Sequence[Row]]) -> dict[str, list[Entry]]:
    """The rows of each kind of table, medians over seeds, from the rows of all CSVs by stem."""
    return {kind: list(read(files)) for kind, read in TABLES.items()}


def _stems(files: Mapping[str, Sequence[Row]], prefix: str) -> Iterable[tuple[str, Sequence[Row]]]:
    return ((stem, rows) for stem, rows in files.items() if stem.startswith(prefix))


def _words(*parts: tuple[str, str]) -> str:
    """Settings in words, without empty ones: ("batches of {}", "128") -> "batches of 128"."""
    return ", ".join(text.format(value) for text, value in parts if value)


def _budget(row: Row) -> str:
    kind, _, value = row.get("budget", "").partition("=")
    return f"{value} {kind}" if value else kind


def _quality(files: Mapping[str, Sequence[Row]]) -> Iterable[Entry]:
    from .report import comparable, merge_seeds

    runs = [row for stem, rows in _stems(files, "quality-") if "-recipes-" not in stem for row in merge_seeds(rows)]
    for row in comparable([row for row in runs if row["seeds"] != "0"]):
        kind = row.get("kind") or "numbers"
        size = row.get({"bits": "bits", "active": "size"}.get(kind, "code_size")) or row.get("code_size", "")
        unit = {"bits": "bits", "active": "active latents"}.get(kind, "numbers")
        setting = _words(
            ("{}", _budget(row)), ("batches of {}", row.get("batch_size", "")), (f"codes of {{}} {unit}", size)
        )
        notes = [f"L0 {number(row, 'l0'):.3g}"] if number(row, "l0") else []
        notes += ["trained with labels"] if row["model"] in WITH_LABELS else []
        label = f"{row['model']} ({', '.join(notes)})" if notes else row["model"]
        yield Entry(row["model"], label, row["dataset"], setting, row)
        if kind == "numbers" and not notes:
            pca = {"mse": row.get("pca_mse", ""), "probe": row.get("pca_probe", "")}
            yield Entry("", "PCA", row["dataset"], setting, pca)
            yield Entry("", "raw values", row["dataset"], setting, {"probe": row.get("pixels_probe", "")})


def _mean_by_method(prefix: str, column: str) -> Callable[[Mapping[str, Sequence[Row]]], Iterable[Entry]]:
    """Rows of a command: the mean over classes of the median over seeds."""

    def read(files: Mapping[str, Sequence[Row]]) -> Iterable[Entry]:
        groups: dict[tuple[str, ...], dict[str, list[float]]] = {}
        for _, rows in _stems(files, prefix):
            for row in rows:
                if (value := number(row, column)) is not None and not row.get("error"):
                    key = row["dataset"], _budget(row), row["code_size"], row["method"], row["kind"]
                    groups.setdefault(key, {}).setdefault(row.get("class", ""), []).append(value)
        for (data, budget, size, method, kind), values in groups.items():
            # the default score of the command represents the model
            own = method.removesuffix(", deviance") if kind == "ours" else ""
            mean = statistics.mean(map(statistics.median, values.values()))
            setting = _words(("{}", budget), ("codes of {} numbers", size))
            label = method.replace(", ", " by ") if kind == "ours" else method
            yield Entry(own, label, data, setting, {column: repr(mean), "seeds": str(max(map(len, values.values())))})

    return read


def _compress(files: Mapping[str, Sequence[Row]]) -> Iterable[Entry]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for _, rows in _stems(files, "tasks-compress-"):
        for row in rows:
            if row["kind"] != "reference" and number(row, "psnr") and number(row, "bits_per_dim"):
                rate = row["model"] if row["kind"] == "ours" else ""
                groups.setdefault((row["dataset"], _budget(row), row["method"], rate, row["quality"]), []).append(row)
    for (data, budget, method, _, _), rows in groups.items():
        found = {name: repr(statistics.median(number(row, name) or 0 for row in rows)) for name in _RATES}
        own = method if rows[0]["kind"] == "ours" else ""
        yield Entry(own, method, data, budget, {**found, "seeds": str(len(rows))})


_RATES = ("psnr", "bits_per_dim")


def _adbench(files: Mapping[str, Sequence[Row]]) -> Iterable[Entry]:
    for _, rows in _stems(files, "adbench-unsupervised-"):
        sets = {row["dataset"] for row in rows}
        by_detector: dict[str, dict[str, list[float]]] = {}
        for row in rows:
            value = number(row, "auroc")
            by_detector.setdefault(row["detector"], {}).setdefault(row["dataset"], []).append(
                0.5 if value is None or row.get("error") else value
            )
        for name, values in by_detector.items():
            if values.keys() == sets:
                mean = statistics.mean(map(statistics.mean, values.values()))
                label = {"default": "aezoo.sklearn.AutoencoderDetector"}.get(name, name)
                yield Entry(name, label, f"{len(sets)} tables of ADBench", "unsupervised", {"auroc": repr(mean)})


def _merged(prefix: str, setting: Callable[[Row], str]) -> Callable[[Mapping[str, Sequence[Row]]], Iterable[Entry]]:
    def read(files: Mapping[str, Sequence[Row]]) -> Iterable[Entry]:
        from .report import merge_seeds

        for stem, rows in _stems(files, prefix):
            data = re.split(r"-?(?:fp32|bf16)-", stem.removeprefix(prefix))[0] or "synthetic_dictionary"
            for row in merge_seeds(rows):
                if row["seeds"] != "0":
                    yield Entry(row["model"], row["model"], row.get("dataset") or data, setting(row), row)

    return read


TABLES: dict[str, Callable[[Mapping[str, Sequence[Row]]], Iterable[Entry]]] = {
    "quality": _quality,
    "detect": _mean_by_method("tasks-detect-", "auroc"),
    "denoise": _mean_by_method("tasks-denoise-", "psnr"),
    "compress": _compress,
    "adbench": _adbench,
    "disentangle": _merged(
        "disentangle-", lambda row: _words(("{} steps", row["steps"]), ("codes of {} numbers", row["code_size"]))
    ),
    "dictionaries": _merged(
        "dictionaries-",
        lambda row: _words(
            ("{} steps", row["steps"]),
            ("{} atoms", row["atoms"]),
            ("{} dimensions", row["dim"]),
            ("{} active", row["active"]),
            ("correlation {}", row["correlation"]),
        ),
    ),
    "bits": _merged(
        "bits-",
        lambda row: _words(
            ("{}", _budget(row)), ("{} samples", row["rows"]), ("{} bits", f"{number(row, 'bits') or 0:g}")
        ),
    ),
}


def _key(measure: Measure, entry: Entry) -> tuple[str, ...]:
    """The settings that compared entries have in common; densities are comparable only under one likelihood."""
    density = entry.row.get("likelihood", "") if measure.column == "log_likelihood" else ""
    return entry.data, entry.setting, density


def compare(name: str, use: str, measure: Measure, rows: Sequence[Entry]) -> dict[str, Any] | None:
    """A model's figure, and the rivals that have a better one; None without a figure."""
    known = [(entry, value) for entry in rows if (value := number(entry.row, measure.column)) is not None]
    own = [(entry, value) for entry, value in known if entry.model == name]
    if not own:
        return None
    sign = 1 if measure.higher else -1
    groups: dict[tuple[str, ...], list[tuple[Entry, float]]] = {}
    for entry, value in known:
        groups.setdefault(_key(measure, entry), []).append((entry, value))
    # the preferred set, then the comparison with most rivals, then the model's best row
    mine, value = max(
        own, key=lambda pair: (pair[0].data == _PREFERRED, len(groups[_key(measure, pair[0])]), sign * pair[1])
    )
    rivals: dict[str, float] = {}
    bits = number(mine.row, "bits_per_dim")
    for entry, of in groups[_key(measure, mine)]:
        is_larger = measure.table == "compress" and (number(entry.row, "bits_per_dim") or 0) > (bits or 0)
        if entry.label != mine.label and not is_larger:
            rivals[entry.label] = max(of, rivals.get(entry.label, of), key=lambda figure: sign * figure)
    better = sorted((of for of in rivals.items() if sign * of[1] > sign * value), key=lambda of: -sign * of[1])
    at = f"at {bits:.3g} bits/dim or fewer" if measure.table == "compress" and bits else ""
    return {
        "use": use, "measure": measure.name, "value": _rounded(value), "data": mine.data,
        "setting": _words(("{}", mine.setting), ("likelihood {}", _key(measure, mine)[2]), ("{}", at)),
        "better": [[label, _rounded(of)] for label, of in better[:_MOST_NAMED]],
        "n_better": len(better), "n_rivals": len(rivals),
    }  # fmt: skip


def _by_use(name: str, use: str, tables: Mapping[str, Sequence[Entry]]) -> dict[str, Any] | None:
    """The comparison by the first measure of a tag that the model has a figure of."""
    compared = (compare(name, use, measure, tables[measure.table]) for measure in MEASURES.get(use, ()))
    return next((of for of in compared if of), None)


def _row(name: str, rows: Sequence[Entry]) -> dict[str, Any] | None:
    """The figures of a model on the preferred set, at the most frequent code size."""
    sizes = Counter(_key(ERROR, entry) for entry in rows)
    own = [entry for entry in rows if entry.model == name]
    if not own:
        return None
    entry = max(own, key=lambda of: (of.data == _PREFERRED, sizes[_key(ERROR, of)]))
    values = {label: number(entry.row, column) for column, label in ROW_FIGURES.items()}
    kind, _, asked = entry.row.get("budget", "").partition("=")
    epochs = number(entry.row, "epochs") or 0
    if kind == "epochs" and epochs < float(asked) - 0.5:
        values["stopped after {} epochs, as its time was up"] = epochs
    figures = {label: _rounded(value) for label, value in values.items() if value is not None}
    return {"data": entry.data, "setting": entry.setting, "seeds": int(entry.row["seeds"]), "figures": figures}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def figures(files: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """For each model that was measured: its row, and the comparisons by its tags."""
    tables, behind = entries(files), _behind_pca(files)
    found: dict[str, Any] = {}
    for name in [name for name, entry in registry.entries().items() if entry.owner == "aezoo"]:
        kept = [of for use in registry.uses_of(name) if (of := _by_use(name, use, tables))]
        if not kept and (of := compare(name, "reconstruction", ERROR, tables["quality"])):
            kept = [of]
        row = _row(name, tables["quality"])
        if row or kept:
            found[name] = {"row": row, "compared": kept} | ({"pca": behind[name]} if name in behind else {})
    return dict(sorted(found.items()))


def _behind_pca(files: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Any]]:
    """For each model with a larger error than PCA for a confirmed cause: both errors, relative to PCA's, and flags."""
    from .report import zoo_rows

    found = {}
    for row in report_zoo.behind(zoo_rows(files)):
        without = number(row, "without_cause")
        if without is not None and without <= 1:
            cause = CAUSES[row["model"]]
            found[row["model"]] = {
                "data": row["dataset"], "ratio": _rounded(report_zoo.ratio(row) or 0), "cause": cause.words,
                "flags": cause.flags(), "without": _rounded(without),
            }  # fmt: skip
    return found


def text(files: Mapping[str, Sequence[Row]]) -> str:
    """The content of `path()`: one line per model."""
    lines = [f"{json.dumps(name)}: {json.dumps(of, ensure_ascii=False)}" for name, of in figures(files).items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def path() -> Path:
    """The file in the package that `aezoo info` reads."""
    return PACKAGE.parent / "aezoo" / "results.json"
