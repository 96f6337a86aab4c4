"""Untrusted zip and tar files: sizes are checked before unpacking, and nothing is written outside their folder."""

import contextlib
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

from aezoo.errors import AezooError

_lock = threading.RLock()


def unpacked_size(path: Path) -> int | None:
    """Bytes that the members of a zip file declare, which its readers never exceed; None for another kind of file.

    Raises:
        AezooError: it begins like a zip file but cannot be read as one.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return None
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError, UnicodeError) as error:
        raise AezooError(f"{path} is a damaged zip file ({error}): save or download it again") from error


@contextlib.contextmanager
def safe_extraction() -> Iterator[None]:
    """Inside this context tarfile unpacks nothing outside its folder, no devices and no links that leave it.

    torchvision unpacks without a filter; before Python 3.14, tarfile then follows `../` and absolute paths.
    """
    with _lock:
        before = vars(tarfile.TarFile)["extraction_filter"]
        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
        try:
            yield
        finally:
            tarfile.TarFile.extraction_filter = before


def safe_name(name: str) -> str:
    """A name as one component of a path: letters, digits, `_`, `-`, `+`, `=`, inner dots; never empty, `.` or `..`."""
    return re.sub(r"[^\w.+=-]", "_", name).strip(".")[:100] or "run"
