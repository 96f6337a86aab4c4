"""Non-finite steps change nothing, are counted, and end a run if there are too many in a row."""

import copy
import shlex
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import aezoo
from aezoo.callbacks import EMA, Checkpoints, FaultGuard, fault_guard
from aezoo.cli.main import main
from aezoo.data import DataModule
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE
from aezoo.speed import fast_loop
from aezoo.training.buffers import Buffers

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
BATCHES = 6


class Norms(VAE):
    """A small model with BatchNorm and a buffer replaced in each step, and non-finite values in chosen steps.

    Args:
        faults: what is not finite, by batch number: the term kl, the gradient of one layer, (overflow) its squares, or
            the loss, with finite gradients.
        buffers: without buffers, the guard does not have to save any.
    """

    def __init__(self, faults: dict[int, str] | None = None, optimizer: str = "adam", *, buffers: bool = True) -> None:
        torch.manual_seed(0)
        # the variance of a Gaussian is a buffer as well
        likelihood = "gaussian" if buffers else "bernoulli"
        super().__init__((6,), latent_dim=2, hidden_dims=(5,), lr=0.01, likelihood=likelihood, optimizer=optimizer)
        self.layer = next(part for part in self.encoder.modules() if isinstance(part, nn.Linear))
        self.faults, self.batches = faults or {}, 0
        if buffers:
            self.encoder.insert(1, nn.BatchNorm1d(6))
            self.register_buffer("steps", torch.zeros(1))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        # registered here, since started processes get the model without its hooks
        values = {"gradient": torch.inf, "overflow": 1e20}
        self.layer.weight.register_hook(lambda g: g.fill_(values[self.fault]) if self.fault in values else g)

    @property
    def fault(self) -> str | None:
        return self.faults.get(self.batches - 1)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        if self.training:
            self.batches += 1
            if "steps" in self._buffers:
                self.steps = self.steps + 1
        terms = super().loss(x, y)
        if self.training and self.fault == "kl":
            terms["kl"] = terms["kl"] * torch.nan
            terms["loss"] = terms["loss"] + terms["kl"]
        if self.training and self.fault == "loss":
            terms["loss"] = terms["loss"] + torch.inf
        return terms


