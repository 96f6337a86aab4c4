"""Random numbers that depend on the current task, not on earlier draws."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_MASK = 2**63 - 1


def mix(*numbers: int) -> int:
    """One seed below 2^63 from integers; changing any of them, or their order, gives another seed.

    Uses one step of splitmix64 (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195) for each number.
    """
    x = 0x9E3779B97F4A7C15
    for number in numbers:
        x = ((x ^ (number + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 31
    return x & _MASK


def seed_all(seed: int, device: torch.device, *, others: bool = True) -> None:
    """Seed torch's streams on the CPU and on `device`, and those of NumPy and Python if `others`."""
    # torch.manual_seed seeds every backend, which costs more than a small step's loss
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    if others:
        random.seed(seed)
        np.random.seed(seed % 2**32)


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Restore torch's random states at the end, whatever is drawn or seeded inside."""
    # torch's fork_rng covers the CPU and CUDA; manual_seed also seeds Apple's GPUs
    apple = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        if apple is not None:
            torch.mps.set_rng_state(apple)
