"""Run folders: each run has a number, and only one process writes to its folder."""

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from aezoo.errors import AezooError
from aezoo.io import atomic_files

CHECKPOINTS = "checkpoints"
_LOCK, _NOTE = ".lock", "checkpoints.txt"


def create_next(home: Path) -> Path:
    """Create the folder with the next free number; safe for concurrent calls by several processes.

    Args:
        home: the folder of all runs of a recipe, `runs/vae`.

    Raises:
        AezooError: the folder cannot be created.
    """
    while True:
        try:
            home.mkdir(parents=True, exist_ok=True)
            folder = next_free(home)
            # another process has created the folder, or has removed an empty `home`
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                folder.mkdir()
                return folder
        except OSError as error:
            raise AezooError(
                f"cannot read or write {home}: {error.strerror}; choose a writable folder with "
                "--trainer.default_root_dir"
            ) from error


def next_free(home: Path) -> Path:
    """Return the folder with the next free number, without creating it."""
    return home / str(max((int(path.name) for path in home.glob("*") if path.name.isdigit()), default=-1) + 1)


def existing_parent(path: Path) -> Path:
    """Return the path itself if it exists, otherwise the nearest existing parent folder."""
    return next((at for at in (path, *path.parents) if at.exists()), path)


def checkpoints_of(run: Path) -> Path:
    """Return the folder of a run's checkpoints: inside the run's folder, or as recorded by `note_checkpoints`."""
    try:
        recorded = os.fsdecode((run / _NOTE).read_bytes()).strip()
    except OSError:
        recorded = ""
    return Path(recorded) if recorded else run / CHECKPOINTS


def note_checkpoints(run: Path, folder: Path) -> None:
    """Record in a run's folder where its checkpoints are, if they are in another folder.

    Without this record, checkpoints in a folder shared by several runs could be those of another run.
    """
    folder = folder.resolve()
    if folder == (run / CHECKPOINTS).resolve():
        (run / _NOTE).unlink(missing_ok=True)
    elif checkpoints_of(run) != folder:
        atomic_files.write(run / _NOTE, lambda file: file.write(os.fsencode(folder) + b"\n"))


def checkpoint_folders(path: Path) -> list[Path]:
    """Return candidate folders for the checkpoints of a path, in order: the path itself, a run's, those of runs."""
    below = [home for home in map(checkpoints_of, path.glob("*")) if home.is_dir()]
    return [path, checkpoints_of(path), *sorted(below, key=lambda home: home.stat().st_mtime, reverse=True)]


def run_of(source: Path, requested: Path) -> Path | None:
    """Return the folder of the run that a checkpoint belongs to, or None.

    Args:
        source: the checkpoint file.
        requested: the path given by the user: a run, a folder of runs, or another path.
    """
    recorded = [run for run in (requested, *requested.glob("*")) if (run / _NOTE).is_file()]
    recorded = [run for run in recorded if checkpoints_of(run) == source.parent]
    if recorded:
        return max(recorded, key=lambda run: (run / _NOTE).stat().st_mtime)
    home = parent_folder(source)
    return home.parent if home.name == CHECKPOINTS else None


def parent_folder(file: Path) -> Path:
    """Return the folder of a file, resolved if it would have no name, such as the working directory."""
    return file.parent if file.parent.name not in ("", "..") else file.parent.resolve()


class OpenFolder:
    """A folder that is kept open, so that it can be located after it was moved.

    Args:
        path: path of the existing folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        # Windows cannot open folders, and does not move folders with open files
        self._handle = os.open(path, os.O_RDONLY) if os.name == "posix" else None
        self._has_link = False

    def is_gone(self) -> bool:
        """Return whether the folder was deleted; if it was moved, link its old path to it until this process ends.

        Loggers and callbacks open their files by path at each write.
        """
        if self._handle is None or self._is_at(self.path):
            return False
        try:
            now = Path(f"/proc/self/fd/{self._handle}").readlink()
            if self._has_link:  # to its previous location
                _remove_link(self.path)
            if not self._is_at(now):
                return True
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.symlink_to(now, target_is_directory=True)
            self._has_link = True
        except OSError:
            return True
        atexit.register(_remove_link, self.path)
        print(f"aezoo: {self.path} was moved to {now}, where the run continues", file=sys.stderr)
        return False

    def close(self) -> None:
        """Close the folder."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _is_at(self, path: Path) -> bool:
        try:
            return self._handle is not None and os.path.samestat(os.fstat(self._handle), path.stat())
        except OSError:
            return False


def _remove_link(path: Path) -> None:
    if path.is_symlink():
        path.unlink()


@contextlib.contextmanager
def locked(
    folder: Path, keep: Path, cure: str = "train from scratch without --ckpt_path and --resume"
) -> Iterator[None]:
    """Lock a folder against training by other processes; remove it at the end if nothing was written there.

    Args:
        folder: the folder of the run.
        keep: a folder that existed before; empty folders below it are removed.
        cure: advice in the error message, as an alternative to waiting.

    Raises:
        AezooError: another process is training in the folder.
    """
    with contextlib.ExitStack() as ends:
        try:
            _lock(ends.enter_context((folder / _LOCK).open("ab")))
        except BlockingIOError as error:
            raise AezooError(f"{folder} is being written by another process: wait for it, or {cure}") from error
        except OSError:
            pass  # no locks on this file system; a failure to write is reported later
        try:
            yield
        finally:
            _remove_if_empty(folder, keep)


def is_locked(folder: Path) -> bool:
    """Return whether another process has locked a folder."""
    try:
        with (folder / _LOCK).open("r+b") as file:
            _lock(file)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no lock, or no locks on this file system
    return False


class SharedFolder:
    """A folder to which several processes write, on any machine; removed at the end if it is empty.

    Args:
        folder: the existing folder.
        keep: a folder that existed before; empty folders below it are removed.

    Attributes:
        alone: whether no other process uses the folder; others wait until `admit` is called. False if this is unknown.
    """

    def __init__(self, folder: Path, keep: Path) -> None:
        self._folder, self._keep = folder, keep
        self._file: IO[bytes] | None = None
        self.alone = False

    def __enter__(self) -> "SharedFolder":
        self._file = (self._folder / _LOCK).open("a+b")
        try:
            _lock(self._file)
            self.alone = sys.platform != "win32"
        except BlockingIOError:
            self.admit()
        except OSError:
            pass  # no locks on this file system
        return self

    def admit(self) -> None:
        """Allow other processes to use the folder."""
        self.alone = False
        if sys.platform != "win32" and self._file is not None:
            import fcntl

            with contextlib.suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_SH)

    def __exit__(self, *exception: object) -> None:
        if self._file is None:
            return
        with self._file, contextlib.suppress(OSError):
            _lock(self._file)
            _remove_if_empty(self._folder, self._keep)


def _remove_if_empty(folder: Path, keep: Path) -> None:
    with contextlib.suppress(OSError):
        if all(path.name == _LOCK for path in folder.iterdir()):
            (folder / _LOCK).unlink(missing_ok=True)
            for path in (folder, *folder.parents):
                if path == keep:
                    break
                path.rmdir()


def _lock(file: IO[bytes]) -> None:
    if sys.platform != "win32":
        import fcntl

        # with flock, workers that survive a killed run for some seconds would inherit the lock
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