class States(pl.Callback):
    """The state that a batch may change, before the first and after each."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, *args):
        if not self.seen:
            self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self._look(trainer, pl_module)

    def _look(self, trainer, pl_module):
        state = dict(pl_module.state_dict())
        for i, optimizer in enumerate(trainer.optimizers):
            for j, moments in optimizer.state_dict()["state"].items():
                state |= {f"{name} {i} {j}": value for name, value in moments.items()}
        for callback in trainer.callbacks:
            if isinstance(callback, EMA) and callback._average_model is not None:
                average = callback._average_model.module.state_dict()
                state |= {f"average {name}": value for name, value in average.items()}
        self.seen.append({name: torch.as_tensor(value).clone() for name, value in state.items()})


def table(n: int = BATCHES * 8, bad: int | None = None) -> TensorDataset:
    x = torch.rand(n, 6, generator=torch.Generator().manual_seed(1))
    if bad is not None:
        x[bad, 2] = torch.nan
    return TensorDataset(x)


def guard(defers: bool = False, patience: int = 5, every_n_steps: int = 50) -> FaultGuard:
    made = FaultGuard(patience, every_n_steps)
    made._defers = defers
    return made


def fit(model, *callbacks, epochs=1, data=None, tmp_path=None, **options):
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **{"enable_checkpointing": any(isinstance(c, Checkpoints) for c in callbacks)} | options,
    )
    trainer.fit(model, DataLoader(table() if data is None else data, 8))
    return trainer


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in after if name not in before or not torch.equal(before[name], after[name])]


# ---- single non-finite steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("defers", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("fault", ["kl", "gradient", "overflow", "batch"])
def test_non_finite_step_is_skipped_and_counted(capsys, fault, optimizer, defers):
    made, states = guard(defers), States()
    model = Norms({3: fault}, optimizer)
    data = table(bad=3 * 8 + 5) if fault == "batch" else None
    fit(model, made, EMA(0.9), states, data=data)
    assert differing(states.seen[3], states.seen[4]) == []
    for i in (0, 1, 2, 4, 5):
        changed = differing(states.seen[i], states.seen[i + 1])
        assert {"encoder.1.running_mean", "encoder.1.num_batches_tracked", "steps", "average encoder.2.weight"} <= {
            *changed
        }
        assert {name for name, _ in model.named_parameters()} <= {*changed}
    assert all(value.isfinite().all() for value in states.seen[-1].values())
    assert made.skipped == 1
    terms = {"kl": ["kl"], "batch": ["nll", "kl", "elbo"]}.get(fault, ["gradient"])
    assert dict(made.by_term) == dict.fromkeys(terms, 1)
    # the KL term does not depend on the decoder
    parts = ["encoder", "decoder"] if fault == "batch" else ["encoder"]
    assert dict(made.by_part) == dict.fromkeys(parts, 1)
    line = next(line for line in capsys.readouterr().err.splitlines() if "skipped" in line)
    assert "step 4 skipped (epoch 0, batch 3)" in line and all(term in line for term in terms)
    assert ("sample(s) 5 contain NaN" in line) == (fault == "batch" and not defers)


@pytest.mark.parametrize("ema", [True, False])
def test_device_guard_matches_host_guard(ema):
    """Consecutive faults, at the start, at the end of an epoch and of several kinds; several checks per epoch."""
    faults = {0: "kl", 3: "gradient", 4: "kl", 5: "kl", 9: "gradient", 11: "kl", 13: "kl"}
    ends = []
    for made in (guard(False), guard(True, every_n_steps=2)):
        model, states = Norms(faults), States()
        # the average starts after the first step, which is bad, so the host does not know its initial value
        fit(model, made, *([EMA(0.9, start_step=1)] if ema else []), states, epochs=3)
        ends.append((states.seen[-1], made.state_dict()))
    (host, counted), (device, counted_there) = ends
    assert differing(host, device) == []
    assert counted == counted_there
    assert counted == {
        "skipped": 7,
        "in_a_row": 0,
        "by_term": {"kl": 5, "gradient": 2},
        "by_part": {"encoder": 7},
    }


class Hooked(FaultGuard):
    """Its hooks are called in every step, as those of any subclass."""


CLIPS = {
    "no clipping": {},
    "norms that are clipped": {"gradient_clip_val": 0.05},
    "norms that are small": {"gradient_clip_val": 1e9},
    "values": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


@pytest.mark.slow
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_fast_loop_guard_matches_hook_guard(monkeypatch, capsys, optimizer, clip):
    faults = {0: "kl", 2: "gradient", 3: "overflow", 7: "loss", 11: "kl", 12: "overflow", 17: "kl"}
    calls = {FaultGuard: 0, Hooked: 0}
    original = FaultGuard.on_before_optimizer_step

    def counted(self, *args):
        calls[type(self)] += 1
        original(self, *args)

    monkeypatch.setattr(FaultGuard, "on_before_optimizer_step", counted)
    ends = []
    for light, made in ((True, FaultGuard()), (True, Hooked()), (False, FaultGuard())):
        states = States()
        with monkeypatch.context() as patch:
            if not light:
                patch.setattr(fast_loop, "install_fast_loop", lambda trainer: False)
            fit(Norms(faults, optimizer, buffers=False), made, EMA(0.9), states, epochs=3, **CLIPS[clip])
        ends.append((states.seen, made.state_dict(), [t for t in capsys.readouterr().err.splitlines() if "skip" in t]))
        if light:
            called = dict(calls)
    (asked, counts, lines), *others = ends
    for seen, *told in others:
        for before, after in zip(seen, asked, strict=True):
            assert differing(before, after) == []
        assert [counts, lines] == told
    assert counts == {
        "skipped": 7,
        "in_a_row": 1,
        "by_term": {"kl": 3, "gradient": 3, "loss": 1},
        "by_part": {"encoder": 6},
    }
    # called only for a bad step and for the good one after it, which resets the row
    assert called == {FaultGuard: 7 + 4, Hooked: 3 * BATCHES}


class Alternate(pl.Callback):
    """Clips by norm and by value in turn."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.gradient_clip_algorithm = [GradClipAlgorithmType.NORM, GradClipAlgorithmType.VALUE][batch_idx % 2]


