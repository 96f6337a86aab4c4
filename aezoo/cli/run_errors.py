"""Errors of Lightning, torch and the system in a run, as an AezooError of one line that says what to do."""

import errno
import os
import re
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from aezoo.data.loaders import worker_failure
from aezoo.data.resident import lacks_memory
from aezoo.errors import AezooError
from aezoo.io import terminal

# errors of a disk or folder, anywhere in a run; loggers and pictures also write
_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP),
}


def one_line(error: BaseException, source: Path | None, batch_size: int) -> AezooError | None:
    """The AezooError for an error of a fit or an evaluation; None if there is none, or if it already is one.

    Args:
        error: what was raised.
        source: the checkpoint that the command has read.
        batch_size: samples in a batch.
    """
    text = " ".join(str(error).split())
    if re.search("Early stopping conditioned on metric|could not find the monitored", text):
        return AezooError(text.partition(" HINT")[0])
    if (line := _lightning_error_line(error)) is not None:
        return AezooError(line)
    if lacks_memory(error):
        return AezooError(
            f"out of memory in a step of {batch_size} samples ({text[:120]}): lower --data.batch_size, "
            "--model.hidden_dims or --data.size; files saved before are kept"
        )
    if "Error(s) in loading state_dict" in text:
        return AezooError(
            "the checkpoint's weights do not fit the model with these settings: drop the --model flags and -c files "
            "that differ from the checkpoint's"
        )
    is_foreign = isinstance(error, Exception) and not isinstance(error, AezooError)
    if is_foreign and source is not None and _restores(error):
        return AezooError(
            f"{source} cannot be restored ({type(error).__name__}: {text[:200]}): it is damaged; use another "
            "checkpoint of its run, or train from scratch with --resume off"
        )
    return None


@contextmanager
def system_errors_in_one_line(command: str) -> Iterator[None]:
    """Turn errors of disks and ports, also in the logger's thread, into one line.

    Raises:
        AezooError: names the file or the port, and says how to fix it.
    """
    report_thread = threading.excepthook

    def report(args: threading.ExceptHookArgs) -> None:
        # TensorBoard's writer thread: the run gets the error at the next entry, and reports it below
        if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in _DISK_ERRORS):
            report_thread(args)

    threading.excepthook = report
    try:
        yield
    except AezooError:  # a subclass of ValueError, handled below
        raise
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        raise AezooError(
            f"port {port} of {host}, at which the processes connect, is in use: stop the process that uses it, or set "
            "MASTER_PORT to another"
        ) from error
    except (OSError, ValueError) as error:
        # Lightning's logger reports any error in TensorBoard's as a value that cannot be logged
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in _DISK_ERRORS:
            raise
        flag = "--predictions.folder" if command == "predict" else "--trainer.default_root_dir"
        if cause.filename is None and (reason := terminal.unwritable_output(after=cause)) is not None:
            raise AezooError(
                f"cannot write the output: {reason}; free disk space, or write it elsewhere; files saved before are "
                "kept"
            ) from error
        where = os.fsdecode(cause.filename or "the run folder")
        raise AezooError(
            f"cannot read or write {where}: {cause.strerror}; files saved before are kept: free disk space, or choose "
            f"a writable folder with {flag}"
        ) from error
    finally:
        threading.excepthook = report_thread


def _lightning_error_line(error: BaseException) -> str | None:
    """One line for Lightning's errors about settings that do not fit data or packages, or torch's of a lost worker."""
    text = " ".join(str(error).split())
    if (line := worker_failure(error)) is not None:
        return f"{line}; continue with --resume auto"
    if isinstance(error, ModuleNotFoundError):
        return f"a package is missing, install it or leave out what needs it: {text}"
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    # a ValueError with a cause comes from Lightning's logger, see `system_errors_in_one_line`
    own = type(error) is ValueError and error.__cause__ is None
    own = own and frame.f_globals.get("__name__", "").startswith("lightning.")
    return f"Lightning refused the run: {text}" if own or isinstance(error, MisconfigurationException) else None


def _restores(error: BaseException) -> bool:
    """Whether an error comes from a checkpoint's state: raised while it was restored, or by its optimiser."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name.lstrip("_")) for frame in frames]
    # in a step's closure, below the optimiser, are errors of the model
    return names[-1][0].startswith("torch.optim.") or any(
        module.endswith("connectors.checkpoint_connector") and name.startswith(("restore", "resume"))
        for module, name in names
    )
