"""A search over the settings of fit: optuna proposes settings, and each trial is an ordinary run in its own process.

If a trial crashes or runs out of memory, only this trial is lost. A trial that was stopped, or whose study was killed,
is proposed again with the same settings and continues from its checkpoint. The sampler is seeded again for each trial,
from the seed and the number of finished trials, so the study ends as if it had not been interrupted.
"""

import argparse
import contextlib
import csv
import difflib
import io
import json
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.pool import NullPool

from aezoo.cli.lightning_cli import AezooCLI
from aezoo.cli.tune_search import Search
from aezoo.errors import AezooError
from aezoo.io import atomic_files, run_folder, terminal
from aezoo.security import yaml_text
from aezoo.tasks.result_store import spreadsheet_cell
from aezoo.training import launcher
from aezoo.training.seeding import mix

# the command that a trial runs
FIT = (sys.executable, "-m", "aezoo", "fit")
_CALLBACK = "aezoo.callbacks.EpochMetrics"
_POLL = 0.2
# seconds for a stopped run to finish its batch or validation and to save
_PATIENCE = 120.0
# the median of fewer trials is unreliable, and the first epochs say little about the last
_FULL_TRIALS, _FIRST_EPOCHS = 5, 3
_MAX_FAILED = 3
# beginning of a line in optuna's journal
_ENTRY = b'{"op_code":'
_CURE = "make room, or choose a folder that can be written with --study"


