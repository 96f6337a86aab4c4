"""The test of the tests: put one fault at a time into a copy of the package and see whether the suite notices.

    python -m tests.mutants --keep FILE        all faults, more than an hour on two cores; goes on where it was ended
    python -m tests.mutants --draw 300         so many of them, drawn at random; --seed 1 draws others
    python -m tests.mutants contraction AuxK   those with one of these in name or file
    python -m tests.mutants --list             only print them
    python -m tests.mutants --jobs 4           so many at a time

`tests/mutants.txt` lists the faults and the test file that has to fail for each. At the end the tests that caught one
run without any: one that fails then has caught nothing. The exit status is 1 if less than 90 % are caught, or if a
fault could not be judged: it no longer fits its file, or pytest broke down. A fault that runs into the time limit has
not been caught.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_suffix(".txt")
COPIED = ("aezoo", "benchmarks", "tests", "recipes", "pyproject.toml")
NEEDED = 0.9
WRONG_COPY = 90
# find_spec, not import: a package that a fault keeps from being imported is pytest's to report
PYTEST = f"""
import importlib.util, pathlib, sys
if not pathlib.Path(importlib.util.find_spec("aezoo").origin).is_relative_to(pathlib.Path.cwd()):
    sys.exit({WRONG_COPY})
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
FLAGS = ("-x", "-q", "-n0", "--tb=no", "-rfE", "-p", "no:cacheprovider")

CAUGHT, SURVIVED, TIMED_OUT, STALE, BROKEN = "caught", "SURVIVED", "TIMED OUT", "STALE", "BROKEN"


@dataclass(frozen=True)
class Fault:
    """`old` in `file` becomes `new`, and `test` must fail; paths from the root."""

    name: str
    file: str
    old: str
    new: str
    test: str

    def occurrences(self, root: Path = ROOT) -> int:
        """How often the old text stands in the file; more or less than once, the fault is stale."""
        path = root / self.file
        return path.read_text(encoding="utf-8").count(self.old) if path.is_file() else 0

    def inject(self, root: Path) -> None:
        """Change the copy of the package under root."""
        path = root / self.file
        path.write_text(path.read_text(encoding="utf-8").replace(self.old, self.new), encoding="utf-8")


@dataclass(frozen=True)
class Verdict:
    """What became of a fault: one of the words above, the test that failed or the reason, and seconds."""

    fault: Fault
    word: str
    detail: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.word:9} {self.seconds:5.1f} s  {self.fault.name}  <- {self.detail}"


def parse(text: str) -> Iterator[Fault]:
    """The faults of a list in the form that the head of `tests/mutants.txt` describes."""
    file = test = name = ""
    old: list[str] = []
    new: list[str] = []
    for line in [*text.splitlines(), ""]:
        if new and not line.startswith("+"):
            yield Fault(name, file, "\n".join(old), "\n".join(new), test)
            old, new = [], []
        if line.startswith("["):
            file, test = line.strip("[]").split(" -> ")
        elif line.startswith("-"):
            old.append(line[2:])
        elif line.startswith("+"):
            new.append(line[2:])
        elif line and not line.startswith("#"):
            name = line


def faults() -> list[Fault]:
    """All faults of `tests/mutants.txt`."""
    return list(parse(LIST.read_text(encoding="utf-8")))


@contextmanager
def copy() -> Iterator[Path]:
    """A folder of its own with the package and its tests."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder).resolve()
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, root / name)
        yield root


def pytest_in(root: Path, arguments: Iterable[str], limit: float) -> tuple[int | None, str]:
    """Exit status, None after the time limit, and output of pytest in a copy, whose package it is sure to import."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    process = subprocess.Popen(
        [sys.executable, "-c", PYTEST, *FLAGS, *arguments],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that a test has started
        output, _ = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return None, output
        raise
    if process.returncode == WRONG_COPY:
        raise RuntimeError(f"the tests in {root} would import another aezoo than the copy there")
    return process.returncode, output


def failed(output: str) -> list[str]:
    """The tests that pytest's summary names as failed."""
    return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)


def judge(fault: Fault, limit: float) -> Verdict:
    """Run the fault's test file on a copy with the fault in it."""
    start = time.monotonic()
    found = fault.occurrences()
    if found != 1:
        return Verdict(fault, STALE, f"its old text stands {found} times in {fault.file}, not once")
    with copy() as root:
        fault.inject(root)
        status, output = pytest_in(root, [fault.test], limit)
    seconds = time.monotonic() - start
    if status is None:
        return Verdict(fault, TIMED_OUT, f"no verdict of {fault.test}", seconds)
    if status == 0:
        return Verdict(fault, SURVIVED, fault.test, seconds)
    names = failed(output)
    if status == 1 and names:
        return Verdict(fault, CAUGHT, names[0], seconds)
    return Verdict(fault, BROKEN, f"pytest ended with {status}: {output.strip().rpartition(chr(10))[2]}", seconds)


