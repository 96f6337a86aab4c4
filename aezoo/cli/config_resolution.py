"""The request of a command line: names, recipes and checkpoints expanded into settings.

Settings come from these sources, and later ones override earlier ones: defaults, the checkpoint, the files given by -c
in their order, flags.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aezoo import registry
from aezoo.autoencoder import Autoencoder
from aezoo.cli import LIGHTNING_COMMANDS, loggers
from aezoo.cli.recipes import find_recipe
from aezoo.data import DataModule
from aezoo.data.datamodule import stored_settings
from aezoo.data.identity import data_identity, data_set_name, other_data_message
from aezoo.data.settings import settings_of_source
from aezoo.deprecated import renamed
from aezoo.errors import AezooError
from aezoo.io import atomic_files, checkpoint, resume, run_folder
from aezoo.security import archives, policy, values, yaml_text

RUN_DIR = "AEZOO_RUN_DIR"
# the checkpoint found by --resume auto, for the processes that a multi-device strategy starts
RESUMED = "AEZOO_RESUMED"


# the setting that a single word in place of a section sets
_SHORTHAND_KEY = {"model": "class_path", "data": "name"}
# both add loggers to those of --logger
_LOGGER = ("--trainer.logger", "--trainer.logger+")
# data settings that refer to the content of one data set, and select its training samples
_DATA_SET_KEYS = ("train_classes", "num_labels")


@dataclass(frozen=True)
class Request:
    """The expanded request of a command line.

    Attributes:
        argv: the command and its flags, in the form that LightningCLI understands.
        run_name: the name of the first recipe or file given by -c, or of the checkpoint's runs.
        source: the checkpoint given by --ckpt_path or --resume.
        run: the folder of the run that it belongs to.
        stored: the hyperparameters in that checkpoint.
        model: the requested model.
        stored_data: the data settings in that checkpoint.
        step: the optimiser steps in that checkpoint.
        resumes: whether --resume is given.
    """

    argv: list[str]
    run_name: str | None
    source: Path | None
    run: Path | None
    stored: dict[str, Any]
    model: str | None
    stored_data: dict[str, Any]
    step: int
    resumes: bool


def expand(argv: list[str]) -> Request:
    """Expand names for LightningCLI: models to classes, recipes to files, runs to checkpoints and settings."""
    command = argv[0]
    rest, allowed = policy.take_flags(name_data(policy.allow_remote(argv[1:])))
    _import_models()  # only imported classes can be named in YAML
    registry.import_plugins()
    flags: list[str] = []
    run_name: str | None = None
    source: Path | None = None
    run: Path | None = None
    model: str | None = None
    model_flag: str | None = None
    resume_from = "off"
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag not in ("-c", "--config", "--model", "--ckpt_path", "--resume", "--model.help", *_LOGGER):
            flags.append(flag + equals + value)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                if flag == "--model.help":
                    flags.append(flag)
                    continue
                raise AezooError(f"{flag} needs a value")
            value = rest.pop(0)
        if flag in _LOGGER:
            flags += [flag, _logger_setting(value)]
        elif flag in ("-c", "--config"):
            path, config = _config_file(value)
            run_name = run_name or path.stem
            flags += ["--config", str(path)]
            model = _model_name(config) or model
        elif flag == "--ckpt_path":
            source = resume.newest_resumable(value) if command == "fit" else checkpoint.resolve_checkpoint(value)
            atomic_files.check_intact(source)
            run = run_folder.run_of(source, Path(value))
            flags += ["--ckpt_path", str(source)]
        elif flag == "--resume":
            if command != "fit":
                raise AezooError(f"--resume is for fit: give {command} a --ckpt_path")
            resume_from = value
        else:
            model_flag = value if flag == "--model" else model_flag
            if policy.is_class_path(value) and value not in registry.entries():
                # allowed because the user has typed it; files may not allow classes
                allowed += [value, policy.typed_class(value, Autoencoder)]
            flags += [flag, _class_path(value)]
    policy.enforce(allowed)
    stored: dict[str, Any] = {}
    stored_data: dict[str, Any] = {}
    step = 0
    if resume_from != "off":
        if source is not None:
            raise AezooError("give --resume or --ckpt_path, not both")
        source, run = _find_resumed(resume_from, run_name, flags)
        flags += [] if source is None else ["--ckpt_path", str(source)]
    if source is not None:
        content = checkpoint.read_checkpoint(source)
        checkpoint.note_version(content.get("aezoo"), source)
        stored = values.check_plain(content.get("hyper_parameters", {}), f"{source}: its hyperparameters")
        if command == "fit" and not {"optimizer_states", "lr_schedulers"} <= content.keys():
            raise AezooError(f"{source} contains only weights, and no training state to continue from: give another "
                             "checkpoint of its run, or fine-tune from Python with aezoo.load_model")  # fmt: skip
        if command == "fit" and run is not None and "--config" not in flags:
            _check_config_exists(content, run)
        settings = _settings(command, content, source, run, optional=model_flag is not None)
        settings["data"] = drop_foreign_settings(settings["data"], flags)
        if command != "fit":
            settings["data"] = for_data_set(settings["data"], flags)
        _drop_repeated(settings, flags)
        flags = ["--config", json.dumps(settings), *flags]
        # --resume auto only finds runs on these data, so the files are not read again
        if command == "fit" and resume_from != "auto" and not _is_of(content, flags):
            raise AezooError(other_data_message(run or source))
        model = model or _model_name(settings)
        data = content.get("datamodule_hyper_parameters", {})
        stored_data = _plain_values(values.check_plain(data, f"{source}: its data settings"))
        step = int(content.get("global_step", 0)) if isinstance(content.get("global_step"), int) else 0
    model = model_flag or model
    return Request([command, *flags], run_name, source, run, stored, model, stored_data, step, resume_from != "off")


def name_data(argv: list[str]) -> list[str]:
    """Change `--data digits` to `--data.name digits`; a YAML file of settings, or settings in YAML, stay unchanged."""
    is_given = []
    for word, (flag, value) in zip(argv, _flag_values(argv), strict=True):
        text = value.strip().lower()
        settings = text.startswith(("{", "--")) or text.endswith((".yaml", ".yml", ".json"))
        is_given.append(word.replace(flag, "--data.name", 1) if flag == "--data" and text and not settings else word)
    return is_given


def setting(flags: list[str], section: str, key: str) -> str | None:
    """A setting as the parser will read it: the last value among the flags and files; None if there is none.

    Args:
        flags: all flags, with recipes expanded.
        section: `model`, `data` or `trainer`; its settings may also be a YAML file or inline YAML.
        key: the name of the setting in the section; a model's hyperparameters also stand below `init_args`.
    """
    found: Any = None
    for flag, value in _flag_values(flags):
        if flag in (f"--{section}.{key}", f"--{section}.init_args.{key}"):
            found = value
        elif flag == f"--{section}":
            found = _in_section(_section_settings(section, value), key, found)
        elif flag == "--config":
            content = _load_mapping(value)
            part = content.get(section) or (content.get("fit") or {}).get(section)
            if isinstance(part, str):
                # the path of a file is relative to the file that names it
                beside = Path(value).parent / part
                part = _section_settings(section, str(beside) if beside.is_file() else part)
            found = _in_section(part if isinstance(part, dict) else {}, key, found)
    return None if found is None else str(found)


def _in_section(settings: dict[str, Any], key: str, default: Any) -> Any:
    own = settings.get("init_args")
    return settings.get(key, (own if isinstance(own, dict) else {}).get(key, default))


def for_data_set(stored: dict[str, Any], flags: list[str]) -> dict[str, Any]:
    """Stored data settings for the data set named by the flags; another set uses all of its samples and labels."""
    # arrays and folders are identified by their location
    identity = ("name",) if stored.get("name") not in ("array", "folder") else ("name", "root")
    other = any(setting(flags, "data", key) not in (None, str(stored.get(key))) for key in identity)
    return {key: value for key, value in stored.items() if not (other and key in _DATA_SET_KEYS)}


def drop_foreign_settings(stored: dict[str, Any], flags: list[str]) -> dict[str, Any]:
    """Stored data settings without those that the source (of the flags, or else the stored one) does not have."""
    chosen = {key: value for key in ("name", "of") if (value := setting(flags, "data", key)) is not None}
    taken = settings_of_source(stored | chosen)
    return {key: value for key, value in stored.items() if key in taken}


def _section_settings(section: str, text: str) -> dict[str, Any]:
    return _load_mapping(text) or {_SHORTHAND_KEY.get(section, ""): text}


def _load_mapping(text: str) -> dict[str, Any]:
    """The settings in a YAML file or inline YAML; empty for anything else, which the parser reports as an error."""
    is_inline = text.lstrip().startswith("{")
    if not is_inline and not Path(text).is_file():
        return {}
    try:
        content = yaml_text.load(text) if is_inline else yaml_text.read(Path(text))
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def _find_resumed(resume_from: str, run_name: str | None, flags: list[str]) -> tuple[Path | None, Path | None]:
    """The checkpoint for `--resume`, None to start a run; and the folder of its run, if there is one."""
    if resume_from != "auto":
        source = resume.newest_resumable(resume_from)
        return source, run_folder.run_of(source, Path(resume_from))
    if RESUMED in os.environ and "LOCAL_RANK" in os.environ:
        found, run = (Path(os.environ[name]) if os.environ.get(name) else None for name in (RESUMED, RUN_DIR))
        return found, run

    run_name = _given_name(flags) or run_name
    if run_name is None:
        model = setting(flags, "model", "class_path")
        if model is None:
            raise AezooError("--resume auto needs the command of the run: give --model NAME or -c RECIPE")
        run_name = f"{_run_folder_model_name(model)}-{data_set_name(*_data_set(flags)[:2])}"
    home = Path(setting(flags, "trainer", "default_root_dir") or "runs") / archives.safe_name(run_name)
    found, run = resume.latest_run(home, lambda source: _is_of(checkpoint.read_checkpoint(source), flags))
    os.environ[RESUMED] = str(found or "")
    if run is not None:
        os.environ[RUN_DIR] = str(run)
    return found, run


def _given_name(flags: list[str]) -> str | None:
    """The last `--name` among the flags and files."""
    found = None
    for flag, value in _flag_values(flags):
        if flag == "--config":
            found = _load_mapping(value).get("name", found)
        elif flag == "--name":
            found = value
    return found if isinstance(found, str) else None


def _data_set(flags: list[str]) -> list[str]:
    """The data's name, root and of."""
    defaults = stored_settings()
    return [setting(flags, "data", key) or str(defaults[key].default) for key in ("name", "root", "of")]


