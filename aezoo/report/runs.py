"""The content of a run's folder: settings, metrics, pictures, results of commands, environment and time of training.

Everything is read within limits, because a folder may come from others. What cannot be read becomes a note, so that
a run that was killed, or that an older version wrote, also gets a report.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from aezoo.errors import AezooError
from aezoo.report.diagnosis import Curves
from aezoo.security import json_files, yaml_text

# the file of a fit with facts that are in no other file of its folder
RECORD = "run.json"
_MARKS = ("config.yaml", "hparams.yaml", "metrics.csv", "metrics.jsonl", RECORD, "checkpoints")
# folders of a run that are not results of commands
_OWN = {"best", "checkpoints", "csv", "mlflow", "pictures", "projector", "train", "val", "wandb"}
_MAX_RUNS = 20
_MAX_METRICS, _MAX_TABLE, _MAX_RECORD = 2**26, 2**22, 2**20
_MAX_EPOCH = 10**9
# a longer table has one row per sample, and a few rows are enough
_MAX_ROWS, _FEW_ROWS, _MAX_COLUMNS = 40, 5, 16
# folders of results, tables and pictures in each
_MAX_FILES = 50
# the first bytes of picture files; not SVG, because it may contain scripts
_PICTURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}
# pictures that the report draws itself
_DRAWN = {"curves.png"}
_ORDER = (
    "reconstructions", "samples", "latents", "latent_map", "traversal", "interpolation", "kl_per_dimension", "codebook",
    "filters", "atoms",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A CSV file that a command has written.

    Attributes:
        name: of the file.
        header: names of the columns.
        rows: all of them, or the first few.
        n_rows: how many the file has.
    """

    name: str
    header: list[str]
    rows: list[list[str]]
    n_rows: int


@dataclass(frozen=True)
class Picture:
    """A picture file.

    Attributes:
        path: where it is.
        kind: its media type, by its content.
        size: in bytes.
    """

    path: Path
    kind: str
    size: int

    @property
    def title(self) -> str:
        """Its name in words."""
        return self.path.stem.replace("_", " ").replace("kl ", "KL ")


@dataclass(frozen=True)
class Results:
    """What a command, such as `detect`, has left in the folder of a run.

    Attributes:
        name: of the folder, which is that of the command unless `--out` was given.
        tables: its CSV files.
        pictures: its pictures.
    """

    name: str
    tables: list[Table]
    pictures: list[Picture]


@dataclass
class Run:
    """A run.

    Attributes:
        folder: where it is.
        label: a short name, unique among the runs of a report.
        settings: by the names of the flags, `model.lr`; the name of the model is `model`.
        command: the command that started it, empty if unknown.
        epochs: numbers of epochs, counted from 1.
        metrics: the values of each metric after these epochs; NaN where there is none.
        record: the content of `RECORD`.
        pictures: those of the training.
        results: those of commands.
        finished: whether the fit ended by itself.
        notes: what could not be read.
    """

    folder: Path
    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    epochs: list[int] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    results: list[Results] = field(default_factory=list)
    finished: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> str:
        """The name of its model."""
        return str(self.settings.get("model") or _part(self.record, "model").get("name") or "unknown model")

    @property
    def data(self) -> str:
        """The name of its data; empty if unknown."""
        name, root = self.settings.get("data.name"), self.settings.get("data.root")
        has_root = name in ("array", "folder", "hf", "stream") and isinstance(root, str)
        return f"{name} {root}" if has_root else str(name or "")

    @property
    def fits(self) -> list[dict[str, Any]]:
        """The starts of the run, each with its time, its environment and, unless it was killed, its duration."""
        found = self.record.get("fits")
        return [fit for fit in found if isinstance(fit, dict)] if isinstance(found, list) else []

    @property
    def environment(self) -> dict[str, Any]:
        """The environment of its last start."""
        return _part(self.fits[-1], "environment") if self.fits else {}

    @property
    def size(self) -> dict[str, Any]:
        """Parameters, shape of a sample and of its code, numbers of samples."""
        return {key: value for key, value in _part(self.record, "model").items() if key != "name"}

    @property
    def test(self) -> dict[str, float]:
        """The figures of the test, by their names without `test/`."""
        found = {name: value for name, value in _part(self.record, "test").items() if isinstance(value, int | float)}
        logged = {name: self.last(name) for name in self.metrics if name.startswith("test/")}
        return {name.removeprefix("test/"): float(value) for name, value in {**logged, **found}.items()}

    @property
    def monitor(self) -> str:
        """The metric whose lowest value is best."""
        wanted = str(self.settings.get("checkpoints.monitor") or "val/loss")
        return next((name for name in (wanted, "val/loss", "train/loss") if name in self.metrics), "")

    @property
    def best(self) -> int | None:
        """The index of the best epoch."""
        values = [value if math.isfinite(value) else math.inf for value in self.metrics.get(self.monitor, [])]
        return values.index(min(values)) if values and min(values) < math.inf else None

    def at(self, name: str, index: int | None) -> float:
        """A metric after an epoch, by its index; NaN if there is none."""
        return self.metrics[name][index] if name in self.metrics and index is not None else math.nan

    def last(self, name: str) -> float:
        """The last value of a metric that is finite; NaN if there is none."""
        return next((value for value in reversed(self.metrics.get(name, [])) if math.isfinite(value)), math.nan)

    @property
    def curves(self) -> Curves:
        """What `diagnose` needs."""
        none = [math.nan] * len(self.epochs)
        train, val = (self.metrics.get(name, none) for name in ("train/loss", "val/loss"))
        steps = self.last("step")
        facts: dict[str, Any] = {"steps": int(steps) if math.isfinite(steps) else 0}
        for name, default in vars(Curves((), (), ())).items():
            value = _part(self.record, "curves").get(name)
            if name == "decoded":
                limits = value if isinstance(value, list) and len(value) == 2 else ()
                value = tuple(float(limit) for limit in limits if isinstance(limit, int | float))
                if len(value) == 2:
                    facts[name] = value
            elif name not in ("epochs", "train", "val") and isinstance(value, type(default)):
                facts[name] = value
        return Curves(self.epochs, train, val, **facts)


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of some folders, each read: a run's folder or a file in it, or a folder of runs.

    Raises:
        AezooError: a path is not a run and contains none, or there are too many.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _folders(path)))
    if len(folders) > _MAX_RUNS:
        raise AezooError(f"{len(folders)} runs are too many to compare in one report: give at most {_MAX_RUNS}")
    short = ["/".join(folder.absolute().parts[-2:]) for folder in folders]
    labels = short if len(set(short)) == len(short) else list(map(str, folders))
    return [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]


