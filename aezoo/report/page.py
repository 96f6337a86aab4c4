"""The page: one HTML file without scripts that loads nothing, in light and dark, narrow and wide, and on paper.

Names of files, classes and columns are not trusted, so every text is escaped by `text`, and a policy in the page
only allows the style sheet and embedded pictures.
"""

import ast
import base64
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import aezoo
from aezoo import registry
from aezoo.errors import AezooError
from aezoo.report import explain
from aezoo.report.charts import Line, chart
from aezoo.report.explain import UNITS, number
from aezoo.report.markup import text
from aezoo.report.runs import Picture, Results, Run, Table

# what is embedded of pictures: of one, and in all
_MAX_PICTURE, _MAX_PICTURES = 2**21, 2**24
# more would fill the page
_MAX_CHARTS = 60
# colours in the style sheet; of more runs, those after them repeat with a dash
_N_COLOURS = 7
# settings of the training, in addition to those of the model
_MAIN = (
    "data.name", "data.root", "data.batch_size", "data.scale", "data.binarise", "data.val_fraction",
    "data.test_fraction", "data.seed", "trainer.max_epochs", "trainer.max_steps", "trainer.precision",
    "trainer.devices", "trainer.accumulate_grad_batches", "trainer.gradient_clip_val", "early_stopping.patience",
    "compile", "speed", "seed_everything",
)  # fmt: skip
# settings that change no result
_QUIET = ("logger", "name", "trainer.default_root_dir", "progress.", "dashboard.", "report.")
_TILES = ("val/mse", "val/psnr", "val/bits_per_dim")

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _style_sheet() -> str:
    return Path(__file__).with_name("style.css").read_text("utf-8")


def page(runs: Sequence[Run]) -> str:
    """The report of one run, or the comparison of several."""
    single = runs[0] if len(runs) == 1 else None
    title = _title(single) if single else f"Comparison of {len(runs)} runs"
    parts = [
        ("results", "Results", _run_results(single) if single else _comparison(runs)),
        ("curves", "Curves", _curves(runs)),
        ("pictures", "Pictures", _pictures(runs)),
        ("commands", "Results of commands", _results(runs)),
        ("settings", "Settings", _settings(runs)),
        ("time", "Time and environment", _environment(runs)),
    ]
    parts = [part for part in parts if part[2]]
    notes = [f"{run.label}: {note}" for run in runs for note in run.notes]
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{content}</section>\n' for key, name, content in parts)
    about = f"{text(single.label)} · {text(_state(single))}" if single else text(", ".join(run.label for run in runs))
    links = "".join(f'<a href="#{key}">{name}</a> ' for key, name, _ in parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{text(title)}</title><link rel="icon" href="data:,">\n<style>{_style_sheet()}</style></head>\n'
        f'<body><header><h1>{text(title)}</h1><p class="light">{about}</p><nav>{links}</nav></header>\n<main>{body}'
        f"{_list(notes) and '<h2>Notes</h2>' + _list(notes)}</main>\n"
        f'<footer class="light"><p>Written by aezoo {text(aezoo.__version__)}.</p></footer></body></html>\n'
    )


# ---- results --------------------------------------------------------------------------------------------------------


def _title(run: Run) -> str:
    return f"{run.model} on {run.data}" if run.data else run.model


def _state(run: Run) -> str:
    fit = run.fits[-1] if run.fits else {}
    started = str(fit.get("started", ""))[:16].replace("T", " ")
    words = {"finished": "finished", "interrupted": "interrupted", "failed": "ended by an error"}
    ended = words.get(str(fit.get("end")), "finished" if run.finished else "stopped before its end, or still running")
    return f"{f'started {started} UTC, ' if started else ''}{ended}"


def _run_results(run: Run) -> str:
    tiles = []
    if run.best is not None:
        epoch = f"epoch {run.epochs[run.best]} of {run.epochs[-1]}, the best"
        tiles.append(
            (f"{run.monitor}, {_unit(run.monitor)}".rstrip(", "), number(run.at(run.monitor, run.best)), epoch)
        )
        tiles += [
            (_with_unit(name), number(run.at(name, run.best)), "at that epoch")
            for name in _TILES if not math.isnan(run.at(name, run.best))
        ]  # fmt: skip
    if "loss" in run.test:
        tiles.append((_with_unit("test/loss"), number(run.test["loss"]), "of the best weights"))
    cells = "".join(f"<div>{text(a)}<b>{text(b)}</b><span class=light>{text(c)}</span></div>" for a, b, c in tiles)
    command = f"<p>The command that started it:</p><pre>{text(run.command)}</pre>" if run.command else ""
    names = dict.fromkeys(
        [name.partition("/")[2] for name in run.metrics if name.startswith(("train/", "val/"))] + list(run.test)
    )
    rows = [
        [text(name), *(number(value) for value in (run.at(f"train/{name}", run.best), run.at(f"val/{name}", run.best),
         run.last(f"train/{name}"), run.last(f"val/{name}"), run.test.get(name, math.nan))), text(_unit(name))]
        for name in sorted(names, key=lambda name: (name != "loss", name))
    ]  # fmt: skip
    header = ["metric", "train, best epoch", "val, best epoch", "train, last epoch", "val, last epoch", "test", "unit"]
    table = _table(header, rows, numbers=range(1, 6)) if rows else ""
    return f"{f'<div class=tiles>{cells}</div>' if cells else ''}{command}{table}"


