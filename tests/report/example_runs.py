"""Example run folders and their reports, for the checks of markup and in Chromium.

python -m tests.report.example_runs FOLDER
"""

import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aezoo.report import write_report

HOSTILE = "<script>alert('x')</script>\"'&\u202e"


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the keys of the first as header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_picture(path: Path, side: int = 48) -> None:
    """Write a grey image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, 2 * side), 128, np.uint8)).save(path, format="PNG")


def write_metrics(folder: Path, train: Sequence[float], val: Sequence[float | None]) -> None:
    """Write the losses of each epoch."""
    rows = [
        {"epoch": i, "step": 63 * (i + 1), "train/loss": t, "train/samples_per_s": 5000 + i, "val/loss": v,
         "val/mse": None if v is None else v / 3000}
        for i, (t, v) in enumerate(zip(train, val, strict=True))
    ]  # fmt: skip
    write_csv(folder / "metrics.csv", rows)


def overfitted(n: int = 30) -> tuple[list[float], list[float]]:
    """Decreasing training losses, and validation losses that increase after epoch 17."""
    train = [100 + 80 * math.exp(-i / 6) for i in range(n)]
    return train, [loss + 2 + 0.3 * max(0, i - 5) + 0.05 * max(0, i - 10) ** 2 for i, loss in enumerate(train)]


def write_run(
    folder: Path, model: str = "vae", train: Sequence[float] = (), val: Sequence[float | None] = (), **settings: Any
) -> Path:
    """Write the folder of a finished run.

    Args:
        folder: to be written.
        model: its name.
        train: training loss of each epoch.
        val: validation loss of each epoch.
        settings: further settings of the model.
    """
    train, val = (train, val) if train else overfitted()
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {"latent_dim": 16, "lr": 0.001, "hidden_dims": [400, 200], **settings}
    config = {
        "model": {"class_path": model, "init_args": arguments},
        "data": {"name": "mnist5k", "root": "data", "batch_size": 64},
        "trainer": {"max_epochs": len(train), "logger": None},
        "seed_everything": 0,
        "checkpoints": {"monitor": "val/loss"},
    }
    # JSON is valid YAML
    text = f"# aezoo 0.1.0: all settings of this run\n# aezoo fit --model {model}\n{json.dumps(config)}\n"
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    write_metrics(folder, train, val)
    environment = {"aezoo": "0.1.0", "torch": "2.13.0", "processor": "a processor", "device": "cpu", "threads": 2}
    record = {
        "model": {"name": model, "parameters": 844896, "input_shape": [1, 28, 28], "code_shape": [16]},
        "fits": [
            {"started": "2026-12-02T00:56:01+00:00", "environment": environment, "end": "finished", "seconds": 90.5,
             "epochs": len(train)}
        ],
        "curves": {"steps": 63 * len(train), "limit": "max_epochs", "units": 16, "mse": 0.06, "pca_mse": 0.03},
        "test": {"test/loss": 101.25, "test/mse": 0.0321},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    write_picture(folder / "pictures" / "reconstructions.png")
    methods = [{"method": "deviance", "threshold": 201.06403}, {"method": "pca", "threshold": 32}]
    write_csv(folder / "detect" / "detect.csv", methods)
    write_csv(folder / "detect" / "scores.csv", [{"index": i, "score": i / 7} for i in range(500)])
    write_picture(folder / "detect" / "anomalies.png", 400)
    return folder


def main(folder: Path) -> None:
    """Write the report of one run, and of three that differ, with names that contain markup."""
    first = write_run(folder / "runs" / "vae" / "0")
    others = [
        write_run(folder / "runs" / "vae" / "1", latent_dim=HOSTILE, beta=4.0),
        write_run(folder / "runs" / "conv_ae" / "0", "conv_ae", [50.0, 40.0], [math.nan, None]),
    ]
    write_csv(others[0] / "embed" / "accuracies.csv", [{HOSTILE: HOSTILE, "accuracy": 0.5}])
    write_report(first, folder / "one.html")
    write_report([first, *others], folder / "three.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
