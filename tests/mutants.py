"""Mutation tests: put one fault at a time into a copy of the package and check that a test fails.

    python -m tests.mutants --draw 300         this many faults, drawn at random; --seed 1 draws others
    python -m tests.mutants --keep FILE        all of them; continues an interrupted run
    python -m tests.mutants vae.py "drop log"  those with one of these texts in their identity
    python -m tests.mutants --list             only print them
    python -m tests.mutants --jobs 4           this many at a time
    python -m tests.mutants --without-golden   by the laws only; golden values would detect most faults

Faults of formulas are generated from the current code, see `tests/mutation_operators.py`, and identified by file,
function, operator and ordinal. Those that detach one sub-expression (": detach " is in their identity) are those that
change a gradient: `tests/detachments.py` runs the golden models to find them, in seconds for a file and minutes for
all, and they are kept in `build/`. `tests/mutants.txt` lists faults that no operator generates. The tests that must
fail follow from the file's name: the test file of that name or those that import it, slow tests last, and golden values
of models that use it.
At the end the tests that caught faults run without any: a fault whose test fails then was not caught. The exit status
is 1 if less than 90 % are caught, or if a fault could not be judged: its text is no longer in the file, or pytest
failed to run. A fault that runs into the time limit is not caught.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # run as a module of its folder
from mutation_operators import Mutant, detachments_of, mutants_of

ROOT = Path(__file__).parent.parent
LISTED_FAULTS = Path(__file__).with_suffix(".txt")
DETACHMENTS = ROOT / "build" / "detachments.json"
COPIED = ("aezoo", "benchmarks", "tests", "recipes", "pyproject.toml")
MIN_CAUGHT = 0.9
WRONG_COPY = 90
# imported once for all runs, since imports take most of the time of a fault
PRELOADED = ("torch", "lightning.pytorch", "numpy", "pytest")
FORMULA_PATHS = (
    "models",
    "bases",
    "distributions",
    "quantisers",
    "manifolds",
    "nets",
    "metrics",
    "corruptions.py",
    "autoencoder.py",
)
GOLDEN = "tests/test_golden.py"
# golden values are chosen by model, and the copy has neither README nor docs
EXCLUDED_TESTS = ("test_golden.py", "test_readme.py", "test_typeset.py")
# at most this many golden values and law files for a module that many models use
MAX_GOLDEN_TESTS, MAX_LAW_FILES = 12, 2
# tests of files without a test file of their name, by the beginning of the path; deleted names have no effect
TESTS_BY_PREFIX = {
    "aezoo/metrics/disentanglement": "test_disentanglement.py",
    "aezoo/metrics/similarity": "test_disentanglement.py",
    "aezoo/metrics/sparsity": "test_sparsity_metrics.py",
    "aezoo/metrics/coherence": "test_coherence_metrics.py",
    "aezoo/quantisers/": "test_quantisers.py",
}
# mutants that change no result, and why
EQUIVALENT: dict[str, str] = {}
FLAGS = ("-x", "-q", "-n0", "--tb=no", "-rfE", "-p", "no:cacheprovider")
# pytest plug-ins imported by PRELOADED, such as anyio, need no assertion rewriting
FLAGS += ("-W", "ignore::pytest.PytestAssertRewriteWarning")

CAUGHT, SURVIVED, TIMED_OUT, STALE, BROKEN = "caught", "SURVIVED", "TIMED OUT", "STALE", "BROKEN"


@dataclass(frozen=True)
class Fault:
    """`old` in `file` is replaced by `new`, and one of the tests must fail; paths are relative to the root.

    Attributes:
        name: unique among the faults of the file.
        start: offset of the old text in the file; None: its only occurrence.
        test: the test file that must fail, by its name; empty: those that `test_files` finds.
        golden: the label of the golden values that must change; empty: those that `golden_tests` finds.
    """

    name: str
    file: str
    old: str
    new: str
    test: str = ""
    start: int | None = None
    golden: str = ""

    @property
    def identity(self) -> str:
        """File and name, the key of saved verdicts."""
        return f"{self.file}: {self.name}"

    def occurrences(self, root: Path = ROOT) -> int:
        """The number of occurrences of the old text in the file; if it is not one, the fault is stale."""
        path = root / self.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return text.count(self.old) if self.start is None else text.startswith(self.old, self.start)

    def changed(self, text: str) -> str:
        """The text of the file with the fault."""
        start = text.index(self.old) if self.start is None else self.start
        return text[:start] + self.new + text[start + len(self.old) :]

    def inject(self, root: Path) -> None:
        """Change the copy of the package under root."""
        path = root / self.file
        path.write_text(self.changed(path.read_text(encoding="utf-8")), encoding="utf-8")

    def tests(self, golden: bool = True) -> list[str]:
        """The tests to run; golden values come first, since they take a second."""
        files = [_test_path(self.test)] if self.test else test_files(self.file)
        if self.golden:
            return [*([_golden_test(self.golden)] if golden else ()), *gradient_law(self.golden, files), *files]
        return [*(golden_tests(self.file) if golden and self.start is not None else ()), *files]


@dataclass(frozen=True)
class Verdict:
    """The result for a fault: one of the words above, the test that failed or the reason, and seconds."""

    fault: Fault
    outcome: str
    detail: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.outcome:9} {self.seconds:5.1f} s  {self.fault.identity}  <- {self.detail}"


# ---- faults ----------------------------------------------------------------------------------------------------------


def parse(text: str) -> Iterator[Fault]:
    """The faults of a list in the format described at the top of `tests/mutants.txt`."""
    file = test = name = ""
    old: list[str] = []
    new: list[str] = []
    for line in [*text.splitlines(), ""]:
        if new and not line.startswith("+"):
            yield Fault(name, file, "\n".join(old), "\n".join(new), test)
            old, new = [], []
        if line.startswith("["):
            file, _, test = line.strip("[]").partition(" -> ")
        elif line.startswith("-"):
            old.append(line[2:])
        elif line.startswith("+"):
            new.append(line[2:])
        elif line and not line.startswith("#"):
            name = line


def listed() -> list[Fault]:
    """The faults of `tests/mutants.txt`."""
    return list(parse(LISTED_FAULTS.read_text(encoding="utf-8")))


def formula_files(root: Path = ROOT) -> list[str]:
    """The modules with formulas, relative to the root."""
    locations = [root / "aezoo" / part for part in FORMULA_PATHS]
    paths = [path for start in locations for path in (sorted(start.rglob("*.py")) if start.is_dir() else [start])]
    return [path.relative_to(root).as_posix() for path in paths]


@cache
def _generated_faults(root: Path, operators: Callable[[str], list[Mutant]] = mutants_of) -> tuple[Fault, ...]:
    return tuple(
        Fault(mutant.name, file, mutant.old, mutant.new, start=mutant.start)
        for file in formula_files(root)
        for mutant in operators((root / file).read_text(encoding="utf-8"))
    )


def generated(root: Path = ROOT) -> list[Fault]:
    """The faults of formulas generated from the code, without equivalent ones."""
    return [fault for fault in _generated_faults(root) if fault.identity not in EQUIVALENT]


def detachments(patterns: Sequence[str] = ()) -> list[Fault]:
    """The faults that detach one sub-expression of a formula and change the first gradients of a model.

    Finding them takes minutes for all formulas, so they are saved until the files they depend on change.
    """
    candidates = {
        fault.identity: fault for fault in _generated_faults(ROOT, detachments_of) if matches(fault, patterns)
    }
    digest = source_digest(names=("aezoo", "tests/detachments.py", "tests/golden.py", "tests/mutation_operators.py"))
    kept = json.loads(DETACHMENTS.read_text(encoding="utf-8")) if DETACHMENTS.is_file() else {}
    kept = kept if kept.get("digest") == digest else {"digest": digest}
    missing = sorted({fault.file for fault in candidates.values()} - kept.keys())
    if missing:
        print(f"looking for sub-expressions that have a gradient in {len(missing)} files", file=sys.stderr)
        command = [sys.executable, str(Path(__file__).with_name("detachments.py")), *missing]
        lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        kept |= {file: [] for file in missing}
        for identity, label, _ in map(json.loads, lines):
            kept[identity.partition(": ")[0]].append([identity, label])
        DETACHMENTS.parent.mkdir(exist_ok=True)
        DETACHMENTS.write_text(json.dumps(kept, indent=0) + "\n", encoding="utf-8")
    files = sorted(kept.keys() - {"digest"})
    return [
        replace(candidates[identity], golden=label)
        for file in files
        for identity, label in kept[file]
        if identity in candidates
    ]


def faults() -> list[Fault]:
    """All generated and listed faults."""
    return [*generated(), *listed()]


def matches(fault: Fault, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns is in the identity of a fault, or there are no patterns."""
    return not patterns or any(pattern in fault.identity for pattern in patterns)


