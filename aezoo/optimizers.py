"""Optimisers and learning rate schedules by plain names."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from aezoo.errors import AezooError

if TYPE_CHECKING:
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
# share of the learning rate left at progress p between 0 (warm-up done) and 1 (last step)
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda p: 1.0,
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "linear": lambda p: 1 - p,
    # down to a thousandth, by the same factor each step
    "exponential": lambda p: 1e-3**p,
    # a tenth after half of the steps, a hundredth after three quarters
    "step": lambda p: 1.0 if p < 0.5 else 0.1 if p < 0.75 else 0.01,
}


def check(optimizer: str, lr: float, weight_decay: float, lr_schedule: str, warmup_steps: int) -> None:
    """Refuse values that no optimiser can use.

    Raises:
        AezooError: names the argument and what it takes.
    """
    if optimizer not in OPTIMIZERS:
        raise AezooError(f"unknown optimizer {optimizer!r}: take one of {', '.join(OPTIMIZERS)}")
    if lr_schedule not in SCHEDULES:
        raise AezooError(f"unknown lr_schedule {lr_schedule!r}: take one of {', '.join(SCHEDULES)}")
    if not 0 < lr < math.inf:
        raise AezooError(f"lr must be above 0 and finite, got {lr}")
    if not 0 <= weight_decay < math.inf:
        raise AezooError(f"weight_decay must be at least 0 and finite, got {weight_decay}")
    if warmup_steps < 0:
        raise AezooError(f"warmup_steps must be at least 0, got {warmup_steps}")


def build(name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimiser of that name; `sgd` has momentum 0.9."""
    settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if name == "sgd":
        settings["momentum"] = 0.9
    return OPTIMIZERS[name](parameters, **settings)


def schedule(optimizer: torch.optim.Optimizer, name: str, warmup_steps: int, trainer: "Trainer") -> LambdaLR:
    """A schedule over optimiser steps: linear warm-up, then `name` until the trainer's last step.

    The number of steps is read at the second step, when the loop knows it, since asking
    `Trainer.estimated_stepping_batches` here would build the loaders before their state is restored (Lightning #20550).

    Raises:
        AezooError: the schedule falls to an end and the trainer has none.
    """
    if name != "constant" and trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise AezooError(f"lr_schedule={name!r} needs an end: set --trainer.max_epochs or --trainer.max_steps")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if name == "constant" or step == 0:
            return 1.0
        progress = (step - warmup_steps) / max(1, total_steps(trainer) - warmup_steps)
        return SCHEDULES[name](min(1.0, max(0.0, progress)))

    return LambdaLR(optimizer, factor)


def renew(optimizer: torch.optim.Optimizer, scheduler: LambdaLR | None, lr: float, weight_decay: float) -> None:
    """Set what was asked for over what a checkpoint has restored, at the schedule's present point."""
    factors = [1.0] * len(optimizer.param_groups)
    if scheduler is not None:
        scheduler.base_lrs = [lr] * len(factors)
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group.update(lr=lr * factor, initial_lr=lr, weight_decay=weight_decay)


def total_steps(trainer: "Trainer") -> int:
    """Optimiser steps of the whole fit; valid once the training loop has its loader.

    Raises:
        AezooError: the loader has no length and the trainer no last step.
    """
    if trainer.max_epochs is None or trainer.max_epochs == -1:
        return trainer.max_steps
    if math.isinf(trainer.num_training_batches):
        if trainer.max_steps == -1:
            raise AezooError("lr_schedule needs an end and this loader has no length: set --trainer.max_steps")
        return trainer.max_steps
    steps = trainer.max_epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
