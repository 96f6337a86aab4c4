"""Hand-written PyTorch loops: the fast reference, and a loop as in textbooks."""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .job import Job
from .networks import Network, build_clock, epoch_order, loss_on_logits, loss_on_probabilities, training_rows

Step = Callable[[], object]
# from malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_pages() -> bool:
    """Let glibc keep freed memory: mapping activations again in each step causes page faults."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 2**30) and mallopt(_TRIM_THRESHOLD, 2**30))


def prepare(job: Job) -> tuple[Network, Tensor, Callable[[Tensor], Tensor]]:
    """The network and the rows as bytes on the training device, and the loss of a batch of rows."""
    torch.manual_seed(job.seed)
    torch.set_flush_denormal(True)
    if job.accelerator == "cuda":
        # settings of the zoo's command line and of torch's tuning guide
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    network, data = Network(job).to(job.accelerator), training_rows(job).to(job.accelerator)
    channels_last = job.variational and "no-channels-last" not in job.options
    if channels_last:
        # stubs of torch before 2.15 do not have this overload
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
    bf16 = job.precision == "bf16"

    def forward(batch: Tensor) -> Tensor:
        x = batch.float() / 255
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(job.accelerator, torch.bfloat16, enabled=bf16):
            return loss_on_logits(network, x, job.variational)

    return network, data, forward


def compiled(job: Job) -> dict[str, Any]:
    """The fastest hand-written PyTorch loop.

    Options, to measure the gain of each optimisation: no-compile, no-channels-last, no-malloc, compiled-optimizer.
    """
    if "no-malloc" not in job.options:
        keep_pages()
    network, data, forward = prepare(job)
    optimizer = torch.optim.Adam(network.parameters(), lr=job.lr, fused=True)
    # one graph for full batches and one for the last; dynamic shapes would make both slower
    loss_of = forward if "no-compile" in job.options else torch.compile(forward, fullgraph=True, dynamic=False)
    update = torch.compile(optimizer.step) if "compiled-optimizer" in job.options else optimizer.step
    buffer, clock, n = torch.empty_like(data[: job.batch]), build_clock(job), len(data)
    for epoch in range(job.epochs):
        clock.begin()
        total, permutation = torch.zeros((), device=data.device), epoch_order(job, n, epoch).to(data.device)
        for start in range(0, n, job.batch):
            index = permutation[start : start + job.batch]
            batch = torch.index_select(data, 0, index, out=buffer[: len(index)])
            loss = loss_of(batch)
            loss.backward()
            update()
            optimizer.zero_grad(set_to_none=True)
            total.add_(loss.detach(), alpha=len(index))
            clock.record_step()
        clock.end(float(total) / n)
    return clock.result(sum(p.numel() for p in network.parameters()), torch=torch.__version__)


def capture_graph(step: Step) -> Step:
    """One CUDA graph of a step, as in torch's documentation: warm up on a side stream, then capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        step()
    return recorded.replay


def graph(job: Job, record: Callable[[Step], Step] = capture_graph) -> dict[str, Any]:
    """The bare loop with forward, backward and fused Adam in one CUDA graph; a second graph for the epoch's last batch.

    Not run on a GPU yet; tests run the recorded step on the CPU.

    Args:
        job: the run.
        record: turns a step into a function that repeats it, and may run the step; tests give one for the CPU.
    """
    network, data, forward = prepare(job)
    optimizer = torch.optim.Adam(network.parameters(), lr=job.lr, fused=True, capturable=True)
    total, clock, n = torch.zeros((), device=data.device), build_clock(job), len(data)

    def recorded(size: int) -> tuple[Tensor, Step]:
        """The input buffer of a step, and the recorded step."""
        batch = data[:size].clone()

        def step() -> None:
            # no gradients before the recording, so that the graph writes them instead of adding to them
            optimizer.zero_grad(set_to_none=True)
            loss = forward(batch)
            loss.backward()
            optimizer.step()
            total.add_(loss.detach(), alpha=size)

        return batch, record(step)

    untrained = [parameter.detach().clone() for parameter in network.parameters()]
    steps = {size: recorded(size) for size in {min(job.batch, n), n % job.batch} - {0}}
    with torch.no_grad():
        # undo the training steps of the warm-up, in place because the graphs refer to these tensors
        for parameter, value in zip(network.parameters(), untrained, strict=True):
            parameter.copy_(value)
            for moment in optimizer.state[parameter].values():
                moment.zero_()
    for epoch in range(job.epochs):
        clock.begin()
        total.zero_()
        for index in epoch_order(job, n, epoch).to(data.device).split(job.batch):
            batch, step = steps[len(index)]
            torch.index_select(data, 0, index, out=batch)
            step()
            clock.record_step()
        clock.end(float(total) / n)
    return clock.result(sum(p.numel() for p in network.parameters()), torch=torch.__version__)


def textbook(job: Job) -> dict[str, Any]:
    """Float data, slices by index, sigmoid and cross-entropy, plain Adam."""
    torch.manual_seed(job.seed)
    network, data = Network(job).to(job.accelerator), training_rows(job).float() / 255
    optimizer = torch.optim.Adam(network.parameters(), lr=job.lr)
    clock, n = build_clock(job), len(data)
    for epoch in range(job.epochs):
        clock.begin()
        total, permutation = 0.0, epoch_order(job, n, epoch)
        for start in range(0, n, job.batch):
            x = data[permutation[start : start + job.batch]].to(job.accelerator)
            loss = loss_on_probabilities(network, x, job.variational)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x)
            clock.record_step()
        clock.end(total / n)
    return clock.result(sum(p.numel() for p in network.parameters()), torch=torch.__version__)
