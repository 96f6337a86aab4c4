"""Which images a folder holds, and what its sub-folders say about splits and classes."""

import warnings
from collections.abc import Iterator
from pathlib import Path

from aezoo.data.images import EXTENSIONS, few
from aezoo.data.source import Stage
from aezoo.errors import AezooError

Files = dict[Stage, list[tuple[Path, int]]]

SPLITS: dict[str, Stage] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


def scan(root: Path) -> tuple[Files, tuple[str, ...]]:
    """(image, class) by split and the class names; class -1 and no names where the folders tell none."""
    children = sorted(child for child in root.iterdir() if child.is_dir())
    named = {SPLITS[child.name.lower()]: child for child in children if child.name.lower() in SPLITS}
    homes: dict[Stage, Path] = named if "train" in named else {"train": root}
    found = {stage: (home, _images(home)) for stage, home in homes.items()}
    if not found["train"][1]:
        raise AezooError(
            f"no images in {found['train'][0]} (looked for {' '.join(sorted(EXTENSIONS))}, at any depth): "
            "give another folder"
        )
    if len(homes) > 1 or homes["train"] != root:
        inside = {path for _, paths in found.values() for path in paths}
        outside = [path for path in _images(root) if path not in inside]
        if outside:
            warnings.warn(
                f"{root}: {len(outside)} images outside the folders of the splits are not used: {few(outside)}",
                stacklevel=2,
            )
    parts = [path.relative_to(home).parts for home, paths in found.values() for path in paths]
    names = sorted({part[0] for part in parts}) if all(len(part) > 1 for part in parts) else []
    names = names if len(names) > 1 else []
    empty = [c.name for c in sorted(found["train"][0].iterdir()) if c.is_dir() and not _images(c)] if names else []
    if empty:
        warnings.warn(f"{root}: the class folders {', '.join(empty)} hold no images", stacklevel=2)
    numbers = {name: i for i, name in enumerate(names)}
    files: Files = {
        stage: [(path, numbers.get(path.relative_to(home).parts[0], -1)) for path in paths]
        for stage, (home, paths) in found.items()
        if paths
    }
    return files, tuple(names)


def _images(folder: Path) -> list[Path]:
    return sorted(_found(folder, ()))


def _found(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Images at any depth, also behind links to folders, as far as these do not lead back to one of those above."""
    here = folder.resolve()
    if here in above:
        return
    for path in folder.iterdir():
        # ._name.png and __MACOSX hold Finder's notes, not images
        if path.name.startswith(".") or path.name == "__MACOSX":
            continue
        if path.suffix.lower() in EXTENSIONS and path.is_file():
            yield path
        elif path.is_dir():
            yield from _found(path, (*above, here))
