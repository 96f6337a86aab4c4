"""Example loss curves of docs/training.md; `python -m tests.callbacks.example_curves` draws them."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from aezoo.callbacks import plotting
from aezoo.report.diagnosis import Curves

DOCS = Path(__file__).parents[2] / "docs"


def curves(train, val, noise=0.0, steps_per_epoch=50, seed=0, **values) -> Curves:
    """Curves of two functions of the epoch, counted from 1, with independent noise."""
    rng, n = np.random.default_rng(seed), values.pop("n", 60)
    epochs = np.arange(1, n + 1)
    noisy = [[float(f(e) + noise * rng.standard_normal()) for e in epochs] for f in (train, val)]
    return Curves(epochs.tolist(), *noisy, steps=steps_per_epoch * n, **values)


def falling(scale, level=100.0, depth=200.0):
    return lambda epoch: level + depth * math.exp(-epoch / scale)


# by the section of the page that explains them
EXAMPLES = {
    "still-improving": curves(falling(30), falling(30, 104), noise=0.5),
    "level": curves(falling(5), falling(5, 104), noise=0.5),
    "too-few-steps": curves(falling(15), falling(15, 104), noise=0.5, steps_per_epoch=4, n=20),
    "overfitting": curves(falling(20), lambda e: 130 + 170 * math.exp(-e / 8) + 0.5 * max(0, e - 24), noise=0.5),
    "stopped-early": curves(
        falling(8),
        lambda e: 104 + 200 * math.exp(-e / 5) - 3 * (e == 25),
        noise=0.3,
        n=45,
        patience=20,
        stopped_by="val/loss",
    ),
    "rising": curves(*[lambda epoch: falling(4)(epoch) + 1.5 * max(0, epoch - 30)] * 2, noise=0.5),
}


def main() -> None:
    for name, example in EXAMPLES.items():
        losses = {"train/loss": example.train, "val/loss": example.val}
        figure = plotting.curve_figure(example.epochs, losses, f"{example.steps} steps")
        # quantised to reduce the file size to a tenth
        Image.fromarray(plotting.render(figure)).quantize(24).save(DOCS / "pictures" / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
