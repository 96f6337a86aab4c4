"""folder: any folder of images, nested or flat, with or without labels.

    root/*.png, root/any/depth/*.jpg     no labels
    root/cat/*.png, root/dog/*.png       two or more folders and every image in one of them: the folder is the class
    root/train/..., root/val/..., root/test/...     own splits (also training, valid, validation, testing)
    --data.layout mvtec or visa          products with and without defects, see `aezoo.data.defect_folders`

Without --data.size all images to train on must have the same size; with it each is resized and cropped to a square.
Values of 16-bit files are divided by 65535, others by 255. The EXIF rotation is applied. A set that fits into memory is
decoded once, before training, so that every broken file is found (see --data.memory); a larger set is decoded by the
workers, and only headers are read before training.
"""

import math
import os
import warnings
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from aezoo.data.array import LayoutArgs
from aezoo.data.defect_folders import CLASSES, FINDERS, Masks, read_mask
from aezoo.data.image_folders import find_images
from aezoo.data.images import (
    GREY_MODES,
    MODES_16_BIT,
    Header,
    ImageArgs,
    ImageFileArgs,
    first_few,
    ignored_content,
    read_header,
    read_image,
)
from aezoo.data.loaders import DecodingDataset
from aezoo.data.resident import allocate, fits_in_memory
from aezoo.data.source import STAGES, ArrayDataset, Options, Source, Stage, accepts, split_missing
from aezoo.errors import AezooError


class ImageSource(Source):
    """Pictures from any container, decoded once before training, or each time they are used.

    Attributes:
        any_size: pictures of different sizes are accepted, and each is decoded when it is used.

    Args:
        options: the DataModule's arguments.
        where: the container's name in messages.
        files: (file, class) of each picture by split; a file is what `header` and `load` take: hashable, with a `str`
            for messages.
        names: the classes, empty without labels.
    """

    any_size = False

    def __init__(
        self, options: Options, where: str, files: dict[Stage, list[tuple[Any, int]]], names: tuple[str, ...]
    ) -> None:
        if options.scale not in ("auto", "none"):
            raise AezooError(
                f"--data.scale {options.scale} does not apply to image files: use auto, or give a .npy file"
            )
        self.options, self.where, self.files = options, where, files
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and options.max_pixels > limit:
            # otherwise Pillow's limit would apply before ours
            Image.MAX_IMAGE_PIXELS = options.max_pixels
        self.class_names, self.num_classes = names or None, len(names) or None
        self.value_range = (0.0, 1.0) if options.scale == "auto" else None
        (height, width), mode, _ = self._first_header()
        self.channels = options.channels or (1 if mode in GREY_MODES else 3)
        self.size = options.size
        self.input_shape = (self.channels, *((self.size, self.size) if self.size else (height, width)))
        self._splits: dict[Stage, Dataset[Any]] | None = None

    def header(self, file: Any) -> Header:
        """The header of one picture, without decoding its pixels."""
        return read_header(file, self.options.max_pixels)

    def load(self, file: Any) -> Tensor:
        """One picture as (C, H, W), uint8 or float32."""
        return read_image(file, self.size, self.channels, self.options.max_pixels)

    def split(self, stage: Stage) -> Dataset[Any] | None:
        if self._splits is None:
            self._splits = self._build()
        return self._splits.get(stage)

    def _first_header(self) -> Header:
        for stage in self.files:
            for path, _ in self.files[stage]:
                try:
                    return self.header(path)
                except AezooError:
                    if self.options.on_error == "raise":
                        raise
        raise AezooError(f"no readable image in {self.where}: every file is broken")

    def _build(self) -> dict[Stage, Dataset[Any]]:
        paths = [path for files in self.files.values() for path, _ in files]
        if len(paths) > 2000:
            rank_zero_info(f"reading {len(paths)} images from {self.where}")
        headers = self._map_files(paths, self.header)
        self._check(headers)
        is_16_bit = any(header.mode in MODES_16_BIT for header in headers.values())
        self.white = 1 if is_16_bit else 255
        size = len(paths) * math.prod(self.input_shape) * (4 if is_16_bit else 1)
        mixed = len({header.shape for header in headers.values()}) > 1 and self.size is None
        memory = "off" if mixed else self.options.memory
        held: Tensor | None = None
        is_worth_it = not self.reads_once and fits_in_memory(size, torch.device("cpu"), self.processes)
        if memory == "on" or (memory == "auto" and is_worth_it):
            held = allocate(
                self.options.name, len(headers), self.input_shape, torch.float32 if is_16_bit else torch.uint8
            )
        number = {path: i for i, path in enumerate(headers)}

        def decode(path: Any) -> bool:
            x = self.load(path)
            if held is not None:
                held[number[path]] = _to_common_dtype(x, is_16_bit)
            return True

        good: Collection[Any] = headers
        if held is not None or self.options.on_error == "skip":
            good = self._map_files(list(headers), decode)
        if len(good) < len(paths):
            bad = [path for path in paths if path not in good]
            warnings.warn(
                f"{self.where}: {len(bad)} of {len(paths)} files skipped as broken: {first_few(bad)}", stacklevel=2
            )
        kept = {stage: [(p, c) for p, c in files if p in good] for stage, files in self.files.items()}
        kept = {stage: files for stage, files in kept.items() if files}
        if "train" not in kept:
            raise AezooError(f"no readable image in {self.where}: every training file is broken")
        labels = torch.tensor([c for _, c in kept["train"]]) if self.num_classes else None
        fractions = (self.options.val_fraction, self.options.test_fraction)
        rows = split_missing({stage: len(files) for stage, files in kept.items()}, labels, fractions, self.options.seed)
        self.derived_splits = frozenset({stage for stage, index in rows.items() if index is not None})
        splits: dict[Stage, ImageFileDataset] = {}
        for stage in STAGES:
            index, files = rows[stage], kept.get(stage, kept["train"])
            files = files if index is None else [files[i] for i in index.tolist()]
            if files:
                splits[stage] = ImageFileDataset(self, files, is_16_bit)
                if mixed:
                    splits[stage].shapes = [(self.channels, *headers[path].shape) for path, _ in files]
        if held is None:
            return dict(splits)
        move_rows_to_front(held, torch.tensor([number[path] for part in splits.values() for path, _ in part.files]))
        sizes = [len(part) for part in splits.values()]
        parts = zip(splits.items(), held[: sum(sizes)].split(sizes), strict=True)
        return {stage: part.in_memory(x) for (stage, part), x in parts}

    def _map_files(self, paths: list[Any], work: Any) -> dict[Any, Any]:
        def one(path: Any) -> Any:
            try:
                return work(path)
            except AezooError:
                if self.options.on_error == "raise":
                    raise
                return None

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(one, paths))
        return {path: result for path, result in zip(paths, results, strict=True) if result is not None}

    def _check(self, headers: dict[Any, Header]) -> None:
        """Refuse images of different sizes or kinds unless the user says how to convert them."""
        sizes: dict[tuple[int, int], Any] = {}
        kinds: dict[bool, Any] = {}
        for path, (shape, mode, _) in headers.items():
            sizes.setdefault(shape, path)
            kinds.setdefault(mode in GREY_MODES, path)
        if self.size is None and len(sizes) > 1 and not self.any_size:
            (first, a), (second, b) = list(sizes.items())[:2]
            raise AezooError(
                f"images of {len(sizes)} sizes in {self.where}: {a} is {first[0]}x{first[1]}, {b} is "
                f"{second[0]}x{second[1]} (height x width): give --data.size {min(first + second)} to resize and crop"
            )
        if self.options.channels is None and len(kinds) > 1:
            raise AezooError(
                f"{kinds[True]} is grey and {kinds[False]} is coloured: choose --data.channels 1 or --data.channels 3"
            )
        for words in ignored_content(headers):
            warnings.warn(f"{self.where}: {words}", stacklevel=2)


