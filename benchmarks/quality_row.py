"""One row of the quality benchmark: train one model, measure it and its code. Run by `benchmarks.quality`.

`baselines` measures the baselines of every row of a code size: raw pixels and PCA.
"""

import math
import sys
from collections.abc import Sized
from datetime import timedelta
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor

import aezoo
from aezoo.callbacks import Throughput
from aezoo.data.source import Stage
from aezoo.metrics.similarity import psnr
from aezoo.tasks.embed_codes import choose_rows, probe_accuracies

from . import codes, processes

# test figures of `Evaluation` that become columns
TEST_METRICS = ("loss", "nll", "mse", "psnr", "ssim", "bits_per_dim", "log_likelihood")
_CHUNK = 500
# the size of a 64 x 64 image; a logistic regression on more numbers takes minutes
_MAX_PROBE_DIM = 4096


class _RateRecorder(pl.Callback):
    """The rates that `Throughput` logs, for every epoch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def record(self, trainer: pl.Trainer) -> None:
        """Keep the rate of the epoch that has ended, if it had more than the warm-up batch."""
        if (rate := trainer.callback_metrics.get("train/samples_per_s")) is not None:
            self.values.append(float(rate))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # an epoch's values are in callback_metrics only after all of its hooks have run
        self.record(trainer)


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """A run, or the baselines if the spec names no model."""
    return measure_run(spec) if "model" in spec else baselines(spec)


def open_data(options: dict[str, Any], seed: int) -> aezoo.DataModule:
    """Open the data. The splits do not depend on the seed, so rows are comparable; the order of training does.

    Args:
        options: the DataModule's arguments. `rows` limits the samples for training and for the test; they are the
            same in every run.
        seed: fixes the order.
    """
    rows = options.get("rows")
    data = aezoo.DataModule(**{name: value for name, value in options.items() if name != "rows"})
    if rows:
        (x, y), (x_test, y_test) = (limited_split(data, stage, rows) for stage in ("train", "test"))
        kept = {"scale": "none", "val_fraction": 0.0, "batch_size": data.batch_size}
        data = aezoo.DataModule.from_arrays(x, y, x_test=x_test, y_test=y_test, **kept)
    data.seed = seed
    return data


def quiet_trainer(spec: dict[str, Any], **settings: Any) -> pl.Trainer:
    """A trainer on one device of the spec's accelerator, without output and validation.

    Nothing is selected on the validation split: the model of the last step is measured.
    """
    off: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return pl.Trainer(accelerator=spec["accelerator"], devices=1, limit_val_batches=0, **off, **settings)


def limited_split(data: aezoo.DataModule, stage: Stage, max_samples: int | None) -> tuple[Tensor, Tensor | None]:
    """At most `max_samples` samples of a split with their labels, the same in every run."""
    chosen = choose_rows(len(cast(Sized, data.dataset(stage))), max_samples)
    return data.tensors(stage, chosen.tolist())


def measure_run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train for the spec's budget and measure on the test split.

    Args:
        spec: model, hyperparameters, data (the DataModule's arguments), seed, epochs or seconds, precision,
            probe_rows and importance_samples.
    """
    pl.seed_everything(spec["seed"], workers=True, verbose=False)
    data = open_data(spec["data"], spec["seed"])
    model = aezoo.create_model(spec["model"], data.input_shape, **spec["hyperparameters"])
    model.importance_samples = spec["importance_samples"]
    seconds, epochs = spec["seconds"], spec["epochs"]
    timer, rates = (
        Timer(timedelta(seconds=seconds) if seconds else None, interval="step", verbose=False),
        _RateRecorder(),
    )
    callbacks = [Throughput(), rates, timer]
    trainer = quiet_trainer(spec, max_epochs=epochs or -1, precision=spec["precision"], callbacks=callbacks)
    trainer.fit(model, data)
    rates.record(trainer)
    row = {
        "epochs": round(trainer.fit_loop.epoch_loop.batch_progress.total.completed / trainer.num_training_batches, 2),
        "steps": trainer.global_step,
        "seconds": timer.time_elapsed("train"),
        "samples_per_s": float(np.median(rates.values)) if rates.values else "",
        "peak_mb": peak_mb(trainer.strategy.root_device),
        "threads": torch.get_num_threads(),
        "device": trainer.strategy.root_device.type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "likelihood": model.hparams.get("likelihood", ""),
    }
    figures = trainer.test(model, data, verbose=False)[0]
    row |= {name: figures[f"test/{name}"] for name in TEST_METRICS if f"test/{name}" in figures}
    return row | _code_figures(model.to(trainer.strategy.root_device), data, spec["probe_rows"])


@torch.inference_mode()
def _encode(model: aezoo.Autoencoder, x: Tensor) -> codes.Array:
    parts = [model.encode(part.to(model.device)).flatten(1).float().cpu() for part in x.split(_CHUNK)]
    return torch.cat(parts).numpy()


def _code_figures(model: aezoo.Autoencoder, data: aezoo.DataModule, probe_rows: int) -> dict[str, Any]:
    model.eval()
    x_test, y_test = data.tensors("test")
    code = _encode(model, x_test)
    if not np.isfinite(code).all():
        raise FloatingPointError("the code holds values that are not finite: training diverged")
    active = codes.active_units(code, hasattr(model, "posterior"))
    row: dict[str, Any] = {"code_size": code.shape[1], "active_units": active, "active_share": active / code.shape[1]}
    if model.sparse_code:
        row["l0"] = codes.l0(code)
        train, test = (part.flatten(1).numpy() for part in (data.tensors("train")[0], x_test))
        size = max(1, round(row["l0"]))
        if size < min(train.shape):
            row["pca_mse_at_l0"] = codes.pca(train, test, size)[0]
    x_train, y_train = limited_split(data, "train", probe_rows)
    if data.num_classes and y_train is not None and y_test is not None and code.shape[1] <= _MAX_PROBE_DIM:
        row |= probe_accuracies(_encode(model, x_train), y_train.numpy(), code, y_test.numpy())
    return row


def baselines(spec: dict[str, Any]) -> dict[str, Any]:
    """Figures without a model, `{"baselines": {code size: columns}}`; code size 0 stands for raw pixels.

    Args:
        spec: data, probe_rows and sizes.
    """
    data = open_data(spec["data"], seed=0)
    (x_train, y_train), (x_test, y_test) = data.tensors("train"), data.tensors("test")
    train, test = x_train.flatten(1).numpy(), x_test.flatten(1).numpy()
    rows = choose_rows(len(train), spec["probe_rows"])

    def columns(size: int) -> dict[str, float]:
        found, code_train, code_test = {}, train, test
        if size:
            # with as many components as dimensions or samples, PCA stores the data and is not a meaningful baseline
            if size >= min(train.shape):
                return {}
            error, code_train, code_test = codes.pca(train, test, size)
            found = {"pca_mse": error, "pca_psnr": psnr(error)}
        if data.num_classes and y_train is not None and y_test is not None:
            shares = probe_accuracies(code_train[rows], y_train[rows].numpy(), code_test, y_test.numpy())
            found |= {f"{'pca' if size else 'pixels'}_{name}": value for name, value in shares.items()}
        return found

    return {"baselines": {size: columns(size) for size in spec["sizes"]}}


def peak_mb(device: torch.device) -> float:
    """Peak memory so far in MB: of the tensors on a CUDA device, otherwise of this process including libraries."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return math.nan
    import resource

    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


if __name__ == "__main__":
    processes.run_measurement(measure)
