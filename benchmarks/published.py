"""Run the recipes of published figures for a given number of steps on available data: one CSV row per run.

    python -m benchmarks.published --root /usr/share/datasets
    python -m benchmarks.published mnist_vae mnist_iwae_5 --data mnist5k --steps 20000
    python -m benchmarks.published --heads         only rewrite the recipes' heads from the CSV

`python -m benchmarks.recipes --tables` writes the README's table of these recipes.

A recipe whose head has a line `# target:` holds the exact setting of a published figure on all of MNIST. If MNIST is
available, `aezoo fit -c mnist_vae --data.root FOLDER` runs it to its end. Here its model is trained on other data. All
else stays the same, except for the number of importance samples and the number of steps; the learning rate falls over
these steps as it would over the whole run. The results do not reproduce the published figures. They show that the
recipe runs, and how far it came.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aezoo.cli.recipes import recipes
from aezoo.errors import AezooError

from . import common
from .recipes import published_figure, scalars

FIGURES = ("train/loss", "test/loss", "test/nll", "test/kl", "test/log_likelihood", "test/mse")
KEY = ("recipe", "data", "binarise", "steps", "importance_samples")


def published() -> dict[str, Path]:
    """Recipes that have a target, by name."""
    return {name: path for name, path in recipes().items() if published_figure(path)}


def binarisation(path: Path) -> str:
    """How a recipe turns its data into zeros and ones."""
    import yaml

    data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
    return "static" if data["name"] == "binarized_mnist" else str(data.get("binarise", "none"))


def run(row: dict[str, Any], root: str | None) -> dict[str, Any]:
    """Train with the settings of a row's first columns, through the command line, and read the figures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "aezoo", "fit", "-c", row["recipe"]]
        command += [f"--data.name={row['data']}", f"--data.binarise={row['binarise']}"]
        command += [f"--data.root={root}"] if root else []
        command += [f"--trainer.max_steps={row['steps']}", "--trainer.max_epochs=1000000"]
        command += [f"--importance_samples={row['importance_samples']}"]
        # pictures and curves are not needed
        command += ["--trainer.enable_progress_bar=false", "--reconstructions.every_n_epochs=0"]
        command += ["--samples.every_n_epochs=0", "--traversal.every_n_epochs=0", "--latents.every_n_epochs=0"]
        began = time.monotonic()
        paths = os.pathsep.join(filter(None, (str(common.ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths}
        )
        row = row | {"seconds": round(time.monotonic() - began)}
        if done.returncode:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            return row | {"error": lines[-1] if lines else f"exit code {done.returncode}"}
        found = scalars(Path(folder) / "runs" / row["recipe"] / "0")
    return row | {name: found[name][-1] for name in FIGURES if name in found}


def head(rows: Sequence[dict[str, str]], environment: str) -> str:
    """The line of a recipe that states its result here."""
    parts = []
    for row in rows:
        name = "test/log_likelihood" if row["binarise"] != "none" else "test/loss"
        kind = "" if row["binarise"] == "none" else f"{row['binarise']} "
        parts.append(f"{name} {row[name]} on {kind}{row['data']}")
    steps, samples = budget(rows[0])
    cost = f"{steps:,} steps" + (f", {samples} importance samples" if rows[0]["binarise"] != "none" else "")
    return f"# reached: {', '.join(parts)} ({cost}, {environment}, seed 0)"


def budget(row: dict[str, str]) -> tuple[int, int]:
    """The budget of a row's figures: steps, and samples for its likelihood."""
    return int(row["steps"]), int(row["importance_samples"])


def write_heads(table: common.ResultsCSV) -> None:
    """Write the figures of the CSV into their recipes."""
    environment = table.path.stem.removeprefix("published-")
    for name, path in published().items():
        rows = [row for row in table.rows if row["recipe"] == name and not row.get("error")]
        # figures of one budget only, the longest
        rows = [row for row in rows if budget(row) == max(map(budget, rows))]
        if rows:
            text = path.read_text(encoding="utf-8")
            path.write_text(re.sub(r"^# reached:.*$", head(rows, environment), text, count=1, flags=re.MULTILINE))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = common.build_parser("published", __doc__)
    add, count = parser.add_argument, common.at_least(1)
    add("recipes", nargs="*", metavar="NAME", help="recipes to run; without it all that have a target")
    add("--data", nargs="+", default=["mnist5k", "fashion_mnist"], metavar="SET", help="sets of 28x28 grey pictures")
    add("--root", help="where their files are")
    add("--steps", type=count, default=6000, help="optimiser steps of each run (default 6000)")
    add("--importance-samples", type=count, default=300, help="of the log-likelihood (default 300)")
    add("--heads", action="store_true", help="run nothing, rewrite the recipes' heads from the CSV")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.recipes) - set(published()):
        raise AezooError(f"no recipe with a target is named {min(unknown)!r}: take {', '.join(published())}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the requested recipes that have no row yet."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    path = arguments.results / f"published-{common.environment(arguments)}.csv"
    if arguments.heads:
        path = max(arguments.results.glob("published-*.csv"), default=path)
    table = common.ResultsCSV(path, KEY, common.command_line("published", argv), arguments.again)
    for name in [] if arguments.heads else arguments.recipes or published():
        for data in arguments.data:
            row = {"recipe": name, "data": data, "binarise": binarisation(published()[name])}
            # figures of grey pictures are losses, not likelihoods
            draws = 1 if row["binarise"] == "none" else arguments.importance_samples
            row |= {"steps": arguments.steps, "importance_samples": draws}
            if table.needs(row):
                row = run(row, arguments.root)
                table.put({column: row.get(column) for column in (*KEY, "seconds", *FIGURES, "error")})
                figure = row.get("error") or row.get("test/log_likelihood", row.get("test/loss"))
                print(f"{name} on {data}: {figure}, {row['seconds']} s", flush=True)
    write_heads(table)


if __name__ == "__main__":
    common.run_script(main)
