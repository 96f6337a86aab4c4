"""The zoo's variational models on dense networks, in Lightning's Trainer; the trained weights are written to a file."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

import aezoo
from aezoo import DataModule

from .job import Job
from .networks import training_rows


def fit(job: Job) -> dict[str, Any]:
    """Train the model of the job's options (`model=iwae`, `n_samples=5`, ...) and write its weights to `out=FILE`."""
    options: dict[str, str] = dict(option.split("=") for option in job.options)
    name, out = options.pop("model"), options.pop("out")
    values: dict[str, Any] = {key: float(value) if "." in value else int(value) for key, value in options.items()}
    pl.seed_everything(job.seed, verbose=False)
    values |= {"latent_dim": job.latent_dim, "hidden_dims": job.hidden_dims, "lr": job.lr}
    model: Any = aezoo.create_model(name, job.shape, **values)
    model.compile_mode = "off"  # a compiled step draws other noise
    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    with np.load(job.weights) as file, torch.no_grad():
        for parameter, key in zip(parameters, file.files, strict=True):
            parameter.copy_(torch.from_numpy(file[key]))
    # the order of every epoch is that of job.order_seed
    data = DataModule.from_arrays(
        training_rows(job), batch_size=job.batch, seed=job.seed, val_fraction=0.0, test_fraction=0.0, layout="vector"
    )
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    silent: dict[str, Any] = dict.fromkeys(off, False)
    pl.Trainer(max_epochs=job.epochs, accelerator="cpu", **silent).fit(model, data)
    trained = {f"w{i}": parameter.detach().numpy() for i, parameter in enumerate(parameters)}
    if name == "vamp_vae":
        trained["pseudo_inputs"] = model.pseudo_inputs().detach().numpy()
    np.savez(out, **trained)
    return {"versions": {"torch": torch.__version__, "aezoo": aezoo.__version__}}
