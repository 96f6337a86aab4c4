"""The fast loop does the same as Lightning's: calls, values, weights and counters are equal for each batch."""

import inspect
import math
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LambdaCallback,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from quiet_trainer import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

import aezoo
from aezoo.callbacks import BetaAnnealing, FaultGuard, Interrupt
from aezoo.data import DataModule
from aezoo.data.resident import ResidentLoader
from aezoo.speed import fast_loop
from aezoo.speed.denormals import flushed_denormals

DenseAE = aezoo.model_class("dense_ae")
NO_HOOKS = ("state_key", "state_dict", "load_state_dict")
HOOKS = [name for name in vars(pl.Callback) if not name.startswith("_") and name not in NO_HOOKS]


# Lightning's warnings about settings that are intended here
ADVICE = (
    "Checkpoint directory .* exists", "yielded None", "returned `None`", "Skipping learning rate update",
    "have no `validation_step`", "`dataloader_iter`", "Be aware that when using", "You have overridden",
    "number of training batches .* is smaller than the logging", "have no `val_dataloader`",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _lightnings_advice():
    with warnings.catch_warnings():
        for text in ADVICE:
            warnings.filterwarnings("ignore", message=f".*{text}")
        yield


class Notes(Logger):
    """Records logged metrics by step."""

    def __init__(self):
        super().__init__()
        self.lines, self.saved = [], 0

    name, version = "notes", 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.lines.append((step, dict(metrics)))

    def save(self):
        self.saved += 1


def note(trace, name, function):
    """A hook that appends its name, the counters and its arguments to `trace`."""
    takes = [key for key in inspect.signature(function).parameters if key != "self"]

    def hook(self, trainer, *args, **kwargs):
        told = dict(zip(takes[1:], args, strict=False)) | kwargs
        outputs, batch = told.get("outputs"), told.get("batch")
        values = {key: float(value) for key, value in outputs.items()} if isinstance(outputs, dict) else outputs
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        gradients = None
        if name in ("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"):
            parameters = trainer.lightning_module.parameters()
            gradients = sum(float(p.grad.double().abs().sum()) for p in parameters if p.grad is not None)
        size = len(batch[0]) if isinstance(batch, tuple | list) else None
        loss = float(told["loss"].detach()) if "loss" in told else None
        trace.append(
            (name, trainer.global_step, trainer.current_epoch, trainer.is_last_batch, told.get("batch_idx"), values,
             size, loss, rates, gradients, trainer.should_stop, trainer.lightning_module._current_fx_name)
        )  # fmt: skip

    return hook


def recorder(trace):
    """A callback that records every call of every hook."""
    hooks = {name: note(trace, name, getattr(pl.Callback, name)) for name in HOOKS}
    return type("Recorder", (pl.Callback,), hooks)()


class Lighten(pl.Callback):
    """Requests the fast loop for a module that is not from aezoo."""

    def on_train_start(self, trainer, pl_module):
        fast_loop.install_fast_loop(trainer)


class Foreign(pl.LightningModule):
    """A plain LightningModule that returns a tensor."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6))

    def loss(self, batch):
        x = batch if isinstance(batch, torch.Tensor) else batch[0]
        return (self.net(x) - x).square().mean()

    def training_step(self, batch):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class OwnOptimizerStep(DenseAE):
    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            next(self.parameters()).clamp_(max=0.1)


class Logging(DenseAE):
    """Logs per step, per epoch and both, in three hooks."""

    def training_step(self, batch, batch_idx):
        terms = super().training_step(batch, batch_idx)
        self.log("a", terms["loss"], on_step=True)
        self.log("b", terms["loss"] * 2, on_step=True, on_epoch=True, prog_bar=True)
        if batch_idx % 3 == 0:
            self.log("c", float(batch_idx), on_step=False, on_epoch=True, reduce_fx="max")
        return terms

    def on_before_optimizer_step(self, optimizer):
        self.log("lr", optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("end", outputs["loss"])


class SometimesNone(DenseAE):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 4 == 1 else super().training_step(batch, batch_idx)


class OtherResults(DenseAE):
    """Returns a mapping that is not a dict of scalars only, and takes only its batch."""

    def training_step(self, batch):
        terms = super().training_step(batch, self.trainer.fit_loop.epoch_loop.batch_idx)
        return {"loss": terms["loss"], "count": len(batch[0])}


class Plateau(DenseAE):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}


class PlateauByStep(Logging):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.9, threshold=0.5)
        how = {"scheduler": schedule, "monitor": "a", "interval": "step", "frequency": 2, "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": how}


class ByEpoch(DenseAE):
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class OwnClipping(DenseAE):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 0.01, "value")


class OwnZeroing(DenseAE):
    """Overrides the module's hooks of a step, which run after those of callbacks, and zeroes gradients in place."""

    def on_before_zero_grad(self, optimizer):
        self.heard = [*getattr(self, "heard", []), ("zero", self.trainer.global_step)]

    def on_before_backward(self, loss):
        self.heard.append(("backward", float(loss.detach())))

    def on_after_backward(self):
        for p in self.parameters():
            p.grad.mul_(0.5)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


class OwnTransfer(DenseAE):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] * 0.5, *batch[1:])


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= 15


