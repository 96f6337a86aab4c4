"""A row of the anomaly benchmark: fit one detector to one set with one seed. Run by `benchmarks.adbench`."""

import contextlib
import importlib
import inspect
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the first optimiser of a process imports it, which would count as time to fit
from sklearn.metrics import average_precision_score, roc_auc_score

import aezoo
from aezoo.sklearn import AutoencoderDetector

from . import adbench_data, processes
from .adbench_detectors import PYOD

Array = adbench_data.Array
Fit = Callable[[Array], Callable[[Array], Array]]

# imports take seconds, and happen here once for all rows
for _module in PYOD.values():
    with contextlib.suppress(ImportError):
        importlib.import_module(f"pyod.models.{_module}")


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Fit to training rows, and score test rows.

    Args:
        spec: file, detector (party, name, settings), kind (of setting), level, and row, with the seed and max_rows.

    Raises:
        FloatingPointError: scores are not finite.
    """
    # PyOD uses a GPU if there is one; all detectors are measured on the CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    seed = spec["row"]["seed"]
    x, y = adbench_data.read_set(Path(spec["file"]))
    data = adbench_data.split(x, y, spec["kind"], spec["level"], seed, spec["row"]["max_rows"])
    np.random.seed(seed)  # detectors without a seed argument draw from the global generator
    torch.manual_seed(seed)
    fit, version = detector(**spec["detector"], seed=seed)
    began, began_cpu = time.perf_counter(), time.process_time()
    score = fit(data.train)
    fitted, fitted_cpu = time.perf_counter(), time.process_time()
    scores = score(data.test)
    scored = time.perf_counter()
    if scores.shape != data.test_labels.shape or not np.isfinite(scores).all():
        raise FloatingPointError("the scores contain values that are not finite")
    return {
        "train_rows": len(data.train),
        "train_anomalies": int(data.train_labels.sum()),
        "test_rows": len(data.test),
        "test_anomalies": int(data.test_labels.sum()),
        "features": data.train.shape[1],
        "auroc": float(roc_auc_score(data.test_labels, scores)),
        "aupr": float(average_precision_score(data.test_labels, scores)),
        "fit_seconds": fitted - began,
        "fit_cpu_seconds": fitted_cpu - began_cpu,
        "score_seconds": scored - fitted,
        "version": version,
        "threads": torch.get_num_threads(),
    }


def detector(party: str, name: str, settings: dict[str, Any], seed: int) -> tuple[Fit, str]:
    """A function that fits a detector and returns its scores (larger is more anomalous), and the library's version."""
    if party == "pyod":
        import pyod

        cls = getattr(importlib.import_module(f"pyod.models.{PYOD[name]}"), name)
        known = inspect.signature(cls).parameters
        own = {key: value for key, value in (("random_state", seed), ("verbose", 0)) if key in known}

        def fit_pyod(x: Array) -> Callable[[Array], Array]:
            size = {"n_features": x.shape[1]} if "n_features" in known else {}
            return cls(**size | own | settings).fit(x).decision_function

        return fit_pyod, f"pyod {pyod.__version__}"

    def fit(x: Array) -> Callable[[Array], Array]:
        given: dict[str, Any] = {"random_state": seed, "device": "cpu"} | settings
        found = AutoencoderDetector(**given).fit(x)
        return lambda test: -found.score_samples(test)

    return fit, f"aezoo {aezoo.__version__}"


if __name__ == "__main__":
    processes.run_measurement(measure)
