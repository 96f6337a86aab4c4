"""Ranges of the `--trainer` settings, most of which Lightning does not check."""

import inspect
import math
from collections.abc import Mapping
from datetime import timedelta
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any, get_args

import torch

from aezoo.data.loaders import available_cores
from aezoo.errors import AezooError
from aezoo.training import distributed

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_MANY = 10**9
# largest number of processes per CPU core: a few are useful to try out runs for other machines
_ON_A_CORE = 4
# key: smallest value, largest value, description; a number of batches may also be a share, None means not set
_INTEGER_RANGES: dict[str, tuple[int, int, str]] = {
    "accumulate_grad_batches": (1, _MANY, "batches whose gradients are summed"),
    "check_val_every_n_epoch": (0, _MANY, "epochs between two validations, 0 to choose them by the length of epochs"),
    "fast_dev_run": (0, _MANY, "batches of a trial run"),
    "limit_predict_batches": (0, _MANY, "batches, or a share of them from 0.0 to 1.0"),
    "limit_test_batches": (0, _MANY, "batches, or a share of them from 0.0 to 1.0"),
    "limit_train_batches": (1, _MANY, "batches, or a share of them above 0.0 and up to 1.0"),
    "limit_val_batches": (0, _MANY, "batches, or a share of them from 0.0 to 1.0"),
    "log_every_n_steps": (0, _MANY, "steps between two entries of the log, 0 for none"),
    "max_epochs": (1, _MANY, "epochs, or -1 for no limit"),
    "max_steps": (1, _MANY, "optimiser steps, or -1 for no limit"),
    "min_epochs": (0, _MANY, "epochs"),
    "min_steps": (0, _MANY, "optimiser steps"),
    "num_nodes": (1, 10_000, "machines"),
    "num_sanity_val_steps": (0, _MANY, "batches of validation before training, or -1 for all"),
    "overfit_batches": (0, _MANY, "batches, or a share of them from 0.0 to 1.0"),
    "reload_dataloaders_every_n_epochs": (0, _MANY, "epochs"),
    "val_check_interval": (1, _MANY, "batches, or a share of an epoch above 0.0 and up to 1.0"),
}
# of check_val_every_n_epoch: `callbacks.ValidationSchedule` chooses
SCHEDULED = 0
_MINUS_ONE = ("max_epochs", "max_steps", "num_sanity_val_steps")
_TEXTS = ("default_root_dir", "model_registry", "profiler", "accelerator", "strategy", "devices")


def parse_int_before_float(trainer_class: type) -> None:
    """Make a parser try int before float for settings that take either: 1 is one batch, 1.0 is all batches.

    Otherwise the order depends on what was imported before Lightning: typing caches unions and treats
    Union[float, int] as Union[int, float]. Unions with `|` are not cached.
    """
    annotations = inspect.unwrap(vars(trainer_class)["__init__"]).__annotations__
    for name, kind in annotations.items():
        kinds = get_args(kind)
        if {int, float} <= set(kinds):
            annotations[name] = reduce(or_, sorted(kinds, key=lambda one: one is not int))


def take_schedule(trainer: dict[str, Any]) -> bool:
    """Whether no setting says when to validate, so that a schedule may; replaces `SCHEDULED`, unknown to Lightning."""
    if trainer.get("check_val_every_n_epoch") != SCHEDULED:
        return False
    trainer["check_val_every_n_epoch"] = 1
    return trainer.get("val_check_interval") is None


def check(trainer: Mapping[str, Any]) -> None:
    """Reject values with which a run would train nothing, hang, or end in a traceback.

    Args:
        trainer: the parsed settings.

    Raises:
        AezooError: names the key, what it takes and what it got.
    """
    for key, (least, most, words) in _INTEGER_RANGES.items():
        value = trainer.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or (value == -1 and key in _MINUS_ONE):
            continue
        if isinstance(value, float):
            works = "share" in words and 0 <= value <= 1 and (value > 0 or least == 0)
        else:
            works = least <= value <= most
        if not works:
            raise AezooError(f"trainer.{key} takes {words}, from {least} to {most}, got {value}")
    clip = trainer.get("gradient_clip_val")
    if clip is not None and not 0 <= clip <= 1e9:
        raise AezooError(f"trainer.gradient_clip_val takes a number from 0 (off) to 1e9, got {clip}")
    if trainer.get("gradient_clip_algorithm") not in (None, "norm", "value"):
        raise AezooError(
            f"trainer.gradient_clip_algorithm takes norm or value, got {trainer['gradient_clip_algorithm']!r}"
        )
    for key in _TEXTS:
        if trainer.get(key) == "":
            raise AezooError(f"trainer.{key} is empty: leave it out or give it a value")
    strategy = trainer.get("strategy")
    name = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", ""))
    kind = name.rpartition(".")[2]
    if kind and kind not in ("auto", "SingleDeviceStrategy") and not kind.lower().startswith("ddp"):
        raise AezooError(f"trainer.{distributed.unsupported_strategy(kind)}")
    devices = trainer.get("devices")
    count = int(devices) if isinstance(devices, str) and devices.lstrip("-").isdigit() else devices
    if isinstance(count, int) and not isinstance(count, bool) and count != -1 and not 1 <= count <= 1024:
        raise AezooError(f"trainer.devices takes a number from 1 to 1024, -1 for all, a list or auto, got {devices}")
    if devices == []:
        raise AezooError("trainer.devices is an empty list: give a number or name the devices")
    for key in ("max_time", "val_check_interval"):
        _check_time(key, trainer.get(key))
    accelerator = trainer.get("accelerator")
    if accelerator in ("gpu", "cuda") and not _has_gpu(accelerator):
        other = "" if torch.backends.cuda.is_built() else ", or install torch with GPU support (https://pytorch.org)"
        raise AezooError(
            f"trainer.accelerator is {accelerator}, and torch {torch.__version__} finds no GPU on this machine: give "
            f"--trainer.accelerator cpu or auto{other}"
        )


def _has_gpu(accelerator: str) -> bool:
    return torch.cuda.is_available() or (accelerator == "gpu" and torch.backends.mps.is_available())


def check_processes(trainer: "Trainer") -> None:
    """Reject a number of processes on the CPU that is so large that they would block each other.

    Raises:
        AezooError: states the largest number.
    """
    most = _ON_A_CORE * available_cores()
    on_cpu = trainer.strategy.root_device.type == "cpu"
    # processes of torchrun or a cluster already exist and are bound to cores
    if trainer.strategy.launcher is not None and on_cpu and trainer.num_devices > most:
        raise AezooError(
            f"trainer.devices is {trainer.num_devices}, each a process on the CPU, which has {available_cores()} "
            f"core(s): give at most {most}"
        )


def _check_time(key: str, value: Any) -> None:
    if isinstance(value, str):
        parts = value.split(":")
        value = None
        if len(parts) == 4 and all(part.isdecimal() and len(part) < 10 for part in parts):
            days, hours, minutes, seconds = map(int, parts)
            value = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    elif isinstance(value, dict):
        try:
            value = timedelta(**value).total_seconds()
        except (TypeError, OverflowError):
            value = None
    elif isinstance(value, timedelta):
        value = value.total_seconds()
    else:
        return
    if value is None or not 0 < value < math.inf:
        raise AezooError(f"trainer.{key} takes days:hours:minutes:seconds such as 00:12:00:00, above 0")
