"""Timers, counters and the measured peak of the machine, for the rows of `speed`."""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from aezoo.speed.linear import linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_GEMMS: tuple[Any, ...] = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _GEMMS = (*_GEMMS, torch.ops.mkldnn._linear_pointwise)  # `aezoo.speed.linear`
_HEAVY = (*_GEMMS, torch.ops.aten.convolution, torch.ops.aten.convolution_backward, torch.ops.aten.mkldnn_convolution)
if hasattr(torch.ops.mkldnn, "_convolution_transpose_pointwise"):
    _HEAVY = (*_HEAVY, torch.ops.mkldnn._convolution_transpose_pointwise)  # `aezoo.speed.batch_inner_conv`
# CUDA's runtime and driver calls that start a kernel; a captured graph is one launch, however many kernels it contains
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
# names of copies between host and device in a trace; copies within the device do not count
_COPIES = ("Memcpy HtoD", "Memcpy DtoH")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes until the device has finished."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def matmul_peak(device: torch.device, precision: str, seconds: float = 0.6) -> float:
    """The highest speed at which this device multiplies square matrices in this process and precision, in FLOP/s."""
    sizes = (4096, 8192) if device.type == "cuda" else (512, 1024, 2048)
    best = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device, dtype=DTYPES[precision]) for _ in range(2))
        timed(lambda a=a, b=b: linear(a, b), device)  # type: ignore[misc]
        until = time.perf_counter() + seconds / len(sizes)
        while True:
            best = max(best, 2 * n**3 / timed(lambda a=a, b=b: linear(a, b), device))  # type: ignore[misc]
            if time.perf_counter() > until:
                break
    return best


def reset_peak_memory(device: torch.device) -> None:
    """Reset the measured peak of a GPU's memory; the peak of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory in MB: of the tensors on a GPU, or of this whole process with its libraries on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return None
    import resource

    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


# ---- work -----------------------------------------------------------------------------------------------------------


class FlopCounts(NamedTuple):
    """FLOPs per sample.

    Attributes:
        forward: FLOPs of a reconstruction.
        step: FLOPs of a training step's loss, forward and backward; the optimiser's are not counted.
        gemms: the FLOPs of `step` in matrix products.
    """

    forward: int
    step: int
    gemms: int


def count_flops(model: Any, x: Tensor) -> FlopCounts:
    """Count the FLOPs of a model on a batch with torch's counter: matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.eval()(x)
    with FlopCounterMode(display=False) as step:
        model.train().loss(x)["loss"].backward()
    counts = step.get_flop_counts()["Global"]
    gemms = sum(count for op, count in counts.items() if op in _GEMMS)
    return FlopCounts(*(total // len(x) for total in (forward.get_total_flops(), step.get_total_flops(), gemms)))


class _Recorder(TorchDispatchMode):
    """Records the matrix products and convolutions that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _HEAVY:
            self.calls.append(lambda: func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def seconds_of_products(model: Any, x: Tensor, precision: str, repeats: int = 3) -> float:
    """Seconds that the matrix products and convolutions of a training step take when they run back to back.

    Each is run with its shape, unlike in the peak measurement, and in the model's memory layout.
    """
    with autocast(x.device, precision), _Recorder() as recorder:
        model.train().loss(x)["loss"].backward()

    @torch.no_grad()
    def replay() -> None:
        for call in recorder.calls:
            call()

    replay()
    return statistics.median(timed(replay, x.device) for _ in range(repeats))


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """The autocast that Lightning's bf16-mixed puts around a step; nothing for fp32."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


# ---- callbacks ------------------------------------------------------------------------------------------------------


class StepTimer(pl.Callback):
    """Records when each of the first steps of a fit ended."""

    def __init__(self) -> None:
        self.done: list[float] = []
        self.first_at = 0.0
        self.began = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = self.began or time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        synchronize(pl_module.device)
        self.done.append(time.perf_counter())
        self.first_at = self.first_at or time.time()

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step, including the loader and hooks."""
        return [end - start for start, end in zip([self.began, *self.done], self.done, strict=False)]


class EpochTimer(pl.Callback):
    """Seconds of each epoch from its first batch to its last, without validation and checkpoints.

    It hooks only into epochs, so a step costs the same as for a user.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronize(pl_module.device)
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronize(pl_module.device)
        self.seconds.append(time.perf_counter() - self._began)

    on_predict_epoch_start = on_train_epoch_start
    on_predict_epoch_end = on_train_epoch_end


class GuardCost(pl.Callback):
    """Measures the cost of the fault guard: it runs in every second block, to compare steps with and without it.

    The time spent inside the guard would be misleading: the data that it reads are then cached for the optimiser, and
    the data that it evicts cost time later.

    Args:
        guard: the guard; from now on it does nothing in the first block, the third, and so on.
        block: batches per block; the first batch of each block and of each epoch does not count.
    """

    def __init__(self, guard: Any, block: int = 8) -> None:
        self._block, self._batch = block, 0
        self._ended: float | None = None
        self._blocks: list[list[float]] = []
        hooks = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")
        for name in (*hooks, "remember"):
            setattr(guard, name, self._only_in_odd_blocks(guard, getattr(guard, name), None))
        guard.is_finite_step = self._only_in_odd_blocks(guard, guard.is_finite_step, True)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ended = None

    def _only_in_odd_blocks(self, owner: Any, method: Callable[..., Any], default: Any) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            return method(*args) if self._batch // self._block % 2 else default

        wrapper.__self__ = owner  # type: ignore[attr-defined]  # as of a bound method
        return wrapper

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        now = time.perf_counter()
        if self._batch % self._block == 0:
            self._blocks.append([])
        elif self._ended is not None:
            self._blocks[-1].append(now - self._ended)
        self._ended, self._batch = now, self._batch + 1

    def shares(self, parts: int = 5) -> list[float]:
        """The guard's share of a step in each of `parts` parts of the fit, from medians; a short fit has fewer."""
        # the last block may have ended at its first batch
        pairs = [(off, on) for off, on in zip(self._blocks[::2], self._blocks[1::2], strict=False) if off and on]
        size = max(1, len(pairs) // parts)
        found = []
        for i in range(0, len(pairs) - size + 1, size):
            off, on = ([*itertools.chain(*steps)] for steps in zip(*pairs[i : i + size], strict=True))
            found.append(1 - statistics.median(off) / statistics.median(on))
        return found


class LaunchCounter(pl.Callback):
    """Counts kernel launches and copies between host and device over some steps of a fit.

    Args:
        skip: steps to skip first, which compile and capture.
        steps: steps to count.
    """

    def __init__(self, skip: int = 20, steps: int = 10) -> None:
        self.skip, self.steps = skip, steps
        self.kernels: float | None = None
        self.copies: float | None = None
        self._seen = 0
        self._profiler: Any = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        self._seen += 1
        if self._seen == self.skip:
            synchronize(pl_module.device)
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        elif self._seen == self.skip + self.steps:
            synchronize(pl_module.device)
            self._profiler.stop()
            self.kernels, self.copies = count_events((e.name for e in self._profiler.events()), self.steps)


def count_events(names: Iterable[str], steps: int) -> tuple[float, float]:
    """Kernel launches and host-device copies per step, from the names of a trace's events."""
    names = list(names)
    kernels = sum(name.startswith(_LAUNCHES) for name in names)
    return kernels / steps, sum(name.startswith(_COPIES) for name in names) / steps
