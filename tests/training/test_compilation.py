"""Compilation, denormals and memory layout change the speed of a run and not its results."""

import copy
import os
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from quiet_trainer import quiet_trainer

import aezoo
from aezoo.autoencoder import Autoencoder
from aezoo.callbacks import BetaAnnealing
from aezoo.data import DataModule
from aezoo.errors import AezooError
from aezoo.speed import malloc
from aezoo.speed.denormals import flushed_denormals
from aezoo.speed.memory_format import to_channels_last
from aezoo.speed.swapping import Swapped
from aezoo.training import compilation, optimizers
from aezoo.training.compilation import (
    Compiled,
    check_mode,
    positions,
    worth_compiling,
)

pytestmark = pytest.mark.usefixtures("speed_on")
CPU = torch.device("cpu")


class Losses(pl.Callback):
    """The loss of every training step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))


def model(mode="off", name="vae", shape=(6,), cls=None, **plain):
    torch.manual_seed(3)
    settings = {"latent_dim": 2, "hidden_dims": (8,)} | plain
    made = (cls or aezoo.model_class(name))(shape, **settings)
    made.compile_mode = mode
    return made


def data(n=46, **plain):
    x = torch.rand(n, 6, generator=torch.Generator().manual_seed(1))
    return DataModule.from_arrays(x, **{"batch_size": 4, "val_fraction": 0.1, "test_fraction": 0, "seed": 3} | plain)


def fit(module, *callbacks, source=None, ckpt_path=None, **plain):
    losses = Losses()
    trainer = quiet_trainer(**{"max_epochs": 2} | plain, callbacks=[losses, *callbacks])
    trainer.fit(module, source or data(), ckpt_path=ckpt_path)
    return losses.seen, trainer


# ---- choice of compilation -------------------------------------------------------------------------------------------


def judged(parameters=10**6, batch_size=256, uses=1, steps=10_000.0, device=CPU):
    return worth_compiling(parameters, batch_size, uses, steps, device)


@pytest.mark.parametrize("device", [CPU, torch.device("cuda", 0)])
def test_compilation_benefit_is_monotone_in_work(device):
    sizes = [10**k for k in range(2, 9)]
    on_cpu = device.type == "cpu"
    for other in (1, 100):
        for changing in ("parameters", "batch_size", "steps", *([] if on_cpu else ["uses"])):
            fixed = {"parameters": 10**4 * other, "batch_size": 8 * other, "uses": 1, "steps": 3000.0}
            answers = [judged(**fixed | {changing: size}, device=device) for size in sizes]
            assert answers == sorted(answers), (changing, answers)
            assert answers == [judged(**fixed | {changing: size}, device=device) for size in sizes]


def test_auto_compiles_long_runs_only():
    assert not judged(steps=10.0)
    assert judged(steps=10.0**7)
    assert not judged(steps=float("inf"))  # unknown length
    assert not judged(uses=2, steps=10.0**7)  # convolutions, whose compilation gains nothing
    assert judged(uses=2, steps=10.0**7, device=torch.device("cuda", 0))
    assert not judged(parameters=10, batch_size=1, steps=10.0**5)
    assert judged(parameters=10, batch_size=1, steps=10.0**5, device=torch.device("cuda", 0))


def test_break_even_point_is_compilation_time():
    flops = 6 * 10**6 * 256
    saved = flops * compilation._SAVED_SHARE / (compilation._FLOPS_PER_THREAD * torch.get_num_threads())
    even = compilation._COMPILE_SECONDS / saved
    assert not judged(steps=even * 0.99)
    assert judged(steps=even * 1.01)


def test_weight_use_counts_convolution_positions():
    dense = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 9))
    conv = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, bias=False))
    assert positions(dense, (1, 8, 8)) == 1
    assert positions(conv, (1, 64, 64)) == 64 * 64 // 16
    both = torch.nn.Sequential(conv, torch.nn.Linear(36, 1, bias=False))
    assert positions(both, (1, 64, 64)) == round((256 + 1) / 2)


@pytest.mark.slow
def test_compilation_choice_is_logged_in_one_line(caplog, graphs):
    caplog.set_level("INFO")
    fit(model("auto"), max_epochs=1)
    assert (
        "training step: is not compiled (a short run, or convolutions on a CPU); --compile default changes that"
        in caplog.text
    )
    caplog.clear()
    fit(model("default"), max_epochs=1)
    assert "training step: compiled (default); the first step waits for it" in caplog.text
    assert len(graphs) == 1


@pytest.mark.slow
def test_varying_training_step_is_not_compiled(caplog, graphs):
    caplog.set_level("INFO")
    settings = {"hidden_dims": (4,), "features": "none"}
    source = DataModule.from_arrays(torch.rand(12, 1, 4, 4), batch_size=4, val_fraction=0, test_fraction=0)
    for mode in ("auto", "default", "reduce-overhead"):
        caplog.clear()
        _, trainer = fit(model(mode, "eq_vae", (1, 4, 4), **settings), source=source, max_epochs=1)
        assert "training step: not compiled, because the computation differs from step to step" in caplog.text
        assert trainer.lightning_module._compiled_before is False
    assert not graphs
    caplog.clear()
    fit(model("off", "eq_vae", (1, 4, 4), **settings), source=source, max_epochs=1)
    assert "compiled" not in caplog.text


def test_an_unknown_mode_is_refused():
    assert [check_mode(mode) for mode in compilation.MODES] == list(compilation.MODES)
    with pytest.raises(AezooError, match="compile is 'fast': choose from auto, off, default") as caught:
        fit(model("fast"))
    assert "\n" not in str(caught.value)


# ---- a compiled step -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_run_takes_the_same_steps(graphs):
    plain, _ = fit(model("off"))
    assert not graphs
    compiled, _ = fit(model("default"))
    assert len(graphs) == 1
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert len(set(plain)) == 22


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's imports
@pytest.mark.parametrize("name", ["dense_ae", "vae"])
def test_the_real_compiler_takes_the_same_steps(name):
    import torch._inductor.config

    plain, trainer = fit(model("off", name))
    # inductor's own generator draws other noise from the same seed
    with torch._inductor.config.patch(fallback_random=True):
        compiled, other = fit(model("default", name))
    assert other.lightning_module._compiled_before
    assert compiled == pytest.approx(plain, rel=1e-4)
    weights = trainer.lightning_module.state_dict()
    for key, value in other.lightning_module.state_dict().items():
        torch.testing.assert_close(value, weights[key], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_compiled_step_scales_bytes_equally(graphs):
    class Look(pl.Callback):
        capturable = True

        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(pl_module.takes_bytes)

    runs = []
    source = {"batch_size": 100, "val_fraction": 0}
    for mode in ("off", "default"):
        seen = []
        torch.manual_seed(0)
        module = model(mode, "dense_ae", (1, 28, 28))
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=5, limit_val_batches=0, callbacks=[Look()])
        trainer.fit(module, DataModule("mnist5k", **source))
        assert seen == [mode == "default"] * 5
        assert module.takes_bytes is False  # reset after the fit
        runs.append(module.state_dict())
    for key, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][key])


@pytest.mark.parametrize("mode", ["off", "default"])
def test_bytes_of_foreign_loader_are_refused(graphs, mode):
    loader = torch.utils.data.DataLoader(torch.randint(256, (8, 6), dtype=torch.uint8), batch_size=4)
    trainer = quiet_trainer(max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(AezooError, match="the model expects float data"):
        trainer.fit(model(mode, "dense_ae"), loader, loader)


@pytest.mark.slow
def test_custom_callback_sees_floats_in_compiled_run(graphs):
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert batch[0].dtype == torch.float32
            assert batch[0].max() <= 1

    fit(model("default", "dense_ae", (1, 28, 28)), Look(), source=DataModule("mnist5k"), limit_train_batches=2,
        limit_val_batches=0)  # fmt: skip
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("in_an_epoch", [True, False])
def test_callback_added_later_sees_floats(graphs, in_an_epoch):
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((batch[0].dtype, pl_module.takes_bytes, pl_module._uses_only_torch_rng))

    class Adds(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 1 and in_an_epoch:
                trainer.callbacks.append(Look())

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1 and not in_an_epoch:
                trainer.callbacks.append(Look())

    # as a callback of this package
    Adds.__module__ = "aezoo.callbacks"
    trainer = quiet_trainer(max_epochs=2, callbacks=[Adds()], limit_train_batches=2, limit_val_batches=0)
    x = torch.randint(256, (24, 6), dtype=torch.uint8)
    trainer.fit(model("default", "dense_ae"), DataModule.from_arrays(x, batch_size=4, val_fraction=0, test_fraction=0))
    assert seen == [(torch.float32, False, False)] * (3 if in_an_epoch else 2)


def test_batches_of_other_sizes_run_uncompiled(graphs):
    compiled = Compiled(lambda x: x.sum(), "default", lambda: None)
    assert compiled(torch.ones(4, 2)) == 8
    assert compiled(torch.ones(3, 2)) == 6
    assert compiled(torch.ones(4, 2) * 2) == 16
    assert len(graphs) == 1
    calls = []
    function = lambda x: calls.append(len(x)) or x.sum()  # noqa: E731
    eager = Compiled(function, "default", lambda: None)
    eager._compiled = lambda x: x.sum()
    for n in (4, 3, 4, 1):
        eager(torch.ones(n))
    assert calls == [3, 1]


@pytest.fixture
def sizes(monkeypatch):
    """The batch sizes seen by the compiled function."""
    found = []

    def compile_it(function, *, mode, dynamic):
        return lambda x, *rest: found.append(len(x)) or function(x, *rest)

    monkeypatch.setattr(compilation.torch, "compile", compile_it)
    return found


def test_resume_at_last_batch_compiles_for_full_batches(sizes, tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 10:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    fit(model("default"), Save(), max_epochs=1)
    assert sizes == [4] * 10
    sizes.clear()
    losses, _ = fit(model("default"), ckpt_path=tmp_path / "a.ckpt")
    assert len(losses) == 12 and sizes == [4] * 10


def test_dataset_smaller_than_batch_is_full_batch(sizes):
    fit(model("default"), source=data(n=10, batch_size=64))
    assert sizes == [9] * 2


def test_full_batch_size_comes_from_loader(sizes):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    rows, loader = torch.utils.data.TensorDataset(torch.rand(10, 2)), torch.utils.data.DataLoader
    drawn = torch.utils.data.BatchSampler(range(10), 4, drop_last=False)
    loaders = loader(rows, 4), loader(rows, 64), loader(Stream(), 4), loader(rows, batch_sampler=drawn), [rows], None
    assert [compilation.full_batch(one) for one in loaders] == [4, 10, 4, 0, 0, 0]
    # a batch larger than the loader's size is not the last one
    compiled = Compiled(lambda x: x.sum(), "default", lambda: None, least=4)
    assert [compiled(torch.ones(n)) for n in (3, 8, 3, 8)] == [3, 8, 3, 8]
    assert sizes == [8, 8]


@pytest.mark.slow
def test_compiled_checkpoint_loads_into_uncompiled_model(graphs, tmp_path):
    module = model("default")
    names = list(module.state_dict())
    _, trainer = fit(module, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert list(content["state_dict"]) == names == list(module.state_dict())
    loaded = aezoo.load_model(tmp_path / "a.ckpt")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in module.state_dict().items())
    x = torch.rand(3, 6)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert module._compiled is None
    assert len(graphs) == 1


@pytest.mark.slow
def test_resumed_run_keeps_compilation_choice(graphs, tmp_path, monkeypatch):
    for first, later in ((True, False), (False, True)):
        monkeypatch.setattr(compilation, "worth_compiling", lambda *sizes, answer=first: answer)
        _, trainer = fit(model("auto"), max_epochs=1)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        monkeypatch.setattr(compilation, "worth_compiling", lambda *sizes, answer=later: answer)
        for ckpt_path, wanted in ((tmp_path / "a.ckpt", first), (None, later)):
            graphs.clear()
            _, again = fit(model("auto"), ckpt_path=ckpt_path)
            assert again.lightning_module._compiled_before is wanted
            assert bool(graphs) is wanted


@pytest.mark.slow
@pytest.mark.parametrize("fault", [RuntimeError, ImportError])
def test_missing_compiler_warns_once_and_runs_eagerly(monkeypatch, fault):
    plain, _ = fit(model("off"))
    real = torch.compile

    def broken(module, inputs):
        raise fault("no C++ compiler here\nand a long report")

    monkeypatch.setattr(compilation.torch, "compile", lambda f, mode, dynamic: real(f, backend=broken))
    with pytest.warns(UserWarning, match="not compiled and runs slower") as caught:
        fallen, _ = fit(model("default"))
    texts = [str(one.message) for one in caught if "not compiled" in str(one.message)]
    assert len(texts) == 1 and "\n" not in texts[0] and "no C++ compiler here" in texts[0]
    assert fallen == plain  # the noise of the first step is drawn again from the same seed


def test_failed_compilation_restores_random_state(monkeypatch):
    calls = []
    monkeypatch.setattr(compilation.torch, "compile", lambda function, **how: function)
    compiled = Compiled(lambda x: calls.append("plain") or x, "default", lambda: calls.append("put back"))

    def fails(x):
        calls.append("compiled")
        raise RuntimeError("late")

    compiled._compiled = fails
    with pytest.warns(UserWarning, match=r"not compiled and runs slower \(late\)"):
        compiled(torch.ones(2))
    compiled(torch.ones(2))
    assert calls == ["compiled", "put back", "plain", "plain"]


@pytest.mark.slow
def test_failed_recompilation_continues_uncompiled(monkeypatch):
    """Freezing a layer during a run recompiles the step."""
    made, frozen = [], []

    class Freeze(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                next(pl_module.encoder.parameters()).requires_grad_(False)
                frozen.append(True)

    def breaks(module, inputs):
        if frozen:
            raise RuntimeError("no more of these")
        made.append(module)
        return module

    plain, _ = fit(model("off"), Freeze(), max_epochs=3)
    frozen.clear()
    real = torch.compile
    monkeypatch.setattr(compilation.torch, "compile", lambda f, mode, dynamic: real(f, backend=breaks))
    with pytest.warns(UserWarning, match=r"not compiled and runs slower \(.*no more of these"):
        fallen, _ = fit(model("default"), Freeze(), max_epochs=3)
    assert made
    assert fallen == pytest.approx(plain, rel=1e-5)


def test_model_error_is_raised_unchanged(graphs):
    class Faulty(aezoo.model_class("dense_ae")):
        def loss(self, x, y=None):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        fit(model("default", cls=Faulty))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["linear", "capacity"])
def test_annealing_compiles_once_and_equals_the_plain_run(graphs, mode):
    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            train.append(float(getattr(pl_module, anneal()._attribute)))

        def on_validation_start(self, trainer, pl_module):
            val.append(getattr(pl_module, anneal()._attribute))

    def anneal():
        return BetaAnnealing(mode, n_steps=17, max_capacity=3.0)

    runs = []
    for compiled in ("off", "default"):
        train, val = [], []
        # full batches only: others run uncompiled
        module = model(compiled, beta=2.5)
        losses, _ = fit(module, anneal(), Watch(), source=data(drop_last=True), num_sanity_val_steps=0)
        runs.append((losses, train, val))
        final = 3.0 if mode == "capacity" else 2.5
        assert val == [final, final] and all(type(value) is float for value in val)
        assert type(module.beta) is float and module.beta == 2.5
        assert dict(module.hparams)["beta"] == 2.5
    assert len(set(train)) == 18
    assert runs[0][1:] == runs[1][1:]
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copy_made_in_a_fit_uses_its_own_weights(graphs, copy_of):
    seen = []

    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *batch):
            other, x = copy_of(pl_module), torch.rand(4, 6)
            with torch.no_grad():
                for p in other.parameters():
                    p.zero_()
                seen.append((other.step_terms(x, None)[0]["loss"], other.loss(x)["loss"]))

    fit(model("default", "dense_ae"), Copies(), limit_train_batches=2, limit_val_batches=0, max_epochs=1)
    assert len(seen) == 2 and all(torch.equal(*both) for both in seen)


@pytest.mark.slow
def test_annealing_writes_no_tensor_into_checkpoints(graphs, tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    module = model("default")
    fit(module, BetaAnnealing(n_steps=10), Save(), max_epochs=1)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["hyper_parameters"]["beta"] == 1.0
    assert set(content["state_dict"]) == set(module.state_dict())


class Fails(pl.Callback):
    """Ends a fit in its first step, and records the state of the fit."""

    def __init__(self, error):
        self.error, self.seen = error, []

    def on_before_backward(self, trainer, pl_module, loss):
        maps = [pl_module._channels_last for part in pl_module.modules() if isinstance(part, Swapped)]
        self.seen += [pl_module._compiled is not None, pl_module.takes_bytes, bool(maps) and all(maps)]
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("stop")])
def test_fit_cleanup_runs_once_after_any_end(sizes, monkeypatch, error):
    calls, undo = [], Autoencoder.leave_fit
    monkeypatch.setattr(Autoencoder, "leave_fit", lambda self: calls.append(1) or undo(self))
    module = model("default", "conv_ae", (1, 28, 28), hidden_dims=(4, 8))
    strides, fails = [p.stride() for p in module.parameters()], Fails(error)
    trainer = quiet_trainer(max_epochs=1, callbacks=[fails])
    with pytest.raises((SystemExit, RuntimeError)):
        trainer.fit(module, DataModule("mnist5k"))
    assert fails.seen == [True] * 3
    assert module._compiled is None and not module.takes_bytes
    assert [p.stride() for p in module.parameters()] == strides
    assert not any(isinstance(part, Swapped) for part in module.modules())
    assert len(calls) == 1


def test_reused_trainer_registers_cleanup_once(sizes):
    _, trainer = fit(model("default"), max_epochs=1)
    many = len(trainer.callbacks)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model("default"), data())
    assert len(trainer.callbacks) == many


# ---- denormals -------------------------------------------------------------------------------------------------------


def flushes():
    return bool((torch.full((1,), 1e-39) * 1.0 == 0).item())


class LookAtDenormals(pl.Callback):
    def __init__(self, fails=False):
        self.seen, self.fails = [], fails

    def on_train_batch_start(self, *args):
        self.seen.append(flushes())
        if self.fails:
            raise RuntimeError("stop")


def test_flush_denormals_context_restores_state():
    assert not flushes()
    with flushed_denormals():
        assert flushes()
        with flushed_denormals():
            assert flushes()
        assert flushes()
    assert not flushes()
    with pytest.raises(RuntimeError), flushed_denormals():
        raise RuntimeError
    assert not flushes()


@pytest.mark.parametrize("fails", [False, True])
def test_a_fit_flushes_denormals_and_restores_them(fails):
    look = LookAtDenormals(fails)
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            fit(model(), look)
    else:
        fit(model(), look)
    assert set(look.seen) == {True}
    assert not flushes()


# ---- memory layout ---------------------------------------------------------------------------------------------------


def test_channels_last_applies_to_2d_convolutions_only():
    conv = torch.nn.Conv2d(3, 4, 3)
    values = conv.weight.detach().clone()
    assert to_channels_last(torch.nn.Sequential(conv))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous()
    assert torch.equal(conv.weight, values)
    assert not to_channels_last(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Conv1d(3, 3, 3)))


def test_optimiser_moments_follow_weight_layout():
    layers = []
    for fused in (False, True):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(4, 8, 3)
        optimizer = torch.optim.Adam(conv.parameters(), lr=0.1, fused=fused)
        for turn in (0, 1):
            conv.zero_grad()
            conv(torch.ones(1, 4, 5, 5) + torch.arange(4.0)[:, None, None]).sin().sum().backward()
            optimizer.step()
            if fused and turn == 0:
                to_channels_last(conv)  # the moments keep their layout, as those of a checkpoint do
                optimizers.align(optimizer)
                assert optimizer.state[conv.weight]["exp_avg"].stride() == conv.weight.stride()
        layers.append(conv)
    torch.testing.assert_close(layers[0].weight.contiguous(), layers[1].weight.contiguous())


@pytest.mark.slow
def test_fit_uses_channels_last_and_restores_layout(tmp_path):
    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            weights = [p for p in pl_module.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
            seen.append(bool(weights) and all(not p.is_contiguous() for p in weights))

        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    seen = []
    torch.manual_seed(0)
    module = aezoo.create_model("conv_ae", input_shape=(1, 8, 8), latent_dim=4, hidden_dims=(4, 8))
    strides = [p.stride() for p in module.parameters()]
    fit(module, Look(), source=DataModule("digits"), limit_train_batches=3, max_epochs=1)
    assert seen == [True] * 3
    assert [p.stride() for p in module.parameters()] == strides
    validator = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    validator.validate(module, DataModule("digits"), verbose=False)
    assert [p.stride() for p in module.parameters()] == strides
    # the moments have another layout when the run is resumed
    resumed = aezoo.create_model("conv_ae", input_shape=(1, 8, 8), latent_dim=4, hidden_dims=(4, 8))
    part = {"source": DataModule("digits"), "limit_train_batches": 3, "max_epochs": 2}
    fit(resumed, ckpt_path=tmp_path / "a.ckpt", **part)
    torch.manual_seed(0)
    whole = aezoo.create_model("conv_ae", input_shape=(1, 8, 8), latent_dim=4, hidden_dims=(4, 8))
    fit(whole, **part | {"source": DataModule("digits")})
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


STEPS = """
import resource, sys, torch, aezoo
from aezoo.speed import malloc

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