# ---- tests of a fault ------------------------------------------------------------------------------------------------


def _test_path(test: str) -> str:
    """The path of a test file, whose name is unique."""
    found = sorted((ROOT / "tests").rglob(test))
    return found[0].relative_to(ROOT).as_posix() if found else f"tests/{test}"


@cache
def _test_texts() -> dict[str, str]:
    # tests/parity needs a separate environment
    paths = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path.parent.name != "parity"]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


@cache
def test_files(file: str) -> list[str]:
    """The test files of a module.

    The file with its name; else those that import it, and the laws of models that use it; for a model without a file
    of its name, the laws that name or import it.
    """
    stem, (*packages, _) = Path(file).stem, Path(file).with_suffix("").parts
    texts = {test: text for test, text in _test_texts().items() if Path(test).name not in EXCLUDED_TESTS}
    if packages[1:2] == ["models"]:
        laws = {test: text for test, text in texts.items() if test.startswith("tests/laws/")}
        own = [test for test in laws if Path(test).stem == f"test_{stem}"]
        named = rf"[\"']{stem}[\"']|\.{stem}\b|\b{'.'.join(packages)} import [^\n]*\b{stem}\b"
        return own or [test for test, text in laws.items() if re.search(named, text)]
    own = [test for test in texts if Path(test).stem == f"test_{stem}"]
    if own:
        return own
    module = rf"\b{'.'.join(packages)}(\.{stem}\b| import [^\n]*\b{stem}\b)"
    importers = [test for test, text in texts.items() if re.search(module, text)]
    known = [name for start, name in TESTS_BY_PREFIX.items() if file.startswith(start)]
    importers += [test for test in texts if Path(test).name in known]
    models = dict.fromkeys(model for model, _ in users(file))
    laws = [test for model in [*models][:MAX_LAW_FILES] for test in test_files(model)]
    return [*dict.fromkeys(importers + laws)]


