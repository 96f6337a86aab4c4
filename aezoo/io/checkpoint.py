"""Saving and loading models in formats that cannot run code: safetensors or torch's weights-only files.

A saved model is a folder with `model.safetensors` (weights) and `config.json` (registry name, hyperparameters, units of
the training data). Pretrained weights are such folders, identified by tags. A checkpoint is Lightning's, with the
registry name added. Loading looks up this name in the registry, accepts only plain hyperparameters of the constructor,
and compares the size of the model with that of the file before it allocates memory. Class paths in files are never
followed.
"""

import contextlib
import json
import math
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

import aezoo
from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.io import atomic_files, calibration, hub_files, importers, run_folder, tag_files, terminal
from aezoo.io.scale_folding import fold
from aezoo.nets import without_weights
from aezoo.registry import check_hyperparameters, model_class, name_of, suggest_tags
from aezoo.security import archives, json_files, values, weights
from aezoo.training.data_statistics import DataStatistics
from aezoo.training.data_units import TABLES, DataUnits

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# enough for 300,000 columns of a table
_MAX_CONFIG = 2**24
# supported dtypes of weights other than float32
_DTYPES = {torch.float64, torch.float16, torch.bfloat16}
# keys that LightningCLI adds to hyperparameters; it would import both values
_CLASS, _MAKER = "_class_path", "_instantiator"
_LIGHTNING_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


def save_model(
    model: Autoencoder, folder: str | Path, scaling: Mapping[str, Tensor] | Tensor | float | None = None
) -> Path:
    """Write a model as `config.json` and `model.safetensors`.

    `config.json` also contains `model.data_units`: the scaling of the training data and, for a table, column names.
    `model.safetensors` also contains `model.data_statistics`, such as the calibration of a run after `detect`.

    Args:
        model: a registered model.
        folder: created if it does not exist; each of its two files is replaced atomically.
        scaling: scaling of the activations that the model was trained on, as returned by `load_run`; the saved model
            then accepts raw activations, see `aezoo.io.scale_folding.fold`.

    Returns:
        The folder.

    Raises:
        AezooError: the model's class is not in the registry, so that other processes could not find it; a
            hyperparameter is not a plain value; the scaling cannot be folded into the weights; the data have too many
            columns; or the files cannot be written.
    """
    name = name_of(type(model))
    if name is None:
        raise AezooError(
            f"{type(model).__name__} is not in the registry: give it an entry point in aezoo.models "
            "(docs/extend.md) or save model.state_dict() yourself"
        )
    if "://" in str(folder):
        raise AezooError(f"models are only saved to local folders, not to {folder}: use aezoo.push_to_hub for the hub")
    # with folded weights, input and output are unscaled samples
    units = model.data_units if scaling is None else None
    if scaling is not None:
        model = fold(model, scaling)
    folder = Path(folder)
    hyperparameters = values.check_plain(dict(model.hparams), f"{name} cannot be saved: its hyperparameters")
    config = {"model": name, "aezoo_version": aezoo.__version__, "hyperparameters": hyperparameters}
    config |= {} if units is None else {"data": units.to_plain()}
    text = json.dumps(config, indent=2) + "\n"
    if len(text) > _MAX_CONFIG:
        raise AezooError(f"{name} cannot be saved: too many columns for {CONFIG}; set model.data_units to None before")
    # copies, because safetensors rejects tensors that share memory, such as tied weights
    state = {
        key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()
    }
    state |= {} if model.data_statistics is None else model.data_statistics.to_tensors()
    cure = "free disk space, or choose a writable folder"
    atomic_files.write(folder / WEIGHTS, lambda file: file.write(save(state)), cure=cure)
    atomic_files.write(folder / CONFIG, lambda file: file.write(text.encode()), cure=cure)
    return folder


def load_model(path: str | Path, map_location: str | torch.device = "cpu", max_bytes: int | None = None) -> Autoencoder:
    """Load a model in eval mode from a checkpoint file, a run folder, a saved model folder, a tag or the hub.

    Files of other libraries are supported too, see `aezoo.import_model`.

    Pretrained weights are returned in float32, regardless of how they are stored. Other weights in float64, float16 or
    bfloat16 keep their dtype; `.float()` converts them to float32.

    Args:
        path: a `.ckpt` file; a run folder, whose best checkpoint is loaded; a folder made by `save_model`;
            `hf://user/name` or `hf://user/name@revision`, uploaded to the Hugging Face hub by `push_to_hub`; files that
            `aezoo.import_model` accepts; or, if there is no such path, the tag of pretrained weights, such as
            `vae.mnist`.
        map_location: device to which the model is moved.
        max_bytes: maximum size of an unpacked checkpoint; by default `AEZOO_MAX_BYTES` in the environment, otherwise
            the size of the file plus 16 MiB, because torch writes checkpoints without compression.

    Raises:
        AezooError: the path does not exist, the file is damaged or not a model, or the model is not in the registry;
            for a model on the hub, also as in `aezoo.io.hub_files.fetch`; for a tag, also as in
            `aezoo.io.tag_files.locate`.
    """
    return load_run(path, map_location, max_bytes)[0]


