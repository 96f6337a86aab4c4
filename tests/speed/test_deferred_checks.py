"""Steps on trust end as steps that were looked at one by one: same weights, counters, lines and files."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet_trainer import quiet_trainer
from representative_models import OF_EACH_KIND, others_slow
from torch import nn

import aezoo
from aezoo.callbacks import EMA, BetaAnnealing, Checkpoints, FaultGuard, Throughput
from aezoo.data import DataModule
from aezoo.data.resident import ResidentLoader
from aezoo.errors import AezooError
from aezoo.speed import deferred_checks, fast_loop, joint_backward
from aezoo.training.optimizers import OPTIMIZERS

DenseAE, VAE = aezoo.model_class("dense_ae"), aezoo.model_class("vae")
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
# the square of 1e20 overflows, and of 4e18 the sum over the 30 weights
VALUES = {"nan": math.nan, "inf": math.inf, "overflow": 1e20, "sum": 4e18, "large": 1e15}
PERIOD, BATCHES = 8, 30


def of_the_zoo(cls):
    """As if it were one of the zoo's own: others may remember more of a step."""
    cls.__module__ = DenseAE.__module__
    return cls


@pytest.fixture(autouse=True)
def _short_periods(monkeypatch):
    monkeypatch.setattr(deferred_checks, "PERIOD", PERIOD)


@pytest.fixture
def went_back(monkeypatch):
    """How many steps were taken back, for each time."""
    found, original = [], deferred_checks.Rollback._replay_steps

    def noted(self, was, taken):
        found.append(len(taken))
        original(self, was, taken)

    monkeypatch.setattr(deferred_checks.Rollback, "_replay_steps", noted)
    return found


def model_of(name="vae", **settings):
    torch.manual_seed(0)
    return aezoo.create_model(name, (6,), latent_dim=2, hidden_dims=(5,), lr=0.01, **settings)


def data_of(batches=BATCHES, **settings):
    x = torch.rand(batches * 8, 6, generator=torch.Generator().manual_seed(1))
    return DataModule.from_arrays(
        x, batch_size=8, **{"val_fraction": 0, "test_fraction": 0, "layout": "vector"} | settings
    )


def fit(trust, faults, *callbacks, model=None, data=None, everywhere=False, **options):
    """Train with faults at the steps that are its keys, in the gradient of the encoder's first layer or of all."""
    model = model or model_of()
    weights = [*model.parameters()] if everywhere else [next(model.encoder.parameters())]

    def change(gradient):
        kind = faults.get(model.trainer.global_step)
        return gradient if kind is None else torch.full_like(gradient, VALUES[kind])

    # where gradients are added up, since hooks of a weight are reason enough for a look at each step
    ends = [weight.view_as(weight).grad_fn.next_functions[0][0] for weight in weights if weight.requires_grad]
    hooks = [end.register_prehook(lambda gradients: (change(gradients[0]),)) for end in ends]
    guard = FaultGuard()
    trainer = quiet_trainer(callbacks=[guard, *callbacks], **{"max_epochs": 2} | options)
    before = fast_loop.defer_checks
    if not trust:
        fast_loop.defer_checks = lambda trainer: False
    try:
        trainer.fit(model, data or data_of())
    finally:
        fast_loop.defer_checks = before
        for hook in hooks:
            hook.remove()
    return trainer, guard


def outcome(trainer, guard):
    optimizer = trainer.optimizers[0].state_dict()
    tensors = [*trainer.lightning_module.state_dict().values()]
    tensors += [value for state in optimizer["state"].values() for value in state.values()]
    rates = [group["lr"] for group in optimizer["param_groups"]]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return tensors, [guard.state_dict(), rates, repr(metrics), trainer.global_step, trainer.fit_loop.state_dict()]


def assert_same(found, expected):
    for one, other in zip(found[0], expected[0], strict=True):
        assert torch.equal(one, other)
    assert found[1] == expected[1]


def lines(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]


# ---- the same end ---------------------------------------------------------------------------------------------------

