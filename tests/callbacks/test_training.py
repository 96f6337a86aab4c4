"""Callbacks that affect training: annealing, averaged weights, interrupts and the progress bar."""

import inspect
import io
import json
import os
import re
import signal
import threading
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from callback_fakes import Fake, FakeVAE, digits
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from rich.console import Console
from rich.live import Live
from torch.utils.data import DataLoader

import aezoo
from aezoo import callbacks as zoo
from aezoo.callbacks import EMA, BetaAnnealing, Interrupt, ProgressBar, summary
from aezoo.callbacks.base import Picture
from aezoo.data import DataModule
from aezoo.errors import AezooError


class Watch(pl.Callback):
    """Records the model's attribute in training and in validation."""

    def __init__(self, name: str) -> None:
        self.name, self.train, self.val = name, [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.train.append(getattr(pl_module, self.name))

    def on_validation_batch_start(self, trainer, pl_module, *args):
        if not trainer.sanity_checking:
            self.val.append(getattr(pl_module, self.name))


# ---- BetaAnnealing ---------------------------------------------------------------------------------------------------


def test_linear_annealing(fit, events):
    watch = Watch("beta")
    model = FakeVAE((4,), beta=2.0)
    fit(model, BetaAnnealing(n_steps=8), watch, max_epochs=4)  # three steps per epoch
    assert watch.train == [2.0 * min(1, step / 8) for step in range(12)]
    assert set(watch.val) == {2.0}
    assert model.beta == 2.0
    logged = [(event.step, event.value) for event in events().Scalars("train/beta")]
    assert logged == [(step, 2.0 * step / 8) for step in range(9)]


def test_cyclical_annealing():
    anneal = BetaAnnealing("cyclical", n_steps=80, cycles=4, ratio=0.5)
    values = [anneal.value(step, 3.0) for step in range(100)]
    for cycle in range(4):
        part = values[20 * cycle : 20 * cycle + 20]
        assert part[:10] == pytest.approx([3.0 * i / 10 for i in range(10)])
        assert part[10:] == [3.0] * 10
    assert values[80:] == [3.0] * 20


def test_capacity_annealing(fit, events):
    capacity, beta = Watch("capacity"), Watch("beta")
    model = FakeVAE((4,), beta=1.0)
    fit(model, BetaAnnealing("capacity", n_steps=4, max_capacity=20.0, gamma=30.0), capacity, beta)
    assert capacity.train == [0.0, 5.0, 10.0, 15.0, 20.0, 20.0]
    assert set(capacity.val) == {20.0}
    assert set(beta.train) | set(beta.val) == {30.0}
    assert [event.value for event in events().Scalars("train/capacity")] == [0.0, 5.0, 10.0, 15.0, 20.0]


@pytest.mark.slow
def test_annealing_of_a_resumed_run_continues(fit, tmp_path):
    whole, part = Watch("beta"), Watch("beta")
    fit(FakeVAE((4,)), BetaAnnealing(n_steps=10), whole, max_epochs=3)
    trainer = fit(FakeVAE((4,)), BetaAnnealing(n_steps=10), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fit(FakeVAE((4,)), BetaAnnealing(n_steps=10), part, max_epochs=3, ckpt_path=str(tmp_path / "a.ckpt"))
    assert part.train == whole.train[3:]


def test_beta_is_restored_after_an_error(fit):
    class Fail(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            raise RuntimeError("stop")

    model = FakeVAE((4,))
    with pytest.raises(RuntimeError, match="stop"):
        fit(model, BetaAnnealing(n_steps=10), Fail())
    assert model.beta == 2.0


def test_annealing_needs_a_model_with_the_attribute(fit):
    with pytest.raises(
        AezooError, match="BetaAnnealing in linear mode needs a model with a number `beta`, which Fake does not have"
    ):
        fit(Fake((4,)), BetaAnnealing(n_steps=5))
    fit(Fake((4,)), BetaAnnealing())  # disabled


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "cosine"}, "mode must be linear, cyclical or capacity"),
        ({"n_steps": -1}, "n_steps must be at least 0"),
        ({"cycles": 0}, "cycles must be at least 1"),
        ({"ratio": 0.0}, "ratio must lie in"),
        ({"max_capacity": float("inf")}, "max_capacity takes a finite number"),
    ],
)
def test_bad_annealing_is_refused(values, message):
    with pytest.raises(AezooError, match=message):
        BetaAnnealing(**values)


