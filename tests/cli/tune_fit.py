"""Replaces `aezoo fit` in tests of `aezoo tune`: writes the files of a run without training.

`FAKE_FIT` is JSON with the outcome of each trial, by the number of its folder.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

given = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:] if "=" in word)
root = Path(given["trainer.default_root_dir"])
what = json.loads(os.environ.get("FAKE_FIT", "{}")).get(root.name)
run = root / "vae-digits" / "0"
again = run.exists()
run.mkdir(parents=True, exist_ok=True)
if what == "crash":
    print("something first\naezoo: it is broken, fix it")
    sys.exit(2)
if what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "interrupt" and not again:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(600)
if what == "hang" and not again:
    (run / "hangs").write_text(str(os.getpid()))
    time.sleep(600)
callbacks = [{"class_path": "aezoo.callbacks.EMA"}, {"class_path": given["trainer.callbacks+"]}]
settings = {"model": {"class_path": "vae", "init_args": {"lr": float(given["model.lr"])}}}
settings["trainer"] = {"default_root_dir": str(root), "callbacks": callbacks, "words": sys.argv[1:]}
(run / "config.yaml").write_text(json.dumps(settings))
loss = (math.log10(float(given["model.lr"])) + 3) ** 2
with (run / "metrics.jsonl").open("a", buffering=1) as file:
    file.write(json.dumps({"epoch": -1, "step": 0, "val/loss": 9.0, "val/nll": 1.0}) + "\n")
    for epoch in range(5):
        value = 1e6 if what == "bad" else math.nan if what == "nan" else loss + abs(epoch - 3)
        file.write(json.dumps({"epoch": epoch, "step": epoch, "train/loss": 1.0, "val/loss": value}) + "\n")
if what == "bad":
    time.sleep(30)
    (run / "finished").touch()
