"""Models as Lightning's and torch's users take them: in a Trainer of their own, and in no Trainer at all."""

from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import aezoo
from aezoo.errors import AezooError

X = torch.rand(16, 6, generator=torch.Generator().manual_seed(0))


def model(name="vae", shape=(6,), **settings):
    torch.manual_seed(0)
    return aezoo.create_model(name, shape, **settings)


def loader(x=X):
    return DataLoader(TensorDataset(x), batch_size=4)


def trainer(**settings):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": 2, **quiet, **settings})


def fit(own, x=X, ckpt_path=None, **settings):
    run = trainer(**settings)
    run.fit(own, loader(x), loader(x), ckpt_path=ckpt_path)
    return run


def evaluated(own, *x, **settings):
    return trainer(**settings).validate(own, [loader(part) for part in x], verbose=False)[0]


class Fails(pl.Callback):
    def on_validation_batch_end(self, *args):
        raise RuntimeError("on purpose")


def test_an_evaluation_that_was_interrupted_leaves_nothing_behind():
    own = model()
    figures = evaluated(own, X)
    with pytest.raises(RuntimeError, match="on purpose"):
        evaluated(own, X / 9, callbacks=[Fails()])
    assert evaluated(own, X) == figures


def test_the_data_of_each_evaluation_are_looked_at():
    own = model()
    evaluated(own, X)
    with pytest.raises(AezooError, match=r"needs data in \[0, 1\], got values from"):
        evaluated(own, 255 * X)


def test_several_loaders_are_evaluated_apart_and_predicted():
    own = model()
    both, second = evaluated(own, X, X / 2), evaluated(own, X / 2)
    first = evaluated(own, X)
    assert both == first | {name.replace("val/", "val_1/"): value for name, value in second.items()}
    assert [len(part) for part in trainer().predict(own, [loader(), loader()])] == [4, 4]


class Modes(pl.Callback):
    def on_train_batch_start(self, _, own, *args):
        self.seen = {name: part.training for name, part in own.named_modules()}


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_in_evaluation_mode_is_trained_in_training_mode(whole):
    own, modes = model(), Modes()
    (own if whole else own.encoder).eval()
    with nullcontext() if whole else pytest.warns(UserWarning, match="in eval mode at the start"):
        fit(own, callbacks=[modes])
    assert modes.seen[""] and modes.seen["decoder"]
    assert modes.seen["encoder"] == whole


def test_an_optimizer_of_the_user_goes_on_at_its_own_rate(tmp_path):
    rates = []
    for ckpt_path in (None, tmp_path / "half.ckpt"):
        own = model()
        own.configure_optimizers = lambda own=own: torch.optim.AdamW(own.parameters(), lr=0.25)
        run = fit(own, ckpt_path=ckpt_path, max_epochs=1 if ckpt_path is None else 2)
        run.save_checkpoint(tmp_path / "half.ckpt")
        rates.append(run.optimizers[0].param_groups[0]["lr"])
    assert rates == [0.25, 0.25]