def _folders(path: Path) -> list[Path]:
    """The folders of runs that a path means."""
    try:
        if path.is_file() and (run := next((at for at in path.absolute().parents[:2] if _is_run(at)), None)):
            return [run]
        if not path.exists():
            raise AezooError(f"{path} does not exist: give the folder of a run, such as runs/vae/0")
        if _is_run(path):
            return [path]
        below = [inner for inner in sorted(path.iterdir(), key=_natural) if inner.is_dir()] if path.is_dir() else []
        if runs := [inner for inner in below if _is_run(inner)]:
            return runs
    except OSError as error:
        raise AezooError(f"cannot read {path}: {error.strerror}; give the folder of a run") from error
    raise AezooError(f"{path} is not a run and contains none: give the folder of a run, such as runs/vae/0")


def _is_run(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in _MARKS)


def _natural(path: Path) -> tuple[int, str]:
    return (int(path.name), "") if path.name.isdecimal() and len(path.name) < 10 else (10**9, path.name)


def read_run(folder: Path, label: str) -> Run:
    """Everything about one run.

    Args:
        folder: where it is.
        label: its name in the report.
    """
    run = Run(folder, label)
    _read_settings(run)
    _read_metrics(run)
    path = folder / RECORD
    if path.is_file():
        try:
            found = json_files.read(path, _MAX_RECORD, RECORD)
            run.record = found if isinstance(found, dict) else {}
        except AezooError as error:
            run.notes.append(str(error))
    run.finished = (folder / "checkpoints" / "finished.json").is_file()
    run.pictures = _pictures(folder / "pictures")
    results = (_results(inner) for inner in _entries(folder))
    run.results = list(islice((found for found in results if found is not None), _MAX_FILES))
    return run


# ---- settings -------------------------------------------------------------------------------------------------------


def _read_settings(run: Run) -> None:
    config = run.folder / "config.yaml"
    path = config if config.is_file() else run.folder / "hparams.yaml"
    try:
        if not path.is_file():
            run.notes.append("no config.yaml: its settings are not known")
            return
        if path.stat().st_size > yaml_text.MAX_BYTES:
            raise AezooError(f"{path.name} is too large")
        text = path.read_text("utf-8", "replace")
        # Lightning writes tuples with a tag that only unsafe loaders read
        content = yaml_text.load(text.replace("!!python/tuple", ""))
    except Exception as error:  # yaml raises its own errors for each kind of mistake
        run.notes.append(f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}")
        return
    if not isinstance(content, dict):
        run.notes.append(f"{path.name} contains no settings")
    elif path == config:
        run.command = next((line[2:] for line in text.splitlines()[:2] if line.startswith("# aezoo fit ")), "")
        run.settings = dict(_flat(content))
    else:
        run.settings = {f"model.{key}": value for key, value in content.items() if not str(key).startswith("_")}


