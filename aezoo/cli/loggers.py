"""Loggers that `--trainer.logger` names: those that are given no folder write into the run folder."""

import warnings
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from aezoo.callbacks import dashboard
from aezoo.callbacks.learning_curves import StepLogger
from aezoo.errors import AezooError

_PACKAGE = "lightning.pytorch.loggers"
# settings that differ from Lightning's defaults; an empty save_dir stands for the run folder
_DEFAULTS: dict[str, dict[str, Any]] = {
    "TensorBoardLogger": {"save_dir": "", "default_hp_metric": False},
    "CSVLogger": {"save_dir": ""},
}


def with_folder(setting: Any) -> Any:
    """The setting `trainer.logger`, read from YAML, with the arguments that its loggers need."""
    if isinstance(setting, list):
        return [with_folder(item) for item in setting]
    spec = {"class_path": setting} if isinstance(setting, str) else setting
    if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str):
        return setting
    package, _, name = spec["class_path"].rpartition(".")
    own = spec.get("init_args") or {}
    if package not in ("", _PACKAGE) or name not in _DEFAULTS or not isinstance(own, dict) or "save_dir" in own:
        return setting
    return spec | {"class_path": f"{_PACKAGE}.{name}", "init_args": _DEFAULTS[name] | own}


def in_run_folder(loggers: Any, specs: Any, run_dir: Path, purge: dict[str, Any]) -> Any:
    """The trainer's loggers, of which those without a folder write into the run folder.

    Args:
        loggers: the value of `trainer.logger`, instantiated.
        specs: the same as settings.
        run_dir: the run folder.
        purge: arguments of a TensorBoard logger that continues the curves of a resumed run.

    Raises:
        AezooError: TensorBoard is not installed.
    """
    if loggers in (None, True):
        return _moved(dashboard.Logger, _DEFAULTS["TensorBoardLogger"], run_dir, purge)
    if isinstance(loggers, list):
        pairs = zip(loggers, specs, strict=True)
        return [in_run_folder(logger, spec, run_dir, purge) for logger, spec in pairs]
    if isinstance(specs, Namespace) and specs.get("init_args", {}).get("save_dir") == "":
        kind = dashboard.Logger if isinstance(loggers, TensorBoardLogger) else StepLogger
        return _moved(kind, dict(specs["init_args"]), run_dir, purge)
    return loggers


@rank_zero_only
def _keep_metrics(folder: Path) -> None:
    """Rename the metrics of a run that is continued, since CSVLogger would delete them."""
    kept = folder / "metrics.csv"
    if kept.is_file():
        n = sum(1 for _ in folder.glob("metrics-*.csv"))
        kept.rename(folder / f"metrics-{n}.csv")


def _moved(cls: type, arguments: dict[str, Any], run_dir: Path, purge: dict[str, Any]) -> Logger:
    folder = {"save_dir": run_dir.parent.parent, "name": run_dir.parent.name, "version": run_dir.name}
    if issubclass(cls, CSVLogger):
        purge = {}
        _keep_metrics(run_dir / "csv")
        # the files that it means have other names
        warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
    try:
        logger: Logger = cls(**arguments | folder | purge)
    except ModuleNotFoundError as error:
        raise AezooError("TensorBoard is not installed: pip install tensorboard, or --trainer.logger false") from error
    return logger
