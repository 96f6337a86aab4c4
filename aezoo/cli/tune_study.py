"""A search over the settings of fit: optuna proposes settings, and each trial is an ordinary run in a new process.

If a trial crashes or runs out of memory, only this trial is lost. Any number of processes, on any machines, can be
workers of one study, which they only share through its storage. A trial whose worker was stopped or lost runs again
with the same settings, and continues from its checkpoint if the next worker finds the folder of its run.
"""

import argparse
import contextlib
import copy
import difflib
import itertools
import json
import logging
import math
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from aezoo.cli import tune_report, tune_storage
from aezoo.cli.lightning_cli import AezooCLI
from aezoo.cli.tune_samplers import WorkerSampler
from aezoo.cli.tune_search import Search
from aezoo.errors import AezooError
from aezoo.io import atomic_files, run_folder, terminal
from aezoo.security import yaml_text
from aezoo.training import launcher

# the command that a trial runs
FIT = (sys.executable, "-m", "aezoo", "fit")
_CALLBACK = "aezoo.callbacks.EpochMetrics"
_POLL = 0.2
# seconds for a stopped run to finish its batch or validation and to save
_PATIENCE = 120.0
# the median of fewer trials is unreliable, and the first epochs say little about the last
_FULL_TRIALS, _FIRST_EPOCHS = 5, 3
_MAX_FAILED = 3
# a trial that has ended this many workers is likely to end the next one
_MAX_LOST = 3
# seconds between two checks of other workers' trials, at most, and heartbeats within --lost_after
_WAIT, _BEATS = 1.0, 4
# seconds for the process that has created a study to record its settings
_CREATED = 5.0
# file in the folder of a run that contains the number of its trial
_MARK = ".trial"
# flags of fit that may differ between machines
_LOCAL_FLAGS = ("--trainer.default_root_dir", "--trainer.accelerator", "--data.num_workers")


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
    # optuna's warnings do not concern the user; what ends a study is an exception
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    home = _check_searches(searches, flags)
    folder = Path(options.study) if options.study else home.with_name(f"{home.name}-tune")
    with contextlib.ExitStack() as exit_stack:
        exit_stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", ExperimentalWarning)
        received = exit_stack.enter_context(_signals())
        study = None
        try:
            shared = exit_stack.enter_context(_share(folder))
            study = Study(folder, home.parent, options, searches, flags, argv, environment, shared)
            study.run_trials()
        except Stopped:
            _print_interrupted(study, options, argv)
            sys.exit(128 + received[0])
        except BrokenPipeError:
            raise
        except (OSError, optuna.exceptions.StorageInternalError) as error:
            why, cure = tune_storage.reason(error), "free disk space if it is full"
            if options.storage and tune_storage.is_database(options.storage) and not isinstance(error, OSError):
                cure = tune_storage.cure(why)
            raise AezooError(
                f"the study in {folder} stopped: {why}; what was recorded is kept: fix that, {cure}, and run the "
                "same command again"
            ) from error


def _print_interrupted(study: "Study | None", options: argparse.Namespace, argv: Sequence[str]) -> None:
    left = ""
    # the record or the terminal may not exist any more, and another signal ends this at once
    with contextlib.suppress(Exception, Stopped):
        if study:
            left = f"; {study.done()} of {options.trials} trials are done"
            study.write_files()
    with contextlib.suppress(OSError, Stopped):
        print(f"aezoo: interrupted{left}\ncontinue with: {_command(argv)}", file=sys.stderr)


def _command(argv: Sequence[str]) -> str:
    return shlex.join(["aezoo", "tune", *map(tune_storage.hide_passwords, argv)])


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