class Meddler(pl.Callback):
    """Defines two hooks of the step, one of them not as a method."""

    def __init__(self):
        self.calls = 0
        self.on_train_batch_end = type("Call", (), {"__call__": self._ended})()

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        for p in pl_module.parameters():
            if p.grad is not None:
                p.data.sub_(p.grad, alpha=1e-3)

    def on_after_backward(self, trainer, pl_module):
        next(pl_module.parameters()).grad.add_(0.01)

    def _ended(self, *args):
        self.calls += 1


def dense(cls=DenseAE, **plain):
    return lambda: cls((6,), latent_dim=2, hidden_dims=(8,), **plain)


def zoo(name, **plain):
    return lambda: aezoo.create_model(name, input_shape=(6,), **plain)


def data(drop_last=False):
    x = torch.rand(46, 6, generator=torch.Generator().manual_seed(1))
    # 41 training rows: 11 batches, the last of one row
    return DataModule.from_arrays(x, batch_size=4, val_fraction=0.1, test_fraction=0, seed=3, drop_last=drop_last)


def augmented():
    x = torch.rand(46, 1, 2, 3, generator=torch.Generator().manual_seed(1))
    return DataModule.from_arrays(x, batch_size=4, test_fraction=0, hflip=0.5, crop_padding=1, color_jitter=0.4)


def loader(drop_none=True):
    batches = list(torch.rand(7, 4, 6, generator=torch.Generator().manual_seed(2)))
    if not drop_none:
        batches[3] = None
    return DataLoader(batches, batch_size=None)


