"""A joint graph of loss and gradients trains like two graphs, and is not used if something runs in between."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from quiet_trainer import quiet_trainer
from torch import nn

import aezoo
from aezoo.callbacks import FaultGuard
from aezoo.data import DataModule
from aezoo.speed.joint_backward import JointStep, can_trace
from aezoo.training import compilation
from aezoo.training.compilation import Compiled, consistent_compilation

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
]
DenseAE = aezoo.model_class("dense_ae")


@pytest.fixture(autouse=True)
def _can_trace():
    if not can_trace():
        pytest.skip("this torch compiles no gradients")


@pytest.fixture
def taken(monkeypatch):
    """The steps whose gradients came from the joint graph."""
    steps, original = [], JointStep.step

    def step(self, x, y):
        steps.append(self._module.trainer.global_step)
        return original(self, x, y)

    monkeypatch.setattr(JointStep, "step", step)
    return steps


class Two(nn.Module):
    """Two layers and a shift; two parameters share a gradient, another has none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)
        self.unused, self.shift = nn.Linear(2, 2), nn.Parameter(torch.zeros(3))
        self.again = nn.Parameter(torch.zeros(3))

    def terms(self, x, y):
        # a single tensor for autograd, so both have the same gradient
        out = self.second(self.first(x).tanh()) + (self.shift + self.again)
        loss = (out - x).square().mean() + (0 if y is None else y.float().mean())
        return {"loss": loss, "twice": 2 * loss}, torch.stack([loss, 2 * loss]).detach()


def joint_of(module, **plain):
    return JointStep(module, module.terms, "default", lambda: None, **plain)


def require_as_by_the_engine(module, x, y, terms, values):
    plain = copy.deepcopy(module)
    plain.zero_grad()
    wanted, wanted_values = plain.terms(x, y)
    wanted["loss"].backward()
    assert torch.equal(values, wanted_values)
    assert all(torch.equal(terms[name], value) and not terms[name].requires_grad for name, value in wanted.items())
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or (torch.equal(p.grad, q.grad) and p.grad.stride() == q.stride())


@pytest.mark.slow
@pytest.mark.parametrize("labels", [True, False])
def test_joint_step_matches_autograd_engine(graphs, labels):
    module = Two()
    step = joint_of(module).step
    for n in (5, 5, 2):  # the last one runs uncompiled
        x, y = torch.rand(n, 3), torch.arange(n) if labels else None
        require_as_by_the_engine(module, x, y, *step(x, y))
    assert module.unused.weight.grad is None and module.shift.grad is not None
    assert len(graphs) == 1


@pytest.mark.slow
def test_parameters_may_be_frozen_and_freed_between_steps(graphs):
    module, x = Two(), torch.rand(5, 3)
    step = joint_of(module).step
    for part, trained in ((module.first, False), (module.shift, False), (module.first, True)):
        step(x, None)
        part.requires_grad_(trained)
        require_as_by_the_engine(module, x, None, *step(x, None))


def test_gradients_do_not_share_memory(graphs):
    module = Two()
    joint_of(module).step(torch.rand(5, 3), None)
    assert torch.equal(module.shift.grad, module.again.grad)
    module.shift.grad.add_(1)
    assert not torch.equal(module.shift.grad, module.again.grad)


def test_gradients_have_layout_of_weights(graphs):
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3, 4))

        def terms(self, x, y):
            loss = (self.weight.t() * x).sum()
            return {"loss": loss}, loss.detach()[None]

    module, x = Transposed(), torch.rand(4, 3)
    assert torch.autograd.grad(module.terms(x, None)[0]["loss"], [module.weight])[0].stride() == (1, 3)
    joint_of(module).step(x, None)
    assert module.weight.grad.stride() == (4, 1) and torch.equal(module.weight.grad, x.t())


