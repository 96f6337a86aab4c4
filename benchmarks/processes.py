"""Rows in separate processes: after a crash, a time-out or insufficient memory, one row records the reason."""

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
    # does not exist on Windows
    from multiprocessing.context import ForkServerContext

# the last is how torch reports C++'s own error
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "std::bad_alloc")
# messages of ranks about another rank that ended without a message
_CONNECTION_LOST = ("closed by peer", "reset by peer")
_MAX_ERROR_LENGTH = 200
_running: set[int] = set()
_starting = threading.Lock()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch could help: torch has one class for GPUs and a plain RuntimeError on the CPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)
    )


def error_columns(error: BaseException) -> dict[str, Any]:
    """The part of a row that describes an error."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return {"error": text[:_MAX_ERROR_LENGTH], "out_of_memory": is_out_of_memory(error)}


def run_measurement(measure: Callable[[dict[str, Any]], dict[str, Any]], argv: Sequence[str] | None = None) -> None:
    """The main function of a row's process: `python -m MODULE SPEC FILE` measures a row and writes it as JSON to FILE.

    The first of several ranks writes the row, and each rank that fails writes its failure next to it. With a third
    argument all ranks end when the requesting process closes their standard input, which also happens when it ends.
    """
    spec, file, *follows = sys.argv[1:] if argv is None else argv
    if follows:
        threading.Thread(target=_end_with_parent, args=(_wait_for_closed_input,), daemon=True).start()
    rank = int(os.environ.get("LOCAL_RANK", 0))
    try:
        row, failed = measure(json.loads(spec)), False
    except Exception as error:
        import traceback

        traceback.print_exc()
        row, failed = error_columns(error), True
    if failed or rank == 0:
        Path(f"{file}.{rank}").write_text(json.dumps(row))
    if failed:
        sys.stderr.flush()
        # exit handlers may wait for other ranks forever
        os._exit(1)


def run_row(
    module: str,
    spec: Mapping[str, Any],
    timeout: float,
    variables: Mapping[str, str] | None = None,
    warm: bool = False,
) -> dict[str, Any]:
    """Measure a row with `python -m <this package>.<module>`; the result is a row in any case.

    Args:
        module: a module of this package that calls `run_measurement` with its function `measure`.
        spec: what to measure, as plain values.
        timeout: seconds after which the process and its children are killed.
        variables: environment variables for the process.
        warm: fork the process from one that has already imported the module's libraries, where the system supports it.
            Imports take seconds and then happen only once. For rows that do not time them.
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
            # ends ranks that outlive the first one, and all ranks after a time-out or Ctrl-C
            _kill_group(group)
            process.kill()  # it may not have its own group yet
            process.join()
            _running.discard(group)
        return _outcome([*_read_rows(Path(folder))], code, timeout, log)


class _Spawned:
    """A newly started process with the interface of multiprocessing's."""

    def __init__(self, module: str, argv: list[str], log: Path, variables: dict[str, str]) -> None:
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{NAME}.{module}", *argv, "follow"],
                cwd=log.parent,
                env={**os.environ, **variables, "PYTHONPATH": _python_path()},
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
    log.touch()  # the log must exist if the process ends before it opens it
    process = _fork_server(module).Process(target=_measure, args=(module, argv, log, {**os.environ, **variables}))
    with _starting:
        process.start()
        # each start polls all known processes for their exit codes, which can be read only once
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
    return process


@functools.cache
def _fork_server(module: str) -> "ForkServerContext":
    context = multiprocessing.get_context("forkserver")
    # Python 3.11's server searches only the environment's path for its imports
    os.environ["PYTHONPATH"] = _python_path()
    context.set_forkserver_preload([f"{NAME}.{module}"])
    return context


def _measure(module: str, argv: list[str], log: Path, variables: dict[str, str]) -> None:
    """Turn a forked process into one like those that `_Spawned` starts."""
    os.setsid()
    threading.Thread(
        target=_end_with_parent, args=(cast(Any, multiprocessing.parent_process()).join,), daemon=True
    ).start()
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(log.parent)
    os.environ.update(variables)
    if "OMP_NUM_THREADS" in variables:
        # OpenMP has read the variable when the libraries were imported
        import torch
        from threadpoolctl import threadpool_limits

        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
        threadpool_limits(int(variables["OMP_NUM_THREADS"]))
    run_measurement(importlib.import_module(f"{NAME}.{module}").measure, argv)


def _end_with_parent(wait: Callable[[], object]) -> None:
    """Wait for the end of the requesting process, then end too, so that this process does not disturb the next run."""
    wait()
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _wait_for_closed_input() -> None:
    # reading sys.stdin would hold its lock, which Python needs to exit
    while os.read(0, 1):
        pass


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def kill_all() -> None:
    """End the rows that other threads wait for: Ctrl-C reaches neither these threads nor their processes."""
    for group in list(_running):
        _kill_group(group)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    for part in sorted(folder.glob("row.*")):
        # a full disk or the end of the process may have cut the file off
        with contextlib.suppress(ValueError):
            yield json.loads(part.read_text())


def _outcome(rows: list[dict[str, Any]], code: int | None, timeout: float, log: Path) -> dict[str, Any]:
    failed = [row for row in rows if row.get("error")]
    if failed:
        # other ranks fail too when one runs out of memory
        reported = next((row for row in failed if row.get("out_of_memory")), failed[0])
        # if no rank reports an error, the kernel has killed one for its memory, as below
        only_lost_connections = all(any(words in row["error"].lower() for words in _CONNECTION_LOST) for row in failed)
        return reported | {"out_of_memory": True} if only_lost_connections else reported
    if rows and code is not None:
        return rows[0]
    if code is None:
        return {"error": f"no result after {timeout:g} s"}
    if code < 0:
        name = signal.Signals(-code).name
        # the kernel kills a process that takes the last memory with SIGKILL,
        # and C++ aborts if nothing catches its own error
        aborted = name == "SIGABRT" and "std::bad_alloc" in log.read_text(errors="replace")
        return {"error": f"killed by {name}", "out_of_memory": name == "SIGKILL" or aborted}
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    return {"error": f"exit code {code}: {''.join(last)}"[:_MAX_ERROR_LENGTH]}


def with_smaller_batches(
    run: Callable[[dict[str, Any]], dict[str, Any]], spec: Mapping[str, Any]
) -> tuple[dict[str, Any], int]:
    """Run a row, and halve its batch as long as memory does not suffice.

    Returns:
        the row, and the batch size that it was measured with.
    """
    batch = int(spec["batch"])
    while True:
        row = run({**spec, "batch": batch})
        if not row.pop("out_of_memory", False) or batch == 1:
            return row, batch
        batch //= 2
