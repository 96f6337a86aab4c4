"""Orders, shards and batches, computed explicitly and with a Trainer."""

import contextlib
import os
import signal

import lightning.pytorch as pl
import pytest
import torch
from quiet_trainer import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from aezoo.cli.run_errors import _lightning_error_line
from aezoo.data import ArrayDataset, DataModule
from aezoo.data.classes import keep_labels, subset
from aezoo.data.loaders import (
    DecodingDataset,
    EpochSampler,
    even_batch_size,
    make_loader,
    reads_whole_batches,
    worker_failure,
)
from aezoo.data.resident import load_into_memory


class Recorder(pl.LightningModule):
    """Trains one parameter and records its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.seen: dict[str, list[Tensor]] = {"train": [], "val": [], "test": [], "predict": []}
        self.batch: object = None

    def _keep(self, stage, batch):
        self.batch = batch
        self.seen[stage].append(batch[0].flatten(1)[:, 0].float().clone())
        return self.net(batch[0].flatten(1)[:, :1]).square().mean()

    def training_step(self, batch, batch_idx):
        return self._keep("train", batch)

    def validation_step(self, batch, batch_idx):
        self._keep("val", batch)

    def test_step(self, batch, batch_idx):
        self._keep("test", batch)

    def predict_step(self, batch, batch_idx):
        return self._keep("predict", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def trainer(**plain):
    return quiet_trainer(**{"max_epochs": 2, **plain})


def numbers(n=40):
    return torch.arange(n, dtype=torch.float32)[:, None].expand(n, 3) / n


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpochSampler(50, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(50))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}) == 9


def test_order_does_not_touch_the_global_generator():
    dataset = ArrayDataset(numbers())
    state = torch.get_rng_state()
    list(make_loader(dataset, batch_size=8, shuffle=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [8, 9, 15, 16, 63])
def test_training_shards_are_the_strided_order(n, world):
    whole = list(EpochSampler(n, shuffle=True, seed=3))
    shards = [list(EpochSampler(n, shuffle=True, seed=3, rank=rank, world=world)) for rank in range(world)]
    assert shards == [whole[rank::world][: n // world] for rank in range(world)]
    assert len({row for shard in shards for row in shard}) == n // world * world


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 4, 8, 9, 15, 16, 17, 63])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 8, 100])
def test_evaluation_reads_each_row_once_over_ranks(n, world, batch_size):
    dataset = ArrayDataset(torch.arange(n)[:, None])
    ranks = [list(make_loader(dataset, batch_size=batch_size, rank=rank, world=world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = sorted(int(row) for batches in ranks for (x,) in batches for row in x)
    assert rows == sorted([*range(n)] * (world if n < world else 1))


def test_even_batch_size_keeps_size_for_single_process():
    assert even_batch_size(9, 1, 3) == 3
    assert even_batch_size(9, 2, 4) == 3
    assert even_batch_size(9, 2, 8) == 8


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epoch_set_after_iter_counts(num_workers):
    loader = make_loader(ArrayDataset(numbers()), batch_size=8, shuffle=True, num_workers=num_workers)
    iterator = iter(loader)
    loader.sampler.set_epoch(5)
    wanted = EpochSampler(40, shuffle=True)
    wanted.set_epoch(5)
    rows = (torch.cat([x for (x,) in iterator])[:, 0] * 40).round().long().tolist()
    assert rows == list(wanted)


class Deadly(DecodingDataset):
    """Ends the process that reads it."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)


def test_dead_data_worker_is_reported_in_one_line():
    with pytest.raises(RuntimeError) as caught:
        list(make_loader(Deadly(), batch_size=2, num_workers=1))
    for error, cause in (
        (caught.value, "is killed by signal: Killed,"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is"), "by signal: Bus error,"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "exited unexpectedly,"),
    ):
        for line in (worker_failure(error), _lightning_error_line(error)):
            assert line.startswith("a data worker ") and cause in line
            assert "--data.num_workers 0" in line and "--shm-size" in line and "\n" not in line
    assert worker_failure(RuntimeError("mat1 and mat2")) is None


def test_full_shared_memory_raises_error(monkeypatch):
    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(RuntimeError) as caught:
        list(make_loader(ArrayDataset(numbers()), batch_size=8, num_workers=1))
    assert "a data worker has failed, usually because memory" in worker_failure(caught.value)
    assert len(list(make_loader(ArrayDataset(numbers()), batch_size=8))) == 5


@pytest.mark.slow
def test_training_batches_do_not_depend_on_workers():
    runs = []
    for num_workers in (0, 2):
        data = DataModule.from_arrays(numbers(), batch_size=7, num_workers=num_workers, seed=1)
        model = Recorder()
        trainer(max_epochs=3).fit(model, data)
        runs.append(torch.cat(model.seen["train"]))
    assert torch.equal(*runs)
    epochs = runs[0].split(32)
    assert len(epochs) == 3
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)


def test_datamodule_serves_every_trainer_stage():
    data, model = DataModule("digits", batch_size=100), Recorder()
    run = trainer(max_epochs=1, num_sanity_val_steps=0)
    run.fit(model, data)
    run.test(model, data, verbose=False)
    predicted = run.predict(model, data)
    assert {stage: sum(map(len, seen)) for stage, seen in model.seen.items()} == {
        "train": 1437, "val": 180, "test": 180, "predict": 180,
    }  # fmt: skip
    assert len(predicted) == 2
    assert torch.equal(torch.cat(model.seen["test"]), data.tensors("test")[0].flatten(1)[:, 0])


