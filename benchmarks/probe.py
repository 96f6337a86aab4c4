"""Train models without labels and measure the accuracy of simple classifiers on their codes: one CSV row for each run.

    python -m benchmarks.probe                                       masked and other models, three seeds, on mnist5k
    python -m benchmarks.probe --data fashion_mnist --root /usr/share/datasets --rows 10000 --steps 4000

probe and knn are the shares of test samples whose class is predicted correctly, by logistic regression on standardised
codes and by the 5 nearest neighbours. Both learn from the codes and classes of the training samples and use all numbers
of a code. If the code is a feature map or tokens, pooled_probe and pooled_knn use the mean over the places, one number
per channel, as is usual for vision transformers. `raw pixels` and `pca` have their own rows, without a seed. All
settings are each model's defaults, except for --code-size, which sets latent_dim or the width of tokens. mse is the
error of the test samples' reconstruction. A seed fixes weights, masks, noise and order; the samples are the same for
all.

Existing rows of the same model, seed and budget are kept; --again measures them again. At the end, the script prints
the medians over the seeds in the file.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aezoo import registry
from aezoo.errors import AezooError

from . import common, parallel

MODELS = ("mae", "simmim", "masked_conv_ae", "conv_ae", "denoising_ae", "vae")
BASELINES = ("raw pixels", "pca")
KEY = ("model", "seed", "steps", "batch_size", "code_size", "rows")
SCORES = ("probe", "knn", "pooled_probe", "pooled_knn")
COLUMNS = (
    *("model", "family", "dataset", "seed", "steps", "batch_size", "code_size", "rows", "numbers", *SCORES),
    *("mse", "seconds", "parameters", "threads", "device", "error"),
)


def plan(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs: a spec for each row, with the row's first columns; sorted by seed."""
    data = {"name": arguments.data, "root": str(Path(arguments.root).expanduser().resolve())}
    budget = {"batch_size": arguments.batch_size, "code_size": arguments.code_size, "rows": arguments.rows or "all"}
    fixed = {"dataset": arguments.data, "steps": arguments.steps, **budget}
    spec = {"data": data, "accelerator": arguments.accelerator, **fixed}
    plain: list[dict[str, Any]] = [{"model": name, "family": "baseline", "seed": 0} for name in BASELINES]
    entries = [registry.find(name) for name in arguments.models or MODELS]
    runs: list[dict[str, Any]] = [
        {"model": entry.name, "family": entry.family, "seed": seed}
        for seed in range(arguments.seeds)
        for entry in entries
    ]
    return [
        spec | {"row": run | fixed, "hyperparameters": code_size_argument(run["model"], arguments.code_size)}
        for run in plain + runs
    ]


def code_size_argument(model: str, size: int) -> dict[str, int]:
    """The hyperparameter that sets the size of a model's code, or of each of its tokens; empty if there is none."""
    known = () if model in BASELINES else registry.hyperparameters(model)
    return next(({name: size} for name in ("latent_dim", "width") if name in known), {})


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = common.build_parser("probe", __doc__)
    add, count = parser.add_argument, common.at_least(1)
    add("--models", nargs="+", metavar="NAME", help=f"models to train (default {' '.join(MODELS)})")
    add("--data", default="mnist5k", help="a labelled set by its name, as --data.name of `aezoo fit` takes it")
    add("--root", default="data", help="folder of the data set's files or of its download")
    add("--rows", type=common.at_least(20), metavar="N", help="train and probe on this many training samples, not all")
    add("--steps", type=count, default=2000, help="training steps of each run (default 2000)")
    add("--code-size", type=count, default=64, help="numbers in a code, a token or PCA's code (default 64)")
    add("--batch-size", type=count, default=128)
    common.add_run_flags(parser, "run", timeout=7200)
    return parser.parse_args(argv)


def medians(rows: Sequence[dict[str, str]], like: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per model with the medians over its seeds, from the rows with this budget and without an error."""
    same = [name for name in KEY if name not in ("model", "seed")]
    wanted = [row for row in rows if not row.get("error") and all(row[k] == common.as_text(like[k]) for k in same)]
    found = []
    for model in dict.fromkeys(row["model"] for row in wanted):
        runs = [row for row in wanted if row["model"] == model]
        values = {name: [float(row[name]) for row in runs if row.get(name)] for name in SCORES}
        cells = {name: common.Spread.from_data(cell).median if cell else "" for name, cell in values.items()}
        found.append({"model": model, "seeds": len(runs)} | cells)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested rows that do not exist yet."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    specs = plan(arguments)
    from aezoo import DataModule
    from aezoo.tasks.result_store import table_text

    data = DataModule(**specs[0]["data"])
    if not data.num_classes:
        raise AezooError(f"{arguments.data} has no classes: use a labelled set such as mnist5k")
    # once, so that several processes do not download the same files
    data.prepare_data()
    path = f"probe-{arguments.data}-{common.environment(arguments)}.csv"
    table = common.ResultsCSV(arguments.results / path, KEY, common.command_line("probe", argv), arguments.again)
    parallel.measure_missing(table, "probe_row", specs, arguments, COLUMNS, (*SCORES, "seconds"))
    print(table_text(medians(table.rows, specs[0]["row"])))
    print(table.path)


if __name__ == "__main__":
    common.run_script(main)
