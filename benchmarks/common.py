"""Code that the benchmarks share: file names with the settings of the measurement, and CSVs that can be continued.

torch is imported only where it is needed, so that a script that only reads its arguments is fast.
"""

import argparse
import contextlib
import csv
import math
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aezoo.errors import AezooError

if TYPE_CHECKING:
    from aezoo import DataModule

PACKAGE = Path(__file__).parent
# `benchmarks` in a checkout, `aezoo.benchmarks` in a wheel: the name for `python -m`, and the folder that contains it
NAME = __name__.rpartition(".")[0]
ROOT = PACKAGE.parents[NAME.count(".")]
RERUN_CHOICES = ("all", "failed")


def results_folder() -> Path:
    """`benchmarks/results` in a checkout; for an installed package, a folder in the current directory."""
    return PACKAGE / "results" if (PACKAGE.parent / "pyproject.toml").is_file() else Path("benchmark-results")


def environment(
    arguments: argparse.Namespace | None = None, precision: str = "fp32", accelerator: str | None = None
) -> str:
    """The settings that a number depends on, for a file name: precision, torch's version, cores or GPU, and machine.

    Args:
        arguments: the parsed arguments of `build_parser`: the machine's name, and the accelerator if there is a flag.
        precision: fp32 or bf16.
        accelerator: a fixed accelerator that the user cannot choose.

    Raises:
        AezooError: the accelerator is not available; otherwise the CSV of the CPU would get rows with its errors.
    """
    import torch

    accelerator = accelerator or getattr(arguments, "accelerator", "auto")
    version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    device = f"cpu{os.cpu_count()}"
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    elif accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        device = "mps"
    elif accelerator not in ("auto", "cpu"):
        raise AezooError(f"--accelerator {accelerator}: torch finds none on this machine; use cpu, or auto")
    return "-".join(filter(None, [precision, f"pt{version}", device, getattr(arguments, "machine", None)]))


def processor_name() -> str:
    """The name of this machine's processor with its family and model; a cloud may name only a class of processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    numbers = [f"{name} {found[name]}" for name in ("cpu family", "model") if name in found]
    return " ".join([found.get("model name", platform.machine()), *numbers])


def base_parser(script: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, with commands written as the script was called."""
    caller = Path(sys.argv[0])
    called = "aezoo benchmark " if "aezoo" in (caller.stem, caller.parent.name) else f"python -m {NAME}."
    summary, _, usage = (doc or "").partition("\n")
    return argparse.ArgumentParser(
        prog=called + script,
        description=summary,
        epilog=usage.replace("python -m benchmarks.", called),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # `command_line` does not recognise abbreviated flags
        allow_abbrev=False,
    )


def build_parser(script: str, doc: str | None) -> argparse.ArgumentParser:
    """A `base_parser` with the flags that all measuring scripts share."""
    parser = base_parser(script, doc)
    add_results_flag(parser)
    parser.add_argument(
        "--machine",
        type=_machine,
        metavar="NAME",
        help="a name for this processor, such as zen4, at the end of the file's name (default: only its cores)",
    )
    add_again_flag(parser)
    return parser


def add_again_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag of scripts that keep existing rows."""
    parser.add_argument(
        "--again",
        nargs="?",
        const="all",
        choices=RERUN_CHOICES,
        help="measure existing rows again: all that are asked for (the default), or those that failed",
    )


def add_results_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag of scripts that write or read CSVs."""
    folder = results_folder()
    text = f"folder of the CSVs; by default {folder}"
    parser.add_argument("--results", type=Path, default=folder, metavar="DIR", help=text)