def _is_of(content: dict[str, Any], flags: list[str]) -> bool:
    """Whether a checkpoint's run was trained on the data that the flags name; yes if it does not say."""
    trained_on = content.get(DataModule.__qualname__, {}).get("identity")
    name, root, of = _data_set(flags)
    return trained_on is None or trained_on == data_identity(name, root, of)


def _run_folder_model_name(model: str) -> str:
    """The name that `AezooCLI.run_dir` will use for a model; all models are imported by now."""
    module, _, name = _class_path(model).rpartition(".")
    if not module:
        return _import_models().get(name, name)
    cls = getattr(sys.modules.get(module), name, None)
    return (registry.name_of(cls) if isinstance(cls, type) else None) or name


def _flag_values(flags: list[str]) -> list[tuple[str, str]]:
    """Each word as a flag with its value, separated by an equals sign or a space."""
    following = [*flags, ""][1:]
    parts = [(text.partition("="), after) for text, after in zip(flags, following, strict=True)]
    return [(name, value if equals else after) for (name, equals, value), after in parts]


def _drop_repeated(settings: dict[str, Any], flags: list[str]) -> None:
    """Remove settings that flags add again: resuming with the same `--trainer.callbacks+=EMA` would add EMA twice."""
    trainer = settings.get("trainer")
    for name, value in _flag_values(flags):
        section, _, key = name.removeprefix("--").removesuffix("+").partition(".")
        if not (name.startswith("--") and name.endswith("+")) or section != "trainer" or not isinstance(trainer, dict):
            continue
        try:
            content = yaml_text.load(value)
        except yaml.YAMLError:
            continue  # the parser reports the error
        added = {_class_name(item) for item in (content if isinstance(content, list) else [content])}
        held = trainer.get(key)
        if isinstance(held, list):
            trainer[key] = [item for item in held if _class_name(item) not in added] or None


