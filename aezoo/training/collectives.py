"""Sums and batches over the processes of a run, with gradients.

torch.distributed.nn.functional is deprecated since torch 2.13, and its replacement is private.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad).chunk(dist.get_world_size())[dist.get_rank()]


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all processes, equal in each process: (...) -> (...)."""
    return _Sum.apply(values)


def all_gather_rows(values: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks: (B, ...) -> (N, ...); B is equal in all processes."""
    return _Gather.apply(values)
