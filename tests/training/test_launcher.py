"""Processes launched by a command end with it, even if it is killed while they start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aezoo.training import launcher

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a signal of Linux")
MODEL = ["--model", "vae", "--model.hidden_dims", "[8]", "--data", "digits", "--projector.n", "0"]
QUICK = [*MODEL, "--trainer.accelerator", "cpu"]
TUNE = ["tune", *QUICK, "--search.model.lr", "log:1e-4:1e-2", "--trials", "2", "--trainer.max_epochs", "200"]
FIT = ["fit", *QUICK, "--trainer.devices", "2", "--trainer.max_epochs", "200"]


def children(pid):
    found = set()
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found |= {int(child) for child in tasks.read_text().split()}
        except OSError:
            continue
    return found


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def is_aezoo(pid):
    try:
        return b"aezoo" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(("command", "after"), [(TUNE, 0.5), (FIT, 0.0), (FIT, 3.0)], ids=["study", "start", "ranks"])
def test_launched_process_ends_when_its_launcher_is_killed(tmp_path, command, after):
    with subprocess.Popen(
        [sys.executable, "-m", "aezoo", *command], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        end, found = time.monotonic() + 120, set()
        while not found and process.poll() is None and time.monotonic() < end:
            found = {pid for pid in children(process.pid) if is_aezoo(pid)}
            time.sleep(0.01)
        time.sleep(after if found else 0)
        process.kill()
    assert found, "no process was launched"
    end = time.monotonic() + 10
    while any(map(is_running, found)) and time.monotonic() < end:
        time.sleep(0.05)
    left = [pid for pid in found if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def ended(environment):
    code = "from aezoo.training.launcher import end_with_launcher; end_with_launcher(); print('goes on')"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AEZOO_L")} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_process_whose_launcher_has_gone_does_not_start():
    gone = {launcher.TRIAL: "1", "AEZOO_LAUNCHER": "999999999"}
    assert ended(gone).returncode == -signal.SIGKILL
    assert ended({"LOCAL_RANK": "1", "AEZOO_LAUNCHER": "999999999"}).returncode == -signal.SIGKILL
    assert ended({launcher.TRIAL: "1", "AEZOO_LAUNCHER": str(os.getpid())}).stdout == "goes on\n"
    # a command that was not launched, in the environment of a launched one
    assert ended({"AEZOO_LAUNCHER": "999999999"}).stdout == "goes on\n"
