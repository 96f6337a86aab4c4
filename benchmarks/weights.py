"""Train the weights that the package contains, measure them, and write their files, entries and model cards.

    python -m benchmarks.weights                        all tags of `benchmarks/weights.yaml` that are missing
    python -m benchmarks.weights vae.mnist --again      train this one again
    python -m benchmarks.weights --train-only           only the trainings
    python -m benchmarks.weights vae.mnist --as-is      measure a training that has not ended; a later call continues it
    python -m benchmarks.weights --table                only rewrite the table of docs/pretrained.md

MNIST is looked for in the folder that the environment variable `AEZOO_DATA` names, else in `data`; Fashion-MNIST also
in /usr/share/datasets. Runs are stored in `build/weights`; a run that was interrupted continues.

Weights are stored in float16 if the loss and the squared error of reconstructions on the test split then change by at
most 0.1 %, else in float32.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from aezoo.errors import AezooError
from aezoo.training import tags

from . import common

if TYPE_CHECKING:
    import aezoo
    from aezoo.training.tags import Figure

SETTINGS = common.PACKAGE / "weights.yaml"
WEIGHTS = common.ROOT / "aezoo" / "weights"
ENTRIES = WEIGHTS / "tags.json"
DOCS = common.ROOT / "docs"
FASHION_ROOT = Path("/usr/share/datasets")
LICENSE = "MIT"
BATCH_SIZE = 256
# in the entry of weights whose training has not ended
UNFINISHED = ", measured after "
# largest relative change of a figure by float16
MAX_CHANGE = 1e-3
QUIET = (
    *("--trainer.enable_progress_bar=false", "--trainer.limit_test_batches=0", "--reconstructions.every_n_epochs=0"),
    *("--samples.every_n_epochs=0", "--traversal.every_n_epochs=0", "--latents.every_n_epochs=0"),
    *("--filters.every_n_epochs=0", "--codebook.every_n_epochs=0", "--projector.n=0"),
)


def settings() -> dict[str, dict[str, Any]]:
    """The settings of all tags, by tag."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    return found


def entries() -> dict[str, dict[str, Any]]:
    """The entries of the tags that were made."""
    return json.loads(ENTRIES.read_text(encoding="utf-8")) if ENTRIES.is_file() else {}


def data_settings(tag: str, setting: dict[str, Any]) -> dict[str, Any]:
    """The DataModule's settings without the folder of the files."""
    name = "fashion_mnist" if tag.partition(".")[2].startswith("fashion_mnist") else "mnist"
    return {"name": name, **setting.get("data", {})}


def data_root(name: str) -> Path:
    """The folder that contains a data set's files."""
    root = Path(os.environ.get("AEZOO_DATA", "data"))
    return FASHION_ROOT if name == "fashion_mnist" and FASHION_ROOT.is_dir() else root.resolve()


def flags(tag: str, setting: dict[str, Any]) -> list[str]:
    """The flags of `aezoo fit` that train a tag, without the folder of the data."""
    model = {"lr_schedule": "cosine", **setting.get("model", {})}
    given = {f"model.{key}": value for key, value in model.items()}
    data = data_settings(tag, setting) | {"batch_size": BATCH_SIZE}
    given |= {f"data.{key}": value for key, value in data.items()}
    given |= {f"trainer.{key}": value for key, value in setting.get("trainer", {}).items()}
    given |= {"trainer.max_epochs": setting["epochs"], "early_stopping.patience": 5, "name": tag}
    words = {key: value if isinstance(value, str) else _inline(value) for key, value in given.items()}
    return [f"--model={tag.partition('.')[0]}", *(f"--{key}={value}" for key, value in words.items())]


def _inline(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).partition("\n")[0].replace(" ", "")


def command(tag: str, setting: dict[str, Any]) -> str:
    """The command that trains a tag, for a shell."""
    words = [f"'{word}'" if re.search(r"[^\w.,:/=@+-]", word) else word for word in flags(tag, setting)]
    return " ".join(["aezoo fit", *words])


