"""Run the fuzzing and count: exit code 0 if every case was read or refused in one line."""

import argparse
import contextlib
import faulthandler
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings

from aezoo.cli import lightning_cli
from aezoo.errors import AezooError

from .configs import texts
from .contents import all_contents
from .edits import damaged
from .kinds import all_kinds

SECONDS, GROWTH = 20, 2**28


class TooLong(BaseException):
    """Raised by the alarm; no reader's `except Exception` may swallow it."""


def _alarm(*_):
    raise TooLong


def _most_memory():
    """Peak memory of this process in KiB; on Linux since the last reset through clear_refs."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.partition("VmHWM:")[2].split()[0])


def attempt(read):
    """`read` or `refused`; anything else is a defect."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak (proc(5))
    before = _most_memory()
    signal.alarm(SECONDS)
    # for a reader that hangs outside Python, where the alarm cannot be raised
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            read()
        result, text = "read", "read"
    except AezooError as error:
        result, text = "refused", str(error)
    except TooLong:
        raise AssertionError(f"it takes more than {SECONDS} seconds") from None
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    assert len(text.splitlines()) == 1, f"a message of several lines: {text!r}"
    assert len(text) < 1500, f"a message of {len(text)} characters: {text[:500]}"
    grown = (_most_memory() - before) * 1024
    assert grown < GROWTH, f"it takes {grown / 2**20:.0f} MiB of memory"
    return result


def search(strategy, check, examples, seed):
    """Draw cases, count their results, and raise the first defects with the smallest case of each."""
    counts = Counter()

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    @given(strategy)
    def run(content):
        counts[check(content)] += 1

    run()
    return {"read": counts["read"], "refused": counts["refused"]}


def file_check(kind, folder):
    """Write a damaged file and read it."""

    def check(payload):
        path = folder / kind.name
        path.write_bytes(kind.pack(payload))
        return attempt(lambda: kind.read(path))

    return check


class Prepared(lightning_cli.AezooCLI):
    """Parse and check a configuration, and build model, data and trainer, without running them."""

    def _run_subcommand(self, subcommand):
        pass


def config_check(folder):
    """Write a configuration, prepare a fit from it, and empty the working directory."""

    def check(text):
        path = folder / "fuzzed.yaml"
        path.write_bytes(text)
        try:
            with contextlib.ExitStack() as ends:
                return attempt(lambda: Prepared(["fit", "-c", str(path)], ends))
        finally:
            torch.use_deterministic_algorithms(False)
            os.environ.pop("AEZOO_RUN_DIR", None)
            for left in Path().iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    return check


def main():
    """Parse the budget, search, and write the counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--files", type=int, default=5000, help="damaged files, shared among the kinds")
    parser.add_argument("--configs", type=int, default=1000, help="configurations")
    parser.add_argument("--only", default="", help="one kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    arguments = parser.parse_args()
    out = arguments.out.absolute() if arguments.out else None
    signal.signal(signal.SIGALRM, _alarm)
    started, failures, results = time.perf_counter(), 0, {}
    with tempfile.TemporaryDirectory() as name:
        folder, elsewhere = Path(name), Path(name) / "cwd"
        elsewhere.mkdir()
        os.chdir(elsewhere)
        sys.stderr.reconfigure(errors="backslashreplace")
        kinds = all_kinds(folder / "valid")
        searches = {}
        for key, kind in kinds.items():
            kind_folder = folder / "kinds" / key.replace(", ", "_")
            kind_folder.mkdir(parents=True)
            assert file_check(kind, kind_folder)(kind.payload) == "read", f"the valid {key} is refused"
            searches[key] = damaged(kind.payload), file_check(kind, kind_folder), 1.0
        searches |= all_contents(folder / "contents", attempt, kinds)
        chosen = {key: each for key, each in searches.items() if arguments.only in ("", key)}
        share = arguments.files / max(1, len(chosen))
        chosen = {key: (strategy, check, math.ceil(part * share)) for key, (strategy, check, part) in chosen.items()}
        if arguments.configs:
            chosen["yaml"] = texts, config_check(folder), arguments.configs
        for number, (key, (strategy, check, examples)) in enumerate(chosen.items()):
            if not examples:
                continue
            try:
                results[key] = search(strategy, check, examples, 1000 * arguments.seed + number)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failures += 1
                import traceback

                print(f"---- {key}", file=sys.stderr)
                traceback.print_exception(error)
        os.chdir("/")
    configs = results.pop("yaml", {"read": 0, "refused": 0})
    total = {
        "files": sum(sum(counts.values()) for counts in results.values()),
        "configs": sum(configs.values()),
        "defects": failures,
        "seed": arguments.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
        "hypothesis": hypothesis.__version__,
        "kinds": {**results, "yaml": configs},
    }
    text = json.dumps(total, indent=2)
    print(text)
    if out is not None and not failures:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