made = 0
if sys.argv[1:]:
    # torch then fills uninitialised tensors
    torch.use_deterministic_algorithms(True)
    malloc.expect_large_tensors()
    before = faults()
    malloc.expect_large_tensors()
    made = faults() - before
torch.ones(2**18).sum()
before = faults()
for _ in range(10):
    [torch.ones(2**22) for _ in range(3)]
print(faults() - before, made)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_fit_reduces_page_faults_of_large_tensors():
    """Of ten rounds of 3 tensors of 16 MiB (12,288 pages of 4 KiB), only the first should fault; a model has few."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", STEPS]
    (without, _), (within, made) = (
        map(int, subprocess.run([*command, *more], capture_output=True, text=True, check=True, env=env).stdout.split())
        for more in ([], ["model"])
    )
    assert within < without / 5
    assert made < 4000


PAGES = """
import sys, torch
from aezoo import acceleration
from aezoo.speed import malloc

def heap():
    start, end = malloc._heap()[0]
    lines = open("/proc/self/smaps").read().split(f"{start:x}-")[1].splitlines()
    huge = next(line for line in lines if line.startswith("AnonHugePages"))
    flags = next(line for line in lines if line.startswith("VmFlags"))
    return end - start, int(huge.split()[1]) * 1024, " hg" in flags

