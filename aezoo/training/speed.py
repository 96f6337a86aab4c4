"""The only call site of `aezoo.speed`: optimisations of the speed of a fit or a prediction, and how they are undone.

The package is loaded by name, and everything gives the same numbers without it: if AEZOO_SPEED is off (as `--speed off`
sets it), or if the package has been deleted.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from aezoo.training.module import TrainingModule

VARIABLE = "AEZOO_SPEED"
SETTINGS = ("auto", "off")
HELP = "auto, or off: disable all speed optimisations, with the same results."


def _call(name: str, *arguments: Any) -> Any:
    """What a function of `aezoo.speed.run` returns, or None without the package."""
    if os.environ.get(VARIABLE) == "off":
        return None
    try:
        run = import_module("aezoo.speed.run")
    except ModuleNotFoundError as error:
        if error.name not in ("aezoo.speed", "aezoo.speed.run"):
            raise
        return None
    return getattr(run, name)(*arguments)


def choose(setting: str) -> None:
    """Follow a command's `--speed`, in this process and those that it starts: auto or off."""
    if setting == "off":
        os.environ[VARIABLE] = "off"


def keep_memory() -> None:
    """Keep the memory of large tensors from step to step, for the rest of the process: for command lines only."""
    _call("keep_memory")


def set_up(model: "TrainingModule", stage: str) -> None:
    """Make a model ready for a fit or an evaluation; call it before DistributedDataParallel wraps the model."""
    _call("set_up", model, stage)


def begin_fit(model: "TrainingModule", compile_arguments: dict[str, Any] | None) -> None:
    """Begin the steps of a fit.

    Args:
        model: the model, with its Trainer.
        compile_arguments: arguments with which its loss is compiled; None if it is not.
    """
    _call("begin_fit", model, compile_arguments)


def begin_prediction(model: "TrainingModule") -> None:
    """Begin the batches of a prediction."""
    _call("begin_prediction", model)


def tear_down(model: "TrainingModule", stage: str) -> None:
    """Undo everything, however a fit or an evaluation ended."""
    run = sys.modules.get("aezoo.speed.run")  # also if it has been switched off since
    if run is not None:
        run.tear_down(model, stage)


@contextmanager
def evaluating(model: "TrainingModule") -> Iterator[None]:
    """Around the use of a model outside of a Trainer."""
    set_up(model, "evaluate")
    try:
        yield
    finally:
        tear_down(model, "evaluate")


def joint_step(model: "TrainingModule", terms: Callable[..., Any]) -> "Callable[[torch.Tensor], Any] | None":
    """A step that computes loss and gradients in one compiled graph, or None if fits have none; for checks."""
    step: Callable[[torch.Tensor], Any] | None = _call("joint_step", model, terms)
    return step