def _flat(settings: dict[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by the names of their flags; a class and its arguments are one thing."""
    for key, value in settings.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and "class_path" in value:
            yield name, str(value["class_path"]).rpartition(".")[2]
            arguments = value.get("init_args")
            yield from _flat(arguments, f"{name}.") if isinstance(arguments, dict) else ()
        elif isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


# ---- metrics --------------------------------------------------------------------------------------------------------


def _read_metrics(run: Run) -> None:
    by_epoch: dict[int, dict[str, float]] = {}
    for name, read in (("metrics.csv", _csv_rows), ("csv/metrics.csv", _csv_rows), ("metrics.jsonl", _json_rows)):
        path = run.folder / name
        if by_epoch or not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                content = file.read(_MAX_METRICS + 1)
        except OSError as error:
            run.notes.append(f"{name} cannot be read: {error.strerror}")
            continue
        if len(content) > _MAX_METRICS:
            run.notes.append(f"only the first {_MAX_METRICS // 2**20} MiB of {name} are read")
        for row in read(content[:_MAX_METRICS].decode("utf-8", "replace")):
            epoch = _number(row.get("epoch"))
            if 0 <= epoch < _MAX_EPOCH:
                # other loggers write training and validation of an epoch, or its steps, in several lines
                found = {str(key): _number(value) for key, value in row.items() if key and value not in (None, "")}
                by_epoch.setdefault(int(epoch), {}).update(found)
    run.epochs = [epoch + 1 for epoch in sorted(by_epoch)]
    names = dict.fromkeys(name for row in by_epoch.values() for name in row)
    for name in names:
        # a metric that is logged for each step and each epoch has a name for both
        plain = name.removesuffix("_epoch")
        if name != "epoch" and not (name.endswith("_step") and f"{name[:-5]}_epoch" in names):
            run.metrics[plain] = [by_epoch[epoch].get(name, math.nan) for epoch in sorted(by_epoch)]
    if not run.epochs:
        run.notes.append("no metrics.csv with an epoch: there are no curves")


def _csv_rows(text: str) -> Iterator[dict[str, Any]]:
    try:
        # the last line of a killed run may be incomplete
        for row in csv.DictReader(io.StringIO(text.replace("\0", "").rpartition("\n")[0])):
            if None not in row.values():
                yield row
    except csv.Error:
        return  # for example a cell that is too long; the rows before it are kept


def _json_rows(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _part(record: dict[str, Any], key: str) -> dict[str, Any]:
    found = record.get(key)
    return found if isinstance(found, dict) else {}


# ---- pictures and tables --------------------------------------------------------------------------------------------


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _pictures(folder: Path) -> list[Picture]:
    found = []
    for path in _entries(folder):
        try:
            if not path.is_file() or path.name in _DRAWN or path.name.startswith("."):
                continue
            with path.open("rb") as file:
                start = file.read(12)
            kind = next((kind for mark, kind in _PICTURES.items() if start.startswith(mark)), None)
            kind = "image/webp" if start[:4] == b"RIFF" and start[8:] == b"WEBP" else kind
            if kind is not None:
                found.append(Picture(path, kind, path.stat().st_size))
        except OSError:
            continue
    places = {name: i for i, name in enumerate(_ORDER)}

    def place(picture: Picture) -> int:
        return next((at for name, at in places.items() if picture.path.stem.startswith(name)), len(places))

    return sorted(found, key=place)[:_MAX_FILES]


def _results(folder: Path) -> Results | None:
    if folder.name in _OWN or folder.name.startswith(".") or not folder.is_dir():
        return None
    files = [path for path in _entries(folder) if path.suffix == ".csv"][:_MAX_FILES]
    tables = [table for path in files if (table := _table(path)) is not None]
    # tables with few rows come first
    tables.sort(key=lambda table: table.n_rows > _MAX_ROWS)
    pictures = _pictures(folder)
    return Results(folder.name, tables, pictures) if tables or pictures else None


def _table(path: Path) -> Table | None:
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            content = file.read(_MAX_TABLE)
            rest = file.read(1)
        lines = csv.reader(io.StringIO(content.decode("utf-8", "replace").replace("\0", "")))
        header = next(lines, [])
        rows = list(islice(lines, _MAX_ROWS + 1))
        n_rows = len(rows) + sum(1 for _ in lines)
    except (OSError, csv.Error):
        return None
    if not header:
        return None
    shown = rows if n_rows <= _MAX_ROWS and not rest else rows[:_FEW_ROWS]
    return Table(path.name, header[:_MAX_COLUMNS], [row[:_MAX_COLUMNS] for row in shown], n_rows)