CASES = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "accumulation schedule": {"callbacks": lambda: [GradientAccumulationScheduler({0: 1, 1: 4})]},
    "accumulated logs": {"model": dense(Logging), "accumulate_grad_batches": 3},
    "clip norm": {"gradient_clip_val": 0.05},
    "clip value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2},
    "own clipping": {"model": dense(OwnClipping)},
    "cosine and warm-up": {"model": dense(lr_schedule="cosine", warmup_steps=5), "accumulate_grad_batches": 2},
    "schedule by epoch": {"model": dense(ByEpoch)},
    "plateau": {"model": dense(Plateau), "max_epochs": 3},
    "plateau by step": {"model": dense(PlateauByStep)},
    "validation twice an epoch": {"val_check_interval": 0.5},
    "validation every third batch": {"val_check_interval": 3, "model": dense(Logging)},
    "validation by all batches": {"val_check_interval": 4, "check_val_every_n_epoch": None},
    "validation every second epoch": {"check_val_every_n_epoch": 2, "max_epochs": 3},
    "max steps in an epoch": {"max_steps": 15, "max_epochs": -1},
    "limited batches": {"limit_train_batches": 5, "limit_val_batches": 1},
    "limited share": {"limit_train_batches": 0.5},
    "bf16": {"precision": "bf16-mixed"},
    "noise": {"model": zoo("vae", latent_dim=2, hidden_dims=(8,))},
    "annealing": {
        "model": zoo("vae", latent_dim=2, hidden_dims=(8,)), "callbacks": lambda: [BetaAnnealing(n_steps=9)],
    },
    "own optimizer_step": {"model": dense(OwnOptimizerStep), "accumulate_grad_batches": 2},
    "weights changed after a step": {"model": zoo("topk_sae", latent_dim=8, k=2), "accumulate_grad_batches": 2},
    "own zeroing": {"model": dense(OwnZeroing), "accumulate_grad_batches": 2},
    "own transfer": {"model": dense(OwnTransfer)},
    "hooks in the step": {"callbacks": lambda: [Meddler()], "accumulate_grad_batches": 2},
    "logs": {"model": dense(Logging)},
    "None": {"model": dense(SometimesNone)},
    "other results": {"model": dense(OtherResults), "accumulate_grad_batches": 2},
    "stopped in an epoch": {"callbacks": lambda: [Stop()], "max_epochs": 4},
    "stopped below min_epochs": {"callbacks": lambda: [Stop()], "max_epochs": 4, "min_epochs": 3},
    "augmented": {
        "model": lambda: DenseAE((1, 2, 3), latent_dim=2, hidden_dims=(8,)), "data": augmented,
    },
    "foreign": {"model": Foreign, "data": loader, "callbacks": lambda: [Lighten()], "accumulate_grad_batches": 2},
    "foreign on resident data": {
        "model": Foreign, "data": lambda: data(drop_last=True), "callbacks": lambda: [Lighten()],
    },
    "a batch is None": {"model": Foreign, "data": lambda: loader(False), "callbacks": lambda: [Lighten()]},
    "averaging": {
        "model": Foreign, "data": loader, "max_epochs": 3,
        "callbacks": lambda: [Lighten(), StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)],
    },
}  # fmt: skip


def fit(folder, model=None, data=data, callbacks=list, ckpt_path=None, trace=None, **plain):
    """Run a fit and return the trainer."""
    torch.manual_seed(7)
    np.random.seed(7)
    model = (model or dense())()
    # first and last; other callbacks are called in between
    watch = [] if trace is None else [recorder(trace)]
    settings = {"max_epochs": 2, "log_every_n_steps": 2, "logger": Notes(), "default_root_dir": folder} | plain
    trainer = quiet_trainer(**settings, callbacks=[*watch, *callbacks()])
    with flushed_denormals():  # Lightning's loop does not flush denormals itself
        trainer.fit(model, data(), ckpt_path=ckpt_path)
    return trainer


def state(trainer, trace):
    """The final state of a run."""
    model = trainer.lightning_module
    return {
        "trace": trace,
        "weights": model.state_dict(),
        "optimisers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "loops": trainer.fit_loop.state_dict(),
        "logged": trainer.logger.lines,
        "saved": trainer.logger.saved,
        "metrics": (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics),
        "counts": (trainer.global_step, trainer.current_epoch, trainer.fit_loop.epoch_loop._batches_that_stepped),
        "heard": getattr(model, "heard", None),
        "calls": [vars(callback).get("calls") for callback in trainer.callbacks],
    }


