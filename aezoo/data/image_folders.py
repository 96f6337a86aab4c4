"""The images of a folder, and the splits and classes that its subfolders define."""

import os
import threading
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from aezoo.data.images import EXTENSIONS, first_few
from aezoo.data.source import Stage
from aezoo.errors import AezooError

Files = dict[Stage, list[tuple[Path, int]]]

SPLITS: dict[str, Stage] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_ENDINGS = tuple(EXTENSIONS)
# seconds after which a scan prints a message
_QUIET_SECONDS = 2.0


def find_images(root: Path) -> tuple[Files, tuple[str, ...]]:
    """(image, class) by split and the class names; class -1 and no names if the folders define no classes."""
    timer = threading.Timer(_QUIET_SECONDS, rank_zero_info, [f"looking for images at any depth of {root}"])
    timer.daemon = True
    timer.start()
    try:
        return _find_images(root)
    finally:
        timer.cancel()


def _find_images(root: Path) -> tuple[Files, tuple[str, ...]]:
    named = {SPLITS[name.lower()]: root / name for name in folders(root) if name.lower() in SPLITS}
    homes: dict[Stage, Path] = named if "train" in named else {"train": root}
    found = {stage: list(walk_images(home, ())) for stage, home in homes.items()}
    if not found["train"]:
        raise AezooError(
            f"no images in {homes['train']} (looked for {' '.join(sorted(EXTENSIONS))}, at any depth): "
            "give another folder"
        )
    if homes["train"] != root:
        outside = [path for path, _ in walk_images(root, (), {home.name for home in homes.values()})]
        if outside:
            warnings.warn(
                f"{root}: {len(outside)} images outside the folders of the splits are not used: {first_few(outside)}",
                stacklevel=2,
            )
    top_folders = {top for images in found.values() for _, top in images}
    names = sorted(top_folders) if "" not in top_folders and len(top_folders) > 1 else []
    in_train = {top for _, top in found["train"]}
    without_images = [name for name in folders(homes["train"]) if name not in in_train] if names else []
    empty = [name for name in without_images if next(walk_images(homes["train"] / name, ()), None) is None]
    if empty:
        warnings.warn(f"{root}: {len(empty)} class folders contain no images: {first_few(empty)}", stacklevel=2)
    numbers = {name: i for i, name in enumerate(names)}
    files: Files = {
        stage: [(path, numbers.get(top, -1)) for path, top in images] for stage, images in found.items() if images
    }
    return files, tuple(names)


def folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, in order."""
    return [entry.name for entry in _entries(folder) if _entry_kind(entry) == "folder"]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, by name, without Finder's ._name.png and __MACOSX, which are not images."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise AezooError(f"cannot read the folder {folder} ({error.strerror}): check its permissions") from None
    return [entry for entry in found if not entry.name.startswith(".") and entry.name != "__MACOSX"]


def _entry_kind(entry: os.DirEntry[str]) -> str:
    """file, folder or link (a broken one); empty for pipes and other special files."""
    try:
        if found := "file" if entry.is_file() else "folder" if entry.is_dir() else "":
            return found
        entry.stat()
    except OSError:
        return "link"
    return ""


def walk_images(
    folder: Path, above: tuple[Path, ...], excluded: Collection[str] = (), top: str = ""
) -> Iterator[tuple[Path, str]]:
    """Images at any depth, sorted by name, each with the top-level folder that it is in.

    Links to folders are followed unless they lead back to a folder above. A broken link to an image counts as an image
    that cannot be read.
    """
    here = folder.resolve()
    if here in above:
        return
    for entry in _entries(folder):
        if entry.name in excluded:
            continue
        kind = _entry_kind(entry)
        if kind == "folder":
            yield from walk_images(folder / entry.name, (*above, here), (), top or entry.name)
        elif kind and entry.name.lower().endswith(_ENDINGS):
            yield folder / entry.name, top
