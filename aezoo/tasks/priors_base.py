"""What the priors of `aezoo.tasks.priors` have in common."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Seed = int | np.random.Generator


class Prior(Protocol):
    """A distribution of codes."""

    def sample(self, n: int, seed: Seed) -> Array:
        """Draw n codes, (n, D) float32; advances the generator."""
        ...


class Density(Protocol):
    """A distribution of t, (N, K)."""

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """Draw n of t, (n, K)."""
        ...

    def log_prob(self, t: Array) -> Array:
        """Log-density of each, in nats."""
        ...