def _comparison(runs: Sequence[Run]) -> str:
    header = ["", "run", "model", "data", "best epoch", "val/loss", "gap", "val/mse", "test/loss", "test/mse",
              "parameters", "samples/s", "time"]  # fmt: skip
    rows = [
        [
            str(i), text(run.label), text(run.model), text(run.data),
            "–" if run.best is None else f"{run.epochs[run.best]} of {run.epochs[-1]}",
            number(run.at("val/loss", run.best)), number(explain.gap(run)),
            number(run.at("val/mse", run.best)), number(run.test.get("loss", math.nan)),
            number(run.test.get("mse", math.nan)), _count(run.size.get("parameters")), _rate(run),
            _seconds(_duration(run)),
        ]
        for i, run in enumerate(runs, 1)
    ]  # fmt: skip
    notes = ["Losses and their gap are in nats per sample."]
    if len({run.data for run in runs}) > 1:
        notes.append("The runs are trained on different data, so their figures are not comparable.")
    elif len({str(run.settings.get("model.likelihood")) for run in runs}) > 1:
        notes.append(
            "The models have different likelihoods, so their losses are not comparable; mean squared errors (mse) are."
        )
    commands = "\n".join(f"{i}  {text(run.command)}" for i, run in enumerate(runs, 1) if run.command)
    began = f"<p>The commands that started them:</p><pre>{commands}</pre>" if commands else ""
    paragraphs = "".join(f"<p>{note}</p>" for note in notes)
    return f"{_table(header, rows, numbers=range(4, 13))}{paragraphs}{began}"


def _with_unit(name: str) -> str:
    return f"{name}, {_unit(name)}" if _unit(name) else name


def _unit(name: str) -> str:
    return UNITS.get(name.rpartition("/")[2], "")


# ---- curves ---------------------------------------------------------------------------------------------------------


def _curves(runs: Sequence[Run]) -> str:
    single = len(runs) == 1
    names = dict.fromkeys(name for run in runs for name in run.metrics if name.startswith(("train/", "val/")))
    # the loss, its terms, and then metrics of validation only
    terms = sorted(
        {name.partition("/")[2] for name in names},
        key=lambda term: (term != "loss", not {f"train/{term}", f"val/{term}"} <= names.keys(), term),
    )
    charts = ""
    for term in terms[:_MAX_CHARTS]:
        lines = [line for i, run in enumerate(runs) for line in _lines(run, term, i, single)]
        unit = f", {_unit(term)}" if _unit(term) else ""
        svg, cut = chart(lines, f"{term} of each epoch")
        if svg:
            outside = ' <span class="light">(the first epochs lie outside)</span>' if cut else ""
            charts += f"<figure><figcaption><b>{text(term)}</b>{text(unit)}{outside}</figcaption>{svg}</figure>"
    if single:
        sentences = _list(explain.explain(runs[0]))
        keys = _key("c1 train", "training") + _key("c0", "validation; the dot is the best epoch")
    else:
        sentences = "".join(
            f"<h3>{i} · {text(run.label)}</h3>{_list(explain.explain(run))}" for i, run in enumerate(runs, 1)
        )
        keys = "".join(_key(_style(i), f"{i + 1} · {run.label}") for i, run in enumerate(runs))
        keys += _key("c6 train", "dashed: training; solid: validation")
    if not charts:
        return sentences
    figures = f'<p>{keys}</p><div class="charts">{charts}</div>'
    return f"{sentences}{figures}" if single else f"{figures}{sentences}"


def _lines(run: Run, term: str, place: int, single: bool) -> list[Line]:
    found = []
    for stage in ("train", "val"):
        name = f"{stage}/{term}"
        if name in run.metrics:
            style = ("c1" if stage == "train" else "c0") if single else _style(place)
            # a metric that exists only for training is drawn without dashes
            beside = stage == "train" and f"val/{term}" in run.metrics
            title, marked = f"{name} of {run.label}", run.best if name == run.monitor else None
            style, label = style + " train" * beside, "" if single or beside else str(place + 1)
            found.append(Line(run.epochs, run.metrics[name], style, title, marked, label))
    return found


