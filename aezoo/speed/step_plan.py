"""The participants in a training step, looked up when training starts, for `aezoo.speed.fast_loop`."""

import inspect
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.nn.modules import module as of_modules

from aezoo.data.resident import ResidentLoader
from aezoo.speed.fused_optimizer import FusedStep, has_step_of_class
from aezoo.speed.graph_capture import CapturedStep
from aezoo.speed.joint_backward import GRADIENT_HOOKS, JointStep
from aezoo.training.projected_weights import Constrained

Hook = Callable[..., Any]
# private to torch: where one is missing, layers count as watched
_LAYER_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_AROUND_STEP = ("on_train_batch_start", "on_train_batch_end")
_BEFORE_GRADIENTS = ("on_before_zero_grad", "on_before_backward", "on_after_backward")
_WITHIN_STEP = (*_BEFORE_GRADIENTS, "on_before_optimizer_step")
# hooks that a CUDA graph can contain
_RECORDED = ("on_before_backward", "on_before_optimizer_step")
# if a module implements one of these, Lightning takes the step
_OWN_STEP = ("optimizer_step", "configure_gradient_clipping", "lr_scheduler_step")
# attributes of a module that may be replaced while it trains
_OF_MODULE = (*_AROUND_STEP, *_WITHIN_STEP, *_OWN_STEP, "training_step", "backward", "clip_gradients")
_OURS = ("aezoo", "lightning")
_TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device")


