"""Optimiser steps by direct calls of the fused kernel.

`Optimizer.step` collects parameters, gradients and moments in every step, sorts them by device and type, increments
each parameter's step count separately and opens a record for torch's profiler. On a CPU that takes as long as the
update of 200,000 parameters. `FusedStep` collects them once, and then calls the same kernel with the same arguments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW
from torch.optim import optimizer as of_torch

from aezoo.speed.parts import is_enabled

# private to torch: where one is missing, steps are torch's
_NEEDED: tuple[tuple[Any, tuple[str, str]], ...] = (
    (torch, ("_fused_adam_", "_fused_adamw_")),
    (of_torch, ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")),
    (Adam([nn.Parameter(torch.zeros(1))]), ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")),
)
_KNOWN = all(hasattr(owner, name) for owner, names in _NEEDED for name in names)


class Group(NamedTuple):
    """A parameter group with what a step needs.

    Attributes:
        settings: torch's group, read again in each step since schedules change it.
        parameters: parameters with gradients.
        idle: parameters without gradients.
        tensors: moments and, last, step counts, in the kernel's order.
        counted: all step counts in one tensor, of which those of `tensors` are views.
        kernel: the fused update.
        members: all parameters, if other code may replace them.
        found: dictionaries, keys and values that show whether other code has changed the state.
    """

    settings: dict[str, Any]
    parameters: list[nn.Parameter]
    idle: list[nn.Parameter]
    tensors: list[list[Tensor]]
    counted: Tensor
    kernel: Callable[..., Any]
    members: list[nn.Parameter]
    found: list[tuple[dict[Any, Any], Any, Any]]


def _in_order(tensors: list[Any]) -> list[Any]:
    """The same values in memory order: the kernel would copy weights in channels_last and drop the copies."""
    return [t.permute(0, 2, 3, 1) if t.dim() == 4 and not t.is_contiguous() else t for t in tensors]


def has_step_of_class(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` is the method of the optimiser's class; schedules may wrap it to check the order of calls."""
    own = vars(optimizer).get("step")
    return own is None or hasattr(own, "_wrapped_by_lr_sched")


class FusedStep:
    """The same as `optimizer.step()`, bit for bit; for at most one epoch, since it caches its lookups.

    Torch's step is called if the kernel would not do the same: for optimisers other than a fused Adam or AdamW on the
    CPU, in the first step, and with hooks, a gradient scaler or missing gradients.

    Args:
        optimizer: any of torch's.
        alone: no other code runs between steps that could change more of the optimiser than its settings.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, alone: bool = False) -> None:
        self._optimizer, self._alone = optimizer, alone
        known = _KNOWN and type(optimizer) in (Adam, AdamW) and has_step_of_class(optimizer)
        self._has_kernel = known and is_enabled("fused_optimizer")
        self._state: Any = None
        self._groups: list[Group] = []

    def __call__(self) -> None:
        optimizer = self._optimizer
        if not self._has_kernel or self.is_watched():
            optimizer.step()
            return
        if self._state is not optimizer.state or self._has_changed():
            optimizer.step()
            self._find_hooks()
            return
        given = [[parameter.grad for parameter in group.parameters] for group in self._groups]
        if any(gradient is None for gradients in given for gradient in gradients):
            optimizer.step()
            return
        with torch.no_grad():
            for group, gradients in zip(self._groups, given, strict=True):
                if not gradients:
                    continue
                settings = group.settings
                beta1, beta2 = settings["betas"]
                group.counted.add_(1)
                group.kernel(
                    _in_order(group.parameters),
                    _in_order(gradients),
                    *group.tensors,
                    lr=settings["lr"],
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=settings["weight_decay"],
                    eps=settings["eps"],
                    amsgrad=settings["amsgrad"],
                    maximize=settings["maximize"],
                )

    def is_watched(self) -> bool:
        """Whether hooks belong to a step, or a gradient scaler decides on the device whether it is taken."""
        optimizer: Any = self._optimizer
        return not _KNOWN or bool(
            optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or of_torch._global_optimizer_pre_hooks
            or of_torch._global_optimizer_post_hooks
            or getattr(optimizer, "found_inf", None) is not None
        )

    def _has_changed(self) -> bool:
        return len(self._groups) != len(self._optimizer.param_groups) or any(
            len(group.settings["params"]) != len(group.parameters) + len(group.idle)
            or any(a is not b for a, b in zip(group.settings["params"], group.members, strict=False))
            or any(parameter.grad is not None for parameter in group.idle)
            or any(of.get(key) is not value for of, key, value in group.found)
            for group in self._groups
        )

    def _find_hooks(self) -> None:
        optimizer = self._optimizer
        for settings in optimizer.param_groups:
            plain = bool(settings.get("fused")) and not settings.get("capturable")
            self._has_kernel &= plain and all(parameter.is_cpu for parameter in settings["params"])
        if self._has_kernel:
            self._state = optimizer.state
            self._groups = [self._group(settings) for settings in optimizer.param_groups]

    def _group(self, settings: dict[str, Any]) -> Group:
        # one that has had gradients and has none now would leave each step to torch
        states = {p: self._state[p] for p in settings["params"] if p.grad is not None and self._state.get(p)}
        idle = [p for p in settings["params"] if p not in states]
        held = [*states.values()]
        counted = torch.stack([state["step"] for state in held]) if states else torch.zeros(0)
        for state, count in zip(held, counted.unbind(), strict=True):
            state["step"] = count
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
        tensors = [_in_order([state[name] for state in held if name in state]) for name in names]
        kernel = torch._fused_adamw_ if settings["decoupled_weight_decay"] else torch._fused_adam_
        return Group(settings, [*states], idle, tensors, counted, kernel, *self._seen(settings, states))

    def _seen(self, settings: dict[str, Any], states: dict[Any, dict[str, Any]]) -> tuple[list[Any], list[Any]]:
        """Members and what was found of a group."""
        if self._alone:
            return [], []
        of_kernel = ("fused", "capturable", "amsgrad", "decoupled_weight_decay")
        found = [(settings, name, settings.get(name)) for name in of_kernel]
        found += [(self._state, parameter, state) for parameter, state in states.items()]
        for state in states.values():
            found += [(state, name, value) for name, value in state.items() if isinstance(value, Tensor)]
        return [*settings["params"]], found
