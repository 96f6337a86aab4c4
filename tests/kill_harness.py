"""Run `aezoo fit` in processes that can be killed at any time, and read a trace of every step.

`python kill_harness.py FOLDER JSON` takes {"argv": [...], "kills": n, "seed": n}: it trains without kills in
FOLDER/whole, then in FOLDER/killed with n kills by SIGKILL, each followed by the same command, until the run ends.
A kill comes after a random number of steps and some milliseconds, or while a file is being written; with
{"after_saves": true}, right after a save of last.ckpt, the first, the second and so on of each start. One process
imports torch and forks the others, since an import takes longer than a run.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch

# environment variable by which the processes of a run are found
MARK = "AEZOO_TEST_RUN"
OFF = [
    f"--{name}.every_n_epochs=0"
    for name in ("reconstructions", "samples", "traversal", "latents", "filters", "codebook")
]
COMMON = [*OFF, "--projector.n=0", "--trainer.limit_test_batches=0", "--code_statistics.every_n_epochs=7"]
DIGITS = ["--data.name=digits", "--data.batch_size=160"]
FIT_VAE = ["fit", "--model=vae", "--model.hidden_dims=[32]", "--model.latent_dim=4"]
FIT_VQ_VAE = [
    *("fit", "--model=vq_vae", "--model.net=mlp", "--model.hidden_dims=[32]", "--model.places=4"),
    *("--model.latent_dim=4", "--model.codebook_size=16"),
]
# the time of some steps, of a whole save, or of the end of an epoch
LONGEST_WAIT = 0.02
STARTED_WITHIN = 300.0


class Trace(pl.Callback):
    """Write a line for each batch: step, epoch, batch, loss and pixels in exact binary form, learning rate."""

    def __init__(self, path):
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        line = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "batch": batch_idx,
            "loss": float(outputs["loss"]).hex(),
            "pixels": float(batch[0].double().sum()).hex(),
            "lr": trainer.optimizers[0].param_groups[0]["lr"].hex(),
        }
        # lines of 256 bytes stay within a page of memory, so a write is visible in full or not at all, even if killed
        os.write(self.file, json.dumps(line).ljust(255).encode() + b"\n")
        # slow steps down, so that the other process can kill at a certain step
        time.sleep(0.002)


def train(argv, folder, trace, saves):
    """Run a command in this process with a trace, then end the process, at the latest after `saves` saves."""
    from extra_callbacks import add_callbacks

    from aezoo.callbacks.checkpoints import Checkpoints
    from aezoo.cli.main import main

    save, left = Checkpoints._save_last_checkpoint, iter(range(saves - 1, -1, -1))

    def save_and_die(self, *args):
        save(self, *args)
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if saves:
        Checkpoints._save_last_checkpoint = save_and_die

    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    add_callbacks(Trace(trace))
    code = 1
    try:
        code = main(argv) or 0
    except SystemExit as error:
        code = error.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def start(argv, folder, saves=0):
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        train(argv, folder, folder / "trace.jsonl", saves)
    return child


def finish(child, folder, what):
    """Wait for the end, and exit on failure."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        sys.exit(f"{what} ended with {code}: {(folder / 'log.txt').read_text()[-2000:]}")


class Lines:
    """Reads the new lines of a folder's trace."""

    def __init__(self, folder):
        self.path, self.size, self.count, self.last = folder / "trace.jsonl", 0, 0, 0

    def update(self):
        if self.path.exists() and self.path.stat().st_size > self.size:
            with self.path.open("rb") as file:
                file.seek(self.size)
                new = file.read()
            self.size += len(new)
            self.count += new.count(b"\n")
            self.last = max(self.last, *(json.loads(line)["step"] for line in new.splitlines()))
        return self


def in_the_middle(folder):
    """Whether a file is being written."""
    for run in (folder / "runs").glob("*/0/checkpoints"):
        return any(path.name.startswith(".tmp-") for path in run.iterdir())
    return False