def red_anyway(tests: Sequence[str], limit: float) -> list[str]:
    """Those of the tests that fail on the package as it is."""
    if not tests:
        return []
    with copy() as root:
        status, output = pytest_in(root, ["--maxfail=0", *tests], limit * len(tests))
    return [] if status == 0 else failed(output) or list(tests)


def summary(verdicts: Sequence[Verdict], red: Iterable[str] = ()) -> tuple[str, bool]:
    """The last lines of a run, and whether the suite has passed."""
    sound = [verdict for verdict in verdicts if verdict.word == CAUGHT and verdict.detail not in red]
    unjudged = [verdict for verdict in verdicts if verdict.word in (STALE, BROKEN)]
    share = len(sound) / len(verdicts)
    lines = [f"{test} fails without a fault too: what it caught does not count" for test in red]
    lines += [f"{verdict.word}: {verdict.fault.name}: {verdict.detail}" for verdict in unjudged]
    lines.append(f"{len(sound)} of {len(verdicts)} faults caught, {share:.1%}; needed: {NEEDED:.0%}")
    return "\n".join(lines), share >= NEEDED and not unjudged


def state(root: Path = ROOT) -> str:
    """A digest of all that verdicts depend on."""
    digest = hashlib.sha256()
    for name in COPIED:
        paths = (root / name).rglob("*") if (root / name).is_dir() else [root / name]
        for path in sorted(path for path in paths if path.is_file() and "__pycache__" not in path.parts):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


class Kept:
    """Verdicts in a file, a line each, for as long as the package and its tests stay as they are.

    Args:
        path: the file; one of another state is begun anew. None keeps nothing.
        of: the state, see `state`.
    """

    def __init__(self, path: Path | None, of: str) -> None:
        self._path = path
        self.rows: dict[str, tuple[str, str, float]] = {}
        if path is None:
            return
        head, *lines = (path.read_text(encoding="utf-8") if path.is_file() else "").splitlines() or [""]
        for line in lines if head == of else []:
            with suppress(ValueError):  # cut short when the run was ended
                name, *verdict = json.loads(line)
                self.rows[name] = tuple(verdict)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps([name, *verdict]) for name, verdict in self.rows.items()]
        path.write_text("\n".join([of, *rows, ""]), encoding="utf-8")

    def of(self, fault: Fault) -> Verdict | None:
        """The verdict on a fault, if there is one."""
        return Verdict(fault, *self.rows[fault.name]) if fault.name in self.rows else None

    def add(self, verdict: Verdict) -> None:
        """Write a verdict down."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([verdict.fault.name, verdict.word, verdict.detail, verdict.seconds]) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="only faults with this in name or file")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    parser.add_argument("--draw", type=int, metavar="N", help="only N of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time (default 2)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a fault (default 600)")
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    parser.add_argument("--keep", type=Path, help="a file for the verdicts, from which an interrupted run goes on")
    options = parser.parse_args(arguments)
    chosen = [
        fault
        for fault in faults()
        if not options.patterns or any(pattern in f"{fault.name} {fault.file}" for pattern in options.patterns)
    ]
    if not chosen:
        parser.error(f"no fault has {' or '.join(options.patterns)} in its name or file: see --list")
    listed = len(chosen)
    if options.draw is not None:
        chosen = random.Random(options.seed).sample(chosen, max(1, min(options.draw, listed)))
    if options.list:
        for fault in chosen:
            print(f"{fault.file}: {fault.name}  ({fault.test})")
        return 0
    kept = Kept(options.keep, state() if options.keep else "")
    verdicts = [verdict for fault in chosen if (verdict := kept.of(fault))]
    known = {verdict.fault for verdict in verdicts}
    pool = ThreadPoolExecutor(max(1, options.jobs))
    try:
        waiting = [pool.submit(judge, fault, options.limit) for fault in chosen if fault not in known]
        for future in as_completed(waiting):
            verdicts.append(future.result())
            kept.add(verdicts[-1])
            print(verdicts[-1], flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # interrupted, finish only the faults under way
    tests = sorted({verdict.detail for verdict in verdicts if verdict.word == CAUGHT})
    red = red_anyway(tests, options.limit)
    text, passed = summary(verdicts, red)
    print(text)
    if options.out is not None:
        caught = sum(verdict.word == CAUGHT and verdict.detail not in red for verdict in verdicts)
        counts = {"listed": listed, "faults": len(verdicts), "caught": caught}
        options.out.write_text(json.dumps(counts) + "\n", encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