@cache
def _imports() -> dict[str, set[str]]:
    """The modules of the package that each module imports, by file."""
    paths = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in (ROOT / "aezoo").rglob("*.py")}
    graph = {}
    for name, path in paths.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        graph[f"{name}.py"] = {f"{part.replace('.', '/')}.py" for part in found if part.replace(".", "/") in paths}
    return graph


def _distances(file: str) -> dict[str, int]:
    """The modules that import a module directly or indirectly, with the number of imports in between."""
    found, edge = {file: 0}, {file}
    while edge:
        edge = {module for module, imported in _imports().items() if imported & edge} - found.keys()
        found |= dict.fromkeys(edge, max(found.values()) + 1)
    return found


@cache
def users(file: str) -> list[tuple[str, str]]:
    """The models that use a module, by file and golden label, sorted by their number of imports in between."""
    from golden import subjects

    distances, ranked = _distances(file), []
    for subject in subjects():
        model = subject.cls.__module__.replace(".", "/") + ".py"
        net = subject.hyperparameters.get("net", signature(subject.cls).parameters.get("net"))
        of_net = file.startswith("aezoo/nets/") and Path(file).stem == getattr(net, "default", net)
        if of_net or model in distances:
            ranked.append((0.5 if of_net else distances[model], model, subject.label))
    ranked.sort(key=lambda row: row[0])
    return [(model, label) for distance, model, label in ranked if distance == 0 or ranked[0][0] > 0]


def golden_tests(file: str) -> list[str]:
    """The golden values of models that use a module."""
    return [_golden_test(label) for _, label in users(file)[:MAX_GOLDEN_TESTS]]


def gradient_law(label: str, files: Iterable[str]) -> list[str]:
    """The test of gradients of the model with a golden label, unless its file is among these."""
    model = label.partition("(")[0]
    file = _test_path(f"test_{model}.py")
    return [] if file in files else [f"{file}::test_gradients_are_derivatives_of_the_terms[{model}]"]


def _golden_test(label: str) -> str:
    return f"{GOLDEN}::test_golden_values[{label}]"


