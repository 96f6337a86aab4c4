"""Samples in memory give the batches of the loaders, and trainings the same weights, for any source and device."""

from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from quiet_trainer import quiet_trainer
from test_vision import write_family

import aezoo
from aezoo.cli.lightning_cli import AezooCLI
from aezoo.data import ArrayDataset, DataModule, resident
from aezoo.data import datamodule as datamodule_module
from aezoo.data.idx import FAMILIES
from aezoo.data.loaders import LazyLoader, default_num_workers, local_processes, make_loader
from aezoo.data.resident import ResidentLoader, free_memory
from aezoo.errors import AezooError

N = 23


def arrays(labels=True, dtype=torch.float32):
    x = torch.arange(N * 3).view(N, 3).to(dtype)
    return x, torch.arange(N) % 4 if labels else None


def same_batches(one, other):
    one, other = list(one), list(other)
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_resident_batches_match_dataloader(batch_size, world, shuffle, drop_last, dtype, labels):
    x, y = arrays(labels, dtype)
    seen = []
    for rank in range(world):
        how = {"batch_size": batch_size, "shuffle": shuffle, "seed": 5, "rank": rank, "world": world}
        loader = make_loader(ArrayDataset(x, y), drop_last=drop_last, labels=labels, **how)
        held = ResidentLoader(x, y, drop_last=drop_last, **how)
        assert len(held) == len(loader)
        for epoch in (0, 1, 2):
            for one in (loader, held):
                one.sampler.set_epoch(epoch)
            if len(held):
                same_batches(loader, held)
            else:
                assert not list(held) and not list(loader)
        seen += [int(row) // 3 for batch in held for row in batch[0][:, 0]]
        assert len(list(held)) == len(held)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("drop_last", [False, True])
def test_fully_skipped_epoch_has_no_batches(drop_last):
    x = torch.rand(10, 3)
    settings = {"batch_size": 4, "shuffle": True, "drop_last": drop_last}
    for loader in (ResidentLoader(x, **settings), make_loader(ArrayDataset(x), **settings)):
        loader.sampler.skip = (0, 12)  # a run that was saved after its last batch
        assert list(loader) == []
        assert len(list(loader)) == len(loader)


def test_a_batch_is_a_copy():
    x, _ = arrays(False)
    (batch,) = next(iter(ResidentLoader(x, batch_size=4)))
    batch.zero_()
    assert torch.equal(x, arrays(False)[0])


def test_epoch_set_after_iter_counts():
    held = ResidentLoader(arrays(False)[0], batch_size=4, shuffle=True)
    iterator = iter(held)
    held.sampler.set_epoch(3)
    other = ResidentLoader(arrays(False)[0], batch_size=4, shuffle=True)
    other.sampler.set_epoch(3)
    same_batches(iterator, other)


# ---- every kind of source --------------------------------------------------------------------------------------------


def folder_of_images(folder):
    rng = np.random.default_rng(1)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / label / f"{i}.png")
    return folder


@pytest.fixture
def source(request, tmp_path):
    """Arguments of a DataModule for a small set of that kind."""
    if request.param == "fashion_mnist":
        write_family("fashion_mnist", tmp_path / FAMILIES["fashion_mnist"].title / "raw", train=300)
        return {"name": "fashion_mnist", "root": str(tmp_path), "download": False}
    if request.param == "folder":
        return {"name": "folder", "root": str(folder_of_images(tmp_path / "images"))}
    if request.param == "array":
        np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).random((90, 6)), y=np.arange(90) % 3)
        return {"name": "array", "root": str(tmp_path / "a.npz")}
    return {"name": request.param}


@pytest.mark.parametrize("source", ["array", "digits", "mnist5k", "fashion_mnist", "folder"], indirect=True)
def test_resident_and_lazy_batches_match_for_every_source(source):
    loaders = {}
    for memory in ("on", "off"):
        data = DataModule(
            **source,
            memory=memory,
            batch_size=37 if source["name"] in ("digits", "mnist5k") else 7,
            seed=2,
            num_workers=0,
        )
        loaders[memory] = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    assert all(isinstance(one, ResidentLoader) for one in loaders["on"])
    assert all(isinstance(one, LazyLoader) for one in loaders["off"])
    for held, lazy in zip(loaders["on"], loaders["off"], strict=True):
        for epoch in (0, 1):
            for one in (held, lazy):
                one.sampler.set_epoch(epoch)
            same_batches(held, lazy)


@pytest.mark.parametrize("source", ["mnist5k", "fashion_mnist", "folder"], indirect=True)
def test_resident_bytes_keep_uint8(source):
    data = DataModule(**source, memory="on", batch_size=7)
    held = data.train_dataloader()
    assert held.x.dtype == torch.uint8
    batch = next(iter(held))
    assert batch[0].dtype == torch.uint8
    floats = data.on_after_batch_transfer(batch, 0)[0]
    assert floats.dtype == torch.float32 and torch.equal(floats, batch[0].float() / 255)


