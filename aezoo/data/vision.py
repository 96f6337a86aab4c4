"""torchvision's image sets by name: read from root, downloaded if they are missing and there is a network.

A set of pictures of many sizes is resized and cropped to squares of the size in its row, unless --data.size is given.
"""

import contextlib
import io
import socket
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aezoo.data.images import ImageArgs, resized_shape, to_tensor
from aezoo.data.in_memory import InMemory, LabelledArrays
from aezoo.data.loaders import DecodingDataset
from aezoo.data.source import STAGES, Options, Source, Stage, accepts, split_missing
from aezoo.errors import AezooError
from aezoo.security.archives import safe_extraction

Arguments = dict[str, Any]


class VisionSet(NamedTuple):
    """One set: torchvision's class, a sample's shape, the classes, its files under root, its arguments by split.

    `array` marks the sets that torchvision loads into memory as one array. `test_offset` is added to the test labels
    if these number the classes separately.
    """

    title: str
    shape: tuple[int, int, int]
    classes: int | None
    files: str
    splits: dict[Stage, Arguments]
    array: bool = False
    test_offset: int = 0


def _per_split(
    key: str, train: object, test: object = None, val: object = None, **rest: object
) -> dict[Stage, Arguments]:
    values: dict[Stage, object] = {"train": train, "val": val, "test": test}
    return {stage: {key: value, **rest} for stage, value in values.items() if value is not None}


_FLAG, _SPLIT, _ALL3 = (
    _per_split("train", True, False),
    _per_split("split", "train", "test"),
    _per_split("split", "train", "test", "val"),
)
_WHOLE: dict[Stage, Arguments] = {"train": {}}

# fmt: off
VISION_SETS = {
    "caltech101": VisionSet("Caltech101", (3, 64, 64), 101, "caltech101/101_ObjectCategories/", _WHOLE),
    "caltech256": VisionSet("Caltech256", (3, 64, 64), 257, "caltech256/256_ObjectCategories/", _WHOLE),
    "celeba": VisionSet("CelebA", (3, 64, 64), None, "celeba/img_align_celeba.zip, celeba/*.txt",
                  _per_split("split", "train", "test", "valid")),
    "cifar10": VisionSet("CIFAR10", (3, 32, 32), 10, "cifar-10-python.tar.gz", _FLAG, True),
    "cifar100": VisionSet("CIFAR100", (3, 32, 32), 100, "cifar-100-python.tar.gz", _FLAG, True),
    "clevr": VisionSet("CLEVRClassification", (3, 64, 64), None, "clevr/CLEVR_v1.0.zip",
                       _per_split("split", "train", None, "val")),
    "country211": VisionSet("Country211", (3, 64, 64), 211, "country211.tgz",
                            _per_split("split", "train", "test", "valid")),
    "dtd": VisionSet("DTD", (3, 64, 64), 47, "dtd/dtd-r1.0.1.tar.gz", _ALL3),
    "eurosat": VisionSet("EuroSAT", (3, 64, 64), 10, "eurosat/2750/", _WHOLE),
    "fer2013": VisionSet("FER2013", (1, 48, 48), 7, "fer2013/icml_face_data.csv", _per_split("split", "train", "test")),
    "fgvc_aircraft": VisionSet("FGVCAircraft", (3, 64, 64), 100, "fgvc-aircraft-2013b.tar.gz", _ALL3),
    "flowers102": VisionSet("Flowers102", (3, 64, 64), 102, "flowers-102/jpg/, flowers-102/*.mat", _ALL3),
    "food101": VisionSet("Food101", (3, 64, 64), 101, "food-101.tar.gz", _SPLIT),
    "gtsrb": VisionSet("GTSRB", (3, 32, 32), 43, "gtsrb/GTSRB/, gtsrb/GT-final_test.csv", _SPLIT),
    "imagenet": VisionSet("ImageNet", (3, 64, 64), 1000, "ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar, "
                    "ILSVRC2012_img_val.tar", _per_split("split", "train", "val")),
    "imagenette": VisionSet("Imagenette", (3, 64, 64), 10, "imagenette2-160.tgz",
                            _per_split("split", "train", "val", size="160px")),
    "lfw_people": VisionSet("LFWPeople", (3, 64, 64), 5749, "lfw-py/lfw-funneled.tgz, lfw-py/*.txt",
                      _per_split("split", "10fold")),
    "omniglot": VisionSet("Omniglot", (1, 105, 105), 1623, "omniglot-py/images_background.zip, "
                    "omniglot-py/images_evaluation.zip", _per_split("background", True, False), test_offset=964),
    "oxford_iiit_pet": VisionSet("OxfordIIITPet", (3, 64, 64), 37, "oxford-iiit-pet/images.tar.gz, "
                           "oxford-iiit-pet/annotations.tar.gz", _per_split("split", "trainval", "test")),
    "pcam": VisionSet("PCAM", (3, 96, 96), 2, "pcam/camelyonpatch_level_2_split_*.h5", _ALL3),
    "places365": VisionSet("Places365", (3, 64, 64), 365, "data_256_standard/, val_256/, *.txt",
                     _per_split("split", "train-standard", "val", small=True)),
    "rendered_sst2": VisionSet("RenderedSST2", (3, 64, 64), 2, "rendered-sst2.tgz", _ALL3),
    "semeion": VisionSet("SEMEION", (1, 16, 16), 10, "semeion.data", _WHOLE, True),
    "stanford_cars": VisionSet("StanfordCars", (3, 64, 64), 196, "stanford_cars/cars_train/, stanford_cars/cars_test/, "
                         "stanford_cars/devkit/", _SPLIT),
    "stl10": VisionSet("STL10", (3, 96, 96), 10, "stl10_binary.tar.gz", _SPLIT, True),
    "stl10_unlabeled": VisionSet("STL10", (3, 96, 96), None, "stl10_binary.tar.gz",
                                 _per_split("split", "unlabeled", "test"), True),
    "sun397": VisionSet("SUN397", (3, 64, 64), 397, "SUN397.tar.gz", _WHOLE),
    "svhn": VisionSet("SVHN", (3, 32, 32), 10, "train_32x32.mat, test_32x32.mat", _SPLIT, True),
    "usps": VisionSet("USPS", (1, 16, 16), 10, "usps.bz2, usps.t.bz2", _FLAG, True),
}
# fmt: on

