"""Steps of torch's fused Adam by its kernel alone.

`Optimizer.step` gathers parameters, gradients and moments anew in every step, sorts them by device and type, counts
each parameter's steps by an operation of its own and opens a record for torch's profiler. On a CPU that takes as long
as the update of 200,000 parameters. `FusedStep` looks once, and then calls the same kernel with the same numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW
from torch.optim import optimizer as of_torch

# private to torch: where one is missing, steps are torch's
_KNOWN = (
    all(hasattr(torch, name) for name in ("_fused_adam_", "_fused_adamw_"))
    and all(hasattr(of_torch, name) for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"))
    and all(hasattr(Adam([nn.Parameter(torch.zeros(1))]), f"_optimizer_step_{when}_hooks") for when in ("pre", "post"))
)


class Group(NamedTuple):
    """A parameter group, ready for the kernel.

    Attributes:
        settings: torch's own, read again in each step since schedules change them.
        parameters: those that have had gradients.
        idle: those that have not.
        tensors: moments and, last, the counts of steps, in the kernel's order.
        counted: all counts in one tensor, which those of `tensors` are views of.
        kernel: the update.
    """

    settings: dict[str, Any]
    parameters: list[nn.Parameter]
    idle: list[nn.Parameter]
    tensors: list[list[Tensor]]
    counted: Tensor
    kernel: Callable[..., Any]

    @property
    def changed(self) -> list[Tensor]:
        """All that a step changes, in place."""
        *moments, _ = self.tensors
        return [*_in_order(self.parameters), *(tensor for kind in moments for tensor in kind), self.counted]

    @property
    def squares(self) -> list[Tensor]:
        """The second moments."""
        return self.tensors[1]


def _in_order(tensors: list[Any]) -> list[Any]:
    """The same numbers in the order of memory: of weights in channels_last the kernel makes copies that it drops."""
    return [t.permute(0, 2, 3, 1) if t.dim() == 4 and not t.is_contiguous() else t for t in tensors]


class FusedStep:
    """Does what `optimizer.step()` does, bit for bit; for one epoch or less, since it keeps what it has looked up.

    A step is torch's own where the kernel alone would not do the same: of another optimiser than a fused Adam or AdamW
    on the CPU, the first one, and any with hooks on it, under a gradient scaler or without some of the gradients.

    Args:
        optimizer: any of torch's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        step = vars(optimizer).get("step")
        # a schedule wraps a first step to see that it comes before its own
        own_step = step is None or hasattr(step, "_wrapped_by_lr_sched")
        self._suits = type(optimizer) in (Adam, AdamW) and own_step and _KNOWN
        self._state: Any = None
        self._groups: list[Group] = []

    @property
    def groups(self) -> list[Group]:
        """What steps change, one list as long as that holds; empty where it may become more or steps are torch's."""
        known = self._suits and self._state is self._optimizer.state and not any(group.idle for group in self._groups)
        return self._groups if known else []

    def __call__(self) -> None:
        optimizer = self._optimizer
        if not self._suits or self._is_watched():
            optimizer.step()
            return
        if self._state is not optimizer.state or self._has_grown():
            optimizer.step()
            self._look_up()
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

    def _is_watched(self) -> bool:
        """Somebody's code belongs to a step, or a device decides whether it is taken."""
        optimizer: Any = self._optimizer
        return bool(
            optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or of_torch._global_optimizer_pre_hooks
            or of_torch._global_optimizer_post_hooks
            or getattr(optimizer, "found_inf", None) is not None
        )

    def _has_grown(self) -> bool:
        return len(self._groups) != len(self._optimizer.param_groups) or any(
            len(group.settings["params"]) != len(group.parameters) + len(group.idle)
            or any(parameter.grad is not None for parameter in group.idle)
            for group in self._groups
        )

    def _look_up(self) -> None:
        optimizer = self._optimizer
        for settings in optimizer.param_groups:
            plain = bool(settings["fused"]) and not settings["capturable"]
            self._suits &= plain and all(parameter.is_cpu for parameter in settings["params"])
        if self._suits:
            self._state = optimizer.state
            self._groups = [self._group(settings) for settings in optimizer.param_groups]

    def _group(self, settings: dict[str, Any]) -> Group:
        states = {p: self._state[p] for p in settings["params"] if self._state.get(p)}
        counted = torch.stack([state["step"] for state in states.values()]) if states else torch.zeros(0)
        for state, count in zip(states.values(), counted.unbind(), strict=True):
            state["step"] = count
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
        return Group(
            settings,
            [*states],
            [p for p in settings["params"] if p not in states],
            [_in_order([state[name] for state in states.values() if name in state]) for name in names],
            counted,
            torch._fused_adamw_ if settings["decoupled_weight_decay"] else torch._fused_adam_,
        )
