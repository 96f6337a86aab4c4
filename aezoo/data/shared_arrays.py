"""One copy of samples in memory per machine, not one per process.

The first process of a machine puts its samples into anonymous memory (memfd_create of Linux). The others map it through
/proc, compare it with the samples that they have read, and free these. Nothing has to be cleaned up, not even after a
kill: the kernel frees the memory with the last process.
"""

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from aezoo.data.loaders import local_processes
from aezoo.data.resident import free_memory

# alignment in memory that suits any dtype
_ALIGNMENT = 64
_Layout = dict[str, tuple[int, tuple[int, ...], torch.dtype]]


def share(tensors: Mapping[str, Tensor], trainer: Trainer) -> None:
    """Store these tensors once per machine; all processes of the run call this.

    A process keeps its own tensor if the first process of its machine has none with this name and content. If memory
    cannot be shared at all, all keep their own tensors, and a one-line message says so.

    Args:
        tensors: on the CPU, by name; their memory is replaced, with the same values.
        trainer: of this process.
    """
    if local_processes(trainer) < 2 or not (dist.is_available() and dist.is_initialized()):
        return
    node, leads = trainer.node_rank, trainer.local_rank == 0
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_contiguous() and tensor.numel()}
    layout, size = _layout(tensors)
    file, reason = -1, ""
    told: list[Any] = [None] * dist.get_world_size()
    try:
        if leads:
            try:
                if 0 < free_memory(torch.device("cpu")) < size:
                    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
                file = os.memfd_create("aezoo-samples")
                os.posix_fallocate(file, 0, max(1, size))
                _replace(tensors, layout, _map(file))
            except (OSError, AttributeError, ValueError) as error:  # AttributeError: not on Linux
                reason = _reason(error)
        dist.all_gather_object(told, (node, os.getpid(), file, layout, reason) if leads else None)
        of_node = next(entry for entry in told if entry is not None and entry[0] == node)
        if not leads and not of_node[4]:
            reason = _adopt(tensors, *of_node[1:4])
        # the first process keeps the file open until all have mapped it
        dist.all_gather_object(told, reason or of_node[4])
    finally:
        if file >= 0:
            os.close(file)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc would otherwise not return the memory to the system
    if reason := next(filter(None, told), ""):
        rank_zero_info(f"each process has its own copy of the samples, because memory cannot be shared here: {reason}")


def _adopt(tensors: Mapping[str, Tensor], process: int, file: int, layout: _Layout) -> str:
    """Replace tensors by equal ones of another process; returns the reason if this is impossible."""
    try:
        opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
        try:
            buffer = _map(opened)
        finally:
            os.close(opened)
    except OSError as error:
        return _reason(error)
    known = {name: tensor for name, tensor in tensors.items() if name in layout}
    same = {name: tensor for name, tensor in known.items() if _is_equal(tensor, layout[name], buffer)}
    _replace(same, layout, buffer, fill=False)
    return "" if len(same) == len(tensors) else "processes have read different samples"


def _layout(tensors: Mapping[str, Tensor]) -> tuple[_Layout, int]:
    """Where each tensor begins, with its shape and dtype; and the size of all."""
    found: _Layout = {}
    end = 0
    for name, tensor in tensors.items():
        found[name] = (end, tuple(tensor.shape), tensor.dtype)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return found, end


def _map(file: int) -> mmap.mmap:
    return mmap.mmap(file, 0)


def _view(place: tuple[int, tuple[int, ...], torch.dtype], buffer: mmap.mmap) -> Tensor:
    start, shape, dtype = place
    return torch.frombuffer(buffer, dtype=dtype, count=torch.Size(shape).numel(), offset=start).view(shape)


def _replace(tensors: Mapping[str, Tensor], layout: _Layout, buffer: mmap.mmap, fill: bool = True) -> None:
    for name, tensor in tensors.items():
        shared = _view(layout[name], buffer)
        if fill:
            shared.copy_(tensor)
        tensor.data = shared  # for all objects that refer to this tensor


def _is_equal(own: Tensor, place: tuple[int, tuple[int, ...], torch.dtype], buffer: mmap.mmap) -> bool:
    """Whether a tensor has these bytes; missing values, NaN, are unequal as numbers."""
    if (tuple(own.shape), own.dtype) != place[1:]:
        return False
    shared = _view(place, buffer)
    return torch.equal(own.reshape(-1).view(torch.uint8), shared.reshape(-1).view(torch.uint8))


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)) or type(error).__name__
