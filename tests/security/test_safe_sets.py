"""Untrusted Hugging Face sets and litdata chunks: no code is run and no address is opened."""

import bz2
import contextlib
import gzip
import json
import lzma
import socket
import zipfile

import numpy as np
import pytest
from hostile import files

from aezoo.data import DataModule
from aezoo.errors import AezooError


@pytest.fixture
def caller():
    """A server that detects connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield server


@pytest.mark.parametrize("kind", ["pickle", "image:pickle", "jpeg:pickle", "graph", "int", "no_header_numpy:9"])
def test_pickled_chunk_items_are_refused(canary, tmp_path, kind):
    from litdata.streaming.cache import Cache

    root = tmp_path / "set"
    root.mkdir()
    cache = Cache(str(root), chunk_size=2)
    for i in range(4):
        cache[i] = {"x": np.zeros(3, np.float32), "o": files.Bomb(canary)}
    cache.done()
    cache.merge()
    index = root / "index.json"
    told = json.loads(index.read_text())
    assert told["config"]["data_format"][1] == "pickle"
    told["config"]["data_format"][1] = kind
    index.write_text(json.dumps(told))
    # a wrong kind gives numbers, or an error if the number of bytes does not fit
    if kind in ("int", "no_header_numpy:9"):
        with contextlib.suppress(AezooError):
            DataModule("stream", root=str(root), column="o").setup()
    else:
        with pytest.raises(AezooError, match="which may be pickled and run code"):
            DataModule("stream", root=str(root))
        from aezoo.data import stream

        # earlier versions do not have the kind 'graph'
        with pytest.raises(Exception, match=r"Python objects|'graph'"):
            stream._reader(str(root))[0]
    assert not canary.exists()


def test_index_naming_a_module_imports_nothing(canary, tmp_path, monkeypatch):
    from litdata.streaming.cache import Cache

    (tmp_path / "set").mkdir()
    (tmp_path / "lurking.py").write_text(f"open({str(canary)!r}, 'w')\nfactory = dict")
    monkeypatch.syspath_prepend(tmp_path)
    cache = Cache(str(tmp_path / "set"), chunk_size=2)
    for i in range(4):
        cache[i] = {"x": np.full(3, 0.5, np.float32)}
    cache.done()
    cache.merge()
    index = tmp_path / "set" / "index.json"
    told = json.loads(index.read_text())
    protocol, spec = json.loads(told["config"]["data_spec"])
    keys = {"dict_context": json.loads(spec["context"])}
    context = {"default_factory_module": "lurking", "default_factory_name": "factory"} | keys
    spec |= {"type": "collections.defaultdict", "context": context}
    told["config"]["data_spec"] = json.dumps([protocol, spec])
    index.write_text(json.dumps(told))
    with pytest.raises(AezooError, match=r"lists items in a collections.defaultdict, which may import code"):
        DataModule("stream", root=str(tmp_path / "set"))
    assert not canary.exists()


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("files", ["{}", "\n  - split: train\n    path: [x.csv, {}]", "zip://x.csv::{}"])
def test_folder_referencing_urls_is_refused(caller, tmp_path, card, files):
    address = f"http://127.0.0.1:{caller.getsockname()[1]}/x.csv"
    root = tmp_path / "set"
    root.mkdir()
    text = f"configs:\n- config_name: default\n  data_files: {files.format(address)}\n"
    (root / card).write_text(f"---\n{text}---\n" if card == "README.md" else text)
    (root / "x.csv").write_text("a\n1\n")
    with pytest.raises(AezooError, match="addresses are not opened"):
        DataModule("hf", root=str(root))
    with pytest.raises(TimeoutError):
        caller.accept()


def test_folder_card_with_local_files_is_read(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "set"
    root.mkdir()
    rows = datasets.Dataset.from_dict({"x": [[float(i), 1.0] for i in range(20)]})
    rows.to_parquet(str(root / "some.parquet"))
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: some.parquet\n---\nhttp://x\n"
    )
    assert DataModule("hf", root=str(root)).input_shape == (2,)


def test_folder_loading_script_is_not_run(canary, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "set"
    root.mkdir()
    (root / "set.py").write_text(f"open({str(canary)!r}, 'w')")
    with pytest.raises(AezooError, match="cannot be read as a data set"):
        DataModule("hf", root=str(root))
    assert not canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.bz2", "jsonl.xz", "zip"])
def test_packed_files_of_a_folder_are_held_to_the_limit(tmp_path, monkeypatch, suffix):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "set"
    root.mkdir()
    line = b'{"x": [' + b"0.0, " * 10**6 + b"0.0]}\n"
    if suffix == "zip":
        with zipfile.ZipFile(root / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train.jsonl", line)
    else:
        pack = {"jsonl.gz": gzip, "jsonl.bz2": bz2, "jsonl.xz": lzma}[suffix]
        (root / f"train.{suffix}").write_bytes(pack.compress(line))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: pytest.fail("it was read"))
    with pytest.raises(AezooError, match=rf"train\.{suffix} takes .* more than the limit of .* --data.max_bytes"):
        DataModule("hf", root=str(root), max_bytes=10**6)


def test_a_packed_file_within_the_limit_is_read(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "set"
    root.mkdir()
    rows = "".join(f'{{"x": [{i}.5, 1.0]}}\n' for i in range(20))
    (root / "train.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    assert DataModule("hf", root=str(root)).input_shape == (2,)
