"""Terminals and pipes: what they cannot show, and that they go away while something runs."""

import contextlib
import errno
import os
import signal
import sys

# what the kernel and a shell tell of a terminal that is closed, each for itself; Windows has none
HANGUP = getattr(signal, "SIGHUP", None)


def show_what_can_be_shown() -> None:
    """Let a question mark stand for what our output's encoding lacks, as for letters in names, instead of failing."""
    if getattr(sys.stdout, "errors", None) == "strict":
        with contextlib.suppress(AttributeError, OSError):  # of an output that somebody has put there
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def signals() -> tuple[signal.Signals, ...]:
    """What asks a program to end: SIGTERM, and SIGHUP of a terminal that is closed unless `nohup` has it ignored."""
    if HANGUP is None or signal.getsignal(HANGUP) is signal.SIG_IGN:
        return (signal.SIGTERM,)
    return signal.SIGTERM, HANGUP


def is_gone(error: BaseException) -> bool:
    """Whether an error says that nobody reads any more: of a pipe, or of a terminal."""
    return isinstance(error, BrokenPipeError) or (
        isinstance(error, OSError) and error.errno == errno.EIO and error.filename is None
    )


def let_go() -> None:
    """Point those of our two outputs that nobody reads to nothing, lest the interpreter's last flush fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if not is_gone(error):
                continue
            with contextlib.suppress(OSError):  # one without a file of its own
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
