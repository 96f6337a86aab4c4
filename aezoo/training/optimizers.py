"""Optimisers and learning rate schedules by plain names.

adam:beta1=0.5,eps=1e-4    an optimiser with settings that differ from torch's: eps, beta1 and beta2, if it has them
multistep:0.5@0.2,0.6      a schedule: multiply by 0.5 after a fifth of the steps, and again after three fifths
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from aezoo.errors import AezooError

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.pytorch import Trainer

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "sgd": torch.optim.SGD,
}
_FUSED = ("adam", "adamw", "sgd")
# entries of an optimiser's state that are scalars
_SCALARS = ("step", "mu_product")
# remaining share of the learning rate at progress p between 0 (warm-up done) and 1 (last step)
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda p: 1.0,
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "linear": lambda p: 1 - p,
    # decays to a thousandth, by the same factor in each step
    "exponential": lambda p: 1e-3**p,
    # a tenth after half of the steps, a hundredth after three quarters
    "step": lambda p: 1.0 if p < 0.5 else 0.1 if p < 0.75 else 0.01,
}


def check(optimizer: str, lr: float, weight_decay: float, lr_schedule: str, warmup_steps: int) -> None:
    """Reject values that no optimiser can use.

    Raises:
        AezooError: names the argument and the values that it takes.
    """
    _read_optimizer(optimizer)
    _falloff(lr_schedule)
    if not 0 < lr <= 1000:
        raise AezooError(f"lr must be above 0 and at most 1000, got {lr}")
    if not 0 <= weight_decay < math.inf:
        raise AezooError(f"weight_decay must be at least 0 and finite, got {weight_decay}")
    if warmup_steps < 0:
        raise AezooError(f"warmup_steps must be at least 0, got {warmup_steps}")


def _read_optimizer(text: str) -> tuple[str, dict[str, float]]:
    """Name and settings of adam, adam:eps=1e-4, adam:beta1=0.5,beta2=0.9, ..."""
    name, colon, rest = text.partition(":")
    if name not in OPTIMIZERS:
        raise AezooError(f"unknown optimizer {text!r}: choose from {', '.join(OPTIMIZERS)}")
    usual = _default_arguments(name)
    possible = [key for key, of in (("eps", "eps"), ("beta1", "betas"), ("beta2", "betas")) if of in usual]
    settings: dict[str, float] = {}
    for part in rest.split(",") if colon else ():
        key, _, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        fits = 0 < number < math.inf if key == "eps" else 0 <= number < 1
        if key not in possible or key in settings or not fits:
            raise AezooError(
                f"optimizer {text!r} cannot be read: give a name, or one with settings, of which {name} takes "
                f"{', '.join(possible) or 'none'}, such as adam:beta1=0.5,eps=1e-4; eps is above 0, a beta in [0, 1)"
            )
        settings[key] = number
    return name, settings


def _default_arguments(name: str) -> dict[str, Any]:
    """The defaults of torch's optimiser of that name, by argument."""
    return {key: argument.default for key, argument in inspect.signature(OPTIMIZERS[name]).parameters.items()}


def betas(text: str, usual: tuple[float, float]) -> tuple[float, float]:
    """The betas that an optimiser's text sets, with the usual ones for the others."""
    settings = _read_optimizer(text)[1]
    return settings.get("beta1", usual[0]), settings.get("beta2", usual[1])


def _falloff(text: str) -> Callable[[float], float]:
    """The factor of the learning rate at progress p, for a name in `SCHEDULES` or multistep:FACTOR@P,P,..."""
    if text in SCHEDULES:
        return SCHEDULES[text]
    name, _, rest = text.partition(":")
    if name != "multistep":
        raise AezooError(f"unknown lr_schedule {text!r}: choose from {', '.join(SCHEDULES)}, multistep:FACTOR@P,P")
    try:
        factor, places = float(rest.partition("@")[0]), [float(place) for place in rest.partition("@")[2].split(",")]
    except ValueError:
        factor, places = math.nan, []
    if not 0 < factor < math.inf or not all(0 < place < 1 for place in places):
        raise AezooError(
            f"lr_schedule {text!r} cannot be read: give a factor above 0 and the shares of all steps after which it "
            "applies, such as multistep:0.1@0.5,0.75"
        )
    return lambda p: factor ** sum(p >= place for place in places)


def build(
    name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, *, fused: bool = True
) -> torch.optim.Optimizer:
    """The optimiser of that name; `sgd` has momentum 0.9.

    Args:
        name: a key of `OPTIMIZERS`, with or without settings.
        parameters: the parameters to train.
        lr: learning rate.
        weight_decay: weight decay.
        fused: update all parameters in one kernel if torch has one for their device.
    """
    text = name
    name, given = _read_optimizer(text)
    settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if "eps" in given:
        settings["eps"] = given["eps"]
    if "betas" in (usual := _default_arguments(name)):
        settings["betas"] = betas(text, usual["betas"])
    if name == "sgd":
        settings["momentum"] = 0.9
    parameters = list(parameters)
    devices = {p.device.type for p in parameters}
    has_kernel = name in _FUSED or (name == "adagrad" and _has_adagrad(devices))
    if fused and has_kernel and devices <= {"cpu", "cuda"} and all(p.is_floating_point() for p in parameters):
        settings["fused"] = True
        if name in ("adam", "adamw") and parameters and parameters[0].device.type == "cuda":
            settings["capturable"] = True  # a CUDA graph can contain the step
    return OPTIMIZERS[name](parameters, **settings)