# errors of a broken or malicious archive
_ARCHIVES = (tarfile.TarError, zipfile.BadZipFile, zlib.error)
# torchvision offers no download for these
_NO_DOWNLOAD = frozenset({"fer2013", "imagenet", "lfw_people", "stanford_cars"})


@accepts(ImageArgs)
def open_vision(options: Options) -> Source:
    """The source for a name of the table."""
    return (VisionArray if VISION_SETS[options.name].array else VisionFiles)(options)


class VisionArray(InMemory):
    """A set that torchvision reads into one array of bytes."""

    def __init__(self, options: Options) -> None:
        self.row = VISION_SETS[options.name]
        super().__init__(options, self.row.shape, self.row.classes)

    def prepare(self) -> None:
        _prepare(self.row, self.options)

    def load(self) -> dict[Stage, LabelledArrays]:
        return {stage: self._pair(arguments) for stage, arguments in self.row.splits.items()}

    def _pair(self, arguments: Arguments) -> LabelledArrays:
        with _one_line_errors(self.row.files, self.options):
            dataset = _open(self.row.title, self.options.root, arguments)
        x = torch.from_numpy(np.asarray(dataset.data))
        x = x[:, None] if x.ndim == 3 else x if x.shape[1] == self.row.shape[0] else x.permute(0, 3, 1, 2)
        labels = _labels(dataset)
        return LabelledArrays(x.contiguous(), labels if self.row.classes else None)


class VisionFiles(Source):
    """A set of picture files, decoded when they are used."""

    white = 255

    def __init__(self, options: Options) -> None:
        if options.scale not in ("auto", "none"):
            raise AezooError(
                f"--data.scale {options.scale} needs a data set in memory, which {options.name} is not: use auto"
            )
        self.options, self.row = options, VISION_SETS[options.name]
        self.input_shape = resized_shape(self.row.shape, options.size, options.channels)
        self.num_classes = self.row.classes
        self._splits: dict[Stage, Dataset[Any]] | None = None

    def prepare(self) -> None:
        _prepare(self.row, self.options)

    def split(self, stage: Stage) -> Dataset[Any] | None:
        if self._splits is None:
            self._splits = self._build()
        return self._splits.get(stage)

    def _build(self) -> dict[Stage, Dataset[Any]]:
        with _one_line_errors(self.row.files, self.options):
            own = {stage: _open(self.row.title, self.options.root, a) for stage, a in self.row.splits.items()}
        sizes = {stage: len(dataset) for stage, dataset in own.items()}
        fractions = (self.options.val_fraction, self.options.test_fraction)
        split_off = split_missing(sizes, _labels(own["train"]), fractions, self.options.seed)
        splits: dict[Stage, Dataset[Any]] = {}
        for stage in STAGES:
            rows = split_off[stage]
            rows = torch.arange(sizes[stage]) if rows is None else rows
            offset = self.row.test_offset if stage == "test" and stage in own else 0
            if len(rows):
                dataset = own.get(stage, own["train"])
                splits[stage] = VisionDataset(dataset, rows, self.input_shape, self.row.classes is not None, offset)
        return splits


