"""Runs of `benchmarks.peers`: each is a separate process, and a file stores the finished ones."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

from .common import ROOT, write_errors_in_one_line
from .peer_scripts.job import Job

_SCRIPTS = Path(__file__).with_name("peer_scripts")
_MAX_ERROR_LENGTH = 200
# without a terminal the zoo's progress bar is one line per epoch
NEEDS_TERMINAL = ("aezoo", "aezoo_compiled")
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class RunFailure(RuntimeError):
    """A run failed; one line says why."""


def thread_environment(threads: int, accelerator: str = "cpu") -> dict[str, str]:
    """Environment variables that set every library's thread count, and hide all accelerators or all but one GPU."""
    names = ("OMP", "MKL", "OPENBLAS", "VECLIB_MAXIMUM", "NUMEXPR")
    found = {f"{name}_NUM_THREADS": str(threads) for name in names} | {"TF_CPP_MIN_LOG_LEVEL": "2"}
    # XLA's thread pools: their size, or no pool for one thread
    found |= {"NPROC": str(threads)}
    if threads == 1:
        found["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    if accelerator == "cpu":
        return found | {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    # the first of several GPUs, because Lightning would take all; JAX fails if it finds none
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return found | {"CUDA_VISIBLE_DEVICES": first, "JAX_PLATFORMS": "cuda,cpu"}


@contextlib.contextmanager
def _output(log: Path, terminal: bool) -> Iterator[int]:
    """The output of a process: the log, or a terminal of 120 columns that is recorded in the log."""
    # Windows has no pseudo terminals
    if not terminal or sys.platform == "win32":
        with log.open("wb") as out:
            yield out.fileno()
        return
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))

    def record() -> None:
        # the terminal's end is an error on Linux, and an empty read elsewhere
        with log.open("wb") as out, contextlib.suppress(OSError):
            while written := os.read(ours, 1 << 16):
                out.write(written)

    reader = threading.Thread(target=record, daemon=True)
    reader.start()
    try:
        yield theirs
    finally:
        os.close(theirs)
        # a child that has left the process group may keep the terminal open
        reader.join(10)
        os.close(ours)


def train(python: str, job: Job, timeout: float, pin: bool = False) -> dict[str, Any]:
    """Run a job in a separate process and a temporary folder.

    The scripts are copied there, so that a separate environment does not see the files next to them here.

    Args:
        python: the interpreter.
        job: what to train.
        timeout: seconds after which the process and its children are killed.
        pin: bind the process to as many cores as it has threads.

    Raises:
        RunFailure: the process ended without a result; the message is its last line of output.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(_SCRIPTS, folder / _SCRIPTS.name, ignore=shutil.ignore_patterns("__pycache__"))
        job_file, log = folder / "job.json", folder / "log"
        job_file.write_text(json.dumps(asdict(job) | {"started": time.time()}))
        command = [python, "-m", _SCRIPTS.name, str(job_file), str(folder), "follow"]
        if pin and hasattr(os, "sched_getaffinity") and shutil.which("taskset"):
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[-job.threads :]))
            command = ["taskset", "-c", cores, *command]
        path = str(ROOT) if python == sys.executable else ""
        added, terminal = (
            thread_environment(job.threads, job.accelerator) | {"PYTHONPATH": path},
            job.party in NEEDS_TERMINAL,
        )
        added |= {"TERM": "xterm-256color"} if terminal else {}
        with _output(log, terminal) as out:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | added,
                # stays open as long as this process lives: see `end_with_parent`
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise RunFailure(f"no result after {timeout:g} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                cast(IO[bytes], process.stdin).close()
        result = folder / "result.json"
        if code or not result.is_file():
            lines = _ESCAPES.sub("", log.read_text(errors="replace")).strip().splitlines()
            # a message of several lines is represented by its first
            last = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)][-1:] or lines[-1:]
            why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}: {''.join(last)}"
            raise RunFailure(why[:_MAX_ERROR_LENGTH])
        found: dict[str, Any] = json.loads(result.read_text())
        return found


class RunsFile:
    """A file of finished runs, one JSON line each, below a line with the settings that they share.

    Args:
        path: the file.
        settings: settings of these runs; a file with other settings is replaced.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.runs: dict[tuple[str, int], dict[str, Any]] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        head = json.dumps({"settings": settings})
        if lines[:1] == [head]:
            for line in lines[1:]:
                # a line cut off by a crash is a lost run
                with contextlib.suppress(json.JSONDecodeError):
                    run = json.loads(line)
                    self.runs[run["party"], run["round"]] = run
            return
        if lines:
            print(f"{path.name} contains runs with other settings: they are dropped", file=sys.stderr)
        with write_errors_in_one_line(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(head + "\n", encoding="utf-8")

    def has(self, party: str, turn: int) -> bool:
        """Whether that run exists and has not failed."""
        return "result" in self.runs.get((party, turn), {})

    def add(self, party: str, turn: int, **outcome: Any) -> None:
        """Store a run with its `result` or its `error`."""
        run = {"party": party, "round": turn, **outcome}
        self.runs[party, turn] = run
        with write_errors_in_one_line(self.path), self.path.open("a", encoding="utf-8") as file:
            # starts with a line break, because the line before may have been cut off
            file.write("\n" + json.dumps(run))

    def results(self, party: str, turns: Sequence[int]) -> dict[int, dict[str, Any]]:
        """A party's results by round."""
        return {turn: self.runs[party, turn]["result"] for turn in turns if self.has(party, turn)}

    def error(self, party: str, turns: Sequence[int]) -> str:
        """The error of a party's last failed run."""
        errors = [self.runs[party, turn].get("error", "") for turn in turns if (party, turn) in self.runs]
        return next((error for error in reversed(errors) if error), "")