def fault():
    return int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[7])

print(*heap(), acceleration.keep_pages())
print(*heap(), acceleration.keep_pages())
print(*heap())
tensors = [torch.ones(2**20) for _ in range(40)]
print(*heap())
del tensors
before = fault()
tensors = [torch.ones(2**20) for _ in range(40)]
print(fault() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or not malloc._heap(), reason="glibc's malloc on Linux")
def test_malloc_keeps_heap_and_uses_huge_pages():
    """In a separate process, since malloc's settings are permanent."""
    run = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    *heaps, faults = [line.split() for line in run.stdout.splitlines()]
    sizes, huge = [int(line[0]) for line in heaps], [int(line[1]) for line in heaps]
    assert heaps[0][3] == heaps[1][3] == "True"
    # 640 MiB are reserved once, and use no memory
    assert sizes[1] - sizes[0] == pytest.approx(malloc._ROOM, rel=0.01)
    assert sizes[1] == sizes[2] == sizes[3]
    assert int(faults[0]) < 100
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if offered.exists() and "[madvise]" in offered.read_text(encoding="utf-8"):
        assert [line[2] for line in heaps] == ["False", "True", "True", "True"]
        assert huge[0] == 0
        # out of 160 MiB of tensors, as far as the kernel has free huge pages
        assert huge[3] - huge[2] > 2**25
