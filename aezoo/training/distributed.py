"""All processes of a run end together: if one is killed, fails or hangs, the others are ended.

Lightning's launcher ends the other ranks when one has ended. It does not handle ranks whose launcher was killed, and it
waits for ranks that do not respond (stopped, swapped out, in a deadlock). A rank that does not respond causes a timeout
of a collective in the other ranks, which then end it.
"""

import atexit
import contextlib
import os
import re
import secrets
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.xla import XLAStrategy

from aezoo.errors import AezooError

# seconds that a rank has for its error message after another rank has failed
GRACE = 5.0
# seconds for threads to release tensors; a thread needs microseconds once it has a core
_RELEASE_SECONDS = 0.2
# seconds until a file of another machine is visible on a file system that both share
_SHARED_SECONDS = 30.0
# torch.distributed.constants.default_pg_timeout, which a torch without torch.distributed cannot import
_TORCH_DEFAULT_TIMEOUT = timedelta(minutes=30)
# errors of gloo and NCCL when another process ends
_LOST = re.compile(
    "connection (closed|reset|refused)|broken pipe|waiting for clients|remote process exited|pair closure|timed ?out",
    re.IGNORECASE,
)
_LATE = ("timed out", "timeout", "time out")


def limit_wait(trainer: Trainer, seconds: float) -> None:
    """Set how long a collective waits for a rank, unless the strategy was built with a timeout."""
    if getattr(trainer.strategy, "_timeout", None) == _TORCH_DEFAULT_TIMEOUT:
        trainer.strategy._timeout = timedelta(seconds=seconds)  # type: ignore[attr-defined]


def check_strategy(trainer: Trainer) -> None:
    """Reject strategies other than one device and DDP: where a model is sharded, nothing here was tested.

    Raises:
        AezooError: names the strategy, and those to take.
    """
    strategy = trainer.strategy
    replicated = isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy | XLAStrategy)
    if not replicated and not isinstance(strategy, SingleDeviceStrategy):
        raise AezooError(unsupported_strategy(type(strategy).__name__))


def unsupported_strategy(name: str) -> str:
    """The message for a strategy that is not supported."""
    return f"strategy {name} is not supported: use auto or ddp, with which each process has the whole model"


def connect(trainer: Trainer) -> None:
    """Under torchrun, connect the processes under a new name for each attempt; otherwise Lightning connects them.

    torch 2.13 assumes a new store for each attempt (`rendezvous._create_c10d_store`), but torchrun reuses the store. A
    process that reads another's address before it is renewed would get that of a dead process. The number of restarts
    cannot be used as a name: a machine that joins again begins at 0.

    Raises:
        AezooError: the machines do not share the folder of the run.
    """
    strategy = trainer.strategy
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if not by_torchrun or not isinstance(strategy, DDPStrategy) or strategy._timeout is None or dist.is_initialized():
        return
    from torch.distributed.rendezvous import rendezvous

    wait = strategy._timeout
    store, rank, world = next(rendezvous("env://", timeout=wait))
    device = {"device_id": strategy.root_device} if strategy.root_device.type == "cuda" else {}
    dist.init_process_group(
        strategy.process_group_backend or dist.get_default_backend_for_device(strategy.root_device),
        store=dist.PrefixStore(attempt_name(store, rank, world, wait), store),  # type: ignore[attr-defined]  # public, but not in __all__
        rank=rank,
        world_size=world,
        timeout=wait,
        **device,  # type: ignore[arg-type]
    )
    if device:
        # as Lightning does: NCCL warns about a group that is not destroyed
        atexit.register(disconnect)
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        check_shared_folder(Path(trainer.default_root_dir), rank)


