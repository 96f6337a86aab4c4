"""A run stopped between two batches and resumed sees the same batches as an uninterrupted one."""

import lightning.pytorch as pl
import pytest
import torch

import aezoo
from aezoo.callbacks import Checkpoints, Interrupt
from aezoo.data import DataModule
from aezoo.errors import AezooError


class StopAt(pl.Callback):
    """Interrupts in the batch of a number counted over the run, as by Ctrl-C."""

    def __init__(self, batch):
        self.batch, self.seen = batch, 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen += 1
        if self.seen == self.batch:
            import signal

            signal.raise_signal(signal.SIGINT)


def fit(folder, stop=None, ckpt_path=None, **plain):
    torch.manual_seed(0)
    model = aezoo.create_model("dense_ae", (1, 8, 8), latent_dim=4, hidden_dims=(16,))
    data = DataModule("digits", **{"batch_size": 300} | plain)  # 5 batches per epoch, the last one smaller
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[*([StopAt(stop)] if stop else []), Interrupt(), Checkpoints()],
    )  # fmt: skip
    if stop:
        with pytest.raises(SystemExit):
            trainer.fit(model, data, ckpt_path=ckpt_path)
    else:
        trainer.fit(model, data, ckpt_path=ckpt_path)
    return model, trainer.global_step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("whole"))[0].state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(2,), (5,), (8,), (10,), (7, 3), (3, 2, 4)], ids=str)
def test_resumed_runs_match_uninterrupted_run(tmp_path, whole, stops):
    last = None
    for stop in stops:
        fit(tmp_path, stop, last)
        last = str(tmp_path / "checkpoints" / "last.ckpt")
    model, steps = fit(tmp_path, ckpt_path=last)
    assert steps == 15
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[name]), name


AUGMENTED = {"hflip": 0.5, "crop_padding": 2, "color_jitter": 0.4}


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "num_workers"), [("on", 0), ("off", 0), ("off", 2)])
def test_resumed_runs_see_the_same_augmented_images(tmp_path, memory, num_workers):
    plain = {"memory": memory, "num_workers": num_workers, **AUGMENTED}
    whole = fit(tmp_path / "whole", **AUGMENTED)[0].state_dict()
    last = None
    for stop in (7, 3):
        fit(tmp_path, stop, last, **plain)
        last = str(tmp_path / "checkpoints" / "last.ckpt")
    model, steps = fit(tmp_path, ckpt_path=last, **plain)
    assert steps == 15
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[name]), name
    without = fit(tmp_path / "without")[0].state_dict()
    assert not any(torch.equal(without[name], whole[name]) for name in whole if name.startswith("encoder"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"batch_size": 100}, "with batch size 300; with 100 the run cannot continue: give --data.batch_size 300, or"),
        ({"seed": 1}, "with seed 0; with 1 the run cannot continue: give --data.seed 0, or"),
    ],
)
def test_batch_settings_cannot_change_mid_epoch(tmp_path, other, words):
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    fit(tmp_path, 8)
    with pytest.raises(AezooError, match=words) as caught:
        fit(tmp_path, ckpt_path=last, **other)
    assert "\n" not in str(caught.value)
    # evaluation does not depend on the epoch
    model = aezoo.create_model("dense_ae", (1, 8, 8), latent_dim=4, hidden_dims=(16,))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    pl.Trainer(accelerator="cpu", **quiet).validate(model, DataModule("digits", **other), ckpt_path=last, verbose=False)
    # checkpoints of older versions do not contain the position
    DataModule("digits", **other).load_state_dict({"epoch": 1, "batches": 3, "world": 1})
    fit(tmp_path, 2, last)  # to the end of the epoch
    assert fit(tmp_path, ckpt_path=last, **other)[1] == 10 + (15 if "batch_size" in other else 5)