class Exact(nn.Module):
    """A layer in 16 bits and one in a region without autocast."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def terms(self, x, y):
        z = self.first(x)
        with torch.autocast("cpu", enabled=False):
            loss = self.second(z.float()).square().sum()
        return {"loss": loss}, loss.detach()[None]


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("n", [5, 2])  # compiled or not
def test_exact_regions_under_autocast_have_exact_gradients(aot_graphs, n, joined):
    module, x = Exact(), torch.rand(n, 3)
    plain, in_bf16 = copy.deepcopy(module), torch.autocast("cpu", torch.bfloat16)
    with in_bf16:
        loss = plain.terms(x, None)[0]["loss"]
    loss.backward()
    compiled = joint_of(module, least=5) if joined else Compiled(module.terms, "default", lambda: None, least=5)
    with consistent_compilation(), in_bf16:
        terms, _ = (compiled.step if joined else compiled)(x, None)
    if not joined:
        terms["loss"].backward()
    assert len(aot_graphs) == (n == 5)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(module.parameters(), plain.parameters(), strict=True))


@pytest.mark.slow
def test_dynamo_setting_is_restored(graphs):
    import torch._dynamo.config as settings

    faulty = Two()
    faulty.terms = lambda x, y: 1 / 0
    for before in (False, True):
        with settings.patch(trace_autograd_ops=before):
            joint_of(Two()).step(torch.rand(5, 3), None)
            assert settings.trace_autograd_ops is before
            with pytest.raises(ZeroDivisionError):
                joint_of(faulty).step(torch.rand(5, 3), None)
            assert settings.trace_autograd_ops is before


@pytest.mark.slow
def test_unsupported_torch_disables_joint_step(graphs, taken, monkeypatch):
    assert can_trace()
    monkeypatch.setattr("aezoo.speed.joint_backward._SETTING", "no_such_setting")
    assert not can_trace()
    fit(model())
    assert taken == [] and len(graphs) == 1


# ---- training runs ---------------------------------------------------------------------------------------------------


def model(name="dense_ae", mode="default", cls=None, **settings):
    torch.manual_seed(0)
    sizes = {"latent_dim": 8} if name == "sae_l1" else {"latent_dim": 2, "hidden_dims": (5,)}
    made = (cls or aezoo.model_class(name))((6,), **{"lr": 0.01} | sizes | settings)
    made.compile_mode = mode
    return made


def fit(module, *callbacks, epochs=2, **options):
    x = torch.rand(46, 6, generator=torch.Generator().manual_seed(1))
    data = DataModule.from_arrays(x, batch_size=8, val_fraction=0, test_fraction=0, seed=3)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=list(callbacks), **options)
    trainer.fit(module, data)
    return trainer


def end_of(trainer):
    module, optimizer = trainer.lightning_module, trainer.optimizers[0].state_dict()
    tensors = [*module.state_dict().values(), *(v for state in optimizer["state"].values() for v in state.values())]
    return (
        tensors,
        {name: float(value) for name, value in trainer.callback_metrics.items()},
        trainer.fit_loop.state_dict(),
    )


def require_same_end(one, other):
    (tensors, *rest), (wanted, *wanted_rest) = end_of(one), end_of(other)
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))
    assert rest == wanted_rest


STEPS = [*range(12)]
CASES = {
    "plain": ({}, {}),
    "noise": ({"name": "vae"}, {}),
    "schedule": ({"lr_schedule": "cosine", "warmup_steps": 3}, {}),
    "clipping by norm": ({}, {"gradient_clip_val": 0.01}),
    "clipping by value": ({}, {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}),
    "16 bits": ({}, {"precision": "bf16-mixed"}),
    "a constraint": ({"name": "sae_l1"}, {}),
    "buffers": ({"name": "vq_vae", "codebook_size": 4, "net": "mlp"}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "guarded"), [*((case, True) for case in CASES), ("plain", False), ("16 bits", False)])
def test_fit_with_joint_step_matches_engine(graphs, taken, monkeypatch, case, guarded):
    settings, options = CASES[case]
    ends = []
    for joined in (True, False):
        ends.append(fit(model(**settings), *([FaultGuard()] if guarded else []), **options))
        assert taken == (STEPS if joined else [])
        taken.clear()
        monkeypatch.setattr("aezoo.speed.fast_loop.set_joint_step", lambda trainer, joint: None)
    require_same_end(*ends)


class LooksBackward(pl.Callback):
    def __init__(self):
        self.seen = 0

    def on_after_backward(self, trainer, pl_module):
        assert any(p.grad is not None for p in pl_module.parameters())
        self.seen += 1


class LooksAtGradients(pl.Callback):
    """Reads gradients before the step, which does not depend on how they were computed."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(float(sum(p.grad.square().sum() for p in pl_module.parameters())))


