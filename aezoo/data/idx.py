"""MNIST and its family: idx files, plain or .gz, read in place.

    idx file    two zero bytes, a type byte, the number of axes, their lengths as big-endian int32, the values

Looked for under root in torchvision's layout (FashionMNIST/raw), in a folder of the set's name (fashion-mnist, as
Debian's packages have it) and in root itself.
"""

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aezoo.data.images import ImageArgs
from aezoo.data.in_memory import InMemory, LabelledArrays
from aezoo.data.readers import MemoryLimitArgs, check_bytes
from aezoo.data.source import Options, Stage, accepts
from aezoo.data.vision import download
from aezoo.errors import AezooError

_TYPES = {8: "u1", 12: ">i4"}


class Family(NamedTuple):
    """One set of idx files: torchvision's class and its split, the file names, the class names."""

    title: str
    split: str | None
    images: tuple[str, str]
    labels: tuple[str, str]
    class_names: tuple[str, ...]


_MNIST = (
    ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"),
    ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"),
)
_DIGITS = tuple("0123456789")
_UPPER = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_LOWER = tuple("abcdefghijklmnopqrstuvwxyz")
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_EMNIST = {
    "balanced": (*_DIGITS, *_UPPER, *"abdefghnqrt"),
    "byclass": (*_DIGITS, *_UPPER, *_LOWER),
    "bymerge": (*_DIGITS, *_UPPER, *"abdefghnqrt"),
    "letters": _LOWER,
    "digits": _DIGITS,
    "mnist": _DIGITS,
}


def _emnist(split: str) -> Family:
    images = (f"emnist-{split}-train-images-idx3-ubyte", f"emnist-{split}-test-images-idx3-ubyte")
    labels = (f"emnist-{split}-train-labels-idx1-ubyte", f"emnist-{split}-test-labels-idx1-ubyte")
    return Family("EMNIST", split, images, labels, _EMNIST[split])