def train(tag: str, setting: dict[str, Any], keep: Path) -> Path:
    """Train a tag, or go on with its training, and return the folder of the run.

    Raises:
        AezooError: the fit fails.
    """
    keep.mkdir(parents=True, exist_ok=True)
    run, ended = keep / "runs" / tag / "0", _end_of(tag, keep)
    if not ended.is_file():
        root = data_root(data_settings(tag, setting)["name"])
        words = [sys.executable, "-m", "aezoo", "fit", "--resume=auto", *flags(tag, setting), f"--data.root={root}"]
        with (keep / f"{tag}.log").open("ab") as log:
            environment = os.environ | {"PYTHONPATH": str(common.ROOT)}
            code = subprocess.run(
                [*words, *QUIET], cwd=keep, stdout=log, stderr=log, env=environment, check=False
            ).returncode
        if code:
            raise AezooError(f"the training of {tag} ends with exit code {code}: see {keep / f'{tag}.log'}")
        ended.touch()
    return run


def _end_of(tag: str, keep: Path) -> Path:
    """The file that marks a training as ended."""
    return keep / f"{tag}.trained"


def make(tag: str, setting: dict[str, Any], run: Path, keep: Path) -> list["Figure"]:
    """Measure the best weights of a run, and write the tag's files, entry and card."""
    import aezoo
    from aezoo.io.checkpoint import load_run

    from . import weights_measure

    model = load_run(run)[0]
    given = data_settings(tag, setting)
    names = (given["name"], "mnist" if given["name"] == "fashion_mnist" else "fashion_mnist")
    other_data = {key: value for key, value in given.items() if key != "train_classes"}
    data, other = (
        aezoo.DataModule(**(given if name == given["name"] else other_data | {"name": name}), root=str(data_root(name)))
        for name in names
    )
    corrupt, normal = setting.get("corrupt"), setting.get("normal")
    folder = keep / "saved" / tag
    full = weights_measure.reconstruction(model, data)
    in_half = _halved(model, folder)
    half = weights_measure.reconstruction(in_half, data)
    change = max(abs(half[name] / full[name] - 1) for name in ("loss", "mse") if full.get(name))
    stored = in_half if change <= MAX_CHANGE else model
    stored.data_statistics = weights_measure.statistics(stored, data)
    _save(stored, folder, half=stored is in_half)
    final = aezoo.load_model(folder).float()
    found = weights_measure.figures(final, data, other, keep / f"features-{names[0]}.pkl", corrupt, normal)
    if normal is not None:  # a detector
        found.sort(key=lambda figure: figure.metric != "AUROC")
    rows = weights_measure.picture(final, data, DOCS / "weights" / f"{tag}.png", corrupt)
    home = WEIGHTS / tag
    home.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "model.safetensors", home / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["aezoo_version"]  # weights in the package always have its version
    (home / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    unfinished = ""
    if not _end_of(tag, keep).is_file():
        done = len((run / "metrics.csv").read_text(encoding="utf-8").splitlines()) - 1
        unfinished = f"{UNFINISHED}{done} of {setting['epochs']} epochs"
    entry = {
        "source": tag,
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(home.iterdir())},
        "bytes": sum(file.stat().st_size for file in home.iterdir()),
        "license": LICENSE,
        "input_shape": list(final.input_shape),
        "input_range": [0, 1],
        "data": given,
        "figures": [_plain(figure) for figure in found],
        "authors_figure": None,
        "recipe": f"benchmarks/{SETTINGS.name}{unfinished}",
        "command": command(tag, setting),
    }
    ENTRIES.write_text(json.dumps(_in_order(entries() | {tag: entry}), indent=1) + "\n", encoding="utf-8")
    kind = "float16" if stored is in_half else "float32"
    storage = f"{kind}{unfinished}; float16 changes loss or mse by {100 * change:.2g} %"
    text = card(tag, folder, found, rows, storage, command(tag, setting))
    (DOCS / "weights" / f"{tag}.md").write_text(text, encoding="utf-8")
    return found


