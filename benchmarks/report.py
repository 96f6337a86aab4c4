"""Turn the CSVs of the benchmarks into RESULTS.md, pages, tables and pictures; none contains hand-written figures.

    python -m benchmarks.report                    benchmarks/results -> benchmarks/RESULTS.md, docs/results,
                                                   aezoo/results.json (the figures of `aezoo info`), the heads of
                                                   recipes, and the tables of README.md and docs/
    python -m benchmarks.report --results DIR      another folder; RESULTS.md and the pages are written into it

Each table stands below the first commands from the head of its CSV. Missing parts are left out with a message.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from aezoo.errors import AezooError

from . import (
    published,
    recipes,
    report_adbench,
    report_detector_papers,
    report_image_anomalies,
    report_info,
    report_pca,
    report_scaling,
    report_tasks,
    report_zoo,
    targets,
)
from .common import PACKAGE, Spread, add_results_flag, base_parser, number, read_csv, run_script
from .report_columns import BITS, DICTIONARIES, DISENTANGLE, GPU, QUALITY, Row, format_number, markdown, spread, words
from .report_sections import SECTIONS, Section, is_of_fixed_budget
from .speed import KEY, count_existing_rows

# columns that are settings, not figures, when rows are merged over seeds
_GROUP = (
    *("dataset", "model", "kind", "size", "code_size", "budget", "batch_size", "probe_rows", "importance_samples"),
    *("most_seconds", "steps", "lr", "atoms", "dim", "active", "correlation", "noise", "samples", "options", "rows"),
    "bits_per_place",
)
# headings of the text that pages are made of, and most bytes of a page
_TOPIC, _PART = "## ", "### "
_MAX_PAGE = 15_000
# commands shown above a table
_MAX_COMMANDS = 4
# columns that are needed to identify a row, by the prefix of a CSV's name
_NEEDED = {
    "peers-": ("party",),
    "quality-": ("dataset", "model", "code_size"),
    "tasks-": ("dataset", "model", "seed", "budget", "code_size", "method", "kind"),
}
# peaks that differ by a larger factor are from a machine in two states
_MAX_PEAK_RATIO = 1.25


def _setting(row: Row) -> tuple[str, ...]:
    """The settings that the seeds of a row share; steps only if they are the budget, a limit only of fixed budgets."""
    free = {"steps"} if row.get("budget") else set()
    free |= set() if is_of_fixed_budget(row) else {"most_seconds"}
    return tuple("" if name in free else row.get(name, "") for name in _GROUP)


def merge_seeds(rows: Sequence[Row]) -> list[Row]:
    """One row for each model, code size and setting: median, lowest and highest of each figure, number of seeds."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_setting(row), []).append(row)
    merged = []
    for group in groups.values():
        good = [row for row in group if not row.get("error")]
        found = dict((good or group)[0])
        for name in [*found]:
            values = [value for row in good if (value := number(row, name)) is not None]
            if values and name not in (*_GROUP, "seed"):
                spread = Spread.from_data(values)
                found |= {name: repr(spread.median), f"{name}_low": repr(spread.low), f"{name}_high": repr(spread.high)}
        failed = [row["error"] for row in group if row.get("error")]
        merged.append(found | {"seeds": str(len(good)), "errors": "; ".join(dict.fromkeys(failed))})
    return sorted(
        merged, key=lambda row: (row.get("dataset", ""), number(row, "mse") or 9e9, -(number(row, "mcc") or 0))
    )


def add_efficiency(rows: Sequence[Row]) -> list[Row]:
    """Rows of a CSV; those of several devices get their scaling efficiency, or the reason why they have none."""

    def setting(row: Row) -> tuple[str, ...]:
        return tuple(row.get(name, "") for name in KEY if name != "devices")

    alone = {setting(row): row for row in rows if row.get("devices") == "1"}
    # values in earlier CSVs may refer to rows that have been replaced since
    none = {"scaling_efficiency": "", "unscaled": ""}
    return [row | none | _efficiency(row, alone.get(setting(row), {})) for row in rows]


def _efficiency(row: Row, one: Row) -> Row:
    devices, rate, base = number(row, "devices") or 1, number(row, "samples_per_s"), number(one, "samples_per_s")
    if devices == 1 or not rate:
        return {}
    if not base:
        return {"unscaled": "no row of one device"}
    if row.get("batch_used") != one.get("batch_used"):
        return {"unscaled": f"one device was measured with a batch of {one.get('batch_used')}"}
    peaks = [number(of, "peak_gflops") or 0 for of in (row, one)]
    if not all(peaks):
        return {"unscaled": "a peak was not measured"}
    # rows are replaced one by one, and a cloud machine may differ from day to day
    if max(peaks) > _MAX_PEAK_RATIO * min(peaks):
        return {"unscaled": f"one device was measured at a peak of {format_number(peaks[1])} GFLOP/s"}
    return {"scaling_efficiency": repr(rate / (devices * base))}