def add_run_flags(
    parser: argparse.ArgumentParser, unit: str, timeout: int, seeds: int = 3, accelerator: str | None = None
) -> None:
    """Add the flags of scripts that train models with several seeds, each `unit` in its own process.

    Args:
        parser: what the flags are added to.
        unit: what one process does.
        timeout: default of `--timeout`, in seconds.
        seeds: default of `--seeds`.
        accelerator: a fixed accelerator that the user cannot choose.
    """
    add, count = parser.add_argument, at_least(1)
    text = f"runs of each model, with seeds 0 to N - 1 (default {seeds})"
    add("--seeds", type=count, default=seeds, metavar="N", help=text)
    if accelerator:
        parser.set_defaults(accelerator=accelerator)
    else:
        add("--accelerator", default="auto", help="auto, cpu, gpu or mps")
    add(
        "--jobs", type=count, default=1, help=f"{unit}s in parallel; each gets its share of the cores, or a GPU in turn"
    )
    text = f"give up a {unit} after this many seconds (default {timeout})"
    add("--timeout", type=seconds, default=float(timeout), help=text)


def _machine(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} must consist of lowercase letters and digits")
    return text


def at_least(minimum: int) -> Callable[[str], int]:
    """A flag's type: a whole number of at least `minimum`."""

    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return parse


def seconds(text: str) -> float:
    """A flag's type: a number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def download_data(
    name: str, root: str, batch_size: int, size: int | None = None
) -> tuple["DataModule", dict[str, Any]]:
    """Download a data set once, before several processes use it; return it and the arguments that open it.

    Paths are absolute because each row is measured in a separate folder.
    """
    from aezoo import DataModule
    from aezoo.data.source_registry import source_of_path

    paths = {"name": _absolute(name) if source_of_path(name) else name, "root": _absolute(root)}
    options: dict[str, Any] = {**paths, "batch_size": batch_size, "size": size}
    data = DataModule(**options)
    data.prepare_data()
    return data, options


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; errors that the user can fix are printed as one line, as in the command line."""
    try:
        main()
    except AezooError as error:
        print(f"aezoo: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def command_line(
    script: str, argv: Sequence[str], left_out: Sequence[str] = (), folders: Sequence[str] = ("--root",)
) -> str:
    """The command for a CSV's head: what the rows measure, without the output folder and --again.

    Args:
        script: its name.
        argv: its arguments.
        left_out: further flags that are left out with their values, such as folders of this machine.
        folders: flags for whose values FOLDER stands, as they are folders of this machine.
    """
    without = {"--results", *left_out}
    kept: list[str] = []
    before = ""
    for word in argv:
        flag, equals, _ = word.partition("=")
        is_value = before in without or (before == "--again" and word in RERUN_CHOICES)
        if not is_value and flag not in {"--again", *without}:
            hidden = word if before not in folders else "FOLDER"
            kept.append(f"{flag}=FOLDER" if equals and flag in folders else hidden)
        before = word
    return shlex.join(["python", "-m", f"{NAME}.{script}", *kept])


class Spread(NamedTuple):
    """Median, lowest and highest of repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def from_data(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def interleaved_medians(functions: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median of the values that each function returns, such as seconds; the first turn, a warm-up, does not count."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(1 + repeats):
        for name, function in functions.items():
            value = function()
            if turn:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def as_text(value: object) -> str:
    """The text of a cell: numbers with five significant digits, empty for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        text = f"{value:.5g}"
        return f"{value:.0f}" if "e+" in text and abs(value) < 1e15 else text
    return " ".join(str(value).split())


def as_number(text: str) -> float | None:
    """The text of a cell as a number, or None."""
    try:
        return float(text)
    except ValueError:
        return None


