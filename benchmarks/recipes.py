"""Train recipes and write their results to a CSV; `python -m benchmarks.report` writes them into heads and tables.

    python -m benchmarks.recipes                      all recipes that are not in the CSV yet
    python -m benchmarks.recipes vae dense_article --again
                                                      these, whether they are in the CSV or not
    python -m benchmarks.recipes --root /usr/share/datasets fashion_vae

Each recipe runs in its own process and in a temporary folder, with the command in its head. The pictures named in
`PICTURES` are copied to `benchmarks/results/pictures`.
"""

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib import import_module
from itertools import chain
from pathlib import Path

import torch

from aezoo import registry
from aezoo.cli import measured
from aezoo.cli.recipes import recipes
from aezoo.errors import AezooError
from aezoo.training.traits import TAGS

from .common import ResultsCSV, add_again_flag, base_parser, command_line, environment, read_csv, run_script

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LAWS_OF_ALL = "gradient_laws"
LAWS, PARITY = ROOT / "tests" / "laws", ROOT / "tests" / "parity.json"
PICTURES = {
    "dense_article": "reconstructions",
    "denoising": "reconstructions",
    "vae": "samples",
    "vae_2d": "latent_map",
    "fashion_vae": "samples",
}
FIGURES = ("test/loss", "test/log_likelihood", "test/mse", "test/psnr", "test/ssim", "test/bpp", "val/l0")


def train(name: str, root: str | None) -> dict[str, str]:
    """Run one recipe and read its test figures from the run's TensorBoard events."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "aezoo", "fit", "-c", name]
        command += ["--data.root", root] if root and "fashion" in name else []
        began = time.monotonic()
        done = subprocess.run(command, cwd=folder, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
        if done.returncode:
            raise AezooError(f"recipe {name} ends with exit code {done.returncode}: fix it; the same command continues")
        seconds = time.monotonic() - began
        run = Path(folder) / "runs" / name / "0"
        if name in PICTURES:
            (RESULTS / "pictures").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / "pictures" / f"{PICTURES[name]}.png", RESULTS / "pictures" / f"{name}.png")
        return read_run(name, run, seconds)


def read_run(name: str, run: Path, seconds: float) -> dict[str, str]:
    """The row of a recipe that was trained into a folder."""
    found = scalars(run)
    row = {"recipe": name, "epochs": str(len(found["train/loss"])), "seconds": f"{seconds:.0f}"}
    row["threads"] = str(torch.get_num_threads())
    return row | {figure: f"{found[figure][-1]:.5g}" for figure in FIGURES if figure in found}


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """All steps and values under each tag of a run's TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(run.glob("events*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


def scalars(run: Path) -> dict[str, list[float]]:
    """All values under each tag of a run's TensorBoard events."""
    return {tag: [value for _, value in values] for tag, values in points(run).items()}


