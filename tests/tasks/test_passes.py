"""Commands on several processes or after a kill give exactly the files of one uninterrupted process."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused_in_one_line as refused

import aezoo
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.io import partial
from aezoo.tasks.codec import container
from aezoo.tasks.passes import Passes, Range

N, BATCH = 70, 8
COMMANDS = {
    "reconstruct": [],
    "denoise": ["--corrupt=gaussian:0.1", "--baselines=false"],
    "impute": ["--hide=0.3", "--draws=2", "--steps=3", "--baselines=false"],
    "embed": ["--table=csv"],
    "detect": ["--score=deviance,mahalanobis", "--maps=true", "--contamination=0.1"],
    "generate": [f"--n={N}"],
    "compress": ["--mode=lossy", "--compare=false"],
    "decompress": [],
}
# a model of images of any size
MAP = {"latent_map": True, "hidden_dims": (4, 8), "latent_dim": 3}
# values in a frame of an .aez file
FRAME = 64 * 2 * BATCH


@pytest.fixture(scope="module")
def words_of(tmp_path_factory):
    """The command line of a command for a model and samples, as a list of words."""
    home = tmp_path_factory.mktemp("passes")
    torch.manual_seed(0)
    aezoo.save_model(aezoo.create_model("vae", (1, 8, 8), latent_dim=3, hidden_dims=(16,)), home / "model")
    x = np.random.default_rng(0).random((N, 1, 8, 8), np.float32)
    np.save(home / "x.npy", x)
    np.save(home / "holes.npy", np.where(x < 0.3, np.nan, x))

    def words(command: str, out: Path, *flags: str) -> list[str]:
        common = [f"--ckpt_path={home / 'model'}", f"--out={out}", "--device=cpu"]
        if command == "decompress":
            if not (home / "aez").exists():
                main(words("compress", home / "aez"))
            return [command, *common, f"--input={home / 'aez' / 'samples.aez'}", *flags]
        name = "holes" if command == "impute" else "x"
        given = [] if command == "generate" else [f"--input={home / name}.npy"]
        return [command, *common, f"--batch_size={BATCH}", *given, *COMMANDS[command], *flags]

    return words


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def counted(monkeypatch, most: int = 10**6) -> list[int]:
    """Count computed blocks, and interrupt the run after a number of them."""
    blocks, seen = Passes.blocks, []

    def limited(self, *given, **named):
        for start, batch in blocks(self, *given, **named):
            if len(seen) == most:
                raise KeyboardInterrupt
            seen.append(start)
            yield start, batch

    monkeypatch.setattr(Passes, "blocks", limited)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_interrupted_command_resumes_bit_for_bit(words_of, tmp_path, monkeypatch, capsys, command):
    monkeypatch.setattr(partial, "SECONDS", 0.0)
    monkeypatch.setattr(container, "MAX_FRAME_VALUES", FRAME)
    words = words_of(command, tmp_path / "whole")
    with monkeypatch.context() as patch:
        seen = counted(patch)
        main(words)
        every = len(seen)
    assert every >= -(-N // (2 * BATCH))
    for most in (min(4, every - 2), every - 1):
        out = tmp_path / str(most)
        with monkeypatch.context() as patch:
            counted(patch, most)
            with pytest.raises(SystemExit):
                main(words_of(command, out))
        assert [path.name for path in out.iterdir()] == [f".{command}"]
        assert f"the same command continues from the results in {out / f'.{command}'}" in capsys.readouterr().err
        with monkeypatch.context() as patch:
            seen = counted(patch)
            main(words_of(command, out))
            assert len(seen) == every - most
        assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
def test_coding_on_two_processes_gives_the_files_of_one(tmp_path):
    model = aezoo.create_model("conv_ae", (1, 16, 16), **MAP)
    aezoo.save_model(model, tmp_path / "model")
    (tmp_path / "in").mkdir()
    for i in range(7):
        pixels = np.random.default_rng(i).integers(0, 256, (16 + 8 * (i % 2), 24), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    before = torch.get_num_threads()
    common = [f"--ckpt_path={tmp_path / 'model'}", "--device=cpu"]
    try:
        for devices in (1, 2):
            out = tmp_path / str(devices)
            extra = [f"--devices={devices}", f"--out={out / 'aez'}", f"--input={tmp_path / 'in'}"]
            main(["compress", *common, *extra, "--compare=false"])
            main(["decompress", *common, *extra[:1], f"--out={out / 'png'}", f"--input={out / 'aez/samples.aez'}"])
    finally:
        torch.set_num_threads(before)
    found = content(tmp_path / "1")
    assert len(found) >= 9 and found == content(tmp_path / "2")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["reconstruct", "impute", "detect"])
def test_two_processes_give_the_files_of_one(words_of, tmp_path, command):
    main(words_of(command, tmp_path / "one"))
    before = torch.get_num_threads()
    try:
        main(words_of(command, tmp_path / "two", "--devices=2"))
    finally:
        torch.set_num_threads(before)
    assert content(tmp_path / "one") == content(tmp_path / "two")


KILLED = """
import json, os, signal, sys
from aezoo.cli.main import main
from aezoo.io import partial

