"""Terminals and pipes: unsupported characters, and streams that are closed during a run."""

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
    """Replace closed standard streams, e.g. by `>&-`, with the null device.

    Python sets them to None, and the next file opened would get their descriptor and all printed text.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def printable(text: str) -> str:
    """Escape line breaks and other control characters, e.g. in file names and versions."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def replace_unencodable() -> None:
    """Print question marks for characters that the output's encoding does not support."""
    if getattr(sys.stdout, "errors", None) == "strict":
        with contextlib.suppress(AttributeError, OSError):  # the output may have been replaced
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def termination_signals() -> tuple[signal.Signals, ...]:
    """Return the termination signals: SIGTERM, and SIGHUP of a closed terminal unless `nohup` ignores it."""
    if HANGUP is None or signal.getsignal(HANGUP) is signal.SIG_IGN:
        return (signal.SIGTERM,)
    return signal.SIGTERM, HANGUP


def is_closed_pipe(error: BaseException) -> bool:
    """Return whether an error means that a pipe or terminal no longer has a reader."""
    return isinstance(error, BrokenPipeError) or (
        isinstance(error, OSError) and error.errno == errno.EIO and error.filename is None
    )


def unwritable_output(after: OSError | None = None) -> str | None:
    """Return why standard output cannot be written although it has a reader, e.g. a full disk, or None.

    Args:
        after: an error that may be from the stream. Since unwritten text is then lost, an empty line is written as a
            test.
    """
    try:
        if after is not None:
            sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError as error:
        return None if is_closed_pipe(error) else error.strerror
    return None


def detach_unwritable_streams() -> None:
    """Redirect unwritable outputs to the null device, for the interpreter's final flush."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):  # an output without a file descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
