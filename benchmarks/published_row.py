"""One row of the benchmark of published figures: go on with a run, and measure it. Run by `benchmarks.published`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import aezoo
from aezoo.io.checkpoint import load_run

from . import processes
from .quality_row import quiet_trainer
from .recipes import scalars

TRAIN_METRICS = ("train/loss", "train/nll", "train/kl", "train/codebook", "train/commitment")
TEST_METRICS = ("test/loss", "test/nll", "test/kl", "test/log_likelihood", "test/mse")
# no pictures, and no test within the fit: an interrupted run is tested as well
QUIET = (
    *("--trainer.enable_progress_bar=false", "--trainer.limit_test_batches=0", "--reconstructions.every_n_epochs=0"),
    *("--samples.every_n_epochs=0", "--traversal.every_n_epochs=0", "--latents.every_n_epochs=0"),
    *("--filters.every_n_epochs=0", "--codebook.every_n_epochs=0", "--projector.n=0"),
)
_POLL_SECONDS = 2.0


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Train to the recipe's last epoch or until the time is up, and test.

    Args:
        spec: folder of the run, flags, seconds or None, other settings of the data in the test, and row, with recipe
            and seed.

    Raises:
        RuntimeError: the fit fails, or its time was up before the first epoch has ended.
    """
    folder, row = Path(spec["folder"]), spec["row"]
    fit(folder, row["recipe"], row["seed"], spec["flags"], spec["seconds"])
    run = folder / "runs" / row["recipe"] / "0"
    found = scalars(run)
    if "train/loss" not in found:
        raise RuntimeError("its first epoch has not ended: give it more --seconds")
    figures = {name: found[name][-1] for name in TRAIN_METRICS if name in found}
    figures |= test(run, row["importance_samples"], spec["test"])
    return {
        "epochs": len(found["train/loss"]),
        "cpu_seconds": float((folder / "cpu_seconds").read_text()),
        "threads": torch.get_num_threads(),
        **figures,
    }


def fit(folder: Path, recipe: str, seed: int, flags: list[str], seconds: float | None) -> None:
    """Run `aezoo fit --resume auto` and add up its processor time in the file `cpu_seconds` of the folder.

    Raises:
        RuntimeError: it fails; the message is the last line of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = folder / "cpu_seconds"
    before = float(total.read_text()) if total.is_file() else 0.0
    command = [sys.executable, "-m", "aezoo", "fit", "-c", recipe, "--resume=auto", f"--seed_everything={seed}"]
    ends = time.monotonic() + seconds if seconds else None
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen([*command, *QUIET, *flags], cwd=folder, stdout=log, stderr=log)
        while (code := process.poll()) is None:
            total.write_text(str(before + cpu_seconds(process.pid)))
            time.sleep(_POLL_SECONDS)
            if ends is not None and time.monotonic() > ends:
                process.send_signal(signal.SIGINT)  # saves, and ends with this signal's code
                code = process.wait()
                break
    if code not in (0, 128 + signal.SIGINT, -signal.SIGINT):
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit code {code}")


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and of its children that have ended; 0 if the system does not report it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def test(run: Path, importance_samples: int | None, other: dict[str, str]) -> dict[str, float]:
    """Figures of the test split with the run's best weights, and with other settings of the data."""
    model, trained = load_run(run)
    model.importance_samples = importance_samples or 1
    data = aezoo.DataModule(**trained["settings"] | other)
    pl.seed_everything(0, workers=True, verbose=False)
    figures = quiet_trainer({"accelerator": "auto"}).test(model, data, verbose=False)[0]
    return {name: figures[name] for name in TEST_METRICS if name in figures}


if __name__ == "__main__":
    processes.run_measurement(measure)
