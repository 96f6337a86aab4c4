"""One row of the scaling benchmark, in this process. Run by `benchmarks.scaling`."""

import math
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

import aezoo
from aezoo.training import speed

from .common import Spread
from .measure import EpochTimer, StepTimer, peak_memory_mb
from .processes import run_measurement
from .quality_row import limited_split, open_data, quiet_trainer

_CPU = {"accelerator": "cpu"}
_WARM_STEPS, _STEPS = 3, 8
_MOST_REPEATS_OF_COMMANDS = 3


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds (median, low, high) and peak memory of the row that `spec` describes."""
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)", category=FutureWarning)
    pl.seed_everything(spec["seed"], workers=True, verbose=False)
    speed.keep_memory()  # as the command line does
    axis, value, unit = (spec["row"][name] for name in ("axis", "value", "unit"))
    before = peak_memory_mb(torch.device("cpu"))
    took = _command(spec, axis, value) if unit == "call" else _training(spec, value if unit == "epoch" else None)
    after = peak_memory_mb(torch.device("cpu"))
    spread = Spread.from_data([1e3 * seconds for seconds in took])
    row = {"milliseconds": spread.median, "low": spread.low, "high": spread.high, "repeats": len(took)}
    return row | {"memory_mb": None if before is None or after is None else after - before}


def build(spec: dict[str, Any]) -> aezoo.Autoencoder:
    """The model of a row."""
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in spec["settings"].items()
    }
    return aezoo.create_model(spec["row"]["model"], tuple(spec["shape"]), **settings)


def _training(spec: dict[str, Any], samples: int | None) -> list[float]:
    """Seconds of epochs with that many samples, or of single steps."""
    batch, generator = spec["batch"], torch.Generator().manual_seed(0)
    count = samples or batch * (_WARM_STEPS + _STEPS)
    x = torch.randint(0, 256, (count, *spec["shape"]), dtype=torch.uint8, generator=generator)
    data = aezoo.DataModule.from_arrays(x, batch_size=batch, val_fraction=0, test_fraction=0)
    if samples is not None:
        epochs = EpochTimer()
        quiet_trainer(_CPU, callbacks=[epochs], max_epochs=1 + spec["repeats"]).fit(build(spec), data)
        return epochs.seconds[1:]
    steps = StepTimer()
    rounds = math.ceil(spec["repeats"] / _STEPS)
    quiet_trainer(_CPU, callbacks=[steps], max_epochs=rounds).fit(build(spec), data)
    return steps.seconds[_WARM_STEPS:]


def _command(spec: dict[str, Any], command: str, count: int) -> list[float]:
    """Seconds of calls of a command on that many samples."""
    model = build(spec)
    x, train = _digits(count), _digits(5_000, seed=1)
    quiet_trainer(_CPU, max_epochs=2).fit(model, aezoo.DataModule.from_arrays(train))
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        if command == "decompress":
            aezoo.compress(model, x, fit_on=train, compare=False, out=folder)
            file = next(Path(folder).glob("*.aez"))
        calls: dict[str, Callable[[], object]] = {
            "reconstruct": lambda: aezoo.reconstruct(model, x, out=folder),
            "generate": lambda: aezoo.generate(model, n=count, out=folder),
            "denoise": lambda: aezoo.denoise(model, x, corrupt="gaussian:0.3", out=folder),
            "detect": lambda: aezoo.detect(model, x, fit_on=train, calibrate_on=train, out=folder),
            "embed": lambda: aezoo.embed(model, x, fit_on=train, out=folder),
            "compress": lambda: aezoo.compress(model, x, fit_on=train, compare=False, out=folder),
            "decompress": lambda: aezoo.decompress(model, str(file), out=str(Path(folder, "out"))),
        }
        took: list[float] = []
        # the first call is not counted, because it also imports modules
        for _ in range(min(spec["repeats"], _MOST_REPEATS_OF_COMMANDS) + 1):
            began = time.perf_counter()
            calls[command]()
            took.append(time.perf_counter() - began)
    return took[1:]


def _digits(count: int, seed: int = 0) -> Tensor:
    """Digits of mnist5k, each moved by up to two pixels: (count, 1, 28, 28) in [0, 1]."""
    x = limited_split(open_data({"name": "mnist5k"}, 0), "train", None)[0]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(x), (count,), generator=generator)
    shifts = torch.randint(-2, 3, (count, 2), generator=generator)
    moved = torch.empty(count, 1, 28, 28)
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            here = ((shifts[:, 0] == dy) & (shifts[:, 1] == dx)).nonzero()[:, 0]
            moved[here] = torch.roll(x[chosen[here]], (dy, dx), (2, 3))
    return moved


if __name__ == "__main__":
    run_measurement(measure)