class Own(DenseAE):
    """A subclass that is not from aezoo."""


class OwnBackward(DenseAE):
    def backward(self, loss):
        (2 * loss).backward()


OwnBackward.__module__ = DenseAE.__module__


def forget(weight):
    weight.grad.zero_()


def hooked(after=False):
    module = model()
    weight = next(module.parameters())
    if after:
        weight.register_post_accumulate_grad_hook(forget)
    else:
        weight.register_hook(lambda gradient: 0 * gradient)
    return module


class HooksAfter(pl.Callback):
    """Adds a hook in the middle of an epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            next(pl_module.parameters()).register_post_accumulate_grad_hook(forget)


class Hooks(pl.Callback):
    """Adds a hook for a single step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            self._hook = next(pl_module.parameters()).register_hook(lambda gradient: 0 * gradient)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        outputs["loss"].mul_(0)
        if trainer.global_step == 3:
            self._hook.remove()
            del self._hook


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "callbacks", "options", "steps"),
    [
        (model, [LooksAtGradients], {}, STEPS),
        (model, [LooksBackward], {}, []),
        (model, [], {"accumulate_grad_batches": 2}, []),
        (model, [], {"detect_anomaly": True}, []),
        (lambda: model(mode="off"), [], {}, []),
        (lambda: model(cls=Own), [], {}, []),
        (lambda: model(cls=OwnBackward), [], {}, []),
        (hooked, [], {}, []),
        (lambda: hooked(after=True), [], {}, []),
        (model, [Hooks], {}, [0, 1, *STEPS[3:]]),
        (model, [HooksAfter], {}, [0, 1]),
    ],
    ids=[
        "gradients",
        "backward",
        "accumulation",
        "anomalies",
        "off",
        "elsewhere",
        "own backward",
        "hook",
        "hook after",
        "hooks",
        "hooks after",
    ],
)
def test_joint_step_is_used_only_without_observers(graphs, taken, monkeypatch, build, callbacks, options, steps):
    made = [callback() for callback in callbacks]
    found = fit(build(), *made, **options)
    assert taken == steps
    monkeypatch.setattr("aezoo.speed.fast_loop.set_joint_step", lambda trainer, joint: None)
    others = [callback() for callback in callbacks]
    require_same_end(found, fit(build(), *others, **options))
    for one, other in zip(made, others, strict=True):
        assert getattr(one, "seen", None) == getattr(other, "seen", None)