def _class_name(item: Any) -> str | None:
    path = item.get("class_path") if isinstance(item, dict) else item
    return path.rpartition(".")[2] if isinstance(path, str) else None


def _logger_setting(value: str) -> str:
    if not value.strip():
        raise AezooError("--trainer.logger needs a value: a logger of Lightning's, or false; see also --logger")
    try:
        return json.dumps(loggers.with_folder(yaml_text.load(value)), default=str)
    except yaml.YAMLError:
        return value  # the parser reports the error


def _model_name(config: dict[str, Any]) -> str | None:
    model = config.get("model")
    name = model.get("class_path") if isinstance(model, dict) else model
    return name if isinstance(name, str) else None


def _config_file(value: str) -> tuple[Path, dict[str, Any]]:
    if "://" in value:
        raise AezooError(f"configurations can only be read from disk, not from {value}: download it first")
    if (Path(value) / "config.yaml").is_file():
        raise AezooError(f"{value} is a run folder: give -c {Path(value) / 'config.yaml'} for its settings, or "
                         f"--ckpt_path {value} to continue it")  # fmt: skip
    path = Path(value) if Path(value).is_file() else find_recipe(value)
    content = yaml_text.read(path)
    if not isinstance(content, dict):
        raise AezooError(f"{path} contains no settings: write sections such as model:, data: and trainer:")
    for key in ("resume", "allow"):
        if key in content:
            raise AezooError(f"{key} is not read from a file: give --{key} on the command line, not in {path}")
    return path, content


