"""Inputs and results of a party's run; without torch, for environments that do not have it."""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        party: the party that trains.
        data: .npz with `x_train` and `x_val`, uint8 (N, *shape).
        weights: .npz with the initial weights in the order of the PyTorch network's parameters.
        shape: shape of a sample, channels first; it is flattened for the dense network.
        hidden_dims: widths of the dense encoder, or channels of the stages of stride 2 of the convolutional one.
        latent_dim: size of the code.
        variational: a Gaussian code and its KL term; otherwise an autoencoder with a rectified code.
        rows: training rows in the data file.
        batch: rows per step.
        epochs: passes over the rows; the first is warm-up.
        threads: number of threads.
        precision: fp32 or bf16.
        seed: seed of weights, order and noise.
        lr: Adam's learning rate.
        options: further options of the party.
        accelerator: cpu or cuda.
        started: `time.time()` at the start of the process.
    """

    party: str
    data: str
    weights: str
    shape: tuple[int, ...]
    hidden_dims: tuple[int, ...]
    latent_dim: int
    variational: bool
    rows: int
    batch: int
    epochs: int
    threads: int = 1
    precision: str = "fp32"
    seed: int = 0
    lr: float = 1e-3
    options: tuple[str, ...] = ()
    accelerator: str = "cpu"
    started: float = field(default_factory=time.time)

    @classmethod
    def read(cls, path: Path) -> "Job":
        """The job in a JSON file."""
        values: dict[str, Any] = json.loads(path.read_text())
        lists: dict[str, Any] = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**(values | lists))

    def order_seed(self, epoch: int) -> int:
        """Seed of an epoch's permutation, as in aezoo's sampler, so that all parties see the same batches."""
        return self.seed * 1_000_003 + epoch


class Clock:
    """Records the start, duration and loss of epochs.

    Args:
        job: the run; `first_step` counts from its `started`.
        wait: waits until an asynchronous device has finished; called before each time is taken.
    """

    def __init__(self, job: Job, wait: Callable[[], object] = lambda: None) -> None:
        self.job, self.wait = job, wait
        self.begins: list[float] = []
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.first_step: float | None = None

    def record_step(self) -> None:
        """Record the end of the first optimiser step; later calls have no effect."""
        if self.first_step is None:
            self.wait()
            self.first_step = time.time() - self.job.started

    def begin(self) -> None:
        """Record the start of an epoch."""
        self.wait()
        self.begins.append(time.perf_counter())

    def end(self, loss: float | None = None) -> None:
        """Record the end of an epoch and its loss, the mean over samples in nats."""
        self.wait()
        self.seconds.append(time.perf_counter() - self.begins[-1])
        if loss is not None:
            self.losses.append(loss)

    def result(self, parameters: int, **versions: str) -> dict[str, Any]:
        """The result for `benchmarks.peers`; `rates` are of epochs, `turns` include the time between epochs."""
        rows = self.job.rows
        turns = [after - before for before, after in pairwise(self.begins)]
        return {
            "rates": [rows / seconds for seconds in self.seconds],
            "turns": [rows / seconds for seconds in turns],
            "losses": self.losses,
            "first_step_s": self.first_step,
            "parameters": parameters,
            "versions": versions,
        }


def usage(started: float) -> dict[str, float | None]:
    """Peak memory in MB of this process, and its CPU seconds per second."""
    return {"peak_rss_mb": _peak_memory_mb(), "cores_used": time.process_time() / (time.time() - started)}


def _peak_memory_mb() -> float | None:
    status = Path("/proc/self/status")
    if status.is_file():
        # on Linux the peak of getrusage includes that of the parent process
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 / 1e6 if found else None
    if sys.platform == "win32":
        return None
    import resource

    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def run(party: Callable[[Job], dict[str, Any]], job: Job, folder: Path) -> dict[str, Any]:
    """Train in `folder`, where a party may write its logs and checkpoints."""
    os.chdir(folder)
    return party(job) | usage(job.started)
