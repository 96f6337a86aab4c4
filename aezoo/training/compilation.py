"""Compilation of a training step where it saves time."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from aezoo.deprecated import renamed
from aezoo.errors import AezooError

MODES = ("auto", "off", "default", "reduce-overhead", "max-autotune")
# estimates: seconds to compile with an empty cache; the share of a step's arithmetic that compiling saves, at this
# many FLOP/s per thread, which is 0.51 ms for the dense step (measured: 0.25 to 0.7 ms when gradients were a separate
# graph, 1.3 ms on a Zen 5 since then, see benchmarks/results/speed-train-*.csv); seconds of launches that it saves per
# step on a GPU
_COMPILE_SECONDS = 20.0
_SAVED_SHARE = 0.15
_FLOPS_PER_THREAD = 1e11
_SAVED_LAUNCHES = 5e-4


def check_mode(mode: str) -> str:
    """Return the mode if it is valid.

    Raises:
        AezooError: not one of `MODES`.
    """
    if mode not in MODES:
        raise AezooError(f"compile is {mode!r}: choose from {', '.join(MODES)}")
    return mode


def worth_compiling(parameters: int, batch_size: int, positions: int, steps: float, device: torch.device) -> bool:
    """Whether a run of `steps` steps saves more time by a compiled step than compiling takes.

    The estimate uses sizes only, so that a resumed run makes the same decision.
    Convolutions on a CPU gain nothing.

    Args:
        parameters: number of parameters.
        batch_size: samples per step.
        positions: how often a sample uses each parameter: 1 for dense layers, more for convolutions.
        steps: optimiser steps of the whole run.
        device: where it trains.
    """
    if not math.isfinite(steps) or (device.type == "cpu" and positions > 1):
        return False
    if device.type == "cuda":
        return steps * _SAVED_LAUNCHES > _COMPILE_SECONDS
    flops = 6.0 * parameters * positions * batch_size  # forward 2, backward 4
    return steps * flops * _SAVED_SHARE / (_FLOPS_PER_THREAD * torch.get_num_threads()) > _COMPILE_SECONDS


def positions(module: nn.Module, shape: tuple[int, ...]) -> int:
    """How often a sample uses a module's weights on average, estimated from convolutions and the sample's grid."""
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    weights = sum(p.numel() for p in module.parameters())
    in_convolutions = sum(part.weight.numel() for part in module.modules() if isinstance(part, convolution))
    # with stages of stride 2, most weights are applied to a grid of about a sixteenth of the points
    grid = max(1, math.prod(shape[1:]) // 16)
    return max(1, round((in_convolutions * grid + weights - in_convolutions) / max(1, weights)))


def full_batch(loader: Any) -> int:
    """Samples in a full batch of a loader; 0 if unknown."""
    size = getattr(loader, "batch_size", None)
    if not isinstance(size, int):
        return 0
    try:
        return min(size, len(loader.sampler))
    except (AttributeError, TypeError, NotImplementedError):  # a stream, or a loader of the user
        return size


class Compiled:
    """A function compiled at its first call with a full batch, for that batch size; other sizes run uncompiled.

    If compiling fails it warns once, with the cause, and the function runs uncompiled from then on.

    Args:
        function: takes tensors, the first of them a batch.
        mode: default, reduce-overhead or max-autotune.
        before_retry: called before a call that failed to compile is repeated uncompiled.
        least: size of a full batch: a resumed run may begin with the smaller last batch of an epoch.
    """

    def __init__(
        self, function: Callable[..., Any], mode: str, before_retry: Callable[[], None], least: int = 0
    ) -> None:
        self._function, self._before_retry, self._least = function, before_retry, least
        self._compiled: Callable[..., Any] | None = torch.compile(function, mode=mode, dynamic=False)
        self._size: int | None = None

    def __call__(self, x: torch.Tensor, *rest: Any) -> Any:
        compiles = self._size is None and len(x) >= self._least
        if compiles:
            self._size = len(x)
        # a second compilation for the last batch of an epoch takes more time than it saves
        if self._compiled is None or len(x) != self._size:
            return self._function(x, *rest)
        try:
            with consistent_compilation() if compiles else nullcontext():
                return self._compiled(x, *rest)
        except Exception as error:  # each back end raises different errors, also when it recompiles
            self._compiled = None
            self._before_retry()
            result = self._function(x, *rest)  # an error of the model itself is raised here
            self._warn(error)
            return result

    def _warn(self, error: Exception) -> None:
        lines = [line.strip() for line in str(error).splitlines()]
        # dynamo's first line only names the back end
        cause = next((line for line in lines if line and not line.endswith("raised:")), type(error).__name__)
        rank_zero_warn(
            f"the step is not compiled and runs slower ({cause[:160]}): install what is missing, or give --compile off"
        )


@contextmanager
def consistent_compilation() -> Iterator[None]:
    """Compile inside with the semantics of eager mode: no autocast in backward passes, and hooks added later run.

    Operations are not reordered for less memory either: torch 2.13 then reads an in-place sum before all is added, so
    that a step as one graph has zero gradients before layers that double a grid. These are settings of torch's
    compilers, each of which may disappear. Checking for hooks costs no measurable time.
    """
    import torch._dynamo.config as of_graphs
    import torch._functorch.config as of_gradients
    import torch._inductor.config as of_loops

    wanted: tuple[tuple[Any, str, Any], ...] = (
        (of_gradients, "backward_pass_autocast", "off"),
        (of_graphs, "skip_nnmodule_hook_guards", False),
        (of_loops, "reorder_for_peak_memory", False),
    )
    with ExitStack() as stack:
        for settings, name, value in wanted:
            if hasattr(settings, name):
                stack.enter_context(settings.patch(name, value))
        yield


def announce(mode: str, chosen: bool, steps_differ: bool = False) -> None:
    """Log whether the step is compiled, and why."""
    if steps_differ and mode != "off":
        rank_zero_info("training step: not compiled, because the computation differs from step to step")
    elif mode == "auto":
        reason = "the run is long enough" if chosen else "a short run, or convolutions on a CPU"
        what = f"is {'' if chosen else 'not '}compiled ({reason})"
        rank_zero_info(f"training step: {what}; --compile {'off' if chosen else 'default'} changes that")
    elif chosen:
        rank_zero_info(f"training step: compiled ({mode}); the first step waits for it")


__getattr__ = renamed(__name__)
