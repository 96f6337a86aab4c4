"""Models used with Lightning and torch directly: in a custom Trainer, and without a Trainer."""

from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
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


def test_interrupted_evaluation_leaves_no_state():
    own = model()
    figures = evaluated(own, X)
    with pytest.raises(RuntimeError, match="on purpose"):
        evaluated(own, X / 9, callbacks=[Fails()])
    assert evaluated(own, X) == figures


def test_each_evaluation_checks_its_data():
    own = model()
    evaluated(own, X)
    with pytest.raises(AezooError, match=r"needs data in \[0, 1\], got values from"):
        evaluated(own, 255 * X)


def test_several_loaders_are_evaluated_separately():
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


def test_custom_optimizer_keeps_learning_rate_on_resume(tmp_path):
    rates = []
    for ckpt_path in (None, tmp_path / "half.ckpt"):
        own = model()
        own.configure_optimizers = lambda own=own: torch.optim.AdamW(own.parameters(), lr=0.25)
        run = fit(own, ckpt_path=ckpt_path, max_epochs=1 if ckpt_path is None else 2)
        run.save_checkpoint(tmp_path / "half.ckpt")
        rates.append(run.optimizers[0].param_groups[0]["lr"])
    assert rates == [0.25, 0.25]


def test_convolutions_can_be_pruned():
    own = model("conv_ae", (2, 8, 8), hidden_dims=(4,))
    fit(own, torch.rand(8, 2, 8, 8), callbacks=[pl.callbacks.ModelPruning("l1_unstructured", amount=0.5)])
    zeros = torch.cat([p.flatten() == 0 for p in own.parameters()])
    assert zeros.float().mean() > 0.4


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize(
    ("name", "settings"), [("noise2void", {"width": 4, "depth": 3}), ("vq_vae", {"hidden_dims": (4,)})]
)
def test_data_init_and_masking_support_any_precision(name, settings, precision):
    own = model(name, (1, 8, 8), **settings)
    run = fit(own, torch.rand(8, 1, 8, 8, dtype=torch.float64), precision=precision, max_epochs=1)
    assert torch.isfinite(run.callback_metrics["train/loss"])


# ---- custom loops ----------------------------------------------------------------------------------------------------


def by_hand(own, fabric=None):
    """Train for two epochs."""
    optimizer = own.configure_optimizers()
    trained, optimizer = (own, optimizer) if fabric is None else fabric.setup(own, optimizer)
    for _ in range(2):
        for i, batch in enumerate(loader()):
            optimizer.zero_grad()
            trained.training_step(batch, i)["loss"].backward()
            optimizer.step()
    return own


SPARSE = {"latent_dim": 12, "k": 2, "data_init": True, "lr": 0.1}


@pytest.mark.parametrize("fabric", [None, Fabric(accelerator="cpu", devices=1)])
def test_manual_loop_matches_trainer_steps(fabric):
    """Unit-norm directions from the first batch on, with Adam's moments tangential to the sphere."""
    by_trainer = model("topk_sae", **SPARSE)
    fit(by_trainer)
    own = by_hand(model("topk_sae", **SPARSE), fabric)
    for name, value in by_trainer.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("was_fitted", [False, True])
def test_manual_loop_counts_steps_and_redraws_noise(was_fitted):
    own = model("annealed_vae", hidden_dims=(8,))
    if was_fitted:
        fit(own)
    before = int(own.steps)
    by_hand(own)
    assert own.steps == before + 8
    assert own.training_step((X,), 0)["nll"] != own.training_step((X,), 0)["nll"]


class Around(pl.LightningModule):
    """Trains a model as a submodule."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def training_step(self, batch, batch_idx):
        return self.own.loss(*batch)["loss"]

    def configure_optimizers(self):
        return self.own.configure_optimizers()


def test_wrapping_module_keeps_unit_norm_directions():
    own = model("topk_sae", **{**SPARSE, "data_init": False})
    trainer().fit(Around(own), loader())
    torch.testing.assert_close(own.decoder.W_NX.norm(dim=1), torch.ones(12))


def test_a_schedule_without_a_trainer_is_refused():
    for settings in ({"lr_schedule": "cosine"}, {"warmup_steps": 3}):
        with pytest.raises(AezooError, match="need a Trainer, which knows the last step"):
            model(**settings).configure_optimizers()


def test_batches_are_evaluated_without_a_trainer():
    own = model().eval()
    own.validation_step((X,), 0)
    with pytest.warns(UserWarning, match="self.log"):
        own.on_validation_epoch_end()
