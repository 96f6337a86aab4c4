"""The loggers of a run: those that `--logger` names, all in the run folder, and those that `--trainer.logger` adds."""

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger

from aezoo.callbacks import loggers
from aezoo.errors import AezooError, install_hint

_PACKAGE = "lightning.pytorch.loggers"
# name of W&B's project and MLflow's experiment, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set
_PROJECT = "aezoo"


class Kind(NamedTuple):
    """A logger that writes into the run folder.

    Attributes:
        make: function of the run folder, the arguments, and the step of the checkpoint that a run continues from, or
            None.
        lightning: Lightning's class, which `--trainer.logger` names.
        packages: any one of these is required.
        advice: what to do if it is not installed.
        elsewhere: arguments that set another location; with one of them, the logger is not that of the run folder.
        defaults: arguments that differ from Lightning's; empty ones are derived from the run folder.
    """

    make: Callable[[Path, dict[str, Any], int | None], Logger]
    lightning: str
    packages: tuple[str, ...]
    advice: str
    elsewhere: tuple[str, ...] = ("save_dir",)
    defaults: Mapping[str, Any] = {}


def _tensorboard(run_dir: Path, arguments: dict[str, Any], step: int | None) -> Logger:
    # a resumed run removes the points that it had logged after its checkpoint
    purge = {} if step is None else {"purge_step": step}
    return loggers.TensorBoard(**{"default_hp_metric": False} | arguments | _places(run_dir) | purge)


def _csv(run_dir: Path, arguments: dict[str, Any], step: int | None) -> Logger:
    return loggers.StepLogger(**arguments | _places(run_dir), resumed_at=step)


def _wandb(run_dir: Path, arguments: dict[str, Any], step: int | None) -> Logger:
    defaults = {"name": _title(run_dir), "project": os.environ.get("WANDB_PROJECT") or _PROJECT}
    return loggers.WandB(run_dir, **defaults | _given(arguments))


def _mlflow(run_dir: Path, arguments: dict[str, Any], step: int | None) -> Logger:
    defaults = {
        "run_name": _title(run_dir),
        "experiment_name": os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT,
        "tracking_uri": os.environ.get(loggers.TRACKING_URI),
    }
    return loggers.MLflow(run_dir, **defaults | _given(arguments))


KINDS = {
    "tensorboard": Kind(_tensorboard, "TensorBoardLogger", ("tensorboard", "tensorboardX"), "pip install tensorboard"),
    "csv": Kind(_csv, "CSVLogger", (), ""),
    "wandb": Kind(_wandb, "WandbLogger", ("wandb",), install_hint("wandb"), ("save_dir", "dir", "experiment")),
    "mlflow": Kind(
        _mlflow,
        "MLFlowLogger",
        ("mlflow", "mlflow-skinny"),
        install_hint("mlflow"),
        defaults={"experiment_name": ""},
    ),
}
# DummyLogger writes nothing: W&B and MLflow open files or connections when they are made
_FIRST_RANK_ONLY = ("wandb", "mlflow")


def _places(run_dir: Path) -> dict[str, Any]:
    return {"save_dir": run_dir.parent.parent, "name": run_dir.parent.name, "version": run_dir.name}