# the first step of an epoch is looked at: the trust begins at step 1, with periods 1-8, 9-16, 17-24 and 25-29
FAULTS = {
    "none": ({}, []),
    "first of all": ({0: "nan"}, []),
    "first on trust": ({1: "nan"}, [1]),
    # its moments are bad for good, its weights are as good as any: seen by the look after the period
    "overflow": ({10: "overflow"}, [8]),
    "sum of squares": ({9: "sum"}, [8]),
    "last of a period": ({16: "inf"}, [8]),
    "last of an epoch": ({29: "nan"}, [5]),
    "first of the second epoch": ({30: "overflow"}, []),
    "two in a row": ({11: "nan", 12: "inf"}, [3]),
    "in both epochs": ({4: "nan", 20: "nan", 40: "inf"}, [4, 2]),
    "large and good": ({10: "large"}, []),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_deferred_checks_match_checked_steps(name, went_back, capsys):
    faults, taken_back = FAULTS[name]
    expected = outcome(*fit(False, faults))
    said = lines(capsys)
    assert went_back == []
    assert_same(outcome(*fit(True, faults)), expected)
    assert lines(capsys) == said
    assert len(said) == sum(kind != "large" for kind in faults.values())
    assert went_back == taken_back


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"lr_schedule": "cosine", "warmup_steps": 5},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"name": "denoising_ae"},
        {"name": "dense_ae"},
        {"optimizer": "adam:eps=1e-4"},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_replay_restores_schedule_noise_and_weight_decay(settings, went_back):
    faults = {5: "nan", 13: "overflow", 36: "overflow"}
    expected, found = (outcome(*fit(trust, faults, model=model_of(**settings))) for trust in (False, True))
    assert_same(found, expected)
    assert len(went_back) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "of_model", "of_data"),
    [
        (4, {"hidden_dims": (5,)}, {"binarise": "dynamic"}),
        # weights in channels_last, in which the kernel reads them as they lie in memory
        (8, {"hidden_dims": (4, 8), "net": "conv"}, {}),
    ],
    ids=["drawn", "convolutions"],
)
def test_replay_reproduces_image_batches(n, of_model, of_data, went_back):
    x = torch.randint(0, 256, (240, 1, n, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ends = []
    for trust in (False, True):
        torch.manual_seed(0)
        model = aezoo.create_model("vae", (1, n, n), latent_dim=2, **of_model)
        data = DataModule.from_arrays(x, batch_size=8, val_fraction=0, test_fraction=0, **of_data)
        ends.append(outcome(*fit(trust, {7: "overflow", 38: "nan"}, model=model, data=data)))
    assert_same(*ends)
    assert len(went_back) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_replay_works_with_compiled_step(went_back, monkeypatch):
    if not joint_backward.can_trace():
        pytest.skip("this torch compiles no gradients")
    faults, original, calls = {5: "nan", 38: "overflow"}, joint_backward.JointStep.step, []

    def step(self, x, y):
        result, weight = original(self, x, y), next(self._module.encoder.parameters())
        calls.append(self._module.trainer.global_step)
        if calls[-1] in faults:
            weight.grad = torch.full_like(weight, VALUES[faults[calls[-1]]])
        return result

    monkeypatch.setattr(joint_backward.JointStep, "step", step)
    ends = []
    for trust in (False, True):
        model = model_of("dense_ae")
        model.compile_mode = "default"
        ends.append(outcome(*fit(trust, {}, model=model)))
    assert_same(*ends)
    assert len(went_back) == 2
    assert calls[: 2 * BATCHES] == [*range(2 * BATCHES)]


@of_the_zoo
class InfiniteAt11(DenseAE):
    def loss(self, x, y=None):
        terms = super().loss(x, y)
        return terms if self.trainer.global_step != 11 else terms | {"loss": terms["loss"] + math.inf}


@of_the_zoo
class InfiniteCodes(aezoo.model_class("vq_vae")):
    def loss(self, x, y=None):
        terms = super().loss(x, y)
        return terms if self.trainer.global_step not in (1, 36, 37) else terms | {"loss": terms["loss"] + math.inf}


def test_non_finite_loss_alone_needs_no_replay(went_back):
    ends = []
    for trust in (False, True):
        torch.manual_seed(0)
        ends.append(outcome(*fit(trust, {}, model=InfiniteAt11((6,), latent_dim=2, hidden_dims=(5,)))))
    assert_same(*ends)
    assert ends[0][1][0]["skipped"] == 1
    assert went_back == []


@pytest.mark.parametrize("settings", [{}, {"lr_schedule": "cosine"}], ids=["constant", "cosine"])
def test_patience_ends_run_at_same_step_as_stepwise_checks(settings, went_back, tmp_path):
    """With everything as it was there: a file that is written then is the same."""
    faults, ends = dict.fromkeys(range(2, 30), "overflow"), []
    for trust in (False, True):
        model, where = model_of(**settings), tmp_path / str(trust)
        writer = ModelCheckpoint(where, save_on_exception=True)
        with pytest.raises(AezooError, match="5 steps in a row were not finite") as error:
            fit(trust, faults, writer, model=model, default_root_dir=tmp_path, enable_checkpointing=True)
        assert not model._state_dict_pre_hooks
        (file,) = where.iterdir()
        stored = torch.load(file, weights_only=True)
        told = str(error.value).replace(str(file), "FILE")
        ends.append((file.name, told, stored["loops"], repr(stored["lr_schedulers"]), _tensors(stored)))
    (*expected, tensors), (*found, tensors_on_trust) = ends
    assert found == expected
    assert all(torch.equal(one, other) for one, other in zip(tensors_on_trust, tensors, strict=True))
    assert went_back == [8]


@pytest.mark.slow
def test_replay_restores_one_cycle_schedule(went_back, monkeypatch):
    def one_cycle(self):
        optimizer = torch.optim.Adam(self.parameters(), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=2 * BATCHES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    monkeypatch.setattr(VAE, "configure_optimizers", one_cycle)
    expected, found = (outcome(*fit(trust, {5: "overflow", 56: "overflow"})) for trust in (False, True))
    assert_same(found, expected)
    assert went_back == [8, 5]


@of_the_zoo
class Refuses(DenseAE):
    def loss(self, x, y=None):
        if not all(weight.isfinite().all() for weight in self.parameters()):
            raise RuntimeError("weights are not finite")
        return super().loss(x, y)


@pytest.mark.slow
def test_step_that_fails_on_bad_weights_is_replayed(went_back):
    """As a factorisation refuses them; looked at one by one, there would be none."""
    ends = []
    for trust in (False, True):
        torch.manual_seed(0)
        ends.append(outcome(*fit(trust, {11: "nan"}, model=Refuses((6,), latent_dim=2, hidden_dims=(5,)))))
    assert_same(*ends)
    assert went_back == [3]


def test_error_in_training_step_is_raised(went_back):
    @of_the_zoo
    class Fails(Refuses):
        def loss(self, x, y=None):
            if self.trainer.global_step == 12:
                raise ValueError("of the loss")
            return super().loss(x, y)

    with pytest.raises(ValueError, match="of the loss"):
        fit(True, {}, model=Fails((6,), latent_dim=2, hidden_dims=(5,)))
    assert went_back == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan", "overflow"])
def test_replay_restores_buffers(kind, went_back):
    """A codebook of running means, which a step changes before anybody knows whether it was good."""
    ends = []
    for trust in (False, True):
        torch.manual_seed(0)
        model = aezoo.create_model("vq_vae", (6,), net="mlp", latent_dim=2, places=2, codebook_size=7, hidden_dims=(5,))
        ends.append(outcome(*fit(trust, {5: kind, 13: kind, 36: kind}, model=model)))
    assert_same(*ends)
    assert len(went_back) == 2


@pytest.mark.slow
def test_non_finite_loss_leaves_buffers_unchanged(went_back):
    ends = []
    for trust in (False, True):
        torch.manual_seed(0)
        model = InfiniteCodes((6,), net="mlp", latent_dim=2, places=2, codebook_size=7, hidden_dims=(5,))
        ends.append(outcome(*fit(trust, {}, model=model)))
    assert_same(*ends)
    assert ends[0][1][0]["skipped"] == 3
    # at step 1 there is nothing to take again, and still the codebook has changed
    assert went_back == [0, 5]


@pytest.mark.parametrize("name", others_slow([*OF_EACH_KIND, "diffusers_ae"]))
def test_deferred_checks_match_stepwise_checks(name, went_back, monkeypatch):
    monkeypatch.setattr(deferred_checks, "PERIOD", 4)
    asked, trust = [], fast_loop.defer_checks
    monkeypatch.setattr(fast_loop, "defer_checks", lambda trainer: asked.append(trust(trainer)))
    x = torch.randint(0, 256, (10 * 8, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    y = torch.arange(len(x)) % 4
    ends = []
    for trusts in (False, True):
        torch.manual_seed(0)
        model = aezoo.create_model(name, (1, 8, 8))
        data = DataModule.from_arrays(x, y, batch_size=8, val_fraction=0, test_fraction=0)
        faults = {3: "nan", 8: "overflow"}
        ends.append(outcome(*fit(trusts, faults, model=model, data=data, everywhere=True)))
    assert_same(*ends)
    assert ends[0][1][0]["skipped"] >= 1
    # layers of another package may keep something of a step
    trusted = name != "diffusers_ae"
    assert bool(went_back) == any(asked) == trusted


@pytest.mark.parametrize("kind", ["nan", "inf", "overflow", "sum"])
@pytest.mark.parametrize("optimizer", others_slow(OPTIMIZERS, kept=("adam", "sgd")))
def test_deferred_checks_match_stepwise_for_every_optimiser(optimizer, kind, went_back):
    faults = {4: kind, 43: kind}
    ends = [outcome(*fit(trust, faults, model=model_of(optimizer=optimizer))) for trust in (False, True)]
    assert_same(*ends)
    assert ends[0][1][0]["skipped"] == 2
    # the momentum of SGD tells too little
    assert len(went_back) == (0 if optimizer == "sgd" else 2)


# ---- nobody reads weights that are bad ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Checkpoints, ModelCheckpoint])
@pytest.mark.parametrize("step", [11, 12])
def test_mid_epoch_checkpoint_holds_valid_weights(kind, step, went_back, tmp_path):
    """Step 11 is the one after which the file is written: its loss was finite, its gradient was not."""
    faults, files = {step - 1: "overflow"}, []
    for trust in (False, True):
        folder = tmp_path / str(trust)
        if kind is Checkpoints:
            writer = Checkpoints(every_n_steps=12, dirpath=str(folder))
        else:
            writer = ModelCheckpoint(folder, every_n_train_steps=12, save_top_k=-1, filename="{step}")
        fit(trust, faults, writer, enable_checkpointing=True, max_epochs=1, limit_train_batches=20)
        name = "previous.ckpt" if kind is Checkpoints else "step=12.ckpt"
        files.append(torch.load(folder / name, weights_only=True))
    expected, found = files
    assert found["global_step"] == expected["global_step"] == 12
    assert found["loops"] == expected["loops"]
    for one, other in zip(_tensors(found), _tensors(expected), strict=True):
        assert torch.equal(one, other)
    key = next(key for key in found["callbacks"] if key.startswith("FaultGuard"))
    assert found["callbacks"][key] == expected["callbacks"][key]
    assert found["callbacks"][key]["skipped"] == 1
    assert len(went_back) == 1


def _tensors(file):
    moments = [value for state in file["optimizer_states"][0]["state"].values() for value in state.values()]
    return [*file["state_dict"].values(), *moments, file["aezoo"]["means"]["sums"]]


class Reads(pl.Callback):
    """Looks at the weights where the trust has ended."""

    def __init__(self):
        self.seen = []

    def on_validation_start(self, trainer, pl_module):
        self.seen += [value.clone() for value in pl_module.parameters()]

    on_train_epoch_end = on_validation_start


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"max_epochs": 2}, {"max_epochs": 2, "limit_train_batches": 13}, {"max_steps": 20}]
)
def test_weights_read_after_epoch_match_stepwise_checks(options, went_back):
    ends = []
    for trust in (False, True):
        reads = Reads()
        data = data_of(40, val_fraction=0.25)
        faults = {12: "overflow", 19: "nan", 25: "nan", 29: "overflow"}
        ends.append((outcome(*fit(trust, faults, reads, data=data, **options)), reads.seen))
    (expected, seen), (found, seen_on_trust) = ends
    assert_same(found, expected)
    assert seen
    assert all(torch.equal(one, other) for one, other in zip(seen_on_trust, seen, strict=True))
    assert went_back


class Stops(pl.Callback):
    """Ends a fit at a step, as Ctrl-C does; what it does between two batches leaves weights alone."""

    reads_no_weights = True

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 13:
            raise KeyboardInterrupt


def test_interruption_leaves_valid_weights(went_back):
    ends = []
    for trust in (False, True):
        model = model_of()
        with pytest.raises(SystemExit):
            fit(trust, {11: "overflow"}, Stops(), model=model)
        ends.append([*model.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert went_back == [4]
    assert not model._state_dict_pre_hooks


def test_interrupt_during_replay_keeps_good_weights(monkeypatch, tmp_path):
    """Those of the last step that was taken again, with the counters of that step, for who saves them."""
    replay_step, calls = fast_loop.FastLoop.replay_step, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        replay_step(self, *args)

    model = model_of()
    writer = ModelCheckpoint(tmp_path, save_on_exception=True)
    monkeypatch.setattr(fast_loop.FastLoop, "replay_step", interrupted)
    with pytest.raises(SystemExit):
        fit(True, {12: "nan"}, writer, model=model, enable_checkpointing=True)
    assert not model._state_dict_pre_hooks
    # trusted from step 9 on, and taken again: 9 and 10
    (file,) = tmp_path.iterdir()
    assert file.name == "epoch=0-step=11.ckpt"
    trainer, _ = fit(False, {}, max_steps=11)
    for one, other in zip(model.parameters(), trainer.lightning_module.parameters(), strict=True):
        assert torch.equal(one, other)


class Saves(pl.Callback):
    """Asks for the weights where nobody wants gradients."""

    reads_no_weights = True

    def on_train_batch_end(self, trainer, pl_module, *args):
        with torch.no_grad():
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
            self.finite = all(value.isfinite().all() for value in self.weights.values())


@pytest.mark.slow
def test_replay_works_without_gradients_enabled(went_back):
    ends = []
    for trust in (False, True):
        saves = Saves()
        ends.append(outcome(*fit(trust, {13: "nan"}, saves)))
        assert saves.finite
    assert_same(*ends)
    assert went_back == [1]


def test_model_can_be_copied_after_fit():
    model = model_of()
    fit(True, {5: "nan"}, model=model)
    copy.deepcopy(model)
    assert not model._state_dict_pre_hooks


# ---- where steps are looked at one by one ---------------------------------------------------------------------------


class Own(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        pass


class Within(pl.Callback):
    def on_after_backward(self, trainer, pl_module):
        pass


class OwnCheckpoints(Checkpoints):
    """Not one that the zoo has looked at."""


class OwnThroughput(Throughput):
    """Nor this."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callbacks", "options", "trusted"),
    [
        ([Throughput, Checkpoints], {"enable_checkpointing": True}, True),
        ([Own], {}, False),
        ([Within], {}, False),
        ([OwnCheckpoints], {"enable_checkpointing": True}, False),
        ([OwnThroughput], {}, False),
        ([lambda: EMA(0.9)], {}, False),
        ([lambda: BetaAnnealing(n_steps=10)], {}, False),
        ([], {"accumulate_grad_batches": 2}, False),
        ([], {"gradient_clip_val": 1.0}, False),
        ([], {"val_check_interval": 5}, False),
    ],
)
def test_no_deferred_checks_when_callbacks_read_steps(callbacks, options, trusted, monkeypatch, tmp_path):
    plans = []
    trust = fast_loop.defer_checks
    monkeypatch.setattr(fast_loop, "defer_checks", lambda trainer: plans.append(trust(trainer)))
    made = [callback() for callback in callbacks]
    fit(True, {}, *made, data=data_of(val_fraction=0.2), default_root_dir=tmp_path, max_epochs=1, **options)
    assert plans == [trusted]


class OwnLoader(ResidentLoader):
    """Batches that are drawn from what the step draws from."""


def hooked(model, data, loader):
    model.encoder.register_forward_hook(lambda *args: None)


def watched(model, data, loader):
    next(model.encoder.children()).register_full_backward_hook(lambda *args: None)


def watched_weight(model, data, loader):
    next(model.parameters()).register_hook(lambda gradient: None)


def watched_sum(model, data, loader):
    next(model.parameters()).register_post_accumulate_grad_hook(lambda weight: None)


def own_loss(model, data, loader):
    model.loss = model.loss


def own_layer(model, data, loader):
    model.extra = type("Layer", (nn.Identity,), {})()


def own_transfer(model, data, loader):
    data.on_after_batch_transfer = data.on_after_batch_transfer


def own_transform(model, data, loader):
    loader.transform = lambda batches, sampler: batches


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [hooked, watched, watched_weight, watched_sum, own_loss, own_layer, own_transfer, own_transform]
)
def test_no_deferred_checks_with_custom_components(change, went_back, monkeypatch):
    model, data = model_of(), data_of()
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    monkeypatch.setattr(DataModule, "train_dataloader", lambda self: loader)
    assert _goes_back(model, data, went_back)
    change(model, data, loader)
    assert not _goes_back(model, data, went_back)


def test_hook_added_at_epoch_disables_deferred_checks(went_back):
    class Hooks(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.encoder.register_forward_hook(lambda *args: None)

    fit(True, {5: "nan", BATCHES + 5: "nan"}, Hooks())
    assert len(went_back) == 1


def test_global_module_hooks_disable_deferred_checks(went_back):
    hook = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not _goes_back(model_of(), data_of(), went_back)
    finally:
        hook.remove()
    assert _goes_back(model_of(), data_of(), went_back)


def _goes_back(model, data, went_back):
    went_back.clear()
    _, guard = fit(True, {5: "nan"}, model=model, data=data, max_epochs=1)
    assert guard.skipped == 1
    return bool(went_back)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_custom_loader_disables_deferred_checks(went_back):
    x = torch.rand(BATCHES * 8, 6)
    for kind, trusted in ((ResidentLoader, True), (OwnLoader, False)):
        assert _goes_back(model_of(), kind(x, batch_size=8, shuffle=True), went_back) == trusted


class Accumulates(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        trainer.accumulate_grad_batches = 1 + trainer.current_epoch


@pytest.mark.slow
def test_gradient_accumulation_disables_deferred_checks(went_back):
    faults = {5: "nan", 35: "overflow"}
    expected, found = (outcome(*fit(trust, faults, Accumulates())) for trust in (False, True))
    assert_same(found, expected)
    assert went_back == [5]


@pytest.mark.slow
def test_anomaly_detection_disables_deferred_checks(went_back):
    expected, found = (outcome(*fit(trust, {5: "overflow"}, detect_anomaly=True)) for trust in (False, True))
    assert_same(found, expected)
    assert went_back == []


class Plugin(VAE):
    """A model that is not the zoo's own, and may remember what it likes."""


@pytest.mark.slow
def test_plugins_and_sgd_disable_deferred_checks(monkeypatch, went_back):
    asked = []
    trust = fast_loop.defer_checks
    monkeypatch.setattr(fast_loop, "defer_checks", lambda trainer: asked.append(trust(trainer)))
    fit(True, {5: "nan"}, model=Plugin((6,), latent_dim=2, hidden_dims=(5,)))
    assert asked == []
    # asked for, but its momentum tells too little
    fit(True, {5: "nan"}, model=model_of(optimizer="sgd"))
    assert asked == [True]
    assert went_back == []


def test_optimiser_hook_disables_deferred_checks(went_back, monkeypatch):
    seen = []

    def watched(self):
        optimizer = torch.optim.Adam(self.parameters(), 0.01, fused=True)
        optimizer.register_step_post_hook(lambda *_: seen.append(all(p.isfinite().all() for p in self.parameters())))
        return optimizer

    monkeypatch.setattr(VAE, "configure_optimizers", watched)
    _, guard = fit(True, {5: "nan"})
    assert guard.skipped == 1
    assert len(seen) == 2 * BATCHES
    assert all(seen)
    assert went_back == []


def test_fast_decaying_moments_disable_deferred_checks(went_back, monkeypatch):
    def short_memory(self):
        return torch.optim.Adam(self.parameters(), betas=(0.9, 0.5), fused=True)

    monkeypatch.setattr(VAE, "configure_optimizers", short_memory)
    _, guard = fit(True, {5: "nan"})
    assert guard.skipped == 1
    assert went_back == []


@pytest.mark.slow
def test_fault_is_detected_after_epoch_of_moment_decay(went_back, monkeypatch):
    def adam(self):
        return torch.optim.Adam(self.parameters(), betas=(0.9, 0.9), fused=True)

    monkeypatch.setattr(deferred_checks, "PERIOD", 256)
    monkeypatch.setattr(VAE, "configure_optimizers", adam)
    faults = {1: "sum"}
    expected, found = (outcome(*fit(trust, faults)) for trust in (False, True))
    assert_same(found, expected)
    assert went_back == [BATCHES - 1]


def test_slow_steps_are_checked_more_often(went_back, monkeypatch):
    monkeypatch.setattr(deferred_checks, "SECONDS", 0.0)
    faults = {10: "overflow", 31: "overflow"}
    expected, found = (outcome(*fit(trust, faults)) for trust in (False, True))
    assert_same(found, expected)
    assert went_back == [1, 1]


def test_checks_are_immediate_without_memory_for_a_copy(went_back, monkeypatch):
    sizes = []
    monkeypatch.setattr(deferred_checks, "fits_in_memory", lambda size, device, processes: sizes.append(size))
    trainer, guard = fit(True, {5: "nan"})
    assert guard.skipped == 1
    assert went_back == []
    # weights, two moments, and a count each; asked once an epoch
    tensors = [*trainer.lightning_module.parameters()]
    assert sizes == [4 * (3 * sum(tensor.numel() for tensor in tensors) + len(tensors))] * 2


@of_the_zoo
class Late(VAE):
    """A weight that has gradients in some steps alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.late = nn.Parameter(torch.ones(3))

    def loss(self, x, y=None):
        terms = super().loss(x, y)
        if self.training and self.trainer.global_step % 13 in (5, 6, 7, 8):
            terms["loss"] = terms["loss"] + self.late.square().sum()
        return terms


LATE = [{4: "nan"}, {5: "nan"}, {6: "nan"}, {8: "overflow", 9: "overflow"}, {3: "overflow", 18: "inf", 45: "nan"}]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "radam"])
@pytest.mark.parametrize("faults", LATE)
def test_intermittent_gradients_match_checked_steps(faults, optimizer, went_back):
    ends = []
    for trust in (False, True):
        torch.manual_seed(0)
        model = Late((6,), latent_dim=2, hidden_dims=(5,), lr=0.01, optimizer=optimizer)
        ends.append(outcome(*fit(trust, faults, model=model)))
    assert_same(*ends)
    assert ends[0][1][0]["skipped"] == len(faults)
    # a step with a gradient for the first time is looked at
    assert bool(went_back) == (faults != {5: "nan"})
