"""Terminals and pipes: characters that they cannot show, and handling when they are closed during a run."""

import contextlib
import errno
import os
import re
import signal
import sys
from pathlib import Path

# sent by the kernel and by the shell, independently, when a terminal is closed; does not exist on Windows
HANGUP = getattr(signal, "SIGHUP", None)


def open_missing_streams() -> None:
    """Replace standard streams that are closed, as by `>&-`, by the null device.

    Python sets them to None then, and the next file that is opened would get their number and all that is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def printable(text: str) -> str:
    """Escape line breaks and other control characters, which names of files and versions may contain."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def replace_unencodable() -> None:
    """Print a question mark for characters that the output's encoding lacks, such as letters in names."""
    if getattr(sys.stdout, "errors", None) == "strict":
        with contextlib.suppress(AttributeError, OSError):  # the output may have been replaced
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def termination_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a program to end: SIGTERM, and SIGHUP of a closed terminal unless `nohup` ignores it."""
    if HANGUP is None or signal.getsignal(HANGUP) is signal.SIG_IGN:
        return (signal.SIGTERM,)
    return signal.SIGTERM, HANGUP


def is_closed_pipe(error: BaseException) -> bool:
    """Whether an error means that a pipe or terminal no longer has a reader."""
    return isinstance(error, BrokenPipeError) or (
        isinstance(error, OSError) and error.errno == errno.EIO and error.filename is None
    )


def unwritable_output(after: OSError | None = None) -> str | None:
    """Why the standard output cannot be written though it has a reader, such as a full disk; None if it can.

    Args:
        after: an error that may come from the stream. Unwritten text is lost then, so an empty line is tried.
    """
    try:
        if after is not None:
            sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError as error:
        return None if is_closed_pipe(error) else error.strerror
    return None


def detach_unwritable_streams() -> None:
    """Redirect outputs that cannot be written to the null device, for the interpreter's last flush."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):  # an output without a file descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