class Tenth(Norms):
    """Its own clipping, set after construction."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.clip_gradients = lambda optimizer, *args, **kwargs: [
            p.grad.mul_(0.1) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]


@pytest.mark.parametrize(("model", "callbacks"), [(Norms, [Alternate]), (Tenth, [])])
def test_gradients_are_clipped_as_configured(monkeypatch, model, callbacks):
    ends = []
    for light in (True, False):
        states = States()
        with monkeypatch.context() as patch:
            if not light:
                patch.setattr(fast_loop, "install_fast_loop", lambda trainer: False)
            made = (FaultGuard(), states, *(callback() for callback in callbacks))
            fit(model(buffers=False), *made, epochs=2, gradient_clip_val=0.02)
        ends.append(states.seen)
    for asked, wanted in zip(*ends, strict=True):
        assert differing(wanted, asked) == []


class Shake(pl.Callback):
    """Changes gradients before a step, to non-finite ones in the third."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 2:
            pl_module.layer.weight.grad.fill_(torch.nan)


def test_guard_runs_after_gradient_changes():
    made, model = FaultGuard(), Norms(buffers=False)
    fit(model, Shake(), made)
    assert made.skipped == 1
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}], ids=["sum", "clip"])
def test_guard_falls_back_when_step_is_not_one_batch(options):
    made = FaultGuard()
    states = States()
    fit(Norms({2: "loss"}, buffers=False), made, states, **options)
    assert made.skipped == 1
    # with two accumulated batches, the first one is bad
    bad = 3 if "accumulate_grad_batches" in options else 2
    assert differing(states.seen[bad], states.seen[bad + 1]) == []


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch 2.12
@pytest.mark.parametrize("kind", ["sparse", "half", "channels_last"])
def test_gradients_of_every_layout_are_checked(kind):
    for value in (1.0, torch.nan, torch.inf, 1e30):
        gradient = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
        gradient[1, 0, 2, 0] = value
        if kind == "half":
            gradient = gradient.half() * 6e4  # squares overflow float16
        elif kind == "sparse":
            gradient = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), gradient, (4, 3, 4, 4), check_invariants=True)
        assert fault_guard._overflows([torch.ones(3, dtype=gradient.dtype), gradient]) == (value != 1), value
        mixed = [torch.ones(3, dtype=torch.float64), gradient, torch.ones(3, dtype=torch.bfloat16)]
        # squares of 1e30 are finite in float64
        assert fault_guard._overflows(mixed) == (value != 1 if kind == "half" else value not in (1.0, 1e30)), value


@pytest.mark.parametrize("defers", [False, True], ids=["host", "device"])
def test_finite_run_is_unchanged_by_guard(capsys, defers):
    ends = []
    for callbacks in ([guard(defers)], []):
        states = States()
        fit(Norms(), *callbacks, states, epochs=2)
        ends.append(states.seen[-1])
    assert differing(*ends) == []
    assert "skipped" not in capsys.readouterr().err


def test_reading_state_keeps_skip_count():
    made = guard(True)
    seen = []

    class Save(pl.Callback):
        def on_train_batch_end(self, *args):
            seen.append(made.state_dict()["skipped"])

    fit(Norms({1: "kl", 2: "gradient"}), made, Save())
    assert seen == [0, 1, 2, 2, 2, 2]
    assert made.skipped == 2


@pytest.mark.parametrize("defers", [False, True], ids=["host", "device"])
def test_all_accumulated_batches_of_bad_step_are_dropped(defers):
    made, states = guard(defers), States()
    fit(Norms({2: "kl"}), made, states, accumulate_grad_batches=2)
    # batches 2 and 3 are one step
    assert differing(states.seen[2], states.seen[4]) == []
    assert differing(states.seen[4], states.seen[6]) != []
    assert made.skipped == 1


