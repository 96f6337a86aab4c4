"""Optimisations of the speed of a fit or an evaluation, and how they are undone; called by `aezoo.training.speed`."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from torch import Tensor, nn

from aezoo.speed import (
    fast_loop,
    inductor_lowering,
    joint_backward,
    layers,
    malloc,
    memory_format,
    predict_loop,
)
from aezoo.speed.parts import is_enabled
from aezoo.speed.swapping import Swapped
from aezoo.training import compilation
from aezoo.training.model_names import is_built_in
from aezoo.training.module import TrainingModule

# the swapped parts of models, by stage: a fit may evaluate its model by another Trainer
_SWAPPED: WeakKeyDictionary[nn.Module, dict[str, list[Swapped]]] = WeakKeyDictionary()


def keep_memory() -> None:
    """Keep the memory of large tensors from step to step, for the rest of the process."""
    if is_enabled("malloc"):
        malloc.keep_pages()


def set_up(model: TrainingModule, stage: str) -> None:
    """Swap faster layers into a model, and in a fit give its images their faster memory layout.

    Args:
        model: the model, not yet wrapped by DistributedDataParallel, which lays out gradients like the weights.
        stage: fit, or another for an evaluation.
    """
    if is_enabled("malloc"):
        malloc.expect_large_tensors()
    channels_last = stage == "fit" and is_enabled("channels_last") and _keeps_layout(model)
    channels_last = channels_last and memory_format.to_channels_last(model)
    if stage == "fit":
        model._channels_last = channels_last
    parts = layers.swap_in(model, model.input_shape, channels_last)
    _SWAPPED.setdefault(model, {}).setdefault(stage, []).extend(parts)


def _keeps_layout(model: TrainingModule) -> bool:
    """Whether no callback flattens the weights."""
    # ModelPruning uses torch.nn.utils.parameters_to_vector, which accepts only torch's usual layout
    callbacks: list[Any] = model.trainer.callbacks  # type: ignore[attr-defined]
    return not any(isinstance(callback, pl.callbacks.ModelPruning) for callback in callbacks)


def begin_fit(model: TrainingModule, compile_arguments: dict[str, Any] | None) -> None:
    """Use the fast loop, and what it allows, if they suit this run; call it when training starts.

    Args:
        model: the model, with its Trainer.
        compile_arguments: arguments with which its loss is compiled; None if it is not.
    """
    trainer = model.trainer
    if compile_arguments is not None and is_enabled("inductor_lowering"):
        inductor_lowering.enable()
    if not is_enabled("fast_loop"):
        return
    fast = fast_loop.install_fast_loop(trainer)
    if compile_arguments is not None and fast and not model.has_own_step:
        if (
            compile_arguments["mode"] == "reduce-overhead"
            and is_enabled("graph_capture")
            and fast_loop.capture_steps(trainer)
        ):
            # a graph of the whole step includes those of its parts
            model._compiled = compilation.Compiled(model._terms, **{**compile_arguments, "mode": "default"})
        if model.device.type == "cpu" and is_enabled("joint_backward") and joint_backward.can_trace():
            fast_loop.set_joint_step(trainer, joint_backward.JointStep(model, model._terms, **compile_arguments))
    _refresh_participants(model)
    fast_loop.on_participants_changed(trainer, lambda: _refresh_participants(model))


def _refresh_participants(model: TrainingModule) -> None:
    """Check what else is part of a step: values that other code reads or draws must not change."""
    trainer = model.trainer
    model._uses_only_torch_rng = fast_loop.uses_only_torch_rng(trainer) and is_built_in(type(model))
    # bytes from other data are refused as they are if the step is not compiled
    leaves = getattr(trainer.datamodule, "leaves_bytes", False)  # type: ignore[attr-defined]
    model.takes_bytes = leaves and model._compiled is not None and fast_loop.batch_is_private(trainer)


def begin_prediction(model: TrainingModule) -> None:
    """Use the fast prediction loop if it suits this run; it restores itself."""
    if is_enabled("predict_loop"):
        predict_loop.install_predict_loop(model.trainer)


def tear_down(model: TrainingModule, stage: str) -> None:
    """Undo what `set_up` and `begin_fit` did to a model; the loops restore themselves."""
    layers.swap_out(_SWAPPED.get(model, {}).pop(stage, []))
    if stage == "fit":
        model.takes_bytes = False
        if model._channels_last:
            # the same bits as a model that is loaded from a file
            memory_format.to_channels_first(model)
            model._channels_last = False


def joint_step(model: TrainingModule, terms: Callable[..., Any]) -> Callable[[Tensor], Any] | None:
    """A step that computes a loss and its gradients in one compiled graph; None where fits have none.

    It returns the terms, or None if they cannot be compiled so.
    """
    if not is_enabled("joint_backward") or not joint_backward.can_trace():
        return None
    joint = joint_backward.JointStep(model, terms, "default", lambda: None)

    def step(x: Tensor) -> Any:
        found = joint.step(x, None)
        return found if joint.works else None

    return step
