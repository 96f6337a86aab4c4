"""One row of the quality benchmark: train one model, measure it and its code. Run by `benchmarks.quality`.

`baselines` measures the baselines of every row of a code size: raw pixels and PCA.
"""

import math
import sys
from collections.abc import Sized
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

import aezoo
from aezoo import registry
from aezoo.data.source import ArrayDataset, Stage
from aezoo.errors import AezooError
from aezoo.metrics import Evaluation
from aezoo.metrics.similarity import psnr
from aezoo.models.sparse.wta_ae import WTAAE
from aezoo.tasks.embed_codes import choose_rows, probe_accuracies
from aezoo.tasks.fidelity import fid
from aezoo.tasks.fidelity_features import Features, choose_features
from aezoo.tasks.generate import generate
from aezoo.tasks.samples import SampleSet

from . import codes, processes
from .convergence import Budget, Convergence, phase_epochs

STAGES: tuple[Stage, ...] = ("train", "val", "test")
# test figures of the loss that become columns
TEST_METRICS = ("loss", "nll", "bits_per_dim", "log_likelihood")
# real training samples, and generated ones, that an FID compares
_MAX_REAL = 10_000
_CHUNK = 500
# the size of a 64 x 64 image; a logistic regression on more numbers takes minutes
_MAX_PROBE_DIM = 4096


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """A run, or the baselines if the spec names no model."""
    return measure_run(spec) if "model" in spec else baselines(spec)


def open_data(options: dict[str, Any], seed: int) -> aezoo.DataModule:
    """Open the data. The splits do not depend on the seed, so rows are comparable; the order of training does.

    Args:
        options: the DataModule's arguments. `rows` limits the samples of each split; they are the same in every run.
        seed: fixes the order.
    """
    rows = options.get("rows")
    data = aezoo.DataModule(**{name: value for name, value in options.items() if name != "rows"})
    if rows:
        (x, y), (x_val, y_val), test = (limited_split(data, stage, rows) for stage in STAGES)
        more = {"x_val": x_val, "y_val": y_val, "x_test": test[0], "y_test": test[1]}
        data = aezoo.DataModule.from_arrays(x, y, **more, scale="none", batch_size=data.batch_size)
    data.seed = seed
    return data


def quiet_trainer(spec: dict[str, Any], **settings: Any) -> pl.Trainer:
    """A trainer on one device of the spec's accelerator, without output and Lightning's validation."""
    off: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return pl.Trainer(accelerator=spec["accelerator"], devices=1, limit_val_batches=0, **off, **settings)


def limited_split(data: aezoo.DataModule, stage: Stage, max_samples: int | None) -> tuple[Tensor, Tensor | None]:
    """At most `max_samples` samples of a split with their labels, the same in every run."""
    chosen = choose_rows(len(cast(Sized, data.dataset(stage))), max_samples)
    return data.tensors(stage, chosen.tolist())