def _share(folder: Path) -> run_folder.SharedFolder:
    parent = run_folder.existing_parent(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AezooError(f"cannot write {folder}: {error.strerror}; choose another with --study") from error
    return run_folder.SharedFolder(folder, parent)


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
    """One study as seen by one worker, and the folder of this worker.

    A trial and those that run it again are its attempts; they count as one.

    Args:
        folder: folder of the study, which workers may share.
        root: folder of all runs, for runs that are trained with the best settings.
        options: the flags of the search.
        searches: the settings to search.
        flags: all other flags of fit.
        argv: the whole command.
        environment: environment of the started processes.
        shared: the lock of the folder.

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
        shared: run_folder.SharedFolder,
    ) -> None:
        self.folder, self.options, self.searches, self.flags = folder, options, searches, flags
        self.root, self.environment = root, environment
        self.host, self.watch = socket.gethostname(), _Watch(options.lost_after)
        self.asked = {f"--search.{search.name}": search.text for search in searches}
        names = ("monitor", "direction", "sampler", "seed", "prune")
        self.asked |= {f"--{name}": str(getattr(options, name)) for name in names}
        self.asked["flags of fit"] = shlex.join(_without_local(flags))
        record = options.storage or str(folder / "study.log")
        if shared.alone and not options.storage:
            # no other process writes there, so the lock is from a killed process
            Path(f"{record}.lock").unlink(missing_ok=True)
        self.record = tune_storage.hide_passwords(record)
        try:
            self.optuna = self._open_study(record, _command(argv), shared.alone)
        except AezooError:
            raise
        except Exception as error:  # of SQLite, psycopg, SQLAlchemy or JSON
            why, cure = tune_storage.reason(error), "give another --storage"
            if tune_storage.is_database(record):
                cure = tune_storage.cure(why)
            raise AezooError(f"cannot use {self.record} as a study: {why}; {cure}") from error
        pruner = optuna.pruners.MedianPruner(_FULL_TRIALS, _FIRST_EPOCHS)
        self.optuna.pruner = pruner if options.prune == "on" else optuna.pruners.NopPruner()
        self.optuna.sampler = WorkerSampler(options.sampler, options.seed, searches, self._place)
        shared.admit()

    def _open_study(self, record: str, command: str, alone: bool) -> optuna.Study:
        storage = tune_storage.open_storage(record)
        name = self.options.study_name or self.folder.name
        direction = StudyDirection.MINIMIZE if self.options.direction == "min" else StudyDirection.MAXIMIZE
        existing = {summary.study_name for summary in optuna.get_all_study_summaries(storage)}
        if not self.options.storage and not self.options.study_name and len(existing) == 1:
            (name,) = existing  # the name before the folder was renamed
        if name in existing:
            study = optuna.load_study(study_name=name, storage=storage)
            if alone:
                self._end_own_trials(study)
            asked = _asked(study)
            differ = _differences(asked, self.asked) if asked else []
            states = {trial.state for trial in study.get_trials(deepcopy=False)}
            if differ and states & {TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING}:
                raise AezooError(
                    f"{self.record} contains a study with other {', '.join(differ)}: give another "
                    f"{'--study_name' if self.options.storage else '--study'}, or continue it: "
                    f"{study.user_attrs.get('command')}"
                )
            if asked and not differ:
                return study
            if differ:
                optuna.delete_study(study_name=name, storage=storage)
        study = optuna.create_study(study_name=name, storage=storage, direction=direction, load_if_exists=True)
        study.set_user_attr("command", command)
        study.set_user_attr("asked", self.asked)
        return study

    def _end_own_trials(self, study: optuna.Study) -> None:
        """Requeue the trials that killed processes of this folder were running."""
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            place = trial.user_attrs.get("place")
            # a storage in this folder can have no other workers
            lost = not self.options.storage if place is None else place["host"] == self.host and self._is_here(trial)
            if lost and _end(study, trial.number):
                _queue(study, trial)

    def attempts(self) -> dict[int, list[FrozenTrial]]:
        """The attempts at each trial, by the number of the first, without those that were withdrawn before they ran."""
        found: dict[int, list[FrozenTrial]] = defaultdict(list)
        for trial in self.optuna.get_trials(deepcopy=False):
            if "withdrawn" not in trial.user_attrs:
                found[_first(trial)].append(trial)
        return found

    def done(self) -> int:
        """Trials that have ended by themselves or were pruned; a stopped trial is run again."""
        return sum(map(_is_done, self.attempts().values()))

    def run_trials(self) -> None:
        """Run trials until the study has enough, or wait for those of other workers."""
        options, started, waits = self.options, time.monotonic(), False
        print(f"study {self.folder}: {self.done()} of {options.trials} trials are done")
        while True:
            self._run_lost_again()
            attempts = self.attempts()
            done = sum(map(_is_done, attempts.values()))
            if done >= options.trials:
                break
            if options.timeout is not None and time.monotonic() - started >= options.timeout:
                print(f"aezoo: {options.timeout:g} seconds are over: no further trial is started", file=sys.stderr)
                break
            waiting = any(trial.state == TrialState.WAITING for trial in itertools.chain(*attempts.values()))
            if waiting or len(attempts) < options.trials:
                self._run_next()
                waits = False
                continue
            if not waits:
                print(f"waiting for {len(attempts) - done} trials of other workers, to run lost ones again")
                waits = True
            time.sleep(min(_WAIT, options.lost_after / (2 * _BEATS)))
        self.write_files()
        best = self.best()
        if best is None:
            raise AezooError(f"no trial finished with {options.monitor}: see {self.folder / 'trials.csv'}")
        print(
            f"best: trial {best.number}, {options.monitor} {best.user_attrs['value']:.6g}; "
            f"{_format_values(best.params)}"
        )
        where = _trial_run(Path(self._where(best))) if self._is_here(best) else self._where(best)
        print(f"its run: {where}\nall trials: {self.folder / 'trials.csv'}, {self.folder / 'study.html'}")
        print(f"train it again: aezoo fit -c {shlex.quote(str(self.folder / 'best.yaml'))}")

    def best(self) -> FrozenTrial | None:
        """The best of the completed trials."""
        whole = self.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        sign = 1 if self.options.direction == "min" else -1
        return min(whole, key=lambda trial: sign * trial.user_attrs["value"], default=None)

    def _place(self, trial: FrozenTrial) -> int:
        return sum(first < _first(trial) for first in self.attempts())

    def _run_lost_again(self, own: int | None = None) -> None:
        """Queue the trials of lost workers."""
        running = self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in self.watch.lost(trial for trial in running if trial.number != own):
            print(f"trial {trial.number} has sent no heartbeat for too long: its worker is lost")
            _end(self.optuna, trial.number)
            if _is_done(self.attempts()[_first(trial)]):
                print(f"trial {trial.number} has been lost with {_MAX_LOST} workers and is not run again")
        for attempts in self.attempts().values():
            # a worker may be lost after it has ended a trial and before it has queued it again
            if not _is_done(attempts) and all(trial.state == TrialState.FAIL for trial in attempts):
                _queue(self.optuna, attempts[-1], lost=1)

    def _root_of(self, trial: Trial) -> Path | None:
        """The folder of the run of an earlier attempt at a trial, if this worker can continue it."""
        if not self._is_here(trial):
            return None
        root = self.folder / Path(trial.user_attrs["run"]).name
        return None if any(run_folder.is_locked(lock.parent) for lock in root.glob("*/*/.lock")) else root

    def _is_here(self, trial: Trial | FrozenTrial) -> bool:
        """Whether the run of a trial is in the folder of this worker, which may have been moved."""
        if "run" not in trial.user_attrs:
            return False
        root, place = self.folder / Path(trial.user_attrs["run"]).name, trial.user_attrs.get("place")
        if place is None:
            return root.is_dir()
        try:
            return (root / _MARK).read_text() == place["mark"]
        except OSError:
            return False

    def _where(self, trial: FrozenTrial) -> str:
        if self._is_here(trial):
            return str(self.folder / Path(trial.user_attrs["run"]).name)
        place = trial.user_attrs.get("place")
        return f"{place['host']}:{place['folder']}" if place else ""

    def _run_next(self) -> None:
        """Run a queued trial or a new one, unless other workers have been faster."""
        trial = self.optuna.ask()
        with _Heartbeat(trial, self.options.lost_after) as heartbeat:
            try:
                if self._is_surplus(trial):
                    trial.set_user_attr("withdrawn", True)
                    self.optuna.tell(trial, state=TrialState.FAIL)
                else:
                    self._trial(trial, heartbeat)
            except UpdateFinishedTrialError:
                print(
                    f"trial {trial.number} was taken over by another worker, which received no heartbeat for too long"
                )
            except BaseException:
                with contextlib.suppress(Exception):  # other workers will notice
                    trial.set_user_attr("handed_back", True)
                    if _end(self.optuna, trial.number):
                        _queue(self.optuna, self.optuna.get_trials(deepcopy=False)[trial.number])
                raise

    def _is_surplus(self, trial: Trial) -> bool:
        attempts = self.attempts()
        first = next(first for first, these in attempts.items() if trial.number in [t.number for t in these])
        if first == trial.number:
            return sum(other < first for other in attempts) >= self.options.trials
        return _is_done(attempts[first]) or any(
            other.state == TrialState.RUNNING and other.number < trial.number for other in attempts[first]
        )

    def _trial(self, trial: Trial, heartbeat: "_Heartbeat") -> None:
        root = self._root_of(trial)
        if root is None:
            root, mark = run_folder.create_next(self.folder), secrets.token_hex(8)
            (root / _MARK).write_text(mark)
            place = {"host": self.host, "folder": str(root.absolute()), "mark": mark}
            trial.set_user_attr("place", place)
            trial.set_user_attr("run", root.name)
        values = {search.name: search.suggest(trial) for search in self.searches}
        log = root / "log.txt"
        print(f"trial {trial.number} runs, its output is in {log}: {_format_values(trial.params)}", flush=True)
        started = time.monotonic()
        state, error, epochs = self._fit(trial, root, values, log, heartbeat)
        # some epochs of a run are not validated, but the last one is
        best, n_epochs = self._best_value(epochs), max(epochs, default=-1) + 1
        trial.set_user_attr("seconds", round(time.monotonic() - started, 1))
        trial.set_user_attr("epochs", n_epochs)
        if best is not None:
            trial.set_user_attr("value", best)
            if self.options.storage and state == TrialState.COMPLETE and self._is_better(best):
                # for workers that cannot read this folder
                trial.set_user_attr("config", (_trial_run(root) / "config.yaml").read_text(encoding="utf-8"))
        if error is not None:
            trial.set_user_attr("error", error)
        self.optuna.tell(trial, best if state == TrialState.COMPLETE else None, state=state)
        self._write_tables()
        what = {TrialState.COMPLETE: "", TrialState.PRUNED: "pruned, "}.get(state, f"failed: {error}; ")
        figure = "" if best is None else f"{self.options.monitor} {best:.6g}, "
        print(f"trial {trial.number}: {what}{figure}{n_epochs} epochs", flush=True)
        trials = self.optuna.get_trials(deepcopy=False)
        failed = [t for t in trials if "error" in t.user_attrs]
        if len(failed) >= _MAX_FAILED and len(failed) == sum(map(_is_finished, trials)):
            raise AezooError(f"the first {len(failed)} trials failed, the last with: {error}; see {log}")

    def _is_better(self, value: float) -> bool:
        best = self.best()
        sign = 1 if self.options.direction == "min" else -1
        return best is None or sign * value < sign * best.user_attrs["value"]

    def _fit(
        self, trial: Trial, root: Path, values: dict[str, str], log: Path, heartbeat: "_Heartbeat"
    ) -> tuple[TrialState, str | None, dict[int, float]]:
        """How a run ended, why it failed, and the metric for each epoch."""
        again = ["--resume=auto"] if log.exists() else []
        command = [*FIT, *self.flags, *_to_flags(values), *again]
        command += [f"--trainer.default_root_dir={root}", f"--trainer.callbacks+={_CALLBACK}"]
        epochs: dict[int, float] = {}
        looked = time.monotonic()
        with log.open("ab") as file, _process(command, file, self.environment) as process:
            running = True
            while running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
                running = process.poll() is None
                if heartbeat.taken:
                    raise UpdateFinishedTrialError
                if time.monotonic() - looked > self.options.lost_after / (2 * _BEATS):
                    self._run_lost_again(trial.number)
                    looked = time.monotonic()
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

    def write_files(self) -> None:
        """Write `trials.csv`, `best.yaml` and `study.html`."""
        self._write_tables()
        best, options = self.best(), self.options
        states = Counter(map(_state, self._listed()))
        facts = {
            "metric": f"{options.monitor}, {'smallest' if options.direction == 'min' else 'largest'} of all epochs",
            "sampler": f"{options.sampler}, seed {options.seed}; pruning {options.prune}",
            "trials": ", ".join(f"{count} {state}" for state, count in sorted(states.items())),
        }
        if best is not None:
            figure = f"{options.monitor} {best.user_attrs['value']:.6g}"
            facts["best"] = f"trial {best.number}: {figure}; {_format_values(best.params)}"
        tune_report.write_page(self.folder / "study.html", self.optuna, options.monitor, facts)

    def _listed(self) -> list[FrozenTrial]:
        """All attempts by number, without those that two workers have queued for one trial."""
        listed = []
        for attempts in self.attempts().values():
            done = _is_done(attempts)
            listed += [trial for trial in attempts if not (done and trial.state == TrialState.WAITING)]
        return sorted(listed, key=lambda trial: trial.number)

    def _write_tables(self) -> None:
        names = [search.name for search in self.searches]
        head = ["trial", "state", self.options.monitor, "epochs", "seconds", "run", *names, "error"]
        rows = []
        for trial in self._listed():
            attributes = trial.user_attrs
            figures = [attributes.get(key, "") for key in ("value", "epochs", "seconds")]
            values = [trial.params.get(name, "") for name in names]
            error = attributes.get("error", "")
            rows.append([trial.number, _state(trial), *figures, self._where(trial), *values, error])
        tune_report.write_table(self.folder / "trials.csv", head, rows)
        best = self.best()
        if best is None:
            return
        if self._is_here(best):
            config = yaml_text.read(_trial_run(Path(self._where(best))) / "config.yaml")
        elif "config" in best.user_attrs:
            try:
                config = yaml_text.load(best.user_attrs["config"])
            except yaml.YAMLError as error:
                raise AezooError(f"{self.record}: the settings of trial {best.number} cannot be read") from error
        else:
            return
        trainer = config["trainer"]
        trainer["default_root_dir"] = None if self.root == Path("runs") else str(self.root)
        added = [item for item in trainer.get("callbacks") or [] if item.get("class_path") != _CALLBACK]
        trainer["callbacks"] = added or None
        figure = f"{self.options.monitor} {best.user_attrs['value']:.6g}"
        text_of = f"# trial {best.number} of {self.folder}: {figure}\n" + yaml.safe_dump(config, sort_keys=False)
        atomic_files.write(self.folder / "best.yaml", lambda file: file.write(text_of.encode()), cure=tune_report.CURE)


class _Heartbeat:
    """Heartbeats of a running trial in the study's record, while this context is open.

    optuna's heartbeat only works for databases, stops after the first one that cannot be written, and does not find a
    trial whose worker was lost before the first one.

    Attributes:
        taken: whether another worker has ended the trial, to run it again.
    """

    def __init__(self, trial: Trial, lost_after: float) -> None:
        self._trial, self._lost_after = trial, lost_after
        self._stop = threading.Event()
        # a server that does not answer must not keep the process running
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.taken = False

    def __enter__(self) -> "_Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(1.0)

    def _beat(self) -> None:
        for count in itertools.count():
            try:
                self._trial.set_user_attr("heartbeat", [count, self._lost_after])
            except UpdateFinishedTrialError:
                self.taken = True
                return
            except Exception:  # the next may be written
                pass
            if self._stop.wait(self._lost_after / _BEATS):
                return


class _Watch:
    """Finds lost workers by the clock of this process only, because the clocks of machines differ.

    Args:
        lost_after: seconds without a heartbeat, for a worker that has sent none.
    """

    def __init__(self, lost_after: float) -> None:
        self._lost_after, self._looked = lost_after, -math.inf
        self._seen: dict[int, tuple[Any, float]] = {}

    def lost(self, running: Iterable[FrozenTrial]) -> list[FrozenTrial]:
        """Those of the running trials whose workers are lost."""
        now, lost = time.monotonic(), []
        if now - self._looked > self._lost_after / 2:
            self._seen.clear()  # this process, or the server for all of them, was suspended
        self._looked = now
        for trial in running:
            beat = trial.user_attrs.get("heartbeat")
            before, since = self._seen.get(trial.number, (None, now))
            if trial.number not in self._seen or before != beat:
                self._seen[trial.number] = beat, now
            elif now - since > (beat[1] if beat else self._lost_after):
                lost.append(trial)
        return lost


def _first(trial: FrozenTrial) -> int:
    return int(trial.system_attrs.get("failed_trial", trial.number))


def _is_lost(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and not {"error", "handed_back"} & trial.user_attrs.keys()


def _is_done(attempts: Sequence[FrozenTrial]) -> bool:
    given_up = _is_lost(attempts[-1]) and attempts[-1].user_attrs.get("lost", 0) + 1 >= _MAX_LOST
    return given_up or any(map(_is_finished, attempts))


def _state(trial: FrozenTrial) -> str:
    if trial.state == TrialState.FAIL and "handed_back" in trial.user_attrs:
        return "interrupted"
    return "lost" if _is_lost(trial) else trial.state.name.lower()


def _end(study: optuna.Study, number: int) -> bool:
    """End a running trial, unless another worker is faster; whether it was this one."""
    try:
        study.tell(number, state=TrialState.FAIL)
    except (UpdateFinishedTrialError, ValueError):
        return False
    return True


def _queue(study: optuna.Study, trial: FrozenTrial, lost: int = 0) -> None:
    """Queue another attempt at a trial, with which `lost` more workers were lost."""
    again = copy.deepcopy(trial)
    kept = {key: trial.user_attrs[key] for key in ("run", "place") if key in trial.user_attrs}
    again.user_attrs = kept | {"lost": trial.user_attrs.get("lost", 0) + lost}
    RetryHeartbeatStaleTrialCallback()(study, again)


def _asked(study: optuna.Study) -> dict[str, str]:
    """The settings of a study; empty if the process that was creating it has ended before it recorded them."""
    end = time.monotonic() + _CREATED
    while not (asked := study.user_attrs.get("asked", {})) and time.monotonic() < end:
        time.sleep(0.1)
    return {"--sampler": "tpe", **asked} if asked else {}


def _without_local(flags: Sequence[str]) -> list[str]:
    kept: list[str] = []
    words = iter(flags)
    for word in words:
        if word in _LOCAL_FLAGS:
            next(words, None)
        elif word.partition("=")[0] not in _LOCAL_FLAGS:
            kept.append(word)
    return kept


@contextlib.contextmanager
def _process(command: list[str], log: Any, environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a run; if it is still running when the context ends, it is stopped and saves its state.

    It runs in another session, so that Ctrl-C does not reach it directly.
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
