"""npy: samples of a .npy file, read in batches, equal those of the array in memory."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import promises
import pytest
import torch

import aezoo
from aezoo.cli.task_commands import read
from aezoo.data import in_memory
from aezoo.data.npy import NpyDataset
from aezoo.data.readers import read_arrays
from aezoo.errors import AezooError
from aezoo.io.checkpoint import save_model

UNKNOWN = None


def sparse(path, shape, dtype=np.uint8, rows=()):
    """A file of zeros, in which only `rows` use disk space and contain ones."""
    x = np.lib.format.open_memmap(path, "w+", dtype, shape)
    for i in rows:
        x[i] = 1
    return path


@pytest.mark.parametrize("dtype", ["u1", "?", "<i2", ">i4", "<f2", "<f4", ">f8"])
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((9, 5), {}),
        ((9, 4, 4), {}),
        ((9, 4, 6), {"layout": "sequence"}),
        ((9, 6, 4, 3), {}),
        ((9, 8, 6, 3), {"layout": "image_last", "size": 4, "channels": 1}),
    ],
)
def test_rows_equal_those_of_the_array_in_memory(tmp_path, shape, settings, dtype):
    x = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x)
    streamed, held = (read(str(tmp_path / name), UNKNOWN, settings) for name in ("x.npy", "x.npz"))
    assert isinstance(streamed.dataset, NpyDataset) and not isinstance(held.dataset, NpyDataset)
    assert len(streamed) == len(held) and streamed.shape == held.shape and streamed.y is None
    for index in ([0], [3, 4, 5], [8, 0, 1, 1, 7]):
        assert torch.equal(streamed.rows(index), held.rows(index))
    index = torch.tensor([7, 2, 3])
    for a, b in ((streamed, held), (streamed.subset(index), held.subset(index))):
        for mine, other in zip(a.batches(4), b.batches(4), strict=True):
            assert torch.equal(mine, other)
    assert torch.equal(streamed.subsample(4).rows([0, 3]), held.subsample(4).rows([0, 3]))


def test_file_larger_than_memory_is_read_by_rows(tmp_path):
    n = 2**38 // 300
    samples = read(str(sparse(tmp_path / "x.npy", (n, 10, 10, 3), rows=(n - 2,))), UNKNOWN)
    assert len(samples) == n and samples.shape == (3, 10, 10)
    found = samples.rows([n - 1, n - 2, 5])
    assert torch.equal(found, torch.tensor([0, 1, 0]).view(3, 1, 1, 1).expand(3, 3, 10, 10) / 255)


def test_training_on_a_file_larger_than_memory_is_refused(tmp_path):
    path = sparse(tmp_path / "x.npy", (2**38 // 4, 4))
    with pytest.raises(AezooError, match=r"takes 256 GiB of memory, more than the limit of 8 GiB: .*--data.max_bytes"):
        read_arrays(path)
    fortran = np.lib.format.open_memmap(tmp_path / "f.npy", "w+", np.uint8, (2**36, 4), fortran_order=True)
    with pytest.raises(AezooError, match=r"f\.npy takes 256 GiB of memory"):
        read(fortran.filename, UNKNOWN)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    ("missing", "values", "words"),
    [
        ("raise", {3: np.nan, 7: np.inf}, "has NaN or infinity in 2 of 9 rows, the first is row 3: fill or remove "
         "them, or give --data.missing keep"),
        ("raise", {8: -np.inf}, "has NaN or infinity in 1 of 9 rows, the first is row 8: fill or remove them"),
        ("keep", {3: np.nan, 7: np.inf}, "has infinity in 1 of 9 rows, the first is row 7: fill or remove them"),
        ("keep", {5: [np.nan] * 4, 2: np.inf}, "has no value at all in row 5: remove such rows"),
    ],
)  # fmt: skip
def test_rows_that_are_not_finite_are_named(tmp_path, monkeypatch, order, missing, values, words):
    monkeypatch.setattr(in_memory, "_CHUNK", 8)  # two rows
    x = np.zeros((9, 4), order=order)
    for i, value in values.items():
        x[i, : np.size(value)] = value
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(AezooError, match=re.escape(f"x.npy: x {words}")):
        read(str(tmp_path / "x.npy"), UNKNOWN, {"missing": missing})


@pytest.mark.parametrize("change", ["shorter", "other", "gone"])
def test_file_that_changes_while_it_is_read_is_refused(tmp_path, change):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((50, 40), np.float32))
    samples = read(str(path), UNKNOWN)
    if change == "gone":
        path.unlink()
    else:
        np.save(path, np.ones((50 if change == "other" else 5, 40), np.float32))
    with pytest.raises(AezooError, match=r"was changed while it was read|cannot read \S+: No such file"):
        samples.rows([30])


PEAKS = """
import re, sys
from pathlib import Path
from aezoo.cli.main import main

