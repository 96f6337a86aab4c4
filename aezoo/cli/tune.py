"""`aezoo tune`: the settings of fit to search, and how; the search itself is in `aezoo.cli.tune_study`.

Nothing here needs torch, so a mistake in a search is reported at once.
"""

import argparse
import difflib
import importlib
import math
import os
import re
from collections.abc import Sequence
from typing import NoReturn

from aezoo.cli import tune_storage
from aezoo.cli.tune_search import FLAG, Search, search
from aezoo.errors import AezooError, install_hint

_HELP = """\
Search the settings of fit with optuna: each trial is a run of `aezoo fit` in a process of its own.

  aezoo tune -c vae --search.model.lr log:1e-4:1e-2 --search.model.latent_dim int:2:64 --trials 20
  aezoo tune --model vae --data digits --search.model.likelihood bernoulli,gaussian --trainer.max_epochs 10

--search.SETTING takes, for any flag of fit without its dashes,
  log:LOW:HIGH        a number, on a logarithmic scale
  float:LOW:HIGH      a number
  int:LOW:HIGH        a whole number; int:LOW:HIGH:STEP in steps, int:LOW:HIGH:log on a logarithmic scale
  A,B,C               one of these values

All other flags are those of fit and apply to every trial (`aezoo fit --help_all`). The folder of the study contains
the runs, trials.csv, best.yaml for `aezoo fit -c`, and study.html. The same command continues a study that was stopped.

Many machines: the same command, run on any of them with the same --storage, is one more worker of the same study.

  aezoo tune -c vae --search.model.lr log:1e-4:1e-2 --trials 100 --storage postgresql://me@db.example.org/sweeps
"""
_TRIALS = 20
# more combinations than anyone trains
_LARGEST_GRID = 10_000
# a busy machine may delay a heartbeat by some seconds
_LEAST_LOST_AFTER = 2.0


def read(argv: Sequence[str]) -> tuple[argparse.Namespace, list[Search], list[str]]:
    """The flags of the search itself, the settings to search, and the flags of fit.

    Raises:
        AezooError: an error that the user can fix.
    """
    parser = _Parser(prog="aezoo tune", allow_abbrev=False, description=_HELP, usage="aezoo tune --search... [FLAGS]",
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--trials", type=int, help="number of trials in the whole study, of all workers (default 20; the whole grid)"
    )
    parser.add_argument("--monitor", default="val/loss", help="the metric, at its best epoch (default val/loss)")
    parser.add_argument("--direction", choices=["min", "max"], default="min", help="what is better (default min)")
    parser.add_argument(
        "--sampler", choices=["tpe", "cmaes", "grid", "random"], default="tpe",
        help="optuna's TPE or CMA-ES, all combinations, or random settings (default tpe)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the search; the runs have --seed_everything")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="start no trial after this time")
    parser.add_argument(
        "--prune", choices=["on", "off"], default="on",
        help="end trials that are worse than the median of the others at the same epoch (default on)",
    )  # fmt: skip
    parser.add_argument("--study", metavar="FOLDER", help="folder for all files (default runs/RECIPE-tune)")
    parser.add_argument(
        "--storage", metavar="WHERE",
        help="record of the study: postgresql://USER@HOST/DATABASE, an SQLite file if it ends in .db, or a journal on "
        "a disk that all workers share (default FOLDER/study.log)",
    )  # fmt: skip
    parser.add_argument("--study_name", metavar="NAME", help="name in the storage (default the name of the folder)")
    parser.add_argument(
        "--lost_after", type=float, default=120.0, metavar="SECONDS",
        help="run a trial again if its worker has sent no heartbeat for this time (default 120)",
    )  # fmt: skip
    searches, rest = _searches(argv)
    own = re.findall(r"(?m)^  (--\w+)", parser.format_help())
    options, flags = parser.parse_known_args(rest)
    for word in flags:
        flag = word.partition("=")[0]
        near = difflib.get_close_matches(flag.partition(".")[0], [*own, "--search"], n=1, cutoff=0.8)
        if flag.startswith("--") and near and ("." in flag) == (near[0] == "--search"):
            raise AezooError(f"unknown flag {flag}, did you mean {near[0]}? See `aezoo tune --help`.")
        if flag in ("--ckpt_path", "--resume"):
            raise AezooError(
                f"{flag} does not apply to tune, which starts each run from scratch; the same command continues a study"
            )
    if not searches:
        raise AezooError("nothing is searched: give --search.SETTING, such as --search.model.lr log:1e-4:1e-2")
    if not (options.trials is None or options.trials >= 1) or options.seed < 0:
        raise AezooError("--trials takes a number from 1, and --seed one from 0")
    if options.timeout is not None and not options.timeout > 0:
        raise AezooError("--timeout takes seconds above 0")
    if not _LEAST_LOST_AFTER <= options.lost_after < math.inf:
        raise AezooError(f"--lost_after takes seconds from {_LEAST_LOST_AFTER:g}")
    if not re.fullmatch(r"(val|train)/\w+", options.monitor):
        raise AezooError(f"--monitor {options.monitor}: give the name of a metric such as val/loss or train/nll")
    if options.study_name is not None and not options.study_name.strip():
        raise AezooError("--study_name takes a name")
    if options.storage is not None:
        tune_storage.check(options.storage)
    options.trials = _number_of_trials(options, searches)
    return options, searches, flags