def same(a, b, path=""):
    """Assert exact equality, with the path of the first difference."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        for i, (one, other) in enumerate(zip(a, b, strict=False)):
            same(one, other, f"{path}[{i}]")
        assert len(a) == len(b), (path, a[len(b) :], b[len(a) :])
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num()), path
    else:
        assert a == b or (a != a and b != b), path


@pytest.fixture
def both(tmp_path, monkeypatch):
    """Runs with both loops; each returns its trainer and its trace."""
    steps = []
    step = fast_loop.FastLoop._take_step
    monkeypatch.setattr(fast_loop.FastLoop, "_take_step", lambda *args: steps.append(args[2]) or step(*args))

    def run(folder=tmp_path, watched=True, **plain):
        runs = []
        for light in (False, True):
            trace = [] if watched else None
            steps.clear()
            with monkeypatch.context() as patch:
                if not light:
                    patch.setattr(fast_loop, "install_fast_loop", lambda trainer: False)
                case = {key: value(light) if key == "ckpt_path" else value for key, value in plain.items()}
                trainer = fit(folder / str(light), trace=trace, **case)
            assert bool(steps) == light
            runs.append((trainer, state(trainer, trace)))
        same(*(found for _, found in runs))
        return [trainer for trainer, _ in runs]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_fast_loop_matches_lightning_calls_values_and_weights(both, case):
    both(**CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["plain", "accumulated logs", "clip norm", "bf16", "own optimizer_step", "own zeroing", "hooks in the step"]
)
def test_fast_loop_matches_lightning_without_hook_observers(both, case):
    both(watched=False, **CASES[case])


def test_the_trace_sees_the_hooks_of_a_step(tmp_path):
    trace = []
    fit(tmp_path, trace=trace, accumulate_grad_batches=3, max_epochs=1, limit_train_batches=4)
    names = [line[0] for line in trace]
    batch = ["on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"]
    begin = names.index("on_train_batch_start")
    assert names[begin : begin + 5] == [*batch, "on_train_batch_end"]
    assert names.count("on_before_optimizer_step") == 2  # batches 3 and 4
    assert [line[4] for line in trace if line[0] == "on_train_batch_end"] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_checkpoints_within_an_epoch_have_the_same_content(both, tmp_path, accumulate):
    def saver():
        # separate folders, since the fast loop would find the other's files
        folder = tmp_path / str(len([*tmp_path.glob("saved*")]))
        (tmp_path / f"saved{folder.name}").mkdir()
        return [ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)]

    both(callbacks=saver, enable_checkpointing=True, accumulate_grad_batches=accumulate, watched=False)
    names = [sorted(path.name for path in (tmp_path / str(i)).glob("*.ckpt")) for i in (0, 1)]
    assert names[0] == names[1] and len(names[0]) >= 4
    for name in names[0]:
        one, other = (torch.load(tmp_path / str(i) / name, weights_only=True) for i in (0, 1))
        for content in (one, other):
            content.pop("callbacks")  # contains the folders
        same(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_mid_epoch_resume_matches_lightning(both, tmp_path, accumulate):
    plain = {"model": zoo("vae", latent_dim=2, hidden_dims=(8,)), "accumulate_grad_batches": accumulate}
    saver = lambda: [ModelCheckpoint(filename="{step}", every_n_train_steps=5, save_top_k=-1)]  # noqa: E731
    both(callbacks=saver, enable_checkpointing=True, **plain)
    file = lambda light: next((tmp_path / str(light)).rglob("step=5.ckpt"))  # noqa: E731
    resumed = both(ckpt_path=file, max_epochs=3, **plain)
    whole = fit(tmp_path / "whole", max_epochs=3, **plain)
    same(resumed[1].lightning_module.state_dict(), whole.lightning_module.state_dict())
    assert resumed[1].global_step == whole.global_step


class Manual(Foreign):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Newton(Foreign):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)


class OwnAdam(torch.optim.Adam):
    pass


class OwnOptimizer(Foreign):
    def configure_optimizers(self):
        return OwnAdam(self.parameters())


class SkipsEpochs(Foreign):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None


class FetchesItself(Foreign):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


class OtherStrategy(SingleDeviceStrategy):
    pass


@pytest.mark.parametrize(
    ("model", "plain", "taken"),
    [
        (Foreign, {}, True),
        (Foreign, {"profiler": "simple"}, False),
        (Foreign, {"strategy": OtherStrategy("cpu")}, False),
        (Foreign, {"precision": "64-true"}, False),
        (Manual, {}, False),
        (Newton, {}, False),
        (OwnOptimizer, {}, False),
        (SkipsEpochs, {}, False),
        (FetchesItself, {}, False),
    ],
)
def test_fast_loop_is_used_only_for_supported_runs(tmp_path, monkeypatch, model, plain, taken):
    asked = []
    install_fast_loop = fast_loop.install_fast_loop
    monkeypatch.setattr(fast_loop, "install_fast_loop", lambda trainer: asked.append(install_fast_loop(trainer)))
    callbacks = lambda: [Lighten()]  # noqa: E731
    batches = (
        (lambda: loader())
        if "precision" not in plain
        else lambda: DataLoader(list(torch.rand(7, 4, 6, dtype=torch.float64)), batch_size=None)
    )
    trainer = fit(tmp_path, model=model, data=batches, callbacks=callbacks, max_epochs=1, **plain)
    assert asked == [taken]
    assert trainer.global_step > 0


@pytest.mark.slow
def test_two_processes_use_lightning_loop(tmp_path):
    class Saver(DenseAE):
        def on_train_end(self):
            plan = getattr(self.trainer.fit_loop.epoch_loop, "plan", None)
            (tmp_path / f"{self.global_rank}").write_text(str(plan))

    fit(tmp_path, model=dense(Saver), max_epochs=1, devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["None", "None"]


def test_reused_trainer_trains_new_module(tmp_path):
    trainer = fit(tmp_path, max_epochs=1)
    assert trainer.fit_loop.epoch_loop.plan is None
    other = Foreign()
    before = other.net[0].weight.detach().clone()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(other, loader())
    assert not torch.equal(before, other.net[0].weight)


def test_plan_of_different_module_is_dropped(tmp_path):
    class Stale(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            fast_loop.install_fast_loop(trainer)
            plan = trainer.fit_loop.epoch_loop.plan
            plan.module = plan._participants[0] = Foreign()

        def on_train_batch_end(self, trainer, *args):
            assert trainer.fit_loop.epoch_loop.plan is None

    assert fit(tmp_path, model=Foreign, data=loader, callbacks=lambda: [Stale()]).global_step == 14


def test_uncalled_closure_raises_error(tmp_path):
    class Forgets(DenseAE):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            pass

    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="closure hasn't been executed"):
        fit(tmp_path, model=dense(Forgets))


def test_required_lightning_attributes_exist(tmp_path):
    found = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            found.append(fast_loop.missing_attribute(trainer))

    fit(tmp_path, callbacks=lambda: [Look()], max_epochs=1)
    assert found == [None], f"this Lightning has renamed {found[0]}: change aezoo/speed/fast_loop.py"


@pytest.mark.parametrize("path", ["_logger_connector.no_such", "fit_loop.epoch_loop.batch_progress.no_such"])
def test_missing_lightning_attribute_falls_back_with_warning(tmp_path, monkeypatch, path):
    monkeypatch.setattr(fast_loop, "_NEEDED", (*fast_loop._NEEDED, path))
    with pytest.warns(UserWarning, match=f"has no trainer.{path}: training takes Lightning's own loop") as caught:
        trainer = fit(tmp_path)
    assert len([one for one in caught if "own loop" in str(one.message)]) == 1
    assert type(trainer.fit_loop.epoch_loop) is not fast_loop.FastLoop
    assert trainer.global_step == 22


def test_batches_are_private_without_foreign_callbacks(tmp_path):
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(fast_loop.batch_is_private(trainer))

    class LookElsewhere(pl.Callback):
        def on_before_zero_grad(self, trainer, *args):
            seen.append(fast_loop.batch_is_private(trainer))

    seen = []
    fit(tmp_path, callbacks=lambda: [Look(), Interrupt()], max_epochs=1)
    assert not any(seen) and seen
    seen.clear()
    fit(tmp_path, callbacks=lambda: [LookElsewhere(), Interrupt()], max_epochs=1)
    assert all(seen) and seen


def test_signal_is_handled_between_batches(tmp_path):
    class Signal(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(batch_idx)
            if batch_idx == 1:
                trainer._signal_connector.received_sigterm = True

    seen = []
    with pytest.raises(SIGTERMException):
        fit(tmp_path, callbacks=lambda: [Signal()], max_epochs=1)
    assert seen == [0, 1]


# ---- custom code that changes what the fast loop has looked up -------------------------------------------------------


class At(pl.Callback):
    """Acts once: at the end of the batch of a step, or before an epoch."""

    def __init__(self, act, step=None, epoch=None):
        self.act, self.step, self.epoch = act, step, epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.act(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.act(trainer, pl_module)


def zero_moments(trainer, module):
    for p, state in trainer.optimizers[0].state.items():
        state["exp_avg"] = torch.zeros_like(p)


class ExchangesAWeight(pl.Callback):
    """Replaces a weight, and deletes its optimizer state at the end."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != 4:
            return
        layer, optimizer = pl_module.encoder[0][1], trainer.optimizers[0]
        self.old = layer.weight
        layer.weight = nn.Parameter(self.old.detach() * 0.5)
        optimizer.state[layer.weight] = {**optimizer.state[self.old]}
        parameters = optimizer.param_groups[0]["params"]
        parameters[next(i for i, p in enumerate(parameters) if p is self.old)] = layer.weight

    def on_train_end(self, trainer, pl_module):
        del trainer.optimizers[0].state[self.old]


