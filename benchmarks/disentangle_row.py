"""The rows of one model in the disentanglement benchmark: train it with each seed. Run by `benchmarks.disentangle`."""

import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

import aezoo
from aezoo.data.shapes import Shapes
from aezoo.metrics import DCI, IRS, MIG, SAP, UDR, FactorVAEScore, Modularity

from . import codes, processes
from .quality_row import quiet_trainer

_CHUNK = 500


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Train with each seed and score all of them, `{"rows": [...]}`.

    Args:
        spec: model, hyperparameters, data (the DataModule's arguments), steps, rows, accelerator, and seeds, the first
            columns of each row.
    """
    # drawn on the fly, because a run uses each picture only a few times
    data = aezoo.DataModule(**spec["data"], memory="off", num_workers=0)
    x, factors = samples(data, spec["rows"])
    rows: list[dict[str, Any]] = []
    means: list[Tensor] = []
    kls: list[Tensor] = []
    for seed in spec["seeds"]:
        pl.seed_everything(seed["seed"], workers=True, verbose=False)
        data.seed = seed["seed"]
        model = aezoo.create_model(spec["model"], data.input_shape, **spec["hyperparameters"])
        row = train(model, data, spec)
        z, kl, figures = evaluate(model, x)
        row |= figures | scores(z, factors) | {"active_units": codes.active_units(z.numpy(), posterior=True)}
        rows.append(row)
        means.append(z)
        if kl is not None:
            kls.append(kl)
    if len(rows) > 1:
        ranking = UDR(len(rows))
        ranking.update(means, kls or None)
        for row, value in zip(rows, ranking.compute().tolist(), strict=True):
            row["udr"] = value
    return {"rows": rows}


def samples(data: aezoo.DataModule, n: int) -> tuple[Tensor, Tensor]:
    """Random pictures of the test split, drawn with the same seed for every run, and their factors."""
    source = data.source
    assert isinstance(source, Shapes)
    test = source.rows("test")
    factors = source.factors(test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:n]])
    return source.render(factors).float() / 255, factors


def train(model: aezoo.Autoencoder, data: aezoo.DataModule, spec: dict[str, Any]) -> dict[str, Any]:
    """Train for the spec's steps."""
    trainer = quiet_trainer(spec, max_steps=spec["steps"])
    start = time.perf_counter()
    trainer.fit(model, data)
    row = {"seconds": time.perf_counter() - start, "parameters": sum(p.numel() for p in model.parameters())}
    model.to(trainer.strategy.root_device)
    return row | {"threads": torch.get_num_threads(), "device": trainer.strategy.root_device.type}


@torch.inference_mode()
def evaluate(model: aezoo.Autoencoder, x: Tensor) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """The codes (N, D), the KL terms (N, D) of a diagonal Gaussian posterior, and mse and elbo."""
    model.eval()
    means, kls, errors, bounds = [], [], [], []
    for part in x.split(_CHUNK):
        inputs = part.to(model.device)
        z = model.encode(inputs)
        means.append(z.flatten(1).float().cpu())
        errors.append((model.decode(z) - inputs).square().flatten(1).mean(1))
        if "elbo" in (terms := model.loss(inputs)):
            bounds.append(terms["elbo"].expand(len(part)))
        if model.normal_prior:
            posterior: Any = model
            mu, log_var = posterior.posterior(inputs)[:2]
            kls.append(0.5 * (mu**2 + log_var.exp() - 1 - log_var).float().cpu())
    code = torch.cat(means)
    if not code.isfinite().all():
        raise FloatingPointError("the code contains values that are not finite: training diverged")
    figures = {name: float(torch.cat(v).double().mean()) for name, v in (("mse", errors), ("elbo", bounds)) if v}
    return code, torch.cat(kls) if kls else None, figures


def scores(z: Tensor, factors: Tensor) -> dict[str, float]:
    """Every metric that needs the factors."""
    shape = (0,)
    found: dict[str, float] = {}
    metrics = {"mig": MIG(), "sap": SAP(shape), "": DCI(shape), "modularity": Modularity()}
    for name, metric in (metrics | {"factor_vae_score": FactorVAEScore(), "irs": IRS()}).items():
        metric.update(z, factors)
        score = metric.compute()
        found |= {k: float(v) for k, v in score.items()} if isinstance(score, dict) else {name: float(score)}
    return found


if __name__ == "__main__":
    processes.run_measurement(measure)
