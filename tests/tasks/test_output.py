"""Result files: complete or not written, and readable by other programs."""

import csv
import errno
import io
import resource
import signal

import numpy as np
import pytest
import torch

from aezoo.errors import AezooError
from aezoo.tasks.result_store import Store, resolve_device, table_text, write_batch, write_csv


def test_stored_array_has_written_values(tmp_path):
    with Store(tmp_path / "new" / "folder") as store:
        array = store.array("x", (5, 2))
        write_batch(array, 0, torch.ones(3, 2, dtype=torch.bfloat16))
        write_batch(array, 3, torch.full((2, 2), 2.0))
        assert not [*(tmp_path / "new" / "folder").glob("x*")]
    assert store.files == [tmp_path / "new" / "folder" / "x.npy"]
    assert np.load(store.files[0]).tolist() == [[1, 1]] * 3 + [[2, 2]] * 2


def test_failed_store_keeps_existing_files(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(3))
    with pytest.raises(ValueError, match="broadcast"), Store(tmp_path) as store:
        store.array("x", (5,))[:] = np.ones(4)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
    assert np.load(tmp_path / "x.npy").tolist() == [0, 1, 2]


def test_files_are_renamed_only_after_all_are_written(tmp_path):
    from matplotlib.figure import Figure

    names = {"a.npy", "empty.npy", "b.npz", "t.csv", "f.bin", "p.png"}

    def fill(store):
        store.array("a", (5,))[:] = 1
        store.array("empty", (0, 5))
        store.arrays("b", {"x": np.ones(3)})
        store.table("t", [{"a": 1}])
        store.file("f.bin", b"old")
        store.file("f.bin", b"new")
        store.picture("p", lambda: Figure(figsize=(1, 1)))

    def there():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def stopped():
        with Store(tmp_path) as store:
            fill(store)
            assert len(there()) == 7 and there()["t.csv"] == b"before"
            raise KeyboardInterrupt

    (tmp_path / "t.csv").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert there() == {"t.csv": b"before"}
    with Store(tmp_path) as store:
        fill(store)
    assert there().keys() == names == {path.name for path in store.files}
    assert there()["t.csv"] == b"a\n1\n" and there()["f.bin"] == b"new"
    assert np.load(tmp_path / "a.npy").tolist() == [1] * 5 and np.load(tmp_path / "b.npz")["x"].tolist() == [1] * 3


def test_unwritable_file_is_named(tmp_path):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Store(tmp_path) as store:
        with pytest.raises(AezooError, match=r"cannot write \S+/t.csv: No space left .*: free disk space, or choose"):
            store.write("t.csv", full)
        store.file("f", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(AezooError, match=r"cannot write \S+/t.csv: .*; free disk space"), Store(tmp_path) as store:
        store.table("t", [{"a": 1}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "t.csv"]


def test_store_without_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store(None) as store:
        assert store.array("x", (2, 3)).shape == (2, 3)
        store.table("t", [{"a": 1}])
        store.file("f", b"1")
    assert not store.files and not [*tmp_path.iterdir()]


def test_tables_preserve_float_precision(tmp_path):
    rows = [{"index": 0, "mse": 0.1234567890123, "label": "a"}, {"index": 1, "mse": 2e-30, "label": "b, c"}]
    with Store(tmp_path) as store:
        store.table("t", rows)
        store.table("t", rows, "parquet")
    with (tmp_path / "t.csv").open(newline="") as file:
        found = [{**row, "index": int(row["index"]), "mse": float(row["mse"])} for row in csv.DictReader(file)]
    import pyarrow.parquet as pq

    assert found == rows == pq.read_table(tmp_path / "t.parquet").to_pylist()


def test_uncreatable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AezooError, match="choose a writable folder with --out"):
        Store(tmp_path / "file" / "out")


def test_array_beyond_disk_space_is_refused_first(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with (
            Store(tmp_path) as store,
            pytest.raises(AezooError, match=r"x.npy, 0.0 GiB: File too large; free disk space"),
        ):
            store.array("x", (2**19,))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, kept)
    with Store(tmp_path) as store, pytest.raises(AezooError, match=r"GiB: .*; free disk space, reduce it"):
        store.array("x", (2**40, 2**10))
    assert not [*tmp_path.iterdir()]
    with Store(None) as store, pytest.raises(AezooError, match="does not fit in memory"):
        store.array("x", (2**40, 2**10))


def test_array_disk_space_is_allocated_at_once(tmp_path):
    with Store(tmp_path) as store:
        store.array("x", (2**18,))
        (file,) = tmp_path.iterdir()
        assert file.stat().st_blocks * 512 >= 2**20


def test_text_table_is_aligned():
    text = table_text([{"name": "pca", "mse": 0.123456, "n": 12000}, {"name": "median filter", "mse": None, "n": 7}])
    assert text.splitlines() == [
        "name              mse       n",
        "pca            0.1235  12,000",
        "median filter       -       7",
    ]


def test_unavailable_device_is_refused():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(AezooError, match="no device 'cuda:99'"):
        resolve_device("cuda:99")
    with pytest.raises(AezooError, match="no device 'gpu'"):
        resolve_device("gpu")


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("+cmd", "'+cmd"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\tx", "'\tx"),
        ("-1.5", "-1.5"),
        ("+3", "+3"),
        ("plain = text", "plain = text"),
        (-2.5, "-2.5"),
    ],
)
def test_csv_cells_do_not_run_in_spreadsheets(cell, written):
    assert _csv_rows([{"name": cell}]) == [["name"], [written]]
    assert _csv_rows([{"=name()": 1}])[0] == ["'=name()"]


def _csv_rows(rows):
    file = io.BytesIO()
    write_csv(file, rows)
    return [*csv.reader(file.getvalue().decode().splitlines())]


def test_undecodable_names_are_written_escaped(tmp_path):
    with Store(tmp_path) as store:
        store.table("paths", [{"path": "caf\udce9"}])
    assert (tmp_path / "paths.csv").read_text() == "path\ncaf\\udce9\n"
    from pyarrow import parquet as pq

    with Store(tmp_path) as store:
        store.table("paths", [{"path": "caf\udce9", "error": 1.5}], kind="parquet")
    assert pq.read_table(tmp_path / "paths.parquet").to_pylist() == [{"path": "caf\\udce9", "error": 1.5}]


def test_printed_tables_have_no_control_characters():
    text = table_text([{"class": "red\x1b[31m\x07\r", "n": 3}])
    assert "red\\x1b[31m\\x07\\r" in text and "\x1b" not in text
