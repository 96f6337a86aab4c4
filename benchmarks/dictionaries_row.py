"""A row of the dictionary benchmark: train one model with one seed. Run by `benchmarks.dictionaries`."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

import aezoo
from aezoo.data.synthetic_dictionary import SyntheticDictionary
from aezoo.metrics import Recovery, sparse_metrics

from . import processes
from .disentangle_row import train

_CHUNK = 1000


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Train and score.

    Args:
        spec: model, hyperparameters, data (the DataModule's arguments), steps, accelerator, and row, with the seed.
    """
    seed = spec["row"]["seed"]
    pl.seed_everything(seed, workers=True, verbose=False)
    data = aezoo.DataModule("synthetic_dictionary", **spec["data"], seed=seed)
    plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in spec["hyperparameters"].items()}
    model = aezoo.create_model(spec["model"], data.input_shape, **plain)
    row = train(model, data, spec)
    x, _ = data.tensors("test")
    source = data.source
    assert isinstance(source, SyntheticDictionary)
    return row | scores(model, x, source.atoms)


@torch.inference_mode()
def scores(model: aezoo.Autoencoder, x: Tensor, atoms: Tensor) -> dict[str, float]:
    """Figures of samples (N, *input_shape), and of the decoder compared with the atoms (N, *input_shape)."""
    model.eval()
    judged: Any = getattr(model, "predicted", lambda rows: rows)
    codes = torch.cat([model.encode(part.to(model.device)).flatten(1) for part in x.split(_CHUNK)])
    if not codes.isfinite().all():
        raise FloatingPointError("the code contains values that are not finite: training diverged")
    metrics = None
    for part, code in zip(x.to(model.device).split(_CHUNK), codes.split(_CHUNK), strict=True):
        wanted, given = judged(part), judged(model.decode(code.unflatten(1, model.code_shape)))
        if metrics is None:
            metrics = sparse_metrics(tuple(wanted.shape[1:]), model.code_shape).to(model.device)
        metrics.update(code=code, x=wanted, x_hat=given)
    assert metrics is not None
    recovery = Recovery(judged(atoms.to(model.device)))
    recovery.update(judged(directions(model, codes)))
    return {name: float(value) for name, value in {**metrics.compute(), **recovery.compute()}.items()}


def directions(model: aezoo.Autoencoder, codes: Tensor) -> Tensor:
    """What each latent adds to the decoder's output at its largest value in the codes: (L, *input_shape)."""
    largest = codes.abs().amax(0)
    largest = largest.where(largest > 0, 1)
    single = torch.diag(largest).unflatten(1, model.code_shape)
    return model.decode(single) - model.decode(torch.zeros_like(single[:1]))


if __name__ == "__main__":
    processes.run_measurement(measure)
