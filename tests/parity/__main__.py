"""Compare models with reference implementations, and write the results to docs/parity.md.

    python tests/parity --environment .venv-parity     make an environment with the references
    .venv-parity/bin/python tests/parity --run         run all comparisons there, then write the page
    python tests/parity                                write the page from tests/parity.json

The environment can import the packages of the one that makes it. References are installed without their dependencies,
since several require older versions than they run with; dependencies.txt lists what they need besides.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import venv
from collections import defaultdict
from pathlib import Path
from typing import Any

from aezoo import registry
from benchmarks import recipes

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ROWS, PAGE = ROOT / "tests" / "parity.json", ROOT / "docs" / "parity.md"
HEAD = """# Parity

This page compares the models with implementations of other authors, on equal weights, batch and noise, in float64. A
difference is the largest absolute difference of a quantity, divided by its largest absolute value; for gradients it is
that of the worst parameter. `equal` means at most 1e-6. `python tests/parity` writes this page from the last run of
[tests/parity](../tests/parity), which `.ci/run` repeats.
"""
REPOSITORIES = """No package that implements these models was found, with a few exceptions. They were compared with code
of repositories. The docstring of a model's laws names the files and quantities, the deviations, and which of the two
follows the paper. Code that could not be run was read line by line; the docstring says so.
"""


def make_environment(folder: Path) -> None:
    """A virtual environment with the references, on top of the packages of this one."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # sorted after the environment's own packages
    Path(site, "zz_base.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*install, "--no-deps", "-r", HERE / "references.txt"], check=True)
    subprocess.run([*install, "-r", HERE / "dependencies.txt"], check=True)


def read_rows() -> list[dict[str, Any]]:
    """The rows of all comparisons of the last run."""
    return [row for found in json.loads(ROWS.read_text(encoding="utf-8")).values() for row in found]


def page(rows: list[dict[str, Any]]) -> str:
    """The page: counts, and a table of models with a row for each part of a reference and kind of verdict."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["reference"], row["part"], row["verdict"], row["reason"]].append(row)
    models = {row["model"] for row in rows}
    exact = models - {row["model"] for row in rows if row["verdict"] == "deviates"}
    text = [
        HEAD,
        f"{len(models)} models, {len({row['reference'] for row in rows})} references, {len(rows)} quantities; "
        f"{len(exact)} models deviate in none.",
        "",
        "## Packages",
        "",
        "| model | reference | quantities | difference | verdict |",
        "|---|---|---|---|---|",
    ]
    for (model, reference, part, verdict, reason), found in sorted(groups.items()):
        quantities = ", ".join(dict.fromkeys(row["quantity"] for row in found))
        worst = max(row["difference"] for row in found)
        said = f"{verdict}: {reason}" if reason else verdict
        text.append(f"| {model} | {reference}, `{part}` | {quantities} | {worst:.1e} | {said} |")
    text += ["", "## Repositories", "", REPOSITORIES, "| model | repository and commit | figures |", "|---|---|---|"]
    names = [name for name in registry.list_models() if registry.find(name).owner == "aezoo"]
    found_in = {name: recipes.repositories(name) for name in names}
    for name, commits in found_in.items():
        if commits:
            file = recipes.file_of_laws(name)
            links = ", ".join(f"[{at}@{commit[:10]}](https://github.com/{at}/tree/{commit})" for at, commit in commits)
            text.append(f"| {name} | {links} | [{file.name}](../{file.relative_to(ROOT).as_posix()}) |")
    alone = [f"`{name}`" for name in names if name not in models and not found_in[name]]
    if alone:
        text += ["", f"Checked only by their laws: {', '.join(alone)}."]
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python tests/parity", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--environment", type=Path, metavar="DIR", help="make an environment with the references there")
    parser.add_argument("--run", action="store_true", help="run all comparisons first")
    options = parser.parse_args(arguments)
    if options.environment:
        make_environment(options.environment)
        return 0
    if options.run:
        ROWS.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", str(HERE), f"--parity={ROWS}"]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            return status
    PAGE.write_text(page(read_rows()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