def comparable(rows: Sequence[Row]) -> list[Row]:
    """For each data set, the rows with its most frequent budget and batch, one for each model and code size."""

    def setting(row: Row) -> tuple[str, ...]:
        return row.get("budget", ""), row.get("batch_size", "")

    settings: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        settings.setdefault(row.get("dataset", ""), []).append(setting(row))
    usual = {dataset: max(dict.fromkeys(found), key=found.count) for dataset, found in settings.items()}
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if setting(row) == usual[row.get("dataset", "")]:
            kept.setdefault(tuple(row.get(name, "") for name in ("dataset", "model", "code_size")), row)
    return list(kept.values())


def pages(folder: Path, home: Path) -> tuple[dict[str, str], dict[str, list[Row]]]:
    """The text of each page, by the name of its file in `pages_folder(home)`, and the rows of each CSV by its stem."""
    text, rows = tables(folder, pages_folder(home))
    found = {"targets.md": _page_of(target_table(rows), home)}
    # without text, all CSVs have pages of their own
    for topic in text.split(f"\n\n{_TOPIC}") if text else ():
        intro, *parts = (_TOPIC + topic.removeprefix(_TOPIC)).split(f"\n\n{_PART}")
        for name, chosen in _shares(intro, parts):
            whole = "\n\n".join([intro, *(_PART + part for part in chosen)])
            found[f"{_slug(name)}.md"] = fit(_page_of(whole, home))
    return found | zoo_pages(folder) | adbench_pages(folder, home), rows


