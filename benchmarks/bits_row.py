"""One row of the benchmark of errors at equal bits: train one model with one seed. Run by `benchmarks.bits`."""

import math
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer

import aezoo
from aezoo import registry

from . import processes
from .quality_row import open_data, quiet_trainer

# test figures of `Evaluation` that become columns unchanged
FIGURES = ("loss", "mse", "psnr", "ssim")
# hyperparameters that set the length of a schedule in steps
SCHEDULES = ("temperature_steps", "kl_steps")


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Train and test.

    Args:
        spec: data (the DataModule's arguments and rows), hyperparameters, epochs, most_seconds, accelerator, and row,
            with model and seed.
    """
    name, seed = spec["row"]["model"], spec["row"]["seed"]
    pl.seed_everything(seed, workers=True, verbose=False)
    data = open_data(spec["data"], seed)
    plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in spec["hyperparameters"].items()}
    steps = spec["epochs"] * len(data.train_dataloader())
    plain |= {key: steps // 2 for key in SCHEDULES if key in registry.hyperparameters(name)}
    model = aezoo.create_model(name, data.input_shape, **plain)
    seconds = spec["most_seconds"]
    timers = [Timer(timedelta(seconds=seconds), interval="step", verbose=False)] if seconds else []
    trainer = quiet_trainer(spec, max_epochs=spec["epochs"], callbacks=timers)
    began = time.perf_counter()
    trainer.fit(model, data)
    row = {
        "epochs": round(trainer.global_step / steps * spec["epochs"], 2),
        "steps": trainer.global_step,
        "seconds": time.perf_counter() - began,
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "device": trainer.strategy.root_device.type,
    }
    figures = trainer.test(model, data, verbose=False)[0]
    row |= {name: figures[f"test/{name}"] for name in FIGURES if f"test/{name}" in figures}
    return row | codebook_figures(model, {name.removeprefix("test/"): value for name, value in figures.items()})


def codebook_figures(model: Any, figures: dict[str, float]) -> dict[str, float]:
    """Usage and perplexity as means over the codebooks, and used_bits, from the figures of each codebook.

    Args:
        model: its `codebooks` are listed.
        figures: usage and perplexity of each codebook, as `aezoo.metrics.codebook_metrics` names them.
    """
    codebooks = model.codebooks(torch.zeros(1, *model.index_shape, dtype=torch.long))
    ends = [
        (f"{'' if len(sizes) == 1 else f'_{i}'}{f'_{name}' if name else ''}", math.prod(index.shape[2:]))
        for name, (index, sizes) in codebooks.items()
        for i in range(len(sizes))
    ]
    if not all(f"usage{end}" in figures for end, _ in ends):
        return {}
    means = {name: sum(figures[f"{name}{end}"] for end, _ in ends) / len(ends) for name in ("usage", "perplexity")}
    return means | {"used_bits": sum(places * math.log2(figures[f"perplexity{end}"]) for end, places in ends)}


if __name__ == "__main__":
    processes.run_measurement(measure)
