"""Rows in processes of their own: a crash, a time-out or the end of memory costs one row, which says why."""

import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from .common import NAME, ROOT

if TYPE_CHECKING:
    # there is none on Windows
    from multiprocessing.context import ForkServerContext

# the last is what torch makes of C++'s own
_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "std::bad_alloc")
# what ranks say of one that has ended without a word
_LOST = ("closed by peer", "reset by peer")
_LONGEST_ERROR = 200
_running: set[int] = set()
_starting = threading.Lock()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch could help: torch has one class for GPUs and a plain RuntimeError on the CPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and any(words in str(error).lower() for words in _MEMORY)
    )


def failure(error: BaseException) -> dict[str, Any]:
    """The part of a row that says what went wrong."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return {"error": text[:_LONGEST_ERROR], "out_of_memory": is_out_of_memory(error)}


def answer(measure: Callable[[dict[str, Any]], dict[str, Any]], argv: Sequence[str] | None = None) -> None:
    """What a row's process runs: `python -m MODULE SPEC FILE` measures and writes a row to the file, as JSON.

    Of several ranks the first writes the row, and each that fails writes its failure beside it. With a third word all
    end when the process that asked for the row has closed their standard input, as it does at its own end.
    """
    spec, file, *follows = sys.argv[1:] if argv is None else argv
    if follows:
        threading.Thread(target=_follow, args=(_input_closed,), daemon=True).start()
    rank = int(os.environ.get("LOCAL_RANK", 0))
    try:
        row, failed = measure(json.loads(spec)), False
    except Exception as error:
        import traceback

        traceback.print_exc()
        row, failed = failure(error), True
    if failed or rank == 0:
        Path(f"{file}.{rank}").write_text(json.dumps(row))
    if failed:
        sys.stderr.flush()
        # a rank that waits for others in its exit handlers would never end
        os._exit(1)


def run_row(
    module: str,
    spec: Mapping[str, Any],
    timeout: float,
    variables: Mapping[str, str] | None = None,
    warm: bool = False,
) -> dict[str, Any]:
    """Measure a row by `python -m <this package>.<module>`; whatever happens there, the answer is a row.

    Args:
        module: a module of this package that calls `answer` with its function `measure`.
        spec: what to measure, of plain values.
        timeout: seconds after which the process and its children are killed.
        variables: environment variables for it.
        warm: fork the process from one that has the module's libraries, where the system can: imports, which take
            seconds, are then paid once. For rows that do not time them.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "row", Path(folder) / "log"
        start = _fork if warm and "forkserver" in multiprocessing.get_all_start_methods() else _Spawned
        process = start(module, [json.dumps(dict(spec)), str(out)], log, dict(variables or {}))
        group = cast(int, process.pid)
        _running.add(group)
        try:
            process.join(timeout)
            code = process.exitcode
        finally:
            # ranks that outlive the first one, and all of them after a time-out or Ctrl-C
            _end(group)
            process.kill()  # before it has a group of its own
            process.join()
            _running.discard(group)
        return _judge([*_read(Path(folder))], code, timeout, log)


class _Spawned:
    """A process from nothing, with the face of multiprocessing's."""

    def __init__(self, module: str, argv: list[str], log: Path, variables: dict[str, str]) -> None:
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{NAME}.{module}", *argv, "follow"],
                cwd=log.parent,
                env={**os.environ, **variables, "PYTHONPATH": _path()},
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()

    def join(self, timeout: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
            cast(IO[bytes], self._process.stdin).close()


def _fork(module: str, argv: list[str], log: Path, variables: dict[str, str]) -> BaseProcess:
    log.touch()  # a process that ends before it has opened it has said nothing
    process = _server(module).Process(target=_measure, args=(module, argv, log, {**os.environ, **variables}))
    with _starting:
        process.start()
        # each start asks all processes that it knows for their exit codes, which can be read only once
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
    return process


@functools.cache
def _server(module: str) -> "ForkServerContext":
    context = multiprocessing.get_context("forkserver")
    # Python 3.11's server looks for what it is to import in the environment's path alone
    os.environ["PYTHONPATH"] = _path()
    context.set_forkserver_preload([f"{NAME}.{module}"])
    return context


def _measure(module: str, argv: list[str], log: Path, variables: dict[str, str]) -> None:
    """Become what `_Spawned` starts."""
    os.setsid()
    threading.Thread(target=_follow, args=(cast(Any, multiprocessing.parent_process()).join,), daemon=True).start()
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(log.parent)
    os.environ.update(variables)
    if "OMP_NUM_THREADS" in variables:
        # read by OpenMP when the libraries were imported
        import torch
        from threadpoolctl import threadpool_limits

        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
        threadpool_limits(int(variables["OMP_NUM_THREADS"]))
    answer(importlib.import_module(f"{NAME}.{module}").measure, argv)


def _follow(wait: Callable[[], object]) -> None:
    """End with the process that asked for the row, for whose end `wait` waits: else it went on beside the next run."""
    wait()
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _input_closed() -> None:
    # a reader of sys.stdin would hold its lock, without which Python cannot end
    while os.read(0, 1):
        pass


def _path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def end_all() -> None:
    """End the rows that other threads are waiting for: Ctrl-C reaches neither those nor their processes."""
    for group in list(_running):
        _end(group)


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _read(folder: Path) -> Iterator[dict[str, Any]]:
    for part in sorted(folder.glob("row.*")):
        # a full disk or the end of its process may have cut it off
        with contextlib.suppress(ValueError):
            yield json.loads(part.read_text())


def _judge(rows: list[dict[str, Any]], code: int | None, timeout: float, log: Path) -> dict[str, Any]:
    failed = [row for row in rows if row.get("error")]
    if failed:
        # the other ranks fail as well then, for want of the one
        told = next((row for row in failed if row.get("out_of_memory")), failed[0])
        # and where none says why, the kernel has ended it for its memory, as below
        lost = all(any(words in row["error"].lower() for words in _LOST) for row in failed)
        return told | {"out_of_memory": True} if lost else told
    if rows and code is not None:
        return rows[0]
    if code is None:
        return {"error": f"no result after {timeout:g} s"}
    if code < 0:
        name = signal.Signals(-code).name
        # the kernel ends what takes the machine's last memory like this
        # and C++ aborts where nobody catches its own
        aborted = name == "SIGABRT" and "std::bad_alloc" in log.read_text(errors="replace")
        return {"error": f"killed by {name}", "out_of_memory": name == "SIGKILL" or aborted}
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    return {"error": f"exit code {code}: {''.join(last)}"[:_LONGEST_ERROR]}


def with_smaller_batches(
    run: Callable[[dict[str, Any]], dict[str, Any]], spec: Mapping[str, Any]
) -> tuple[dict[str, Any], int]:
    """Run a row with its batch, and with half of it again and again while memory does not suffice.

    Returns:
        the row, and the batch that it was measured with.
    """
    batch = int(spec["batch"])
    while True:
        row = run({**spec, "batch": batch})
        if not row.pop("out_of_memory", False) or batch == 1:
            return row, batch
        batch //= 2
