"""Fuzzing with a small budget, in a separate process, so that a crash is a failure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


def fuzz(out, files, configs, seed, limit):
    """Run the fuzzing and return its counts by kind."""
    command = [sys.executable, "-m", "tests.fuzz", f"--files={files}", f"--configs={configs}", f"--seed={seed}"]
    paths = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, f"--out={out}"], capture_output=True, text=True, errors="replace", timeout=limit,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    counts = json.loads(out.read_text())
    assert counts["files"] >= files * 0.9 and counts["configs"] >= configs * 0.9 and counts["defects"] == 0
    return counts["kinds"]


@pytest.mark.slow
def test_a_thousand_damaged_files_and_configurations(tmp_path):
    kinds = fuzz(tmp_path / "counts.json", files=1000, configs=200, seed=2, limit=900)
    assert len(kinds) >= 29
    # some damaged files must be read, or only the first checks of the readers would be tested
    assert sum(count["read"] for count in kinds.values()) > 80
    assert kinds["ckpt, wrong types"]["read"] and sum(kinds["parquet, expanding"].values())
    assert kinds["yaml"]["read"] > 10 and all(count["read"] for key, count in kinds.items() if "inside" in key)