def published_figure(path: Path) -> str:
    """The published figure that a recipe aims at, from its line `# target:`; empty if it has none."""
    found = re.search(r"^# target: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""


def trainable_recipes() -> dict[str, Path]:
    """Recipes whose data are available, by name; `benchmarks.published` runs those of published figures."""
    return {name: path for name, path in recipes().items() if not published_figure(path)}


def read_rows(path: Path) -> dict[str, dict[str, str]]:
    """Rows of the CSV by recipe."""
    return {row["recipe"]: row for row in read_csv(path)[1]} if path.is_file() else {}


def result_line(row: dict[str, str], path: Path) -> str:
    """The line of a recipe that states its result, from a row of the CSV at `path`."""
    figures = ", ".join(f"{figure} {row[figure]}" for figure in FIGURES if row.get(figure))
    where = path.stem.removeprefix("quality-recipes-")
    threads = row.get("threads")
    seconds = f"{row['seconds']} s" + (f" on {threads} thread{'s' * (threads != '1')}" if threads else "")
    return f"# reached: {figures} ({row['epochs']} epochs, {seconds}, {where}, seed 0)"


def families() -> dict[str, list[str]]:
    """Names of the built-in models by family."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in registry.list_models():
        entry = registry.find(name)
        if entry.owner == "aezoo":
            found[entry.family].append(name)
    return dict(sorted(found.items()))


def family_summary(family: str) -> str:
    """The docstring of a family's package."""
    return (import_module(f"aezoo.models.{family}").__doc__ or "").strip()


def families_table() -> str:
    """The families as a Markdown table, with the weights that the package contains."""
    lines = ["| family | description | models | with weights |", "|---" * 4 + "|"]
    for family, names in families().items():
        tags = [tag for name in names for tag in registry.list_models(name, pretrained=True)]
        pages = [
            f"[`{tag}`](docs/weights/{tag}.md)" for tag in tags if (ROOT / "docs" / "weights" / f"{tag}.md").is_file()
        ]
        link = f"[{family}](docs/models.md#{family})"
        lines.append(f"| {link} | {family_summary(family)} | {len(names)} | {', '.join(pages)} |")
    return "\n".join(lines)


def paper(name: str) -> str:
    """A model's name and paper as a Markdown link, from the first line of its docstring."""
    text, _, address = registry.summary(name).partition(", http")
    address, _, rest = address.partition(",")
    return f"[{text}](http{address}){rest and ',' + rest}"


def models_tables() -> str:
    """The zoo as Markdown tables, from the models' files, their files of laws and the rows of `tests/parity`."""
    references = compared_with()
    sections = []
    for family, names in families().items():
        lines = [f"## {family}\n\n{family_summary(family)}\n"]
        lines += ["| model | paper | objective | tests | compared with |", "|---" * 5 + "|"]
        for name in names:
            formula = objective(name).replace("|", "\\|")
            own, shared = laws(name)
            others = [*references.get(name, ()), *(repository for repository, _ in repositories(name))]
            proved = f"{own} + {shared} | {', '.join(others)}"
            lines.append(f"| `{name}` | {paper(name)} | {formula} | {proved} |")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def choice_tables() -> str:
    """Tables of the models that `aezoo/results.json` measures for their uses, by use and setting, best first."""
    rows: dict[tuple[str, str, str, str], list[tuple[int, str, float, int]]] = defaultdict(list)
    for name, found in json.loads(measured.RESULTS.read_text(encoding="utf-8")).items():
        for of in found["compared"]:
            key = (of["use"], " ".join(of["measure"].replace("{}", "").split()), of["data"], of["setting"])
            rows[key].append((of["n_better"], name, of["value"], of["n_rivals"]))
    order, text, before = [*TAGS, *sorted({key[0] for key in rows} - {*TAGS})], [], ""
    for key in sorted(rows, key=lambda key: (order.index(key[0]), key)):
        use, measure, data, setting = key
        text += [f"## {use.capitalize()}\n"] if use != before else []
        text += [f"{measure} on {data}{setting and f' ({setting})'}\n", f"| model | {measure} | better alternatives |"]
        text += ["|---" * 3 + "|"]
        text += [
            f"| `{name}` | {value:g} | {better} of {rivals} |" for better, name, value, rivals in sorted(rows[key])
        ]
        text += [""]
        before = use
    return "\n".join(text).strip()


def file_of_laws(name: str) -> Path:
    """The file that contains a model's laws."""
    (file,) = LAWS.glob(f"*/test_{name}.py")
    return file


def laws(name: str) -> tuple[int, int]:
    """How many laws are in a model's file of laws, and how many it shares with some other models, but not with all."""
    body = ast.parse(file_of_laws(name).read_text(encoding="utf-8")).body
    own = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    imports = [node for node in body if isinstance(node, ast.ImportFrom) and node.module != LAWS_OF_ALL]
    shared = [alias.name for node in imports for alias in node.names]
    own_laws, shared_laws = ([law for law in names if law.startswith("test_")] for names in (own, shared))
    return len(own_laws), len(shared_laws)


def repositories(name: str) -> list[tuple[str, str]]:
    """The repositories and commits that a model was compared with, in the docstring of its file of laws."""
    text = ast.get_docstring(ast.parse(file_of_laws(name).read_text(encoding="utf-8"))) or ""
    return re.findall(r"https://github\.com/([\w.-]+/[\w.-]+), commit ([0-9a-f]{40})", text)


def compared_with() -> dict[str, list[str]]:
    """The packages that each model was compared with, in the rows of `tests/parity`."""
    tests = json.loads(PARITY.read_text(encoding="utf-8")).values() if PARITY.is_file() else ()
    found: dict[str, set[str]] = defaultdict(set)
    for row in chain.from_iterable(tests):
        found[row["model"]].add(row["reference"].partition(" ")[0])
    return {name: sorted(packages) for name, packages in found.items()}


def objective(name: str) -> str:
    """The formula in a model's docstring for the loss that it minimises, or the bound that it maximises.

    Raises:
        AezooError: the formula does not exist.
    """
    parts = [part for line in registry.card(name).text.splitlines() for part in re.split(r"\s{3,}", line.strip())]
    formulas = [part for part in parts if re.match(r"(L|L\([^)]*\)|L_\w+|log p\(x\)) +(=|>=) ", part)]
    if not formulas:
        raise AezooError(f"{name}: give the docstring of its file an indented line with its objective, such as L = ...")
    return f"`{formulas[0]}`"


def recipes_table(rows: dict[str, dict[str, str]]) -> str:
    """The results of the recipes as a Markdown table."""
    lines = ["| recipe | test loss (nats) | mse | psnr (dB) | ssim | epochs | seconds |", "|---" * 7 + "|"]
    for name in sorted(rows):
        row = rows[name]
        cells = [row[key] for key in ("test/loss", "test/mse", "test/psnr", "test/ssim", "epochs", "seconds")]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def published_table() -> str:
    """Published figures and the results of their recipes here, as a Markdown table."""
    from .published import by_recipe, published, reached

    path = max(RESULTS.glob("published-*.csv"), default=None)
    rows = by_recipe(read_csv(path)[1]) if path else {}
    lines = ["| recipe | published | reached | difference | seeds | epochs | data | processor time |", "|---" * 8 + "|"]
    for name, file in published().items():
        cells = [f"`{name}`", published_figure(file)]
        if runs := rows.get(name):
            first, seconds = runs[0], statistics.fmean(float(row["cpu_seconds"]) for row in runs)
            difference = statistics.fmean(float(row["reached"]) for row in runs) - float(first["published"])
            epochs = f"{int(first['epochs']):,} of {int(first['max_epochs']):,}"
            hours, minutes = divmod(round(seconds / 60), 60)
            cells += [f"{first['metric']} {reached(runs)}", f"{difference:+.2f}", str(len(runs)), epochs, first["data"]]
            cells += [f"{hours} h {minutes:02} min"]
        else:
            cells += ["not run yet", *[""] * 5]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).replace("test/log_likelihood", "log p(x)")


