"""Saving and loading models with nothing that can run code: safetensors or torch's weights-only files.

A saved model is a folder with `model.safetensors` (weights) and `config.json` (registry name, hyperparameters). A
checkpoint is Lightning's, with the registry name stamped in. Loading looks that name up in the registry and checks the
hyperparameters against the constructor; no class path in a file is ever followed.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import aezoo
from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.registry import check_hyperparameters, model_class, name_of

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_model(model: Autoencoder, folder: str | Path) -> Path:
    """Write a model as `config.json` and `model.safetensors`.

    Args:
        model: a registered model.
        folder: made if it does not exist; the two files in it are replaced.

    Returns:
        The folder.

    Raises:
        AezooError: the model's class is not in the registry, so no other process could find it again.
    """
    name = name_of(type(model))
    if name is None:
        raise AezooError(
            f"{type(model).__name__} is not in the registry: give it an entry point in aezoo.models "
            "(README, 'Add a model') or save model.state_dict() yourself"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model": name, "aezoo_version": aezoo.__version__, "hyperparameters": dict(model.hparams)}
    # copies, since safetensors refuses tensors that share memory, as tied weights do
    weights = {
        key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def load_model(path: str | Path, map_location: str = "cpu") -> Autoencoder:
    """Load a model from a checkpoint file, a run folder or a saved model folder; it comes back in eval mode.

    Args:
        path: a `.ckpt` file; a run folder, of which the best checkpoint is taken; or a folder made by `save_model`.
        map_location: device of the weights.

    Raises:
        AezooError: nothing there, a damaged or foreign file, or a model that is not in the registry.
    """
    if (Path(path) / CONFIG).is_file():
        source = Path(path)
        config = read_config(source)
        try:
            weights = load_file(source / WEIGHTS, device=map_location)
        except (OSError, SafetensorError) as error:
            raise AezooError(f"cannot read {source / WEIGHTS}: {_brief(error)}; save the model again") from error
        name, hyperparameters = config["model"], config["hyperparameters"]
    else:
        source = find_checkpoint(path)
        checkpoint = read_checkpoint(source, map_location)
        name, hyperparameters = described(checkpoint, source)
        weights = checkpoint["state_dict"]
    model = build(name, hyperparameters, source)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:  # an AttributeError comes from a key that is no string
        raise AezooError(f"the weights in {source} do not fit {name}: {_brief(error)}") from error
    return model.to(map_location).eval()


def build(name: str, hyperparameters: dict[str, Any], source: Path) -> Autoencoder:
    """A fresh model as a file describes it.

    Raises:
        AezooError: a hyperparameter that its constructor does not have, or a value that it does not take.
    """
    cls = model_class(name)
    # LightningCLI adds keys with a leading underscore that name classes to import: they are never read here
    plain: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in hyperparameters.items()
        if not str(key).startswith("_")
    }
    try:
        check_hyperparameters(cls, plain.keys() - {"input_shape"}, name)
        return cls(**plain)
    except Exception as error:  # a constructor may fail in any way on values that no user would give it
        raise AezooError(f"{source} does not describe a {name} of this version: {_brief(error)}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The checked `config.json` of a saved model folder.

    Raises:
        AezooError: not JSON, or not of the form that `save_model` writes.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AezooError(f"cannot read {folder / CONFIG}: {_brief(error)}") from error
    if not (isinstance(config, dict) and isinstance(config.get("model"), str)):
        raise AezooError(f"{folder / CONFIG} names no model: it was not written by aezoo.save_model")
    if not isinstance(config.get("hyperparameters"), dict):
        raise AezooError(f"{folder / CONFIG} has no hyperparameters: it was not written by aezoo.save_model")
    return config


def read_checkpoint(path: Path, map_location: str = "cpu") -> dict[str, Any]:
    """The content of a checkpoint file, loaded with `weights_only=True`.

    Raises:
        AezooError: not a checkpoint, damaged, or holding more than tensors and plain values.
    """
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise AezooError(f"{path} is refused: it is damaged, or holds objects that could run code") from error
    except Exception as error:  # one changed byte can end in any exception of the unpickler
        raise AezooError(f"cannot read {path} as a checkpoint: {_brief(error)}") from error
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict)):
        raise AezooError(f"{path} is not a checkpoint of Lightning: it has no state_dict")
    return checkpoint


def described(checkpoint: dict[str, Any], source: Path) -> tuple[str, dict[str, Any]]:
    """Registry name and hyperparameters that a checkpoint was stamped with.

    Raises:
        AezooError: it carries no name, since its class was not registered when it was saved, or is damaged.
    """
    stamp = checkpoint.get("aezoo")
    name = stamp.get("model") if isinstance(stamp, dict) else None
    if not isinstance(name, str):
        raise AezooError(
            f"{source} names no registered model: load it with YourClass.load_from_checkpoint(...), "
            "or register the class (README, 'Add a model') and train again"
        )
    hyperparameters = checkpoint.get("hyper_parameters", {})
    if not isinstance(hyperparameters, dict):
        raise AezooError(f"{source} is damaged: its hyperparameters are a {type(hyperparameters).__name__}")
    return name, hyperparameters


def find_checkpoint(path: str | Path, prefer: str = "best") -> Path:
    """The checkpoint that a path stands for.

    Args:
        path: a checkpoint file, a run folder (`runs/vae/0`), its `checkpoints` folder, or a folder of runs
            (`runs/vae`), of which the newest is taken.
        prefer: `best` (lowest val/loss) or `last`; the other one is taken if there is none.

    Raises:
        AezooError: there is no checkpoint there.
    """
    text = str(path)
    if "://" in text:
        raise AezooError(f"checkpoints are loaded from disk only, not from {text}: download it first")
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise AezooError(f"no checkpoint at {path}: give a .ckpt file, a run folder or a saved model folder")
    homes = [path, path / "checkpoints"]
    homes += sorted(path.glob("*/checkpoints"), key=lambda home: home.stat().st_mtime, reverse=True)
    for home in homes:
        files = sorted(home.glob("*.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True)
        chosen = [file for file in files if file.stem.startswith(prefer)] or files
        if len(chosen) > 1 and prefer == "best":
            # several are kept, and the latest state knows which of them is best
            latest = next((file for file in files if file.stem == "last"), files[0])
            states = read_checkpoint(latest).get("callbacks", {}).values()
            paths = [state.get("best_model_path", "") for state in states if isinstance(state, dict)]
            names = {Path(str(best)).name for best in paths if best}
            chosen = [file for file in chosen if file.name in names] or chosen
        if chosen:
            return chosen[0]
    raise AezooError(f"no .ckpt file in {path} or its checkpoints folder: has the run saved one yet?")


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
