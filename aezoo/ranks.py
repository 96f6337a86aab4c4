"""Processes of one run end together: if one dies, raises or freezes, none is left behind.

Lightning's launcher ends the other ranks when one has ended. It does not handle ranks that do not respond (stopped,
swapped out, in a deadlock), for which it waits, and ranks whose launcher was killed. A rank that does not respond
causes a timeout of a collective in the others, which then end it.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

# set in the environment of a run that `aezoo tune` has started
TRIAL = "AEZOO_TRIAL"
# how long a rank may take for its own last words once another has failed
GRACE = 5.0
# a thread needs microseconds once it has a core
_LET_GO = 0.2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# torch.distributed.constants.default_pg_timeout, which a torch without torch.distributed cannot import
_TORCH_S_OWN = timedelta(minutes=30)
_LATE = ("timed out", "timeout", "time out")


def end_with_launcher() -> None:
    """A rank, or a run of a study, is killed when the process that launched it ends, however it does; on Linux.

    Nothing else reaches a stopped process whose launcher was killed.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ or TRIAL in os.environ or os.environ.get("LOCAL_RANK", "0") != "0"
    if launched and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def limit_wait(trainer: Trainer, seconds: float) -> None:
    """Set how long a collective waits for a rank, unless the strategy was built with a time of its own."""
    if getattr(trainer.strategy, "_timeout", None) == _TORCH_S_OWN:
        trainer.strategy._timeout = timedelta(seconds=seconds)  # type: ignore[attr-defined]


def hold_it_whole(trainer: Trainer) -> bool:
    """Whether each process has the whole model: a single one, or replicas; other strategies shard it."""
    return trainer.world_size == 1 or isinstance(trainer.strategy, DDPStrategy)


def connect(trainer: Trainer) -> None:
    """After a restart by torchrun, meet under a name of its own; else Lightning lets the processes meet.

    torch 2.13 takes the store of a new attempt for a new one (`rendezvous._create_c10d_store`), but torchrun keeps it:
    a process that reads the address of another before it is renewed finds one that is dead.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    strategy = trainer.strategy
    if attempt == 0 or not isinstance(strategy, DDPStrategy) or strategy._timeout is None or dist.is_initialized():
        return
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    wait = strategy._timeout
    store, rank, world = next(rendezvous("env://", timeout=wait))
    device = {"device_id": strategy.root_device} if strategy.root_device.type == "cuda" else {}
    dist.init_process_group(
        strategy._get_process_group_backend(),
        store=PrefixStore(f"attempt-{attempt}", store),
        rank=rank,
        world_size=world,
        timeout=wait,
        **device,  # type: ignore[arg-type]
    )
    if device:
        # as Lightning does: NCCL warns of a group that is left
        atexit.register(disconnect)


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def let_go_at_exit(trainer: Trainer) -> None:
    """Before the interpreter of one of several processes ends, let threads let go of the last collective's tensors.

    For whatever lets processes exchange something, which may be the last that they do.

    They answer a waiting caller first. One that gives a tensor back to an interpreter that is ending aborts the
    process, which torchrun then reports as failed (torch 2.13, pytorch issue 190489). To destroy the group ends them
    not: torch keeps it.
    """
    if trainer.world_size > 1:
        atexit.unregister(_let_go)
        atexit.register(_let_go)


def _let_go() -> None:
    if dist.is_initialized():
        time.sleep(_LET_GO)


def end_others(trainer: Trainer, error: BaseException) -> None:
    """After an error: end the ranks that this one launched, or the launcher if it is the one that does not answer."""
    launched = getattr(trainer.strategy.launcher, "procs", [])
    if launched:
        _end(launched)
    elif _is_late(error) and os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ:
        # torchrun ends its workers by itself; a launcher that is well has the same time-out and ends within the grace,
        # and this process with it
        launcher = os.getppid()
        time.sleep(GRACE)
        if os.getppid() == launcher != 1:
            os.kill(launcher, signal.SIGKILL)


def _end(launched: list[Any]) -> None:
    limit = time.monotonic() + GRACE
    while time.monotonic() < limit and any(process.poll() is None for process in launched):
        time.sleep(0.05)
    for process in launched:
        if process.poll() is None:
            # no other signal ends a stopped process
            process.kill()
            process.wait()


def _is_late(error: BaseException) -> bool:
    return any(word in str(error).lower() for word in _LATE)
