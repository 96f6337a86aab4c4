"""Memory of large tensors: glibc's malloc keeps it from step to step, in huge pages."""

import ctypes
import functools
import platform
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# from Linux's mman.h
_MADV_HUGEPAGE = 14
# below the size from which malloc returns blocks to the system
_ROOM = 3 * 2**28


def expect_large_tensors() -> None:
    """Make glibc's malloc keep up to 64 MiB from step to step, as it does once a tensor of 32 MiB has been freed.

    malloc returns blocks to the system at once if they are larger than any freed before, up to 32 MiB: until a process
    has freed such a tensor, each step causes page faults. `keep_pages` keeps more. This changes no setting and does not
    write to the memory.
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
    """Request huge pages for malloc's heap, now and as it grows; a refusal has no effect.

    Existing pages become huge in the background: MADV_COLLAPSE would do this at once, but takes 1.4 s.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # a block that takes no memory until it is used; malloc keeps the space when it is freed
    room = libc.malloc(ctypes.c_size_t(_ROOM))
    for start, end in _heap():
        if room is not None and start <= room < end:
            libc.madvise(start, end - start, _MADV_HUGEPAGE)
    libc.free(room)


def _heap() -> list[tuple[int, int]]:
    """The address ranges of malloc's heap, if the kernel lists them."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    ranges = [line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith("[heap]")]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]
