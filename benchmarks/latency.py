"""Measure the microseconds of the anomaly score of one sample on one CPU thread, in the exported file and the model.

    python -m benchmarks.latency                                  dense_ae, vae and combined on 10 and 100 features
    python -m benchmarks.latency --models vae --features 32

A row is one model with its default networks. `aezoo export --what score` writes it as an ONNX file, whose graph scales
the sample, computes the score and compares it with the threshold. onnxruntime runs this graph with a batch of one
sample; torch runs the model with the same sample, without scaling and threshold. Both are timed call by call, in turns,
after a warm-up. `combined` is the default score of `AutoencoderDetector`, of a dense_ae with a code of two numbers.

Existing rows are kept; --again measures them again.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aezoo.errors import AezooError

from . import common

KEY = ("model", "features", "threads", "device")
COLUMNS = (*KEY, "score", "file_us", "file_us_p99", "model_us", "model_us_p99", "calls", "error")
# the model and the score of each row
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dense_ae": ("dense_ae", "deviance", {}),
    "vae": ("vae", "deviance", {}),
    "combined": ("dense_ae", "combined", {"latent_dim": 2}),
}
_SAMPLES, _WARM_UP, _TURN = 1000, 200, 100


def times_of(calls: dict[str, Callable[[int], object]], n: int) -> dict[str, list[float]]:
    """Microseconds of n calls of each way, in turns of 100, given the number of the call."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for i in range(_WARM_UP):
            call(i)
    for start in range(0, n, _TURN):
        for name, call in calls.items():
            for i in range(start, min(start + _TURN, n)):
                began = time.perf_counter_ns()
                call(i)
                found[name].append((time.perf_counter_ns() - began) / 1000)
    return found


def measure(row: dict[str, Any], calls: int, seed: int) -> dict[str, Any]:
    """The times of one row.

    Raises:
        AezooError: the score of the model cannot be exported.
    """
    import numpy as np
    import onnxruntime
    import torch

    import aezoo
    from aezoo.tasks.detectors import Detector

    torch.set_num_threads(row["threads"])
    torch.manual_seed(seed)
    kind, score, settings = MODELS[row["model"]]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(_SAMPLES, row["features"], generator=generator) * 5 + 3
    data = aezoo.DataModule.from_arrays(x.numpy(), scale="standard")
    data.setup()
    model = aezoo.create_model(kind, (row["features"],), likelihood="gaussian", **settings).eval()
    model.data_units = data.units
    scorer = Detector(model, score).fit(data).scorer
    given, scaled = x.numpy(), data.tensors("train")[0]
    with tempfile.TemporaryDirectory() as folder:
        aezoo.export(model, what="score", score=score, fit_on=data, calibrate_on=data, out=folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = row["threads"]
        path = Path(folder) / "score.onnx"
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    one = [np.ascontiguousarray(given[i : i + 1]) for i in range(len(given))]
    one_scaled = [scaled[i : i + 1].clone() for i in range(len(scaled))]
    with torch.inference_mode():
        found = times_of(
            {
                "file": lambda i: session.run(None, {"x": one[i % len(one)]}),
                "model": lambda i: scorer(one_scaled[i % len(one_scaled)]),
            },
            calls,
        )
    times = {f"{way}_us": float(np.median(values)) for way, values in found.items()}
    times |= {f"{way}_us_p99": float(np.percentile(values, 99)) for way, values in found.items()}
    return {"score": score, "calls": calls} | times


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested rows that do not exist yet."""
    argv = sys.argv[1:] if argv is None else argv
    parser = common.build_parser("latency", __doc__)
    add, count = parser.add_argument, common.at_least(1)
    add("--models", nargs="+", choices=[*MODELS], default=[*MODELS], metavar="NAME", help=f"of {', '.join(MODELS)}")
    add("--features", nargs="+", type=count, default=[10, 100], metavar="N", help="columns of the table (10 and 100)")
    add("--threads", type=count, default=1, help="threads (default 1)")
    add("--calls", type=count, default=10_000, help="timed calls of each way (default 10000)")
    add("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    path = arguments.results / f"latency-{common.environment(arguments, accelerator='cpu')}.csv"
    table = common.ResultsCSV(path, KEY, common.command_line("latency", argv), arguments.again)
    for features in arguments.features:
        for name in arguments.models:
            row: dict[str, Any] = {"model": name, "features": features, "threads": arguments.threads, "device": "cpu"}
            if not table.needs(row):
                continue
            try:
                row |= measure(row, arguments.calls, arguments.seed)
            except AezooError as error:
                row["error"] = str(error)
            table.put({column: row.get(column) for column in COLUMNS})
            figures = f"file {row.get('file_us', 0):.0f} us, model {row.get('model_us', 0):.0f} us"
            print(f"{name}, {features} features: {row.get('error') or figures}", flush=True)
    print(table.path)


if __name__ == "__main__":
    common.run_script(main)
