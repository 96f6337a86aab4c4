"""Run the recipes of published figures on MNIST to their last epochs: one CSV row per recipe and seed.

    python -m benchmarks.published --root FOLDER                        all, the cheapest first
    python -m benchmarks.published mnist_vae mnist_hvae --root FOLDER --seeds 3
    python -m benchmarks.published --root FOLDER --seconds 600          at most so long each; the same command continues

`python -m benchmarks.report` writes the figures into the recipes' heads and the table in `docs/recipes.md`.

A recipe whose head has a line `# target:` has the setting of a published figure; a line `# test:` names other data on
which that figure was measured. FOLDER contains MNIST and, if available, Larochelle's binary digits. Without these, the
recipes that need them use digits drawn once from the grey values, with as many samples for training and validation,
and the column `data` records it. Runs are stored in `build/published`; a run that was interrupted continues from its
last epoch. A run that has not reached its last epoch is measured as well; the column `epochs` has their number. Nothing
is chosen on the test split: the weights are those with the lowest validation loss, or the last ones if the setting has
no validation.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from aezoo.cli.recipes import recipes
from aezoo.errors import AezooError

from . import common
from .parallel import run_rows
from .recipes import published_figure

KEY = ("recipe", "seed")
COLUMNS = (
    *(*KEY, "data", "epochs", "max_epochs", "metric", "published", "reached", "train/loss", "train/nll", "train/kl"),
    *("test/loss", "test/nll", "test/kl", "test/log_likelihood", "test/mse", "importance_samples", "cpu_seconds"),
    *("threads", "error"),
)
# by the time of all epochs
ORDER = (
    *("pytorch_vae", "keras_dense", "keras_deep", "keras_sparse", "poincare", "vae", "hyperspherical", "keras_vae"),
    *("iwae_1", "vamp", "iwae_5", "hvae", "keras_vq_vae", "iwae_50", "piwae", "miwae", "ciwae"),
)
DRAWN_ONCE = "mnist, drawn once"


class Target(NamedTuple):
    """A published figure."""

    metric: str
    value: float


def published() -> dict[str, Path]:
    """Recipes that have a target on MNIST, by name, the cheapest first and unknown ones last."""
    found = {name: path for name, path in recipes().items() if name.startswith("mnist_") and published_figure(path)}
    rank = {f"mnist_{name}": place for place, name in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: rank.get(item[0], len(rank))))


def target(path: Path) -> Target:
    """The first figure of a recipe's line `# target:`."""
    metric, value = re.findall(r"((?:test|train)/\w+) (-?[\d.]+\d)", published_figure(path))[0]
    return Target(metric, float(value))