folder, n = sys.argv[1:]
for file in ("few", "x"):
    mask = ["--mask", f"{folder}/half.npy", "--steps", "1", "--n_shown", "0"]
    drawn = ["--n", "300" if file == "few" else n]
    for command, *flags in (
        ["embed"], ["detect", "--n_fit", "200"], ["impute", *mask], ["reconstruct"], ["denoise"], ["generate", *drawn],
    ):
        name = "some" if (file, command) == ("x", "impute") else file
        common = [f"--ckpt_path={folder}/{'vae' if command == 'generate' else 'model'}", f"--out={folder}"]
        given = [] if command == "generate" else [f"--input={folder}/{name}.npy"]
        main([command, *common, *given, "--device=cpu", *flags])
        # not ru_maxrss, which starts at that of the parent process
        print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="a process cannot tell what it took at most")
def test_memory_of_commands_does_not_grow_with_the_input(tmp_path):
    """With 250 MB, or with 10 GB if the figures of guarantees are measured."""
    n = 204_000 if promises.is_recording() else 5_000
    torch.manual_seed(0)
    model = aezoo.create_model("linear_ae", (3, 64, 64), latent_dim=2).eval()
    save_model(model, tmp_path / "model")
    prior = aezoo.create_model("vae", (3, 64, 64), latent_dim=2, hidden_dims=(4,))
    save_model(prior.eval(), tmp_path / "vae")
    sparse(tmp_path / "x.npy", (n, 3, 64, 64), np.float32, rows=(n - 2,))
    # the memory of the libraries depends on their versions
    sparse(tmp_path / "few.npy", (300, 3, 64, 64), np.float32, rows=())
    # impute keeps two arrays of this size in files, 200 MB
    sparse(tmp_path / "some.npy", (2_000, 3, 64, 64), np.float32, rows=())
    np.save(tmp_path / "half.npy", np.arange(64) > np.zeros((1, 1, 64, 1)) + 31)
    run = subprocess.run([sys.executable, "-c", PEAKS, tmp_path, str(n)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    peaks = [float(line) for line in run.stdout.splitlines() if re.fullmatch(r"\d+\.\d+", line)]
    assert len(peaks) == 12 and peaks[8] < peaks[5] + 100, peaks
    assert peaks[11] < peaks[5] + 150 and peaks[11] < 1500, peaks
    denoised, samples = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("denoised", "samples"))
    assert len(denoised) == len(samples) == n
    promises.record("input", {"samples": n, "peak": round(max(peaks))})
    with torch.no_grad():
        ones = torch.ones(1, 3, 64, 64)
        z, x_hat = model.encode(ones).numpy(), model(ones).numpy()
    codes, outputs = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("codes", "reconstructions"))
    np.testing.assert_allclose(codes[n - 2 : n - 1], z, rtol=1e-4)
    np.testing.assert_allclose(outputs[n - 2 : n - 1], x_hat, rtol=1e-4, atol=1e-5)
    assert (codes[n - 1] == codes[0]).all() and (codes[n - 2] != codes[0]).any()
    for name in ("scores", "errors"):
        lines = (tmp_path / f"{name}.csv").read_text().splitlines()
        assert len(lines) == n + 1 and lines[-1].startswith(f"{n - 1},")
        assert lines[-2].split(",")[1] != lines[-1].split(",")[1]
    (tmp_path / "imputed.npy").unlink()
    (tmp_path / "reconstructions.npy").unlink()  # not sparse, and pytest keeps its folders