# ---- run -------------------------------------------------------------------------------------------------------------


@contextmanager
def temporary_copy() -> Iterator[Path]:
    """A temporary folder with a copy of the package and its tests."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder).resolve()
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, root / name)
        yield root


def _run_pytest(root: str, arguments: list[str], output: str) -> None:
    """Run pytest in a copy of the package; the main function of a separate process."""
    os.setsid()
    os.chdir(root)
    with Path(output).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    os.environ |= {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    here = str(Path(__file__).parent)
    sys.path[:] = [root, *(path for path in sys.path if path not in ("", here, str(ROOT)))]
    # import those of the copy: a fork server started by other tests may have imported ours
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("aezoo", "benchmarks", "golden", "mutation_operators"):
            del sys.modules[name]
    # find_spec, since import errors due to a fault must be reported by pytest
    spec = importlib.util.find_spec("aezoo")
    if spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(root):
        os._exit(WRONG_COPY)
    import pytest

    status = pytest.main([*FLAGS, *arguments])
    sys.stdout.flush()
    os._exit(int(status))


def pytest_in(root: Path, arguments: Iterable[str], limit: float) -> tuple[int | None, str]:
    """Exit status, or None after the time limit, and output of pytest in a copy."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    with tempfile.NamedTemporaryFile(prefix="mutants-") as output:
        process = context.Process(target=_run_pytest, args=(str(root), [*arguments], output.name))
        process.start()
        try:
            process.join(limit)
        finally:
            status = process.exitcode
            if status is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # including processes started by tests
                process.kill()
                process.join()
        text = Path(output.name).read_text(encoding="utf-8", errors="replace")
    if status == WRONG_COPY:
        raise RuntimeError(f"the tests in {root} would import another aezoo than the copy there")
    return status, text


def failed(output: str) -> list[str]:
    """The failed tests in pytest's summary."""
    return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)


def run_fault(fault: Fault, limit: float, golden: bool = True) -> Verdict:
    """Run the tests of a fault on a copy with the fault."""
    start = time.monotonic()
    found = fault.occurrences()
    if found != 1:
        return Verdict(fault, STALE, f"its old text stands {found} times in {fault.file}, not once")
    tests = fault.tests(golden)
    if not tests:
        return Verdict(fault, SURVIVED, "no test has its name or imports it")
    with temporary_copy() as root:
        fault.inject(root)
        status, output = pytest_in(root, tests, limit)
        if status == 0:
            # slow tests after the others; without any, pytest ends with 5
            status, output = pytest_in(root, ["-m", "slow", *tests], limit)
    seconds = time.monotonic() - start
    files = " ".join(dict.fromkeys(test.partition("::")[0] for test in tests))
    if status is None:
        return Verdict(fault, TIMED_OUT, f"no verdict of {files}", seconds)
    if status in (0, 5):
        return Verdict(fault, SURVIVED, files, seconds)
    names = failed(output)
    if status == 1 and names:
        return Verdict(fault, CAUGHT, names[0], seconds)
    return Verdict(fault, BROKEN, f"pytest ended with {status}: {output.strip().rpartition(chr(10))[2]}", seconds)


def failing_without_fault(tests: Sequence[str], limit: float) -> list[str]:
    """Those of the tests that fail without a fault."""
    if not tests:
        return []
    with temporary_copy() as root:
        status, output = pytest_in(root, ["--maxfail=0", "-m", "slow or not slow", *tests], limit * len(tests))
    return [] if status == 0 else failed(output) or list(tests)