def attempt_name(store: Any, rank: int, world: int, wait: timedelta) -> str:
    """A new name on which all ranks of an attempt agree, in a store with entries of earlier attempts.

    Each rank writes a file, and rank 0 answers all files that it finds, also those of dead processes, until all living
    ones have its answer.

    Raises:
        TimeoutError: a rank is missing.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"aezoo-rank-{rank}", own)
        store.wait([f"aezoo-answer-{own}"], wait)
        name = store.get(f"aezoo-answer-{own}").decode()
        store.add(f"aezoo-ready-{name}", 1)
        return name
    limit = time.monotonic() + wait.total_seconds()
    while store.add(f"aezoo-ready-{own}", 0) < world - 1:
        if time.monotonic() > limit:
            raise TimeoutError(f"timed out after {wait.total_seconds():g} s: not all {world} processes have started")
        for other in range(1, world):
            if store.check([f"aezoo-rank-{other}"]):
                store.set(f"aezoo-answer-{store.get(f'aezoo-rank-{other}').decode()}", own)
        time.sleep(0.02)
    return own


def check_shared_folder(folder: Path, rank: int) -> None:
    """Refuse machines that do not share the folder of the run, in which only rank 0 writes checkpoints.

    Args:
        folder: that of rank 0; it may be unknown to others.
        rank: this process.

    Raises:
        AezooError: another rank cannot see a file that rank 0 has written.
    """
    told: list[Any] = [None]
    if not rank:
        file = folder / f".shared-{secrets.token_hex(6)}"
        with contextlib.suppress(OSError):  # reported when the first checkpoint is written
            file.touch()
        told = [str(file) if file.exists() else None]
    dist.broadcast_object_list(told)
    # a network file system may be late by some seconds
    limit = time.monotonic() + _SHARED_SECONDS
    while not (seen := told[0] is None or Path(told[0]).exists()) and time.monotonic() < limit:
        time.sleep(0.1)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, seen)
    if not rank and told[0] is not None:
        Path(told[0]).unlink(missing_ok=True)
    if not all(found):
        raise AezooError(
            f"rank {found.index(False)} does not see {folder if not rank else Path(told[0]).parent}: give a folder "
            "that all machines share with --trainer.default_root_dir"
        )


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def release_collectives_at_exit(trainer: Trainer) -> None:
    """Before the interpreter of one of several processes exits, let threads release the last collective's tensors.

    Call it after every exchange between processes, because it may be the last one.

    The threads answer a waiting caller before they release tensors. A thread that returns a tensor to an exiting
    interpreter aborts the process, which torchrun then reports as failed (torch 2.13, pytorch issue 190489). Destroying
    the group does not end the threads, because torch keeps it.
    """
    if trainer.world_size > 1:
        atexit.unregister(_wait_for_release)
        atexit.register(_wait_for_release)


def _wait_for_release() -> None:
    if dist.is_initialized():
        time.sleep(_RELEASE_SECONDS)


def terminate_other_ranks(trainer: Trainer, error: BaseException) -> str | None:
    """After an error, end the ranks that this one launched, or the launcher if it does not respond.

    Returns:
        The message to show instead of the error, if this only follows from the end of another rank: that rank's error.
    """
    procs = getattr(trainer.strategy.launcher, "procs", [])
    rank, launched = trainer.global_rank, [*procs]
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    is_lost = trainer.world_size > 1 and isinstance(error, RuntimeError) and not isinstance(error, AezooError)
    is_lost = is_lost and bool(_LOST.search(str(error)))
    if launched:
        procs.clear()  # Lightning's observer would kill this process before it reports its error
        _end(launched)
    elif _is_late(error) and os.environ.get("LOCAL_RANK", "0") != "0" and not by_torchrun:
        # torchrun ends its workers by itself; a working launcher has the same timeout and ends within the grace
        # period, together with this process
        launcher = os.getppid()
        time.sleep(GRACE)
        if os.getppid() == launcher != 1:
            os.kill(launcher, signal.SIGKILL)
    elif not (is_lost or by_torchrun) and rank and "LOCAL_RANK" in os.environ and isinstance(error, Exception):
        own = str(error) if isinstance(error, AezooError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # rank 0 would only report that it has lost this one
            _note(trainer, rank, os.getppid()).write_text(
                f"rank {rank}: {' '.join(own.split())[:1000]}", encoding="utf-8", errors="backslashreplace"
            )
    notes = []
    for note in (_note(trainer, other, os.getpid()) for other in range(1, trainer.world_size) if launched):
        with contextlib.suppress(OSError):
            notes.append(note.read_text(encoding="utf-8"))
            note.unlink()
    if not is_lost or notes:
        return notes[0] if is_lost else None
    reason = " ".join(str(error).split())[:200]
    return f"rank {rank} lost the connection to another process, which has ended or does not respond ({reason})"


def _note(trainer: Trainer, rank: int, launcher: int) -> Path:
    """The file in which a rank writes its error for the rank that launched it."""
    return Path(trainer.default_root_dir) / f".rank-{rank}-of-{launcher}.error"


def _end(launched: list[Any]) -> None:
    limit = time.monotonic() + GRACE
    while time.monotonic() < limit and any(process.poll() is None for process in launched):
        time.sleep(0.05)
    for process in launched:
        if process.poll() is None:
            # only SIGKILL ends a stopped process
            process.kill()
            process.wait()


def _is_late(error: BaseException) -> bool:
    return any(word in str(error).lower() for word in _LATE)