FAMILIES = {
    "mnist": Family("MNIST", None, *_MNIST, _DIGITS),
    "fashion_mnist": Family("FashionMNIST", None, *_MNIST, _CLOTHES),
    "kmnist": Family("KMNIST", None, *_MNIST, ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
    "qmnist": Family(
        "QMNIST",
        None,
        ("qmnist-train-images-idx3-ubyte", "qmnist-test-images-idx3-ubyte"),
        ("qmnist-train-labels-idx2-int", "qmnist-test-labels-idx2-int"),
        _DIGITS,
    ),
    "emnist": _emnist("balanced"),
    **{f"emnist_{split}": _emnist(split) for split in _EMNIST},
}


@accepts(ImageArgs, MemoryLimitArgs)
class Idx(InMemory):
    """A set of the MNIST family: train and test files; val is taken from train."""

    def __init__(self, options: Options) -> None:
        self.family = FAMILIES[options.name]
        super().__init__(options, (1, 28, 28), len(self.family.class_names))
        self.class_names = self.family.class_names
        root, title = Path(options.root).expanduser(), self.family.title
        self.home = root / title / "raw"
        names = (options.name, options.name.replace("_", "-"), title)
        others = {family.title.lower() for family in FAMILIES.values()} - {title.lower()}
        # root itself may be <somewhere>/KMNIST/raw, whose files have the names of MNIST's
        here = {part.lower().replace("-", "").replace("_", "") for part in root.absolute().parts[-2:]}
        fallback = () if here & others else (root,)
        self.folders = (self.home, *(root / name for name in dict.fromkeys(names)), *fallback)

    def prepare(self) -> None:
        names = (*self.family.images, *self.family.labels)
        missing = [name for name in names if not self._find(name)]
        if missing and self.options.download:
            split = {"split": self.family.split} if self.family.split else {}
            calls = [{**split, "train": train} for train in (True, False)]
            download(self.family.title, self.options, calls, f"{', '.join(names)} (plain or .gz)", self.home)
            missing = [name for name in names if not self._find(name)]
        if missing:
            raise AezooError(
                f"{self.options.name} is not under {self.options.root}: put {', '.join(missing)} (plain or .gz) into "
                f"{self.home}, or name their folder with --data.root; with a network, --data.download true fetches them"
            )

    def load(self) -> dict[Stage, LabelledArrays]:
        self.prepare()
        train, test = (self._read(i) for i in (0, 1))
        return {"train": train, "test": test}

    def _find(self, name: str) -> Path | None:
        paths = (folder / (name + suffix) for folder in self.folders for suffix in ("", ".gz"))
        return next((path for path in paths if path.is_file()), None)

    def _read(self, part: int) -> LabelledArrays:
        image_path, label_path = self._find(self.family.images[part]), self._find(self.family.labels[part])
        assert image_path is not None
        assert label_path is not None
        title, most = self.family.title, self.options.max_bytes
        x, y = read_idx(image_path, title, most), read_idx(label_path, title, most).long()
        if x.ndim != 3 or x.shape[1:] != (28, 28) or x.dtype != torch.uint8:
            raise AezooError(f"{image_path} has shape {tuple(x.shape)}, not 28 x 28 images: check that it is the right "
                             "file")  # fmt: skip
        # QMNIST labels have eight columns, the class first
        y = y[:, 0] if y.ndim == 2 else y
        if len(x) != len(y):
            raise AezooError(
                f"{image_path} has {len(x)} images but {label_path} has {len(y)} labels: download them again"
            )
        if self.family.title == "EMNIST":
            # its files store the images column by column, and the labels of the letters from 1 to 26
            x = x.transpose(1, 2).contiguous()
            y = y - 1 if self.family.split == "letters" else y
        if y.min() < 0 or y.max() >= len(self.family.class_names):
            raise AezooError(
                f"{label_path} has labels outside 0..{len(self.family.class_names) - 1}: check that it is the right "
                "file"
            )
        return LabelledArrays(x[:, None], y)


def read_idx(path: Path, title: str = "", max_bytes: int = 2**33) -> Tensor:
    """The array in an idx file; an error names a truncated, broken, oversized or wrong file and says how to fix it."""
    again = "delete it and download it again"
    if path.exists() and not path.is_file():
        raise AezooError(f"{path} is a pipe, a device or a folder: {again}")
    try:
        check_bytes(path, path.stat().st_size, max_bytes)
        if path.suffix == ".gz":
            _refuse_files_of_other_sets(path, path.read_bytes(), title)
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            axes = head[3] if head[:2] == b"\0\0" and len(head) == 4 and head[2] in _TYPES else 0
            lengths = file.read(4 * axes)
            if not axes or len(lengths) < 4 * axes:
                raise AezooError(f"{path} is not an idx file ({len(head) + len(lengths)} bytes and no header): {again}")
            shape = np.frombuffer(lengths, ">u4").tolist()
            kind = np.dtype(_TYPES[head[2]])
            wanted = math.prod(shape) * kind.itemsize
            check_bytes(path, wanted, max_bytes)
            # one byte more than the header declares shows excess data, without decompressing all of them
            data = file.read(wanted + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise AezooError(f"{path} is not a complete gzip file ({error}): {again}") from None
    except OSError as error:
        raise AezooError(f"cannot read {path} ({error.strerror}): check the file and its permissions") from None
    if len(data) != wanted or not wanted:
        start = 4 + 4 * axes
        raise AezooError(f"{path} has {start + len(data)} bytes where its header declares {start + wanted}: {again}")
    return torch.from_numpy(np.frombuffer(data, kind).reshape(shape).astype(kind.newbyteorder("=")))


def _refuse_files_of_other_sets(path: Path, data: bytes, title: str) -> None:
    """MNIST, FashionMNIST and KMNIST have the same file names; the published checksums distinguish them."""
    from torchvision import datasets

    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    for other in ("MNIST", "FashionMNIST", "KMNIST"):
        if other != title and digest in {md5 for _, md5 in getattr(datasets, other).resources}:
            raise AezooError(f"{path} belongs to {other}, not to {title}: name another folder with --data.root")