@pytest.mark.slow
def test_annealing_does_not_recompile_at_every_step(fit):
    class Compiled(FakeVAE):
        def __init__(self):
            super().__init__((4,))
            self.compiles = 0

            def backend(module, inputs):
                self.compiles += 1
                return module.forward

            self.loss = torch.compile(self.loss, backend=backend)

    model = Compiled()
    fit(model, BetaAnnealing(n_steps=40), max_epochs=10)
    assert model.compiles <= 4, model.compiles


# ---- EMA -------------------------------------------------------------------------------------------------------------


class Trace(pl.Callback):
    """Records weights after each optimiser step, and those used in validation."""

    def __init__(self) -> None:
        self.steps, self.seen = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(flat(pl_module))

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.append(flat(pl_module))


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def averages(steps: list[torch.Tensor], decay: float, every: int = 1, start: int = 0) -> list[torch.Tensor]:
    """The average after each step, computed explicitly."""
    found, average = [], None
    for i, weights in enumerate(steps):
        if i >= start and (i - start) % every == 0:
            average = weights if average is None else decay * average + (1 - decay) * weights
        found.append(weights if average is None else average)
    return found


@pytest.mark.parametrize(("every", "start"), [(1, 0), (2, 0), (1, 2), (1, 5), (3, 1)])
@pytest.mark.parametrize("first", [True, False], ids=["EMA first", "EMA last"])
def test_ema_is_the_average_by_hand(fit, tmp_path, every, start, first):
    ema, trace = EMA(decay=0.8, every_n_steps=every, start_step=start), Trace()
    saver = ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, filename="{epoch}")
    model = Fake((4,), lr=0.05)
    fit(model, *([ema, trace] if first else [trace, ema]), saver, max_epochs=3, enable_checkpointing=True)
    expected = averages(trace.steps, 0.8, every, start)
    for epoch in range(3):
        last = 3 * epoch + 2
        assert torch.allclose(trace.seen[epoch], expected[last], atol=1e-6)
        stored = torch.load(tmp_path / "ckpt" / f"epoch={epoch}.ckpt", weights_only=True)
        for key, weights in (("state_dict", expected[last]), ("current_model_state", trace.steps[last])):
            assert torch.allclose(torch.cat([v.flatten() for v in stored[key].values()]), weights, atol=1e-6)
    assert torch.allclose(flat(model), expected[-1], atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_a_resumed_ema_continues(fit, tmp_path):
    def run(epochs, ckpt_path=None):
        pl.seed_everything(1, verbose=False)
        model = Fake((4,), lr=0.05)
        model.encoder[1].p = 0.0
        saver = ModelCheckpoint(tmp_path / "ckpt", save_last=True, enable_version_counter=False)
        # one batch per epoch, so its order does not matter
        fit(model, EMA(0.8), saver, batch_size=48, max_epochs=epochs, enable_checkpointing=True, ckpt_path=ckpt_path)
        return flat(model)

    run(2)
    assert torch.allclose(run(5, str(tmp_path / "ckpt" / "last.ckpt")), run(5), atol=1e-6)


def test_a_test_of_the_best_checkpoint_has_averaged_weights(fit, tmp_path):
    class Look(pl.Callback):
        def on_test_start(self, trainer, pl_module):
            self.weights = flat(pl_module)

    look, trace, model = Look(), Trace(), Fake((4,), lr=0.05)
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", monitor="val/loss", mode="max")
    trainer = fit(model, EMA(0.8), trace, look, saver, max_epochs=3, enable_checkpointing=True)
    assert Path(saver.best_model_path).stem == "epoch=0"
    trainer.test(model, DataLoader(digits((4,)), 16), ckpt_path="best", verbose=False, weights_only=True)
    assert torch.allclose(look.weights, averages(trace.steps, 0.8)[2], atol=1e-6)


def test_pictures_use_ema_weights_for_any_callback_order(fit):
    class Spy(Picture):
        def __init__(self):
            super().__init__(2, 1)
            self.seen = []

        def draw(self, model, x, y):
            self.seen.append(flat(model))
            return {}

    spy, trace = Spy(), Trace()
    fit(Fake((4,), lr=0.05), trace, spy, EMA(0.8), max_epochs=3)
    expected = averages(trace.steps, 0.8)
    assert torch.allclose(spy.seen[0], expected[5], atol=1e-6)
    assert torch.allclose(spy.seen[1], expected[8], atol=1e-6)


def test_counters_are_copied_not_averaged(fit):
    class Counting(Fake):
        def __init__(self):
            super().__init__((4,))
            self.register_buffer("count", torch.tensor(0))
            self.register_buffer("level", torch.tensor(0.0))

        def training_step(self, batch, batch_idx):
            self.count += 1
            self.level += 1
            return super().training_step(batch, batch_idx)

    model = Counting()
    fit(model, EMA(0.5), max_epochs=1)
    assert model.count == 3
    assert model.level == 0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [("topk_sae", {"k": 2}), ("rae", {"regulariser": "sn"})])
