"""Untrusted arrays, images and archives: no code is run, sizes are limited, and paths stay in their folder."""

import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hostile import files
from hostile.memory import memory
from PIL import Image

from aezoo.cli.main import main
from aezoo.data import DataModule
from aezoo.data.idx import read_idx
from aezoo.data.images import read_image
from aezoo.data.readers import read_arrays
from aezoo.errors import AezooError
from aezoo.security import archives


def data(path, **plain):
    module = DataModule(str(path), **plain)
    module.setup()
    return module


@pytest.mark.parametrize("how", ["object", "npz", "zip", "legacy", "pickle"])
def test_pickled_array_file_is_refused(canary, how):
    bomb = np.array([files.Bomb(canary)], object)
    path = Path("x.npy" if how == "object" else "x.npz" if how == "npz" else "x.pt")
    if how == "object":
        np.save(path, bomb, allow_pickle=True)
    elif how == "npz":
        np.savez(path, x=bomb)
    else:
        files.pickled(path, {"x": files.Bomb(canary)}, how)
    with pytest.raises(AezooError, match=r"can run code|more than tensors"):
        data(path)
    assert not canary.exists()


@pytest.mark.parametrize("shape", [(2**62, 4), (10**6, 10**6), (2**40,), (0, 2**62), (-1, 4), (2**70,)])
def test_oversized_array_headers_are_refused(shape):
    Path("x.npy").write_bytes(files.npy_header(shape) + bytes(64))
    before = memory()
    with pytest.raises(AezooError, match=r"x\.npy"):
        data("x.npy")
    files.npz(Path("x.npz"), x=files.npy_header(shape) + bytes(64))
    with pytest.raises(AezooError, match=r"x\.npz"):
        data("x.npz")
    Path("idx").write_bytes(b"\0\0\x08\x03" + np.array([2**32 - 1] * 3, ">u4").tobytes() + bytes(64))
    with pytest.raises(AezooError, match="more than the limit"):
        read_idx(Path("idx"))
    assert memory() - before < 2**25


@pytest.mark.slow
def test_archive_bomb_is_refused_below_raised_limit():
    limit = 2**24
    bomb, packed = files.npz_bomb(Path("x.npz")), files.idx_bomb(Path("x.gz"), declared=2**31)
    lying = files.idx_bomb(Path("y.gz"), declared=4)
    before = memory()
    assert bomb.stat().st_size < 2**20
    with pytest.raises(AezooError, match=r"takes 64 MiB of memory, more than the limit of 16 MiB: .* --data.max_bytes"):
        DataModule(str(bomb), max_bytes=limit)
    with pytest.raises(AezooError, match="more than the limit"):
        read_idx(packed)
    # content beyond the size declared in the header is not unpacked and is an error
    with pytest.raises(AezooError, match="where its header declares"):
        read_idx(lying)
    assert memory() - before < 2**25
    assert DataModule(str(bomb), max_bytes=2**27).input_shape == (1024,)


def test_size_limit_applies_to_tensors_texts_and_tables():
    import pandas

    torch.save(torch.zeros(1, 8).expand(2**40, 8), "x.pt")
    pandas.DataFrame({"a": np.zeros(10**6)}).to_parquet("x.parquet")
    Path("x.csv").write_text("1,2\n" * 10**5)
    np.save("x.npy", np.zeros((10**5, 8)))
    Path("y.csv").write_text("1,2\n3,4\n5,6\n" * 9)
    for name, limit in (("x.pt", 2**33), ("x.parquet", 10**6), ("x.csv", 10**6), ("x.npy", 10**6)):
        with pytest.raises(AezooError, match=f"{name} takes .* --data.max_bytes"):
            DataModule(name, max_bytes=limit)
    assert data("y.csv", max_bytes=10**6).input_shape == (2,)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lists", "texts"])
def test_parquet_columns_that_expand_are_refused_unread(kind):
    import pyarrow
    from pyarrow import parquet

    pool = pyarrow.default_memory_pool()
    rows = 20 if kind == "lists" else 4000
    if kind == "lists":
        column = pyarrow.array([[0.0] * 10**6] * rows, pyarrow.list_(pyarrow.float64()))
    else:
        column = pyarrow.DictionaryArray.from_arrays(np.zeros(rows, np.int32), ["x" * 10**5])
    parquet.write_table(pyarrow.table({"a": [1.0] * rows, "b": column}), "x.parquet", compression="zstd")
    assert Path("x.parquet").stat().st_size < 10**6
    del column
    before = pool.bytes_allocated()
    said = []
    for label in ("auto", "b"):
        with pytest.raises(AezooError) as error:
            read_arrays(Path("x.parquet"), max_bytes=10**7, label_column=label)
        said.append(str(error.value))
    assert "the columns b contain no numbers" in said[0]
    assert ("contains lists" if kind == "lists" else "are not names of classes") in said[1]
    assert pool.bytes_allocated() - before < 10**7


