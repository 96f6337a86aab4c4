"""Untrusted zip and tar files: sizes are checked before unpacking, and nothing is written outside their folder."""

import contextlib
import os
import pickletools
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from aezoo.errors import AezooError
from aezoo.security.values import MAX_EXTENT

# torch writes checkpoints without compression, so a file that grows by more than this is a memory bomb
MAX_GROWTH = 2**24
MAX_BYTES = "AEZOO_MAX_BYTES"
_lock = threading.RLock()
_MARK = -1
# of torch's old format: a magic number, its version, the machine, the content, and the keys of its storages
_LEGACY_PICKLES = 5


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


def check_growth(path: Path, max_bytes: int | None = None) -> None:
    """Refuse a file that would unpack to far more than its size.

    Args:
        path: the file.
        max_bytes: largest size of the unpacked file; by default the environment's `AEZOO_MAX_BYTES`, otherwise the
            size of the file plus 16 MiB.

    Raises:
        AezooError: it would, or it is a damaged zip file, or the environment's value is not a number.
    """
    size = unpacked_size(path)
    if max_bytes is None and (given := os.environ.get(MAX_BYTES, "")):
        if not given.isdecimal():
            raise AezooError(f"{MAX_BYTES} is {given!r} in the environment: give a number of bytes")
        max_bytes = int(given)
    most = path.stat().st_size + MAX_GROWTH if max_bytes is None else max_bytes
    if size is not None and size > most:
        raise AezooError(
            f"{path} would unpack to {size / 2**20:.0f} MiB, more than the limit of {most / 2**20:.0f}: torch writes "
            f"no such files; if you trust it, raise the limit (max_bytes=..., or {MAX_BYTES} in the environment)"
        )


def check_tuples(path: Path) -> None:
    """Refuse a torch file with tuples whose shared parts make hashing too slow: unpickling hashes the keys of dicts.

    Raises:
        AezooError: a tuple has too many parts, with each reference to a shared one followed.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                with zipfile.ZipFile(path) as archive:
                    for member in archive.infolist():
                        # torch finds it in any case
                        if member.filename.lower().endswith("data.pkl"):
                            _walk_tuples(archive.open(member), path)
            else:
                file.seek(0)
                for _ in range(_LEGACY_PICKLES):
                    _walk_tuples(file, path)
    except AezooError:
        raise
    except zipfile.BadZipFile as error:  # which torch may read all the same
        raise AezooError(f"{path} is a damaged zip file ({error}): save or download it again") from error
    except Exception:  # torch refuses incomplete pickles
        return


def _walk_tuples(file: IO[bytes], path: Path) -> None:
    """Follow the stack of a pickle by the sizes of its tuples; anything else counts as one."""
    stack: list[int] = []
    memo: dict[int, int] = {}
    for code, argument, _ in pickletools.genops(file):
        if code.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument or 0)] = stack[-1]
            continue
        if code.name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo.get(int(argument or 0), 1))
            continue
        size, takes = 1, len(code.stack_before)
        if pickletools.stackslice in code.stack_before:
            takes = code.stack_before.index(pickletools.markobject)
            while (part := stack.pop()) != _MARK:
                size += part
        for _ in range(takes):
            size += stack.pop()
        if "TUPLE" not in code.name:
            size = 1
        if size > MAX_EXTENT:
            raise AezooError(f"{path} contains more than {MAX_EXTENT:,} values: nothing that was trained needs that")
        stack += [_MARK if code.name == "MARK" else size] * len(code.stack_after)


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