def _has_adagrad(devices: set[str]) -> bool:
    """Whether this torch has the kernel for the device; it was added for the CPU first and for CUDA later."""
    try:
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        return all(has_kernel("aten::_fused_adagrad_", device.upper()) for device in devices)
    # private to torch, which raises an error for an operator that it does not have
    except (AttributeError, RuntimeError):
        return False


def schedule(optimizer: torch.optim.Optimizer, name: str, warmup_steps: int, trainer: "Trainer") -> LambdaLR:
    """A schedule over optimiser steps: linear warm-up, then `name` until the trainer's last step.

    The number of steps is read at the second step, when the loop has counted it: reading
    `Trainer.estimated_stepping_batches` here would build the loaders before their state is restored (Lightning #20550).

    Raises:
        AezooError: the schedule needs a last step, but the trainer has none.
    """
    if name != "constant" and trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise AezooError(f"lr_schedule={name!r} needs a last step: set --trainer.max_epochs or --trainer.max_steps")

    falloff = _falloff(name)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if name == "constant" or step == 0:
            return 1.0
        progress = (step - warmup_steps) / max(1, total_steps(trainer) - warmup_steps)
        return falloff(min(1.0, max(0.0, progress)))

    return LambdaLR(optimizer, factor)


def check_restored(optimizer: torch.optim.Optimizer, schedulers: Iterable[Any], source: "str | Path") -> None:
    """Refuse a restored state whose types or shapes differ from a new one's: fused kernels would write beyond it.

    Args:
        optimizer: with its state from a checkpoint.
        schedulers: those of the learning rate.
        source: the checkpoint.

    Raises:
        AezooError: the state is damaged.
    """
    wrong = next(_unlike(optimizer, schedulers), None)
    if wrong is not None:
        raise AezooError(
            f"{source} cannot be restored: {wrong} in the state of its optimizer has another type or shape than it "
            "should; use another checkpoint of its run, or train from scratch with --resume off"
        )


def _unlike(optimizer: torch.optim.Optimizer, schedulers: Iterable[Any]) -> Iterator[str]:
    for group in optimizer.param_groups:
        yield from (key for key, usual in optimizer.defaults.items() if not _alike(group.get(key, group), usual))
    for parameter, state in optimizer.state.items():
        if not (isinstance(parameter, torch.Tensor) and isinstance(state, dict)):
            yield "a parameter that the model does not have"
            continue
        for key, value in state.items():
            is_number = value is None or isinstance(value, bool | int | float)
            if not (is_number or (isinstance(value, torch.Tensor) and _fits(key, value, parameter))):
                yield str(key)[:50]
    for scheduler in schedulers:
        held = vars(scheduler)
        yield from (key for key in ("last_epoch", "_step_count") if not isinstance(held.get(key, 0), int))
        rates = [0.0] * len(optimizer.param_groups)
        yield from (key for key in ("base_lrs", "_last_lr") if not _alike(held.get(key, rates), rates))


def _alike(value: Any, usual: Any) -> bool:
    if isinstance(usual, list | tuple):
        return isinstance(value, list | tuple) and len(value) == len(usual) and all(map(_alike, value, usual))
    if usual is None or isinstance(usual, bool):
        return value is None or isinstance(value, bool)
    return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _fits(key: Any, value: torch.Tensor, parameter: torch.Tensor) -> bool:
    held = value.layout == torch.strided and not value.is_meta and value.is_floating_point()
    return held and (value.numel() == 1 if key in _SCALARS else value.shape == parameter.shape)


def align(optimizer: torch.optim.Optimizer) -> None:
    """Give restored moments the memory layout of their parameters: fused kernels read both in memory order."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            fits = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if fits and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def renew(
    optimizer: torch.optim.Optimizer, scheduler: LambdaLR | None, lrs: list[float], weight_decays: list[float]
) -> None:
    """Set the requested settings of each group over those from a checkpoint, at the schedule's current point."""
    factors = [1.0] * len(lrs)
    if scheduler is not None:
        scheduler.base_lrs = [*lrs]
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, lr, weight_decay, factor in zip(optimizer.param_groups, lrs, weight_decays, factors, strict=True):
        group.update(lr=lr * factor, weight_decay=weight_decay)
        if scheduler is not None:
            group["initial_lr"] = lr  # a key of torch's schedules; a run without a schedule lacks it


def with_gradients(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Parameters that have a gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def known_steps(trainer: "Trainer") -> float:
    """Optimiser steps of the whole fit, infinite if unknown."""
    try:
        steps = total_steps(trainer)
    except AezooError:
        return math.inf
    return math.inf if steps == -1 else steps


def total_steps(trainer: "Trainer") -> int:
    """Optimiser steps of the whole fit; valid once the training loop has its loader.

    Raises:
        AezooError: the loader has no length and the trainer has no last step.
    """
    if trainer.max_epochs is None or trainer.max_epochs == -1:
        return trainer.max_steps
    if math.isinf(trainer.num_training_batches):
        if trainer.max_steps == -1:
            raise AezooError("lr_schedule needs a last step, but this loader has no length: set --trainer.max_steps")
        return trainer.max_steps
    steps = sum(n * math.ceil(trainer.num_training_batches / batches) for n, batches in _accumulation(trainer))
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def _accumulation(trainer: "Trainer") -> list[tuple[int, int]]:
    """Runs of epochs: their number, and the batches per optimiser step in them."""
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    end = trainer.max_epochs or 0
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            starts = [start for start in callback.epochs if start < end]
            return [(b - a, callback.scheduling[a]) for a, b in pairwise([*starts, end])]
    return [(end, trainer.accumulate_grad_batches)]
