"""Random weights that need no file: drawn from names and shapes, the same for every version of numpy."""

import numpy as np

# streams of RandomState are frozen, unlike those of numpy's newer generators


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Weights of a network by name; matrices keep the scale of their inputs, gains are about 1."""
    numbers, found = np.random.RandomState(seed), {}
    for name in sorted(shapes):
        values = numbers.standard_normal(shapes[name])
        if len(shapes[name]) > 1:
            values *= np.prod(shapes[name][1:]) ** -0.5
        else:
            values = 0.1 * values + ("norm" in name and name.endswith("weight"))
        found[name] = values.astype(np.float32)
    return found