def _title(run_dir: Path) -> str:
    return f"{run_dir.parent.name}/{run_dir.name}"


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that are set; the parser sets the others to None."""
    return {key: value for key, value in arguments.items() if value not in (None, "")}


def names(setting: Any) -> list[str] | None:
    """The loggers that `--logger` names; None if it leaves them to the default.

    Args:
        setting: names with commas between them or in a list; `none` or false for no logger.

    Raises:
        AezooError: there is no such logger.
    """
    if setting is None or setting is True:
        return None
    words = [setting] if isinstance(setting, str) else setting or ["none"]
    found = [word.strip().lower() for text in words for word in str(text).strip("[] ").split(",")]
    if found in (["none"], ["false"], ["off"]):
        return []
    if found in (["true"], ["null"]):
        return None
    for name in found:
        if name not in KINDS:
            near = difflib.get_close_matches(name, KINDS, n=1)
            guess = f", did you mean {near[0]}?" if near else ":"
            raise AezooError(
                f"logger {name!r} is not known{guess} --logger takes {', '.join(KINDS)} with commas between them, "
                "or none"
            )
    return list(dict.fromkeys(found))


def named(spec: Any) -> tuple[str, dict[str, Any]] | None:
    """The kind and the arguments of a logger of `--trainer.logger` if no folder is set for it; otherwise None."""
    path = spec.get("class_path") if isinstance(spec, dict | Namespace) else spec
    if not isinstance(path, str):
        return None
    package, _, cls = path.rpartition(".")
    kind = next((name for name, kind in KINDS.items() if kind.lightning == cls), None)
    parts = [] if isinstance(spec, str) else [spec.get("init_args"), spec.get("dict_kwargs")]
    parts = [part.as_dict() if isinstance(part, Namespace) else part or {} for part in parts]
    if kind is None or package not in ("", _PACKAGE) or not all(isinstance(part, dict) for part in parts):
        return None
    arguments = {key: value for part in parts for key, value in part.items()}
    return None if any(arguments.get(key) for key in KINDS[kind].elsewhere) else (kind, arguments)


def with_folder(setting: Any) -> Any:
    """The setting `trainer.logger`, read from YAML, as a list in which loggers without a folder are marked so.

    An empty `save_dir` means the run folder.

    Raises:
        AezooError: the package of a logger is missing.
    """
    if not isinstance(setting, list | str | dict):
        return setting
    if isinstance(setting, str | dict):
        setting = [setting]
    marked: list[Any] = []
    for spec in setting:
        found = named(spec)
        if found is None:
            marked.append(spec)
            continue
        kind = KINDS[found[0]]
        _require(found[0])
        held = {} if isinstance(spec, str) else spec
        arguments = {**kind.defaults, **(held.get("init_args") or {}), "save_dir": ""}
        marked.append({**held, "class_path": f"{_PACKAGE}.{kind.lightning}", "init_args": arguments})
    return marked


def split(setting: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The parsed setting `trainer.logger` in two: what Lightning makes, and arguments of loggers of the run folder."""
    specs = setting if isinstance(setting, list) else [setting]
    found = {id(spec): named(spec) for spec in specs}
    own = dict(pair for pair in found.values() if pair is not None)
    foreign = [spec for spec in specs if found[id(spec)] is None]
    return (foreign if isinstance(setting, list) else setting) if foreign or not own else None, own


def check(setting: Any) -> None:
    """Refuse `--logger` with an unknown name or a missing package.

    Raises:
        AezooError: says which, and what to do.
    """
    for name in names(setting) or []:
        _require(name)


def make(
    setting: Any, foreign: Any, own: dict[str, dict[str, Any]], run_dir: Path, step: int | None, fit: bool, writes: bool
) -> list[Logger] | bool:
    """The trainer's loggers.

    Args:
        setting: that of `--logger`.
        foreign: from `--trainer.logger`, what Lightning has made: loggers with other folders, or false.
        own: from `--trainer.logger`, arguments of loggers for the run folder, by kind.
        run_dir: the run folder.
        step: that of the checkpoint from which a run continues, or None.
        fit: whether TensorBoard is the default.
        writes: whether this process writes at all.

    Returns:
        False for no loggers.

    Raises:
        AezooError: a package is missing, or a server does not answer.
    """
    default = ["tensorboard"] if fit and foreign is not False else []
    chosen = names(setting)
    kinds = dict.fromkeys([*(default if chosen is None else chosen), *own])
    made: list[Logger] = []
    for kind in kinds:
        if kind in _FIRST_RANK_ONLY and not writes:
            made.append(DummyLogger())
            continue
        _require(kind)
        arguments = {key: value for key, value in own.get(kind, {}).items() if key not in KINDS[kind].elsewhere}
        try:
            made.append(KINDS[kind].make(run_dir, arguments, step))
        except ModuleNotFoundError as error:
            raise _missing(kind) from error
    more = foreign if isinstance(foreign, list) else [foreign]
    made += [logger for logger in more if isinstance(logger, Logger)]
    return made or False


def close(made: Iterable[Logger]) -> None:
    """Flush and close the loggers of the run folder."""
    for logger in made:
        if isinstance(logger, loggers.WandB | loggers.MLflow):
            logger.close()


def _require(kind: str) -> None:
    packages = KINDS[kind].packages
    # by distribution, not module: W&B creates folders named wandb, which can be imported
    if packages and not any(_is_installed(package) for package in packages):
        raise _missing(kind)


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _missing(kind: str) -> AezooError:
    name = {"tensorboard": "TensorBoard", "wandb": "W&B", "mlflow": "MLflow"}[kind]
    others = ",".join(other for other in ("tensorboard", "csv") if other != kind)
    return AezooError(f"{name} is not installed: {KINDS[kind].advice}, or use --logger {others} or none")