partial.SECONDS = 0.0
save = partial.Partial.save

def counted(self, state, now=False, name=""):
    save(self, state, now, name)
    if int(state()["blocks"]) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

partial.Partial.save = counted
main(json.loads(sys.argv[1]))
"""


@pytest.mark.slow
def test_killed_command_resumes_bit_for_bit(words_of, tmp_path, monkeypatch):
    argv = words_of("reconstruct", tmp_path / "again")
    settings = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", KILLED, json.dumps(argv)], capture_output=True, env=settings)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    seen = counted(monkeypatch)
    main(argv)
    assert seen == [*range(4 * BATCH, N, BATCH)]
    main(words_of("reconstruct", tmp_path / "whole"))
    assert content(tmp_path / "again") == content(tmp_path / "whole")


@pytest.mark.slow
def test_other_settings_start_from_the_beginning(words_of, tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "SECONDS", 0.0)
    with monkeypatch.context() as patch:
        counted(patch, 4)
        with pytest.raises(SystemExit):
            main(words_of("reconstruct", tmp_path))
    seen = counted(monkeypatch)
    main(words_of("reconstruct", tmp_path, "--seed=1"))
    assert len(seen) == -(-N // BATCH)


@pytest.mark.slow
def test_export_refuses_devices(words_of, tmp_path, capsys):
    command = "export"
    words = [word for word in words_of("reconstruct", tmp_path)[1:] if not word.startswith(("--input", "--batch_size"))]
    assert f"{command} runs in one process, since " in refused(capsys, command, *words, "--devices=2")


def test_blocks_of_all_processes_are_the_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(Passes, "_start_others", lambda self: None)
    monkeypatch.setattr(Passes, "_check_others", lambda self: None)
    x = torch.rand(53, 2)
    first = partial.Partial(tmp_path / "parts", "key", "")
    parts = [first, *(partial.Partial(tmp_path / "parts", "key", "", rank) for rank in (1, 2))]
    found: list[list[int]] = [[] for _ in parts]
    totals = [Range() for _ in parts]

    def work(rank):
        passes = Passes(parts[rank], rank=rank, world=3)
        for start, n in passes.blocks(53, 5, 0, totals=(totals[rank],)):
            found[rank].append(start)
            totals[rank].add(x[start : start + n])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [start for part in found for start in part] == [*range(0, 53, 5)] and min(map(len, found)) > 2
    assert {(total.low, total.high) for total in totals} == {(float(x.min()), float(x.max()))}
    first.remove()


@pytest.mark.slow
def test_failed_process_is_reported_in_one_line(tmp_path):
    parts = partial.Partial(tmp_path / "parts", "key", "")
    passes = Passes(parts, ["no-such-command"], world=2)
    with pytest.raises(AezooError, match=r"^process 1 of --devices 2: unknown command 'no-such-command'"):
        list(passes.blocks(10, 2, 0))
    passes.close()
    parts.remove()
