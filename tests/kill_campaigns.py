"""Random kills of every kind of run: each resumed run must give the same result as one that was not killed.

    python tests/kill_campaigns.py --kills 1000 --keep build/kills.jsonl [--out FILE.json]

A campaign trains once without kills, then with some kills (SIGKILL), each followed by the same command, until the run
ends; then both are compared. A finished campaign is a line of the kept file, and another call continues after it.
"""

import argparse
import csv
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from kill_harness import COMMON, DIGITS, FIT_VAE, FIT_VQ_VAE, MARK, compare, processes, same, temporary_files

HERE = Path(__file__).parent
HARNESS, FAILING = HERE / "kill_harness.py", HERE / "training" / "failing.py"
SAVES = ["--trainer.max_epochs=40", "--checkpoints.every_n_steps=4"]
COSINE = ["--model.lr_schedule=cosine"]
FITS = {
    "vae": [*FIT_VAE, *COSINE, *DIGITS, *SAVES],
    "vq_vae": [*FIT_VQ_VAE, *DIGITS, *SAVES],
    "compiled": [*FIT_VAE, *COSINE, *DIGITS, *SAVES, "--compile=default"],
    "stream": [
        *FIT_VAE,
        *COSINE,
        "--data.name=stream",
        "--data.root={home}/set",
        "--data.batch_size=40",
        "--data.memory=off",
        *SAVES,
    ],
    "large saves": [*FIT_VAE, *COSINE, "--model.hidden_dims=[1024,1024]", *DIGITS, *SAVES],
}
# kills of each kind out of 100, and kills per campaign
SHARES = {"vae": 22, "vq_vae": 20, "compiled": 12, "stream": 14, "large saves": 14, "ddp": 10, "tune": 8}
EACH = dict.fromkeys(FITS, 20) | {"ddp": 10, "tune": 8}
# seconds for the start of processes, each of which imports torch, and for a whole run
STARTED_WITHIN, ENDS_WITHIN = 600, 1800


def environment(**more):
    paths = os.pathsep.join([str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "LITDATA_DISABLE_VERSION_CHECK": "1", **more}


def of_one_process(name, home, seed):
    """A fit of one process, killed and compared by `kill_harness`."""
    if name == "stream":
        _write_stream(home / "set")
    argv = [word.format(home=home) for word in [*FITS[name], *COMMON]]
    spec = json.dumps({"argv": argv, "kills": EACH[name], "seed": seed})
    done = subprocess.run(
        [sys.executable, str(HARNESS), str(home), spec], capture_output=True, text=True, env=environment(), check=False
    )
    if done.returncode:
        raise AssertionError(done.stdout[-1000:] + done.stderr[-3000:])
    compare(home / "whole", home / "killed")
    return json.loads(done.stdout.splitlines()[-1])["in_saves"]


def _write_stream(root):
    from litdata.streaming.cache import Cache

    rng = np.random.default_rng(0)
    root.mkdir()
    cache = Cache(str(root), chunk_size=100)
    for i in range(500):
        cache[i] = {"x": rng.random(64, dtype=np.float32), "label": i % 2}
    cache.done()
    cache.merge()


# ---- several processes -----------------------------------------------------------------------------------------------


class Run:
    """A command whose processes can be found and killed."""

    def __init__(self, command, folder):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        with (folder / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=log, stderr=log, start_new_session=True,
                env=environment(**{MARK: str(folder)}),
            )  # fmt: skip

    def kill(self, rng):
        """Send SIGKILL to the started process or to one of its children; all must end."""
        victim = self.process.pid if rng.random() < 0.5 else rng.choice([*processes(self.folder), self.process.pid])
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.wait(300)
        return True

    def wait(self, seconds):
        """Wait until all its processes have ended, and return its exit code."""
        limit = time.monotonic() + seconds
        while processes(self.folder) or self.process.poll() is None:
            if time.monotonic() > limit:
                left = processes(self.folder)
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"no end within {seconds} s, left are {left}: {self.said()}")
            time.sleep(0.05)
        return self.process.returncode

    def finish(self):
        code = self.wait(ENDS_WITHIN)
        assert code == 0, f"exit code {code}: {self.said()}"

    def said(self):
        return (self.folder / "log.txt").read_text()[-3000:]