@pytest.mark.parametrize("memory", ["on", "off"])
@pytest.mark.parametrize("binarise", ["none", "dynamic"])
def test_overfit_batches_are_equal_in_every_epoch(memory, binarise, recwarn):
    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append([part.clone() for part in batch])

    seen = []
    data = DataModule("digits", batch_size=10, memory=memory, binarise=binarise, num_workers=0)
    trainer(overfit_batches=2, max_epochs=3, callbacks=[Keep()]).fit(Recorder(), data)
    x, y = DataModule("digits").tensors("train", range(20))
    assert len(seen) == 6
    for i, (images, labels) in enumerate(seen):
        rows = slice(10 * (i % 2), 10 * (i % 2) + 10)
        assert torch.equal(labels, y[rows])
        if binarise == "none":
            assert torch.equal(images, x[rows])
        else:  # drawn again, with the same probabilities
            assert images.unique().tolist() == [0, 1]
            assert not images[x[rows] == 0].any() and images[x[rows] == 1].all()
    assert not [str(one.message) for one in recwarn if "shuffling" in str(one.message)]


def test_disabled_validation_uses_all_samples_for_training():
    data, model = DataModule.from_arrays(numbers(), val_fraction=0, test_fraction=0), Recorder()
    trainer(max_epochs=1).fit(model, data)
    assert not model.seen["val"]
    assert sum(map(len, model.seen["train"])) == 40


@pytest.mark.parametrize("fails", [False, True])
def test_validation_limit_is_restored_after_fit_without_val(fails):
    class Fail(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            limits.append(trainer.limit_val_batches)
            if fails:
                raise RuntimeError("stop")

    limits, plain = [], {"test_fraction": 0, "batch_size": 40}
    run = trainer(max_epochs=1, limit_val_batches=3, callbacks=[Fail()])
    with pytest.raises(RuntimeError, match="stop") if fails else contextlib.nullcontext():
        run.fit(Recorder(), DataModule.from_arrays(numbers(), val_fraction=0, **plain))
    assert limits == [0] and run.limit_val_batches == 3
    if not fails:
        model, run.fit_loop.max_epochs = Recorder(), 2
        run.fit(model, DataModule.from_arrays(numbers(), **plain))
        assert model.seen["val"] and limits == [0, 3]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)]
)
def test_bytes_are_converted_to_run_precision(precision, dtype):
    data, model = DataModule(batch_size=50), Recorder()
    trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1, precision=precision).fit(model, data)
    x, y = model.batch
    assert x.dtype == dtype
    assert (x.min(), x.max()) == (0, 1)
    assert y.dtype == torch.int64


class Counting(DecodingDataset):
    """Six samples; records the indices of each batch and of each single sample requested."""

    def __init__(self, labelled):
        self.has_labels, self.batches, self.samples = labelled, [], []
        self.labels = torch.arange(6) % 2 if labelled else None

    def __len__(self):
        return 6

    def __getitem__(self, i):
        self.samples.append(i)
        x = torch.full((2,), i, dtype=torch.uint8)
        return (x, i % 2) if self.has_labels else (x,)

    def __getitems__(self, indices):
        self.batches.append(list(indices))
        return super().__getitems__(indices)


@pytest.mark.parametrize("labelled", [True, False])
def test_loader_requests_whole_batches_from_files(labelled):
    dataset = Counting(labelled)
    first, last = make_loader(dataset, batch_size=4)
    assert dataset.batches == [[0, 1, 2, 3], [4, 5]]
    assert dataset.samples == [*range(6)]
    assert torch.equal(first[0], torch.arange(4, dtype=torch.uint8)[:, None].expand(4, 2))
    assert [len(first), len(last)] == [1 + labelled] * 2
    if labelled:
        assert torch.equal(last[1], torch.tensor([0, 1]))
        assert last[1].dtype == torch.int64
        ((x,),) = make_loader(dataset, batch_size=6, labels=False)
        assert len(x) == 6


def test_files_decode_in_parallel_unless_gathered():
    dataset = Counting(True)
    parts = [dataset, subset(dataset, torch.arange(5)), keep_labels(subset(dataset, torch.arange(5)), 2, 0, None, "x")]
    for part in parts:
        assert not reads_whole_batches(part)
        dataset.batches.clear()
        held = load_into_memory(part, "x")
        assert held.x[:, 0].tolist() == [*range(len(part))]
        assert torch.equal(held.y, part.labels)
        assert not dataset.batches
    array = ArrayDataset(torch.rand(6, 2))
    assert reads_whole_batches(array) and reads_whole_batches(torch.utils.data.Subset(array, [0, 1]))
    assert not reads_whole_batches([(torch.zeros(2),)])


@pytest.mark.slow
def test_two_processes_share_the_data(tmp_path):
    class Saver(Recorder):
        def on_train_end(self):
            torch.save({k: torch.cat(v) for k, v in self.seen.items() if v}, tmp_path / f"{self.global_rank}.pt")

    data = DataModule.from_arrays(numbers(50), batch_size=4, val_fraction=0.18, test_fraction=0, seed=2)
    trainer(max_epochs=1, devices=2, strategy="ddp_fork", num_sanity_val_steps=0).fit(Saver(), data)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    order = data.tensors("train")[0][list(EpochSampler(41, shuffle=True, seed=2)), 0]
    assert torch.equal(parts[0]["train"], order[0::2][:20])
    assert torch.equal(parts[1]["train"], order[1::2])
    val = torch.cat([part["val"] for part in parts])
    assert torch.equal(val.sort().values, data.tensors("val")[0][:, 0])
