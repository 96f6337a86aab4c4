"""Random numbers that depend on the current task, not on earlier draws."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MASK = 2**63 - 1
# the increment of splitmix64
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def mix(*numbers: int) -> int:
    """One seed below 2^63 from integers; changing any of them, or their order, gives another seed.

    Uses one step of splitmix64 (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195) for each number.
    """
    x = 0x9E3779B97F4A7C15
    for number in numbers:
        x = ((x ^ (number + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 31
    return x & _MASK


def uniform(rows: Tensor, n: int, *numbers: int) -> Tensor:
    """Random numbers in [0, 1), n for each row, which depend only on `numbers` and that row: (B,) -> (B, n), float64.

    Each row has a separate stream of splitmix64.

    Args:
        rows: integers of at least 0, on the CPU.
        n: draws for each.
        numbers: the seed, as for `mix`.
    """
    starts = _finalise(rows.numpy().astype(np.uint64) * _GAMMA + np.uint64(mix(*numbers)))
    bits = _finalise(starts[:, None] + np.arange(1, n + 1, dtype=np.uint64) * _GAMMA)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _finalise(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of splitmix64; products are modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
    """Restore torch's random states at the end, so that draws and seeds inside have no effect on them."""
    # torch's fork_rng covers the CPU and CUDA; manual_seed also seeds Apple's GPUs
    apple = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        if apple is not None:
            torch.mps.set_rng_state(apple)
