"""Train models on `shapes` and measure how well their codes separate its factors: one CSV row per run.

    python -m benchmarks.disentangle                                       eight variational models, three seeds
    python -m benchmarks.disentangle --models vae beta_vae --steps 50000 --seeds 5 --net conv --jobs 2

All settings except the size of the code are each model's defaults. Figures are measured on samples of the test split,
which are the same for all runs: pictures that no model was trained on in another orientation. Codes are the means of
q(z|x), and the shape is a categorical factor. The metrics are those of `aezoo.metrics`; higher is better for all. udr
compares a model's seeds and does not use the factors. elbo is in nats; mse is the error of the mean code's
reconstruction. A seed fixes weights, noise and order.

Existing rows of the same model, seed and budget are kept; --again measures them again. All seeds of a model run in one
process, because udr needs them together; if one fails, all are lost.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from aezoo import registry

from . import common
from .parallel import run_rows

MODELS = ("beta_vae", "factor_vae", "beta_tcvae", "dip_vae_i", "dip_vae_ii", "annealed_vae", "info_vae", "vae")
KEY = ("model", "seed", "steps", "batch_size", "code_size", "net", "rows")
SCORES = (
    *("mig", "sap", "disentanglement", "completeness", "informativeness", "modularity", "factor_vae_score", "irs"),
    "udr",
)
COLUMNS = (
    *("model", "seed", "steps", "batch_size", "code_size", "net", "rows", *SCORES, "mse", "elbo", "active_units"),
    *("seconds", "parameters", "threads", "device", "error"),
)


def plan(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs: a spec for each model, with the first columns of its seeds' rows."""
    known = registry.list_models()
    names = [registry.find(name).name for name in arguments.models or [name for name in MODELS if name in known]]
    net = {"net": arguments.net} if arguments.net else {}
    fixed = {"steps": arguments.steps, "batch_size": arguments.batch_size, "code_size": arguments.code_size}
    fixed |= {"net": arguments.net, "rows": arguments.rows}
    spec = {
        "data": {"name": "shapes", "size": arguments.size, "batch_size": arguments.batch_size},
        "hyperparameters": {"latent_dim": arguments.code_size, **net},
        "accelerator": arguments.accelerator,
        "steps": arguments.steps,
        "rows": arguments.rows,
    }
    seeds = range(arguments.seeds)
    return [
        spec | {"model": name, "seeds": [{"model": name, "seed": seed, **fixed} for seed in seeds]} for name in names
    ]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = common.build_parser("disentangle", __doc__)
    add, count = parser.add_argument, common.at_least(1)
    add("--models", nargs="+", metavar="NAME", help=f"models to train (default {' '.join(MODELS)})")
    add("--steps", type=count, default=10_000, help="training steps of each run (default 10000)")
    add("--rows", type=common.at_least(400), default=5000, metavar="N", help="samples for the metrics (default 5000)")
    add("--size", type=common.at_least(8), default=32, help="side of the images (default 32)")
    add("--code-size", type=count, default=10, help="numbers in a code (default 10)")
    add("--batch-size", type=count, default=128)
    add("--net", help="mlp, conv or resnet (default: each model's own)")
    common.add_run_flags(parser, "model", timeout=36_000)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested rows that do not exist yet."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    path = f"disentangle-shapes-{arguments.size}-{common.environment(arguments)}.csv"
    table = common.ResultsCSV(arguments.results / path, KEY, common.command_line("disentangle", argv), arguments.again)
    specs = [spec for spec in plan(arguments) if any(table.needs(row) for row in spec["seeds"])]
    found = run_rows("disentangle_row", specs, arguments.timeout, arguments.jobs, arguments.accelerator)
    for i, (spec, result) in enumerate(found, start=1):
        rows = result.get("rows") or [{"error": result.get("error")} for _ in spec["seeds"]]
        for known, row in zip(spec["seeds"], rows, strict=True):
            table.put({name: {**row, **known}.get(name) for name in COLUMNS})
            figures = [
                f"{name} {common.as_text(row.get(name))}" for name in ("mig", "disentanglement", "elbo", "seconds")
            ]
            head = f"[{i}/{len(specs)}] {known['model']}, seed {known['seed']}"
            print(f"{head}: {row.get('error') or ', '.join(figures)}", flush=True)
    print(table.path)


if __name__ == "__main__":
    common.run_script(main)
