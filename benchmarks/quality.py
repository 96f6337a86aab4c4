"""Train models on a data set for a budget and measure their quality: one CSV row per run.

    python -m benchmarks.quality                                    every model whose code is not indices, on mnist5k
    python -m benchmarks.quality --models dense_ae vae --code-sizes 8 16 32 64 --epochs 50
    python -m benchmarks.quality --data fashion_mnist --root /usr/share/datasets --seconds 300 --jobs 2
    python -m benchmarks.quality --data shapes --size 32 --rows 5000

Errors are measured on the test split with the model after its last step; a denoiser gets corrupted samples. nll is in
nats under the model's own likelihood. probe and knn are the shares of test samples whose class is predicted correctly
from the code, by logistic regression and by the 5 nearest neighbours. pixels_ and pca_ are the same for raw pixels and
for PCA's code of that size. PCA's error is the lowest that a linear code can reach (none where a code has as many
numbers as a sample). pca_mse_at_l0 is for PCA with as many numbers as a sparse code has active entries. Codes of more
than 4,096 numbers get no probe. A seed fixes the weights, the noise and the order of training; the splits are the same
for all. A sparse code keeps its model's own size whatever --code-sizes says. Compare speeds only for --jobs 1 on a
quiet machine.

Existing rows of the same model, code size, seed and settings are kept; --again measures them again. The setting
--importance-samples only matters for models with a log_likelihood, and --most-seconds only for runs that would last
longer. Every run has its own process, so a crash costs one row, which records the reason. Failed baselines are retried.
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
from .quality_table import BASELINE, KEY, QualityTable, dataset_name

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
COLUMNS = (
    *("model", "family", "dataset", "seed", "code_size", "l0", "budget", "batch_size", "epochs", "steps", "seconds"),
    *("samples_per_s", "loss", "nll", "mse", "psnr", "ssim", "bits_per_dim", "log_likelihood", "likelihood"),
    *("active_units", "active_share", "probe", "knn", *BASELINE, "pca_mse_at_l0", "probe_rows", "importance_samples"),
    *("most_seconds", "parameters", "peak_mb", "threads", "device", "error"),
)


def plan(arguments: argparse.Namespace, data: dict[str, Any], input_shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """The runs: a spec for each row, with the row's first columns. What a model rejects is skipped with a message."""
    spec = {
        "data": data,
        "epochs": None if arguments.seconds else arguments.epochs,
        "seconds": arguments.seconds or arguments.most_seconds,
        "precision": PRECISIONS[arguments.precision],
        "accelerator": arguments.accelerator,
        "probe_rows": arguments.probe_rows,
        "importance_samples": arguments.importance_samples,
    }
    budget = f"seconds={arguments.seconds:g}" if arguments.seconds else f"epochs={arguments.epochs}"
    fixed: dict[str, Any] = {"dataset": dataset_name(data), "budget": budget}
    fixed |= {"batch_size": data["batch_size"], "probe_rows": arguments.probe_rows}
    fixed |= {"importance_samples": arguments.importance_samples}
    fixed |= {"most_seconds": None if arguments.seconds else arguments.most_seconds}
    specs: dict[tuple[int, str, int], dict[str, Any]] = {}
    for entry in map(registry.find, arguments.models or registry.list_models()):
        cls = registry.model_class(entry.name)
        if cls.discrete_code and not arguments.models:
            continue  # each number of its code is only a few bits: see benchmarks/bits.py
        for size in [None] if cls.sparse_code else arguments.code_sizes or [None]:
            hyperparameters = code_size_arguments(entry.name, size)
            try:
                code_size = math.prod(registry.create_model(entry.name, input_shape, **hyperparameters).code_shape)
            except AezooError as error:
                print(f"{entry.name} is left out{f' at code size {size}' if size else ''}: {error}", file=sys.stderr)
                continue
            for seed in range(arguments.seeds):
                row = {"model": entry.name, "family": entry.family, "seed": seed, "code_size": code_size, **fixed}
                run = {"model": entry.name, "hyperparameters": hyperparameters, "seed": seed, "row": row}
                # a code without a size setting has one size, whatever is requested
                specs.setdefault((seed, entry.name, code_size), spec | run)
    if not specs:
        raise AezooError(f"no model is left to train on {data['name']}: `aezoo list` shows all")
    # sorted by seed: an interrupted run has results for every model
    return sorted(specs.values(), key=lambda spec: int(spec["seed"]))


