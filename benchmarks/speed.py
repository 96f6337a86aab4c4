"""Measure how fast the zoo trains and infers: one CSV row per setting, each measured in a separate process.

    python -m benchmarks.speed                                     the three workloads, training and inference
    python -m benchmarks.speed train --models all --shapes 1x28x28 3x32x32 --precision fp32 bf16
    python -m benchmarks.speed train --models 'vae:{net: conv}' --compile off default max-autotune --batch 64 256
    python -m benchmarks.speed train --models conv_vae_28 --accelerator cpu --devices 1,2 --compile off
    python -m benchmarks.speed --startup                           seconds from the command to the first step

Training uses a Trainer with the command line's bar, logger, checkpoints and guards, on random samples. A row's
`samples_per_s` is the median over its epochs after the first; `_low` and `_high` are the slowest and the fastest of
these. `share_of_peak` is the share of the speed of the fastest matrix product in the same process and precision.
`gemm_floor_share` counts only the step's matrix products. `products_alone_share` is the time that the step's products
and convolutions take when they run by themselves, divided by the step's time. In inference, `network_` rows are the
bare modules, `bare_predict` is encode, decode and score in a plain loop, and `predict` is the same through the Trainer;
`step_ms` is the reconstruction of a batch. `compile_s` is measured with an empty compiler cache. Several devices train
with DDP, each with the whole batch. On the CPU a device is an equal share of the cores, also for one device, so the
report's scaling efficiency compares like with like.

Existing rows are kept. A row that does not fit into memory is tried with half the batch, repeatedly if necessary.
"""

import itertools
import json
import math
import os
import shlex
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from aezoo import registry
from aezoo.errors import AezooError

from .common import ResultsCSV, as_text, build_parser, command_line, environment, run_script
from .processes import run_row, with_smaller_batches

KEY = ("name", "settings", "shape", "compile", "batch", "devices", "threads", "memory", "interface")
KINDS = ("train", "infer")
COMPILE = ("off", "auto", "default", "reduce-overhead", "max-autotune")
_BATCH = 128


class Workload(NamedTuple):
    """A model with its settings, and its shape and batch if they are fixed."""

    model: str
    settings: dict[str, Any]
    shape: tuple[int, ...] | None = None
    batch: int = _BATCH


# the article's network, and convolutional networks of two sizes that other libraries train too
WORKLOADS = {
    "dense_article": Workload(
        "dense_ae", {"latent_dim": 32, "hidden_dims": [128, 64], "code_activation": "relu"}, (1, 28, 28), 256
    ),
    "conv_vae_28": Workload(
        "vae", {"net": "conv", "hidden_dims": [32, 64, 128, 256], "latent_dim": 16}, (1, 28, 28), 128
    ),
    "conv_vae_64": Workload(
        "vae", {"net": "conv", "hidden_dims": [32, 64, 128, 256, 512], "latent_dim": 128}, (3, 64, 64), 64
    ),
}


def parse_arguments(words: Sequence[str]) -> Namespace:
    """Read the command line."""
    parser = build_parser("speed", __doc__)
    add = parser.add_argument
    add("kinds", nargs="*", choices=[*KINDS, []], help="train, infer; both if none is given")
    add("--models", nargs="+", default=[*WORKLOADS], metavar="M", help="workloads, models, patterns, all, name:{yaml}")
    add(
        "--shapes",
        nargs="+",
        default=["1x28x28"],
        metavar="S",
        help="shapes of a sample, for models without a fixed one",
    )
    add("--precision", nargs="+", default=["fp32"], choices=("fp32", "bf16"))
    add("--compile", nargs="+", default=["off", "default"], choices=COMPILE)
    add(
        "--batch",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="samples per device and step; default: the workload's",
    )
    add("--accelerator", default="auto", choices=("auto", "cpu", "gpu", "cuda", "mps"))
    add("--devices", default="1", metavar="N,N", help="numbers of devices, such as 1,2,4; training only")
    add("--threads", type=int, help="threads of a device on the CPU; by default its share of the cores")
    add("--memory", choices=("auto", "on", "off"), help="whether the DataModule contains the samples")
    add("--interface", default="on", choices=("on", "off"), help="off: no bar, logger, checkpoints and guards")
    add("--steps", type=int, default=0, help="steps of a repeat, in place of --seconds")
    add("--seconds", type=float, default=2.0, help="length of a repeat")
    add("--repeats", type=int, default=5, help="repeats after the warm-up, or of --startup")
    add("--timeout", type=float, default=900.0, help="give up a row after this many seconds")
    add("--startup", action="store_true", help="measure the time to the first step instead")
    return parser.parse_args(words)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested rows."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(words)
    _check(arguments)
    command = command_line("speed", words)
    if arguments.startup:
        from .startup import measure_startup

        measure_startup(arguments, command)
        return
    specs = plan(arguments)
    tables: dict[tuple[str, str], ResultsCSV] = {}
    for spec in specs:
        file = (spec["kind"], spec["precision"])
        if file not in tables:
            name = f"speed-{file[0]}-{environment(arguments, file[1])}.csv"
            tables[file] = ResultsCSV(arguments.results / name, KEY, command, arguments.again)
        measure(spec, tables[file], arguments.timeout)
    for table in tables.values():
        print(table.path)


def _check(arguments: Namespace) -> None:
    for flag in ("repeats", "seconds", "timeout", "threads"):
        value = getattr(arguments, flag)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise AezooError(f"--{flag} is {value}: give a number above 0")
    if arguments.steps < 0:
        raise AezooError(f"--steps is {arguments.steps}: give a number above 0, or leave it out to go by --seconds")


