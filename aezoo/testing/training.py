"""Checks of training: fits and evaluations, seeds, and what is saved of a trained model."""

import inspect
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from aezoo.autoencoder import Autoencoder
from aezoo.data import DataModule
from aezoo.data.array import LAYOUTS
from aezoo.io.checkpoint import load_model, save_model
from aezoo.registry import name_of
from aezoo.testing.subject import (
    BATCH,
    Subject,
    as_check,
    equal,
    require,
    require_close,
    require_shape,
    snapshot,
    state_shapes,
)

_OVERFIT_STEPS = 250


def fit(model: Autoencoder, batches: list[Tensor], **options: Any) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Train on the batches once; the loss terms of every step, and what was logged."""
    recorder = _Recorder()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(folder, max_epochs=1, callbacks=[recorder], **options)
        trainer.fit(model, _loader(batches))
    return recorder.losses, dict(trainer.callback_metrics)


class _Recorder(pl.Callback):
    """Keeps the loss terms of every step."""

    def __init__(self) -> None:
        self.losses: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append({name: value.detach().clone() for name, value in outputs.items()})


def _trainer(folder: str, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False, **quiet, **options}
    return pl.Trainer(default_root_dir=folder, **settings)


def _loader(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


@as_check
def check_deterministic_evaluation(subject: Subject) -> None:
    """In evaluation the same input gives the same output, and validation gives the same figures, for any seed."""
    model, x = subject.build().eval(), subject.data()
    state = snapshot(model)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in (1, 2):
            torch.manual_seed(seed)
            with torch.no_grad():
                outputs = {"encode": model.encode(x), "forward": model(x), "score": model.score(x)}
            trainer = _trainer(folder)
            trainer.validate(model, _loader([x, subject.data(seed=1)]), verbose=False)
            figures.append(outputs | dict(trainer.callback_metrics))
            model.eval()
    for name, value in figures[0].items():
        require(torch.equal(value, figures[1][name]), f"{name} differs between two evaluations of the same data")
    for name, value in snapshot(model).items():
        require(torch.equal(value, state[name]), f"evaluation changes {name}")


@as_check
def check_loop(subject: Subject) -> None:
    """Fit, validate, test and predict run on batches x, (x,) and (x, y) and report every loss term."""
    model, x, y = subject.build(), subject.data(), torch.arange(BATCH) % 2
    batches = _loader([x, (x,), (x, y)])
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(folder, max_epochs=1)
        trainer.fit(model, batches, batches)
        figures = dict(trainer.callback_metrics)
        trainer.test(model, batches, verbose=False)
        figures |= trainer.callback_metrics
        found: Any = trainer.predict(model, batches)
    terms = model.eval().loss(x)
    wanted = {f"{stage}/{name}" for stage in ("train", "val", "test") for name in terms}
    wanted |= {f"{stage}/{name}" for stage in ("val", "test") for name in ("mse", "psnr")}
    require(wanted <= figures.keys(), f"does not report {', '.join(sorted(wanted - figures.keys()))}")
    for name, value in figures.items():
        require(bool(value.isfinite().all()), f"{name} is {value}")
    with torch.no_grad():
        z = model.encode(x)
        expected = {"code": z, "reconstruction": model.decode(z), "score": model.anomaly_score(x)}
        drawn = not torch.equal(expected["score"], model.anomaly_score(x))
    for i, step in enumerate(found):
        for name, value in expected.items():
            require_shape(f"predicted {name}", step[name], tuple(value.shape))
            if name != "score" or not drawn:
                require_close(f"the predicted {name}", step[name], value, 1e-4)
        require(("label" in step) == (i == 2), "predictions hold labels if and only if the batch does")


@as_check
def check_overfits(subject: Subject) -> None:
    """Training on 8 samples lowers the loss and reconstructs them better than their mean does."""
    if "lr" in inspect.signature(subject.cls).parameters:
        # adversarial models may oscillate at a learning rate other than their own
        with suppress(AssertionError):
            _overfit(subject, lr=3e-3)
            return
    _overfit(subject)


def _overfit(subject: Subject, **rate: Any) -> None:
    model, x = subject.build(**rate), subject.data(8)
    overfit = _Overfit(x)
    with tempfile.TemporaryDirectory() as folder:
        _trainer(folder, max_epochs=1, callbacks=[overfit]).fit(model, _loader([x] * _OVERFIT_STEPS))
    require(not overfit.lacks, overfit.lacks)


class _Overfit(pl.Callback):
    """Ends a fit as soon as it reconstructs its samples, and reports the remaining error."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.baseline = x, float((x.mean(0) - x).square().mean())
        self.losses: list[float] = []
        self.lacks = "no step was taken"

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        if (batch_idx + 1) % 25 == 0:
            self.lacks = self._lacks(pl_module)
            trainer.should_stop = not self.lacks

    def _lacks(self, model: Autoencoder) -> str:
        first, last = self.losses[0], sum(self.losses[-5:]) / 5
        if not last < first - 0.02 * abs(first):
            return f"the loss only goes from {first:.4g} to {last:.4g}"
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            mse = float((model.eval()(self.x) - self.x).square().mean())
        model.train()
        if not mse < 0.5 * self.baseline:
            return f"reconstructs with mse {mse:.4g}, the mean of the samples has {self.baseline:.4g}"
        return ""


