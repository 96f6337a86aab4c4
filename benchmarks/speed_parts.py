"""Measure the gain of each part of `aezoo.speed`: one CSV row per part and workload, with and without it in one run.

    python -m benchmarks.speed_parts                               all workloads and parts
    python -m benchmarks.speed_parts --workloads dense_article --kinds train --precision fp32
    python -m benchmarks.speed_parts --page                        only write docs/design/speed.md from the CSVs

The workloads are those of `benchmarks.speed`, trained and predicted on one thread. A process repeats all settings in
rounds: everything on, everything off, and each part left out (AEZOO_SPEED). Times are the processor time of the process
for short epochs after a warm-up epoch. Other programs on the machine can make an epoch longer, by half and more, but
never shorter, so the fastest epoch of each setting in a round is used. `gain` is the median, over the rounds, of this
time without the part divided by the time with it; `gain_low` and `gain_high` are the quartiles, and `rounds` is the
number of rounds. In rows without `rounds`, the fastest epochs of all rounds are divided; the bounds are the lowest and
the highest value of three parts of the run. `malloc` cannot be switched off within a process: its rounds are pairs of
processes.

The kind `resume` is for `denormals`: fits that continue from weights that were trained on mnist5k without it. For units
that are never active, Adam's moments have then shrunk to denormal numbers; new weights have none.

A part is kept if it gains MIN_GAIN on a workload. At its end the program prints the workloads of each part, the reason
if none was measured, and the parts to delete.
"""

import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .common import (
    ROOT,
    ResultsCSV,
    at_least,
    build_parser,
    command_line,
    environment,
    read_csv,
    results_folder,
    run_script,
)
from .processes import run_measurement, run_row
from .speed import KINDS, WORKLOADS

