"""Train recipes, write what they reached to a CSV, into the recipes' heads, and into the README's tables.

    python -m benchmarks.quality                      all recipes
    python -m benchmarks.quality vae dense_article    these
    python -m benchmarks.quality --root /usr/share/datasets fashion_vae
    python -m benchmarks.quality --tables             only rewrite the heads and tables from the CSV

Each recipe runs in a process of its own, in a temporary folder, by the command that its head states. The pictures
named in `PICTURES` are copied to `benchmarks/results/pictures`.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from aezoo import registry
from aezoo.cli import recipes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = {
    "dense_article": "reconstructions",
    "denoising": "reconstructions",
    "vae": "samples",
    "vae_2d": "latent_map",
    "fashion_vae": "samples",
}
FIGURES = ("test/loss", "test/log_likelihood", "test/mse", "test/psnr", "test/ssim", "val/l0")


def environment() -> str:
    """What a number depends on, for a file name: precision, torch's version, processor and cores."""
    import torch

    version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    device = torch.cuda.get_device_name(0).lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    return f"fp32-pt{version}-{device}{os.cpu_count() if device == 'cpu' else ''}"


def train(name: str, root: str | None) -> dict[str, str]:
    """Run one recipe and read its test figures from the run's TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "aezoo", "fit", "-c", name]
        command += ["--data.root", root] if root and "fashion" in name else []
        began = time.monotonic()
        subprocess.run(command, cwd=folder, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        seconds = time.monotonic() - began
        run = Path(folder) / "runs" / name / "0"
        scalars: dict[str, float] = {}
        epochs = 0
        for path in sorted(run.glob("events*")):
            events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
            for tag in events.Tags()["scalars"]:
                scalars[tag] = events.Scalars(tag)[-1].value
                if tag == "train/loss":
                    epochs = len(events.Scalars(tag))
        if name in PICTURES:
            (RESULTS / "pictures").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / "pictures" / f"{PICTURES[name]}.png", RESULTS / "pictures" / f"{name}.png")
    row = {"recipe": name, "epochs": str(epochs), "seconds": f"{seconds:.0f}"}
    return row | {figure: f"{scalars[figure]:.5g}" for figure in FIGURES if figure in scalars}


def read(path: Path) -> dict[str, dict[str, str]]:
    """Rows of the CSV by recipe."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {row["recipe"]: row for row in csv.DictReader(file)}


def write(path: Path, rows: dict[str, dict[str, str]]) -> None:
    """Write the CSV, recipes in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ["recipe", "epochs", "seconds", *FIGURES]
    fresh = path.with_suffix(".part")
    with fresh.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))
    # rows of an earlier run are not lost to a run that fails
    fresh.replace(path)


def head(row: dict[str, str], path: Path) -> str:
    """The line of a recipe that states what it reached, by a row of the CSV at `path`."""
    figures = ", ".join(f"{figure} {row[figure]}" for figure in FIGURES if row.get(figure))
    where = path.stem.removeprefix("quality-recipes-")
    return f"# reached: {figures} ({row['epochs']} epochs, {row['seconds']} s, {where}, seed 0)"


def models_table() -> str:
    """The zoo as a Markdown table, from the models' own files."""
    lines = ["| model | family | paper |", "|---|---|---|"]
    for name in registry.list_models():
        entry = registry.find(name)
        if entry.owner == "aezoo":
            text, _, address = registry.card(name).summary.partition(", http")
            address, _, rest = address.partition(",")
            lines.append(f"| `{name}` | {entry.family} | [{text}](http{address}){rest and ',' + rest} |")
    return "\n".join(lines)


def recipes_table(rows: dict[str, dict[str, str]]) -> str:
    """What the recipes reached, as a Markdown table."""
    lines = ["| recipe | test loss (nats) | mse | psnr (dB) | ssim | epochs | seconds |", "|---" * 7 + "|"]
    for name in sorted(rows):
        row = rows[name]
        cells = [row[key] for key in ("test/loss", "test/mse", "test/psnr", "test/ssim", "epochs", "seconds")]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def readme(rows: dict[str, dict[str, str]]) -> str:
    """The README with its generated tables renewed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for mark, table in (("models", models_table()), ("recipes", recipes_table(rows))):
        text = re.sub(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", rf"\1{table}\n\2", text, flags=re.DOTALL)
    return text


def newest() -> Path:
    """The CSV that the heads and tables are made from: the last of them by name, so that of the newest torch."""
    return max(RESULTS.glob("quality-recipes-*.csv"), default=RESULTS / f"quality-recipes-{environment()}.csv")


def main() -> None:
    """Train what is asked for and rewrite what states its figures."""
    summary, _, usage = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=summary,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipes", nargs="*", choices=[*recipes(), []], help="recipes to train; all if none is given")
    parser.add_argument("--root", help="folder that holds Fashion-MNIST")
    parser.add_argument("--tables", action="store_true", help="train nothing, rewrite heads and tables from the CSV")
    arguments = parser.parse_args()
    path = newest() if arguments.tables else RESULTS / f"quality-recipes-{environment()}.csv"
    rows = read(path)
    for name in [] if arguments.tables else arguments.recipes or recipes():
        rows[name] = train(name, arguments.root)
        write(path, rows)
    for name, file in recipes().items():
        if name in rows:
            text = re.sub(r"^# reached:.*$", head(rows[name], path), file.read_text(), count=1, flags=re.M)
            file.write_text(text)
    (ROOT / "README.md").write_text(readme(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
