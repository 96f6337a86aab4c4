"""`aezoo fit` with all defaults, as users run it; its figures are read from the run's TensorBoard events."""

import runpy
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from .job import Job

# flags added to the command of every run; --aezoo-flags adds more for one run
EXTRA: tuple[str, ...] = ()


def arguments(job: Job) -> list[str]:
    """The command line, to be called in the folder of the run."""
    model = "vae" if job.variational else "dense_ae"
    flags = {
        "--data.name": "array",
        "--data.root": job.data,
        # the file has only train and val; a test split would be taken from train
        "--data.test_fraction": "0",
        "--data.batch_size": str(job.batch),
        "--model.latent_dim": str(job.latent_dim),
        "--model.hidden_dims": str(list(job.hidden_dims)),
        "--model.lr": str(job.lr),
        "--trainer.max_epochs": str(job.epochs),
        "--seed_everything": str(job.seed),
    }
    flags |= {"--model.net": "conv"} if job.variational else {"--model.code_activation": "relu"}
    flags |= {"--trainer.precision": "bf16-mixed"} if job.precision == "bf16" else {}
    flags |= {"--trainer.accelerator": "gpu"} if job.accelerator == "cuda" else {}
    return ["fit", "--model", model, *(part for flag in flags.items() for part in flag), *EXTRA, *job.options]


def fit(job: Job) -> dict[str, Any]:
    """Run `python -m aezoo fit ...` in this process, so that its memory and first step can be measured."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    first: list[float] = []

    def stepped(*_: Any) -> None:
        if job.accelerator == "cuda":
            torch.cuda.synchronize()
        first.append(time.time() - job.started)
        handle.remove()

    handle = register_optimizer_step_post_hook(stepped)
    sys.argv = ["aezoo", *arguments(job)]
    runpy.run_module("aezoo", run_name="__main__", alter_sys=True)
    import aezoo

    (run,) = (path.parent for path in Path("runs").glob("*/*/events*"))
    (checkpoint,) = (run / "checkpoints").glob("last*.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    versions = {"torch": torch.__version__, "aezoo": aezoo.__version__}
    parameters = sum(tensor.numel() for tensor in weights.values())
    return events(run, job.rows) | {
        "first_step_s": first[0] if first else None,
        "parameters": parameters,
        "versions": versions,
    }


def events(run: Path, rows: int) -> dict[str, list[float]]:
    """Samples per second and loss of each epoch; `turns` are rates including validation, pictures and checkpoints."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = run.glob("events*")
    found = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    rates, losses = found.Scalars("train/samples_per_s"), found.Scalars("train/loss")
    ends = [event.wall_time for event in losses]
    return {
        "rates": [event.value for event in rates],
        "losses": [event.value for event in losses],
        "turns": [rows / (after - before) for before, after in pairwise(ends)],
    }
