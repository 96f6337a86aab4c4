"""Compare the commands for trained models with the usual alternatives: a CSV for each command, a row for each method.

    python -m benchmarks.tasks                                   every command on mnist5k, digits and fashion_mnist
    python -m benchmarks.tasks --root /usr/share/datasets --seeds 3 --jobs 2
    python -m benchmarks.tasks --commands detect embed --data digits --models vae --steps 200

A model is trained once for each data set and seed, until its validation loss has stopped improving (the rule of
`benchmarks.quality`). The same process then runs all commands for which `MODELS` lists the model. If a command fails,
one row records the reason. detect is one-vs-rest: for each class, a model is trained on the samples of that class, and
the class has its own row. All codes of a data set have the same number of values: 32, or a quarter of the number of
values of a sample if that is less. The seed determines training and the random draws of a command. The splits do not
depend on it, and neither does the network whose features measure the quality of generated samples. Baselines are those
of the command's table, computed once for each data set and seed; those of compress are computed once, because no seed
changes them. reconstruct also measures PCA and the mean sample. generate also measures held-out real samples (the score
of perfect samples), unchanged training samples (which the check for copies must detect), and two generators on pixels
without a network.

Options limit the run time: the seconds of a training, or its steps, the test samples (--test-rows), and the training
samples for fitting priors, probes, detectors and tables (--fit-rows). detect uses dense models only, and omits the
scores elbo and iwae. The sizes of compressed files do not include the model, which the reader must have.

Existing results of a command, data set, model, seed and settings are kept; --again measures them again. If baselines
are missing because the model that should have measured them failed, another model measures them and keeps its own rows.
--verbs, in the commands above older CSVs, is an old name of --commands.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from aezoo import registry
from aezoo.errors import AezooError

from . import common
from .parallel import run_rows
from .quality import code_size_arguments
from .quality_table import dataset_name
from .tasks_table import KEY, CommandTable, Row, is_baseline

COMMANDS = ("reconstruct", "generate", "denoise", "detect", "embed", "compress")
# models under other names, where a command does not work with the registry's defaults
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "conv_vae": ("vae", {"net": "conv", "hidden_dims": [32, 64]}),
    "conv_denoising_ae": ("denoising_ae", {"net": "conv", "hidden_dims": [32, 64]}),
    # bits-back coding of grey values needs a distribution over bytes
    "bytes_vae": ("vae", {"likelihood": "beta_binomial"}),
    # a model trained for one rate gives one point of a curve; the part of the name before the colon is the method
    **{
        f"{name}:{lam}": (name, {"lam": lam, "hidden_dims": [32, 48]})
        for name in ("factorized_prior", "mean_scale_hyperprior")
        for lam in (0.0005, 0.002, 0.008)
    },
}
MODELS: dict[str, tuple[str, ...]] = {
    "reconstruct": ("linear_ae", "dense_ae", "vae", "conv_ae", "conv_vae"),
    "generate": ("vae", "conv_vae", "conv_ae"),
    "denoise": ("dense_ae", "vae", "conv_ae", "conv_denoising_ae"),
    "detect": ("dense_ae", "vae"),
    "embed": ("linear_ae", "dense_ae", "vae", "conv_ae", "conv_vae", "conv_denoising_ae"),
    "compress": ("vae", "conv_ae", "conv_vae", "bytes_vae", *(name for name in VARIANTS if ":" in name)),
}
# model and data set of each picture, with seed 0
PICTURES = {
    "reconstruct": ("conv_ae", "fashion_mnist"),
    "generate": ("conv_ae", "fashion_mnist"),
    "denoise": ("conv_denoising_ae", "fashion_mnist"),
    "detect": ("vae", "fashion_mnist"),
    "embed": ("conv_ae", "fashion_mnist"),
    "compress": ("conv_ae", "fashion_mnist"),
}
CORRUPT = "gaussian:0.3"
QUALITIES = (-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0)


def plan(arguments: argparse.Namespace, data: Row, input_shape: tuple[int, ...], tables: Any) -> list[Row]:
    """Specs of a data set, without existing results; a model that rejects its settings is skipped with a message."""
    size = arguments.code_size or min(32, max(1, math.prod(input_shape) // 4))
    dataset = dataset_name(data)
    # for each model, its commands in the given order
    wanted: dict[str, list[str]] = {}
    for command in arguments.commands:
        for name in arguments.models or MODELS[command]:
            wanted.setdefault(name, []).append(command)
    specs = []
    for seed in range(arguments.seeds):
        runs: list[tuple[Row, list[tuple[str, str]]]] = []  # specs, and the baselines that their models can measure
        for name, commands in wanted.items():
            registered, hyperparameters = VARIANTS.get(name, (name, {}))
            hyperparameters = hyperparameters | code_size_arguments(registered, size)
            try:
                model = registry.create_model(registered, input_shape, **hyperparameters)
            except AezooError as error:
                if not seed:
                    print(f"{name} is left out on {dataset}: {error}", file=sys.stderr)
                continue
            head = {"dataset": dataset, "model": name, "seed": seed, "code_size": math.prod(model.code_shape)}
            head |= {"fit_rows": arguments.fit_rows, "test_rows": arguments.test_rows}
            left = [command for command in commands if tables[command].needs(command_head(head, command, arguments))]
            lossy = name != "bytes_vae"
            spec = {"model": name, "registered": registered, "hyperparameters": hyperparameters, "seed": seed}
            spec |= {"data": data, "head": head, "commands": left, "accelerator": arguments.accelerator}
            spec |= {"steps": arguments.steps, "seconds": arguments.seconds, "classes": arguments.classes}
            spec |= {"detect_seconds": arguments.detect_seconds}
            spec |= {"fit_rows": arguments.fit_rows, "test_rows": arguments.test_rows, "corrupt": CORRUPT}
            spec |= {"qualities": QUALITIES, "lossless_only": not lossy, "baselines": {}, "repairs": []}
            spec |= {"pictures": [command for command in left if not seed and PICTURES[command] == (name, dataset)]}
            spec |= {"folder": str((arguments.results / "pictures").resolve())}
            tasks = [(command, task) for command in commands for task in parts(command, model, lossy, seed)]
            runs.append((spec, tasks))
        _share_baselines(runs, tables, arguments)
        specs += [spec for spec, _ in runs if spec["commands"]]
    return specs


def parts(command: str, model: Any, lossy: bool, seed: int) -> list[str]:
    """Tasks of a command whose baselines a model can measure; those of compress do not depend on the seed."""
    from .tasks_commands import compress_tasks

    if command != "compress":
        return [""]
    return [] if seed else compress_tasks(model, lossy)


def _share_baselines(runs: list[tuple[Row, list[tuple[str, str]]]], tables: Any, arguments: argparse.Namespace) -> None:
    """Let one model per seed measure missing baselines: one that runs anyway, or one that has already run."""
    given: set[tuple[str, str, int]] = set()  # all codes of a setting have one size
    for runs_anyway in (True, False):
        for spec, possible in runs:
            for command, task in possible:
                head, measured = command_head(spec["head"], command, arguments), command in spec["commands"]
                part = command, task, head["code_size"]
                if part in given or not tables[command].needs_baselines(head, task):
                    continue
                if measured if runs_anyway else tables[command].can_measure_baselines(head, task):
                    given.add(part)
                    spec["baselines"].setdefault(command, []).append(task)
                    spec["repairs"] += [] if measured else [command]
                    spec["commands"] += [] if measured else [command]


def command_head(head: Row, command: str, arguments: argparse.Namespace) -> Row:
    """The columns that identify a measurement of a command."""
    own = {"classes": arguments.classes} if command == "detect" else {}
    return head | {"budget": budget(arguments, command)} | own


def budget(arguments: argparse.Namespace, command: str) -> str:
    """The training budget of a command's models, as the text of a CSV's column."""
    if arguments.steps:
        return f"steps={arguments.steps}"
    from .convergence import Budget

    seconds = arguments.detect_seconds if command == "detect" else arguments.seconds
    return f"{Budget().as_text()}, at most {seconds:g} s"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = common.build_parser("tasks", __doc__)
    add, count = parser.add_argument, common.at_least(1)
    add(
        *("--commands", "--verbs"), nargs="+", choices=COMMANDS, default=COMMANDS, metavar="COMMAND",
        help=f"of {', '.join(COMMANDS)} (default: all)",
    )  # fmt: skip
    add("--data", nargs="+", default=["mnist5k", "digits", "fashion_mnist"], metavar="NAME", help="data sets")
    add("--root", default="data", help="folder of the data sets' files or of their downloads")
    add(
        "--models", nargs="+", metavar="NAME",
        help=f"models for all commands, of the registry or {', '.join(VARIANTS)} (default: a few for each command)",
    )  # fmt: skip
    add("--seconds", type=common.seconds, default=300.0, metavar="S", help="most seconds of a training (default 300)")
    add(
        "--detect-seconds",
        type=common.seconds,
        default=60.0,
        metavar="S",
        help="most seconds of a training for detect (default 60)",
    )
    add("--steps", type=count, metavar="N", help="train each model for N steps; by default until it has converged")
    add("--code-size", type=count, metavar="N", help="numbers in a code (default: at most 32)")
    add("--classes", type=count, metavar="N", help="detect uses only the first N classes (default: all)")
    add("--fit-rows", type=count, default=10_000, metavar="N", help="most training samples to fit to (default 10000)")
    add("--test-rows", type=count, default=2_000, metavar="N", help="most test samples (default 2000)")
    common.add_run_flags(parser, "run", timeout=7200)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested rows that do not exist yet."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    command_line, where = common.command_line("tasks", argv), common.environment(arguments)
    tables = {
        command: CommandTable(arguments.results / f"tasks-{command}-{where}.csv", KEY, command_line, arguments.again)
        for command in arguments.commands
    }
    specs: list[Row] = []
    for name in arguments.data:
        module, data = common.download_data(name, arguments.root, batch_size=128)
        specs += plan(arguments, data, module.input_shape, tables)
    if not specs and arguments.models:
        print("nothing is left to measure", file=sys.stderr)
    # sorted by seed: an interrupted run has results for everything
    specs.sort(key=lambda spec: int(spec["seed"]))

    def run() -> Iterator[tuple[Row, Row]]:
        return run_rows("tasks_row", specs, arguments.timeout, arguments.jobs, arguments.accelerator)

    for i, (spec, found) in enumerate(run(), start=1):
        head = spec["head"]
        print(f"[{i}/{len(specs)}] {head['dataset']}, {head['model']}, seed {head['seed']}", flush=True)
        for command in spec["commands"]:
            failed = {"method": head["model"], "kind": "ours", "error": found.get("error")}
            rows = found.get("commands", {}).get(command) or [failed]
            head_of_command = command_head(head, command, arguments)
            rows = [row | {"processor": common.processor_name()} for row in rows]
            if command in spec["repairs"]:
                baseline_rows = [row for row in rows if is_baseline(head | row)]
                tables[command].replace(head_of_command, tables[command].model_rows(head_of_command) + baseline_rows)
            else:
                tables[command].replace(head_of_command, rows)
            for row in rows:
                if row.get("error"):
                    print(f"    {command}, {row['method']}: {row['error']}", flush=True)
    for table in tables.values():
        print(table.path)


if __name__ == "__main__":
    common.run_script(main)