def updated_pages(rows: dict[str, dict[str, str]]) -> dict[Path, str]:
    """The pages with generated tables, with these renewed."""
    tables = {
        ROOT / "README.md": {"families": families_table},
        ROOT / "docs" / "models.md": {"models": models_tables},
        ROOT / "docs" / "choose.md": {"choose": choice_tables},
        ROOT / "docs" / "recipes.md": {"recipes": lambda: recipes_table(rows), "published": published_table},
    }
    pages = {}
    for page, marks in tables.items():
        text = page.read_text(encoding="utf-8")
        for mark, table in marks.items():
            text = replace_table(text, mark, table())
        pages[page] = text
    return pages


def replace_table(text: str, mark: str, table: str) -> str:
    """The text of a page with another table between `<!-- mark -->` and `<!-- /mark -->`.

    Raises:
        AezooError: the page has no such pair of marks.
    """
    before, begin, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    if not end:
        raise AezooError(
            f"a page needs the lines <!-- {mark} --> and <!-- /{mark} -->, between which its table is written"
        )
    return f"{before}{begin}{table}\n{end}{after}"


def newest_results() -> Path:
    """The CSV that the heads and tables are made from: the last one by name, which is that of the newest torch."""
    return max(RESULTS.glob("quality-recipes-*.csv"))


def write_tables() -> None:
    """Write the figures of the newest CSV into the recipes' heads, and the generated tables of README and `docs/`."""
    path = newest_results()
    rows = read_rows(path)
    for name, file in trainable_recipes().items():
        if name in rows:
            text = re.sub(r"^# reached:.*$", result_line(rows[name], path), file.read_text(), count=1, flags=re.M)
            file.write_text(text)
    for page, text in updated_pages(rows).items():
        page.write_text(text, encoding="utf-8")


def main() -> None:
    """Train the requested recipes that have no row yet."""
    parser = base_parser("recipes", __doc__)
    parser.add_argument(
        "recipes", nargs="*", choices=[*trainable_recipes(), []], help="recipes to train; all if none is given"
    )
    parser.add_argument("--root", help="folder that contains Fashion-MNIST")
    add_again_flag(parser)
    arguments = parser.parse_args()
    path = RESULTS / f"quality-recipes-{environment()}.csv"
    table = ResultsCSV(path, ("recipe",), command_line("recipes", sys.argv[1:]), arguments.again)
    for name in arguments.recipes or trainable_recipes():
        if table.needs({"recipe": name}):
            table.put(train(name, arguments.root))
        else:
            print(f"{name} is already in the CSV: --again trains it again", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
