"""`python failing.py ARGV` runs `aezoo ARGV` with a trace of each rank and, if FAULT is set, a rank that fails.

FAULT=RANK:STEP:KIND: after STEP batches rank RANK raises, is killed (SIGKILL), is frozen (SIGSTOP), or kills the
torchrun agent that started it; once per folder. Works with Lightning's launcher, which starts this file again for the
other ranks, and with torchrun.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch


class Failing(pl.Callback):
    """Writes a line per batch to `trace-RANK.jsonl` and metrics to `figures.jsonl`, and triggers the fault."""

    def __init__(self):
        rank, self.step, self.kind = os.environ.get("FAULT", "-1:0:none").split(":")
        self.rank, self.step = int(rank), int(self.step)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        draws = [torch.rand(()).item(), float(np.random.random()), random.random()]
        line = {
            "step": trainer.global_step,
            "loss": float(outputs["loss"]).hex(),
            "pixels": float(batch[0].double().sum()).hex(),
            "n": len(batch[0]),
            "draws": [value.hex() for value in draws],
            "pid": os.getpid(),
        }
        write(f"trace-{trainer.global_rank}.jsonl", line)
        if trainer.global_rank == self.rank and trainer.global_step == self.step and not Path("failed").exists():
            Path("failed").touch()
            if self.kind == "raise":
                raise RuntimeError("the rank that raises")
            if self.kind == "agent":
                os.kill(os.getppid(), signal.SIGKILL)
                signal.pause()  # until the agent ends it
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}[self.kind])

    def on_validation_end(self, trainer, module):
        self._figures(trainer)

    def on_test_end(self, trainer, module):
        self._figures(trainer)

    def _figures(self, trainer):
        if trainer.is_global_zero and not trainer.sanity_checking:
            write("figures.jsonl", {key: float(value) for key, value in trainer.callback_metrics.items()})


def write(path, line):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, json.dumps(line).encode() + b"\n")
    os.close(file)


def watch():
    """Record files that a rank other than 0 opens for writing in the folder of the run."""
    home = Path.cwd()

    def hook(event, arguments):
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            path, writes = Path(arguments[0]), arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            own = path.name.startswith(("trace-", "written", "failed"))
            if writes and not own and (not path.is_absolute() or path.is_relative_to(home)):
                write("written.jsonl", str(path))

    sys.addaudithook(hook)


def main():
    from extra_callbacks import add_callbacks

    from aezoo.cli.main import main

    if os.environ.get("LOCAL_RANK", "0") != "0":
        watch()
    add_callbacks(Failing())
    main()


if __name__ == "__main__":
    main()