def test_gradient_scaler_overflows_are_not_counted():
    made, states = guard(), States()
    # the scale is so large that the first steps overflow in float16
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    fit(Norms({20: "kl"}), made, states, epochs=4, plugins=[plugin])
    assert scaler.get_scale() < 2**18
    assert differing(states.seen[0], states.seen[1])  # the statistics of BatchNorm, no weights
    assert not {name for name, _ in Norms().named_parameters()} & {*differing(states.seen[0], states.seen[1])}
    assert differing(states.seen[20], states.seen[21]) == []
    assert (made.skipped, dict(made.by_term)) == (1, {"kl": 1})
    assert differing(states.seen[-2], states.seen[-1]) != []
    assert all(value.isfinite().all() for value in states.seen[-1].values())


class Two(pl.LightningModule):
    """Two optimisers in one step, one for each layer; sometimes one of them has a bad gradient."""

    def __init__(self, bad: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second, self.bad = nn.Linear(6, 6), nn.Linear(6, 6), bad

    def training_step(self, batch, batch_idx):
        for layer, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
            loss = (layer(batch[0]) - batch[0]).square().mean()
            if layer is self.second and batch_idx == self.bad:
                loss = loss * torch.inf
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(layer.parameters(), 0.01, fused=True) for layer in (self.first, self.second)]


def test_momentum_starts_at_first_finite_step():
    """If torch's SGD kernel skips its very first step, the momentum is uninitialised memory."""
    ends = []
    for defers in (False, True):
        model = Norms({0: "kl"}, "sgd")
        fit(model, guard(defers))
        ends.append(model.state_dict())
    assert differing(*ends) == []


STARTED = {
    "deep_svdd": {},
    "vamp_vae": {"likelihood": "gaussian", "n_components": 4},
    "topk_sae": {"data_init": True, "k": 2},
}


