"""Models on the Hugging Face hub: `push_to_hub` here, and `load_model("hf://user/name")`."""

import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from aezoo import registry
from aezoo.autoencoder import Autoencoder
from aezoo.io import hub_files
from aezoo.io.checkpoint import save_model


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
    scaling: Mapping[str, Tensor] | Tensor | float | None = None,
    replace_card: bool = False,
) -> str:
    """Upload the files that `save_model` writes, and a model card, to a repository on the Hugging Face hub.

    `aezoo.load_model("hf://user/name")` loads the model again. The files contain no pickle.

    Args:
        model: a registered model.
        name: `user/name`; the repository is created if it does not exist.
        private: whether only the owner sees a new repository; by default the owner's settings decide.
        revision: the branch, created if it does not exist; by default the main branch.
        commit_message: by default the model's name.
        token: token of the hub; by default the one that huggingface_hub finds (`hf auth login`, `HF_TOKEN`).
        license: license of the weights, such as `mit`, for the card; by default the card does not mention one.
        metrics: names and values for the card; by default it has none.
        scaling: as for `save_model`.
        replace_card: write the card even if the repository already has one; by default an existing card stays.

    Returns:
        The address of the commit's page.

    Raises:
        AezooError: as in `save_model`; or the name is not `user/name`, the user is not logged in or may not write
            there, there is no network, or huggingface_hub is not installed.
    """
    hub_files.check_name(name)
    with tempfile.TemporaryDirectory() as folder:
        home = save_model(model, folder, scaling)
        (home / hub_files.CARD).write_text(model_card(home, name, revision, license, metrics or {}), encoding="utf-8")
        model_name = json.loads((home / hub_files.FILES[0]).read_text())["model"]
        message = commit_message or f"{model_name}, pushed with aezoo"
        return hub_files.upload(home, name, revision, private, message, token, replace_card)


def model_card(folder: Path, name: str, revision: str | None, license: str | None, metrics: Mapping[str, float]) -> str:
    """The model card of a saved model on the hub, in Markdown with the YAML head that the hub reads.

    Args:
        folder: folder written by `save_model`.
        name: `user/name`.
        revision: the branch for the upload.
        license: license of the weights.
        metrics: names and values.
    """
    address = f"{hub_files.SCHEME}{name}" + (f"@{revision}" if revision else "")
    values = {key: f"{value:.6g}" for key, value in metrics.items()}
    return card_text(folder, name.partition("/")[2], address, license, values, "aezoo[hub]")


def card_text(
    folder: Path,
    title: str,
    address: str,
    license: str | None,
    figures: Mapping[str, str],
    requirement: str,
    sections: Sequence[str] = (),
) -> str:
    """A model card.

    Args:
        folder: folder written by `save_model`.
        title: its title.
        address: what `load_model` and `--ckpt_path` take.
        license: license of the weights.
        figures: names of metrics and their values.
        requirement: what pip installs.
        sections: lines in front of the code.
    """
    config = json.loads((folder / hub_files.FILES[0]).read_text())
    model, entry, about = config["model"], registry.find(config["model"]), registry.card(config["model"])
    head: dict[str, Any] = {"library_name": "aezoo", "tags": ["aezoo", "autoencoder", entry.family, model]}
    if license is not None:
        head["license"] = license
    in_a_cell = str.maketrans("|", "/", "\\")
    rows = [f"| {' '.join(key.translate(in_a_cell).split())} | {value} |" for key, value in figures.items()]
    table = ["", "| metric | value |", "|---|---|", *rows] if rows else []
    quoted = f"'{requirement}'" if "[" in requirement else requirement
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
        f"import aezoo  # pip install {quoted} {entry.owner}".removesuffix(" aezoo"),
        "",
        f"model = aezoo.load_model({address!r})  # in eval mode",
        "x_hat = model(x)  # x: (batch, " + ", ".join(map(str, config["hyperparameters"]["input_shape"])) + ")",
        "z = model.encode(x)",
        "```",
        "",
        "An untrained one of the same kind:",
        "",
        "```python",
        _constructor_call(model, config["hyperparameters"]),
        "```",
        "",
        f"In a shell, `aezoo reconstruct --ckpt_path {address} --input FILE`, and likewise the other verbs.",
    ]
    return "\n".join(lines) + "\n"


def _constructor_call(name: str, hyperparameters: Mapping[str, Any]) -> str:
    """The constructor call, without arguments that have their default values."""
    known = inspect.signature(registry.model_class(name)).parameters
    given = []
    for key, value in hyperparameters.items():
        plain = tuple(value) if isinstance(value, list) else value
        if key in known and known[key].default != plain:
            given.append(f"{key}={plain!r}")
    return f"aezoo.create_model({', '.join([repr(name), *given])})"