@as_check
def check_seed(subject: Subject) -> None:
    """The same seed gives the same weights and the same fit, bit for bit, and no code reseeds torch."""
    runs, draws = [], []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        model = subject.build()
        start = snapshot(model)
        losses, _ = fit(model, [subject.data(seed=i) for i in range(3)])
        runs.append((start, losses, snapshot(model)))
        draws.append(torch.rand(()))
    for what, one, two in zip(("initial weights", "losses", "weights after a fit"), *runs[:2], strict=True):
        require(equal(one, two), f"{what} differ between two runs of one seed")
    require(bool(draws[0] != draws[2]), "building or training it resets torch's random state")


@as_check
def check_state_dict(subject: Subject) -> None:
    """The state_dict has the same keys and shapes in every mode, compiled and after a fit, and has every tensor."""
    model = subject.build()
    keys = state_shapes(model)
    require(state_shapes(subject.build()) == keys, "two models of the same arguments have different state_dict keys")
    changes: dict[str, Callable[[], Any]] = {
        "eval()": model.eval,
        "an evaluation": lambda: model(subject.data()),
        "compile()": lambda: model.compile(backend="eager"),
        "train()": model.train,
        "a fit": lambda: fit(model, [subject.data()] * 2),
    }
    for what, change in changes.items():
        change()
        require(state_shapes(model) == keys, f"{what} changes the state_dict's keys or shapes")
    torch.compiler.reset()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            items = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(item, Tensor) for item in items):
                place = f"{path}.{name}".strip(".")
                raise AssertionError(f"{place} is a plain tensor: register it as a buffer or parameter")


@as_check
def check_checkpoint(subject: Subject) -> None:
    """A trained model is the same when loaded from its checkpoint, its run folder or its saved folder."""
    model, x = subject.build(), subject.data()
    name = name_of(subject.cls)
    with tempfile.TemporaryDirectory() as folder:
        logger = CSVLogger(folder, name="run", version="0")
        trainer = _trainer(folder, max_epochs=1, logger=logger, enable_checkpointing=True)
        trainer.fit(model, _loader([x, subject.data(seed=1)]))
        file = Path(trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
        content = torch.load(file, weights_only=True)
        require(
            dict(content["hyper_parameters"]) == dict(model.hparams), "the checkpoint contains other hyperparameters"
        )
        torch.manual_seed(99)  # values that are drawn in the constructor and not saved differ
        if name is None:
            loaded = {"load_from_checkpoint": subject.cls.load_from_checkpoint(file, weights_only=True).eval()}
        else:
            require(content["aezoo"]["model"] == name, "the checkpoint does not carry the registry name")
            loaded = {
                "load_model of the checkpoint": load_model(file),
                "load_model of the run folder": load_model(logger.log_dir),
                "load_model of the saved folder": load_model(save_model(model, Path(folder) / "saved")),
            }
    model.eval()
    for how, other in loaded.items():
        require(type(other) is subject.cls, f"{how} gives a {type(other).__name__}")
        require(dict(other.hparams) == dict(model.hparams), f"{how} changes the hyperparameters")
        require(equal(snapshot(other), snapshot(model)), f"{how} changes weights or buffers")
        with torch.no_grad():
            for part in ("encode", "forward", "score"):
                same = torch.equal(getattr(other, part)(x), getattr(model, part)(x))
                require(same, f"{part} is not the same after {how}: is there state that is not a buffer?")


@as_check
def check_resume(subject: Subject) -> None:
    """A fit resumed from a checkpoint, at the end of an epoch or within one, equals the whole fit, bit for bit.

    A callback writes the checkpoints at the end of a batch, as most do.
    """
    whole, *resumed = 0, *_SaveBatches.after
    with tempfile.TemporaryDirectory() as folder:
        ends = {}
        for start in (whole, *resumed):
            torch.manual_seed(start)  # values that are not in the checkpoint differ
            model, trainer = subject.build(), _trainer(folder, max_epochs=2, callbacks=[_SaveBatches(folder)])
            data = DataModule.from_arrays(
                subject.data(3 * BATCH),
                torch.arange(3 * BATCH) % 2,
                batch_size=BATCH,
                val_fraction=0,
                test_fraction=0,
                layout=LAYOUTS[len(subject.shape)],
            )
            trainer.fit(model, data, ckpt_path=_file(folder, start) if start else None)
            ends[start] = snapshot(model)
    for step in resumed:
        different = sorted(name for name, value in ends[whole].items() if not torch.equal(value, ends[step][name]))
        require(not different, f"a fit that continues from step {step} of 6 ends with other {', '.join(different[:3])}")


class _SaveBatches(pl.Callback):
    """Writes checkpoints of a fit that begins at its first batch: at the end of an epoch of 3, and within one."""

    after = (3, 4)

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        # not global_step, which counts the steps of each of several optimisers
        batches = trainer.fit_loop.total_batch_idx + 1
        if trainer.ckpt_path is None and batches in self.after:
            trainer.save_checkpoint(_file(self.folder, batches))


def _file(folder: str, step: int) -> Path:
    return Path(folder, f"{step}.ckpt")
