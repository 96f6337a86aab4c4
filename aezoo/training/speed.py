"""The only call sites of `aezoo.speed`: what a fit and a prediction do only to be faster, and how it is undone."""

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from aezoo.speed import fast_loop, joint_backward, predict_loop
from aezoo.training import compilation, distributed
from aezoo.training.model_names import is_built_in

if TYPE_CHECKING:
    from aezoo.training.module import TrainingModule


def set_up_fit(model: "TrainingModule") -> None:
    """Give a model its faster memory layout.

    Call it before DistributedDataParallel, which lays out gradients like the weights.
    """
    fits = distributed.has_full_model(model.trainer)
    # ModelPruning uses torch.nn.utils.parameters_to_vector, which accepts only torch's usual layout
    callbacks: list[Any] = model.trainer.callbacks  # type: ignore[attr-defined]
    prunes = any(isinstance(callback, pl.callbacks.ModelPruning) for callback in callbacks)
    model._channels_last = fits and not prunes and compilation.to_channels_last(model)


def begin_fit(model: "TrainingModule", how: dict[str, Any] | None) -> None:
    """Use the fast loop, and what it allows, if they suit this run; call it when training starts.

    Args:
        model: the model, with its Trainer.
        how: arguments with which its loss is compiled; None if it is not.
    """
    trainer, light = model.trainer, fast_loop.install_fast_loop(model.trainer)
    if how is not None and light and not model.has_own_step:
        if how["mode"] == "reduce-overhead" and fast_loop.capture(trainer):
            # a graph of the whole step includes those of its parts
            model._compiled = compilation.Compiled(model._terms, **{**how, "mode": "default"})
        if model.device.type == "cpu" and joint_backward.can_trace():
            fast_loop.join(trainer, joint_backward.Joint(model, model._terms, **how))
    if light and is_built_in(type(model)):
        fast_loop.trust(trainer)
    _refresh_participants(model)
    fast_loop.tell(trainer, lambda: _refresh_participants(model))


def _refresh_participants(model: "TrainingModule") -> None:
    """Check who else takes part in a step: what others see and draw must not change."""
    trainer = model.trainer
    model._uses_only_torch_rng = fast_loop.uses_only_torch_rng(trainer) and is_built_in(type(model))
    # bytes from other data are refused if the step is not compiled, so also if it is
    leaves = getattr(trainer.datamodule, "leaves_bytes", False)  # type: ignore[attr-defined]
    model.takes_bytes = leaves and model._compiled is not None and fast_loop.batch_is_private(trainer)


def end_fit(model: "TrainingModule") -> None:
    """Undo what a fit did to a model, however it ended; the loop restores itself."""
    model.takes_bytes = False
    if model._channels_last:
        # the same bits as a model that is loaded from a file
        compilation.to_channels_first(model)
        model._channels_last = False


def begin_prediction(model: "TrainingModule") -> None:
    """Use the fast prediction loop if it suits this run; it restores itself."""
    predict_loop.install_predict_loop(model.trainer)