def by_operator(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    """The verdicts by operator, and those of listed faults."""
    parts: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        fault = verdict.fault
        operator = "listed" if fault.start is None else fault.name.split(": ")[1].rpartition(" ")[0]
        parts.setdefault(operator, []).append(verdict)
    return parts


def summary(verdicts: Sequence[Verdict], failing_anyway: Iterable[str] = ()) -> tuple[str, bool]:
    """The last lines of a run, and whether it has passed."""
    caught = [verdict for verdict in verdicts if verdict.outcome == CAUGHT and verdict.detail not in failing_anyway]
    without_verdict = [verdict for verdict in verdicts if verdict.outcome in (STALE, BROKEN)]
    share = len(caught) / len(verdicts)
    lines = [f"{test} fails without a fault too: what it caught does not count" for test in failing_anyway]
    lines += [f"{verdict.outcome}: {verdict.fault.identity}: {verdict.detail}" for verdict in without_verdict]
    for operator, all_of in sorted(by_operator(verdicts).items()):
        missed = sum(verdict not in caught for verdict in all_of)
        lines += [f"{operator}: {missed} of {len(all_of)} missed"] if missed else []
    lines.append(f"{len(caught)} of {len(verdicts)} faults caught, {share:.1%}; needed: {MIN_CAUGHT:.0%}")
    return "\n".join(lines), share >= MIN_CAUGHT and not without_verdict


def source_digest(root: Path = ROOT, names: Iterable[str] = COPIED) -> str:
    """A digest of files and folders; by default, of all that verdicts depend on."""
    digest = hashlib.sha256()
    for name in names:
        paths = (root / name).rglob("*") if (root / name).is_dir() else [root / name]
        for path in sorted(path for path in paths if path.is_file() and "__pycache__" not in path.parts):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


class VerdictFile:
    """Verdicts in a file, one per line, valid until the package or its tests change.

    Args:
        path: the file; it is overwritten if its digest differs. None keeps nothing.
        digest: see `source_digest`.
    """

    def __init__(self, path: Path | None, digest: str) -> None:
        self._path = path
        self.rows: dict[str, tuple[str, str, float]] = {}
        if path is None:
            return
        head, *lines = (path.read_text(encoding="utf-8") if path.is_file() else "").splitlines() or [""]
        for line in lines if head == digest else []:
            with suppress(ValueError):  # incomplete line of an interrupted run
                name, *verdict = json.loads(line)
                self.rows[name] = tuple(verdict)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps([name, *verdict]) for name, verdict in self.rows.items()]
        path.write_text("\n".join([digest, *rows, ""]), encoding="utf-8")

    def from_data(self, fault: Fault) -> Verdict | None:
        """The saved verdict on a fault, if any."""
        return Verdict(fault, *self.rows[fault.identity]) if fault.identity in self.rows else None

    def add(self, verdict: Verdict) -> None:
        """Save a verdict."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                row = [verdict.fault.identity, verdict.outcome, verdict.detail, verdict.seconds]
                file.write(json.dumps(row) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="only faults with this in file or name")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    parser.add_argument("--draw", type=int, metavar="N", help="only N of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--without-golden", action="store_true", help="leave golden values out of what judges")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time (default 2)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a fault (default 600)")
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    parser.add_argument("--keep", type=Path, help="a file for the verdicts, from which an interrupted run goes on")
    options = parser.parse_args(arguments)
    chosen = [fault for fault in faults() if matches(fault, options.patterns)] + detachments(options.patterns)
    if not chosen:
        parser.error(f"no fault has {' or '.join(options.patterns)} in its file or name: see --list")
    total = len(chosen)
    if options.draw is not None:
        chosen = random.Random(options.seed).sample(chosen, max(1, min(options.draw, total)))
    if options.list:
        for fault in chosen:
            print(f"{fault.identity}\n    - {fault.old}\n    + {fault.new}")
        return 0
    saved = VerdictFile(options.keep, f"{source_digest()} {options.without_golden}" if options.keep else "")
    verdicts = [verdict for fault in chosen if (verdict := saved.from_data(fault))]
    known = {verdict.fault for verdict in verdicts}
    pool = ThreadPoolExecutor(max(1, options.jobs))
    try:
        futures = [
            pool.submit(run_fault, fault, options.limit, not options.without_golden)
            for fault in chosen
            if fault not in known
        ]
        for future in as_completed(futures):
            verdicts.append(future.result())
            saved.add(verdicts[-1])
            print(verdicts[-1], flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # if interrupted, only finish the running faults
    tests = sorted({verdict.detail for verdict in verdicts if verdict.outcome == CAUGHT})
    failing_anyway = failing_without_fault(tests, options.limit)
    text, passed = summary(verdicts, failing_anyway)
    print(text)
    if options.out is not None:
        caught = sum(verdict.outcome == CAUGHT and verdict.detail not in failing_anyway for verdict in verdicts)
        counts = {"listed": total, "faults": len(verdicts), "caught": caught}
        options.out.write_text(json.dumps(counts) + "\n", encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
