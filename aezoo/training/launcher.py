"""End a process when the process that launched it ends; this module does not import torch."""

import contextlib
import ctypes
import os
import signal
import sys

# set in the environment of a run that `aezoo tune` has started
TRIAL = "AEZOO_TRIAL"
# process that launches ranks or runs of a study, for these
_LAUNCHER = "AEZOO_LAUNCHER"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_launcher() -> None:
    """On Linux, have this rank or run of a study killed when the process that launched it ends for any reason.

    Nothing else can end a stopped process whose launcher was killed. Called before the imports, which take seconds.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    launched = by_torchrun or TRIAL in os.environ or os.environ.get("LOCAL_RANK", "0") != "0"
    launcher, own = os.environ.get(_LAUNCHER), str(os.getpid())
    os.environ[_LAUNCHER] = own
    if not launched or sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # it may have ended before
    if launcher not in (None, own, str(os.getppid())) and not by_torchrun:
        os.kill(os.getpid(), signal.SIGKILL)