def _style(place: int) -> str:
    return f"c{place % _N_COLOURS}{' more' * (place >= _N_COLOURS)}"


def _key(style: str, words: str) -> str:
    line = '<svg viewBox="0 0 32 12" aria-hidden="true"><path d="M1 6H31"/></svg>'
    return f'<span class="key {style}">{line}{text(words)}</span> '


# ---- pictures and tables --------------------------------------------------------------------------------------------


class _Budget:
    """The bytes that may still be embedded, so that a browser can open the page."""

    def __init__(self, n_runs: int) -> None:
        self.left = _MAX_PICTURES
        self.each = min(_MAX_PICTURE, 2 * _MAX_PICTURES // n_runs)

    def figure(self, picture: Picture, caption: str, where: str) -> str:
        """A picture, or where it is if it is too large."""
        words = text(caption)
        if picture.size > min(self.each, self.left):
            return (
                f"<figure><figcaption>{words}: {picture.size / 2**20:.1f} MiB, in {text(where)}</figcaption></figure>"
            )
        try:
            with picture.path.open("rb") as file:
                content = file.read(self.each)
        except OSError:
            return ""
        self.left -= len(content)
        source = f"data:{picture.kind};base64,{base64.b64encode(content).decode()}"
        return f'<figure><figcaption>{words}</figcaption><img src="{source}" alt="{words}"></figure>'


def _pictures(runs: Sequence[Run]) -> str:
    budget, single = _Budget(len(runs)), len(runs) == 1
    by_title: dict[str, list[tuple[int, Run, Picture]]] = {}
    for i, run in enumerate(runs, 1):
        for picture in run.pictures:
            by_title.setdefault(picture.title, []).append((i, run, picture))
    found = ""
    for title, shown in by_title.items():
        figures = "".join(
            budget.figure(
                picture, title if single else f"{i} · {run.label}", f"{run.label}/pictures/{picture.path.name}"
            )
            for i, run, picture in shown
        )
        found += figures if single else f'<h3>{text(title)}</h3><div class="pictures">{figures}</div>'
    return f'<div class="pictures">{found}</div>' if single and found else found


def _results(runs: Sequence[Run]) -> str:
    budget, names = _Budget(len(runs)), dict.fromkeys(result.name for run in runs for result in run.results)
    found = ""
    for name in names:
        found += f"<h3>{text(name)}</h3>"
        for i, run in enumerate(runs, 1):
            for result in run.results:
                if result.name == name:
                    heading = "" if len(runs) == 1 else f"<p><b>{i} · {text(run.label)}</b></p>"
                    found += heading + _result(result, run, budget)
    return found


def _result(result: Results, run: Run, budget: _Budget) -> str:
    tables = "".join(_csv(table) for table in result.tables)
    figures = "".join(
        budget.figure(picture, picture.title, f"{run.label}/{result.name}") for picture in result.pictures
    )
    return tables + (f'<div class="pictures">{figures}</div>' if figures else "")


def _csv(table: Table) -> str:
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    numbers = [i for i in range(len(table.header)) if rows and all(_is_number(row[i : i + 1]) for row in table.rows)]
    shown = _table(table.header, rows, numbers)
    if table.n_rows == len(rows):
        return f"{shown}"
    words = f"{text(table.name)}: the first {len(rows)} of {table.n_rows:,} rows"
    return f"<details><summary>{words}</summary>{shown}</details>"


def _is_number(cell: list[str]) -> bool:
    try:
        return bool(cell) and (not cell[0] or float(cell[0]) is not None)
    except ValueError:
        return False


def _cell(cell: str) -> str:
    if not _is_number([cell]) or not cell or cell.lstrip("-").isdecimal():
        return text(cell)
    return number(float(cell))


# ---- settings and environment ---------------------------------------------------------------------------------------


def _settings(runs: Sequence[Run]) -> str:
    runs = [run for run in runs if run.settings]
    if len(runs) != 1:
        return _differing(runs)
    run, defaults = runs[0], _defaults(runs[0].model)
    main = [name for name in run.settings if name.startswith("model.")]
    main += [name for name in _MAIN if run.settings.get(name) is not None]
    rows = []
    for name in main:
        value, default = _value(run.settings[name]), defaults.get(name, "")
        changed = name in defaults and value != default
        rows.append(
            [text(name), f"<span class=changed>{text(value)}</span>" if changed else text(value), text(default)]
        )
    others = [[text(name), text(_value(value))] for name, value in run.settings.items() if name not in main]
    rest = f"<details><summary>{len(others)} more settings</summary>{_table(['setting', 'value'], others)}</details>"
    known = "<p>Values in bold are not the model's defaults.</p>" if defaults else ""
    return f"{_table(['setting', 'value', 'default'], rows)}{known}{rest if others else ''}"


def _differing(runs: Sequence[Run]) -> str:
    """The settings in which runs differ."""
    defaults = [_defaults(run.model) for run in runs]
    names = dict.fromkeys(name for run in runs for name in run.settings if not name.startswith(_QUIET))
    rows = []
    for name in names:
        values = [_value(run.settings[name]) if name in run.settings else None for run in runs]
        # a model may not have a setting; other missing values are only not recorded
        lacking = None in values and not name.startswith("model.")
        if len({*values} - ({None} if lacking else set())) > 1:
            cells = [
                '<span class="light">–</span>' if value is None else
                f'{text(value)} <span class="light">(default)</span>' if known.get(name) == value else text(value)
                for value, known in zip(values, defaults, strict=True)
            ]  # fmt: skip
            rows.append([text(name), *cells])
    if not runs:
        return ""
    if not rows:
        return "<p>All settings are the same.</p>"
    return "<p>Only the settings that differ; – where a run has no such setting.</p>" + _table(
        ["setting", *_heads(runs)], rows
    )


def _defaults(model: str) -> dict[str, str]:
    """The defaults of a model's arguments, as texts of `_value`; empty if the model is not installed."""
    try:
        parameters = registry.card(model).parameters
    except AezooError:
        return {}
    return {f"model.{name}": _value(_literal(default)) for name, _, default, _ in parameters if default}


def _literal(source: str) -> Any:
    """The value of a default in a program's text, or that text."""
    try:
        return ast.literal_eval(source)
    except (ValueError, SyntaxError):
        return source


def _value(value: Any) -> str:
    return "none" if value is None else str(list(value)) if isinstance(value, tuple) else str(value)


def _environment(runs: Sequence[Run]) -> str:
    facts = [_facts(run) for run in runs]
    names = dict.fromkeys(name for found in facts for name in found)
    rows = [[text(name), *(text(found.get(name, "–")) for found in facts)] for name in names]
    return _table(["", *([""] if len(runs) == 1 else _heads(runs))], rows) if rows else ""


def _facts(run: Run) -> dict[str, str]:
    found: dict[str, str] = {}
    if (rate := _rate(run)) != "–":
        found["training samples/s, median of the epochs"] = rate
    seconds = _duration(run)
    if not math.isnan(seconds):
        found["time of the fit"] = _seconds(seconds)
        epochs = sum(int(_finite(fit.get("epochs"))) for fit in run.fits if "seconds" in fit)
        if epochs:
            found["time of an epoch, with validation and files"] = _seconds(seconds / epochs)
    elif run.fits:
        found["time of the fit"] = "not known, as it did not end"
    if len(run.fits) > 1:
        found["starts"] = f"{len(run.fits)}, of which {sum('seconds' in fit for fit in run.fits)} were not killed"
    steps = run.curves.steps
    found |= {"optimiser steps": f"{steps:,}"} if steps else {}
    found |= {key.replace("_", " "): _shape(value) for key, value in run.size.items()}
    found |= {key.replace("_", " "): str(value) for key, value in run.environment.items()}
    if "seed_everything" in run.settings:
        found["seed"] = str(run.settings["seed_everything"])
    return found


def _duration(run: Run) -> float:
    """Seconds of all starts that were not killed; NaN if none has."""
    known = [_finite(fit["seconds"]) for fit in run.fits if "seconds" in fit]
    return sum(known) if known else math.nan


def _rate(run: Run) -> str:
    values = sorted(value for value in run.metrics.get("train/samples_per_s", []) if math.isfinite(value))
    return f"{values[len(values) // 2]:,.0f}" if values else "–"


def _seconds(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def _shape(value: Any) -> str:
    return (
        " × ".join(map(str, value))
        if isinstance(value, list)
        else _count(value)
        if isinstance(value, int)
        else str(value)
    )


# ---- HTML -----------------------------------------------------------------------------------------------------------


def _heads(runs: Sequence[Run]) -> list[str]:
    return [run.label for run in runs]


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table.

    Args:
        header: texts.
        rows: cells of HTML, the first of each row its name.
        numbers: columns that are aligned to the right.
    """
    right = {*numbers}
    width = max([len(header), *map(len, rows)])

    def row(cells: Sequence[str], tag: str) -> str:
        cells = [*cells, *[""] * (width - len(cells))]
        found = []
        for i, cell in enumerate(cells):
            kind = "th scope=row" if tag == "td" and i == 0 else "th scope=col" if tag == "th" and cell else tag
            kind = "td" if tag == "th" and not cell else kind
            found.append(f"<{kind}{' class=n' * (i in right)}>{cell}</{kind.split()[0]}>")
        return f"<tr>{''.join(found)}</tr>"

    head = f"<thead>{row(list(map(text, header)), 'th')}</thead>" if any(header) else ""
    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'
