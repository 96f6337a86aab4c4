"""A set has the same identity wherever its files are, and another one when they change."""

import shutil

import numpy as np
import pytest
from PIL import Image

from aezoo.data import DataModule, identity
from aezoo.data.identity import data_identity, data_set_name


@pytest.fixture
def array(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(60, dtype=np.float32).reshape(20, 3))
    return tmp_path / "x.npy"


@pytest.fixture
def photos(tmp_path):
    for i in range(5):
        (tmp_path / "photos" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(tmp_path / "photos" / str(i % 2) / f"{i}.png")
    return tmp_path / "photos"


def of_folder(path):
    return data_identity("folder", str(path))


def test_a_copy_of_an_array_is_the_same_set(array, tmp_path):
    shutil.copy(array, tmp_path / "copy.npy")
    assert data_identity("array", str(array)) == data_identity(str(tmp_path / "copy.npy"))


def test_one_changed_value_of_an_array_is_another_set(array):
    before = data_identity(str(array))
    x = np.load(array)
    x[7, 1] += 1
    np.save(array, x)
    assert data_identity(str(array)) != before


def test_a_change_within_a_large_file_is_found_in_its_blocks(array, monkeypatch):
    monkeypatch.setattr(identity, "_WHOLE", 64)
    monkeypatch.setattr(identity, "_BLOCK", 8)
    before = data_identity(str(array))
    assert data_identity(str(array)) == before
    content = bytearray(array.read_bytes())
    content[-1] ^= 1
    array.write_bytes(content)
    assert data_identity(str(array)) != before
    array.write_bytes(content + b"more")
    assert data_identity(str(array)) != before


def test_a_copy_of_a_folder_is_the_same_set(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "moved")
    (tmp_path / "moved" / ".cache").mkdir()
    (tmp_path / "moved" / ".cache" / "index").write_text("written by a tool")
    assert of_folder(photos) == of_folder(tmp_path / "moved") == data_identity(str(photos))


@pytest.mark.parametrize("change", ["name", "content", "removed", "added"])
def test_a_changed_folder_is_another_set(photos, change):
    before, file = of_folder(photos), photos / "0" / "0.png"
    if change == "name":
        file.rename(photos / "0" / "9.png")
    elif change == "content":
        Image.new("L", (8, 8), 77).save(file)
    elif change == "removed":
        file.unlink()
    else:
        shutil.copy(file, photos / "1" / "more.png")
    assert of_folder(photos) != before


def test_sets_without_files_are_known_by_name():
    assert data_identity("mnist5k") == "mnist5k" != data_identity("digits")
    assert data_identity("hf", "owner/name") == "hf owner/name"
    assert data_identity("activations", of="digits") == "activations of digits"


def test_run_names_distinguish_files_and_folders(array, photos):
    assert data_set_name("array", str(array)) == data_set_name(str(array)) == "x"
    assert data_set_name("folder", str(photos)) == "photos"
    assert data_set_name("mnist5k", "elsewhere") == "mnist5k"
    assert data_set_name("folder") == "folder"


def test_arrays_in_memory_have_no_identity():
    assert DataModule.from_arrays(np.random.default_rng(0).random((20, 3))).identity == ""


def test_root_of_a_plugin_source_belongs_to_its_identity(photos):
    before = data_identity("my_source", str(photos))
    Image.new("L", (8, 8), 200).save(photos / "0" / "0.png")
    assert data_identity("my_source", str(photos)) != before
    assert data_identity("my_source") == "my_source" and data_identity("digits", str(photos)) == "digits"
