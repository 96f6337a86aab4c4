"""What makes a training step fast beyond its own mathematics: compilation, memory layout, denormals, malloc."""

import ctypes
import functools
import math
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from aezoo.errors import AezooError
from aezoo.speed import inductor_lowering, linear
from aezoo.speed.memory_format import ChannelsLast

MODES = ("auto", "off", "default", "reduce-overhead", "max-autotune")
# compiling may take this many seconds with an empty cache, and saves about this share of a step's arithmetic at this
# many FLOP/s per thread, which is 0.51 ms of the dense step (measured 0.25 to 0.7 ms when gradients were a separate
# graph, 1.3 ms on a Zen 5 since then, see benchmarks/results/speed-train-*.csv), or on a GPU this many seconds of
# launches per step
_COMPILE_SECONDS = 20.0
_SAVED_SHARE = 0.15
_FLOPS_PER_THREAD = 1e11
_SAVED_LAUNCHES = 5e-4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# from Linux's mman.h: huge pages from now on, and for existing pages at once
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_HUGE = 2**21
# less than malloc keeps
_ROOM = 3 * 2**28


def check_mode(mode: str) -> str:
    """The mode itself.

    Raises:
        AezooError: not one of `MODES`.
    """
    if mode not in MODES:
        raise AezooError(f"compile is {mode!r}: choose from {', '.join(MODES)}")
    return mode


def worth_compiling(parameters: int, batch_size: int, positions: int, steps: float, device: torch.device) -> bool:
    """Whether a run of `steps` steps earns back what compiling its step costs.

    The estimate uses sizes only, so the same command always decides the same: a resumed run must not differ.
    Convolutions on a CPU gain nothing, and lose the optimisations of `aezoo.speed.conv2d`.

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
    # stride-2 stages: most weights sit where the grid has shrunk to about a sixteenth of its points
    grid = max(1, math.prod(shape[1:]) // 16)
    return max(1, round((in_convolutions * grid + weights - in_convolutions) / max(1, weights)))


def full_batch(loader: Any) -> int:
    """Samples in a full batch of a loader; 0 if unknown."""
    size = getattr(loader, "batch_size", None)
    if not isinstance(size, int):
        return 0
    try:
        return min(size, len(loader.sampler))
    except (AttributeError, TypeError, NotImplementedError):  # a stream, or a user's own loader
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
        linear.straight_from_inductor = linear.MKL_HALF_WIDTH and inductor_lowering.teach()
        self._compiled: Callable[..., Any] | None = torch.compile(function, mode=mode, dynamic=False)
        self._size: int | None = None

    def __call__(self, x: torch.Tensor, *rest: Any) -> Any:
        compiles = self._size is None and len(x) >= self._least
        if compiles:
            self._size = len(x)
        # an epoch's last batch is not worth a second compilation
        if self._compiled is None or len(x) != self._size:
            return self._function(x, *rest)
        try:
            with compiled_alike() if compiles else nullcontext():
                return self._compiled(x, *rest)
        except Exception as error:  # every back end fails in its own way, later too where a step is compiled anew
            self._compiled = None
            self._before_retry()
            result = self._function(x, *rest)  # a fault of the model itself is raised here
            self._say(error)
            return result

    def _say(self, error: Exception) -> None:
        lines = [line.strip() for line in str(error).splitlines()]
        # dynamo's first line only names the back end
        cause = next((line for line in lines if line and not line.endswith("raised:")), type(error).__name__)
        rank_zero_warn(
            f"the step is not compiled and runs slower ({cause[:160]}): install what is missing, or give --compile off"
        )


@contextmanager
def compiled_alike() -> Iterator[None]:
    """Compile inside with the semantics of eager mode: no autocast in backward passes, and hooks added later run.

    Operations are not reordered for less memory either: torch 2.13 then reads an in-place sum before all is added, so
    that a step as one graph has zero gradients behind layers that double a grid. These are settings of torch's
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


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Flush denormal numbers to zero inside: processors add them up to 100 times slower."""
    before = bool((torch.full((1,), 1e-39) * 1.0 == 0).item())
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def to_channels_last(module: nn.Module) -> bool:
    """Give 2-D convolutions their faster memory layout, with the same values. Returns whether there are any."""
    if not any(isinstance(part, nn.Conv2d | nn.ConvTranspose2d) for part in module.modules()):
        return False
    _lay(module, torch.channels_last)
    return True


def to_channels_first(module: nn.Module) -> None:
    """Give weights torch's default memory layout again, with the same values."""
    _lay(module, torch.contiguous_format)


def _lay(module: nn.Module, memory_format: torch.memory_format) -> None:
    module.to(memory_format=memory_format)  # type: ignore[call-overload]
    for part in module.modules():
        if isinstance(part, ChannelsLast):
            part.on = memory_format is torch.channels_last


def expect_large_tensors() -> None:
    """Make glibc's malloc keep up to 64 MiB from step to step, as it does once a tensor of 32 MiB has been freed.

    malloc returns blocks to the system at once if they are larger than any freed before, up to 32 MiB: until a process
    has freed such a tensor, each step pays for page faults. `keep_pages` keeps more. This changes no setting and never
    touches the memory.
    """
    # not a tensor, which torch fills in deterministic mode
    torch.UntypedStorage(2**25 - 2**16, device="cpu")


def keep_pages() -> bool:
    """Let glibc's malloc keep the pages of large tensors from step to step, for the rest of the process.

    By default it returns and refetches them, and each step pays for the page faults: 54 % on 3x64x64 convolutions. If
    the kernel gives huge pages on request, the pages are huge, and the TLB covers a whole step: 2 to 4 % on
    convolutions. The setting is process-wide, so only the command line makes it. Returns whether it was made.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # older versions of glibc take no more than 32 MiB
    kept = all(mallopt(setting, 2**30) or mallopt(setting, 2**25) for setting in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
    _ask_for_huge_pages()
    return kept


@functools.cache
def _ask_for_huge_pages() -> None:
    """For malloc's heap, now and as it grows; a refusal changes nothing."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # a block that takes no memory until it is used, and that malloc keeps when it is freed
    room = libc.malloc(ctypes.c_size_t(_ROOM))
    for start, end in _heap():
        if room is not None and start <= room < end:
            libc.madvise(start, end - start, _MADV_HUGEPAGE)
            libc.madvise(start, room - room % _HUGE - start, _MADV_COLLAPSE)
    libc.free(room)


def _heap() -> list[tuple[int, int]]:
    """The address ranges of malloc's heap, if the kernel lists them."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    ranges = [line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith("[heap]")]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


def announce(mode: str, chosen: bool, steps_differ: bool = False) -> None:
    """Log whether the step is compiled, and why."""
    if steps_differ and mode != "off":
        rank_zero_info("training step: not compiled, because it computes different things from step to step")
    elif mode == "auto":
        why = "the run is long enough to earn it back" if chosen else "a short run, or convolutions on a CPU"
        what = f"is {'' if chosen else 'not '}compiled ({why})"
        rank_zero_info(f"training step: {what}; --compile {'off' if chosen else 'default'} changes that")
    elif chosen:
        rank_zero_info(f"training step: compiled ({mode}); the first step waits for it")
