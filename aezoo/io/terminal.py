"""Terminals and pipes: characters that they cannot show, and handling when they are closed during a run."""

import contextlib
import errno
import os
import signal
import sys

# sent by the kernel and by the shell, independently, when a terminal is closed; does not exist on Windows
HANGUP = getattr(signal, "SIGHUP", None)


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


def detach_closed_streams() -> None:
    """Redirect outputs without a reader to the null device, so that the interpreter's last flush does not fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if not is_closed_pipe(error):
                continue
            with contextlib.suppress(OSError):  # an output without a file descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