def _number_of_trials(options: argparse.Namespace, searches: Sequence[Search]) -> int:
    """The number of trials of the study; refuses settings that the sampler cannot draw."""
    if options.sampler == "cmaes":
        for search_ in searches:
            if search_.kind == "choice":
                raise AezooError(f"{FLAG}{search_.name} {search_.text}: --sampler cmaes takes ranges of numbers only")
        if len(searches) < 2:
            raise AezooError("--sampler cmaes searches two or more settings: give another --search, or --sampler tpe")
    if options.sampler != "grid":
        return options.trials or _TRIALS
    size = math.prod(len(search_.values()) for search_ in searches)
    if size > _LARGEST_GRID:
        raise AezooError(f"--sampler grid: {size} combinations are more than {_LARGEST_GRID}: give fewer values")
    return min(options.trials or size, size)


def main(argv: Sequence[str]) -> None:
    """Run `aezoo tune`.

    Raises:
        AezooError: an error that the user can fix.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 0 after help.
    """
    try:
        options, searches, flags = read(argv)
        if "LOCAL_RANK" in os.environ:
            raise AezooError(
                "aezoo tune starts its runs itself: call it without torchrun; --trainer.devices applies to each run"
            )
        for package in ("optuna", "plotly", *(["cmaes"] if options.sampler == "cmaes" else [])):
            try:
                importlib.import_module(package)
            except ModuleNotFoundError as error:
                raise AezooError(f"aezoo tune needs {package}: {install_hint('tune')}") from error
        from aezoo.cli import tune_study

        tune_study.run(options, searches, flags, [*argv])
    except AezooError as error:
        raise AezooError(tune_storage.hide_passwords(str(error))) from error


def _searches(argv: Sequence[str]) -> tuple[list[Search], list[str]]:
    found: dict[str, Search] = {}
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith(FLAG):
            rest.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = flag.removeprefix(FLAG)
        if not equals:
            if not words or words[0].startswith("--"):
                raise AezooError(f"{flag} needs a range or values, such as log:1e-4:1e-2, int:2:64 or a,b")
            value = words.pop(0)
        if not name or name in found:
            raise AezooError(f"{flag} {'is given twice' if name else 'names no setting, such as --search.model.lr'}")
        found[name] = search(name, value)
    return list(found.values()), rest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise AezooError(f"{message}; see `aezoo tune --help`")