def _shares(intro: str, parts: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The name of each page of a topic, with its parts; each command for trained models has its own page."""
    title = intro.partition("\n")[0]
    if title == f"{_TOPIC}Commands for trained models":
        yield from ((part.partition("\n")[0], [part]) for part in parts)
    else:
        yield title, list(parts)


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _page_of(text: str, home: Path) -> str:
    """A page: the topic's title is its heading, and a link leads back to the list of pages."""
    title, _, rest = re.sub(r"^#(#+ )", r"\1", text, flags=re.MULTILINE).partition("\n\n")
    return f"{title}\n\n[All results]({os.path.relpath(home / 'RESULTS.md', pages_folder(home))})\n\n{rest}"


def fit(page: str) -> str:
    """A page with the last lines of its longest tables left out, as many as make it too long."""
    if len(page.encode()) <= _MAX_PAGE:
        return page
    blocks = [block.split("\n") for block in page.split("\n\n")]
    tables = [block for block in blocks if len(block) > 3 and block[0].startswith("| ")]
    lengths = [len(block) for block in tables]
    size = len(page.encode()) + 80 * len(tables)  # with the lines that say so
    while size > _MAX_PAGE and any(len(block) > 3 for block in tables):
        size -= len(max(tables, key=lambda block: sum(map(len, block))).pop().encode()) + 1
    for block, length in zip(tables, lengths, strict=True):
        if length > len(block):
            block += ["", f"The first {len(block) - 2} of {length - 2} lines; the CSV has all."]
    return "\n\n".join("\n".join(block) for block in blocks)


def tables(folder: Path, home: Path) -> tuple[str, dict[str, list[Row]]]:
    """The text of all tables, for a file in `home`, and the rows of each CSV by its stem."""
    read = {path.stem: _read(path) for path in sorted(folder.glob("*.csv"))}
    read = {
        stem: (head, add_efficiency(rows) if stem.startswith("speed-train-") else rows)
        for stem, (head, rows) in read.items()
    }
    # these have a page of their own
    left = {stem: of for stem, of in read.items() if not stem.startswith((report_adbench.PREFIX, "causes-"))}
    parts: list[str] = []
    task_files = {stem: left.pop(stem) for stem in read if stem.startswith("tasks-")}
    for section in SECTIONS:
        stems = [stem for stem in left if stem.startswith(section.prefix)]
        found = {stem: left.pop(stem) for stem in stems}
        if not found and section.prefix:
            print(f"no {section.prefix}*.csv in {folder.name}: {section.title.lower()} left out")
        shown = [
            f"### {stem}\n\n{_table(section, stem, with_row_counts(stem, *content), content[1])}"
            for stem, content in found.items()
            if any(map(section.is_shown, content[1]))
        ]
        if shown:
            parts += ["\n\n".join(filter(None, [f"## {section.title}", section.text])), *shown]
    quality = quality_rows({stem: rows for stem, (_, rows) in read.items()})
    quality = [row for row in quality if is_of_fixed_budget(row)]
    parts += filter(None, [report_pca.section(comparable(quality), quality)])
    if task_files:
        parts.insert(0, report_tasks.section(task_files, folder, home))
    return "\n\n".join(parts), {stem: rows for stem, (_, rows) in read.items()}


def _read(path: Path) -> tuple[list[str], list[Row]]:
    head, rows = read_csv(path)
    if path.stem.startswith(("peers-quality-", "quality-recipes-")):
        return head, rows
    needed = next((columns for prefix, columns in _NEEDED.items() if path.stem.startswith(prefix)), ())
    if missing := [name for name in needed if any(name not in row for row in rows)]:
        raise AezooError(f"cannot read {path}: no column {', '.join(missing)}; measure its rows again, or remove it")
    return head, rows


def with_row_counts(stem: str, commands: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Commands of a CSV; those of the speed benchmark with the number of existing rows, if some are missing."""
    found = re.match(r"speed-(train|infer)-([a-z0-9]+)-", stem)
    if not found:
        return [*commands]
    return [command + _row_count(command, found[1], found[2], rows) for command in commands]


def _row_count(command: str, kind: str, precision: str, rows: Sequence[Row]) -> str:
    try:
        existing, requested = count_existing_rows(command, kind, precision, rows)
    except (AezooError, SystemExit, ValueError):  # an old flag or model, or an unclosed quote
        return "  # how many of its rows are here is not known"
    return "" if existing == requested else f"  # {existing} of {requested} rows"


def zoo_pages(folder: Path) -> dict[str, str]:
    """The pages of the zoo, by the name of their file; empty without converged rows."""
    paths = [*sorted(folder.glob("causes-*.csv")), *sorted(folder.glob("quality-*.csv"))]
    read = {path.stem: _read(path) for path in paths}
    commands: dict[str, list[str]] = {}
    for stem, (head, runs) in read.items():
        if stem.startswith("quality-") and runs and "kind" in runs[0]:
            commands.setdefault(runs[0]["dataset"], []).extend(head)
    return report_zoo.pages(zoo_rows({stem: runs for stem, (_, runs) in read.items()}), commands)


def zoo_rows(files: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Converged rows of all data sets, with the error without the cause of an error above PCA's, see `report_zoo`."""
    causes = [row for stem, runs in files.items() if stem.startswith("causes-") for row in merge_seeds(runs)]
    found: list[Row] = []
    for stem, runs in files.items():
        if stem.startswith("quality-") and runs and "kind" in runs[0]:
            found += report_zoo.zoo_rows(runs, merge_seeds(runs), causes)
    return found


def adbench_pages(folder: Path, home: Path) -> dict[str, str]:
    """The page of anomaly detection on tables, by the name of its file; empty without complete rows."""
    files, place = report_adbench.read(folder), pages_folder(home)
    found = report_adbench.pages(files, folder / "pictures", place)
    if files and not found:
        print(f"no detector has all its rows in {report_adbench.PREFIX}*.csv in {folder.name}: their page is left out")
    return {name: fit(_page_of(f"{_TOPIC}{report_adbench.TITLE}\n\n{text}", home)) for name, text in found.items()}


def home_of(folder: Path) -> Path:
    """Folder of the report on a folder of CSVs: this package for its results, else that folder."""
    return PACKAGE if folder.resolve() == (PACKAGE / "results").resolve() else folder


def pages_folder(home: Path) -> Path:
    """The folder of the pages that a RESULTS.md in `home` lists: docs/results in a checkout."""
    return home.parent / "docs" / "results" if home == PACKAGE else home


def target_table(files: Mapping[str, list[Row]]) -> str:
    """Targets and the measured figures, also with the opposite choice of compiling the zoo's step."""
    rows = []
    for target, stem, found in targets.evaluate_targets(files):
        row = {"what": target.what, "bound": f"{'<=' if target.at_most else '>='} {target.bound:g}", "file": stem}
        if found is not None:
            row |= {"median": repr(found.median), "median_low": repr(found.low), "median_high": repr(found.high)}
            row |= {"note": found.note, "reached": "yes" if target.is_reached(found) else "no"}
        else:
            row |= {"reached": targets.missing_reason(target, files.get(stem, []))}
        own, others = processors([stem], files), processors(files, files, machine_name(stem))
        row |= {"processor": ", ".join(own) or (f"({', '.join(others)})" if stem and others else "")}
        otherwise = target.other_compilation(files[stem]) if stem and target.other_compilation else None
        if otherwise is not None:
            row |= {"otherwise": repr(otherwise.median)}
            row |= {"otherwise_low": repr(otherwise.low), "otherwise_high": repr(otherwise.high)}
        rows.append(row)
    columns = (
        *(words("what", "what"), words("target", "bound"), spread("measured", "median"), words("variant", "note")),
        *(words("reached", "reached"), spread("compiled otherwise", "otherwise"), words("measured in", "file")),
        words("processor", "processor"),
    )
    return (
        "## Targets\n\nMedian (lowest to highest) over the rounds of one run; a ratio is taken within a round. A party "
        "whose losses do not agree is not compared. Compile time is not counted for any party. The zoo's dense step "
        "is compiled, as `--compile auto` does in runs of about 40,000 steps or more. Its convolutional steps are not "
        "compiled, as `--compile auto` does on a CPU. 'Compiled otherwise' shows the opposite choice. The "
        "measurements come from several processors. Older files do not name the processor; the table then shows, in "
        "brackets, the processors of the other files from the same machine. Compare rates only within one file of "
        "peers, or among rows of one command. Variant: which of several variants the figure describes. A negative "
        "share of the fault guard is noise.\n\n" + markdown(columns, rows)
    )


def processors(stems: Iterable[str], files: Mapping[str, list[Row]], on: str | None = None) -> list[str]:
    """Processors named in these CSVs, or only in those from a given machine."""
    kept = [stem for stem in stems if stem in files and on in (None, machine_name(stem))]
    return [*dict.fromkeys(row["processor"] for stem in kept for row in files[stem] if row.get("processor"))]


def _table(section: Section, stem: str, commands: Sequence[str], rows: Sequence[Row]) -> str:
    columns = section.columns or tuple(words(name, name) for name in rows[0])
    rows = shown = [row for row in rows if section.is_shown(row)]
    more = [f"# and {len(commands) - _MAX_COMMANDS} more, in the head of the CSV"] * (len(commands) > _MAX_COMMANDS)
    code = "\n".join(["```bash", *commands[:_MAX_COMMANDS], *more, "```", "", ""]) if commands else ""
    if section.columns in (QUALITY, DISENTANGLE, DICTIONARIES, BITS):
        # errors are comparable only at equal bits
        rows = sorted(merge_seeds(rows), key=lambda row: number(row, "bits_per_place") or 0)
    if GPU in section.columns and "-cpu" not in stem:
        rows = [row | {"gpu": "this row"} for row in rows]
    if section.columns is report_image_anomalies.COLUMNS:
        rows = report_image_anomalies.means(rows)
    if section.columns is report_detector_papers.COLUMNS:
        rows = report_detector_papers.merge_seeds(rows)
    if section.columns is report_scaling.COLUMNS:
        rows = report_scaling.merge_values(rows)
    after = section.after(shown)
    return code + markdown(columns, rows) + (f"\n\n{after}" if after else "")


_HEAD = (
    "# Results\n\n`python -m benchmarks.report` writes this file and its pages from the CSVs in this repository; do "
    "not edit them. The commands that wrote a CSV are above its table. If the rows of a command of "
    "`benchmarks.speed` are incomplete, a note says how many exist. Other commands may also request more rows than "
    "exist, for example for models that were added later. No GPU has been measured yet."
)


def page_list(found: Mapping[str, str], place: str) -> str:
    """Links to the pages, by the titles in them.

    Args:
        found: pages by the name of their file.
        place: their folder, relative to the list.
    """
    heads = {name: re.findall(r"^##? (.+)$", page, flags=re.MULTILINE) for name, page in found.items()}
    titles = [head[0] for head in heads.values()]
    texts = {name: ": ".join([head[0], ", ".join(head[1:])]) for name, head in heads.items()}
    return "\n".join(
        f"- [{texts[name] if titles.count(head[0]) > 1 else head[0]}]({Path(place, name).as_posix()})"
        for name, head in heads.items()
    )


def write_pages(found: Mapping[str, str], pictures: Mapping[Path, str], home: Path) -> None:
    """Write the pages, and RESULTS.md with the list of them and the pictures.

    Raises:
        AezooError: a file cannot be written.
    """
    place = pages_folder(home)
    shown = [f"![{alt}]({os.path.relpath(path, home)})" for path, alt in pictures.items()]
    index = "\n\n".join([_HEAD, page_list(found, os.path.relpath(place, home)), *shown])
    write_texts({home / "RESULTS.md": index} | {place / name: page for name, page in found.items()})
    # the folder contains nothing else
    for path in place.glob("*.md") if place != home else ():
        if path.name not in found:
            path.unlink()


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write files.

    Raises:
        AezooError: a file cannot be written.
    """
    for path, text in texts.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            raise AezooError(f"cannot write {path}: {error.strerror}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report."""
    parser = base_parser("report", __doc__)
    add_results_flag(parser)
    folder: Path = parser.parse_args(argv).results
    if not any(folder.glob("*.csv")):
        raise AezooError(f"no CSV in {folder}: measure first, as by `aezoo benchmark speed`, or give --results DIR")
    home = home_of(folder)
    found, rows = pages(folder, home)
    report_adbench.draw(report_adbench.read(folder), folder / "pictures")
    write_pages(found, draw_pictures(folder, rows), home)
    if home == PACKAGE:
        write_texts({report_info.path(): report_info.text(rows)})
        # after results.json, which the table of docs/choose.md shows
        published.write_heads(max(folder.glob("published-*.csv")))
        recipes.write_tables()
    for what in targets.missed_targets(rows):
        print(f"target not reached: {what}")
    print(home / "RESULTS.md")


def quality_rows(rows: Mapping[str, list[Row]]) -> list[Row]:
    """Medians over seeds of all data sets, of models whose codes are numbers."""
    runs = (part for stem, part in rows.items() if stem.startswith("quality-") and "-recipes-" not in stem)
    merged = [row for part in runs for row in merge_seeds(part) if row["seeds"] != "0"]
    return [row for row in merged if row.get("kind") in (None, "", "numbers")]


def compared_models(folder: Path) -> list[Row]:
    """Medians over seeds of all models in a folder's CSVs of quality, at the most frequent budget of each data set."""
    return comparable(quality_rows({path.stem: _read(path)[1] for path in sorted(folder.glob("quality-*.csv"))}))


def machine_name(stem: str) -> str:
    """The machine name after the number of processors in a CSV's name, if any; see `common.build_parser`."""
    found = re.search(r"-cpu\d+-([a-z0-9]+)$", stem)
    return found[1] if found else ""


def draw_pictures(folder: Path, rows: Mapping[str, list[Row]]) -> dict[Path, str]:
    """Draw the pictures for which there are rows; return files and their descriptions."""
    from . import plots, plots_bits

    bits = [row for stem, part in rows.items() if stem.startswith("bits-") for row in merge_seeds(part)]
    quality = comparable(quality_rows(rows))
    trained = {stem: part for stem, part in rows.items() if stem.startswith("speed-train-")}
    scaling = [
        row | {"precision": stem.split("-")[2], "machine": machine_name(stem)}
        for stem, part in trained.items()
        for row in part
        if row.get("devices") == "1" or row.get("scaling_efficiency")
    ]
    speed = {stem: part for stem, part in rows.items() if re.match(r"peers-(?!quality)[a-z]+\d*-", stem)}
    peers: dict[str, dict[str, list[Row]]] = {"": {}}
    for stem, part in speed.items():
        peers.setdefault(machine_name(stem), {})[stem.removeprefix("peers-")] = part
    description = "training speed of the zoo and of others, as ratios to a compiled loop"
    home, drawn = folder / "pictures", {}
    for name, alt, figure in (
        ("peers", description, plots.peers(peers.pop(""))),
        *((f"peers-{on}", f"{description}, on {on}", plots.peers(part)) for on, part in peers.items()),
        ("pareto", "reconstruction error against training speed", plots.pareto(quality)),
        ("code_size", "reconstruction error against code size, with PCA", plots.code_size(quality)),
        ("bits", "reconstruction error against bits per sample", plots_bits.bits(bits)),
        ("scaling", "training speed against the number of devices", plots.scaling(scaling)),
    ):
        if figure is None:
            print(f"no rows for {name}.png: left out")
            continue
        home.mkdir(parents=True, exist_ok=True)
        figure.savefig(home / f"{name}.png", dpi=150)
        drawn[home / f"{name}.png"] = alt
        print(home / f"{name}.png")
    return drawn


if __name__ == "__main__":
    run_script(main)