@pytest.mark.slow
def test_callback_added_mid_fit_is_respected(graphs, taken):
    late = LooksBackward()

    class Adds(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3:
                trainer.callbacks.append(late)

    fit(model(), Adds(), epochs=1)
    assert taken == [0, 1, 2] and late.seen == 3


@pytest.mark.slow
def test_replaced_parameter_is_trained_within_epoch(graphs, taken, monkeypatch):
    class Exchanges(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *batch):
            if trainer.global_step == 2:
                layer, parameters = pl_module.encoder[0][1], trainer.optimizers[0].param_groups[0]["params"]
                place = next(i for i, p in enumerate(parameters) if p is layer.weight)
                layer.weight = parameters[place] = nn.Parameter(layer.weight.detach() / 2)

    ends = [fit(model(), Exchanges())]
    assert taken == STEPS
    monkeypatch.setattr("aezoo.speed.fast_loop.set_joint_step", lambda trainer, joint: None)
    ends.append(fit(model(), Exchanges()))
    weights = [trainer.lightning_module.state_dict().values() for trainer in ends]
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's compiler
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("joined", [True, False])
def test_layer_hooks_added_and_removed_mid_epoch_are_called(graphs, taken, monkeypatch, joined, backward):
    def halve(layer, inputs, outputs):
        return tuple(g if g is None else g / 2 for g in inputs) if backward else outputs / 2

    class Hooks(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *batch):
            layer = pl_module.decoder
            if trainer.global_step == 2:
                self._hook = (layer.register_full_backward_hook if backward else layer.register_forward_hook)(halve)
            elif trainer.global_step == 4:
                self._hook.remove()

    if not joined:
        monkeypatch.setattr("aezoo.speed.fast_loop.set_joint_step", lambda trainer, joint: None)
    ends = [fit(model(mode=mode), Hooks()) for mode in ("default", "off")]
    assert taken == (STEPS if joined else [])
    for one, other in zip(*(end_of(trainer)[0] for trainer in ends), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_fully_frozen_model_raises_torch_error(graphs, taken):
    class Freezes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *batch):
            pl_module.requires_grad_(trainer.global_step < 2)

    with pytest.raises(RuntimeError, match=r"^element 0 of tensors does not require grad"):
        fit(model(), Freezes())
    assert taken == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("freezes_in_an_epoch", [True, False])
def test_unfrozen_layer_is_trained_by_joint_step(graphs, taken, freezes_in_an_epoch):
    class Frees(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1 and not freezes_in_an_epoch:
                pl_module.encoder.requires_grad_(True)

        def on_train_batch_start(self, trainer, pl_module, *batch):
            if trainer.global_step == 4 and freezes_in_an_epoch:
                pl_module.encoder.requires_grad_(True)

    module = model()
    module.encoder.requires_grad_(False)
    before = [p.detach().clone() for p in module.encoder.parameters()]
    fit(module, Frees())
    assert taken == STEPS
    assert not any(torch.equal(p, q) for p, q in zip(module.encoder.parameters(), before, strict=True))


@pytest.mark.slow
def test_joint_graph_failure_falls_back_to_two_graphs(monkeypatch, recwarn):
    real, compiled = torch.compile, []

    def backend(module, inputs):
        if "grad" in str(module.graph) and len(compiled) == 0:
            compiled.append("joint")
            raise RuntimeError("not this one")
        compiled.append("loss")
        return module.forward

    def compile_it(function, *, mode, dynamic):
        torch._dynamo.reset()
        return real(function, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(compilation.torch, "compile", compile_it)
    found = fit(model("vae"))
    assert compiled == ["joint", "loss"]
    assert not [one for one in recwarn if "not compiled" in str(one.message)]
    monkeypatch.setattr("aezoo.speed.fast_loop.set_joint_step", lambda trainer, joint: None)
    # the first step runs uncompiled, with other rounding
    for one, other in zip(end_of(found)[0], end_of(fit(model("vae")))[0], strict=True):
        torch.testing.assert_close(one, other)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)),
            *(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)),
        )

    def forward(self, x):
        return (x + self.body(x)) / 1.0


@pytest.mark.slow
def test_upsampling_layers_have_correct_gradients():
    """With inductor of torch 2.13 alone, these gradients are 0, or the step raises an UnboundLocalError."""
    torch.manual_seed(0)
    ends = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
    net = nn.Sequential(ends[0], Residual(), nn.Upsample(scale_factor=2.0), Residual(), ends[1])
    x = torch.randn(7, 8, 7, 7)
    loss = net(x).square().sum()
    expected = torch.autograd.grad(loss, [*net.parameters()])
    joint = JointStep(net, lambda x, _: ({"loss": net(x).square().sum()}, x), "default", lambda: None)
    joint.step(x, None)
    assert joint.works
    for p, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
