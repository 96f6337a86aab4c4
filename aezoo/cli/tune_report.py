"""Files about a study: `trials.csv`, and `study.html` with the plots of optuna."""

import csv
import html
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning

from aezoo.io import atomic_files
from aezoo.tasks.result_store import spreadsheet_cell

CURE = "free disk space, or choose a writable folder with --study"
_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222;
  background: #fff }
th { text-align: left; font-weight: 600; padding-right: 2em; vertical-align: top }
.note { color: #666 }
"""
# the page does not use the network
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def write_table(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file.

    Raises:
        AezooError: it cannot be written.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(head)
    table.writerows([spreadsheet_cell(cell) for cell in row] for row in rows)
    content = text.getvalue().encode("utf-8", "backslashreplace")
    atomic_files.write(path, lambda file: file.write(content), cure=CURE)


def write_page(path: Path, study: optuna.Study, monitor: str, facts: dict[str, str]) -> None:
    """Write a page with optuna's plots of a study, which opens without a network.

    Args:
        path: the file.
        study: the study.
        monitor: the metric.
        facts: the table above the plots, by name.

    Raises:
        AezooError: it cannot be written.
    """
    head = "\n".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
                     for name, text in facts.items())  # fmt: skip
    body, script = [], True
    for title, plot, arguments in _plots(study, monitor):
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", ExperimentalWarning)
            try:
                figure = plot(study, **arguments)
            except (ValueError, RuntimeError) as error:
                content = _note(error)
            else:
                # the library is included once, with the first plot
                content = figure.to_html(full_html=False, include_plotlyjs=script, config={"displaylogo": False})
                script = False
        remarks = "".join(_note(note.message) for note in notes)
        body.append(f"<h2>{html.escape(title)}</h2>\n{remarks}{content}")
    title = html.escape(f"Study {study.study_name}")
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<style>\n{_STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{title}</h1>\n<table>\n{head}\n</table>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )
    written = page.encode("utf-8", "backslashreplace")
    atomic_files.write(path, lambda file: file.write(written), cure=CURE)


def _note(message: object) -> str:
    return f'<p class="note">{html.escape(" ".join(str(message).split()))}</p>\n'


def _plots(study: optuna.Study, monitor: str) -> list[tuple[str, Any, dict[str, Any]]]:
    from optuna import visualization

    named = {"target_name": monitor}
    return [
        ("History", visualization.plot_optimization_history, named),
        ("Importance of the settings", visualization.plot_param_importances, named),
        ("All settings", visualization.plot_parallel_coordinate, named),
        ("Each setting", visualization.plot_slice, named),
        ("Epochs", visualization.plot_intermediate_values, {}),
    ]