def number(row: Mapping[str, str], name: str) -> float | None:
    """A cell as a number, or None."""
    return as_number(row.get(name, ""))


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Commands at the head of a CSV, and its rows.

    Raises:
        AezooError: the file cannot be read as one.
    """
    try:
        # some spreadsheets write a byte order mark first
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AezooError(f"cannot read {path} as CSV ({error}): fix or remove it") from error
    if any(None in row or None in row.values() for row in rows):
        raise AezooError(f"cannot read {path} as CSV: a row has more or fewer cells than the head; fix or remove it")
    mark = "# command: "
    return [line.removeprefix(mark) for line in lines if line.startswith(mark)], rows


@contextlib.contextmanager
def write_errors_in_one_line(path: Path) -> Iterator[None]:
    """Turn a failure to write a results file into a one-line error.

    Raises:
        AezooError: the file cannot be written; names the cause and a remedy.
    """
    try:
        yield
    except OSError as error:
        raise AezooError(f"cannot write {path}: {error.strerror}; give another folder by --results") from error


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Wait until no other process writes a table in this folder, where the system supports locks."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # network file systems may not lock folders
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Lock a file that grows while a run measures, so that no other run writes it.

    Raises:
        AezooError: another run holds the lock.
    """
    with write_errors_in_one_line(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    with file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AezooError(
                    f"another run is writing {path}: wait for it, or give another folder by --results"
                ) from None
            except OSError:
                pass  # a file system without locks
        yield


class ResultsCSV:
    """A CSV that is complete after every row: an interrupted run keeps its rows and does not measure them again.

    Rows that other processes or the user have added to the file in the meantime stay.

    Args:
        path: the file; it need not exist.
        key: columns that identify a row.
        command: the command that measures these rows, for the head of the file.
        again: `all` measures every row again, `failed` those with an error, None none.
    """

    def __init__(self, path: Path, key: Sequence[str], command: str, again: str | None = None) -> None:
        self.path, self.key, self.again, self.command = path, tuple(key), again, command
        self.commands: list[str] = []
        self.rows: list[dict[str, str]] = []
        self._index: tuple[list[dict[str, str]], int, dict[tuple[str, ...], dict[str, str]]] | None = None
        self.read()
        self._writable = False

    def read(self) -> None:
        """Read the current content of the file."""
        if self.path.is_file():
            self.commands, self.rows = read_csv(self.path)
        if self.command not in self.commands:
            self.commands.append(self.command)

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Read the file, let the caller change its rows, and write them while no other process can write."""
        with write_errors_in_one_line(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with folder_lock(self.path.parent):
                self.read()
                yield
                self.write()

    def find(self, row: Mapping[str, object]) -> dict[str, str] | None:
        """The row with the same key, if there is one."""
        if self._index is None or self._index[0] is not self.rows or self._index[1] != len(self.rows):
            # the first of several rows with one key counts
            found = {tuple(r.get(name, "") for name in self.key): r for r in reversed(self.rows)}
            self._index = self.rows, len(self.rows), found
        return self._index[2].get(tuple(as_text(row.get(name)) for name in self.key))

    def needs(self, row: Mapping[str, object]) -> bool:
        """Whether the row still has to be measured.

        Raises:
            AezooError: it has to be measured, but the result could not be written.
        """
        existing = self.find(row)
        needed = existing is None or self.again == "all" or (self.again == "failed" and bool(existing.get("error")))
        if needed:
            self.check_writable()
        return needed

    def check_writable(self) -> None:
        """Check before measuring that the file can be written; otherwise results would be lost.

        Raises:
            AezooError: the file cannot be written; names the cause and a remedy.
        """
        if self._writable:
            return
        with write_errors_in_one_line(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path.parent):
                self._writable = True

    def put(self, row: Mapping[str, object]) -> None:
        """Add a row with the processor's name, or replace the row with the same key, and write the file."""
        cells = {name: as_text(value) for name, value in row.items()} | {"processor": as_text(processor_name())}
        with self.update():
            existing = self.find(row)
            if existing is None:
                self.rows.append(cells)
            else:
                existing.clear()
                existing.update(cells)

    def replace_all(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Replace all rows by these, which this table's command measured, and write the file."""
        with self.update():
            self.commands, self.rows = [self.command], []
            machine = {"processor": as_text(processor_name())}
            self.rows += [{name: as_text(value) for name, value in row.items()} | machine for row in rows]

    def write(self) -> None:
        """Write all rows atomically: the file is the old one or the new one, never a part."""
        columns = [*dict.fromkeys(name for row in self.rows for name in row if name != "error"), "error"]
        part = self.path.with_suffix(".part")
        with write_errors_in_one_line(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("w", newline="", encoding="utf-8") as file:
                    file.writelines(f"# command: {command}\n" for command in self.commands)
                    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(self.rows)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(self.path)
            finally:
                # a file cut off by a full disk takes the space that the next attempt needs
                part.unlink(missing_ok=True)