def fit(memory, source, folder=None, ckpt_path=None, **plain):
    torch.manual_seed(0)
    data = DataModule(**source, memory=memory, batch_size=16, seed=1, num_workers=0)
    model = aezoo.create_model("vae", data.input_shape, latent_dim=2, hidden_dims=(8,))
    settings = {"max_epochs": 2, "limit_train_batches": 5, "limit_val_batches": 2} | plain
    trainer = quiet_trainer(**settings, callbacks=[SaveAt(7, folder)] if folder else [])
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model.state_dict(), {key: float(value) for key, value in trainer.callback_metrics.items()}


class SaveAt(pl.Callback):
    """Saves in the middle of an epoch."""

    def __init__(self, step, folder):
        self.step, self.folder = step, folder

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.folder / "a.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["array", "mnist5k", "folder"], indirect=True)
def test_training_gives_the_same_weights_and_figures(source):
    held, lazy = fit("on", source), fit("off", source)
    assert held[1] == lazy[1] and "val/loss" in held[1]
    assert all(torch.equal(value, lazy[0][key]) for key, value in held[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("later", ["on", "off"])
@pytest.mark.parametrize("source", ["mnist5k"], indirect=True)
def test_mid_epoch_resume_may_change_data_path(source, later, tmp_path):
    whole = fit("on", source, tmp_path)
    part = fit(later, source, ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(value, part[0][key]) for key, value in whole[0].items())


@pytest.mark.slow
def test_resident_and_lazy_match_for_two_processes(tmp_path):
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(batch[0].flatten(1).sum(1))

        def on_train_end(self, trainer, pl_module):
            torch.save(torch.cat(seen), tmp_path / f"{memory}{trainer.global_rank}.pt")

    for memory in ("on", "off"):
        seen = []
        data = DataModule("digits", memory=memory, batch_size=90, num_workers=0)
        model = aezoo.create_model("dense_ae", (1, 8, 8), latent_dim=2, hidden_dims=(8,))
        two_ranks(callbacks=[Look()]).fit(model, data)
    parts = {file.stem: torch.load(file, weights_only=True) for file in tmp_path.glob("*.pt")}
    assert torch.equal(parts["on0"], parts["off0"]) and torch.equal(parts["on1"], parts["off1"])
    assert len(parts["on0"]) == len(parts["on1"]) == 1437 // 2
    assert not torch.equal(parts["on0"], parts["on1"])


# ---- choice and log line ---------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    return {"name": "folder", "root": str(folder_of_images(tmp_path / "images"))}


@pytest.fixture
def free(monkeypatch):
    """Sets the free memory that is reported."""
    return lambda size: monkeypatch.setattr(resident, "free_memory", lambda device: size)


def line(caplog, data):
    caplog.clear()
    caplog.set_level("INFO")
    data.train_dataloader()
    (text,) = [record.getMessage() for record in caplog.records if "samples" in record.getMessage()]
    assert "\n" not in text
    return text


def test_auto_memory_limit_is_quarter_of_free_memory(images, free, caplog, monkeypatch):
    size = 20 * 3 * 8 * 8  # the training split
    # torch warns if there are more workers than cores
    monkeypatch.setattr(datamodule_module, "default_num_workers", lambda processes: 1)
    free(4 * size)
    assert isinstance(DataModule(**images).train_dataloader(), ResidentLoader)
    assert line(caplog, DataModule(**images)) == "folder: samples held in memory (0.0 MiB, uint8)"
    free(4 * size - 1)
    loader = DataModule(**images).train_dataloader()
    assert isinstance(loader, LazyLoader)
    assert (loader.num_workers, loader.persistent_workers, loader.pin_memory) == (1, True, False)
    text = "folder: samples read by 1 persistent worker(s): 0.0 MiB, more than a quarter of 0.0 MiB free"
    assert line(caplog, DataModule(**images)) == text
    # two processes of one machine hold it twice
    free(8 * size - 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert isinstance(DataModule(**images).train_dataloader(), LazyLoader)
    assert isinstance(DataModule(**images, memory="on").train_dataloader(), ResidentLoader)
    free(8 * size)
    assert isinstance(DataModule(**images).train_dataloader(), ResidentLoader)


def test_log_line_explains_why_data_are_not_held(tmp_path, free, caplog, monkeypatch):
    for i in range(10):
        Image.new("RGB", (256, 512), (i, 0, 0)).save(tmp_path / f"{i}.png")
    data = {"name": "folder", "root": str(tmp_path), "num_workers": 0}
    free(11.5 * 2**20)
    why = "3.0 MiB, more than a quarter of 11.5 MiB free"  # 8 images of 384 KiB
    assert line(caplog, DataModule(**data)) == f"folder: samples read by the training process: {why}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert line(caplog, DataModule(**data)).endswith(f"process: 2 times {why}")
    # the user's choice needs no reason
    assert line(caplog, DataModule(**data, memory="off")) == "folder: samples read by the training process"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    seen = DataModule(**data)
    line(caplog, seen)
    free(12 * 2**20)
    assert line(caplog, seen) == "folder: samples held in memory (3.0 MiB, uint8)"


def test_log_line_explains_why_data_are_not_on_gpu(free, caplog, monkeypatch):
    data, gpu = DataModule("mnist5k"), torch.device("cuda", 0)
    free(2**20)
    assert isinstance(data._stored_split("train", gpu), ArrayDataset)
    monkeypatch.setattr(data, "_stored_split", lambda stage, device, **rest: data.dataset(stage))
    text = "mnist5k: samples held in memory (3.0 MiB, uint8): 3.0 MiB, more than a quarter of 1.0 MiB free on cuda:0"
    assert line(caplog, data) == text


def test_in_memory_sources_are_always_held(free, caplog):
    free(1)
    held = DataModule("mnist5k").train_dataloader()
    assert isinstance(held, ResidentLoader)
    x = torch.rand(50, 4)
    data = DataModule.from_arrays(x, x_val=x[:5], x_test=x[:5], val_fraction=0, test_fraction=0)
    assert data.train_dataloader().x.data_ptr() == x.data_ptr()  # not copied
    assert "quarter" not in line(caplog, data)


def test_memory_on_and_off_are_respected(images, free, caplog):
    free(0)
    assert isinstance(DataModule(**images, memory="on").train_dataloader(), ResidentLoader)
    free(2**60)
    off = DataModule(**images, memory="off", num_workers=0)
    assert isinstance(off.train_dataloader(), LazyLoader)
    assert line(caplog, off) == "folder: samples read by the training process"
    with pytest.raises(AezooError, match=r"--data\.memory is 'foo'"):
        DataModule(memory="foo")


def test_log_line_shows_data_size(caplog):
    assert line(caplog, DataModule("mnist5k")) == "mnist5k: samples held in memory (3.0 MiB, uint8)"
    assert line(caplog, DataModule("digits")) == "digits: samples held in memory (0.4 MiB, float32)"


def test_decoding_many_samples_reports_memory(caplog, images, monkeypatch):
    caplog.set_level("INFO")
    dataset = [(torch.zeros(3, 64, 64, dtype=torch.uint8), i) for i in range(2001)]
    held = resident.load_into_memory(dataset, "folder")
    assert held.x.shape == (2001, 3, 64, 64) and held.y.tolist() == list(range(2001))
    (record,) = caplog.records
    assert record.getMessage() == (
        "folder: decoding 2001 samples once, into 23 MiB of memory; --data.memory off reads them as they are used"
    )


@pytest.mark.parametrize("how", ["little is free", "torch gets none"])
def test_insufficient_memory_is_refused_in_one_line(images, monkeypatch, free, how):
    def full(*shape, **plain):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")

    if how == "little is free":
        free(24 * 3 * 8 * 8 - 1)
    else:
        monkeypatch.setattr(resident.torch, "empty", full)
        # image folders are decoded elsewhere, sets of torchvision here
        with pytest.raises(AezooError, match="x: 4 samples take 0 MiB of memory, which is more than is free") as caught:
            resident.load_into_memory([(torch.zeros(3),)] * 4, "x")
        assert "\n" not in str(caught.value)
        return
    with pytest.raises(
        AezooError, match="folder: 24 samples take 0 MiB of memory, which is more than is free"
    ) as caught:
        DataModule(**images, memory="on").train_dataloader()
    assert "--data.memory off" in str(caught.value) and "\n" not in str(caught.value)


def test_insufficient_gpu_memory_is_refused_in_one_line():
    class Full:
        nbytes = 2**31

        def __len__(self):
            return 7

        def to(self, device):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    with pytest.raises(AezooError, match="x: 7 samples take 2,048 MiB of memory on cuda:0, which") as caught:
        resident.to_device(ArrayDataset(Full()), torch.device("cuda", 0), "x")
    assert "\n" not in str(caught.value)
    held = resident.to_device(ArrayDataset(*arrays()), torch.device("cpu"), "x")
    assert torch.equal(held.x, arrays()[0]) and torch.equal(held.y, arrays()[1])


def test_broken_sample_is_reported_while_decoding(images):
    class Broken:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            if i == 2:
                raise AezooError("image 2 is broken")
            return (torch.zeros(2),)

    with pytest.raises(AezooError, match="image 2 is broken"):
        resident.load_into_memory(Broken(), "folder")
    with pytest.raises(AezooError, match="empty"):
        resident.load_into_memory([], "folder")


def test_workers_leave_a_core_to_training(monkeypatch):
    for cores, processes, wanted in ((1, 1, 1), (2, 1, 1), (8, 1, 7), (64, 1, 8), (8, 4, 1), (8, 2, 3)):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, n=cores: set(range(n)))
        assert default_num_workers(processes) == wanted


def two_ranks(**plain):
    unasked = {"use_distributed_sampler": False, "num_sanity_val_steps": 0}
    return quiet_trainer(devices=2, strategy="ddp_fork", max_epochs=1, **unasked, **plain)


@pytest.mark.parametrize("count", ["whole set", "training split"])
def test_lightning_processes_share_memory_and_cores(images, free, monkeypatch, count):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    size = (24 if count == "whole set" else 20) * 3 * 8 * 8
    loaders, decoded = {}, {}
    for room in (8 * size, 8 * size - 1):  # a quarter of it fits the samples twice, or just not
        free(room)
        data = DataModule(**images)
        data.trainer = two_ranks()
        decoded[room] = isinstance(data.dataset("train"), ArrayDataset)
        loaders[room] = data.train_dataloader()
    assert decoded == {8 * size: count == "whole set", 8 * size - 1: False}
    if count == "training split":
        assert isinstance(loaders[8 * size], ResidentLoader)
        assert isinstance(loaders[8 * size - 1], LazyLoader)
        assert loaders[8 * size - 1].num_workers == 3


@pytest.mark.slow
def test_two_process_fit_divides_free_memory(images, free, monkeypatch, tmp_path):
    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            kind = type(trainer.train_dataloader).__name__
            (tmp_path / f"{room}-{trainer.global_rank}").write_text(kind)

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    size = 24 * 3 * 8 * 8
    for room in (4 * size, 8 * size):
        free(room)
        data = DataModule(**images, batch_size=5, num_workers=0)
        two_ranks(callbacks=[Look()]).fit(aezoo.create_model("linear_ae", (3, 8, 8), latent_dim=2), data)
    found = {file.name: file.read_text() for file in tmp_path.glob("*-[01]")}
    assert found == {
        f"{room}-{rank}": kind
        for room, kind in ((4 * size, "LazyLoader"), (8 * size, "ResidentLoader"))
        for rank in (0, 1)
    }


def test_memory_check_before_fit_counts_processes(images, free, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    size = 24 * 3 * 8 * 8
    for room in (4 * size, 8 * size):  # enough for one process, and for two
        free(room)
        data = DataModule(**images)
        command = SimpleNamespace(
            trainer=two_ranks(), datamodule=data, model=aezoo.create_model("linear_ae", (3, 8, 8), latent_dim=2),
            _setting=lambda key: SimpleNamespace(), _test_follows=lambda: False, budget=None, chosen={},
        )  # fmt: skip
        AezooCLI.before_fit(command)
        assert isinstance(data.dataset("train"), ArrayDataset) is (room == 8 * size)


def test_local_process_count_follows_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = pl.Trainer(accelerator="cpu", devices=1, logger=False)
    assert (local_processes(), local_processes(alone), local_processes(two_ranks())) == (1, 1, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (local_processes(), local_processes(alone), local_processes(two_ranks())) == (4, 4, 4)


def test_free_memory_respects_container_limit(monkeypatch, tmp_path):
    free = free_memory(torch.device("cpu"))
    assert 2**24 < free < 2**50
    real = resident.Path.read_text
    texts = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n",
        "/sys/fs/cgroup/memory.max": "5000000\n",
        "/sys/fs/cgroup/memory.current": "1000000\n",
    }

    def read_text(self, *args):
        if str(self) in texts:
            return texts[str(self)]
        if str(self).startswith("/sys/fs/cgroup"):
            raise FileNotFoundError
        return real(self, *args)

    monkeypatch.setattr(resident.Path, "read_text", read_text)
    assert free_memory(torch.device("cpu")) == 4_000_000
    # cached files count as used memory of a container, but can be reclaimed
    texts["/sys/fs/cgroup/memory.stat"] = "anon 9\nfile 900000\ninactive_file 300000\nactive_file 200000\n"
    assert free_memory(torch.device("cpu")) == 4_500_000
    texts["/sys/fs/cgroup/memory.stat"] = "odd\n"
    assert free_memory(torch.device("cpu")) == 4_000_000
    texts["/sys/fs/cgroup/memory.max"] = "max\n"
    assert free_memory(torch.device("cpu")) == 8000 * 1024
    texts["/proc/meminfo"] = "nothing\n"
    assert free_memory(torch.device("cpu")) > 2**24
