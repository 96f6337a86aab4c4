"""Files that are written atomically, and checkpoints that contain their own digest.

A file is written under another name in the same folder, flushed to disk, and then renamed. A reader finds either the
old or the new file, even after a kill or a power failure. A checkpoint ends with its step and the SHA-256 of everything
before it, stored in the comment of the zip format: `head -c -64 FILE | sha256sum` prints the same hash as `tail -c 64
FILE`. Any loader of torch files can read it. The digest is part of the file, so the two are always consistent.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from aezoo.errors import AezooError

LAST, PREVIOUS, FINISHED = "last.ckpt", "previous.ckpt", "finished.json"
_PREFIX, _SUFFIX = ".tmp-", ".part"
_MARK = b"aezoo-checkpoint "
_NOTE = re.compile(re.escape(_MARK) + rb"(\{[^{}]*\}) ([0-9a-f]{64})\Z")
_DIGEST = 64
_CHUNK = 2**20
_CURE = "free disk space or make the folder writable, then continue with aezoo fit --resume auto"


class DurableIO(TorchCheckpointIO):
    """Checkpoint plugin for Lightning that writes local files with the guarantees of this module.

    When `last.ckpt` is replaced, the old file is kept as `previous.ckpt`. `last.ckpt.json` contains the new file's
    step, size and SHA-256.
    """

    def __init__(self) -> None:
        super().__init__()
        self._saved: tuple[Path, dict[str, Any]] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self._saved = None
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            self._saved = Path(path), save(checkpoint, Path(path))

    def name_as_last(self) -> bool:
        """Link `last.ckpt` to the file saved last, without writing it again; return whether there is such a file.

        Raises:
            AezooError: the link could not be created; an old `last.ckpt` is unchanged.
        """
        if self._saved is None or self._saved[0].name == LAST:
            return False
        path, record = self._saved
        last = path.with_name(LAST)
        add_name(path, last, path.with_name(PREVIOUS))
        _write_record(last, record)
        return True

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if "://" not in str(path):
            check_intact(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)


def save(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write a checkpoint; return its step, its epoch, and the file's size and SHA-256.

    Raises:
        AezooError: it could not be written; an old file is unchanged.
    """
    last = path.name == LAST
    writer = _DigestWriter({"step": int(checkpoint.get("global_step", -1)), "epoch": int(checkpoint.get("epoch", -1))})
    write(path, lambda file: writer.fill(file, checkpoint), path.with_name(PREVIOUS) if last else None)
    record = {**writer.note, "size": path.stat().st_size, "sha256": writer.file_digest}
    if last:
        _write_record(path, record)
    return record


def write(
    path: Path,
    write_content: Callable[[IO[bytes]], object],
    keep: Path | None = None,
    cure: str = _CURE,
    name: Path | None = None,
) -> None:
    """Write a file atomically: completely or not at all.

    Args:
        path: the file.
        write_content: writes the content into the open file.
        keep: path under which the current file is kept.
        cure: advice in the error message if the file cannot be written.
        name: the file's name in the error message, by default its path.

    Raises:
        AezooError: it could not be written; an old file is unchanged.
    """
    with (
        _replacing(path, keep, cure, name) as temporary,
        # os.open respects the umask, unlike mkstemp
        os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file,
    ):
        write_content(file)
        file.flush()
        os.fsync(file.fileno())


def add_name(path: Path, name: Path, keep: Path | None = None) -> None:
    """Add a second name in the same folder to a file written by `write`: a hard link or, without support, a copy.

    Args:
        path: the file.
        name: its second name.
        keep: path under which the current file of that name is kept.

    Raises:
        AezooError: the name could not be added; an old file is unchanged.
    """
    with _replacing(name, keep, _CURE) as temporary:
        try:
            temporary.hardlink_to(path)
        except OSError:
            with path.open("rb") as file, temporary.open("xb") as copy:
                shutil.copyfileobj(file, copy)
                copy.flush()
                os.fsync(copy.fileno())


@contextmanager
def _replacing(path: Path, keep: Path | None, cure: str, name: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path for a file that then replaces `path` atomically."""
    temporary = path.parent / f"{_PREFIX}{secrets.token_hex(6)}{_SUFFIX}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if keep is not None and path.exists():
                _keep_as(path, keep)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)
    except OSError as error:
        raise AezooError(
            f"cannot write {name or path}: {error.strerror or error}; files saved before are kept: {cure}"
        ) from error


def prepare_folder(folder: Path) -> None:
    """Prepare a folder of checkpoints for a run: check that it is writable, and remove unfinished files.

    A damaged `last.ckpt` is renamed; otherwise the next save would overwrite a good `previous.ckpt` with it.

    Raises:
        AezooError: the folder is not writable.
    """
    # a unique name, because another process may test the folder at the same time
    write(folder / f"{_PREFIX}{os.getpid()}{_SUFFIX}", lambda file: None)
    for leftover in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        leftover.unlink(missing_ok=True)
    last = folder / LAST
    if (last.exists() or last.is_symlink()) and find_damage(last) is not None:
        last.replace(folder / f"{LAST}.damaged")


def find_damage(path: Path) -> str | None:
    """Return why a checkpoint file is damaged or incomplete, or None; this does not check if it is safe to load.

    Files not written by this module have no digest, but a CRC for each of their parts.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            start = file.read(2)
            file.seek(max(0, size - 1024))
            note = _NOTE.search(file.read())
            if note is not None:
                file.seek(0)
                digest, remaining = hashlib.sha256(), size - _DIGEST
                while remaining > 0:
                    chunk = file.read(min(remaining, _CHUNK))
                    digest.update(chunk)
                    remaining -= len(chunk) or remaining
                matches = digest.hexdigest().encode() == note[2]
                return None if matches else "its checksum does not match its content"
        if start != b"PK":
            return "it is empty" if size == 0 else None
        with zipfile.ZipFile(path) as archive:
            # torch does not compress, and decompression could take any amount of time
            stored = all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())
            return "its checksum does not match its content" if stored and archive.testzip() else None
    except OSError as error:
        return "it is a broken link" if path.is_symlink() and not path.exists() else str(error.strerror or error)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError):
        return "it is truncated or damaged"