def unfuse(trainer, module):
    trainer.optimizers[0].param_groups[0]["fused"] = False


def add_a_step_hook(trainer, module):
    trainer.optimizers[0].register_step_pre_hook(lambda optimizer, args, kwargs: shift_gradients(optimizer))


def shift_gradients(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.add_(0.1)


def take_sgd(trainer, module):
    trainer.optimizers = [torch.optim.SGD(module.parameters(), lr=0.1)]


def clamp_after_steps(trainer, module):
    def optimizer_step(*args, **kwargs):
        DenseAE.optimizer_step(module, *args, **kwargs)
        next(module.parameters()).data.clamp_(max=0.1)

    module.optimizer_step = optimizer_step


def end_at_the_third_batch(trainer, module):
    module.on_train_batch_start = lambda batch, batch_idx: -1 if batch_idx == 3 else None


def append_a_callback(trainer, module):
    trainer.callbacks = [*trainer.callbacks, Meddler()]


def accumulate(trainer, module):
    trainer.accumulate_grad_batches = 2


class StepHook(DenseAE):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        self.heard = []
        optimizer.register_step_pre_hook(lambda _, args, kwargs: self.heard.append((len(args), [*kwargs])))
        optimizer.register_step_post_hook(lambda optimizer, args, kwargs: shift_gradients(optimizer))
        return optimizer


class WrappedStep(DenseAE):
    """An optimizer step that needs a closure."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        step = optimizer.step
        optimizer.step = lambda closure: step(closure)
        return optimizer


class OwnClosure(DenseAE):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=lambda: optimizer_closure(backward=True))


class LogsAnywhere(DenseAE):
    def on_train_start(self):
        super().on_train_start()
        next(self.parameters()).register_hook(lambda g: self.log("hook", g.norm()))

    def backward(self, loss, *args, **kwargs):
        self.log("backward", loss.detach())
        super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.log("zero", 1.0)
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)


class LogsClipping(DenseAE):
    def clip_gradients(self, *args, **kwargs):
        self.log("clip", float(len(args)))
        super().clip_gradients(*args, **kwargs)


class Normed(DenseAE):
    """Has buffers and sometimes a non-finite loss, which affects them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = nn.BatchNorm1d(6)

    def loss(self, x, y=None):
        terms = super().loss(x, y)
        bad = self.training and self.trainer.fit_loop.epoch_loop.batch_idx in (2, 5)
        seen = self.norm(x * math.inf if bad else x).mean()
        return terms | {"loss": terms["loss"] + seen.detach()}


def of_functions(callback):
    """Lightning's LambdaCallback with the same hooks."""
    hooks = [name for name in vars(type(callback)) if name.startswith("on_")]

    def function(hook):
        return lambda *arguments: hook(*arguments)

    return LambdaCallback(**{name: function(getattr(callback, name)) for name in hooks})


class NumpyNoise(nn.Module):
    def forward(self, x):
        return x * torch.as_tensor(np.random.rand(*x.shape), dtype=torch.float32)


def with_numpy_noise():
    model = aezoo.create_model("denoising_ae", (6,), latent_dim=2, hidden_dims=(8,))
    model.corruption = NumpyNoise()
    return model


class DrawsInEpochs(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.heard = [*(getattr(pl_module, "heard", None) or []), np.random.rand()]


class DrawsInBatches(pl.LightningDataModule):
    """Its batches are kept in memory, and noise is added to each."""

    def train_dataloader(self):
        x = torch.rand(40, 6, generator=torch.Generator().manual_seed(1))
        return ResidentLoader(x, batch_size=4, shuffle=True, seed=5)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] * np.random.rand(), *batch[1:])