class Plan:
    """The hooks and participants of a step, looked up once.

    Args:
        trainer: a trainer whose callbacks, loader and optimiser are set up.

    Attributes:
        step: the optimiser's step, looked up again in each epoch.
    """

    step: FusedStep

    def __init__(self, trainer: pl.Trainer) -> None:
        module: Any = trainer.lightning_module  # Any, since models of this package have further methods
        self.module = module
        self.optimizer = trainer.optimizers[0]
        self._participants = _participants(trainer)
        precision = trainer.precision_plugin
        self.context = None if type(precision) is Precision else precision.train_step_context
        self.hooks = {name: hooks_of(name, trainer) for name in (*_AROUND_STEP, *_WITHIN_STEP)}
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._callbacks = len(callbacks)
        hooked = [_owner(hook) for name in _AROUND_STEP for hook, _ in self.hooks[name]]
        # callbacks of this package and of Lightning only read a batch's length
        self.batch_is_private = all(_is_ours(who) for who in hooked)
        layers = all(_is_unmodified(part, "aezoo", "torch") for part in module.modules())
        # no other code runs
        self.is_private = layers and all(_is_unmodified(callback, *_OURS) for callback in callbacks)
        # only other code draws from NumPy's and Python's generators
        self.uses_only_torch_rng = self.is_private and _data_are_ours(trainer)
        within = [_owner(hook) for name in _WITHIN_STEP for hook, _ in self.hooks[name]]
        # nothing can change the loss between a step and its end
        self.loss_is_private = all(_is_ours(who) for who in (*hooked, *within)) and _has_our_method(module, "backward")
        constrained = isinstance(module, Constrained)
        theirs = Constrained if constrained else pl.LightningModule
        self.own_step = any(is_overridden(name, module, theirs) for name in _OWN_STEP)
        self.own_step |= not _has_our_method(module, "clip_gradients") or not _steps_by_itself(self.optimizer)
        self.after_step: Hook | None = module.after_optimizer_step if constrained else None
        # torch's zero_grad does the same with records for its profiler, at ten times the cost
        self.own_zero_grad = (
            is_overridden("optimizer_zero_grad", module)
            or type(self.optimizer).zero_grad is not torch.optim.Optimizer.zero_grad
            or "zero_grad" in vars(self.optimizer)
        )
        self.takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        self.prepare = resident_transform(trainer, trainer.train_dataloader)
        self.captured: CapturedStep | None = None
        self.joint: JointStep | None = None
        # called when another plan replaces this one
        self.on_change: Callable[[], None] | None = None
        # callbacks within a step: a graph can contain those with `capturable`
        self.recorded: list[Any] = list({_owner(hook): None for name in _RECORDED for hook, _ in self.hooks[name]})
        a_batch_is_a_step = (
            trainer.accumulate_grad_batches == 1
            and not any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks)  # type: ignore[attr-defined]
            and not self.own_step
        )
        self.can_capture = (
            self.prepare is not None
            and trainer.strategy.root_device.type == "cuda"
            and a_batch_is_a_step
            and not trainer.gradient_clip_val
            and self.after_step is None
            and not trainer.lr_scheduler_configs
            and not self.hooks["on_before_zero_grad"]
            and not self.hooks["on_after_backward"]
            and all(getattr(who, "capturable", False) for who in self.recorded)
            and all(group.get("capturable") for group in self.optimizer.param_groups)
        )
        # a guard that is the last to act on a step may be called directly instead of through its hooks
        guards = [c for c in trainer.callbacks if getattr(c, "is_passive", False)]  # type: ignore[attr-defined]
        others = [own for hook, own in self.hooks["on_before_optimizer_step"] if _owner(hook) not in guards]
        has_last_word = len(guards) == 1 and all(others)
        self.guard: Any = guards[0] if has_last_word and a_batch_is_a_step else None
        # the hooks without the guard's, which are not called for a finite step
        self.hooks_without_guard = {
            name: [(hook, own) for hook, own in hooks if _owner(hook) is not self.guard]
            for name, hooks in self.hooks.items()
        }
        # the norm for clipping is also the guard's check
        self.clips_by_norm = (
            trainer.strategy.root_device.type == "cpu"
            and type(precision) is Precision
            and not self.hooks_without_guard["on_before_optimizer_step"]
        )
        self.plateau = any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs)
        self.begin_epoch(trainer)

    def begin_epoch(self, trainer: pl.Trainer) -> None:
        """Look up everything that may change from epoch to epoch."""
        self.step = FusedStep(self.optimizer, alone=self.is_private)
        # Lightning decides on validation after part of an epoch, by time, or by the count of all batches
        self.validates_at_end = (
            trainer.check_val_every_n_epoch is not None
            and trainer._val_check_time_interval is None  # type: ignore[attr-defined]
            and trainer.val_check_batch in (float("inf"), trainer.num_training_batches)
        )
        self._is_alone = self._has_no_watchers(trainer)
        by_torch = _has_our_method(self.module, "backward") and not self.own_zero_grad
        self._gradients_are_private = by_torch and self._is_alone
        if self.joint is not None:
            self.joint.begin_epoch()

    def matches(self, trainer: pl.Trainer) -> bool:
        """Whether the participants are still those that were looked up."""
        now = _participants(trainer)
        return len(now) == len(self._participants) and all(a is b for a, b in zip(now, self._participants, strict=True))

    def quick_match(self, trainer: pl.Trainer) -> bool:
        """A cheaper, incomplete version of `matches` for every step."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return self.optimizer is trainer.optimizers[0] and len(callbacks) == self._callbacks

    def _has_no_watchers(self, trainer: pl.Trainer) -> bool:
        """Whether this is a model of this package on the CPU whose computation no code observes."""
        return (
            trainer.strategy.root_device.type == "cpu"
            and not torch.is_anomaly_enabled()
            and _is_unmodified(self.module, "aezoo")
            and all(_has_no_hooks(part) for part in self.module.modules())
            and not getattr(of_modules, "_has_any_global_hook", lambda: True)()
        )

    def can_join_backward(self, calls_guard_hooks: bool) -> bool:
        """Whether a step may compute loss and gradients together, because no hook runs in between.

        Args:
            calls_guard_hooks: whether the guard's hooks are called.
        """
        if self.joint is None or not (self._gradients_are_private and self.joint.works and self.joint.matches):
            return False
        hooks = self.hooks if calls_guard_hooks else self.hooks_without_guard
        return not any(hooks[name] for name in _BEFORE_GRADIENTS)

    def in_precision(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the step's precision."""
        if self.context is None:
            return call(*arguments)
        with self.context():
            return call(*arguments)


def is_plain(trainer: pl.Trainer) -> bool:
    """Whether one process uses one device, in a precision that does not change weights, without a profiler."""
    return (
        type(trainer.strategy) is SingleDeviceStrategy
        and trainer.strategy.model is trainer.lightning_module
        and isinstance(trainer.profiler, PassThroughProfiler)  # type: ignore[attr-defined]
        and type(trainer.precision_plugin) in (Precision, MixedPrecision)
    )


