"""The fast prediction loop does the same as Lightning's: calls, predictions and counters are equal for each batch."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

import aezoo
from aezoo.data import DataModule
from aezoo.speed import predict_loop

DenseAE = aezoo.model_class("dense_ae")
HOOKS = [name for name in vars(pl.Callback) if "predict" in name]


class WithHooks(DenseAE):
    """Records hooks of the module around each batch, and transfers."""

    def on_predict_batch_start(self, batch, batch_idx):
        self.seen = getattr(self, "seen", [])
        self.seen.append(("start", batch_idx, len(batch[0])))

    def on_predict_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(("end", batch_idx, float(outputs["score"].sum()) if outputs else None))


class MovesItself(WithHooks):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.seen = getattr(self, "seen", [])
        self.seen.append(("before", dataloader_idx))
        return batch

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.seen.append(("move", str(device)))
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.seen.append(("after", dataloader_idx))
        return [batch[0] * 0.5, *batch[1:]]


class SometimesNone(WithHooks):
    def predict_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().predict_step(batch, batch_idx)


class WithoutIndex(DenseAE):
    def predict_step(self, batch):
        return super().predict_step(batch, 0)


class TakesAnIterator(DenseAE):
    def predict_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        x = batch[0].float() / 255 if batch[0].dtype == torch.uint8 else batch[0]
        return super().predict_step([x, *batch[1:]], batch_idx)


class OfSeveral(DenseAE):
    def predict_step(self, batch, batch_idx, dataloader_idx):
        return super().predict_step(batch, batch_idx) | {"of": torch.tensor(dataloader_idx)}


class Writer(BasePredictionWriter):
    def __init__(self):
        super().__init__("batch")

    def write_on_batch_end(self, *args):
        pass


def digits(**plain):
    return DataModule("digits", batch_size=64, **plain)


def loader():
    x = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(torch.utils.data.TensorDataset(x), batch_size=16)


CASES = {
    "in place": (True, {}),
    "by a loader": (True, {"data": lambda: digits(memory="off", num_workers=0)}),
    "bytes": (True, {"data": lambda: DataModule("mnist5k", batch_size=250), "shape": (1, 28, 28)}),
    "plain loader": (True, {"data": loader}),
    "own hooks": (True, {"model": WithHooks}),
    "own transfer": (True, {"model": MovesItself}),
    "own transfer by a loader": (True, {"model": MovesItself, "data": loader}),
    "a step of nothing": (True, {"model": SometimesNone}),
    "nothing is returned": (True, {"returned": False}),
    "some batches": (True, {"limit_predict_batches": 2}),
    "bfloat16": (True, {"precision": "bf16-mixed"}),
    "two loaders": (False, {"model": OfSeveral, "data": lambda: [loader(), loader()]}),
    "without index": (False, {"model": WithoutIndex}),
    "the loader's iterator": (False, {"model": TakesAnIterator}),
    "a writer": (False, {"callbacks": [Writer]}),
    "a profiler": (False, {"profiler": "simple"}),
    "all of the weights in bfloat16": (False, {"precision": "bf16-true"}),
}


def recorder(trace):
    """A callback that records the name, the counters and the arguments of each call."""

    def note(name):
        def hook(self, trainer, module, *args):
            # batches are lists, outputs dicts of tensors
            told = [sum(float(v.double().sum()) for v in (a.values() if isinstance(a, dict) else a))
                    if isinstance(a, dict | list | tuple) else a for a in args]  # fmt: skip
            progress = trainer.predict_loop.batch_progress.state_dict()
            trace.append((name, told, progress, getattr(trainer.predict_loop.batch_progress, "is_last_batch", None)))

        return hook

    return type("Recorder", (pl.Callback,), {name: note(name) for name in HOOKS})()


def predict(model=DenseAE, data=digits, callbacks=(), returned=True, shape=(1, 8, 8), **plain):
    """The calls, the predictions, the counters, and whether the fast loop was used."""
    torch.manual_seed(0)
    module, trace, given = model(shape, hidden_dims=(16,), latent_dim=4), [], data()
    light: list[bool] = []
    kept: list[list[int]] = []

    class Look(pl.Callback):
        def on_predict_batch_end(self, trainer, *args):
            light.append(bool(getattr(trainer.predict_loop, "hooks", {})))
            kept.append([len(of) for of in trainer.predict_loop._predictions])

    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        callbacks=[recorder(trace), Look(), *(made() for made in callbacks)], **plain,
    )  # fmt: skip
    found = trainer.predict(module, given, return_predictions=returned)
    assert len(set(light)) == 1
    state, seen = trainer.predict_loop.state_dict(), getattr(module, "seen", None)
    return {"trace": trace, "found": found, "state": state, "kept": kept, "seen": seen}, light[0]


@pytest.mark.filterwarnings(
    "ignore:predict returned None|.*many workers|.*dataloader_iter|.*infer the batch|You have overridden"
)
@pytest.mark.parametrize("case", CASES)
def test_predict_loop_matches_lightning_calls_and_outputs(monkeypatch, case):
    wanted_light, settings = CASES[case]
    found, light = predict(**settings)
    assert light is wanted_light
    monkeypatch.setattr(predict_loop, "install_predict_loop", lambda trainer: False)
    wanted, light = predict(**settings)
    assert not light
    assert found["trace"] == wanted["trace"]
    assert len(found["trace"]) > 6
    torch.testing.assert_close(found["found"], wanted["found"], rtol=0, atol=0)
    for name in ("state", "kept", "seen"):
        assert found[name] == wanted[name]


@pytest.mark.filterwarnings("ignore:.*infer the batch")
def test_callbacks_added_before_first_batch_are_called():
    """Even after the start hooks of the module."""

    class Brings(pl.Callback):
        def on_predict_epoch_start(self, trainer, pl_module):
            trainer.callbacks.append(recorder(trace))
            trainer.callbacks.extend(Writer() for _ in range(writers))

    for writers in (0, 1):
        trace = []
        _, light = predict(callbacks=[Brings])
        assert light is (writers == 0)
        assert [name for name, *_ in trace].count("on_predict_batch_end") > 2


def test_a_batch_on_the_device_is_not_moved(monkeypatch):
    moved, real = [], SingleDeviceStrategy.batch_to_device
    monkeypatch.setattr(SingleDeviceStrategy, "batch_to_device", lambda *a, **k: (moved.append(a), real(*a, **k))[1])
    predict()
    assert moved == []
    predict(data=loader)
    assert len(moved) == 4


@pytest.mark.filterwarnings("ignore:.*many workers")
def test_predict_step_returning_none_warns():
    with pytest.warns(UserWarning, match="predict returned None"):
        predict(model=SometimesNone)


def test_custom_batch_transfer_is_used():
    class Moves(DataModule):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            moved.append(dataloader_idx)
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    moved: list[int] = []
    _, light = predict(data=lambda: Moves("digits", batch_size=64))
    assert light
    assert len(moved) > 1


def test_reused_trainer_predicts_with_other_module():
    class Foreign(pl.LightningModule):
        def predict_step(self, batch, batch_idx):
            kinds.append(bool(self.trainer.predict_loop.hooks))
            return batch[0].sum()

    kinds: list[bool] = []
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.predict(DenseAE((1, 8, 8)), digits())
    assert isinstance(trainer.predict_loop, predict_loop.FastPredictionLoop)
    assert len(trainer.predict(Foreign(), loader())) == 4
    assert kinds == [False] * 4


def test_other_lightning_version_uses_lightnings_predict_loop(monkeypatch):
    found, light = predict()
    assert light
    monkeypatch.setattr(predict_loop, "_PRIVATE", (*predict_loop._PRIVATE, "_no_such"))
    wanted, light = predict()
    assert not light
    torch.testing.assert_close(found["found"], wanted["found"], rtol=0, atol=0)
