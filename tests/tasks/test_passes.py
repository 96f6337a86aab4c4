"""Verbs on several processes and after a kill: the files of one undisturbed process, bit for bit."""

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
from refusals import refused_in_one_line as refused

import aezoo
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.io import partial
from aezoo.tasks.passes import Passes, Range

N, BATCH = 70, 8
VERBS = {
    "reconstruct": [],
    "denoise": ["--corrupt=gaussian:0.1", "--baselines=false"],
    "embed": ["--table=csv"],
    "detect": ["--score=deviance,mahalanobis", "--maps=true", "--contamination=0.1"],
    "generate": [f"--n={N}"],
}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The words of a verb's command for a model and samples."""
    home = tmp_path_factory.mktemp("passes")
    torch.manual_seed(0)
    aezoo.save_model(aezoo.create_model("vae", (1, 8, 8), latent_dim=3, hidden_dims=(16,)), home / "model")
    np.save(home / "x.npy", np.random.default_rng(0).random((N, 1, 8, 8), np.float32))

    def words(verb: str, out: Path, *flags: str) -> list[str]:
        given = [] if verb == "generate" else [f"--input={home / 'x.npy'}"]
        common = [f"--ckpt_path={home / 'model'}", f"--out={out}", "--device=cpu", f"--batch_size={BATCH}"]
        return [verb, *common, *given, *VERBS[verb], *flags]

    return words


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def counted(monkeypatch, most: int = 10**6) -> list[int]:
    """Count the blocks that are computed, and interrupt the run after so many."""
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
@pytest.mark.parametrize("verb", VERBS)
def test_interrupted_verb_goes_on_bit_for_bit(command, tmp_path, monkeypatch, capsys, verb):
    monkeypatch.setattr(partial, "SECONDS", 0.0)
    with monkeypatch.context() as patch:
        seen = counted(patch)
        main(command(verb, tmp_path / "whole"))
        every = len(seen)
    assert every >= -(-N // BATCH)
    for most in (4, every - 1):
        out = tmp_path / str(most)
        with monkeypatch.context() as patch:
            counted(patch, most)
            with pytest.raises(SystemExit):
                main(command(verb, out))
        assert [path.name for path in out.iterdir()] == [f".{verb}"]
        assert f"the same command goes on with what is in {out / f'.{verb}'}" in capsys.readouterr().err
        with monkeypatch.context() as patch:
            seen = counted(patch)
            main(command(verb, out))
            assert len(seen) == every - most
        assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["reconstruct", "detect"])
def test_two_processes_give_the_files_of_one(command, tmp_path, verb):
    main(command(verb, tmp_path / "one"))
    before = torch.get_num_threads()
    try:
        main(command(verb, tmp_path / "two", "--devices=2"))
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
def test_killed_verb_goes_on_bit_for_bit(command, tmp_path, monkeypatch):
    argv = command("reconstruct", tmp_path / "again")
    settings = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", KILLED, json.dumps(argv)], capture_output=True, env=settings)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    seen = counted(monkeypatch)
    main(argv)
    assert seen == [*range(4 * BATCH, N, BATCH)]
    main(command("reconstruct", tmp_path / "whole"))
    assert content(tmp_path / "again") == content(tmp_path / "whole")


@pytest.mark.slow
def test_other_settings_begin_anew(command, tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "SECONDS", 0.0)
    with monkeypatch.context() as patch:
        counted(patch, 4)
        with pytest.raises(SystemExit):
            main(command("reconstruct", tmp_path))
    seen = counted(monkeypatch)
    main(command("reconstruct", tmp_path, "--seed=1"))
    assert len(seen) == -(-N // BATCH)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["compress", "decompress", "export"])
def test_verbs_of_one_process_refuse_devices(command, tmp_path, capsys, verb):
    words = [word for word in command("reconstruct", tmp_path)[1:] if not word.startswith("--input")]
    words = [word for word in words if verb == "compress" or not word.startswith("--batch_size")]
    assert f"{verb} runs in one process, since " in refused(capsys, verb, *words, "--devices=2")


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
    passes = Passes(parts, ["no-such-verb"], world=2)
    with pytest.raises(AezooError, match=r"^process 1 of --devices 2: unknown command 'no-such-verb'"):
        list(passes.blocks(10, 2, 0))
    passes.close()
    parts.remove()
