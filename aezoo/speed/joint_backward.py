"""A loss and its gradients as one compiled graph, without torch's autograd engine.

A compiled loss is two graphs, one for the forward pass and one for the backward pass, which the engine runs. As one
graph they are a tenth faster for 784-128-64-32-64-128-784, with the same results bit for bit. This requires TorchDynamo
to trace `torch.autograd.grad`, with a setting that may disappear; without it a step remains two graphs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aezoo.training.compilation import Compiled

Terms = tuple[dict[str, Tensor], Tensor]
_SETTING = "trace_autograd_ops"
# private to torch: where one is missing, gradients count as watched
GRADIENT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def can_trace() -> bool:
    """Whether this torch version supports it; imports its compiler."""
    try:
        import torch._dynamo.config as settings
    except ImportError:
        return False
    return hasattr(settings, _SETTING)


class JointStep(Compiled):
    """Terms of a loss whose gradients are set on the module's parameters; compiled as in `Compiled`.

    A failure to compile gives no warning: the loss without gradients may still compile, and warns if it does not.

    Args:
        module: all of its trained parameters get their gradients, and other parameters none.
        terms: the terms of a batch, including the loss, by name and as one vector.
        mode: as for `Compiled`, with before_retry and least.
    """

    def __init__(
        self,
        module: nn.Module,
        terms: Callable[[Tensor, Tensor | None], Terms],
        mode: str,
        before_retry: Callable[[], None],
        least: int = 0,
    ) -> None:
        super().__init__(self._with_gradients, mode, before_retry, least)
        self._terms, self._module = terms, module
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Look up the parameters; a step checks which of them are trained, and whether they have been replaced."""
        self._parameters = list(self._module.parameters())

    @property
    def works(self) -> bool:
        """Whether compilation has not failed so far."""
        return self._compiled is not None

    @property
    def matches(self) -> bool:
        """Whether there are trained parameters, and none has hooks, which only the engine calls."""
        hooked = any(getattr(p, name, True) for p in self._parameters for name in GRADIENT_HOOKS)
        return not hooked and any(p.requires_grad for p in self._parameters)

    def step(self, x: Tensor, y: Tensor | None) -> Terms:
        """The terms, without gradients; sets the gradients of the parameters."""
        import torch._dynamo.config as settings

        before = getattr(settings, _SETTING)
        setattr(settings, _SETTING, True)
        try:
            terms, values, trained, gradients = self(x, y)
        finally:
            setattr(settings, _SETTING, before)
        for parameter in (*self._parameters, *trained):
            parameter.grad = None
        found = [(p, gradient) for p, gradient in zip(trained, gradients, strict=True) if gradient is not None]
        apart = len({gradient.data_ptr() for _, gradient in found}) == len(found)
        for parameter, gradient in found:
            # as the engine leaves them: with the weights' memory layout, and without shared memory
            fits = apart and gradient.stride() == parameter.stride()
            parameter.grad = gradient if fits else torch.empty_like(parameter).copy_(gradient)
        return terms, values

    def _with_gradients(self, x: Tensor, y: Tensor | None) -> tuple[dict[str, Tensor], Tensor, list[Any], Any]:
        terms, values = self._terms(x, y)
        # reading requires_grad inside the graph makes the graph's guards check it
        trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        # the engine is called outside of autocast
        with torch.autocast(x.device.type, enabled=False):
            gradients = torch.autograd.grad(terms["loss"], trained, allow_unused=True)
        return {name: term.detach() for name, term in terms.items()}, values, trained, gradients

    def _warn(self, error: Exception) -> None:
        pass