class Stopped(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP; not an Exception, which optuna and its callees might treat as their own failure."""


class _DryRun(AezooCLI):
    """Reads and checks everything that a fit would, builds its model and its data, and trains nothing."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing."""


def run(options: argparse.Namespace, searches: Sequence[Search], flags: list[str], argv: list[str]) -> None:
    """Create a study, or continue it, until it has all its trials.

    Args:
        options: the flags of the search, see `aezoo.cli.tune`.
        searches: the settings to search.
        flags: all other flags of fit.
        argv: the whole command.

    Raises:
        AezooError: an error that the user can fix; mistakes in flags or searches are reported before the first trial.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP; the study can be continued.
    """
    environment = {**os.environ, launcher.TRIAL: "1"}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    home = _check_searches(searches, flags)
    folder = Path(options.study) if options.study else home.with_name(f"{home.name}-tune")
    with contextlib.ExitStack() as exit_stack:
        _lock_folder(folder, exit_stack)
        received = exit_stack.enter_context(_signals())
        study = None
        try:
            study = Study(folder, home.parent, options, searches, flags, argv, environment)
            study.run_trials()
        except Stopped:
            left = f"; {study.done()} of {options.trials} trials are done" if study else ""
            command = shlex.join(["aezoo", "tune", *argv])
            with contextlib.suppress(OSError):  # the terminal may be closed
                print(f"aezoo: interrupted{left}\ncontinue with: {command}", file=sys.stderr)
            sys.exit(128 + received[0])
        except BrokenPipeError:
            raise
        except (OSError, optuna.exceptions.StorageInternalError) as error:
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise AezooError(
                f"the study in {folder} stopped: {reason}; what was recorded is kept: mend that, make room if there is "
                "none, and give the same command again"
            ) from error


def _check_searches(searches: Sequence[Search], flags: list[str]) -> Path:
    """The folder of all runs of this command; checks each end of each search, one after the other."""
    first = {search.name: search.bounds()[0] for search in searches}
    home = _dry_run(flags, first)
    for search in searches:
        for value in search.bounds()[1:]:
            try:
                _dry_run(flags, first | {search.name: value})
            except AezooError as error:
                raise AezooError(f"--search.{search.name} {search.text}: {value} is not possible: {error}") from error
    return home


def _dry_run(flags: list[str], values: dict[str, str]) -> Path:
    logging.disable(logging.INFO)  # each check would print the seed
    try:
        with contextlib.ExitStack() as exit_stack:
            cli = _DryRun(["fit", *flags, *_to_flags(values)], exit_stack)
    finally:
        logging.disable(logging.NOTSET)
    trainer = cli.config["fit"]["trainer"]
    return Path(trainer.get("default_root_dir") or "runs") / cli.run_name()


def _to_flags(values: dict[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def _lock_folder(folder: Path, exit_stack: contextlib.ExitStack) -> None:
    parent = run_folder.existing_parent(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AezooError(f"cannot write {folder}: {error.strerror}; choose another with --study") from error
    try:
        exit_stack.enter_context(run_folder.locked(folder, parent))
    except AezooError as error:
        raise AezooError(f"{folder} is being tuned by another process: wait for it, or give another --study") from error


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and SIGHUP raise Stopped inside this context; the list records which of them."""
    received = [signal.SIGINT.value]

    def stop(signum: int, frame: Any) -> None:
        if signum == received[0] == terminal.HANGUP:
            return  # the kernel and the shell may each send the signal
        received[0] = signum
        raise Stopped

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, *terminal.termination_signals())}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Study:
    """One study and its folder.

    Args:
        folder: folder of the study.
        root: folder of all runs, for runs that are trained with the best settings.
        options: the flags of the search.
        searches: the settings to search.
        flags: all other flags of fit.
        argv: the whole command.
        environment: environment of the started processes.

    Raises:
        AezooError: its record cannot be read, or belongs to another study.
    """

    def __init__(
        self,
        folder: Path,
        root: Path,
        options: argparse.Namespace,
        searches: Sequence[Search],
        flags: list[str],
        argv: list[str],
        environment: dict[str, str],
    ) -> None:
        self.folder, self.options, self.searches, self.flags = folder, options, searches, flags
        self.root, self.environment = root, environment
        self.asked = {f"--search.{search.name}": search.text for search in searches}
        self.asked |= {f"--{name}": str(getattr(options, name)) for name in ("monitor", "direction", "seed", "prune")}
        self.asked["flags of fit"] = shlex.join(flags)
        record = Path(options.storage or folder / "study.log")
        if not options.storage:
            # no other process writes there, so the lock is from a killed process
            record.with_name(f"{record.name}.lock").unlink(missing_ok=True)
        try:
            self.optuna = self._open_study(record, shlex.join(["aezoo", "tune", *argv]))
        except AezooError:
            raise
        except Exception as error:  # of SQLite, SQLAlchemy or JSON
            text = " ".join(str(error).split())[:200]
            raise AezooError(f"cannot use {record} as a study: {text}; give another --storage") from error

    def _open_study(self, record: Path, command: str) -> optuna.Study:
        storage: Any
        record.parent.mkdir(parents=True, exist_ok=True)
        if record.suffix in (".db", ".sqlite", ".sqlite3"):
            storage = optuna.storages.RDBStorage(f"sqlite:///{record}", engine_kwargs={"poolclass": NullPool})
        else:
            # with a relative path optuna does not recognise the lock of a killed process and waits forever
            backend = JournalFileBackend(str(record.absolute()))
            _truncate_partial_line(record)
            storage = optuna.storages.JournalStorage(backend)
        name = self.folder.name
        folder = str(self.folder.absolute())
        direction = StudyDirection.MINIMIZE if self.options.direction == "min" else StudyDirection.MAXIMIZE
        existing = {summary.study_name for summary in optuna.get_all_study_summaries(storage)}
        if not self.options.storage and len(existing) == 1:
            (name,) = existing  # the name from before the folder was renamed
        if name in existing:
            study = optuna.load_study(study_name=name, storage=storage)
            if self.options.storage and (other := study.user_attrs.get("folder", folder)) != folder:
                raise AezooError(f"{record} holds {name!r} of {other}: give --study a folder of another name, or "
                                 "another --storage")  # fmt: skip
            differ = _differences(study.user_attrs.get("asked", {}), self.asked)
            if differ and any(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in study.trials):
                raise AezooError(
                    f"{record} holds a study with other {', '.join(differ)}: give another --study, or go on with it: "
                    f"{study.user_attrs.get('command')}"
                )
            if not differ:
                return study
            optuna.delete_study(study_name=name, storage=storage)
        study = optuna.create_study(study_name=name, storage=storage, direction=direction)
        study.set_user_attr("asked", self.asked)
        study.set_user_attr("command", command)
        study.set_user_attr("folder", folder)
        return study

    def done(self) -> int:
        """Trials that have ended by themselves or were pruned; a stopped trial is run again."""
        return sum(_is_finished(trial) for trial in self.optuna.get_trials(deepcopy=False))

    def run_trials(self) -> None:
        """Run trials until there are enough."""
        options, started = self.options, time.monotonic()
        pruner = optuna.pruners.MedianPruner(_FULL_TRIALS, _FIRST_EPOCHS)
        self.optuna.pruner = pruner if options.prune == "on" else optuna.pruners.NopPruner()
        for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.optuna.enqueue_trial(trial.params, user_attrs={"run": trial.user_attrs.get("run")})
            self.optuna.tell(trial.number, state=TrialState.FAIL)
        print(f"study {self.folder}: {self.done()} of {options.trials} trials are done")
        while self.done() < options.trials:
            if options.timeout is not None and time.monotonic() - started >= options.timeout:
                print(f"aezoo: {options.timeout:g} seconds are over: no further trial is started", file=sys.stderr)
                break
            seed = mix(options.seed, self.done()) % 2**32
            self.optuna.sampler = optuna.samplers.TPESampler(seed=seed)
            self._trial(self.optuna.ask())
        self._write()
        best = self.best()
        if best is None:
            raise AezooError(f"no trial finished with {options.monitor}: see {self.folder / 'trials.csv'}")
        print(
            f"best: trial {best.number}, {options.monitor} {best.user_attrs['value']:.6g}; "
            f"{_format_values(best.params)}"
        )
        print(f"its run: {_trial_run(self._trial_root(best))}\nall trials: {self.folder / 'trials.csv'}")
        print(f"train it again: aezoo fit -c {shlex.quote(str(self.folder / 'best.yaml'))}")

    def best(self) -> FrozenTrial | None:
        """The best of the completed trials."""
        whole = self.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        sign = 1 if self.options.direction == "min" else -1
        return min(whole, key=lambda trial: sign * trial.user_attrs["value"], default=None)

    def _trial_root(self, trial: Trial | FrozenTrial) -> Path:
        """The folder of a trial's run; the folder of the study may have been moved."""
        return self.folder / Path(trial.user_attrs["run"]).name

    def _trial(self, trial: Trial) -> None:
        root = self._trial_root(trial) if trial.user_attrs.get("run") else run_folder.create_next(self.folder)
        root.mkdir(exist_ok=True)
        trial.set_user_attr("run", root.name)
        values = {search.name: search.suggest(trial) for search in self.searches}
        log = root / "log.txt"
        print(f"trial {trial.number} runs, its output is in {log}: {_format_values(trial.params)}", flush=True)
        started = time.monotonic()
        state, error, epochs = self._fit(trial, root, values, log)
        best = self._best_value(epochs)
        trial.set_user_attr("seconds", round(time.monotonic() - started, 1))
        trial.set_user_attr("epochs", len(epochs))
        if best is not None:
            trial.set_user_attr("value", best)
        if error is not None:
            trial.set_user_attr("error", error)
        self.optuna.tell(trial, best if state == TrialState.COMPLETE else None, state=state)
        self._write()
        what = {TrialState.COMPLETE: "", TrialState.PRUNED: "pruned, "}.get(state, f"failed: {error}; ")
        figure = "" if best is None else f"{self.options.monitor} {best:.6g}, "
        print(f"trial {trial.number}: {what}{figure}{len(epochs)} epochs", flush=True)
        trials = self.optuna.get_trials(deepcopy=False)
        failed = [t for t in trials if "error" in t.user_attrs]
        if len(failed) >= _MAX_FAILED and len(failed) == sum(map(_is_finished, trials)):
            raise AezooError(f"the first {len(failed)} trials failed, the last with: {error}; see {log}")

    def _fit(
        self, trial: Trial, root: Path, values: dict[str, str], log: Path
    ) -> tuple[TrialState, str | None, dict[int, float]]:
        """How a run ended, why it failed, and the metric for each epoch."""
        again = ["--resume=auto"] if log.exists() else []
        command = [*FIT, *self.flags, *_to_flags(values), *again]
        command += [f"--trainer.default_root_dir={root}", f"--trainer.callbacks+={_CALLBACK}"]
        epochs: dict[int, float] = {}
        with log.open("ab") as file, _process(command, file, self.environment) as process:
            running = True
            while running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
                running = process.poll() is None
                for epoch, value in self._metric_values(root):
                    existing = epoch in epochs
                    epochs[epoch] = value
                    if not existing and math.isfinite(value):
                        trial.report(value, epoch)
                        # also after the run has ended: pruning must not depend on the time of the check
                        if trial.should_prune():
                            return TrialState.PRUNED, None, epochs
        if process.returncode:
            return TrialState.FAIL, _failure_reason(process.returncode, log), epochs
        if self._best_value(epochs) is None:
            return TrialState.FAIL, f"no finite {self.options.monitor} was logged", epochs
        return TrialState.COMPLETE, None, epochs

    def _metric_values(self, root: Path) -> Iterator[tuple[int, float]]:
        monitor = self.options.monitor
        for line in _lines(root):
            names = [name for name in line if "/" in name]
            if line["epoch"] >= 0 and monitor in line:
                yield line["epoch"], line[monitor]
            elif any(name.startswith(monitor.partition("/")[0]) for name in names) and monitor not in line:
                near = difflib.get_close_matches(monitor, names, n=1, cutoff=0.8)
                # values from callbacks do not exist before the first epoch has ended
                if line["epoch"] >= 0 or near:
                    hint = f", did you mean {near[0]}?" if near else f": there are {', '.join(sorted(names))}"
                    raise AezooError(f"--monitor {monitor} is not logged by these runs{hint}")

    def _best_value(self, epochs: dict[int, float]) -> float | None:
        finite = [value for value in epochs.values() if math.isfinite(value)]
        return (min if self.options.direction == "min" else max)(finite) if finite else None

    def _write(self) -> None:
        """Write `trials.csv` and `best.yaml`."""
        names = [search.name for search in self.searches]
        head = ["trial", "state", self.options.monitor, "epochs", "seconds", "run", *names, "error"]
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(head)
        for trial in self.optuna.get_trials(deepcopy=False):
            attributes, state = trial.user_attrs, trial.state.name.lower()
            if trial.state == TrialState.FAIL and "error" not in attributes:
                state = "interrupted"
            figures = [attributes.get(key, "") for key in ("value", "epochs", "seconds")]
            figures.append(str(self._trial_root(trial)) if attributes.get("run") else "")
            values = [trial.params.get(name, "") for name in names]
            row = [trial.number, state, *figures, *values, attributes.get("error", "")]
            table.writerow([spreadsheet_cell(cell) for cell in row])
        content = text.getvalue().encode("utf-8", "backslashreplace")
        atomic_files.write(self.folder / "trials.csv", lambda file: file.write(content), cure=_CURE)
        best = self.best()
        if best is None:
            return
        config = yaml_text.read(_trial_run(self._trial_root(best)) / "config.yaml")
        trainer = config["trainer"]
        trainer["default_root_dir"] = None if self.root == Path("runs") else str(self.root)
        added = [item for item in trainer.get("callbacks") or [] if item.get("class_path") != _CALLBACK]
        trainer["callbacks"] = added or None
        figure = f"{self.options.monitor} {best.user_attrs['value']:.6g}"
        text_of = f"# trial {best.number} of {self.folder}: {figure}\n" + yaml.safe_dump(config, sort_keys=False)
        atomic_files.write(self.folder / "best.yaml", lambda file: file.write(text_of.encode()), cure=_CURE)


@contextlib.contextmanager
def _process(command: list[str], log: Any, environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a run; if it is still running when the context ends, it is stopped and saves its state.

    It has its own session, so that Ctrl-C does not reach it directly.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_PATIENCE)
            except BaseException as error:  # also a second Ctrl-C
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise


def _truncate_partial_line(record: Path) -> None:
    """Remove an incomplete line that a killed process or a full disk has left at the end of a journal.

    Otherwise the next line would be appended to it, and neither could be read.
    """
    lock = JournalFileSymlinkLock(str(record.absolute()))
    lock.acquire()
    try:
        with record.open("rb+") as file:
            whole, end, partial = file.read().rpartition(b"\n")
            if partial and (partial.startswith(_ENTRY) or _ENTRY.startswith(partial)):
                file.truncate(len(whole + end))
    finally:
        lock.release()


def _lines(root: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics; after a power loss, a line may start after the remains of another."""
    lines = []
    for path in root.glob("*/*/metrics.jsonl"):
        whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line[max(line.rfind('{"epoch"'), 0) :]))
    return lines


def _trial_run(root: Path) -> Path:
    """The folder of the run of a trial."""
    return next((path.parent for path in sorted(root.glob("*/*/config.yaml"))), root)


def _failure_reason(code: int, log: Path) -> str:
    if code < 0:
        often = " (often: no memory left)" if -code == signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{often}"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return (lines[-1] if lines else f"exit code {code}").removeprefix("aezoo: ")[:300]


def _is_finished(trial: FrozenTrial) -> bool:
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or "error" in trial.user_attrs


def _differences(then: dict[str, str], now: dict[str, str]) -> list[str]:
    return sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))


def _format_values(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in values.items())  # fmt: skip