def plan(arguments: Namespace) -> list[dict[str, Any]]:
    """All requested rows.

    Raises:
        AezooError: a value is invalid.
    """
    devices = sorted(_numbers("--devices", arguments.devices.split(",")))
    batches = _numbers("--batch", arguments.batch)
    shapes = [tuple(_numbers("--shapes", text.split("x"))) for text in arguments.shapes]
    on_cpu = arguments.accelerator == "cpu" or "-cpu" in environment(arguments)
    threads = arguments.threads or (max(1, _cores() // devices[-1]) if on_cpu else None)
    specs = []
    for kind, (name, workload), precision, mode in itertools.product(
        arguments.kinds or KINDS, _workloads(arguments.models), arguments.precision, arguments.compile
    ):
        for shape, batch, count in itertools.product(
            [workload.shape] if workload.shape else shapes,
            batches or [workload.batch],
            devices if kind == "train" else [1],
        ):
            specs.append(
                {
                    "kind": kind,
                    "name": name,
                    "model": workload.model,
                    "settings": workload.settings,
                    "shape": shape,
                    "precision": precision,
                    "compile": mode,
                    "batch": batch,
                    "devices": count,
                    "accelerator": arguments.accelerator,
                    "threads": threads,
                    "memory": arguments.memory,
                    "interface": arguments.interface,
                    "steps": arguments.steps,
                    "seconds": arguments.seconds,
                    "repeats": arguments.repeats,
                }
            )
    return specs


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    from_environment = os.environ.get("OMP_NUM_THREADS", "")
    return int(from_environment) if from_environment.isdigit() and int(from_environment) else cores


def _numbers(flag: str, texts: Sequence[Any]) -> list[int]:
    try:
        values = [int(text) for text in texts]
    except ValueError:
        values = [0]
    if any(value < 1 for value in values):
        raise AezooError(f"{flag}: {' '.join(map(str, texts))} is not made of whole numbers of at least 1")
    return values


def _workloads(names: Sequence[str]) -> list[tuple[str, Workload]]:
    found: dict[str, Workload] = {}
    for text in names:
        name, colon, settings = text.partition(":")
        if name in WORKLOADS and not colon:
            found[name] = WORKLOADS[name]
        elif name == "all" or any(mark in name for mark in "*?["):
            matching = registry.list_models(["*" if name == "all" else name])
            if not matching:
                raise AezooError(f"no model matches {name!r}: `aezoo list` shows all")
            found |= {model: Workload(model, {}) for model in matching}
        else:
            model = registry.find(name).name
            found[text if colon else model] = Workload(model, _settings(text, settings) if colon else {})
    return list(found.items())


def _settings(text: str, settings: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(settings)
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):
        raise AezooError(f"{text!r}: write settings as in 'vae:{{net: conv, latent_dim: 8}}'")
    return values


def measure(spec: dict[str, Any], table: ResultsCSV, timeout: float) -> None:
    """Measure one row, unless it exists, and put it into its table."""
    row = _row_head(spec)
    if not table.needs(row):
        print(f"{_title(spec)}: already measured")
        return
    variables = {"OMP_NUM_THREADS": str(spec["threads"])} if spec["threads"] else {}

    def run(tried: dict[str, Any]) -> dict[str, Any]:
        # with an old cache, compile time would depend on earlier runs
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
            environment_variables = variables | {"TORCHINDUCTOR_CACHE_DIR": empty}
            return run_row("speed_row", {**tried, "started": time.time()}, timeout, environment_variables)

    found, batch = with_smaller_batches(run, spec)
    row |= {"batch_used": batch, "repeats": spec["repeats"], "compiler_cache": _compiler_cache(spec), **found}
    table.put(row)
    rate = row.get("samples_per_s", row.get("reconstruct_samples_per_s"))
    print(f"{_title(spec)}: {row['error'] if row.get('error') else f'{rate:,.0f} samples/s'}", flush=True)


def _row_head(spec: dict[str, Any]) -> dict[str, Any]:
    row = {name: spec[name] for name in ("name", "model", *KEY[1:])}
    return row | {
        "settings": json.dumps(spec["settings"]) if spec["settings"] else "",
        "shape": _shape_text(spec["shape"]),
    }


def count_existing_rows(command: str, kind: str, precision: str, rows: Sequence[Mapping[str, str]]) -> tuple[int, int]:
    """How many of the rows that a CSV's command requests are in the CSV, and how many it requests today.

    Args:
        command: a command from the CSV's head.
        kind: kind of the CSV.
        precision: precision of the CSV.
        rows: rows of the CSV.
    """
    arguments = parse_arguments(shlex.split(command)[3:])
    # on another machine a share of the cores is another number of threads
    key = [name for name in KEY if name != "threads" or arguments.threads]
    requested = [_row_head(spec) for spec in plan(arguments) if (spec["kind"], spec["precision"]) == (kind, precision)]
    existing = {tuple(row.get(name, "") for name in key) for row in rows}
    return sum(tuple(as_text(row[name]) for name in key) in existing for row in requested), len(requested)


def _compiler_cache(spec: dict[str, Any]) -> str:
    """What the compiler's cache held before the row."""
    return "" if spec["compile"] == "off" else "nothing"


def _title(spec: dict[str, Any]) -> str:
    devices = f", {spec['devices']} devices" if spec["devices"] > 1 else ""
    return (
        f"{spec['kind']} {spec['name']} {_shape_text(spec['shape'])} {spec['precision']} compile {spec['compile']} "
        f"batch {spec['batch']}{devices}"
    )


def _shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


if __name__ == "__main__":
    run_script(main)