def _lines(path):
    """The complete lines of a file that may still be written to."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def of_two_processes(name, home, seed):
    """A fit of two ranks, of which one is killed at any step or before the first one."""
    argv = [
        *FIT_VAE, *COSINE, *COMMON, "--data.name=digits", "--trainer.accelerator=cpu", "--trainer.devices=2",
        "--rank_timeout=120", "--checkpoints.every_n_steps=4", "--trainer.max_epochs=12",
    ]  # fmt: skip
    command, whole, killed = [sys.executable, str(FAILING), *argv], home / "whole", home / "killed"
    Run(command, whole).finish()
    steps, rng, in_saves, left = len(_lines(whole / "trace-0.jsonl")), random.Random(seed), 0, EACH[name]
    while left:
        before, start = len(_lines(killed / "trace-0.jsonl")), time.monotonic()
        run = Run([*command, "--resume=auto"], killed)
        goal = before + rng.randint(0, max(1, (steps - _reached(killed)) // (left + 1)))
        while len(_lines(killed / "trace-0.jsonl")) < goal and run.process.poll() is None:
            assert time.monotonic() < start + STARTED_WITHIN, f"no step {goal}: {run.said()}"
            time.sleep(0.005)
        # without a new step, at any time of the start
        time.sleep(rng.uniform(0, 0.05) if goal > before else rng.uniform(0, 10))
        in_saves += bool(temporary_files(killed))
        left -= run.kill(rng)
    Run([*command, "--resume=auto"], killed).finish()
    for rank in (0, 1):
        first, second = (
            {line["step"]: {**line, "pid": 0} for line in _lines(folder / f"trace-{rank}.jsonl")}
            for folder in (whole, killed)
        )
        assert first == second, f"rank {rank} took other steps"
    states = [torch.load(next(folder.glob("runs/*/0/checkpoints/last.ckpt")), weights_only=True)
              for folder in (whole, killed)]  # fmt: skip
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        same(states[0][key], states[1][key], key)
    assert not temporary_files(killed) and [path.name for path in killed.glob("runs/*/*")] == ["0"]
    return in_saves


def _reached(folder):
    return max((line["step"] for line in _lines(folder / "trace-0.jsonl")), default=0)


def of_a_study(name, home, seed):
    """`aezoo tune` or its trial, killed at any time; a trial that is killed alone counts as failed."""
    argv = [
        "tune", *FIT_VAE[1:], *COSINE, *COMMON, *DIGITS, "--trainer.max_epochs=60", "--checkpoints.every_n_steps=4",
        "--search.model.beta=float:0.1:4", "--trials=3", "--study=study",
    ]  # fmt: skip
    command, whole, killed = [sys.executable, "-m", "aezoo", *argv], home / "whole", home / "killed"
    Run(command, whole).finish()
    rng, left, in_saves = random.Random(seed), EACH[name], 0
    while left:
        run = Run(command, killed)
        time.sleep(rng.uniform(0, 14))
        if run.process.poll() is not None:
            raise AssertionError(f"the study ended before its last kill: {run.said()}")
        in_saves += bool(temporary_files(killed))
        os.kill(run.process.pid, signal.SIGKILL)
        run.wait(300)
        left -= 1
    Run(command, killed).finish()
    first, second = (_complete(folder / "study") for folder in (whole, killed))
    assert first == second, f"{first} without kills, {second} with them"
    assert not temporary_files(killed)
    return in_saves


def _complete(study):
    """Settings and scores of the completed trials."""
    with (study / "trials.csv").open(newline="") as file:
        return [(row["model.beta"], row["val/loss"]) for row in csv.DictReader(file) if row["state"] == "complete"]


# ---- command line ----------------------------------------------------------------------------------------------------


def main():
    """Run the missing campaigns one by one, and write the counts."""
    parser = argparse.ArgumentParser(prog="python tests/kill_campaigns.py", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--keep", type=Path, default=Path("build/kills.jsonl"), help="ended campaigns, one a line")
    parser.add_argument("--only", choices=SHARES, help="one kind of campaign")
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    arguments = parser.parse_args()
    arguments.keep.parent.mkdir(parents=True, exist_ok=True)
    wanted = {
        name: -(-arguments.kills * share // 100 // EACH[name])
        for name, share in SHARES.items()
        if arguments.only in (None, name)
    }
    done = _lines(arguments.keep)
    # alternate between the kinds, so that an unfinished run covers all of them
    for number in itertools.count():
        left = [name for name, campaigns in wanted.items() if number < campaigns]
        if not left:
            break
        for name in left:
            if any((line["campaign"], line["seed"]) == (name, number) for line in done):
                continue
            start = time.monotonic()
            home = Path(tempfile.mkdtemp(prefix="aezoo-kills-"))
            how = {"ddp": of_two_processes, "tune": of_a_study}.get(name, of_one_process)
            try:
                in_saves = how(name, home, number)
            except AssertionError:
                print(f"failed: {name}, seed {number}, left in {home}", file=sys.stderr)
                raise
            shutil.rmtree(home)
            line = {"campaign": name, "seed": number, "kills": EACH[name], "in_saves": in_saves}
            line["seconds"] = round(time.monotonic() - start)
            done.append(line)
            with arguments.keep.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    kills = Counter()
    for line in done:
        kills[line["campaign"]] += line["kills"]
    total = {"kills": kills.total(), "in_saves": sum(line["in_saves"] for line in done), "campaigns": len(done)}
    print(json.dumps(total | {"kinds": kills}, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(total), encoding="utf-8")


if __name__ == "__main__":
    main()