def settings(path: Path) -> dict[str, Any]:
    """A recipe's settings."""
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def tested_on(path: Path) -> dict[str, str]:
    """Settings of the data that are other ones in the test, from a recipe's line `# test: NAME=VALUE (why)`."""
    found = re.search(r"^# test: (\w+)=(\w+) ", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {found[1]: found[2]} if found else {}


def data_flags(path: Path, root: Path) -> tuple[str, list[str]]:
    """The data that a recipe is trained on here, and their flags."""
    data = settings(path)["data"]
    flags = [f"--data.root={root}"]
    if data["name"] != "binarized_mnist":
        return ", ".join(filter(None, (data["name"], data.get("binarise")))), flags
    if any(root.glob("**/binarized_mnist_train.amat")):
        return data["name"], flags
    return DRAWN_ONCE, [*flags, "--data.name=mnist", "--data.binarise=static", f"--data.val_fraction={1 / 6}"]


def spec(path: Path, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The spec for `published_row`."""
    recipe, figure = settings(path), target(path)
    data, flags = data_flags(path, arguments.root.expanduser().resolve())
    row = {"recipe": path.stem, "seed": seed, "data": data, "max_epochs": recipe["trainer"]["max_epochs"]}
    row |= {"metric": figure.metric, "published": figure.value}
    row |= {"importance_samples": recipe.get("importance_samples")}
    folder, test = arguments.keep.resolve() / f"{path.stem}-{seed}", tested_on(path)
    row["data"] += "".join(f"; test with {name} {value}" for name, value in test.items())
    return {"row": row, "flags": flags, "test": test, "folder": str(folder), "seconds": arguments.seconds}


def is_finished(row: dict[str, str] | None) -> bool:
    """Whether the run of a row has reached its last epoch."""
    return row is not None and not row.get("error") and row["epochs"] == row["max_epochs"]


def by_recipe(rows: Iterable[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Rows without errors by recipe; if runs have different numbers of epochs, only those with the most."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if not row.get("error"):
            found.setdefault(row["recipe"], []).append(row)
    return {
        name: [row for row in group if int(row["epochs"]) == max(int(other["epochs"]) for other in group)]
        for name, group in found.items()
    }


def reached(rows: Sequence[dict[str, str]]) -> str:
    """The mean over seeds of what a recipe reached, with its standard deviation."""
    values = [float(row["reached"]) for row in rows]
    spread = f" (s.d. {statistics.stdev(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def head(rows: Sequence[dict[str, str]], environment: str) -> str:
    """The line of a recipe that states its result here."""
    first = rows[0]
    epochs = f"{int(first['epochs']):,} of {int(first['max_epochs']):,} epochs"
    seconds = f"{statistics.fmean(float(row['cpu_seconds']) for row in rows):,.0f} s of processor time"
    seeds = f"{len(rows)} seed{'s' * (len(rows) > 1)}"
    return (
        f"# reached: {first['metric']} {reached(rows)} on {first['data']} ({epochs}, {seeds}, {seconds}, {environment})"
    )


def write_heads(csv: Path) -> None:
    """Write the figures of the CSV into their recipes."""
    environment = csv.stem.removeprefix("published-")
    rows = by_recipe(common.read_csv(csv)[1])
    for name, path in published().items():
        if name in rows:
            text = path.read_text(encoding="utf-8")
            line = head(rows[name], environment)
            path.write_text(re.sub(r"^# reached:.*$", line, text, count=1, flags=re.MULTILINE), encoding="utf-8")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = common.build_parser("published", __doc__)
    add = parser.add_argument
    add("recipes", nargs="*", metavar="NAME", help="recipes to run; without it all that have a target")
    add("--root", type=Path, default=Path("data"), help="folder that contains MNIST")
    add("--seconds", type=common.seconds, help="end a run after so long; the next call continues with it")
    add("--keep", type=Path, default=common.ROOT / "build" / "published", metavar="DIR", help="folder of the runs")
    common.add_run_flags(parser, "run", timeout=14 * 86400)
    parser.set_defaults(seeds=1)
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.recipes) - set(published()):
        raise AezooError(f"no recipe with a target is named {min(unknown)!r}: take {', '.join(published())}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the requested recipes that have not reached their ends."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    path = arguments.results / f"published-{common.environment(arguments)}.csv"
    command = common.command_line("published", argv, left_out=("--keep",))
    table = common.ResultsCSV(path, KEY, command, arguments.again)
    known = published()
    names = arguments.recipes or known
    specs = [spec(known[name], seed, arguments) for seed in range(arguments.seeds) for name in names]
    specs = [each for each in specs if arguments.again or not is_finished(table.find(each["row"]))]
    table.check_writable()
    for each, measured in run_rows("published_row", specs, arguments.timeout, arguments.jobs, arguments.accelerator):
        row = measured | each["row"]
        row["reached"] = measured.get(row["metric"])
        table.put({name: row.get(name) for name in COLUMNS})
        figure = row.get("error") or f"{row['metric']} {row['reached']:.2f}, published {row['published']}"
        print(f"{row['recipe']}, seed {row['seed']}, {row.get('epochs', 0)} epochs: {figure}", flush=True)


if __name__ == "__main__":
    common.run_script(main)