def test_ema_weights_keep_model_constraints(fit, name, settings):
    """Averages of unit vectors are shorter than 1, and an averaged singular vector belongs to no weight."""
    model = aezoo.create_model(name, (4,), latent_dim=8, lr=0.1, **settings)
    fit(model, EMA(0.8), max_epochs=4)
    if name == "rae":
        layers = [layer for layer in model.decoder.modules() if isinstance(layer, torch.nn.Linear)]
        norms = [float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) for layer in layers]
    else:
        norms = model.decoder.W_NX.norm(dim=1).tolist()
    assert norms and norms == pytest.approx([1.0] * len(norms), abs=1e-5)


class ScheduleFree(torch.optim.SGD):
    """Switches to an average of the weights and back, like the optimisers of schedulefree."""

    def train(self): ...

    def eval(self): ...


@pytest.mark.parametrize("average", [WeightAveraging, StochasticWeightAveraging, ScheduleFree])
def test_averages_that_shorten_directions_are_refused(fit, average, monkeypatch):
    model, free = (aezoo.create_model("sae_l1", (4,), latent_dim=8, form=form) for form in ("unit_norm", "april"))
    made = {WeightAveraging: [WeightAveraging()], StochasticWeightAveraging: [StochasticWeightAveraging(1e-3)]}
    callbacks = made.get(average, [])
    for each in (model, free) if average is ScheduleFree else ():
        monkeypatch.setattr(each, "configure_optimizers", lambda each=each: ScheduleFree(each.parameters(), 0.1))
    with pytest.raises(AezooError, match=r"averages directions of norm 1 .* use aezoo.callbacks.EMA"):
        fit(model, *callbacks, max_epochs=1)
    fit(free, *callbacks, max_epochs=1)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_ema_supports_other_precisions(fit, precision):
    ema = EMA(decay=0.8)
    model = aezoo.create_model("linear_ae", input_shape=(4,), lr=0.05)
    trainer = fit(model, ema, precision=precision, max_epochs=1)
    average = ema._average_model.module
    for own, mean in zip(model.parameters(), average.parameters(), strict=True):
        assert own.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float64)
        assert mean.dtype == torch.float32 and torch.equal(own, mean.to(own.dtype))
    assert trainer.global_step == ema._average_model.n_averaged


@pytest.mark.slow
def test_stored_centroids_are_not_averaged(fit):
    """A running average of the queue of codes would tend to the mean code in every row."""
    ends = []
    for callbacks in ([], [EMA(0.8)]):
        torch.manual_seed(3)
        model = aezoo.create_model("rhvae", (4,), latent_dim=2, hidden_dims=(8,), n_leapfrog=1, n_centroids=20)
        fit(model, *callbacks)
        ends.append(model.centroids_MD.clone())
    assert torch.equal(*ends)


