"""Hand-written PyTorch loops: the yardstick, and the one that textbooks print."""

import ctypes
import sys
from typing import Any

import torch
from torch import Tensor

from .job import Clock, Job
from .networks import Network, loss_on_logits, loss_on_probabilities, order, rows

# of malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_pages() -> bool:
    """Let glibc keep freed memory: activations that are mapped anew each step cost page faults."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 2**30) and mallopt(_TRIM_THRESHOLD, 2**30))


def compiled(job: Job) -> dict[str, Any]:
    """As fast as a PyTorch loop by hand gets.

    Options, to measure what each is worth: no-compile, no-channels-last, no-malloc, compiled-optimizer.
    """
    if "no-malloc" not in job.options:
        keep_pages()
    torch.manual_seed(job.seed)
    torch.set_flush_denormal(True)
    network, data = Network(job), rows(job)
    channels_last = job.variational and "no-channels-last" not in job.options
    if channels_last:
        # torch's stub lacks this overload
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), lr=job.lr, fused=True)
    bf16 = job.precision == "bf16"

    def forward(batch: Tensor) -> Tensor:
        x = batch.float() / 255
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return loss_on_logits(network, x, job.variational)

    # two graphs, one for whole batches and one for the last; shapes as variables would make both slower
    loss_of = forward if "no-compile" in job.options else torch.compile(forward, fullgraph=True, dynamic=False)
    update = torch.compile(optimizer.step) if "compiled-optimizer" in job.options else optimizer.step
    buffer, clock, n = torch.empty_like(data[: job.batch]), Clock(job), len(data)
    for epoch in range(job.epochs):
        clock.begin()
        total, permutation = torch.zeros(()), order(job, n, epoch)
        for start in range(0, n, job.batch):
            index = permutation[start : start + job.batch]
            batch = torch.index_select(data, 0, index, out=buffer[: len(index)])
            loss = loss_of(batch)
            loss.backward()
            update()
            optimizer.zero_grad(set_to_none=True)
            total.add_(loss.detach(), alpha=len(index))
            clock.stepped()
        clock.end(float(total) / n)
    return clock.result(sum(p.numel() for p in network.parameters()), torch=torch.__version__)


def textbook(job: Job) -> dict[str, Any]:
    """Float data, slices by index, sigmoid and cross-entropy, plain Adam."""
    torch.manual_seed(job.seed)
    network, data = Network(job), rows(job).float() / 255
    optimizer = torch.optim.Adam(network.parameters(), lr=job.lr)
    clock, n = Clock(job), len(data)
    for epoch in range(job.epochs):
        clock.begin()
        total, permutation = 0.0, order(job, n, epoch)
        for start in range(0, n, job.batch):
            x = data[permutation[start : start + job.batch]]
            loss = loss_on_probabilities(network, x, job.variational)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x)
            clock.stepped()
        clock.end(total / n)
    return clock.result(sum(p.numel() for p in network.parameters()), torch=torch.__version__)