class VisionDataset(DecodingDataset):
    """Rows of a torchvision data set as uint8 tensors of one shape.

    Args:
        dataset: gives (picture, label).
        rows: the rows that belong to this split.
        shape: (C, H, W) of a sample.
        labelled: keep the labels.
        offset: added to the labels.
    """

    def __init__(self, dataset: Any, rows: Tensor, shape: tuple[int, ...], labelled: bool, offset: int = 0) -> None:
        self.dataset, self.rows, self.shape, self.has_labels, self.offset = dataset, rows, shape, labelled, offset

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Tensor | None:
        """The class of each sample; the pictures are not read if the set has a list of labels."""
        labels = _labels(self.dataset) if self.has_labels else None
        return None if labels is None else labels[self.rows] + self.offset

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        row = int(self.rows[index])
        try:
            image, label = self.dataset[row]
        # Pillow raises SyntaxError, ValueError, DecompressionBombError ... for broken and malicious files
        except Exception as error:
            title = type(self.dataset).__name__
            raise AezooError(
                f"image {row} of {title} cannot be read ({error}): delete the set's folder and download it again"
            ) from None
        x = to_tensor(image, self.shape[-1], self.shape[0])
        return (x, int(label) + self.offset) if self.has_labels else (x,)


def download(
    title: str, options: Options, calls: Sequence[Arguments], files: str = "", folder: Path | None = None
) -> None:
    """Let torchvision download into root; without a network, raise an error of one line.

    Args:
        title: torchvision's class.
        options: the set's name and root.
        calls: arguments of the class, for each part of the set.
        files: the files that the user needs without a network.
        folder: where to put them; root by default.
    """
    with _one_line_errors(files, options, folder):
        for arguments in calls:
            _open(title, options.root, {**arguments, "download": True})


def _prepare(row: VisionSet, options: Options) -> None:
    if not options.download or options.name in _NO_DOWNLOAD:
        return
    try:
        with safe_extraction():
            for arguments in row.splits.values():
                _open(row.title, options.root, arguments)
    # existing files must work without a network and in a read-only folder, so downloading comes second
    except (OSError, RuntimeError, ValueError, EOFError, *_ARCHIVES):
        download(row.title, options, list(row.splits.values()), row.files)


def _open(title: str, root: str, arguments: Arguments) -> Any:
    from torchvision import datasets

    if title == "SEMEION":
        arguments = {"download": False, **arguments}
    return getattr(datasets, title)(str(Path(root).expanduser()), **arguments)


def _labels(dataset: Any) -> Tensor | None:
    names = ("targets", "labels", "_labels", "y")
    values = next((getattr(dataset, name) for name in names if getattr(dataset, name, None) is not None), None)
    if values is None or len(values) != len(dataset):
        return None
    return torch.as_tensor(np.asarray(values)).long()


@contextlib.contextmanager
def _one_line_errors(files: str, options: Options, folder: Path | None = None) -> Iterator[None]:
    """Turn torchvision's errors for missing, broken or unreachable files into one line that says what to do."""
    timeout = socket.getdefaulttimeout()
    try:
        # torchvision sets no timeout, and a dropped packet would block for minutes
        socket.setdefaulttimeout(30)
        # it also prints every mirror that fails
        with contextlib.redirect_stdout(io.StringIO()), safe_extraction():
            yield
    except ImportError as error:
        raise AezooError(f"{options.name} needs a package that is not installed ({error}): pip install it") from None
    # URLError and HTTPError are OSErrors; torchvision raises RuntimeError for absent and broken files
    except (OSError, RuntimeError, ValueError, EOFError, *_ARCHIVES) as error:
        if isinstance(error, AezooError):
            raise
        reason = " ".join(str(error).split())
        raise AezooError(_missing_message(files, options, reason, folder)) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _missing_message(files: str, options: Options, reason: str, folder: Path | None) -> str:
    """Where to put the files of a set that could not be downloaded or read."""
    tried = "cannot be downloaded" if options.download and options.name not in _NO_DOWNLOAD else "was not found"
    return (
        f"{options.name} {tried} ({reason[:250]}): put {files} into {folder or Path(options.root)}, "
        "or name the folder that contains them with --data.root; --data.name mnist5k needs no files"
    )