def test_zero_decay_disables_averaging(fit, tmp_path):
    trace, model = Trace(), Fake((4,))
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}")
    fit(model, EMA(decay=0.0), trace, saver, max_epochs=1, enable_checkpointing=True)
    assert torch.equal(flat(model), trace.steps[-1])
    assert "current_model_state" not in torch.load(tmp_path / "ckpt" / "epoch=0.ckpt", weights_only=True)


@pytest.mark.parametrize("where", ["validation", "batch end"])
def test_interrupted_ema_checkpoint_keeps_both_weights(fit, tmp_path, where):
    class Fail(pl.Callback):
        def on_validation_batch_end(self, trainer, *args):
            if where == "validation" and not trainer.sanity_checking:
                raise RuntimeError("stop")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if where == "batch end" and batch_idx == 1:
                raise RuntimeError("stop")

    trace = Trace()
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="x", save_on_exception=True)
    with pytest.raises(RuntimeError, match="stop"):
        # the failing callback comes before EMA, which has not yet seen the last step
        fit(Fake((4,), lr=0.05), trace, Fail(), EMA(0.8), saver, enable_checkpointing=True)
    stored = torch.load(tmp_path / "ckpt" / "x.ckpt", weights_only=True)
    expected = averages(trace.steps, 0.8)[-1]
    assert torch.allclose(torch.cat([v.flatten() for v in stored["state_dict"].values()]), expected, atol=1e-6)
    current = torch.cat([v.flatten() for v in stored["current_model_state"].values()])
    assert torch.allclose(current, trace.steps[-1], atol=1e-6)


@pytest.mark.parametrize("values", [{"decay": 1.0}, {"decay": -0.1}, {"every_n_steps": 0}, {"start_step": -1}])
def test_bad_averages_are_refused(values):
    with pytest.raises(AezooError, match=r"EMA\."):
        EMA(**values)


# ---- Interrupt -------------------------------------------------------------------------------------------------------


class Kill(pl.Callback):
    """Sends signals to this process within a batch."""

    def __init__(self, at: int, *signals: int) -> None:
        self.at, self.signals, self.after = at, signals, 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.at:
            for number in self.signals:
                os.kill(os.getpid(), number)

    def on_train_batch_end(self, trainer, *args):
        self.after += trainer.global_step > self.at


HANDLERS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture
def handlers():
    """Default signal handlers, even if the tests run under nohup."""
    of_tests = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = [signal.getsignal(number) for number in HANDLERS]
    yield
    after = [signal.getsignal(number) for number in HANDLERS]
    signal.signal(signal.SIGHUP, of_tests)
    assert after == before


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", HANDLERS)
def test_signal_is_handled_after_current_batch(fit, tmp_path, number):
    interrupt, kill = Interrupt(), Kill(4, number)
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="x", save_on_exception=True)
    with pytest.raises(SystemExit):
        fit(Fake((4,)), kill, interrupt, saver, enable_checkpointing=True, max_epochs=3)
    assert interrupt.signum == number
    assert kill.after == 1
    stored = torch.load(tmp_path / "ckpt" / "x.ckpt", weights_only=True)
    assert (stored["epoch"], stored["global_step"]) == (1, 5)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", HANDLERS)
def test_signal_on_last_batch_finishes_epoch_first(fit, tmp_path, number):
    interrupt, validated = Interrupt(), Trace()
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}-{step}", save_last=True, save_top_k=-1)
    with pytest.raises(SystemExit):
        fit(Fake((4,)), Kill(5, number), interrupt, validated, saver, enable_checkpointing=True, max_epochs=9)
    assert interrupt.signum == number
    assert len(validated.seen) == 2
    assert len(validated.steps) == 6
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == [
        "epoch=0-step=3.ckpt",
        "epoch=1-step=6.ckpt",
        "last.ckpt",
    ]


