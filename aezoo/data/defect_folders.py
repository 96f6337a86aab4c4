"""Folders of products with and without defects, and masks of the defects: the layouts of MVTec AD and VisA.

    mvtec   CLASS/train/good/*, CLASS/test/good/*, CLASS/test/DEFECT/NAME.png, CLASS/ground_truth/DEFECT/NAME_mask.png
            (Bergmann et al. 2019, https://www.mvtec.com/company/research/datasets/mvtec-ad)
    visa    split_csv/1cls.csv with the columns object, split, label, image and mask, and the files that it names
            (Zou et al. 2022, https://github.com/amazon-science/spot-diff)

The root is the folder of one class. A pixel of a mask that is not 0 belongs to a defect.
"""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from aezoo.data.image_folders import Files, folders, walk_images
from aezoo.data.images import open_picture, read_header
from aezoo.errors import AezooError

CLASSES = ("good", "defect")
# of each picture with a defect
Masks = dict[Path, Path]
_SPLIT_FILE = Path("split_csv", "1cls.csv")
_COLUMNS = ("object", "split", "label", "image", "mask")


def find_mvtec(root: Path) -> tuple[Files, Masks]:
    """(image, class) by split, classes as in `CLASSES`, and the mask of each image with a defect.

    Raises:
        AezooError: this is not a folder of a class of MVTec AD, or a mask is missing.
    """
    train, test, truth = (root / part for part in ("train", "test", "ground_truth"))
    if not train.is_dir() or not test.is_dir():
        classes = [name for name in folders(root) if (root / name / "train").is_dir()]
        hint = f"give one class, such as --data.root {root / classes[0]}" if classes else "see docs/data.md"
        raise AezooError(f"{root} has no folders train and test, as --data.layout mvtec needs: {hint}")
    if other := [name for name in folders(train) if name != CLASSES[0]]:
        raise AezooError(
            f"{train} contains {other[0]} besides good: MVTec AD trains on good samples only; move it elsewhere"
        )
    files: Files = {"train": [(path, 0) for path, _ in walk_images(train / CLASSES[0], ())], "test": []}
    masks: Masks = {}
    for kind in folders(test):
        for path, _ in walk_images(test / kind, ()):
            defect = kind != CLASSES[0]
            files["test"].append((path, int(defect)))
            if defect:
                masks[path] = truth / path.relative_to(test).with_name(f"{path.stem}_mask.png")
    return _checked(root, files, masks)


def find_visa(root: Path) -> tuple[Files, Masks]:
    """As `find_mvtec`, of a class of VisA, whose split is that of its file of one class.

    Raises:
        AezooError: there is no such file, it is damaged, or a file that it names is missing.
    """
    root = root.resolve()
    table = root.parent / _SPLIT_FILE
    if not table.is_file():
        raise AezooError(f"no {table}, which --data.layout visa needs: give the folder of a class of VisA, such as "
                         "--data.root VisA/candle")  # fmt: skip
    files: Files = {"train": [], "test": []}
    masks: Masks = {}
    try:
        with table.open(encoding="utf-8", newline="") as lines:
            rows = [[row[name] for name in _COLUMNS] for row in csv.DictReader(lines)]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise AezooError(
            f"{table} has no columns {', '.join(_COLUMNS)} ({type(error).__name__}): download it again"
        ) from None
    for number, (name, split, label, image, mask) in enumerate(rows, start=2):
        if name != root.name:
            continue
        if split not in files or label not in ("normal", "anomaly"):
            raise AezooError(
                f"line {number} of {table} has the split {split!r} and the label {label!r}: download it again"
            )
        path, defect = _inside(root.parent, image, table), label == "anomaly"
        files[split].append((path, int(defect)))
        if defect:
            masks[path] = _inside(root.parent, mask, table)
    if not files["train"]:
        raise AezooError(f"{table} names no training images of {root.name}: it has {', '.join(_first_names(rows))}")
    return _checked(root, files, masks)


FINDERS: dict[str, Callable[[Path], tuple[Files, Masks]]] = {"mvtec": find_mvtec, "visa": find_visa}


def _first_names(rows: list[list[str]]) -> list[str]:
    return sorted({row[0] for row in rows})[:12]


def _inside(home: Path, name: str, table: Path) -> Path:
    """A file that the table names; its path must stay within the folder."""
    path = home / (name or "")
    if not name or home not in path.resolve().parents:
        raise AezooError(f"{table} names the file {name!r}, which is not inside {home}: download it again")
    return path


def _checked(root: Path, files: Files, masks: Masks) -> tuple[Files, Masks]:
    if not files["train"] or not files["test"]:
        empty = "train" if not files["train"] else "test"
        raise AezooError(f"no images to {empty} on in {root}: download the set again, or give another --data.root")
    absent = next(
        (path for path in [*(path for path, _ in files["test"]), *masks.values()] if not path.is_file()), None
    )
    if absent is not None:
        raise AezooError(
            f"{absent} is missing: download the set again, or read only the images with --data.layout auto"
        )
    return files, masks


def read_mask(path: Path, picture: Path, size: int | None, max_pixels: int) -> Tensor:
    """The pixels of a picture that belong to a defect, resized and cropped as the picture is: (H, W) bool.

    Args:
        path: the mask's file.
        picture: the picture's.
        size: side of the square that the picture becomes; None if it keeps its size.
        max_pixels: see `read_header`.

    Raises:
        AezooError: the mask cannot be read, has another size than the picture, or marks nothing.
    """
    shape, wanted = (read_header(file, max_pixels).shape for file in (path, picture))
    if shape != wanted:
        raise AezooError(f"the mask {path} is {shape[0]}x{shape[1]}, its picture {wanted[0]}x{wanted[1]} (height x "
                         "width): download the set again")  # fmt: skip
    with open_picture(path, max_pixels) as image:
        # the entries of a palette are indices of kinds of defects
        values = np.asarray(image if image.mode in ("L", "P", "1", "I;16", "I") else image.convert("L"))
        marked = Image.fromarray((values > 0).astype(np.uint8) * 255)
    if marked.getextrema() == (0, 0):
        raise AezooError(f"the mask {path} marks no pixel, but its picture is one of a defect: download the set again")
    if size is not None and marked.size != (size, size):
        marked = ImageOps.fit(marked, (size, size), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(marked) > 0)