@pytest.mark.parametrize("defers", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("name", STARTED)
def test_data_init_uses_first_finite_batch(name, defers):
    """A first batch that overflows must not initialise parameters, nor prevent later initialisation."""

    class StateRecorder(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                pl_module.held = [parameter.detach().clone() for parameter in pl_module.parameters()]
            if batch_idx == first:
                pl_module.began = {n: v.clone() for n, v in pl_module.state_dict().items()}

    ends = []
    for first in (0, 1):
        torch.manual_seed(0)
        model = aezoo.create_model(name, (6,), optimizer="sgd", lr=1e-9, latent_dim=8, **STARTED[name])
        x = table().tensors[0]
        if first:
            x = torch.cat([x[:8] + 1e25 * torch.eye(8)[:, :1], x])
        fit(model, guard(defers), StateRecorder(), data=TensorDataset(x))
        assert model.started and not model._before_start
        ends.append(model.began)
    for key, value in ends[0].items():
        if key != "since_fired_N":
            torch.testing.assert_close(ends[1][key], value, msg=key)


@pytest.mark.parametrize("defers", [False, True], ids=["host", "device"])
def test_only_optimiser_with_bad_gradients_skips(defers):
    made, states = guard(defers), States()
    fit(Two(bad=2), made, states)
    changed = differing(states.seen[2], states.seen[3])
    assert "first.weight" in changed and not any(name.startswith("second") or " 1 " in name for name in changed)
    assert "second.weight" in differing(states.seen[3], states.seen[4])
    assert made.skipped == 1
    assert dict(made.by_part) == {"second": 1}


# ---- end of a run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defers", [False, True], ids=["host", "device"])
def test_patience_ends_run_with_report_and_good_weights(tmp_path, defers):
    model = Norms(dict.fromkeys(range(BATCHES + 2, 99), "kl"))
    made, saver = guard(defers, patience=3, every_n_steps=1), Checkpoints(dirpath=str(tmp_path / "checkpoints"))
    with pytest.raises(AezooError, match="3 steps in a row were not finite") as error:
        fit(model, made, saver, epochs=3, tmp_path=tmp_path)
    assert "\n" not in str(error.value) and "epoch 1, batch 4: kl" in str(error.value)
    assert model.batches == BATCHES + 5 + 1  # one more to find the layer
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == BATCHES
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    text = (tmp_path / "fault.txt").read_text()
    assert "loss terms not finite there: kl" in text and "at epoch 1, batch 4" in text
    assert "encoder.2.weight" in text and f"ckpt_path='{tmp_path}/checkpoints/last.ckpt'" in text


def test_report_names_first_broken_layer(tmp_path):
    model = Norms()
    with torch.no_grad():
        model.decoder[1].weight[0, 0] = 3e38

    class Grow(pl.Callback):
        """Finite for the first batch, too large for the following ones."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.decoder[1].bias.data[0] = 3e38 if batch_idx else 0.0

    with pytest.raises(AezooError, match=r"first in decoder"):
        fit(model, guard(patience=2), Grow(), tmp_path=tmp_path)
    assert "decoder." in (tmp_path / "fault.txt").read_text()


@pytest.mark.parametrize(
    ("precision", "cure"), [("32-true", "lower --model.lr or inspect"), ("16-true", "16-mixed or bf16-true")]
)
def test_ending_error_suggests_remedy_for_precision(tmp_path, precision, cure):
    with pytest.raises(AezooError, match=cure):
        fit(Norms(dict.fromkeys(range(99), "kl")), guard(patience=2), precision=precision, tmp_path=tmp_path)


def test_finite_step_resets_patience():
    made = guard(patience=2)
    fit(Norms({0: "kl", 2: "kl", 4: "kl"}), made)
    assert made.skipped == 3


@pytest.mark.slow
@pytest.mark.parametrize("folder", [None, "elsewhere"])
def test_reported_command_reproduces_fault(tmp_path, monkeypatch, capsys, folder):
    """From the command line: exit code 2, one line with the sample numbers of the batch, and how to load them."""
    monkeypatch.chdir(tmp_path)
    true = VAE.loss

    def broken(self, x, y=None):
        terms = true(self, x, y)
        if self.training and self.trainer.current_epoch == 1:
            terms["kl"] = terms["kl"] * torch.nan
            terms["loss"] = terms["nll"] + terms["kl"]
        return terms

    monkeypatch.setattr(VAE, "loss", broken)
    off = [f"--{name}.every_n_epochs=0" for name in ("reconstructions", "samples", "traversal", "latents", "filters")]
    argv = ["fit", "--model=vae", "--model.hidden_dims=[8]", "--data.name=digits", "--data.batch_size=200", *off]
    argv += ["--projector.n=0", "--code_statistics.every_n_epochs=0", "--trainer.max_epochs=3"]
    argv += [] if folder is None else [f"--checkpoints.dirpath={folder}"]
    with pytest.raises(SystemExit) as end:
        main([*argv, "--fault_guard.patience=2"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "aezoo: 2 steps in a row were not finite (epoch 1, batch 1: kl" in error.splitlines()[-1]
    run = Path("runs/vae-digits/0")
    report = dict(line.split(": ", 1) for line in (run / "fault.txt").read_text().splitlines()[1:])
    rows = [int(row) for row in report["training samples of that batch"].split(", ")]
    order = DataModule("digits", batch_size=200)
    order.setup("fit")
    loader = order.train_dataloader()
    loader.sampler.set_epoch(1)
    assert rows == loader.sampler.rows()[200:400].tolist()
    assert torch.load(Path(folder or run / "checkpoints") / "last.ckpt", weights_only=True)["epoch"] == 0
    command = shlex.split(report["reproduce with"])
    assert command[:3] == ["aezoo", "fit", "--resume"]
    with pytest.raises(SystemExit) as end:
        main(command[1:])
    assert end.value.code == 2
    assert "1 steps in a row were not finite (epoch 1, batch 0: kl" in capsys.readouterr().err.splitlines()[-1]
    assert aezoo.load_model(run).encoder[1].weight.isfinite().all()


def test_counts_survive_a_checkpoint():
    made = guard()
    fit(Norms({1: "kl"}), made)
    other = guard()
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    assert other.state_dict() == made.state_dict()


@pytest.mark.parametrize("values", [{"patience": -1}, {"every_n_steps": 0}])
def test_bad_values_are_refused(values):
    with pytest.raises(AezooError, match=next(iter(values))):
        FaultGuard(**values)


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


def test_guard_without_per_batch_state_is_capturable():
    found = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            found.append(trainer.callbacks[0].capturable)

    for model, defers in ((Norms(), True), (VAE((6,), hidden_dims=(5,)), True), (VAE((6,), hidden_dims=(5,)), False)):
        fit(model, guard(defers), Look(), limit_train_batches=1)
    assert found == [False, True, False]


def test_each_replay_of_a_recorded_step_is_counted():
    """As in the fast loop: the hook is called once, while the step is recorded, and notified of each replay."""
    made, average = guard(True), EMA(0.9)
    model = VAE((6,), hidden_dims=(5,))
    outputs, seen = {"kl": torch.zeros(())}, {}

    class Replays(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            optimizer = trainer.optimizers[0]
            for parameter in pl_module.parameters():
                parameter.grad = torch.zeros_like(parameter)
            made.on_before_optimizer_step(trainer, pl_module, optimizer)
            captured = optimizer.found_inf
            for batch_idx, bad in enumerate((0, 1, 1, 0, 1)):
                if batch_idx == 3:
                    # a batch without a graph
                    outputs["kl"].zero_()
                    made.on_before_optimizer_step(trainer, pl_module, optimizer)
                    assert average.skipped is not captured
                    made.on_train_batch_end(trainer, pl_module, outputs, None, batch_idx)
                captured.fill_(bad)  # as a replay does
                outputs["kl"].fill_(torch.nan if bad else 0.0)
                made.replayed()
                assert average.skipped is captured
                made.on_train_batch_end(trainer, pl_module, outputs, None, batch_idx)
            seen.update(made.state_dict())
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(model, made, average, Replays())
    assert seen["skipped"] == 3 and seen["in_a_row"] == 1
    assert seen["by_term"] == {"kl": 3}


def test_buffers_are_restored_without_a_joint_kernel(monkeypatch):
    monkeypatch.delattr(torch, "_foreach_copy_")
    layer = nn.BatchNorm1d(3)
    kept = Buffers(layer)
    kept.remember()
    layer(torch.rand(4, 3))
    assert layer.num_batches_tracked == 1
    kept.restore()
    assert layer.num_batches_tracked == 0 and not layer.running_mean.any()


def test_norms_are_taken_without_a_joint_kernel(monkeypatch):
    monkeypatch.delattr(torch, "_foreach_norm")
    norms = fault_guard._norms([torch.ones(2, 3, device="meta")])
    assert [norm.shape for norm in norms] == [()]


# ---- several processes -----------------------------------------------------------------------------------------------


class Ranks(pl.Callback):
    """Saves the final state of each rank to a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def on_train_end(self, trainer, pl_module):
        made = next(callback for callback in trainer.callbacks if isinstance(callback, FaultGuard))
        state = {"skipped": made.skipped, "by_part": dict(made.by_part), "weights": pl_module.state_dict()}
        torch.save(state, Path(self.folder) / f"{trainer.global_rank}.pt")


class OneRank(Norms):
    """The loss is not finite in the second process only."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x, y)
        if self.training and self.batches == 2 and self.global_rank == 1:
            terms["loss"] = terms["loss"] * torch.nan
        return terms


@pytest.mark.slow
def test_two_processes_skip_the_same_steps(tmp_path):
    fit(OneRank(), guard(), Ranks(tmp_path), devices=2, strategy="ddp_fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["skipped"] == second["skipped"] == 1
    assert first["by_part"] == second["by_part"] == {"encoder": 1, "decoder": 1}
    for name, value in first["weights"].items():
        assert value.isfinite().all(), name
        # each rank has its own BatchNorm statistics
        assert "running" in name or torch.equal(value, second["weights"][name]), name