def transfer(trainer: pl.Trainer, batch: Any) -> Any:
    """A batch of the only loader, transferred to the device with all hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def hooks_of(name: str, trainer: pl.Trainer) -> list[tuple[Hook, bool]]:
    """The implementations of a hook: the method, and whether it is the module's, which comes last."""
    module = trainer.lightning_module
    callbacks = [c for c in trainer.callbacks if _implements(name, c)]  # type: ignore[attr-defined]
    own = [(getattr(module, name), True)] if is_overridden(name, module) else []
    return [*((getattr(callback, name), False) for callback in callbacks), *own]


def resident_transform(trainer: pl.Trainer, loader: Any) -> Hook | None:
    """The only transform of a batch that is already on the device as bytes or float32: the hook of the data.

    None if a batch has to be moved, or if a transfer hook is implemented.
    """
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    is_resident = (
        isinstance(loader, ResidentLoader)
        and loader.x.device == trainer.strategy.root_device
        and loader.x.dtype in (torch.uint8, torch.float32)
        and not any(is_overridden(name, module) for name in (*_TRANSFER, "on_after_batch_transfer"))
        and not any(data is not None and is_overridden(name, data) for name in _TRANSFER)
    )
    if not is_resident:
        return None
    return _identity if data is None else data.on_after_batch_transfer


def _participants(trainer: pl.Trainer) -> list[Any]:
    module, loader = trainer.lightning_module, trainer.train_dataloader
    own = [vars(module).get(name) for name in (*_OF_MODULE, *_TRANSFER, "optimizer_zero_grad")]
    own += [vars(optimizer).get(name) for optimizer in trainer.optimizers for name in ("step", "zero_grad")]
    parts = module, loader, trainer.strategy, trainer.precision_plugin, trainer.profiler  # type: ignore[attr-defined]
    return [*parts, *trainer.optimizers, *trainer.callbacks, *own]  # type: ignore[attr-defined]


def _owner(hook: Hook) -> Any:
    return getattr(hook, "__self__", None)


def _is_ours(owner: Any) -> bool:
    return type(owner).__module__.partition(".")[0] in _OURS


def _has_our_method(module: pl.LightningModule, name: str) -> bool:
    """Whether a method of a module is this package's or Lightning's, even if its class is not."""
    return name not in vars(module) and getattr(type(module), name).__module__.partition(".")[0] in _OURS


def _steps_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser's step is torch's, which needs no closure."""
    return str(type(optimizer).step.__module__).startswith("torch.optim.") and has_step_of_class(optimizer)


def _is_unmodified(instance: Any, *packages: str) -> bool:
    """Whether an object's class is of these packages and no method is replaced, as in a LambdaCallback."""
    cls = type(instance)
    return cls.__module__.partition(".")[0] in packages and not any(
        inspect.isfunction(getattr(cls, name, None)) for name in vars(instance)
    )


def _data_are_ours(trainer: pl.Trainer) -> bool:
    """Whether no other code takes part in making batches."""
    data, loader = trainer.datamodule, trainer.train_dataloader  # type: ignore[attr-defined]
    known = type(loader) is ResidentLoader and (loader.transform is None or _is_from_data(loader.transform))
    return known and (data is None or _is_unmodified(data, "aezoo"))


def _is_from_data(transform: Any) -> bool:
    """Whether a transform is a function or an object of this package's data sources."""
    return str(getattr(transform, "__module__", "")).startswith("aezoo.data.")


def _has_no_hooks(part: nn.Module) -> bool:
    """Whether a layer is of this package or torch and has no hooks, which would see inputs and gradients."""
    hooks = [getattr(part, name, True) for name in _LAYER_HOOKS]
    hooks += [getattr(of, name, True) for of in part.parameters(recurse=False) for name in GRADIENT_HOOKS]
    return _is_unmodified(part, "aezoo", "torch") and not any(hooks)


def _implements(name: str, callback: pl.Callback) -> bool:
    """Whether a callback implements a hook, as a method, a function or any other callable."""
    try:
        return is_overridden(name, callback, parent=pl.Callback)
    except AttributeError:  # without __code__, so not the base class's method
        return callable(getattr(callback, name))


def _identity(batch: Any, dataloader_idx: int) -> Any:
    return batch