def measure_run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train until the budget's rule ends it, and measure the best weights on the test split.

    Args:
        spec: model, hyperparameters, data (the DataModule's arguments), seed, budget, precision, probe_rows,
            importance_samples, and features, the file that `baselines` has written.
    """
    pl.seed_everything(spec["seed"], workers=True, verbose=False)
    data, budget = open_data(spec["data"], spec["seed"]), Budget(*spec["budget"])
    plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in spec["hyperparameters"].items()}
    if "phase_epochs" in registry.hyperparameters(spec["model"]):
        plain["phase_epochs"] = phase_epochs(len(data.train_dataloader()))
    model = aezoo.create_model(spec["model"], data.input_shape, **plain)
    model.importance_samples = spec["importance_samples"]
    model.compile_mode = "off"  # the compiler's seconds would count, in a run of unknown length
    rule, trainer = train_to_convergence(spec, model, data, budget, precision=spec["precision"])
    sizes = {stage: len(cast(Sized, data.dataset(stage))) for stage in STAGES}
    row = rule.columns | {
        "splits": " ".join(map(str, sizes.values())),
        "samples_per_s": rule.columns["epochs"] * sizes["train"] / rule.training_seconds,
        "peak_mb": peak_mb(trainer.strategy.root_device),
        "threads": torch.get_num_threads(),
        "device": trainer.strategy.root_device.type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "likelihood": model.hparams.get("likelihood", ""),
    }
    figures = trainer.test(model, data, verbose=False)[0]
    row |= {name: figures[f"test/{name}"] for name in TEST_METRICS if f"test/{name}" in figures}
    model.to(trainer.strategy.root_device).eval()
    row |= _code_figures(model, data, spec["probe_rows"])
    x_hat, figures = _reconstruction(model, data.tensors("test")[0])
    return row | figures | _fidelity(model, x_hat, spec)


def train_to_convergence(
    spec: dict[str, Any], model: aezoo.Autoencoder, data: aezoo.DataModule, budget: Budget, **settings: Any
) -> tuple[Convergence, pl.Trainer]:
    """Train until the budget's rule ends the fit; the model then has its best weights."""
    rule = Convergence(*limited_split(data, "val", budget.samples), data.batch_size, budget)
    trainer = quiet_trainer(spec, max_epochs=-1, callbacks=[rule], **settings)
    trainer.fit(model, data)
    return rule, trainer


@torch.no_grad()
def _reconstruction(model: aezoo.Autoencoder, x: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Reconstructions of samples as they are; `trainer.test` corrupts those of a denoiser."""
    evaluation = Evaluation(model.input_shape, model.device)
    parts = []
    for part in x.split(_CHUNK):
        part = part.to(model.device)
        parts.append(model(part))
        evaluation.add({}, part, parts[-1])
    return torch.cat(parts).cpu(), {name: float(value) for name, value in evaluation.compute().items()}


def _fidelity(model: aezoo.Autoencoder, x_hat: Tensor, spec: dict[str, Any]) -> dict[str, Any]:
    """FID of reconstructions to the test samples, and of as many samples of the model's own prior as real ones."""
    if not spec["features"]:
        return {}
    stored = torch.load(spec["features"], weights_only=False)  # of `baselines`
    features: Features = stored["features"]
    row: dict[str, Any] = {"features": features.name}
    drawn = {"rfid": (stored["test"], x_hat)}
    try:
        if model.has_prior:
            found = generate(model, prior="own", n=len(stored["train"]), seed=spec["seed"])
            drawn["fid"] = stored["train"], torch.from_numpy(np.array(found.samples))
        for name, (real, fake) in drawn.items():
            row[name] = fid(real, features.all(SampleSet(ArrayDataset(fake)), _CHUNK))
    except AezooError as error:  # the other figures, which took minutes of training, are kept
        row["note"] = f"no FID: {error}"
    return row


@torch.inference_mode()
def _encode(model: aezoo.Autoencoder, x: Tensor) -> codes.Array:
    parts = [model.encode(part.to(model.device)).flatten(1).float().cpu() for part in x.split(_CHUNK)]
    return torch.cat(parts).numpy()


@torch.inference_mode()
def _entries_decoded(model: aezoo.Autoencoder, code: codes.Array) -> codes.Array:
    """Codes without the entries that the decoder does not use."""
    if not isinstance(model, WTAAE):
        return code
    z = torch.from_numpy(code).view(-1, *model.code_shape).to(model.device)
    return model.mask_units(z, model.above_theta).flatten(1).cpu().numpy()


def _code_figures(model: aezoo.Autoencoder, data: aezoo.DataModule, probe_rows: int) -> dict[str, Any]:
    model.eval()
    x_test, y_test = data.tensors("test")
    code = _encode(model, x_test)
    if not np.isfinite(code).all():
        raise FloatingPointError("the code contains values that are not finite: training diverged")
    active = codes.active_units(code, hasattr(model, "posterior"))
    row: dict[str, Any] = {"code_size": code.shape[1], "active_units": active, "active_share": active / code.shape[1]}
    if model.sparse_code:
        row["l0"] = codes.l0(_entries_decoded(model, code))
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
        spec: data, probe_rows, sizes, and features, a file to write: the feature space of FID, and the features of test
            samples and of at most 10,000 training samples.
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
            found["pca_mse_at_bits"] = codes.pca_of_bytes(train, test, size)
        if data.num_classes and y_train is not None and y_test is not None:
            shares = probe_accuracies(code_train[rows], y_train[rows].numpy(), code_test, y_test.numpy())
            found |= {f"{'pca' if size else 'pixels'}_{name}": value for name, value in shares.items()}
        return found

    if spec["features"]:
        samples = {stage: SampleSet.from_data(data, stage) for stage in ("train", "test")}
        features = choose_features(samples["train"], torch.device("cpu"), 0, False)
        samples["train"] = samples["train"].subsample(_MAX_REAL)
        stored = {stage: features.all(found, _CHUNK) for stage, found in samples.items()}
        torch.save(stored | {"features": features}, spec["features"])
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
