"""Models on the Hugging Face hub: `push_to_hub`, and `from_pretrained` as in huggingface_hub's mixin."""

import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

from aezoo import registry
from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError, install_hint
from aezoo.io import hub_files, tag_files
from aezoo.io.checkpoint import load_model, save_model
from aezoo.io.pretrained import Model, with_hyperparameters

if TYPE_CHECKING:
    from aezoo.tasks.results import Result

_PICTURES = "pictures"


def push_to_hub(
    model: Autoencoder,
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    license: str | None = None,
    metrics: Mapping[str, float] | None = None,
    results: "Sequence[Result]" = (),
    scaling: Mapping[str, Tensor] | Tensor | float | None = None,
    replace_card: bool = False,
    create_pr: bool | None = None,
) -> str:
    """Upload the files that `save_model` writes, and a model card, to a repository on the Hugging Face hub.

    `aezoo.load_model("hf://user/name")` loads the model. The files contain no pickle.

    Args:
        model: a registered model.
        name: `user/name`; the repository is created if it does not exist.
        private: whether a new repository is private; by default as in the owner's settings.
        revision: branch, created if it does not exist; by default the main branch.
        commit_message: commit message; by default with the model's name.
        token: token of the hub; by default that of huggingface_hub (`hf auth login`, `HF_TOKEN`).
        license: license of the weights for the card, such as `mit`; by default none.
        metrics: names and values of metrics for the card; by default none.
        results: results of commands, such as `[aezoo.reconstruct(model, x), aezoo.generate(model)]`, whose pictures and
            figures are shown in the card.
        scaling: see `save_model`.
        replace_card: write the card and its pictures even if the repository has a card; by default it is kept.
        create_pr: create a pull request instead of a commit.

    Returns:
        The URL of the commit or the pull request.

    Raises:
        AezooError: as in `save_model`; or the name is not `user/name`, the user is not logged in or has no write
            access, there is no network, or huggingface_hub is not installed.
    """
    hub_files.check_name(name)
    with tempfile.TemporaryDirectory() as folder:
        home = save_model(model, folder, scaling)
        write_card(home, name, revision=revision, license=license, metrics=metrics, results=results)
        model_name = json.loads((home / hub_files.FILES[0]).read_text())["model"]
        return hub_files.upload(
            home,
            name,
            revision=revision,
            private=private,
            message=commit_message or f"{model_name}, pushed with aezoo",
            token=token,
            card=replace_card,
            create_pr=create_pr,
        )


def from_pretrained(
    cls: type[Model],
    source: str | Path,
    *,
    revision: str | None = None,
    force_download: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **hyperparameters: Any,
) -> Model:
    """Load a model of a class, see `Autoencoder.from_pretrained`."""
    address = str(source)
    on_disk = "://" not in address and (Path(address).exists() or tag_files.tag_of(address) is not None)
    if not on_disk and hub_files.is_repository(address):
        address = f"{hub_files.SCHEME}{address}"
    if revision is not None:
        if not hub_files.is_address(address) or "@" in address:
            raise AezooError(f"revision {revision!r} needs a repository on the hub without a revision, got {source}")
        address = f"{address}@{revision}"
    with hub_files.downloading(
        force_download=force_download, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    ):
        model = load_model(address)
    if not isinstance(model, cls):
        raise AezooError(f"{source} is a {type(model).__name__}, not a {cls.__name__}: load_model loads both")
    return with_hyperparameters(model, hyperparameters, str(source))


def write_card(
    folder: Path,
    name: str,
    *,
    revision: str | None = None,
    license: str | None = None,
    metrics: Mapping[str, float] | None = None,
    results: "Sequence[Result]" = (),
) -> None:
    """Write the model card of a saved model, in Markdown with the YAML header for the hub, and its pictures.

    Args:
        folder: folder written by `save_model`.
        name: `user/name`, or a local folder.
        revision: branch for the upload.
        license: license of the weights.
        metrics: names and values of metrics.
        results: results of commands.

    Raises:
        AezooError: a result has no picture.
    """
    sections: list[str] = []
    for number, result in enumerate(results, 1):
        kind = type(result).__name__.lower()
        picture = folder / _PICTURES / f"{number}-{kind}.png"
        picture.parent.mkdir(exist_ok=True)
        result.figure.savefig(picture, metadata={"Software": None})
        sections += ["", f"![{kind}]({_PICTURES}/{picture.name})", "", "```text", result.summary(), "```"]
    is_repository = hub_files.is_repository(name)
    address = f"{hub_files.SCHEME}{name}" + (f"@{revision}" if revision else "") if is_repository else name
    values = {key: f"{value:.6g}" for key, value in (metrics or {}).items()}
    extras = ("hub",) if is_repository else ()
    text = card_text(folder, name.rpartition("/")[2], address, license, values, extras, sections)
    (folder / hub_files.CARD).write_text(text, encoding="utf-8")


def card_text(
    folder: Path,
    title: str,
    address: str,
    license: str | None,
    figures: Mapping[str, str],
    extras: Sequence[str] = (),
    sections: Sequence[str] = (),
) -> str:
    """Return a model card.

    Args:
        folder: folder written by `save_model`.
        title: title of the card.
        address: address for `load_model` and `--ckpt_path`.
        license: license of the weights.
        figures: names of metrics and their values.
        extras: extras of aezoo that are needed for loading.
        sections: lines before the code.
    """
    config = json.loads((folder / hub_files.FILES[0]).read_text())
    model, entry, about = config["model"], registry.find(config["model"]), registry.card(config["model"])
    head: dict[str, Any] = {"library_name": "aezoo", "tags": ["aezoo", "autoencoder", entry.family, model]}
    if license is not None:
        head["license"] = license
    in_a_cell = str.maketrans("|", "/", "\\")
    rows = [f"| {' '.join(key.translate(in_a_cell).split())} | {value} |" for key, value in figures.items()]
    table = ["", "| metric | value |", "|---|---|", *rows] if rows else []
    plugin = "" if entry.owner == "aezoo" else f"; pip install {entry.owner}"
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {title}",
        "",
        f"`{model}` of {entry.owner}, saved by aezoo {config['aezoo_version']}: {about.summary}".removesuffix(": "),
        *table,
        *sections,
        "",
        "```python",
        f"import aezoo  # {install_hint(*extras)}{plugin}",
        "",
        f"model = aezoo.load_model({address!r})  # in eval mode",
        "x_hat = model(x)  # x: (batch, " + ", ".join(map(str, config["hyperparameters"]["input_shape"])) + ")",
        "z = model.encode(x)",
        "```",
        "",
        "The same model with random weights:",
        "",
        "```python",
        _constructor_call(model, config["hyperparameters"]),
        "```",
        "",
        f"In a shell: `aezoo reconstruct --ckpt_path {address} --input FILE`, and likewise the other commands.",
    ]
    return "\n".join(lines) + "\n"


def _constructor_call(name: str, hyperparameters: Mapping[str, Any]) -> str:
    """Return the constructor call, without arguments that have their default values."""
    known = inspect.signature(registry.model_class(name)).parameters
    given = []
    for key, value in hyperparameters.items():
        plain = tuple(value) if isinstance(value, list) else value
        if key in known and known[key].default != plain:
            given.append(f"{key}={plain!r}")
    return f"aezoo.create_model({', '.join([repr(name), *given])})"