def code_size_arguments(name: str, size: int | None) -> dict[str, Any]:
    """Hyperparameters that give a model's code `size` numbers; empty if its code has no such setting."""
    known = registry.hyperparameters(name)
    if size is None or "latent_dim" not in known:
        return {}
    # for a map, latent_dim would be the number of channels
    return {"latent_dim": size} | ({"latent_map": False} if "latent_map" in known else {})


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = common.build_parser("quality", __doc__)
    add, count = parser.add_argument, common.at_least(1)
    add(
        "--models",
        nargs="+",
        metavar="NAME",
        help="models to train; without it all that suit the data and whose codes are no indices",
    )
    add("--data", default="mnist5k", help="a name or a path that --data.name of `aezoo fit` takes")
    add("--root", default="data", help="folder of the data set's files or of its download")
    add("--size", type=count, help="resize images to this")
    add("--rows", type=count, metavar="N", help="use at most this many samples for training and for the test")
    add("--batch-size", type=count, default=128)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=count, default=20, help="budget of each run (default 20)")
    budget.add_argument(
        "--seconds", type=common.seconds, help="budget of each run: seconds of training, compiling included"
    )
    add(
        "--most-seconds",
        type=common.seconds,
        help="end a run of --epochs after this many seconds of training; its column epochs says how far it came",
    )
    add("--code-sizes", type=count, nargs="+", metavar="N", help="numbers in a code; without it the models' own")
    add("--probe-rows", type=count, default=10_000, help="most training codes that a classifier sees (default 10000)")
    add("--importance-samples", type=count, default=100, help="draws behind each log_likelihood (default 100)")
    add("--precision", choices=PRECISIONS, default="fp32", help="arithmetic of training and test")
    common.add_run_flags(parser, "run", timeout=7200)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested rows that do not exist yet."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    data, options = common.download_data(arguments.data, arguments.root, arguments.batch_size, arguments.size)
    options |= {"rows": arguments.rows}
    specs = plan(arguments, options, data.input_shape)
    path = f"quality-{specs[0]['row']['dataset']}-{common.environment(arguments, arguments.precision)}.csv"
    table = QualityTable(arguments.results / path, KEY, common.command_line("quality", argv), arguments.again)

    def run(specs: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        return run_rows("quality_row", specs, arguments.timeout, arguments.jobs, arguments.accelerator)

    baselines: dict[int, dict[str, Any]] = {**table.baselines(arguments.probe_rows)}
    # also for existing rows, whose baselines may have failed. PCA with as many numbers as a sample is no baseline
    sizes = {size for spec in specs if (size := spec["row"]["code_size"]) < math.prod(data.input_shape)}
    missing = sorted((sizes | ({0} if data.num_classes else set())) - baselines.keys())
    shared = {"data": options, "probe_rows": arguments.probe_rows, "sizes": missing}
    for _, found in run([shared] if missing else []):
        if found.get("error"):
            print(f"there are no figures of raw pixels and PCA: {found['error']}", file=sys.stderr)
        baselines |= {int(size): columns for size, columns in found.get("baselines", {}).items()}
    table.fill_baselines(baselines, arguments.probe_rows)
    specs = [spec for spec in specs if table.needs(spec["row"])]
    for i, (spec, row) in enumerate(run(specs), start=1):
        row |= baselines.get(0, {}) | baselines.get(spec["row"]["code_size"], {}) | spec["row"]
        table.put_run({name: row.get(name) for name in COLUMNS})
        figures = [f"{name} {common.as_text(row.get(name))}" for name in ("mse", "pca_mse", "probe", "seconds")]
        head = f"[{i}/{len(specs)}] {row['model']}, code size {row['code_size']}, seed {row['seed']}"
        print(f"{head}: {row.get('error') or ', '.join(figures)}", flush=True)
    print(table.path)


if __name__ == "__main__":
    common.run_script(main)
