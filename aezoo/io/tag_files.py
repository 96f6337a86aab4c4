"""The files of pretrained weights: where they are, and that they are those of the tag's entry.

Weights are in the package, in a plug-in, or on the Hugging Face hub, from which they are cached by huggingface_hub.
They can also be in the folder in the environment variable `AEZOO_WEIGHTS`, each tag in a subfolder of its name.
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
    """The tag of pretrained weights that a path names; None if it is a path or an address."""
    text = str(path)
    return None if "://" in text or Path(text).exists() else find_tag(text)


def refuse_tag(path: str | Path) -> None:
    """Refuse a tag where a checkpoint is needed.

    Raises:
        AezooError: the path names a tag.
    """
    if (tag := tag_of(path)) is not None:
        raise AezooError(
            f"{tag.name} are pretrained weights, which have no checkpoint: commands such as `aezoo reconstruct` take "
            f"them, and a Trainer in Python trains or tests aezoo.load_model({tag.name!r})"
        )


def locate(tag: Tag) -> str:
    """The folder of a tag's files or their address on the hub, after their hashes were compared.

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
            f"{tag.name} is not on this machine: {error}; or put {', '.join(tag.sha256)} of {address} into "
            f"FOLDER/{tag.name} and set {VARIABLE}=FOLDER"
        ) from error
    for file, path in found.items():
        _check(tag, file, path, "remove it, and it is downloaded again")
    return address


def _own_folder(tag: Tag) -> Path | None:
    """The tag's folder in that which the environment names, if it is there."""
    home = os.environ.get(VARIABLE)
    folder = Path(home) / tag.name if home else None
    if folder is None or not folder.is_dir():
        return None
    for file in tag.sha256:
        _check(tag, file, folder / file, "take it from its source")
    return folder


def _check(tag: Tag, file: str, path: Path, cure: str) -> None:
    """Compare a file's hash with that of the entry."""
    try:
        if not path.is_file():  # it would wait for a pipe
            raise FileNotFoundError("there is no such file")
        with path.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise AezooError(f"cannot read {path} of {tag.name}: {error.strerror or error}; {cure}") from error
    if found != tag.sha256[file]:
        raise AezooError(
            f"{path} is refused: its SHA-256 is {found[:16]}..., that of {tag.name} {tag.sha256[file][:16]}...; {cure}"
        )