def kill_somewhere(child, folder, lines, rng, longest):
    """Send SIGKILL after 1 to `longest` new steps and some milliseconds, or in the next save after them.

    Returns:
        Whether a file was being written at that moment; None if the run ended first.
    """
    goal, wait = lines.update().count + rng.randint(1, longest), rng.uniform(0, LONGEST_WAIT)
    in_a_save, limit, moment = rng.random() < 0.4, time.monotonic() + STARTED_WITHIN, None
    while True:
        if os.waitpid(child, os.WNOHANG)[0]:
            return None
        now = time.monotonic()
        if moment is None:
            if lines.update().count >= goal:
                moment = now if in_a_save else now + wait
            elif now > limit:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                sys.exit(f"no {goal} lines within {STARTED_WITHIN:.0f} s: {(folder / 'log.txt').read_text()[-2000:]}")
        if moment is not None and now >= moment and (not in_a_save or in_the_middle(folder)):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return in_the_middle(folder)
        if not (in_a_save and moment is not None):
            time.sleep(0.001)


def trace(folder):
    return [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]


def compare(whole, killed):
    """Assert that every step of the killed run, including repeated ones, and the final files equal the reference's."""
    reference = {line["step"]: line for line in trace(whole)}
    seen = trace(killed)
    for line in seen:
        assert line == reference[line["step"]]
    assert {line["step"] for line in seen} == set(reference)
    last = [next(folder.glob("runs/*/0/checkpoints/last.ckpt")) for folder in (whole, killed)]
    first, second = (torch.load(path, weights_only=True) for path in last)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "DataModule", "epoch"):
        same(first[key], second[key], key)
    same(first.get("current_model_state"), second.get("current_model_state"), "current_model_state")
    assert [path.name for path in killed.glob("runs/*/*")] == ["0"]
    assert not temporary_files(killed)
    points, others = (curves(path.parents[1]) for path in last)
    for tag in points:
        assert others[tag] == points[tag], tag


def processes(mark):
    """Process ids and command lines of the running processes of a run."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"{MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0")
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if marked and state not in "ZX":
            found[int(path.name)] = words
    return found


def temporary_files(folder):
    """Temporary files of interrupted saves, at any depth."""
    return sorted(folder.rglob(".tmp-*"))


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    # speed does not depend on the seed
    tags = [tag for tag in events.Tags()["scalars"] if "samples_per_s" not in tag]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def same(first, second, name):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), name
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), name
        for key in first:
            same(first[key], second[key], f"{name}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), name
        for i, pair in enumerate(zip(first, second, strict=True)):
            same(*pair, f"{name}.{i}")
    else:
        assert first == second, name


def main(home, argv, kills, seed, after_saves=False):
    # import before the forks
    for name in ("matplotlib.pyplot", "sklearn.datasets", "torch.utils.tensorboard", "aezoo.cli.lightning_cli"):
        importlib.import_module(name)

    rng, killed = random.Random(seed), home / "killed"
    finish(start(argv, home / "whole"), home / "whole", "the undisturbed run")
    steps, lines, in_saves = Lines(home / "whole").update().count, Lines(killed), 0
    for saves in range(1, kills + 1) if after_saves else ():
        _, code = os.waitpid(start([*argv, "--resume", "auto"], killed, saves), 0)
        if os.waitstatus_to_exitcode(code) != -signal.SIGKILL:
            sys.exit(f"ended before save {saves}: {(killed / 'log.txt').read_text()[-2000:]}")
    for left in () if after_saves else range(kills, 0, -1):
        child = start([*argv, "--resume", "auto"], killed)
        # limit the steps between kills, so that all kills come before the end
        hit = kill_somewhere(child, killed, lines, rng, max(1, (steps - lines.update().last) // left - 2))
        if hit is None:
            sys.exit(f"the run of {steps} steps ended before kill {kills - left + 1} of {kills}: make it longer")
        in_saves += hit
        print(f"killed after step {lines.update().last}, in a save: {hit}", file=sys.stderr)
    finish(start([*argv, "--resume", "auto"], killed), killed, "the last resumed run")
    print(json.dumps({"kills": kills, "in_saves": in_saves, "steps": steps, "lines": lines.update().count}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