class Augmented(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return ((torch.as_tensor(np.random.rand(6), dtype=torch.float32) + i / 20) / 2,)


class DoublesLoss(pl.Callback):
    """Changes the loss in place, and records the output."""

    def on_before_backward(self, trainer, pl_module, loss):
        with torch.no_grad():
            loss.mul_(2)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.heard = [*(getattr(pl_module, "heard", None) or []), float(outputs["loss"]), *outputs]


class Exponential(DenseAE):
    """The gradient depends on the loss's value, and the loss is the last term."""

    def loss(self, x, y=None):
        terms = super().loss(x, y)
        return {"nll": terms["nll"], "loss": (terms["loss"] * 0.01).exp()}


class NoGradients(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        torch.set_grad_enabled(False)


def adapted():
    """A model that clips a gradient to the mean of those seen so far."""
    model = aezoo.create_model("k_sparse", (6,), latent_dim=8, k=2)
    seen = model.heard = [1.0]

    def clip(g):
        seen.append(0.9 * seen[-1] + 0.1 * float(g.norm()) if math.isfinite(g.norm()) else seen[-1])
        return g * min(1.0, seen[-1] / float(g.norm()))

    next(model.parameters()).register_hook(clip)
    return model


class CountsBatches(pl.Callback):
    """Changes a buffer after the guard has saved it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.norm.num_batches_tracked.add_(100)


class Reloaded(pl.LightningDataModule):
    """Has other data in the second epoch."""

    def __init__(self, later):
        super().__init__()
        self.later = later

    def train_dataloader(self):
        x = torch.rand(40, 6, generator=torch.Generator().manual_seed(1))
        again = self.trainer.current_epoch > 0
        return self.later(x) if again else ResidentLoader(x, batch_size=4, shuffle=True, seed=5)


class Batches:
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x.split(4))


def whole_batches():
    return data(drop_last=True)


def guarded(*callbacks):
    return lambda: [FaultGuard(50), *(make() for make in callbacks)]


OTHERS = {
    "clipped to less than nothing": {"gradient_clip_val": -1.0, "callbacks": guarded()},
    "state cleared": {"callbacks": lambda: [At(lambda t, m: t.optimizers[0].state.clear(), step=4)]},
    "moments replaced": {"callbacks": lambda: [At(zero_moments, step=4)]},
    "a weight exchanged": {"callbacks": lambda: [ExchangesAWeight()]},
    "a weight exchanged by a function": {"callbacks": lambda: [of_functions(ExchangesAWeight())]},
    "noise of NumPy in a function": {"callbacks": lambda: [of_functions(DrawsInEpochs())]},
    "no longer fused": {"callbacks": lambda: [At(unfuse, step=4)]},
    "step hooks": {"model": dense(StepHook)},
    "step hooks under a guard": {"model": dense(StepHook), "callbacks": guarded()},
    "a step hook from a step on": {"callbacks": guarded(lambda: At(add_a_step_hook, step=4))},
    "a wrapped step": {"model": dense(WrappedStep)},
    "an own closure": {"model": dense(OwnClosure)},
    "another optimiser from a step on": {"callbacks": lambda: [At(take_sgd, step=4)]},
    "optimizer_step from an epoch on": {"callbacks": lambda: [At(clamp_after_steps, epoch=1)]},
    "on_train_batch_start from an epoch on": {"callbacks": lambda: [At(end_at_the_third_batch, epoch=1)]},
    "a callback from an epoch on": {"callbacks": lambda: [At(append_a_callback, epoch=1)]},
    "a callback from a step on": {"callbacks": lambda: [At(append_a_callback, step=4)]},
    "accumulation from an epoch on": {
        "model": dense(Normed), "data": whole_batches, "callbacks": guarded(lambda: At(accumulate, epoch=1)),
    },
    "accumulation from a step on": {
        "model": dense(Normed), "data": whole_batches, "callbacks": guarded(lambda: At(accumulate, step=4)),
    },
    "logs anywhere": {"model": dense(LogsAnywhere)},
    "logs in clipping": {"model": dense(LogsClipping), "gradient_clip_val": 0.1},
    "own clipping of nothing": {"model": dense(LogsClipping)},
    "noise of NumPy": {"model": with_numpy_noise},
    "noise of NumPy in a callback": {"callbacks": lambda: [DrawsInEpochs()]},
    "noise of NumPy in batches": {"data": DrawsInBatches},
    "noise of NumPy in data": {"data": lambda: DataLoader(Augmented(), batch_size=4)},
    "a loss changed in place": {"callbacks": lambda: [DoublesLoss()]},
    "a loss of which the gradient needs its value": {
        "model": dense(Exponential), "callbacks": lambda: [DoublesLoss()],
    },
    "no gradients": {"callbacks": lambda: [NoGradients()]},
    "hooks of a weight": {"model": adapted, "callbacks": guarded()},
    "a buffer changed by others": {
        "model": dense(Normed), "data": whole_batches, "callbacks": guarded(CountsBatches),
    },
    "data without a length": {"data": lambda: Reloaded(Batches), "reload_dataloaders_every_n_epochs": 1},
    "data from two loaders": {
        "model": Foreign, "callbacks": lambda: [Lighten()], "reload_dataloaders_every_n_epochs": 1,
        "data": lambda: Reloaded(lambda x: [DataLoader(x, batch_size=4), DataLoader(x, batch_size=4)]),
    },
    "twice the data": {
        "data": lambda: Reloaded(lambda x: DataLoader(torch.cat([x, x]), batch_size=4)),
        "reload_dataloaders_every_n_epochs": 1, "val_check_interval": 5, "model": dense(Logging),
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_fast_loop_matches_lightning_with_custom_code(both, case):
    both(watched=False, **OTHERS[case])


def test_lightning_loop_is_restored_after_fit(tmp_path):
    trainer = fit(tmp_path)
    assert type(trainer.fit_loop.epoch_loop) is fast_loop._TrainingEpochLoop


@pytest.mark.slow
def test_epoch_means_exclude_previous_epoch_on_resume(tmp_path):
    """A checkpoint at an epoch's last batch holds the means of that epoch, which Lightning does not end again."""

    class Means(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.seen.append(float(pl_module._train_means.compute()["loss"]))

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=11, save_top_k=-1)
    whole, rest, middle = Means(), Means(), Means()
    fit(tmp_path, callbacks=lambda: [whole, save], max_epochs=3, enable_checkpointing=True)
    fit(tmp_path, callbacks=lambda: [rest], max_epochs=3, ckpt_path=tmp_path / "step=11.ckpt")
    assert len(whole.seen) == 3 and rest.seen == whole.seen[1:]
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    fit(tmp_path, callbacks=lambda: [save], max_epochs=3, enable_checkpointing=True)
    fit(tmp_path, callbacks=lambda: [middle], max_epochs=3, ckpt_path=tmp_path / "step=5.ckpt")
    assert middle.seen == whole.seen
