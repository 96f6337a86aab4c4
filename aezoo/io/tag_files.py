"""Files of pretrained weights: their location and the verification of their hashes.

Weights are in the package, in a plugin, or on the Hugging Face hub, from which they are cached by huggingface_hub. They
can also be in subfolders, named after the tags, of the folder in the environment variable `AEZOO_WEIGHTS`.
"""

import hashlib
import os
from pathlib import Path, PurePosixPath

from aezoo.errors import AezooError
from aezoo.io import hub_files
from aezoo.registry import find_tag
from aezoo.training.tags import Tag

VARIABLE = "AEZOO_WEIGHTS"


def tag_of(path: str | Path) -> Tag | None:
    """Return the tag of pretrained weights with this name, or None if it is a path or an address."""
    text = str(path)
    return None if "://" in text or Path(text).exists() else find_tag(text)


def refuse_tag(path: str | Path) -> None:
    """Reject a tag if a checkpoint is needed.

    Raises:
        AezooError: the path is a tag.
    """
    if (tag := tag_of(path)) is not None:
        raise AezooError(
            f"{tag.name} are pretrained weights, which have no checkpoint: use them with commands such as "
            f"`aezoo reconstruct`, or with a Trainer in Python: aezoo.load_model({tag.name!r})"
        )


def locate(tag: Tag) -> str:
    """Return the folder of a tag's files or their address on the hub, after verifying their hashes.

    Raises:
        AezooError: a file is missing, has another hash, or cannot be downloaded.
    """
    if (folder := _own_folder(tag)) is not None:
        return str(folder)
    if not tag.is_remote:
        for file in tag.sha256:
            _check(tag, file, Path(tag.source) / file, f"install {tag.owner} again")
        return tag.source
    address = f"{tag.source}@{tag.revision}"
    name, inside, revision = hub_files.split(address)
    try:
        repository = hub_files.Repository(name, revision)
        found = {file: repository.download(str(PurePosixPath(inside) / file)) for file in tag.sha256}
    except AezooError as error:
        raise AezooError(
            f"{tag.name} is not on this machine: {error}; or copy {', '.join(tag.sha256)} of {address} to "
            f"FOLDER/{tag.name} and set {VARIABLE}=FOLDER"
        ) from error
    for file, path in found.items():
        _check(tag, file, path, "remove it to download it again")
    return address


def _own_folder(tag: Tag) -> Path | None:
    """Return the tag's folder in the folder set in the environment, if it exists."""
    home = os.environ.get(VARIABLE)
    folder = Path(home) / tag.name if home else None
    if folder is None or not folder.is_dir():
        return None
    for file in tag.sha256:
        _check(tag, file, folder / file, "copy it from its source again")
    return folder


def _check(tag: Tag, file: str, path: Path, cure: str) -> None:
    """Verify the hash of a file."""
    try:
        if not path.is_file():  # opening a pipe would block
            raise FileNotFoundError("there is no such file")
        with path.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise AezooError(f"cannot read {path} of {tag.name}: {error.strerror or error}; {cure}") from error
    if found != tag.sha256[file]:
        raise AezooError(
            f"{path} is refused: its SHA-256 is {found[:16]}..., expected {tag.sha256[file][:16]}...; {cure}"
        )
