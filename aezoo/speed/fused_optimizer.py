"""An optimiser's steps by its fused kernel alone, and the tensors that they change.

`Optimizer.step` collects parameters, gradients and moments in every step, sorts them by device and type, increments
each parameter's step count separately and opens a record for torch's profiler. On a CPU that takes as long as the
update of 200,000 parameters. `FusedStep` collects them once, and then calls the same kernel with the same arguments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop
from torch.optim import optimizer as of_torch

from aezoo.speed.parts import is_enabled

# private to torch: where one is missing, steps are torch's
_KNOWN = (
    all(hasattr(torch, name) for name in ("_fused_adam_", "_fused_adamw_"))
    and all(hasattr(of_torch, name) for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"))
    and all(hasattr(Adam([nn.Parameter(torch.zeros(1))]), f"_optimizer_step_{when}_hooks") for when in ("pre", "post"))
)


class Memory(NamedTuple):
    """How an optimiser accumulates gradients.

    Attributes:
        state: name of the accumulator.
        power: power of a gradient in it.
        share: weight of a new gradient, by the group's settings.
        left: factor of the old value in a step.
    """

    state: str
    power: int
    share: Callable[[dict[str, Any]], float]
    left: Callable[[dict[str, Any]], float]


def _average(state: str, beta: Callable[[dict[str, Any]], float]) -> Memory:
    return Memory(state, 2, lambda settings: 1 - beta(settings), beta)


def _beta2(settings: dict[str, Any]) -> float:
    return float(settings["betas"][1])


_OF_ADAM = _average("exp_avg_sq", _beta2)
# torch.optim's documentation has the formulas; the momentum of SGD forgets too soon, and may cancel
_MEMORIES: dict[type, Memory] = {
    **dict.fromkeys((Adam, AdamW, NAdam, RAdam), _OF_ADAM),
    Adamax: Memory("exp_inf", 1, lambda settings: 1.0, _beta2),
    RMSprop: _average("square_avg", lambda settings: settings["alpha"]),
    Adadelta: _average("square_avg", lambda settings: settings["rho"]),
    Adagrad: Memory("sum", 2, lambda settings: 1.0, lambda settings: 1.0),
}


class Group(NamedTuple):
    """A parameter group with what a step needs.

    Attributes:
        settings: torch's group, read again in each step since schedules change it.
        parameters: parameters with gradients.
        idle: parameters without gradients.
        states: torch's state of each parameter.
        memory: how past gradients are accumulated.
        tensors: moments and, last, step counts, in the kernel's order; empty without a kernel.
        counted: all step counts in one tensor, of which those of `tensors` are views; None without a kernel.
        kernel: the fused update, if it is called directly.
        members: all parameters, if foreign code may replace them.
        found: dictionaries, keys and values that show whether foreign code has changed the state.
    """

    settings: dict[str, Any]
    parameters: list[nn.Parameter]
    idle: list[nn.Parameter]
    states: list[dict[str, Tensor]]
    memory: Memory
    tensors: list[list[Tensor]]
    counted: Tensor | None
    kernel: Callable[..., Any] | None
    members: list[nn.Parameter]
    found: list[tuple[dict[Any, Any], Any, Any]]

    @property
    def changed(self) -> list[Tensor]:
        """All tensors that a step changes in place."""
        counts = [] if self.counted is None else [self.counted]
        held = (v for state in self.states for name, v in state.items() if not (counts and name == "step"))
        return [*_in_order(self.parameters), *_in_order([*held]), *counts]

    @property
    def decay(self) -> float:
        """The factor of a squared gradient one step later."""
        return self.memory.left(self.settings) ** (2 / self.memory.power)

    def most_squared(self, steps: int) -> float:
        """An upper bound of the sum of squared gradients of any of the last steps; NaN if one was NaN."""
        held = [state[self.memory.state] for state in self.states]
        squares = held if self.memory.power == 2 else [v.square() for v in held]
        total = sum(float(v.sum()) for v in squares)
        seen = self.memory.share(self.settings) ** (2 / self.memory.power) * self.decay**steps
        return total / seen if seen else float("inf")


def _in_order(tensors: list[Any]) -> list[Any]:
    """The same values in memory order: the kernel would copy weights in channels_last and drop the copies."""
    return [t.permute(0, 2, 3, 1) if t.dim() == 4 and not t.is_contiguous() else t for t in tensors]


def has_step_of_class(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` is the method of the optimiser's class; schedules may wrap it to check the order of calls."""
    own = vars(optimizer).get("step")
    return own is None or hasattr(own, "_wrapped_by_lr_sched")


class FusedStep:
    """The same as `optimizer.step()`, bit for bit; for at most one epoch, since it caches its lookups.

    It calls torch's step if the kernel alone would not do the same: for other optimisers than a fused Adam or AdamW on
    the CPU, in the first step, and with hooks, a gradient scaler or missing gradients.

    Args:
        optimizer: any of torch's.
        alone: no foreign code runs between steps that could change more of the optimiser than its settings.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, alone: bool = False) -> None:
        self._optimizer, self._alone = optimizer, alone
        # whether its state says all, and whether its kernel is called by itself
        self._suits = type(optimizer) in _MEMORIES and has_step_of_class(optimizer) and _KNOWN
        self._has_kernel = self._suits and type(optimizer) in (Adam, AdamW) and is_enabled("fused_optimizer")
        self._state: Any = None
        self._groups: list[Group] = []

    @property
    def groups(self) -> list[Group]:
        """The groups of the next step, the same list while they stay valid; empty if a step may change more."""
        known = self._suits and self._state is self._optimizer.state and not self._has_changed()
        return self._groups if known else []

    def __call__(self) -> None:
        optimizer = self._optimizer
        if not self._suits or self.is_watched():
            optimizer.step()
            return
        if self._state is not optimizer.state or self._has_changed():
            optimizer.step()
            self._find_hooks()
            return
        given = [[parameter.grad for parameter in group.parameters] for group in self._groups]
        if not self._has_kernel or any(gradient is None for gradients in given for gradient in gradients):
            optimizer.step()
            return
        with torch.no_grad():
            for group, gradients in zip(self._groups, given, strict=True):
                if not gradients or group.counted is None or group.kernel is None:
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
        return bool(
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
        self._state = optimizer.state
        self._groups = [self._group(settings) for settings in optimizer.param_groups]

    def _group(self, settings: dict[str, Any]) -> Group:
        # one that has had gradients and has none now would leave each step to torch
        states = {p: self._state[p] for p in settings["params"] if p.grad is not None and self._state.get(p)}
        idle = [p for p in settings["params"] if p not in states]
        held, memory = [*states.values()], _MEMORIES[type(self._optimizer)]
        if not self._has_kernel:
            return Group(settings, [*states], idle, held, memory, [], None, None, *self._seen(settings, states))
        counted = torch.stack([state["step"] for state in held]) if states else torch.zeros(0)
        for state, count in zip(held, counted.unbind(), strict=True):
            state["step"] = count
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
        tensors = [_in_order([state[name] for state in held if name in state]) for name in names]
        kernel = torch._fused_adamw_ if settings["decoupled_weight_decay"] else torch._fused_adam_
        return Group(settings, [*states], idle, held, memory, tensors, counted, kernel, *self._seen(settings, states))

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
