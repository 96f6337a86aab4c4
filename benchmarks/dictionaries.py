"""Train every sparse model on sums of known atoms and test whether it finds them: one CSV row per run, and medians.

    python -m benchmarks.dictionaries                                      all sparse models, three seeds
    python -m benchmarks.dictionaries --models topk_sae sae_l1 --atoms 256 --dim 64 --correlation 0.5 --jobs 2

The data set is `synthetic_dictionary`. All codes have as many numbers as there are atoms. Models that take the number
of active latents get the mean number of active atoms; OPTIONS has settings that bring the other models near it. A seed
fixes the atoms and the samples as well as weights, noise and order. Figures are measured on the test split. mcc is the
mean absolute cosine similarity of atoms and the latents matched with them one to one. uniqueness is the number of atoms
that are the nearest atom of some latent, divided by the number of latents. l0 and dead_share count entries that are not
0. fvu, cosine, shrinkage and reconstruction_bias are those of `aezoo.metrics`, best at 0, 1, 1 and 1. A latent's
direction is the change that it makes in the decoder's output. Crosscoders and transcoders get two streams of one code,
with equally many numbers; a transcoder reads the first and is evaluated on the second. temporal_sae is left out: on
samples of one position it equals topk_sae.

Existing rows of the same model, seed, data, budget and options are kept; --again measures them again.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aezoo import registry
from aezoo.errors import AezooError

from . import common, parallel

# settings of models besides code size and number of active latents: penalties that bring l0 near the default --active
# in runs of thousands of steps
OPTIONS: dict[str, dict[str, Any]] = {
    "sparse_ae_l1": {"l1": 1.0},
    "sae_l1": {"l1": 0.5},
    "gated_sae": {"l1": 1.0},
    "jumprelu_sae": {"l0_weight": 0.2},
    "crosscoder": {"l1": 0.2},
    "transcoder": {"targets": (1,), "l1": 0.4},
}
# number of data streams of a model; 1 for all others
STREAMS = {"crosscoder": 2, "transcoder": 2}
# models of sequences; the data have none
SEQUENCE_MODELS = ("temporal_sae",)
DATA = ("atoms", "dim", "active", "correlation", "noise", "samples")
KEY = ("model", "seed", "steps", "batch_size", "lr", *DATA, "options")
SCORES = ("mcc", "uniqueness", "l0", "fvu", "dead_share", "cosine", "shrinkage", "reconstruction_bias")
COLUMNS = (*KEY, *SCORES, "seconds", "parameters", "threads", "device", "error")
SHOWN = ("mcc", "l0", "fvu", "dead_share")


def plan(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs: a spec for each row, with the row's first columns."""
    known = [name for name in registry.list_models(family="sparse") if name not in SEQUENCE_MODELS]
    names = [registry.find(name).name for name in arguments.models or known]
    other = next((name for name in names if name not in known), None)
    if other is not None:
        raise AezooError(f"{other} has no sparse code, this benchmark is for {', '.join(known)}")
    data = {key: getattr(arguments, key) for key in DATA}
    if not 0 < arguments.active <= arguments.atoms:
        raise AezooError(f"--active {arguments.active:g} must be above 0 and at most --atoms {arguments.atoms}")
    fixed = {"steps": arguments.steps, "batch_size": arguments.batch_size, "lr": arguments.lr, **data}
    specs = []
    for name in names:
        given = model_options(name, arguments)
        written = " ".join(f"{key}={value}" for key, value in given.items())
        spec = {
            "model": name,
            "data": {
                **{f"dictionary_{key}": value for key, value in data.items()},
                "dictionary_streams": STREAMS.get(name, 1),
                "batch_size": arguments.batch_size,
            },
            "hyperparameters": {"latent_dim": arguments.atoms, "lr": arguments.lr, **given},
            "accelerator": arguments.accelerator,
            "steps": arguments.steps,
        }
        head = {"model": name, **fixed, "options": written}
        specs += [spec | {"row": {**head, "seed": seed}} for seed in range(arguments.seeds)]
    return specs


def model_options(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A model's settings for data with the requested number of active atoms."""
    known, given = registry.hyperparameters(name), OPTIONS.get(name, {})
    shared = {"likelihood": "gaussian", "k": max(1, round(arguments.active))}
    share = {"rho": arguments.active / arguments.atoms, "lifetime": arguments.active / arguments.atoms}
    return {key: value for key, value in (shared | share).items() if key in known and key not in given} | given


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = common.build_parser("dictionaries", __doc__)
    add, count = parser.add_argument, common.at_least(1)
    add("--models", nargs="+", metavar="NAME", help="models to train (default: all of the family sparse)")
    add("--steps", type=count, default=5000, help="training steps of each run (default 5000)")
    add("--atoms", type=count, default=64, help="number of atoms, and size of a code (default 64)")
    add("--dim", type=common.at_least(2), default=32, help="dimensions of the data (default 32)")
    add("--active", type=float, default=4.0, help="mean number of active atoms in a sample (default 4)")
    add("--correlation", type=float, default=0.0, help="correlation of supports in groups of four atoms (default 0)")
    add("--noise", type=float, default=0.05, help="standard deviation of noise in each dimension (default 0.05)")
    add("--samples", type=common.at_least(100), default=100_000, help="samples of all splits together (default 100000)")
    add("--batch-size", type=count, default=128)
    add("--lr", type=float, default=1e-3, help="learning rate of all models (default 0.001)")
    common.add_run_flags(parser, "row", timeout=3600)
    return parser.parse_args(argv)


def medians(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """Lines of a table: the medians over seeds of each model, the best mcc first."""
    found: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        if not row.get("error"):
            found.setdefault(row["model"], []).append(row)
    middle = {name: [statistics.median(float(row[score]) for row in own) for score in SHOWN]
              for name, own in found.items()}  # fmt: skip
    lines = [f"{'model':<22}{'seeds':>6}" + "".join(f"{score:>12}" for score in SHOWN)]
    for name, values in sorted(middle.items(), key=lambda item: -item[1][0]):
        lines.append(f"{name:<22}{len(found[name]):>6}" + "".join(f"{value:>12.4g}" for value in values))
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested rows that do not exist yet, and print the medians of all rows."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    path = f"dictionaries-{common.environment(arguments)}.csv"
    table = common.ResultsCSV(arguments.results / path, KEY, common.command_line("dictionaries", argv), arguments.again)
    specs = plan(arguments)
    parallel.measure_missing(table, "dictionaries_row", specs, arguments, COLUMNS, (*SHOWN, "seconds"))
    print(*medians(there for spec in specs if (there := table.find(spec["row"])) is not None), sep="\n")
    print(table.path)


if __name__ == "__main__":
    common.run_script(main)