def load_run(
    path: str | Path, map_location: str | torch.device = "cpu", max_bytes: int | None = None
) -> tuple[Autoencoder, dict[str, Any]]:
    """Load a model like `load_model`, and the information about its training data in the checkpoint.

    Returns:
        The model, and a dict. `settings` are the settings of the DataModule, empty for a saved model folder and for
        data of other packages. `scaling`, `white` and `columns` are those of `model.data_units`, empty if that is None.
        `folder` is that of the run or the saved model; for a model from the hub, whose files are in a cache, it is
        `runs/user_name`, for a tag `runs/NAME.TAG`. `home` is the folder of the weights, or None for the hub or a tag.
        `data` are the settings of the data that a tag was trained on.
    """
    if (tag := tag_files.tag_of(path)) is not None:
        model, trained = load_run(tag_files.locate(tag), map_location)
        known_of_tag = {"settings": {}, "folder": Path("runs") / tag.name, "home": None, "data": dict(tag.data)}
        return model.float(), trained | known_of_tag
    stored = _read_stored(path, max_bytes)
    if isinstance(stored, importers.Imported):
        return _of_another_library(stored, path, map_location)
    name, source = stored.name, stored.source
    state = weights.check_tensors(stored.tensors, source, name)
    statistics = {key: state.pop(key) for key in [*state] if key.startswith(DataStatistics.PREFIX)}
    model = build(name, stored.hyperparameters, source, state)
    kinds = {state[key].dtype for key, _ in model.named_parameters() if key in state} - {torch.float32}
    if len(kinds) == 1 and kinds <= _DTYPES:
        model = model.to(*kinds)  # some values in the model are always float32
    if any(own.dtype != state[key].dtype for key, own in model.named_parameters() if key in state):
        model = model.float()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise AezooError(f"the weights in {source} do not fit {name}: {_one_line(error)}") from error
    model = _to_device(model, map_location)
    code_size = math.prod(model.code_shape)
    if statistics:
        model.data_statistics = DataStatistics.from_tensors(statistics, code_size, str(source / WEIGHTS))
    home = None if hub_files.is_address(path) else stored.folder
    if home is not None and (kept := calibration.read(home, model, code_size)) is not None:
        model.data_statistics = (model.data_statistics or DataStatistics()).updated(kept)
    units = stored.units
    if stored.plain_units is not None:
        units = DataUnits.from_plain(stored.plain_units, model.input_shape, str(source / CONFIG))
    model.data_units, known = units, units or DataUnits()
    state_of_data = {"scaling": known.scaling, "white": known.white, "columns": known.columns}
    return model, {"settings": stored.settings, **state_of_data, "folder": stored.folder, "home": home}


@dataclass(frozen=True)
class _Stored:
    """The contents of the files of a model, before the model is built.

    Attributes:
        name: name in the registry.
        hyperparameters: hyperparameters as stored in the file.
        tensors: tensors as stored in the file.
        source: the checkpoint, or the folder of a saved model.
        folder: folder of the run or the saved model.
        settings: settings of the DataModule.
        units: units of the training data in a checkpoint.
        plain_units: units in `config.json`, which cannot be checked without the model.
    """

    name: str
    hyperparameters: dict[str, Any]
    tensors: Any
    source: Path
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    units: DataUnits | None = None
    plain_units: Any = None


def _read_stored(path: str | Path, max_bytes: int | None) -> _Stored | importers.Imported:
    """Read a saved model, a checkpoint, or the files of another library."""
    given, damage = path, None
    if hub_files.is_address(path):
        try:
            path = hub_files.fetch(str(path))
        except hub_files.NotAnAezooModelError:
            if (imported := importers.import_if_known(given)) is None:
                raise
            return imported
    if "://" not in str(path) and (Path(path) / CONFIG).is_file():
        try:
            config = read_config(Path(path))
        except AezooError as error:  # damaged, or of another library
            damage = error
        else:
            return _read_saved_model(Path(path), config, given)
    if damage is not None or _holds_no_checkpoint(Path(path)):
        imported = importers.import_if_known(given, lenient=damage is not None)
        if imported is not None:
            return imported
    if damage is not None:
        raise damage
    return _read_run(path, max_bytes)


