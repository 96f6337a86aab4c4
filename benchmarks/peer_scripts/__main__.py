"""python -m benchmarks.peer_scripts JOB.json FOLDER: train one party's run, write FOLDER/result.json."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from .job import Job, run

# party: module and function of `benchmarks.peer_scripts`
PARTIES = {
    "loop": ("loops", "compiled"),
    "loop_graph": ("loops", "graph"),
    "loop_eager": ("loops", "textbook"),
    "aezoo": ("aezoo_cli", "fit"),
    "aezoo_compiled": ("aezoo_cli", "fit"),
    "lightning": ("lightning_modules", "textbook"),
    "pytorch_vae": ("lightning_modules", "experiment"),
    "pythae": ("pythae_trainer", "fit"),
    "keras_torch": ("keras_fit", "fit"),
    "keras_jax": ("keras_fit", "fit"),
    "keras_tensorflow": ("keras_fit", "fit"),
    "lightning_bf16": ("lightning_modules", "textbook"),
    "keras_jax_bf16": ("keras_fit", "fit"),
    "keras_tensorflow_bf16": ("keras_fit", "fit"),
}


# the parties that train a variational model for `benchmarks.peers quality`
QUALITY = {"aezoo_quality": ("aezoo_quality", "fit"), "pythae_quality": ("pythae_quality", "fit")}


def function(party: str) -> Callable[[Job], dict[str, Any]]:
    """The function that trains a run of this party."""
    module, name = (PARTIES | QUALITY)[party]
    found: Callable[[Job], dict[str, Any]] = getattr(import_module(f"{__package__}.{module}"), name)
    return found


def end_with_parent() -> None:
    """End, with all children, when the process that started the run closes standard input or ends."""
    while os.read(0, 1):
        pass
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    if sys.argv[3:]:
        threading.Thread(target=end_with_parent, daemon=True).start()
    job, folder = Job.read(Path(sys.argv[1])), Path(sys.argv[2]).resolve()
    result = run(function(job.party), job, folder)
    (folder / "result.json").write_text(json.dumps(result))