def _plain(figure: "Figure") -> dict[str, Any]:
    kept = asdict(figure) | {"value": float(f"{figure.value:.5g}"), "seeds": [0]}
    return {key: value for key, value in kept.items() if value != ""}


def _in_order(found: dict[str, Any]) -> dict[str, Any]:
    order = [*settings()]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _halved(model: "aezoo.Autoencoder", folder: Path) -> "aezoo.Autoencoder":
    """The model after its weights were stored in float16."""
    import aezoo

    _save(model, folder, half=True)
    return aezoo.load_model(folder).float()


def _save(model: "aezoo.Autoencoder", folder: Path, half: bool) -> None:
    """Write a model without scores; with half, numbers that float16 can represent are stored in float16."""
    import torch
    from safetensors.torch import load_file, save_file

    from aezoo.io.checkpoint import save_model

    save_model(model, folder)
    file = folder / "model.safetensors"
    if half:
        largest = torch.finfo(torch.float16).max
        tensors = load_file(file)
        for key, value in tensors.items():
            if value.is_floating_point() and ".scores." not in key and value.abs().amax() < largest:
                tensors[key] = value.half()
        save_file(tensors, file)


def card(tag: str, folder: Path, found: Sequence["Figure"], rows: Sequence[str], storage: str, made_by: str) -> str:
    """The model card of a tag."""
    from aezoo.io.hub import card_text

    values = {figure.metric: f"{figure.value:.5g}{f' ({figure.note})' if figure.note else ''}" for figure in found}
    size = sum(file.stat().st_size for file in folder.iterdir())
    lines = [
        "",
        f"Measured on the test split, one training (seed 0). {size / 1e6:.2f} MB, {storage}.",
        "",
        f"![{tag}]({tag}.png)",
        "",
        f"Rows: {', '.join(rows)}.",
        "",
        "Made by `python -m benchmarks.weights` with",
        "",
        "```",
        made_by,
        "```",
    ]
    return card_text(folder, tag, tag, LICENSE.lower(), values, sections=lines)


def table() -> str:
    """The tags as a Markdown table."""
    lines = ["| tag | data | figures (test split, seed 0) | size | licence |", "|---" * 5 + "|"]
    for name, tag in tags.read(ENTRIES, "aezoo").items():
        size = f"{tag.bytes / 1e6:.2f} MB"
        figures = ", ".join(map(str, tag.figures[:3]))
        lines.append(f"| [`{name}`](weights/{name}.md) | {tag.data['name']} | {figures} | {size} | {tag.license} |")
    return "\n".join(lines)


def write_table() -> None:
    """Renew the table of docs/pretrained.md."""
    page = DOCS / "pretrained.md"
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"(<!-- tags -->\n).*?(<!-- /tags -->)", rf"\1{table()}\n\2", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = common.base_parser("weights", __doc__)
    add = parser.add_argument
    add("tags", nargs="*", metavar="TAG", help="tags to make; without it all that are missing")
    add("--train-only", action="store_true", help="train, and measure later")
    add("--as-is", action="store_true", help="train nothing, measure the best weights so far")
    add("--table", action="store_true", help="make nothing, rewrite the table")
    add("--keep", type=Path, default=common.ROOT / "build" / "weights", metavar="DIR", help="folder of the runs")
    add("--again", action="store_true", help="measure finished tags again; remove a run to train it again")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.tags) - set(settings()):
        raise AezooError(f"{SETTINGS.name} has no tag {min(unknown)!r}: take {', '.join(settings())}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Make the requested tags, one at a time."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    known = settings()
    for tag in [] if arguments.table else arguments.tags or known:
        if UNFINISHED not in entries().get(tag, {}).get("recipe", UNFINISHED) and not arguments.again:
            continue
        run = arguments.keep / "runs" / tag / "0" if arguments.as_is else train(tag, known[tag], arguments.keep)
        if not arguments.train_only:
            found = make(tag, known[tag], run, arguments.keep)
            print(f"{tag}: {', '.join(map(str, found))}", flush=True)
    if ENTRIES.is_file():
        write_table()


if __name__ == "__main__":
    common.run_script(main)
