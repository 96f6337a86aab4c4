"""Arrays of unfinished commands: written by position, resumed only by the same command, packed in parts."""

import errno
import os

import numpy as np
import pytest
import torch
from torch import nn

from aezoo.errors import AezooError
from aezoo.io import partial
from aezoo.io.partial import Partial


def begun(folder, key="key", rank=0):
    return Partial(folder / "parts", key, "free disk space", rank)


def test_rows_of_two_ranks_make_one_array(tmp_path):
    x = np.random.default_rng(0).random((10, 2, 3))
    one, two = begun(tmp_path), begun(tmp_path, rank=1)
    one.write("x", [0, 1, 2, 6, 7], x[[0, 1, 2, 6, 7]], 10)
    two.write("x", [3, 4, 5, 8], x[[3, 4, 5, 8]], 10)
    two.write("x", [9], x[9:], 10)
    assert np.array_equal(np.load(tmp_path / "parts" / "x.npy"), x)
    file = one.opened("x")
    assert (file.n, file.shape, file.dtype) == (10, (2, 3), np.float64) and b"".join(file.chunks()) == x.tobytes()
    two.close()
    one.remove()
    assert not (tmp_path / "parts").exists()


def test_saved_progress_is_found_by_same_key_only(tmp_path):
    one = begun(tmp_path)
    one.write("x", [0], np.ones((1, 2)), 2)
    one.save(lambda: {"rows": 1, "names": ["x"]}, now=True)
    one.close()
    again = begun(tmp_path)
    found = again.progress()
    assert int(found["rows"]) == 1 and found["names"].tolist() == ["x"]
    again.close()
    other = begun(tmp_path, "other")
    assert other.progress() == {} and not [*(tmp_path / "parts").glob("*.np*")]
    other.close()


def test_progress_is_saved_after_some_seconds(tmp_path, monkeypatch):
    parts = begun(tmp_path)
    parts.save(lambda: {"rows": 1})
    assert parts.progress() == {}
    monkeypatch.setattr(partial, "SECONDS", 0.0)
    parts.save(lambda: {"rows": 1})
    assert parts.progress() == {"rows": 1}
    parts.close()


def test_full_disk_is_reported_in_one_line(tmp_path, monkeypatch):
    parts = begun(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(AezooError, match=r"cannot write \S+x\.npy: No space left on device; free disk space$"):
            parts.write("x", [0], np.ones((1, 2)), 10**6)
    parts.close()


def test_npz_in_parts_equals_numpys(tmp_path):
    arrays = {"x": np.arange(12.0).reshape(3, 4), "file": np.array(["a", "long"])}
    members = {name: (x.shape, x.dtype, [x[i : i + 1].tobytes() for i in range(len(x))]) for name, x in arrays.items()}
    with (tmp_path / "x.npz").open("wb") as file:
        partial.write_npz(file, members)
    with np.load(tmp_path / "x.npz") as found:
        assert set(found) == {"x", "file"} and all(np.array_equal(found[name], x) for name, x in arrays.items())


def test_digest_depends_on_weights_and_values():
    torch.manual_seed(0)
    nets = [nn.Linear(2, 2), nn.Linear(2, 2)]
    digests = {partial.digest(net, value) for net in nets for value in (1, {"a": 2})}
    assert len(digests) == 4 and partial.digest(nets[0], 1) in digests