def test_a_parquet_of_more_rows_than_it_declares_is_refused(monkeypatch):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"a": np.zeros(10**6)}), "x.parquet")

    class Lies(parquet.ParquetFile):
        @property
        def metadata(self):
            return SimpleNamespace(num_rows=1, num_row_groups=0)

    monkeypatch.setattr(parquet, "ParquetFile", Lies)
    with pytest.raises(AezooError, match=r"takes .* --data.max_bytes"):
        read_arrays(Path("x.parquet"), max_bytes=10**6)


def test_image_above_pixel_limit_is_refused():
    Path("pictures").mkdir()
    Image.new("1", (3000, 3000)).save("pictures/bomb.png")
    assert Path("pictures/bomb.png").stat().st_size < 10**4
    with pytest.raises(AezooError, match=r"9 million pixels, more than the limit of 1: .* --data.max_pixels"):
        data("pictures", max_pixels=10**6)
    with pytest.raises(AezooError, match="more than the limit"):
        read_image(Path("pictures/bomb.png"), None, 1, 10**6)
    assert read_image(Path("pictures/bomb.png"), 28, 1, 10**7).shape == (1, 28, 28)


def test_postscript_image_is_refused(canary, monkeypatch, tmp_path):
    Path("pictures").mkdir()
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    Path("pictures/x.png").write_text(text)
    script = tmp_path / "bin" / "gs"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\nmkdir -p {canary}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(AezooError, match="not a readable image"):
        data("pictures")
    assert not canary.exists()
    with Image.open("pictures/x.png") as image:
        assert image.format == "EPS", "the file is not PostScript"


# ---- paths -----------------------------------------------------------------------------------------------------------


def test_torchvision_tar_cannot_escape_its_folder(tmp_path):
    from torchvision.datasets.utils import extract_archive

    archive = files.tar_that_escapes(tmp_path / "set.tar.gz")
    with archives.safe_extraction(), pytest.raises(tarfile.TarError):
        extract_archive(str(archive), str(tmp_path / "inside" / "set"))
    assert not (tmp_path / "inside" / "escaped.txt").exists() and not (tmp_path / "absolute.txt").exists()
    assert (tmp_path / "inside" / "set" / "honest.txt").read_text() == "hello"
    assert tarfile.TarFile.extraction_filter is None or "inside" not in repr(tarfile.TarFile.extraction_filter)


def test_archive_with_path_traversal_is_refused(tmp_path, monkeypatch):
    import torchvision

    def opened(root, **_):
        archive = files.tar_that_escapes(Path(root) / "set.tar.gz")
        torchvision.datasets.utils.extract_archive(str(archive), str(Path(root) / "set"))

    monkeypatch.setattr(torchvision.datasets, "DTD", opened)
    Path("data").mkdir()
    with pytest.raises(AezooError, match="outside"):
        DataModule("dtd", download=True).setup()
    assert not Path("data/escaped.txt").exists()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vae-mnist", "vae-mnist"),
        ("..", "run"),
        ("", "run"),
        ("../../etc", "_.._etc"),
        ("a/b\\c:d\n", "a_b_c_d_"),
        (".hidden", "hidden"),
        ("epoch=1+x_2.5", "epoch=1+x_2.5"),
        ("été", "été"),
    ],
)
def test_safe_name_is_a_single_path_component(name, part):
    assert archives.safe_name(name) == part
    assert (Path("root") / part).parent == Path("root")


@pytest.mark.slow
def test_config_name_cannot_place_run_outside_folder(capsys):
    Path("inner").mkdir()
    Path("inner/...yaml").write_text("model: vae")
    assert Path("inner/...yaml").stem == ".."
    off = [f"--{name}.every_n_epochs=0" for name in ("reconstructions", "samples", "traversal", "latents")]
    few = ["--data.name=digits", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--projector.n=0", *off]
    main(["fit", "-c", "inner/...yaml", "--trainer.default_root_dir", "inner/runs", *few])
    assert Path("inner/runs/run/0/config.yaml").is_file()
    assert {path.name for path in Path("inner").iterdir()} == {"...yaml", "runs"}


@pytest.mark.slow
def test_class_names_do_not_become_paths(capsys):
    np.savez("x.npz", x=np.random.default_rng(0).random((60, 4, 4)), y=np.array(["../../a", "/etc/b"] * 30))
    flags = ["--data.name", "x.npz", "--data.size", "8", "--trainer.max_epochs=1", "--model", "vae"]
    main(["fit", *flags, "--model.latent_dim=2"])
    assert {path.name for path in Path().iterdir()} == {"x.npz", "runs"}
    assert not (Path.cwd().parent / "a").exists()