@accepts(ImageArgs, ImageFileArgs, LayoutArgs)
class Folder(ImageSource):
    """A folder of image files, with or without masks of defects."""

    def __init__(self, options: Options) -> None:
        root = Path(options.root).expanduser()
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise AezooError(f"the image folder {root} {what}: give its path with --data.root")
        self.masks: Masks = {}
        if options.layout == "auto":
            super().__init__(options, str(root), *find_images(root))
            return
        if options.layout not in FINDERS:
            raise AezooError(f"--data.layout {options.layout} is for arrays: for a folder, give auto, mvtec or visa")
        files, self.masks = FINDERS[options.layout](root)
        super().__init__(options, str(root), files, CLASSES)

    def pixel_masks(self, paths: Sequence[str]) -> Tensor | None:
        if not self.masks:
            return None
        limit, found = self.options.max_pixels, torch.zeros(len(paths), *self.input_shape[1:], dtype=torch.bool)
        for i, path in enumerate(map(Path, paths)):
            if path in self.masks:
                found[i] = read_mask(self.masks[path], path, self.size, limit)
        return found


def move_rows_to_front(x: Tensor, order: Tensor) -> None:
    """Move the rows with these indices to the front, in this order, without copying the tensor: (N, ...), (n,)."""
    columns = x.flatten(1)
    for part in columns.split(-(-columns.shape[1] // 64), 1):
        part[: len(order)] = part[order]


def _to_common_dtype(x: Tensor, is_16_bit: bool) -> Tensor:
    return x.float() / 255 if is_16_bit and x.dtype == torch.uint8 else x


class ImageFileDataset(DecodingDataset):
    """Image files decoded when they are used.

    Args:
        source: decodes a file.
        files: (file, class) of each sample.
        is_16_bit: some files have 16 bits per value, so all become floats in [0, 1].

    Attributes:
        shapes: the shape of each picture; None if all have one.
    """

    shapes: list[tuple[int, ...]] | None = None

    def __init__(self, source: ImageSource, files: list[tuple[Any, int]], is_16_bit: bool) -> None:
        self.source, self.files, self.is_16_bit = source, files, is_16_bit

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        path, label = self.files[index]
        x = _to_common_dtype(self.source.load(path), self.is_16_bit)
        return (x, label) if self.source.num_classes else (x,)

    @property
    def labels(self) -> list[int] | None:
        """The class of each sample, without reading the images."""
        return [label for _, label in self.files] if self.source.num_classes else None

    def in_memory(self, x: Tensor) -> ArrayDataset:
        """The same samples, already decoded: (N, C, H, W)."""
        return ArrayDataset(x, None if self.labels is None else torch.tensor(self.labels), self.paths)

    @property
    def paths(self) -> list[str] | None:
        """The files; None if the pictures are not separate files."""
        return [str(file) for file, _ in self.files] if isinstance(self.files[0][0], Path) else None