def _read_saved_model(source: Path, config: dict[str, Any], given: str | Path) -> _Stored:
    try:
        if not (source / WEIGHTS).is_file():  # safetensors would block on a pipe
            raise FileNotFoundError("there is no such file")
        tensors = load_file(source / WEIGHTS)
    except Exception as error:  # an invalid header can cause any exception
        raise AezooError(f"cannot read {source / WEIGHTS}: {_one_line(error)}; save the model again") from error
    note_version({"version": config.get("aezoo_version")}, source)
    on_hub = hub_files.is_address(given)
    folder = Path("runs") / archives.safe_name(hub_files.split(str(given))[0]) if on_hub else source
    model = config["model"], config["hyperparameters"]
    return _Stored(*model, tensors, source, folder, plain_units=config.get("data"))


def _read_run(path: str | Path, max_bytes: int | None) -> _Stored | importers.Imported:
    if "://" not in str(path) and not Path(path).exists():
        cure = suggest_tags(str(path)) or "give a .ckpt file, a run folder, a saved model folder or a tag"
        raise AezooError(f"no checkpoint at {path}: {cure}")
    source = resolve_checkpoint(path)
    atomic_files.check_intact(source)
    try:
        checkpoint = read_checkpoint(source, max_bytes=max_bytes)
    except AezooError:  # e.g. weights without a description, or classes of an old Lightning version
        if (imported := importers.import_if_known(source, lenient=True)) is None:
            raise
        return imported
    note_version(checkpoint.get("aezoo"), source)
    if "aezoo" not in checkpoint and (imported := importers.import_if_known(source)) is not None:
        return imported
    name, hyperparameters = describe_content(checkpoint, source)
    folder = run_folder.run_of(source, Path(path)) or source.parent
    settings = _data_settings(checkpoint, source)
    units = _data_units(checkpoint, settings) if settings else None
    return _Stored(name, hyperparameters, checkpoint["state_dict"], source, folder, settings, units)


def _to_device(model: Autoencoder, map_location: str | torch.device) -> Autoencoder:
    try:
        return model.to(map_location).eval()
    except (RuntimeError, AssertionError, TypeError) as error:  # raised by torch for missing devices
        raise AezooError(
            f"map_location {map_location}: {_one_line(error)}; give cpu and move the model later"
        ) from error


def _holds_no_checkpoint(path: Path) -> bool:
    """Return whether there are files, none of which has the name of a checkpoint."""
    if not path.is_dir():
        return path.is_file() and path.suffix != ".ckpt"
    return not any(any(home.glob("*.ckpt")) for home in run_folder.checkpoint_folders(path))


def _of_another_library(
    imported: importers.Imported, address: str | Path, map_location: str | torch.device
) -> tuple[Autoencoder, dict[str, Any]]:
    """Return the result of `load_run` for a model imported from files of another library."""
    print(f"aezoo: {address} is {imported.found}", file=sys.stderr)
    unknown: dict[str, Any] = {"settings": {}, "scaling": {}, "white": None, "columns": ()}
    folder = Path("runs") / archives.safe_name(str(address).removeprefix(hub_files.SCHEME).strip("/"))
    return _to_device(imported.model, map_location), {**unknown, "folder": folder, "home": None}


def _data_settings(checkpoint: dict[str, Any], source: Path) -> dict[str, Any]:
    what = f"{source}: its data settings"
    return values.check_plain(checkpoint.get("datamodule_hyper_parameters", {}), what)


def _data_units(checkpoint: dict[str, Any], settings: dict[str, Any]) -> DataUnits:
    state = checkpoint.get("DataModule")
    state = state if isinstance(state, dict) else {}
    scaling, white = state.get("scaling"), state.get("white")
    if not (isinstance(scaling, dict) and all(isinstance(scaling.get(key), Tensor) for key in ("offset", "factor"))):
        scaling = {}
    white = white if isinstance(white, int) and white in (1, 255) else None
    columns = state.get("columns")
    columns = tuple(columns) if isinstance(columns, list) and all(isinstance(name, str) for name in columns) else ()
    paths = [Path(str(settings.get(key, ""))) for key in ("name", "root")]
    is_table = bool(columns) or any(path.suffix.lower() in TABLES for path in paths)
    levels = 1 if settings.get("scale") == "none" else 255
    return DataUnits(scaling, white, columns, is_table, levels)


