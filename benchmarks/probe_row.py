"""One row of the probe benchmark: train a model, or none, and predict classes from codes. Run by `benchmarks.probe`."""

import math
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

import aezoo
from aezoo.errors import AezooError
from aezoo.tasks.embed_codes import Array, pca, probe_accuracies

from . import disentangle_row, processes
from .quality_row import limited_split


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Train for the spec's steps, or take pixels or PCA, and classify the test samples.

    Args:
        spec: data (the DataModule's arguments), rows, steps, batch_size, code_size, accelerator, hyperparameters, and
            row, the first columns.
    """
    x, y, x_test, y_test = samples(spec)
    name, seed = spec["row"]["model"], spec["row"]["seed"]
    flat, flat_test = x.flatten(1).numpy(), x_test.flatten(1).numpy()
    if name == "raw pixels":
        return {"numbers": flat.shape[1]} | probe_accuracies(flat, y, flat_test, y_test)
    if name == "pca":
        size = min(spec["code_size"], *flat.shape)
        code, code_test = pca(flat, flat_test, size)
        return {"numbers": size} | probe_accuracies(code, y, code_test, y_test)
    pl.seed_everything(seed, workers=True, verbose=False)
    data = aezoo.DataModule.from_arrays(
        x, y, x_test=x_test, y_test=y_test, scale="none", val_fraction=0.0, batch_size=spec["batch_size"]
    )
    data.seed = seed
    model = aezoo.create_model(name, tuple(x.shape[1:]), **spec["hyperparameters"])
    row = disentangle_row.train(model, data, spec)
    (codes, *_), (codes_test, _, figures) = (disentangle_row.evaluate(model, part) for part in (x, x_test))
    row |= {"numbers": math.prod(model.code_shape), "mse": figures["mse"]}
    row |= probe_accuracies(codes.numpy(), y, codes_test.numpy(), y_test)
    if len(model.code_shape) > 1:
        mean, mean_test = (
            part.unflatten(1, model.code_shape).flatten(2).mean(2).numpy() for part in (codes, codes_test)
        )
        row |= {f"pooled_{key}": share for key, share in probe_accuracies(mean, y, mean_test, y_test).items()}
    return row


def samples(spec: dict[str, Any]) -> tuple[Tensor, Array, Tensor, Array]:
    """`rows` training samples with their classes, and all test samples with theirs."""
    data = aezoo.DataModule(**spec["data"])
    rows = None if spec["rows"] == "all" else spec["rows"]
    (x, y), (x_test, y_test) = limited_split(data, "train", rows), data.tensors("test")
    if y is None or y_test is None:
        raise AezooError(f"{spec['data']['name']} has samples without classes")
    return x, y.numpy(), x_test, y_test.numpy()


if __name__ == "__main__":
    processes.run_measurement(measure)