def _class_path(name: str) -> str:
    """Change `vae` to `aezoo.models.variational.vae.VAE`; class names, class paths, files and inline YAML stay."""
    if name in _import_models() or name.lstrip().startswith("{") or ("." in name and name not in registry.entries()):
        return name
    cls = registry.model_class(name)
    return f"{cls.__module__}.{cls.__qualname__}"


def _import_models() -> dict[str, str]:
    """Import all models of this package; return their class names with their names in the registry."""
    entries = registry.entries().values()
    return {registry.model_class(entry.name).__name__: entry.name for entry in entries if entry.owner == "aezoo"}


def expand_model_names(text: str) -> str:
    """A YAML text in which the registry names of models are replaced by class paths."""
    try:
        config = yaml_text.load(text)
    except yaml.YAMLError as error:
        raise AezooError(f"cannot read the settings as YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(config, dict):
        return text
    for section in (config, *(v for k, v in config.items() if k in LIGHTNING_COMMANDS)):
        if not isinstance(section, dict):
            continue
        if not isinstance(section.get("config"), list | None):
            raise AezooError(
                "the settings name another file under config: give each file with --config on the command line"
            )
        # on and off without quotes are true and false in YAML
        for part, key in ((section, "compile"), (section, "speed"), (section.get("data"), "memory")):
            if isinstance(part, dict) and isinstance(part.get(key), bool):
                part[key] = "on" if part[key] else "off"
        # not a path or an address: only the command line may use the short form for these
        if isinstance(section.get("data"), str) and re.fullmatch(r"[\w-]+", section["data"]):
            section["data"] = {"name": section["data"]}
        if isinstance(trainer := section.get("trainer"), dict) and "logger" in trainer:
            trainer["logger"] = loggers.with_folder(trainer["logger"])
        model = section.get("model")
        if isinstance(model, str):
            section["model"] = {"class_path": _class_path(model)}
        elif isinstance(model, dict) and isinstance(model.get("class_path"), str):
            name = model["class_path"]
            model["class_path"] = _class_path(name)
            if "." not in name and isinstance(model.get("init_args"), dict):
                registry.check_hyperparameters(registry.model_class(name), model["init_args"], name)
    return yaml.safe_dump(config, sort_keys=False)


def _check_config_exists(content: dict[str, Any], run: Path) -> None:
    noted = content.get("callbacks", {}).get("SaveConfig")
    file = noted.get("file") if isinstance(noted, dict) else None
    if isinstance(file, str) and not (run / file).is_file():
        raise AezooError(f"{run} lacks its {file}, which contains the settings of its trainer and callbacks: put it "
                         "back, or give them all with -c FILE")  # fmt: skip


def _settings(command: str, content: dict[str, Any], source: Path, run: Path | None, optional: bool) -> dict[str, Any]:
    """Settings of a checkpoint's run: for a fit the run's whole `config.yaml`, otherwise only model and data."""
    config_file = (run or source.parent) / "config.yaml"
    if command == "fit" and run is not None and config_file.is_file():
        run_config = _config_file(str(config_file))[1]
        model, stored = run_config.get("model"), content.get("hyper_parameters")
        if isinstance(model, dict) and isinstance(model.get("init_args"), dict) and isinstance(stored, dict):
            # a file may no longer exist; the checkpoint contains the values that were read from it
            held = _plain_values(values.check_plain(stored, f"{source}: its hyperparameters"))
            model["init_args"] |= {key: value for key, value in held.items() if key in model["init_args"]}
        return run_config
    settings: dict[str, Any] = {}
    try:
        name, hyperparameters = checkpoint.verify(content, source)
        arguments = _plain_values(hyperparameters)
        arguments.pop("input_shape", None)
        settings["model"] = {"class_path": name, "init_args": arguments}
    except AezooError:
        if not optional:
            raise
    data = _plain_values(
        values.check_plain(content.get("datamodule_hyper_parameters", {}), f"{source}: its data settings")
    )
    known = stored_settings()
    return settings | {"data": {key: value for key, value in data.items() if key in known}}


def _plain_values(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in hyperparameters.items()
        if not key.startswith("_")
    }


def check_against(stored: dict[str, Any], source: Path, model: Autoencoder, resume: bool) -> None:
    """Report hyperparameters that differ from the checkpoint's; reject another shape of data."""
    now = dict(model.hparams)
    shape = stored.get("input_shape")
    shape = tuple(shape) if isinstance(shape, list | tuple) else model.input_shape
    if shape != model.input_shape:
        raise AezooError(
            f"{source} was trained on samples of shape {'x'.join(map(str, shape))}, but these data give "
            f"{'x'.join(map(str, model.input_shape))}: choose the same --data, or --data.size and --data.channels"
        )
    if resume and stored.get("optimizer", model.optimizer) != model.optimizer:
        raise AezooError(
            f"{source} contains the state of {stored['optimizer']}, from which {model.optimizer} cannot continue: keep "
            f"--model.optimizer {stored['optimizer']}, or fine-tune from Python with aezoo.load_model"
        )
    print_differences("model", stored, now)


def warn_other_splits(trained: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn that a model may be evaluated on its training samples if the same data set is split differently."""
    same_set = all(trained.get(key) == now.get(key) for key in ("name", "root"))
    changed = [key for key in ("seed", "val_fraction", "test_fraction") if trained.get(key, now[key]) != now[key]]
    if same_set and changed:
        flags = " and ".join(f"--data.{key}" for key in changed)
        print(f"aezoo: {flags}: the split is not the one used for training, so the model may have seen these samples",
              file=sys.stderr)  # fmt: skip


def print_differences(section: str, stored: dict[str, Any], now: dict[str, Any]) -> None:
    """Report settings that flags and files have changed, except for those that do not affect results."""
    ignored = {"num_workers", "memory", "root", "download", "max_pixels", "max_bytes", "cache_dir", "cache_bytes"}
    for key in sorted((stored.keys() & now.keys()) - ignored):
        stored_value = (
            tuple(stored[key]) if isinstance(now[key], tuple) and isinstance(stored[key], list) else stored[key]
        )
        if stored_value != now[key]:
            print(f"aezoo: {section}.{key} is {now[key]}, the checkpoint has {stored_value}", file=sys.stderr)


__getattr__ = renamed(__name__)
