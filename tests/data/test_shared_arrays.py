"""Processes on a machine share samples in memory, and train as if each had its own."""

import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from quiet_trainer import quiet_trainer

from aezoo import create_model
from aezoo.data import DataModule, datamodule, shared_arrays

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="a process cannot tell what it shares")
SIZE = 2**26


@pytest.fixture
def alone():
    """The first of two processes on a machine, in a separate group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(node_rank=0, local_rank=0, num_devices=2)
    dist.destroy_process_group()


def proportional_bytes(name):
    """This process's proportional share (PSS) of mappings with a name."""
    found = 0
    for part in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if name in part.partition("\n")[0]:
            found += 1024 * int(re.search(r"Pss: +(\d+) kB", part)[1])
    return found


def private_bytes():
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_values_and_references_of_a_tensor_are_unchanged(alone):
    x, y = torch.rand(50, 3), torch.arange(50)
    x[3, 1] = float("nan")
    held, wanted = [x], x.clone()
    place = x.data_ptr()
    shared_arrays.share({"x": x, "y": y, "none": torch.empty(0)}, alone)
    assert held[0] is x and x.data_ptr() != place and x.data_ptr() % 64 == y.data_ptr() % 64 == 0
    assert torch.equal(x.nan_to_num(7), wanted.nan_to_num(7)) and torch.equal(y, torch.arange(50))
    assert proportional_bytes("memfd:aezoo-samples") > 0


@pytest.mark.parametrize("cause", ["absent", "refused", "small"])
def test_memory_that_cannot_be_shared_is_noted(alone, monkeypatch, cause):
    notes = []
    monkeypatch.setattr(shared_arrays, "rank_zero_info", notes.append)
    if cause == "absent":
        monkeypatch.delattr(os, "memfd_create")
    elif cause == "refused":
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
    else:
        monkeypatch.setattr(shared_arrays, "free_memory", lambda device: 100)
    x = torch.rand(50, 3)
    place, wanted, files = x.data_ptr(), x.clone(), len([*Path("/proc/self/fd").iterdir()])
    shared_arrays.share({"x": x}, alone)
    assert x.data_ptr() == place and torch.equal(x, wanted) and len([*Path("/proc/self/fd").iterdir()]) == files
    (note,) = notes
    assert note.startswith("each process has its own copy of the samples, because memory cannot be shared here: ")
    assert "\n" not in note


def share_in_group(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, own = torch.arange(SIZE // 4, dtype=torch.float32), torch.full((9,), float(rank))
    before = private_bytes()
    shared_arrays.share({"x": x, "own": own}, SimpleNamespace(node_rank=0, local_rank=rank, num_devices=2))
    assert x[::9].tolist() == [*range(0, SIZE // 4, 9)] and own.tolist() == [rank] * 9
    dist.barrier()
    found = {"shared": proportional_bytes("memfd:aezoo-samples"), "freed": before - private_bytes()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()  # otherwise one may end first, and the other holds all


@pytest.mark.slow
def test_two_processes_store_samples_once(tmp_path):
    torch.multiprocessing.start_processes(share_in_group, (str(tmp_path),), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert sum(one["shared"] for one in found) == pytest.approx(SIZE, rel=0.02)
    for one in found:
        assert one["shared"] == pytest.approx(SIZE / 2, rel=0.02)
    assert min(one["freed"] for one in found) > 0.9 * SIZE


class Trace(Callback):
    """Records the batches of a process, and whether they were in shared memory."""

    def __init__(self, path):
        self.path, self.found = path, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append(batch[0].sum().item())

    def on_train_end(self, trainer, pl_module):
        shared = "memfd:aezoo-samples" in Path("/proc/self/maps").read_text()
        weights = [weight.detach() for weight in pl_module.parameters()]
        torch.save([shared, self.found, weights], f"{self.path}-{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(many workers|LeafSpec|sync_dist)")
def test_training_is_the_same_with_shared_samples(tmp_path, monkeypatch):
    for name in ("shared", "own"):
        if name == "own":
            monkeypatch.setattr(datamodule, "share", lambda *_: None)
        torch.manual_seed(0)
        model = create_model("dense_ae", (1, 8, 8), hidden_dims=(8,), latent_dim=2)
        trainer = quiet_trainer(
            devices=2, strategy="ddp_fork", max_epochs=2, use_distributed_sampler=False,
            callbacks=[Trace(tmp_path / name)],
        )  # fmt: skip
        trainer.fit(model, DataModule("digits"))
    for rank in (0, 1):
        (shared, *with_it), (own, *without) = (
            torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for name in ("shared", "own")
        )
        assert shared and not own and len(with_it[0]) > 5 and with_it[0] == without[0]
        assert all(torch.equal(a, b) for a, b in zip(with_it[1], without[1], strict=True))
