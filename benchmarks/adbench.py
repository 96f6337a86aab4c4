"""Anomaly detectors of the zoo and of PyOD on all data sets of a folder: one CSV row per set, setting, detector, seed.

    python -m benchmarks.adbench FOLDER                                     all of them: days of one core
    python -m benchmarks.adbench FOLDER --settings unsupervised --seeds 1 --detectors default vae pyod.IForest
    python -m benchmarks.adbench FOLDER --sets tuning --detectors default "default:scale=standard,max_epochs=50"

FOLDER contains sets as ADBench publishes them (https://github.com/Minqi824/ADBench): .npz files with X (n, d) and y
(n,), 1 for an anomaly. At most --max-rows of a set are used, 70 % for training and 30 % for the test, stratified and
standardised on the training rows; a seed fixes the rows, the split and the detector. The settings are ADBench's:

    unsupervised    training on all rows of the training part, including anomalies
    clean           training on only its normal rows
    contamination   10, 20 and 30 % of the training rows are anomalies, drawn from those of the training part (again, if
                    there are too few); all normal rows are used; clean is 0 %
    noise           10 and 50 % of the columns are irrelevant: uniform, in the range of a random column

The test rows of a seed are the same in all settings. Unlike ADBench, small sets are not filled up with copies of their
rows, since copies of a row could be in both the training and the test part.

A detector is `default` (AutoencoderDetector()), a model of the registry (AutoencoderDetector(NAME)) or PyOD's, as
pyod.IForest; `zoo`, `pyod` and `all` are groups. Settings of the estimator or of the model may follow, as in
NAME:KEY=VALUE,KEY=VALUE; all others are the detector's defaults. Detectors that need labels, or only accept images, are
not included. PyOD is not part of aezoo: pip install "pyod>=3.6,<4".

Hyperparameters may be chosen on ten sets, --sets tuning; the report evaluates on the others. The ten are every third of
the 33 small sets at hand in alphabetical order, from the first on, fixed before anything was measured.

A row has AUROC and AUPR (average precision) of the test rows, the seconds of fit and scores, and the processor time of
the fit, which other work on the machine changes less. A detector that fails, or takes longer than --timeout, has a row
with its error. Existing rows are kept; --again measures them again.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aezoo.errors import AezooError

from . import adbench_data, common, parallel
from .adbench_detectors import GROUPS, parse_detector

TUNING = (
    *("ALOI", "Cardiotocography", "donors", "http", "landsat", "mnist", "PageBlocks", "satimage-2", "smtp"),
    "Waveform",
)
KEY = ("dataset", "detector", "setting", "seed", "max_rows")
COLUMNS = (
    *(*KEY, "auroc", "aupr", "fit_seconds", "fit_cpu_seconds", "score_seconds", "train_rows", "train_anomalies"),
    *("test_rows", "test_anomalies", "features", "version", "threads", "error"),
)


def plan(arguments: argparse.Namespace, setting: str) -> list[dict[str, Any]]:
    """The fits of a setting: a spec for each row, with the row's first columns, sorted by seed.

    Raises:
        AezooError: a set or a detector does not exist, or PyOD is not installed.
    """
    sets = adbench_data.sets_in(arguments.folder)
    groups = {"tuning": [name for name in sets if name in TUNING], "judging": [n for n in sets if n not in TUNING]}
    chosen = [one for name in arguments.sets or sets for one in groups.get(name, [name])]
    if unknown := [name for name in chosen if name not in sets]:
        raise AezooError(f"no set {unknown[0]!r} in {arguments.folder}: there are {', '.join(sets)}")
    if not chosen:
        raise AezooError(f"--sets {' '.join(arguments.sets)}: none of them is in {arguments.folder}")
    names = dict.fromkeys(one for name in arguments.detectors for one in GROUPS.get(name, (name,)))
    detectors = {name: parse_detector(name) for name in names}
    if any(of["party"] == "pyod" for of in detectors.values()) and importlib.util.find_spec("pyod") is None:
        raise AezooError('PyOD is not installed: pip install "pyod>=3.6,<4", or give --detectors zoo')
    specs = []
    for seed in range(arguments.seeds):
        for name in dict.fromkeys(chosen):
            for level in adbench_data.LEVELS[setting]:
                row = {"dataset": name, "setting": setting_name(setting, level), "seed": seed}
                row |= {"max_rows": arguments.max_rows}
                spec = {"file": str(sets[name]), "kind": setting, "level": level}
                specs += [spec | {"detector": of, "row": row | {"detector": text}} for text, of in detectors.items()]
    return specs


def setting_name(setting: str, level: float) -> str:
    """The name of a setting and its level in the column `setting`: clean, noise=0.5."""
    return f"{setting}={level:g}" if level else setting


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = common.build_parser("adbench", __doc__)
    add, settings = parser.add_argument, [*adbench_data.LEVELS]
    add("folder", type=Path, metavar="FOLDER", help="folder of the sets")
    add(
        "--sets", nargs="+", metavar="NAME", help="sets by name, tuning (ten of them) or judging (the others); else all"
    )
    add("--detectors", nargs="+", default=["all"], metavar="NAME", help="names or groups, see below (default all)")
    add("--settings", nargs="+", choices=settings, default=settings, metavar="NAME", help=f"of {', '.join(settings)}")
    add("--max-rows", type=common.at_least(50), default=6000, metavar="N", help="most rows of a set (default 6000)")
    common.add_run_flags(parser, "fit", timeout=600, seeds=5, accelerator="cpu")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested rows that do not exist yet."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(argv)
    # the folder depends on the machine; a Path has no slash at its end
    words = [word if Path(word) != arguments.folder else "FOLDER" for word in argv]
    command = common.command_line("adbench", words, left_out=("--jobs",))
    where = common.environment(arguments, accelerator="cpu")
    specs = {setting: plan(arguments, setting) for setting in dict.fromkeys(arguments.settings)}
    for setting, needed in specs.items():
        path = arguments.results / f"adbench-{setting}-{where}.csv"
        table = common.ResultsCSV(path, KEY, command, arguments.again)
        shown = ("auroc", "aupr", "fit_seconds")
        names = ("dataset", "setting", "detector")
        parallel.measure_missing(table, "adbench_row", needed, arguments, COLUMNS, shown, names)
        print(path)


if __name__ == "__main__":
    common.run_script(main)
