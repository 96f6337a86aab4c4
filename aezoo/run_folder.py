"""The folder of a run: a number of its own, and one process that writes into it."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from aezoo import durable
from aezoo.errors import AezooError

CHECKPOINTS = "checkpoints"
_LOCK, _NOTE = ".lock", "checkpoints.txt"


def claim(home: Path) -> Path:
    """Make the folder of the next free number; of processes that ask at once, each gets another one.

    Args:
        home: the folder of all runs of a recipe, `runs/vae`.

    Raises:
        AezooError: it cannot be made.
    """
    while True:
        try:
            home.mkdir(parents=True, exist_ok=True)
            folder = next_free(home)
            # another process was faster, or has taken away a home in which it wrote nothing
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                folder.mkdir()
                return folder
        except OSError as error:
            raise AezooError(
                f"cannot read or write {home}: {error.strerror}; choose a folder that can be written with "
                "--trainer.default_root_dir"
            ) from error


def next_free(home: Path) -> Path:
    """The folder of the next free number, which is not made."""
    return home / str(max((int(path.name) for path in home.glob("*") if path.name.isdigit()), default=-1) + 1)


def standing(path: Path) -> Path:
    """The path itself if it exists, else the nearest folder above it that does."""
    return next((at for at in (path, *path.parents) if at.exists()), path)


def checkpoints_of(run: Path) -> Path:
    """Where the checkpoints of a run are: in its folder, unless `note_checkpoints` has noted another place."""
    try:
        noted = os.fsdecode((run / _NOTE).read_bytes()).strip()
    except OSError:
        noted = ""
    return Path(noted) if noted else run / CHECKPOINTS


def note_checkpoints(run: Path, folder: Path) -> None:
    """Note in a run's folder where its checkpoints are, if that is elsewhere.

    What has not been noted has not been written: a folder that several runs share may hold another's.
    """
    folder = folder.resolve()
    if folder == (run / CHECKPOINTS).resolve():
        (run / _NOTE).unlink(missing_ok=True)
    elif checkpoints_of(run) != folder:
        durable.write(run / _NOTE, lambda file: file.write(os.fsencode(folder) + b"\n"))


def homes(path: Path) -> list[Path]:
    """The folders that may hold the checkpoints a path stands for, the first one first: it, a run's, those of runs."""
    below = [home for home in map(checkpoints_of, path.glob("*")) if home.is_dir()]
    return [path, checkpoints_of(path), *sorted(below, key=lambda home: home.stat().st_mtime, reverse=True)]


def run_of(source: Path, given: Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to, or None if it lies by itself.

    Args:
        source: the checkpoint file.
        given: the path that stands for it: a run, a folder of runs, or any other.
    """
    noted = [run for run in (given, *given.glob("*")) if (run / _NOTE).is_file()]
    noted = [run for run in noted if checkpoints_of(run) == source.parent]
    if noted:
        return max(noted, key=lambda run: (run / _NOTE).stat().st_mtime)
    home = folder_of(source)
    return home.parent if home.name == CHECKPOINTS else None


def folder_of(file: Path) -> Path:
    """The folder of a file, with its name also where it is the working directory, or one above that."""
    return file.parent if file.parent.name not in ("", "..") else file.parent.resolve()


@contextlib.contextmanager
def held(folder: Path, stays: Path) -> Iterator[None]:
    """Keep other processes from training in a folder; if nothing was written there, it is taken away at the end.

    Args:
        folder: the folder of the run.
        stays: what was there before; folders below it go if they are empty.

    Raises:
        AezooError: another process trains there.
    """
    with contextlib.ExitStack() as ends:
        try:
            _lock(ends.enter_context((folder / _LOCK).open("ab")))
        except BlockingIOError as error:
            raise AezooError(
                f"{folder} is being written by another process: wait for it, or train from scratch without "
                "--ckpt_path and --resume"
            ) from error
        except OSError:
            pass  # no locks on this file system; what cannot be written is said when it is to be
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if all(path.name == _LOCK for path in folder.iterdir()):
                    (folder / _LOCK).unlink(missing_ok=True)
                    for path in (folder, *folder.parents):
                        if path == stays:
                            break
                        path.rmdir()


def _lock(file: IO[bytes]) -> None:
    if sys.platform != "win32":
        import fcntl

        # workers that outlive a killed run for some seconds would inherit the lock of flock
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