@pytest.mark.usefixtures("handlers")
def test_second_signal_interrupts_immediately(fit):
    interrupt, kill = Interrupt(), Kill(4, signal.SIGINT, signal.SIGINT)
    with pytest.raises(SystemExit):
        fit(Fake((4,)), kill, interrupt)
    assert interrupt.signum == signal.SIGINT
    assert kill.after == 0


@pytest.mark.usefixtures("handlers")
def test_run_without_signal_is_unchanged(fit):
    interrupt = Interrupt()
    trainer = fit(Fake((4,)), interrupt)
    assert trainer.current_epoch == 2
    assert interrupt.signum is None


@pytest.mark.usefixtures("handlers")
def test_signal_handlers_are_restored_after_error(fit):
    class Fail(pl.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(Fake((4,)), Interrupt(), Fail())


@pytest.mark.usefixtures("handlers")
def test_ignored_sighup_stays_ignored(fit):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt = Interrupt()
        assert fit(Fake((4,)), Kill(4, signal.SIGHUP), interrupt).current_epoch == 2
        assert interrupt.signum is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_no_signal_handler_outside_main_thread(fit):
    done = []
    thread = threading.Thread(target=lambda: done.append(fit(Fake((4,)), Interrupt()).current_epoch))
    thread.start()
    thread.join()
    assert done == [2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("at", [4, 5], ids=["within", "last batch"])
def test_interrupted_checkpoint_resumes_exactly(tmp_path, at):
    """The loader keeps its position within the epoch; final weights equal those of an uninterrupted run."""

    class Loader(DataLoader):
        done, skipped = 0, 0

        def state_dict(self):
            return {"done": self.done}

        def load_state_dict(self, state):
            self.skipped = state["done"]

        def __iter__(self):
            self.done, self.skipped = self.skipped, 0
            for i, batch in enumerate(super().__iter__()):
                if i >= self.done:
                    self.done += 1
                    yield batch
            self.done = 0

    def run(*callbacks, ckpt_path=None):
        torch.manual_seed(0)
        model = Fake((4,), lr=0.05)
        model.encoder[1].p = 0.0
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=4,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[EMA(0.9), *callbacks, zoo.Checkpoints(dirpath=str(tmp_path))],
        )
        trainer.fit(model, Loader(digits((4,)), 16), DataLoader(digits((4,)), 16), ckpt_path=ckpt_path)
        return flat(model)

    expected = run()
    with pytest.raises(SystemExit):
        run(Kill(at, signal.SIGINT), Interrupt())
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["global_step"] == at + 1
    assert torch.equal(run(ckpt_path=str(tmp_path / "last.ckpt")), expected)


# ---- ProgressBar -----------------------------------------------------------------------------------------------------


def terminal(monkeypatch, width: int) -> io.StringIO:
    from lightning.pytorch.callbacks.progress import rich_progress

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr("aezoo.callbacks.progress.get_console", lambda: console)
    monkeypatch.setattr(rich_progress, "get_console", lambda: console)
    monkeypatch.setattr(rich_progress, "reconfigure", lambda **_: None)
    return out


def test_the_bar_shows_loss_terms_and_rate(fit, monkeypatch):
    out = terminal(monkeypatch, 160)
    bar = ProgressBar()
    trainer = fit(FakeVAE((4,)), bar, max_epochs=3)
    shown = bar.get_metrics(trainer, trainer.lightning_module)
    assert list(shown) == ["loss", "nll", "kl", "val/loss", "samples/s"]
    for word in ("Epoch 3/3", "3/3", "loss:", "kl:", "val/loss:", "samples/s:"):
        assert word in out.getvalue()


def test_the_summary_is_not_printed_over_a_live_bar(fit, monkeypatch):
    out = terminal(monkeypatch, 80)
    monkeypatch.setattr("aezoo.callbacks.summary.get_console", lambda: zoo.progress.get_console())
    fit(Fake((4,)), ProgressBar(), zoo.Summary(), max_epochs=1)
    table = out.getvalue().split("Trained")
    assert len(table) == 2
    assert "Epoch" not in table[1]


@pytest.mark.parametrize(("width", "framed"), [(24, False), (80, True)])
def test_narrow_summary_shows_all_values(monkeypatch, capsys, width, framed):
    out = terminal(monkeypatch, width)
    monkeypatch.setattr("aezoo.callbacks.summary.get_console", lambda: zoo.progress.get_console())
    summary.print_summary("Tested", {"test/log_likelihood": "-118.9"}, [])
    assert ("-118.9" in out.getvalue()) == framed
    assert capsys.readouterr().out == ("" if framed else "Tested\n  test/log_likelihood  -118.9\n")


@pytest.mark.slow
def test_progress_bar_reads_metrics_only_on_refresh(fit, monkeypatch):
    terminal(monkeypatch, 100)
    bar = ProgressBar(refresh_rate=1)
    asked = []
    monkeypatch.setattr(bar, "get_metrics", lambda *_: asked.append(1) or {})
    monkeypatch.setattr("aezoo.callbacks.progress.time.monotonic", lambda: 100.0)  # the clock does not advance
    fit(Fake((4,)), bar, n=640, max_epochs=1)
    # the first and the last of 40 batches, and the ends of the sanity check, the validation and the epoch
    assert len(asked) <= 5


@pytest.mark.slow
def test_epochs_between_two_refreshes_are_not_drawn(fit, monkeypatch):
    out = terminal(monkeypatch, 100)
    drawn = []
    refresh = Live.refresh
    monkeypatch.setattr(Live, "refresh", lambda live: drawn.append(1) or refresh(live))
    fit(Fake((4,)), ProgressBar(refresh_rate=1), max_epochs=40)
    # start, end, the tasks of the sanity check and first epoch, and the refresh thread
    assert len(drawn) < 20
    assert "Epoch 40/40" in out.getvalue()


def test_one_line_per_epoch_without_terminal(fit, capsys):
    fit(FakeVAE((4,)), ProgressBar(), zoo.Throughput(), max_epochs=3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    for line in lines:
        assert "train/loss" in line
        assert "val/loss" in line
        assert line.endswith("samples/s")


def test_epoch_lines_show_values_of_their_epoch(fit, capsys, events):
    fit(FakeVAE((4,)), ProgressBar(), max_epochs=3)
    printed = [float(line.split("train/loss ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    logged = [event.value for event in events().Scalars("train/loss")]
    assert printed == pytest.approx(logged, rel=1e-3)


def test_disabled_progress_bar_prints_nothing(fit, capsys, monkeypatch):
    fit(Fake((4,)), ProgressBar(refresh_rate=0))
    assert capsys.readouterr().out == ""
    out = terminal(monkeypatch, 100)
    fit(Fake((4,)), ProgressBar(refresh_rate=0))
    assert out.getvalue() == ""


# ---- all callbacks ---------------------------------------------------------------------------------------------------


CLASSES = [getattr(zoo, name) for name in zoo.__all__ if isinstance(getattr(zoo, name), type)]


def test_constructors_take_plain_values_with_help():
    assert len(CLASSES) > 15
    for cls in CLASSES:
        name = cls.__name__
        signature = inspect.signature(cls)
        for parameter in list(signature.parameters.values()):
            assert isinstance(parameter.default, bool | int | float | str | tuple | None), (name, parameter)
            assert f"{parameter.name}: " in (cls.__doc__ or ""), f"{name}.{parameter.name} has no help"
        cls()


def test_disabled_callbacks_are_detected():
    assert not zoo.is_enabled(zoo.BetaAnnealing())
    assert not zoo.is_enabled(zoo.Histograms())
    assert not zoo.is_enabled(EMA(0.0))
    assert not zoo.is_enabled(zoo.Samples(every_n_epochs=0))
    assert not zoo.is_enabled(zoo.Projector(n=0))
    assert zoo.is_enabled(EMA())
    assert zoo.is_enabled(zoo.Samples())
    assert zoo.is_enabled(zoo.Summary())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("name", ["EarlyStop", "Checkpoints"])
def test_mistyped_monitor_is_reported_within_an_epoch(fit, name):
    callback = getattr(zoo, name)
    said = f"{name}.monitor is val/los, which is not logged so far: did you mean val/loss?"
    with pytest.warns(UserWarning, match=re.escape(said)), pytest.raises(Exception, match=r"`val/loss`|'val/loss'"):
        fit(FakeVAE((4,)), callback(monitor="val/los"), enable_checkpointing=True)
    # metrics that are logged only at the end of validation or training
    for metric in ("val/loss", "val/active_units", "train/loss"):
        fit(FakeVAE((4,)), zoo.CodeStatistics(), callback(monitor=metric), enable_checkpointing=True, max_epochs=1)


def test_training_monitor_state_resets_between_fits(tmp_path, recwarn):
    low, high = (torch.rand(40, 4, generator=torch.Generator().manual_seed(i)) / 10 for i in (0, 1))
    saver, stop = zoo.Checkpoints(), zoo.EarlyStop()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[saver, stop],
    )  # fmt: skip
    model = aezoo.create_model("dense_ae", (4,), latent_dim=2, hidden_dims=(8,), lr=0.1)
    data = DataModule.from_arrays(low, batch_size=6, val_fraction=0)
    trainer.fit(model, data)
    assert saver.monitor == stop.monitor == "train/loss"
    best = saver.best_model_path
    trainer.test(model, data, ckpt_path=best, verbose=False)
    assert saver.best_model_path == best  # still by its own monitor
    assert not [str(one.message) for one in recwarn if "callbacks used to create" in str(one.message)]
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, DataModule.from_arrays(low, x_val=1 - high, batch_size=6))
    assert saver.monitor == stop.monitor == "val/loss"
    worse = trainer.callback_metrics["val/loss"]
    assert worse > trainer.callback_metrics["train/loss"]
    assert saver.best_model_score == stop.best_score == worse and stop.wait_count == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist=True")  # forks have the tests' filters
def test_all_callbacks_together_on_two_processes(tmp_path):
    """Metrics of the whole set on both ranks, files of rank zero only, and no rank waits for the other."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        max_epochs=2,
        logger=False,
        default_root_dir=tmp_path,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[EMA(0.9), *(cls() for cls in CLASSES if cls is not EMA)],
    )
    model = FakeVAE((1, 6, 6), lr=0.0)
    data = digits((1, 6, 6), 48)
    trainer.fit(model, DataLoader(data, 8), DataLoader(data, 8))
    with torch.no_grad():
        mu, _ = model.eval().posterior(data.tensors[0])
    assert trainer.callback_metrics["val/active_units"] == (mu.var(0, unbiased=False) > 0.01).sum()
    assert trainer.callback_metrics["train/samples_per_s"] > 0
    assert (tmp_path / "pictures" / "samples.png").is_file()


# ---- EpochMetrics ----------------------------------------------------------------------------------------------------


def test_epoch_metrics_file_has_line_per_epoch(fit, events, tmp_path):
    fit(aezoo.create_model("dense_ae", input_shape=(1, 8, 8)), zoo.EpochMetrics(), max_epochs=3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "0" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(-1, 0), (0, 3), (1, 6), (2, 9)]
    assert "val/loss" in lines[0] and "train/loss" not in lines[0]
    for name in ("train/loss", "val/loss"):
        assert [line[name] for line in lines[1:]] == [event.value for event in events().Scalars(name)]


def test_a_dry_run_and_a_test_write_no_lines(fit, tmp_path):
    fit(FakeVAE((4,)), zoo.EpochMetrics(), fast_dev_run=True)
    assert not [*tmp_path.rglob("metrics.jsonl")]


def test_interrupted_epoch_has_metrics_line(fit, tmp_path):
    class Stop(pl.callbacks.EarlyStopping):
        def on_train_epoch_end(self, trainer, pl_module):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(FakeVAE((4,)), zoo.EpochMetrics(), Stop("val/loss"))
    lines = (tmp_path / "run" / "0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [-1, 0]
