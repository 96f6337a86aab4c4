"""Seconds from `aezoo fit -c dense_article` to its first step, compared with its slowest imports.

Run by `python -m benchmarks.speed --startup`. Both are whole processes, timed from outside and in turns. One ends after
the imports, the other after the first training batch.
"""

import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from typing import Any

from aezoo.errors import AezooError

from .common import ROOT, ResultsCSV, Spread, environment

_IMPORTS = "import torch, lightning, torchmetrics, os; os._exit(0)"
# a callback added to the command line's own, so everything else is what a user runs
_FIRST_STEP = """
import os, sys
from aezoo import cli

with cli.importing(True):
    from lightning.pytorch import Callback
    from aezoo import lightning_cli

class FirstStep(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.strategy.root_device.type == "cuda":
            import torch
            torch.cuda.synchronize()
        os._exit(0)

lightning_cli.DEFAULT_CALLBACKS["first_step"] = FirstStep
cli.main(sys.argv[1:])
sys.exit("the run ended without a step")
"""


def measure_startup(arguments: Namespace, command: str) -> None:
    """Measure in turns and write `speed-startup-....csv`.

    Raises:
        AezooError: one of the two processes failed.
    """
    name = environment(arguments)
    path = arguments.results / f"speed-startup-{name}.csv"
    table = ResultsCSV(path, ("what",), command, arguments.again)
    # compile off, because the first step of a compiled run waits for the compiler
    fit = ["fit", "-c", "dense_article", "--compile", "off"]
    names = {"imports": "import torch, lightning, torchmetrics", "first step": f"aezoo {' '.join(fit)}"}
    if not any(table.needs({"what": name}) for name in names.values()):
        print(f"{path}: already measured")
        return
    # the file name contains the accelerator
    where = [] if arguments.accelerator == "auto" else [f"--trainer.accelerator={arguments.accelerator}"]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(1 + arguments.repeats):
        for name, words in (("imports", ["-c", _IMPORTS]), ("first step", ["-c", _FIRST_STEP, *fit, *where])):
            took = _seconds(words, arguments.timeout)
            if turn:  # the first run of each fills the caches of files and byte code
                seconds[name].append(took)
    ratios = [a / b for a, b in zip(seconds["first step"], seconds["imports"], strict=True)]
    for name, title in names.items():
        spread = Spread.from_data(seconds[name])
        row: dict[str, Any] = {"what": title, "seconds": spread.median, "low": spread.low, "high": spread.high}
        if name == "first step":
            ratio = Spread.from_data(ratios)
            row |= {"ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high}
        table.put(row | {"repeats": arguments.repeats})
        print(f"{title}: {spread.median:.2f} s ({spread.low:.2f} to {spread.high:.2f})")
    print(f"ratio {Spread.from_data(ratios).median:.2f}\n{path}")


def _seconds(words: list[str], timeout: float) -> float:
    with tempfile.TemporaryDirectory() as folder:
        variables = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        began = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, *words], cwd=folder, env=variables, timeout=timeout, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired as error:
            raise AezooError(f"no first step after {timeout:g} s: raise --timeout") from error
        took = time.perf_counter() - began
    if done.returncode != 0:
        raise AezooError(f"the run failed before its first step: {' '.join(done.stderr.split())[-300:]}")
    return took