def check_intact(path: Path) -> None:
    """Reject a checkpoint file that is damaged or incomplete.

    Raises:
        AezooError: the file is damaged or incomplete.
    """
    wrong = find_damage(path)
    if wrong is not None:
        missing = None if path.exists() else FileNotFoundError(errno.ENOENT, wrong, str(path))
        raise AezooError(
            f"{path} cannot be used: {wrong}; give an older checkpoint, or continue with --resume RUN"
        ) from missing


def _write_record(path: Path, record: dict[str, Any]) -> None:
    write(record_path(path), lambda file: file.write(json.dumps(record).encode() + b"\n"))


def record_path(path: Path) -> Path:
    """Return the path of the JSON file next to a checkpoint that describes it."""
    return path.with_name(f"{path.name}.json")


def newest_checkpoint(folder: Path, first: Path | None = None) -> tuple[Path | None, list[str]]:
    """Find the newest intact checkpoint in a folder.

    Args:
        folder: the `checkpoints` folder of a run.
        first: the preferred file, by default `last.ckpt`, followed by `previous.ckpt` and the others, newest first.

    Returns:
        The file, or None, and a line for each file that was skipped because it is damaged or missing.
    """
    given, first, previous = first is not None, first or folder / LAST, folder / PREVIOUS
    entries = list(os.scandir(folder)) if folder.is_dir() else []
    found = {folder / entry.name for entry in entries if entry.name.endswith(".ckpt")}
    lines: list[str] = []
    if first not in found and (given or record_path(first).exists() or previous in found):
        lines.append(f"{first} is missing")
    others = sorted(found - {first, previous}, key=_sort_key, reverse=True)
    for path in (first, previous, *others):
        if path not in found:
            continue
        wrong = find_damage(path) or (None if zipfile.is_zipfile(path) else "it is not a checkpoint")
        if wrong is None:
            return path, lines
        lines.append(f"{path} cannot be used: {wrong}")
    return None, lines


def _sort_key(path: Path) -> tuple[int, float]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
            note = _NOTE.search(file.read())
        return int(json.loads(note[1])["step"]) if note else -1, path.stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):
        return -1, 0.0


def _keep_as(path: Path, keep: Path) -> None:
    link = path.parent / f"{_PREFIX}{secrets.token_hex(6)}{_SUFFIX}"
    try:
        # a second name, so that the file always keeps the first one
        link.hardlink_to(path)
        link.replace(keep)
    except OSError:
        # without hard links, the file can only be renamed
        path.replace(keep)
    finally:
        # a rename does nothing if both names already refer to the same file, e.g. after a kill here
        link.unlink(missing_ok=True)


def _fsync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _DigestWriter:
    """Writes torch's output to a file, updates its digest, and stores a note and the digest in the zip comment.

    Args:
        note: plain values.
    """

    def __init__(self, note: dict[str, int]) -> None:
        self.note, self.file_digest = note, ""

    def fill(self, file: IO[bytes], checkpoint: dict[str, Any]) -> None:
        self._file, self._digest, self._pending = file, hashlib.sha256(), b""
        self._error: OSError | None = None
        try:
            torch.save(checkpoint, cast(IO[bytes], self))
        except BaseException:
            if self._error is not None:  # torch wraps the error in a report about its source code
                raise self._error from None
            raise
        # a zip file ends with the length of its comment
        if self._pending != b"\0\0":
            raise RuntimeError("torch.save has written a zip file with its own comment")
        comment = _MARK + json.dumps(self.note).encode() + b" "
        self._write((len(comment) + _DIGEST).to_bytes(2, "little") + comment)
        digest = self._digest.hexdigest().encode()
        self._write(digest)
        self.file_digest = self._digest.hexdigest()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) >= 2:
            self._write(self._pending)
            self._write(view[:-2])
            self._pending = bytes(view[-2:])
        else:
            joined = self._pending + bytes(view)
            self._write(joined[:-2])
            self._pending = joined[-2:]
        return len(view)

    def flush(self) -> None:
        """Do nothing, since the file is flushed when it is complete."""

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            self._error = error
            raise
        self._digest.update(data)
