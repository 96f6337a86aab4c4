"""Closed or full standard streams never lead to a traceback."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

FIT = "fit --model vae --model.hidden_dims [8] --data digits --trainer.max_epochs 1 --projector.n 0"
CLOSED = [">&-", "2>&-", ">&- 2>&- <&-"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="redirections of a POSIX shell")


# one process, since imports would take most of the time of several
COMMANDS = """
import sys
from aezoo.__main__ import main
for command in sys.argv[1:]:
    sys.argv = ["aezoo", *command.split()]
    main()
"""


def shell(command, redirections, folder, *more):
    """Run commands in a shell that redirects their streams; returns exit code and stderr."""
    python = f"-c {shlex.quote(COMMANDS)} {shlex.join([command, *more])}" if more else f"-m aezoo {command}"
    line = f'"{sys.executable}" {python} {redirections}'
    ended = subprocess.run(["sh", "-c", line], cwd=folder, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("redirections", CLOSED)
def test_light_commands_run_with_closed_streams(tmp_path, redirections):
    assert shell("list vae", redirections, tmp_path) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", ["list", "--help", "info vae"])
def test_full_output_is_reported_in_one_line(tmp_path, command):
    code, error = shell(command, "> /dev/full", tmp_path)
    assert code == 2
    assert error.splitlines() == [
        "aezoo: cannot write the output: No space left on device; free disk space, or write it elsewhere"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("redirections", CLOSED[-1:])
def test_fits_and_commands_run_with_closed_streams(tmp_path, redirections):
    code, error = shell(FIT, redirections, tmp_path, "reconstruct --ckpt_path runs/vae-digits/0")
    assert code == 0 and "Traceback" not in error
    assert (tmp_path / "runs/vae-digits/0/checkpoints/last.ckpt").is_file()
    assert (tmp_path / "runs/vae-digits/0/reconstruct/errors.csv").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_fit_to_full_output_ends_in_one_line(tmp_path):
    code, error = shell(FIT, "> /dev/full", tmp_path)
    assert code == 2 and "Traceback" not in error
    assert "cannot write the output: No space left on device" in error.splitlines()[-1]


@pytest.mark.slow
def test_class_folder_with_undecodable_name_is_usable(tmp_path):
    """File names are bytes on Linux; undecodable ones are shown with a question mark or an escape."""
    photos = tmp_path / "photos"
    for name in (b"caf\xe9", b"plain"):
        folder = Path(os.fsdecode(bytes(photos) + b"/" + name))
        folder.mkdir(parents=True)
        for i in range(20):
            Image.new("L", (8, 8), i * 10).save(folder / f"{i}.png")
    commands = [f"{command} --ckpt_path runs/vae-photos/0" for command in ("detect", "reconstruct")]
    code, error = shell(FIT.replace("--data digits", "--data photos"), "", tmp_path, *commands)
    assert code == 0, error
    assert (tmp_path / "runs/vae-photos/0/detect/scores.csv").is_file()
    assert (tmp_path / "runs/vae-photos/0/reconstruct/errors.csv").is_file()