def verify(checkpoint: dict[str, Any], source: Path) -> tuple[str, dict[str, Any]]:
    """Return registry name and hyperparameters of a checkpoint, after checking the size of its weights.

    Raises:
        AezooError: as in `load_model`, before memory for the model is allocated.
    """
    name, hyperparameters = describe_content(checkpoint, source)
    build(name, hyperparameters, source, weights.check_tensors(checkpoint["state_dict"], source, name), dry=True)
    return name, hyperparameters


def build(
    name: str, hyperparameters: dict[str, Any], source: Path, state: dict[str, Tensor], dry: bool = False
) -> Autoencoder:
    """Build a new model from the description in a file.

    Args:
        name: name in the registry.
        hyperparameters: hyperparameters from the file.
        source: the file.
        state: the weights in the file, which limit the model's size.
        dry: only check whether the model can be built, if possible without memory for its parameters.

    Raises:
        AezooError: the constructor does not have a hyperparameter, or rejects a value.
    """
    cls = model_class(name)
    given = values.check_plain(
        hyperparameters, f"{source} does not describe a {name} of this version: its hyperparameters"
    )
    own = [name, cls.__qualname__, f"{cls.__module__}.{cls.__qualname__}", f"aezoo.{cls.__qualname__}"]
    if given.pop(_CLASS, name) not in own or given.pop(_MAKER, _LIGHTNING_INSTANTIATOR) != _LIGHTNING_INSTANTIATOR:
        raise AezooError(f"{source} is refused: it specifies other code to run instead of {name}")
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    if isinstance(plain.get("net"), str):  # without reading or downloading other files
        plain["net"] = without_weights(plain["net"])
    try:
        check_hyperparameters(cls, plain.keys() - {"input_shape"}, name)
        # a plugin may use values of tensors, which do not exist on the meta device
        with contextlib.suppress(RuntimeError, NotImplementedError), weights.limit_parameters(state):
            with torch.device("meta"):
                model = cls(**plain)
            if dry:
                return model
        with weights.limit_parameters(state):
            return cls(**plain)
    except Exception as error:  # invalid values can cause any exception in a constructor
        raise AezooError(f"{source} does not describe a {name} of this version: {_one_line(error)}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return the checked `config.json` of a saved model folder.

    Raises:
        AezooError: the file is not JSON, or not in the format of `save_model`.
    """
    config = json_files.read(folder / CONFIG, _MAX_CONFIG, str(folder / CONFIG))
    if not (isinstance(config, dict) and isinstance(config.get("model"), str)):
        raise AezooError(f"{folder / CONFIG} has no model name: it was not written by aezoo.save_model")
    if not isinstance(config.get("hyperparameters"), dict):
        raise AezooError(f"{folder / CONFIG} has no hyperparameters: it was not written by aezoo.save_model")
    return config


# fields that Lightning reads without checks
_FIELDS: dict[str, type] = {
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "DataModule": dict,
}
_DATA_FIELDS: dict[str, type] = {
    "epoch": int,
    "batches": int,
    "world": int,
    "batch_size": int,
    "seed": int,
    "columns": list,
    "scaling": dict,
    "identity": str,
}
_COUNTS = ("ready", "started", "processed", "completed")


def read_checkpoint(path: Path, map_location: str = "cpu", max_bytes: int | None = None) -> dict[str, Any]:
    """Return the content of a checkpoint file, loaded with `weights_only=True`.

    Args:
        path: the file.
        map_location: device of its tensors.
        max_bytes: see `load_model`.

    Raises:
        AezooError: the file is not a checkpoint, is damaged, or contains more than tensors and plain values.
    """
    if path.suffix == ".safetensors":  # not supported by torch
        cure = f"; give the folder of the saved model, {path.parent}" if (path.parent / CONFIG).is_file() else ""
        raise AezooError(f"{path} is not a Lightning checkpoint: it has no state_dict{cure}")
    try:
        archives.check_growth(path, max_bytes)
        archives.check_tuples(path)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except AezooError:
        raise
    except pickle.UnpicklingError as error:
        raise AezooError(f"{path} is refused: it is damaged, or contains objects that could run code") from error
    except Exception as error:  # a changed byte can cause any exception in the unpickler
        raise AezooError(f"cannot read {path} as a checkpoint: {_one_line(error)}") from error
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict)):
        weights_alone = isinstance(checkpoint, dict) and checkpoint and all(map(torch.is_tensor, checkpoint.values()))
        words = ", only weights: create the model with aezoo.create_model and load them with its load_state_dict"
        raise AezooError(f"{path} is not a Lightning checkpoint: it has no state_dict{words if weights_alone else ''}")
    values.check_extent(checkpoint, str(path))
    _check_types(checkpoint, _FIELDS, str(path))
    data = checkpoint.get("DataModule", {})
    _check_types(data, _DATA_FIELDS, f"{path}, DataModule")
    _check_types(data.get("scaling", {}), dict.fromkeys(data.get("scaling", {}), Tensor), f"{path}, scaling")
    if not all(isinstance(name, str) for name in data.get("columns", ())):
        raise AezooError(f"{path} is damaged: its column names are not strings")
    _check_progress(checkpoint.get("loops", {}), path)
    return checkpoint


def _check_types(found: dict[str, Any], kinds: dict[str, type], what: str) -> None:
    for key, kind in kinds.items():
        if key in found and not isinstance(found[key], kind):
            raise AezooError(f"{what} is damaged: its {str(key)[:50]} is a {type(found[key]).__name__}")


def _check_progress(loop: Any, path: Path) -> None:
    """Reject counts of epochs and batches that are not numbers."""
    for key, value in loop.items() if isinstance(loop, dict) else ():
        if key in _COUNTS and not isinstance(value, int):
            raise AezooError(f"{path} is damaged: a loop's count {key} is a {type(value).__name__}")
        _check_progress(value, path)


def note_version(stamp: Any, source: Path) -> None:
    """Report if a file was written by another version of this package, which may explain incompatibilities.

    Args:
        stamp: the file's description of its origin, a dict with `version`.
        source: the file.
    """
    version = stamp.get("version") if isinstance(stamp, dict) else None
    if isinstance(version, str) and version != aezoo.__version__:
        text = terminal.printable(" ".join(version.split()))[:40]
        print(f"aezoo: {source} was written by aezoo {text}, this is {aezoo.__version__}", file=sys.stderr)


def describe_content(checkpoint: dict[str, Any], source: Path) -> tuple[str, dict[str, Any]]:
    """Return the registry name and hyperparameters saved in a checkpoint.

    Raises:
        AezooError: there is no name, because the class was not registered when it was saved, or the file is damaged.
    """
    stamp = checkpoint.get("aezoo")
    name = stamp.get("model") if isinstance(stamp, dict) else None
    if not isinstance(name, str):
        raise AezooError(
            f"{source} has no registered model: load it with YourClass.load_from_checkpoint(...), pass "
            "-c RUN/config.yaml --model your_module.YourClass to test and predict, or register the class "
            "(docs/extend.md) and train again"
        )
    hyperparameters = checkpoint.get("hyper_parameters", {})
    if not isinstance(hyperparameters, dict):
        raise AezooError(f"{source} is damaged: its hyperparameters are a {type(hyperparameters).__name__}")
    return name, hyperparameters


def resolve_checkpoint(path: str | Path, prefer: str = "best") -> Path:
    """Return the checkpoint that a path refers to.

    Args:
        path: a checkpoint file, a run folder (`runs/vae/0`), the folder of its checkpoints, or a folder of runs
            (`runs/vae`), of which the newest is used.
        prefer: `best` (lowest val/loss) or `last`; the other one is used if it does not exist.

    Raises:
        AezooError: there is no checkpoint.
    """
    text = str(path)
    if hub_files.is_address(text):
        raise AezooError(
            f"{text} is a saved model, not a checkpoint: use it with commands such as `aezoo reconstruct` or with "
            "aezoo.load_model"
        )
    tag_files.refuse_tag(text)
    if "://" in text:
        raise AezooError(f"checkpoints can only be loaded from disk, not from {text}: download it first")
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise AezooError(f"no checkpoint at {path}: {suggest_tags(text) or 'give a .ckpt file or a run folder'}")
    for home in run_folder.checkpoint_folders(path):
        # a link may be broken
        files = [file for file in home.glob("*.ckpt") if file.is_file()]
        files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
        chosen = [file for file in files if file.stem.startswith(prefer)] or files
        if len(chosen) > 1 and prefer == "best":
            # if there are several, the latest checkpoint records which one is best
            latest = next((file for file in files if file.stem == "last"), files[0])
            callbacks = read_checkpoint(latest).get("callbacks")
            states = callbacks.values() if isinstance(callbacks, dict) else ()
            paths = [state.get("best_model_path", "") for state in states if isinstance(state, dict)]
            names = {Path(str(best)).name for best in paths if best}
            chosen = [file for file in chosen if file.name in names] or chosen
        if chosen:
            return chosen[0]
    if (path / CONFIG).is_file():
        raise AezooError(
            f"{path} is a saved model, not a checkpoint: give a .ckpt file or a run folder here, or use it with "
            "commands such as `aezoo reconstruct` or with aezoo.load_model"
        )
    raise AezooError(f"no .ckpt file in {path} or its checkpoints folder: has the run saved one yet?")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
