"""torchvision's sets by name, from files written here, without a network."""

import gzip
import inspect
import pickle
import struct
import urllib.request
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from aezoo.data import DataModule
from aezoo.data.idx import FAMILIES, read_idx
from aezoo.data.vision import _NO_DOWNLOAD, VISION_SETS
from aezoo.errors import AezooError

RNG = np.random.default_rng(0)


def idx(array, kind=8):
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


def write_family(name, folder, suffix="", train=60, test=20):
    """Tiny idx files of one family; returns the arrays."""
    family = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for part, n in enumerate((train, test)):
        images = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = np.arange(n) % len(family.class_names) + (family.split == "letters")
        if name == "qmnist":
            columns = np.zeros((n, 8), dtype=">i4")
            columns[:, 0] = labels
            raw = idx(columns, 12)
        else:
            raw = idx(labels.astype(np.uint8))
        for stem, content in ((family.images[part], idx(images)), (family.labels[part], raw)):
            (folder / (stem + suffix)).write_bytes(gzip.compress(content) if suffix else content)
        written.append((images, labels))
    return written


@pytest.fixture
def offline(monkeypatch):
    """Fail network requests immediately, and count them."""
    asked = []

    def refuse(url, *args, **kwargs):
        asked.append(url)
        raise URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for module in ("celeba", "pcam"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_file_from_google_drive", refuse)
    return asked


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", FAMILIES)
def test_idx_files_in_torchvision_layout_are_read(tmp_path, offline, name, suffix):
    (images, labels), (test_images, _) = write_family(name, tmp_path / FAMILIES[name].title / "raw", suffix, 700, 20)
    data = DataModule(name, root=str(tmp_path))
    assert data.num_classes == len(FAMILIES[name].class_names)
    assert [len(data.dataset(stage)) for stage in ("train", "val", "test")] == [630, 70, 20]
    emnist = name.startswith("emnist")
    x, y = data.tensors("test")
    upright = test_images.transpose(0, 2, 1) if emnist else test_images
    assert torch.equal(x[:, 0], torch.from_numpy(upright.copy()) / 255)
    assert y.tolist() == (np.arange(20) % data.num_classes).tolist()
    known = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    for stage in ("train", "val"):
        dataset = data.dataset(stage)
        for image, label in zip(dataset.x[:, 0].numpy(), dataset.y, strict=True):
            image = image.T if emnist else image
            assert known[image.tobytes()] == int(label) + (name == "emnist_letters")
    assert not offline


@pytest.mark.parametrize("folder", ["fashion-mnist", "fashion_mnist", "FashionMNIST", "."])
def test_read_only_folder_is_used_without_copies(tmp_path, offline, folder):
    write_family("fashion_mnist", tmp_path / folder, ".gz")
    before = sorted(tmp_path.rglob("*"))
    tmp_path.chmod(0o555)
    try:
        data = DataModule("fashion_mnist", root=str(tmp_path))
        assert data.describe() == "fashion_mnist: 54 train, 6 val, 20 test, 1x28x28, 10 classes"
    finally:
        tmp_path.chmod(0o755)
    assert sorted(tmp_path.rglob("*")) == before
    assert not offline
    assert data.source.class_names[9] == "Ankle boot"


def test_torchvision_reads_the_same_images(tmp_path):
    write_family("kmnist", tmp_path / "KMNIST" / "raw")
    theirs = torchvision.datasets.KMNIST(str(tmp_path), train=False)
    x, y = DataModule("kmnist", root=str(tmp_path)).tensors("test")
    assert torch.equal(x[:, 0], theirs.data / 255)
    assert torch.equal(y, theirs.targets)


def refused(match, name, root, **plain):
    with pytest.raises(AezooError, match=match) as caught:
        DataModule(name, root=str(root), **plain).setup()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_of_different_dataset_are_refused(tmp_path, offline, monkeypatch):
    write_family("fashion_mnist", tmp_path / "fashion-mnist")
    refused("mnist cannot be downloaded", "mnist", tmp_path / "fashion-mnist")
    refused("mnist cannot be downloaded", "mnist", tmp_path)
    home = tmp_path / "MNIST" / "raw"
    write_family("mnist", home, ".gz")
    import hashlib

    digest = hashlib.md5((home / "t10k-images-idx3-ubyte.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision.datasets.KMNIST, "resources", [("t10k-images-idx3-ubyte.gz", digest)])
    refused("t10k-images-idx3-ubyte.gz belongs to KMNIST, not to MNIST", "mnist", tmp_path)


def test_broken_idx_files_are_named(tmp_path):
    whole = idx(RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8))
    packed = gzip.compress(whole)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    for name, content, message in (
        ("cut", whole[:-10], "has 3926 bytes where its header declares 3936: delete it and download it again"),
        ("long", whole + b"x", "has 3937 bytes"),
        ("head", whole[:7], "is not an idx file"),
        ("void", b"", "is not an idx file"),
        ("html", b"<html>", "is not an idx file"),
        ("none", idx(np.zeros((0, 28, 28), np.uint8)), "header declares"),
        ("cut.gz", packed[:-100], "is not a complete gzip file"),
        ("flip.gz", bytes(flipped), "is not a complete gzip file"),
        ("html.gz", b"<html>", "is not a complete gzip file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AezooError) as caught:
            read_idx(tmp_path / name)
        assert message in str(caught.value), name
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "ok.gz").write_bytes(packed)
    assert read_idx(tmp_path / "ok.gz").shape == (5, 28, 28)


def test_mismatched_idx_files_are_refused(tmp_path):
    home = tmp_path / "MNIST" / "raw"
    write_family("mnist", home)
    (home / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(59, np.uint8)))
    refused("has 60 images but .*train-labels-idx1-ubyte has 59 labels", "mnist", tmp_path)
    (home / "train-labels-idx1-ubyte").write_bytes(idx(np.full(60, 10, np.uint8)))
    refused("labels outside 0..9", "mnist", tmp_path)
    (home / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((60, 20, 20), np.uint8)))
    refused("not 28 x 28 images", "mnist", tmp_path)


@pytest.mark.parametrize("name", [*FAMILIES, *VISION_SETS])
def test_missing_network_is_reported_in_one_line(tmp_path, offline, name):
    message = refused("put ", name, tmp_path)
    assert name in message
    assert str(tmp_path) in message
    files = ["images-idx3-ubyte", "plain or .gz"] if name in FAMILIES else VISION_SETS[name].files.split(", ")
    assert all(file in message for file in files)
    if name in FAMILIES:
        assert str(tmp_path / FAMILIES[name].title / "raw") in message
    if name in _NO_DOWNLOAD:
        assert "was not found" in message
        assert not offline
    else:
        assert "cannot be downloaded" in message
        # PCam needs h5py before the network
        assert offline or "h5py" in message


def test_disabled_download_makes_no_request(tmp_path, offline):
    for name in ("mnist", "emnist", "cifar10", "flowers102", "svhn"):
        refused("put ", name, tmp_path, download=False)
    assert not offline


def test_vision_table_matches_torchvision_signatures():
    for name, row in VISION_SETS.items():
        accepted = inspect.signature(getattr(torchvision.datasets, row.title).__init__).parameters
        for arguments in row.splits.values():
            assert set(arguments) <= set(accepted), name
        assert "train" in row.splits
        assert row.shape[1] == row.shape[2]
    for family in FAMILIES.values():
        assert issubclass(getattr(torchvision.datasets, family.title), torchvision.datasets.MNIST)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """CIFAR-10 files in their own format, ten images each, read by torchvision itself."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    home = tmp_path / "cifar-10-batches-py"
    home.mkdir()
    pixels = {}
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        pixels[name] = RNG.integers(0, 256, (10, 3072), dtype=np.uint8)
        (home / name).write_bytes(pickle.dumps({"data": pixels[name], "labels": list(range(10))}))
    (home / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return pixels


def test_in_memory_torchvision_set_is_read(tmp_path, offline, cifar10):
    data = DataModule("cifar10", root=str(tmp_path))
    assert data.describe() == "cifar10: 45 train, 5 val, 10 test, 3x32x32, 10 classes"
    x, y = data.tensors("test")
    assert torch.equal(x, torch.from_numpy(cifar10["test_batch"].reshape(10, 3, 32, 32)) / 255)
    assert y.tolist() == list(range(10))
    assert DataModule("cifar10", root=str(tmp_path), size=16, channels=1).tensors("val")[0].shape == (5, 1, 16, 16)
    assert not offline


@pytest.mark.slow
def test_file_based_torchvision_set_is_read(tmp_path, offline):
    for c, name in enumerate(("Forest", "River")):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for i in range(20):
            Image.fromarray(np.full((64, 64, 3), 100 * c + i, np.uint8)).save(folder / f"{i}.png")
    data = DataModule("eurosat", root=str(tmp_path), batch_size=4)
    assert data.input_shape == (3, 64, 64)
    assert [len(data.dataset(stage)) for stage in ("train", "val", "test")] == [32, 4, 4]
    for stage in ("train", "val", "test"):
        x, y = data.tensors(stage)
        assert torch.equal(y == 1, x[:, 0, 0, 0] * 255 > 99)
        assert y.bincount().tolist() == [len(y) // 2] * 2
    x, _ = next(iter(data.train_dataloader()))
    assert x.dtype == torch.uint8
    dataset = DataModule("eurosat", root=str(tmp_path)).dataset("train")
    batch, samples = dataset.__getitems__([3, 0, 31]), [dataset[i] for i in (3, 0, 31)]
    assert torch.equal(batch[0], torch.stack([x for x, _ in samples]))
    assert batch[1].tolist() == [y for _, y in samples] == [0, 0, 1]
    assert DataModule("eurosat", root=str(tmp_path), size=32, channels=1).tensors("val")[0].shape == (4, 1, 32, 32)
    (tmp_path / "eurosat" / "2750" / "River" / "7.png").write_bytes(b"torn")
    for memory in ("on", "off"):
        data = DataModule("eurosat", root=str(tmp_path), batch_size=4, memory=memory)
        with pytest.raises(AezooError, match="of EuroSAT cannot be read"):
            [list(loader()) for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader)]
    refused("scale standard needs a data set in memory", "eurosat", tmp_path, scale="standard")
    assert not offline


def test_test_classes_of_omniglot_follow_the_training_classes(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, background):
            self.background = background

        def __len__(self):
            return 10

        def __getitem__(self, i):
            return Image.new("L", (105, 105), i * 20), i

    monkeypatch.setattr(torchvision.datasets, "Omniglot", Fake)
    data = DataModule("omniglot", root=str(tmp_path))
    assert data.tensors("test")[1].tolist() == list(range(964, 974))
    assert data.tensors("train")[1].max() < 10
