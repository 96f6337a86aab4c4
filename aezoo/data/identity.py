"""Identify sets of samples, so that a run is only continued with the same data."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from aezoo.data.object_store import ObjectFolder, is_address
from aezoo.data.source import DEFAULT_ROOT
from aezoo.data.source_registry import is_built_in, source_of_path
from aezoo.deprecated import renamed

# built-in sources of files of the user, which the name of the source does not identify
_OF_FILES = ("folder", "array", "hf", "stream")
# for a larger file, only its size and blocks of its content are hashed
_WHOLE, _BLOCK, _BLOCKS = 2**26, 2**18, 64
# files of a folder whose content is hashed; of the others, only names and sizes
_READ = 64


def data_identity(name: str, root: str = DEFAULT_ROOT, of: str = "", allow_remote: bool = False) -> str:
    """A string that identifies a set: independent of the folder of its files, but different if the files change.

    Args:
        name: name of a source, or the path of a set, as in `DataModule`.
        root: the folder or file of the samples.
        of: the set whose samples go through a network, if the source is activations.
        allow_remote: whether an address may be opened, see `ObjectFolder`.

    Returns:
        The source's name; for folders and files of samples, with a digest of their content.
    """
    reader = source_of_path(name)
    source, place = (reader, name) if reader else (name, root)
    if source == "activations":
        return f"activations of {data_identity(of, root, allow_remote=allow_remote)}"
    # if a plug-in is given a root, it reads files of the user
    if source not in _OF_FILES and (is_built_in(source) or place == DEFAULT_ROOT):
        return source
    if source == "stream" and is_address(place):
        objects = ObjectFolder(place, allow_remote)
        sizes = [(path, found.size) for path, found in objects.objects.items()]
        return f"{source} {_folder_digest(sizes, lambda paths: objects.first_bytes(paths, _BLOCK))}"
    path = Path(place).expanduser()
    # a set of the hub is identified by its name
    return f"{source} {_digest(path) if path.exists() else place}"


def other_data_message(source: object) -> str:
    """The reason why a fit cannot continue from a checkpoint of another set."""
    return (
        f"{source} was trained on other data, or the data have changed since then: leave out --ckpt_path and "
        "--resume to start a new run, or fine-tune from Python with aezoo.load_model"
    )


def data_set_name(name: str, root: str = DEFAULT_ROOT) -> str:
    """The name of a set for the folders of its runs: that of its file or folder, or of the source."""
    own_files = name in _OF_FILES and root not in ("", DEFAULT_ROOT)
    return (Path(root).expanduser().resolve() if own_files else Path(name)).stem


def _digest(path: Path) -> str:
    if path.is_file():
        found = hashlib.blake2b(digest_size=8)
        _add_content(found, path)
        return found.hexdigest()
    return _folder_digest(sorted(_files(path)), lambda files: (_first_bytes(path / file) for file in files))


def _folder_digest(files: Sequence[tuple[str, int]], first_bytes: Callable[[list[str]], Iterable[bytes]]) -> str:
    """The digest of a folder, from the paths and sizes of its files and the beginnings of some."""
    found = hashlib.blake2b(digest_size=8)
    for relative, size in files:
        found.update(f"{relative}\0{size}\0".encode("utf-8", "surrogateescape"))
    some = files[:: max(1, len(files) // _READ)]
    for (_, size), content in zip(some, first_bytes([relative for relative, _ in some]), strict=True):
        found.update(str(size).encode() + content)
    return found.hexdigest()


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_BLOCK)


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Paths within a folder and sizes of its files, without hidden ones."""
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(at, name)
            if not name.startswith(".") and file.is_file():
                yield str(file.relative_to(folder)), file.stat().st_size


def _add_content(found: "hashlib.blake2b", path: Path) -> None:
    size = path.stat().st_size
    found.update(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            found.update(file.read(_WHOLE))
            return
        for i in range(_BLOCKS):
            file.seek((size - _BLOCK) * i // (_BLOCKS - 1))
            found.update(file.read(_BLOCK))


__getattr__ = renamed(__name__)
