"""Capture of whole training steps, with a recorder on the CPU instead of CUDA's."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from quiet_trainer import quiet_trainer
from torch import nn

import aezoo
from aezoo.data import DataModule
from aezoo.data.resident import ResidentLoader
from aezoo.speed import fast_loop, graph_capture
from aezoo.speed.graph_capture import WARM_UP, CapturedStep
from aezoo.speed.step_plan import Plan
from aezoo.training.projected_weights import Constrained


class Recorder:
    """A recorder whose replay runs the step again and copies its results to the memory of the first ones."""

    def __init__(self):
        self.log = []

    def warm_up(self, step):
        self.log.append("warm-up")
        return step()

    def record(self, step):
        self.log.append("record")
        # CUDA allocates results and gradients while it records, and does not compute them
        result = [torch.full((), torch.nan), torch.full((2,), torch.nan)]
        for p in self.parameters:
            p.grad = torch.full_like(p, torch.nan)
        gradients = [p.grad for p in self.parameters]

        def replay():
            self.log.append("replay")
            held = [p.grad for p in self.parameters]
            for p in self.parameters:
                p.grad = None  # a graph overwrites gradients
            for place, new in zip(result, step(), strict=True):
                place.copy_(new)
            for p, place, before in zip(self.parameters, gradients, held, strict=True):
                place.copy_(p.grad)
                p.grad = before

        return replay, tuple(result)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def step_of(module, optimizer, seen=None):
    def step(x, y):
        if seen is not None:
            seen.append((x.data_ptr(), [p.grad is None for p in module.parameters()]))
        loss = (module(x) - x).square().mean() + (0 if y is None else y.float().mean())
        loss.backward()
        optimizer.step()
        return loss.detach(), torch.stack([loss.detach(), loss.detach() * 2])

    return step


def batches(n=9, odd=(6,)):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(2 if i in odd else 5, 3, generator=generator) for i in range(n)]


def captured(module, seen=None, **plain):
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    recorder = Recorder()
    recorder.parameters = list(module.parameters())
    made = CapturedStep(step_of(module, optimizer, seen), recorder.parameters, recorder, **plain)
    return made, optimizer, recorder


@pytest.mark.parametrize("labels", [True, False])
def test_captured_step_matches_plain_step(labels):
    module, plain = net(), net()
    step, optimizer, recorder = captured(module)
    other = torch.optim.Adam(plain.parameters(), lr=0.1)
    for i, x in enumerate(batches()):
        y = torch.arange(len(x)) + i if labels else None
        loss, values = step(x, y)
        other.zero_grad()
        wanted, wanted_values = step_of(plain, other)(x, y)
        assert torch.equal(loss, wanted) and torch.equal(values, wanted_values)
        for p, q in zip(module.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q)
            if len(x) == 5:
                assert torch.equal(p.grad, q.grad)
    for state, wanted in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(state[key], value) for key, value in wanted.items())
    assert recorder.log == ["warm-up"] * WARM_UP + ["record"] + ["replay"] * (9 - WARM_UP - 1)
    assert step.replays == 9 - WARM_UP - 1


def test_replay_reads_same_memory_and_keeps_batch():
    module, seen = net(), []
    step, _, _ = captured(module, seen)
    kept = batches(odd=())
    for x in kept:
        before = x.clone()
        step(x, None)
        assert torch.equal(x, before)
    pointers = [pointer for pointer, _ in seen]
    assert len(set(pointers[WARM_UP:])) == 1
    assert pointers[-1] not in {x.data_ptr() for x in kept}


def test_capture_starts_without_gradients():
    module, seen = net(), []
    step, _, _ = captured(module, seen)
    for i, x in enumerate(batches()):
        step(x, None)
        if i > 5:
            # also after a batch of another size: the memory that the recording writes to
            assert all(p.grad is g for p, g in zip(module.parameters(), step._gradients, strict=True))
    assert all(all(none) for _, none in seen[: WARM_UP + 1])
    assert all(seen[6][1])


@pytest.mark.parametrize("least", [5, 0])
def test_partial_first_batch_does_not_set_known_batch_size(least):
    step, _, recorder = captured(net(), least=least)
    for x in (torch.rand(2, 3), *[torch.rand(5, 3)] * 6):
        step(x, None)
    full = ["warm-up"] * WARM_UP + ["record"] + ["replay"] * (6 - WARM_UP)
    assert recorder.log == (full if least else ["warm-up"]) and step.replays == (6 - WARM_UP if least else 0)


def test_cuda_recorder_follows_capture_protocol():
    recorder = graph_capture.CudaRecorder()
    assert callable(recorder.warm_up) and callable(recorder.record)
    assert isinstance(CapturedStep(lambda x, y: None, [])._recorder, graph_capture.CudaRecorder)


# ---- training run ----------------------------------------------------------------------------------------------------


class Watch(pl.Callback):
    """A capturable callback within the step."""

    capturable = True

    def __init__(self):
        self.in_step, self.told, self.ended = 0, 0, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.in_step += 1

    def replayed(self):
        self.told += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ended.append((trainer.global_step, batch_idx, float(outputs["loss"]), sorted(outputs)))


class CpuRecorder:
    """The same for models of the zoo, whose results are a dictionary and a vector."""

    def warm_up(self, step):
        return step()

    def record(self, step):
        first = []

        def replay():
            terms, values = step()
            if not first:
                first.append((terms, values))
                results[0].update(terms)
                results.append(values)
            for name, term in terms.items():
                results[0][name].copy_(term)
            results[1].copy_(values)

        results = [{}]

        class Pair:
            def __iter__(self):
                return iter(results)

        return replay, Pair()


def fit(capturing, watch, **plain):
    torch.manual_seed(0)
    x = torch.rand(46, 6, generator=torch.Generator().manual_seed(1))
    data = DataModule.from_arrays(x, batch_size=4, val_fraction=0.1, test_fraction=0, seed=3)
    model = aezoo.create_model("vae", (6,), latent_dim=2, hidden_dims=(8,))

    class Capture(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if capturing and trainer.current_epoch == 0:
                light = trainer.fit_loop.epoch_loop
                parameters = [p for p in pl_module.parameters() if p.requires_grad]

                def step(x, y):
                    for p in parameters:
                        p.grad = None
                    return light.recorded_step(x, y)

                light.plan.captured = CapturedStep(step, parameters, CpuRecorder())

    trainer = quiet_trainer(**{"max_epochs": 2} | plain, callbacks=[Capture(), watch])
    trainer.fit(model, data)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_captured_run_matches_plain_run(precision):
    one, other = Watch(), Watch()
    plain, replayed = fit(False, one, precision=precision), fit(True, other, precision=precision)
    assert one.ended == other.ended and len(one.ended) == 22
    assert plain.fit_loop.state_dict() == replayed.fit_loop.state_dict()
    for a, b in zip(plain.lightning_module.parameters(), replayed.lightning_module.parameters(), strict=True):
        assert torch.equal(a, b)
    metrics = replayed.callback_metrics
    assert {key: float(v) for key, v in plain.callback_metrics.items()} == {k: float(v) for k, v in metrics.items()}
    # called at each replay: not in the warm-up, and not for the two incomplete batches
    assert one.told == 0 and other.told == 22 - WARM_UP - 2


@pytest.mark.parametrize("change", ["accumulation", "schedule"])
def test_changed_training_settings_end_graph_replay(change):
    watch = Watch()

    class Change(Watch):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                if change == "accumulation":
                    trainer.accumulate_grad_batches = 2
                else:
                    optimizer = trainer.optimizers[0]
                    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
                    trainer.strategy.lr_scheduler_configs = [pl.utilities.types.LRSchedulerConfig(schedule)]

    watch = Change()
    trainer = fit(True, watch)
    assert watch.told == 11 - WARM_UP - 1
    assert trainer.global_step == 11 + (6 if change == "accumulation" else 11)


class OnGpu:
    """A trainer that pretends to train on a GPU; nothing runs there."""

    strategy = type("Strategy", (), {"root_device": torch.device("cuda", 0)})()

    def __init__(self, trainer):
        self._trainer = trainer

    def __getattr__(self, name):
        return getattr(self._trainer, name)


def plan(**changes):
    """The plan of a run that can be captured, except for the changes."""
    seen = []

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if not changes.get("uncapturable"):
                trainer.optimizers[0].param_groups[0]["capturable"] = True
            loader = trainer.train_dataloader
            x = loader.x
            # a tensor that pretends to be on the GPU
            if not changes.get("on_host"):
                loader.x = type("X", (), {"device": OnGpu.strategy.root_device, "dtype": x.dtype})()
            seen.append(Plan(OnGpu(trainer)))
            loader.x = x
            trainer.should_stop = True
            trainer.optimizers[0].param_groups[0]["capturable"] = False

    cls = changes.get("cls", aezoo.model_class("dense_ae"))
    x = torch.rand(46, 6)
    callbacks = [*changes.get("callbacks", []), Look()]
    trainer = quiet_trainer(max_epochs=1, callbacks=callbacks, **changes.get("trainer", {}))
    model = cls((6,), latent_dim=2, **{"hidden_dims": (8,)} | changes.get("model", {}))
    trainer.fit(model, DataModule.from_arrays(x, batch_size=4, val_fraction=0, test_fraction=0))
    return seen[0]


class InStep(pl.Callback):
    def on_before_backward(self, trainer, pl_module, loss):
        pass


class AfterBackward(pl.Callback):
    def on_after_backward(self, trainer, pl_module):
        pass


class BeforeZero(pl.Callback):
    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        pass


class OwnStep(aezoo.model_class("dense_ae")):
    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)


class AfterStep(Constrained, aezoo.model_class("dense_ae")):
    def after_optimizer_step(self):
        pass


class OwnTransfer(aezoo.model_class("dense_ae")):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch


class InStepModule(aezoo.model_class("dense_ae")):
    def on_before_backward(self, loss):
        pass


@pytest.mark.filterwarnings("ignore:You have overridden `on_before_batch_transfer`")
@pytest.mark.parametrize(
    ("changes", "can"),
    [
        ({}, True),
        ({"callbacks": [Watch()]}, True),
        ({"uncapturable": True}, False),
        ({"on_host": True}, False),
        ({"callbacks": [InStep()]}, False),
        ({"callbacks": [AfterBackward()]}, False),
        ({"callbacks": [BeforeZero()]}, False),
        ({"callbacks": [GradientAccumulationScheduler({3: 2})]}, False),
        ({"trainer": {"accumulate_grad_batches": 2}}, False),
        ({"trainer": {"gradient_clip_val": 1.0}}, False),
        ({"model": {"lr_schedule": "cosine"}}, False),
        ({"cls": OwnStep}, False),
        ({"cls": AfterStep}, False),
        ({"cls": OwnTransfer}, False),
        ({"cls": InStepModule}, False),
    ],
)
def test_supported_plans_can_be_captured(changes, can):
    assert plan(**changes).can_capture is can


def test_a_cpu_run_is_not_captured():
    asked = []

    class Look(Watch):
        def on_train_epoch_start(self, trainer, pl_module):
            asked.append(fast_loop.capture_steps(trainer))
            assert isinstance(trainer.train_dataloader, ResidentLoader)

    fit(False, Look(), max_epochs=1)
    assert asked == [False]