KEY = ("part", "workload", "kind", "compile")
PAGE = ROOT / "docs" / "design" / "speed.md"
MIN_GAIN = 1.05
# parts that take effect in the steps of a fit, and in those of a prediction; then those of compiled steps only
_OF_FIT = ("fast_loop", "fused_optimizer", "denormals")
_OF_RESUME = ("denormals",)
# steps after which units have died and their first moments, a tenth smaller each step, have become denormal; and the
# least share of moments that must be so
_TRAINED_STEPS, _LEAST_DENORMAL = 1_500, 0.05
_OF_CONVOLUTIONS = ("conv_products", "sub_pixel", "separate_gradients")
_OF_COMPILED = ("joint_backward",)
# parts for processors where MKL uses half of the vector width
_OF_HALF_WIDTH = ("linear", "inductor_lowering", "batch_inner", "overlap_add")
_ALL_PARTS = "all"
# the workload of kind resume, whose samples are digits
_RESUMED = "dense_article"
_NEEDS_HALF_WIDTH = "needs a processor where MKL uses half of the vector width (AMD's since Zen 5)"
_BY_LAYER = f"{_NEEDS_HALF_WIDTH}; `convolutions-*-zen5.csv` has the times of single layers there"
# why a part has no rows
NOT_MEASURED = {
    "graph_capture": "needs a GPU",
    "linear": _NEEDS_HALF_WIDTH,
    "inductor_lowering": _NEEDS_HALF_WIDTH,
    "overlap_add": _BY_LAYER,
    "batch_inner": _BY_LAYER,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested rows, and write the page."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser("speed_parts", __doc__)
    add = parser.add_argument
    add("--workloads", nargs="+", default=[*WORKLOADS], choices=[*WORKLOADS], metavar="W", help=", ".join(WORKLOADS))
    add("--kinds", nargs="+", default=[*KINDS, "resume"], choices=(*KINDS, "resume"))
    add("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    add("--compile", nargs="+", default=["off", "default"], choices=("off", "default"), help="of dense training")
    add("--parts", nargs="+", metavar="P", help="only these")
    add("--steps", type=at_least(2), default=50, metavar="N", help="batches of an epoch")
    add("--repeats", type=at_least(3), default=15, metavar="N", help="times that each setting has its turn")
    add("--epochs", type=at_least(1), default=6, metavar="N", help="epochs of a turn that are measured")
    add("--timeout", type=float, default=3600.0, help="give up a workload after this many seconds")
    add("--page", action="store_true", help=f"measure nothing, and write {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args(words)
    if not arguments.page:
        for precision in arguments.precision:
            path = arguments.results / f"speed-parts-{environment(arguments, precision, 'cpu')}.csv"
            table = ResultsCSV(path, KEY, command_line("speed_parts", words), arguments.again)
            for workload in arguments.workloads:
                for kind in arguments.kinds:
                    measure(workload, kind, precision, arguments, table)
            print(path)
    from aezoo.speed.parts import PARTS

    rows = read_rows(arguments.results)
    for part in PARTS:
        print(f"{part}: {verdict(part, rows)}")
    if PAGE.parent.is_dir() and (arguments.page or arguments.results == results_folder()):
        write_page(rows)


def measure(workload: str, kind: str, precision: str, arguments: Namespace, table: ResultsCSV) -> None:
    """Measure a workload with and without its parts."""
    workload_settings = WORKLOADS[workload]
    modes = [mode for mode in arguments.compile if mode == "off" or (kind == "train" and "conv" not in workload)]
    modes = [] if kind == "resume" and workload != _RESUMED else modes
    for mode in modes:
        first = {"workload": workload, "kind": kind, "compile": mode}
        parts = [
            part
            for part in parts_of(workload, kind, mode)
            if (not arguments.parts or part in arguments.parts) and table.needs({"part": part, **first})
        ]
        if not parts:
            continue
        spec = {
            **first,
            "name": workload,
            "model": workload_settings.model,
            "settings": workload_settings.settings,
            "shape": workload_settings.shape,
            "batch": workload_settings.batch,
            "precision": precision,
            "devices": 1,
            "accelerator": "cpu",
            "interface": "on",
            "memory": "",
            "steps": arguments.steps,
            "repeats": arguments.repeats,
            "epochs": arguments.epochs,
            "parts": [part for part in parts if part != "malloc"],
        }
        threads = {"OMP_NUM_THREADS": "1"}
        found = run_row("speed_parts", spec, arguments.timeout, threads) if spec["parts"] else {"times": {}}
        times: dict[str, list[list[float]]] = dict(found.get("times", {}))
        if "malloc" in parts:
            alone = {**spec, "parts": [], "repeats": 1}
            pairs: dict[str, list[list[float]]] = {"auto": [], "malloc": []}
            for _ in range(max(3, arguments.repeats // 4)):
                for setting in pairs:
                    result = run_row("speed_parts", {**alone, "setting": setting}, arguments.timeout, threads)
                    pairs[setting] += result.get("times", {}).get(setting, [])
        for part in parts:
            enabled, disabled = (times.get("auto", []), times.get("off" if part == _ALL_PARTS else part, []))
            if part == "malloc":
                enabled, disabled = pairs["auto"], pairs["malloc"]
            row = {"part": part, **first, "threads": 1, "steps": arguments.steps}
            measured = len(enabled) == len(disabled) > 2
            table.put(row | (_gain(enabled, disabled) if measured else {"error": found.get("error", "none")}))
            print(f"{precision} {workload} {kind} {mode} {part}: {table.find(row)}", flush=True)


def parts_of(workload: str, kind: str, mode: str) -> list[str]:
    """The parts that a workload may use on this processor."""
    if kind == "resume":
        return [*_OF_RESUME]
    from aezoo.speed import linear

    convolutional = "conv" in workload
    half = _OF_HALF_WIDTH if linear.MKL_HALF_WIDTH else ()
    of_half = [part for part in half if (part in ("batch_inner", "overlap_add")) is convolutional]
    of_half = [part for part in of_half if part != "inductor_lowering" or mode != "off"]
    if kind == "infer":
        own = ["predict_loop", *(("conv_products", "sub_pixel") if convolutional else ())]
    else:
        own = [*_OF_FIT, *((*_OF_CONVOLUTIONS, "channels_last") if convolutional else ())]
        own += _OF_COMPILED if mode != "off" else ()
    return [_ALL_PARTS, *own, *of_half, "malloc"]


def _gain(enabled: Sequence[Sequence[float]], disabled: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Medians of the rounds, each of which is the seconds of its epochs."""
    fast, slow = [min(epochs) for epochs in enabled], [min(epochs) for epochs in disabled]
    ratios = [without / with_part for with_part, without in zip(fast, slow, strict=True)]
    low, gain, high = statistics.quantiles(ratios, n=4)
    return {
        "repeats": len(ratios),
        "with_ms": 1e3 * statistics.median(fast),
        "without_ms": 1e3 * statistics.median(slow),
        "gain": gain,
        "gain_low": low,
        "gain_high": high,
        "rounds": len(ratios),
    }


# ---- in the process of a row ----------------------------------------------------------------------------------------


def measure_row(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of processor time of a batch, for each setting of AEZOO_SPEED, repeat and epoch."""
    import warnings

    import torch

    from aezoo.training import speed

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    settings = [spec["setting"]] if "setting" in spec else ["auto", *_settings(spec["parts"])]
    os.environ["AEZOO_SPEED"] = settings[0]
    speed.keep_memory()
    times: dict[str, list[list[float]]] = {setting: [] for setting in settings}
    with tempfile.TemporaryDirectory() as home:
        state = _trained(spec, home) if spec["kind"] == "resume" else None
        for turn in range(spec["repeats"]):
            for setting in settings if turn % 2 else settings[::-1]:
                os.environ["AEZOO_SPEED"] = setting
                with tempfile.TemporaryDirectory() as folder:
                    times[setting].append(_seconds(spec, folder, state))
    return {"times": times}


def _trained(spec: dict[str, Any], folder: str) -> Path:
    """A checkpoint of a fit without the parts that are measured, of whose moments many are denormal."""
    import torch

    from .speed_row import build_model, build_trainer, data_module

    os.environ["AEZOO_SPEED"] = ",".join(spec["parts"])
    torch.manual_seed(0)
    x = _samples(spec)
    epochs = -(-_TRAINED_STEPS // (len(x) // spec["batch"]))
    trainer = build_trainer({**spec, "interface": "off"}, folder, [], max_epochs=epochs)
    trainer.fit(build_model(spec), data_module(spec, x))
    states = trainer.optimizers[0].state.values()
    moments = torch.cat([state["exp_avg"].flatten() for state in states]).abs()
    share = float(((moments > 0) & (moments < torch.finfo(torch.float32).tiny)).float().mean())
    if share < _LEAST_DENORMAL:
        raise RuntimeError(f"{share:.1%} of the moments are denormal: train for more steps")
    path = Path(folder, "trained.ckpt")
    trainer.save_checkpoint(path)
    return path


def _samples(spec: dict[str, Any]) -> Any:
    """Whole batches of an epoch."""
    import torch

    import aezoo

    from .speed_row import random_samples

    n = spec["steps"] * spec["batch"]
    if spec["kind"] == "resume":
        digits = aezoo.DataModule("mnist5k").tensors("train")[0]
        return torch.cat([digits] * -(-n // len(digits)))[:n]
    return random_samples(spec["shape"], spec["batch"])[:n]


def _settings(parts: Sequence[str]) -> list[str]:
    return ["off" if part == _ALL_PARTS else part for part in parts]


def _seconds(spec: dict[str, Any], folder: str, state: Path | None = None) -> list[float]:
    import lightning.pytorch as pl
    import torch

    import aezoo

    from .speed_row import build_model, build_trainer, data_module

    class EpochTimer(pl.Callback):
        """Processor time of each epoch."""

        seconds: list[float]

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.began = time.process_time()

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.seconds.append(time.process_time() - self.began)

        on_predict_epoch_start = on_train_epoch_start
        on_predict_epoch_end = on_train_epoch_end

    torch.manual_seed(0)
    epochs, x = EpochTimer(), _samples(spec)
    epochs.seconds = []
    steps, model = len(x) // spec["batch"], build_model(spec)
    if spec["kind"] != "infer":
        data: aezoo.DataModule = data_module(spec, x)
        done = -(-_TRAINED_STEPS // steps) if state else 0
        fit = build_trainer(spec, folder, [epochs], max_epochs=done + 1 + spec["epochs"], limit_train_batches=steps)
        fit.fit(model, data, ckpt_path=state)
        return [seconds / steps for seconds in epochs.seconds[1:]]
    data = data_module(spec, x[: spec["batch"]], x_test=x)
    with torch.no_grad():
        fit = build_trainer({**spec, "interface": "off"}, folder, [epochs])
        for _ in range(1 + spec["epochs"]):
            fit.predict(model, data, return_predictions=False)
    return [seconds / steps for seconds in epochs.seconds[1:]]


# ---- the page -------------------------------------------------------------------------------------------------------

_HEAD = """# Optional optimisations

The optimisations on this page change only the run time, not the results. At the start of a fit or a prediction, layers,
likelihoods and loops are replaced by faster ones of `aezoo/speed/`. At the end they are restored, also after an error.
`aezoo/training/speed.py` is the only file that uses the folder, and loads it by name. `--speed off`, or the environment
variable AEZOO_SPEED=off, switches all optimisations off. Without the folder, aezoo works in the same way as with `off`.
AEZOO_SPEED also takes a list of parts to switch off, such as `AEZOO_SPEED=fast_loop,denormals`.

A part is kept if it gains {percent} % or more on one of the workloads of `benchmarks.speed`. `python -m
benchmarks.speed_parts` measures the processor time of a batch on one thread, with and without the part in one run.
The run consists of rounds, each of which measures all settings. A gain is the median, over the rounds, of the time
without the part divided by the time with it; the range is that of the quartiles. In rows without a number of rounds,
the gain compares the fastest epochs of the whole run, and the range is that of three parts of the run.

The kind `resume` continues from weights that were trained on digits without the part: for units that are never active,
Adam's moments have then shrunk to denormal numbers, which new weights do not have. The row `all` compares with
AEZOO_SPEED=off. Parts that are only in the second table gained less and were deleted. Code that corrects wrong results
of torch is elsewhere: see `aezoo/nets/narrow_conv.py` and `aezoo.training.compilation.consistent_compilation`.

"""


def read_rows(results: Path) -> list[dict[str, str]]:
    """The measured rows of all CSVs in a folder."""
    paths = sorted(results.glob("speed-parts-*.csv"))
    rows = [{**row, "file": path.stem.removeprefix("speed-parts-")} for path in paths for row in read_csv(path)[1]]
    return [row for row in rows if row.get("gain")]


def earning(part: str, rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The rows in which a part gains MIN_GAIN, the best first."""
    own = [row for row in rows if row["part"] == part and float(row["gain"]) >= MIN_GAIN]
    return sorted(own, key=lambda row: -float(row["gain"]))


def verdict(part: str, rows: Sequence[Mapping[str, str]]) -> str:
    """The workloads on which a part gains enough, why it was not measured, or that it has to be deleted."""
    if found := earning(part, rows):
        return "; ".join(f"{_gain_with_range(row)} {_where(row)}" for row in found)
    if any(row["part"] == part for row in rows):
        return f"below {MIN_GAIN} wherever it was measured: delete it"
    return f"not measured: {NOT_MEASURED.get(part, 'run this program')}"


def page(rows: Sequence[Mapping[str, str]]) -> str:
    """docs/design/speed.md."""
    from aezoo.speed.parts import PARTS

    percent = round(100 * (MIN_GAIN - 1))
    lines = [f"| part | what it does | gains {percent} % or more on |", "|---|---|---|"]
    for part, what in {_ALL_PARTS: "everything together", **PARTS}.items():
        lines.append(f"| {part} | {what} | {verdict(part, rows)} |")
    lines += [
        "",
        "All rows:",
        "",
        "| part | where | with, ms | without, ms | gain (range) | rounds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = f"{float(row['with_ms']):.3f} | {float(row['without_ms']):.3f}"
        rounds = row.get("rounds", "")
        lines.append(f"| {row['part']} | {_where(row)} | {times} | {_gain_with_range(row)} | {rounds} |")
    return _HEAD.format(percent=percent) + "\n".join(lines) + "\n"


def write_page(rows: Sequence[Mapping[str, str]]) -> None:
    """Write docs/design/speed.md."""
    PAGE.write_text(page(rows), encoding="utf-8")
    print(PAGE)


def _gain_with_range(row: Mapping[str, str]) -> str:
    low, gain, high = (float(row[name]) for name in ("gain_low", "gain", "gain_high"))
    return f"{gain:.3f} ({low:.3f} to {high:.3f})"


def _where(row: Mapping[str, str]) -> str:
    compiled = ", compiled" if row["compile"] != "off" else ""
    return f"{row['workload']}, {row['kind']}{compiled}, {row['file']}"


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        run_measurement(measure_row)
    else:
        run_script(main)
