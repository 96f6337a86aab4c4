"""Warnings and the report about steps that are not finite."""

import copy
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from aezoo.callbacks.base import run_folder, unpack
from aezoo.callbacks.checkpoints import checkpoint_callback
from aezoo.data.loaders import EpochSampler
from aezoo.io import atomic_files
from aezoo.io.run_folder import checkpoints_of
from aezoo.training.input_checks import not_finite

FILE = "fault.txt"
_SHOWN = 8


@dataclass(frozen=True)
class Fault:
    """A bad step.

    Attributes:
        epoch: counted from 0, as are batch and step.
        batch: index within the epoch.
        step: optimiser steps of the run, including this one.
        terms: loss terms that were not finite.
        parameters: names of parameters with a gradient that was not finite.
        consecutive: number of bad steps in a row.
        total: number of bad steps in the run.
    """

    epoch: int
    batch: int
    step: int
    terms: list[str]
    parameters: list[str]
    consecutive: int
    total: int


def broken_terms(outputs: Any) -> list[str]:
    """Return the names of the loss terms that are not finite; `loss` only if no other term is."""
    terms = outputs.items() if isinstance(outputs, dict) else [("loss", outputs)]
    bad = [name for name, value in terms if isinstance(value, Tensor) and not bool(value.isfinite().all())]
    return [name for name in bad if name != "loss"] or bad


def print_warning(trainer: pl.Trainer, fault: Fault, batch: Any) -> None:
    """Log a skipped step if it is one of the first five or its number is a power of two."""
    if not trainer.is_global_zero or (fault.total > 5 and fault.total & (fault.total - 1)):
        return
    parts = sorted({name.partition(".")[0] for name in fault.parameters})
    rows = _bad_samples(trainer, fault, batch)
    samples = f"; training sample(s) {_list(rows)} contain NaN or infinite values" if rows else ""
    print(
        f"aezoo: step {fault.step} skipped (epoch {fault.epoch}, batch {fault.batch}): {', '.join(fault.terms)} not "
        f"finite{f' in {_list(parts)}' if parts else ''}{samples} ({fault.consecutive} in a row, {fault.total} total)",
        file=sys.stderr,
    )


def write_report(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    fault: Fault,
    batch: Any,
    by_term: dict[str, int],
    by_part: dict[str, int],
) -> str:
    """Write the report on rank zero.

    Returns:
        The error message that ends the run, one line.
    """
    folder = run_folder(trainer)
    layer = _first_broken(module, fault.batch, batch) if batch is not None else None
    bad, rows = _bad_samples(trainer, fault, batch), _rows(trainer, fault)
    command = _command(trainer, folder)
    lines = [
        f"{fault.consecutive} optimiser steps in a row were not finite, the last one at epoch {fault.epoch}, batch "
        f"{fault.batch}, step {fault.step}.",
        f"loss terms not finite there: {', '.join(fault.terms)}",
        f"gradients not finite there: {', '.join(fault.parameters) or 'none'}",
        f"first layer whose output is not finite: {layer or 'none'}",
        f"training samples with values that are not finite: {', '.join(map(str, bad)) or 'none'}",
        f"training samples of that batch: {', '.join(map(str, rows)) or 'unknown'}",
        f"seed: {getattr(module, '_fit_seed', None)}",
        f"skipped steps of the run by loss term: {dict(by_term)}",
        f"skipped steps of the run by part of the model: {dict(by_part)}",
        f"reproduce with: {command or 'fit from the last checkpoint with the same seed'}",
    ]
    if trainer.is_global_zero:
        text = "\n".join(lines) + "\n"
        atomic_files.write(folder / FILE, lambda file: file.write(text.encode()))
    where = f", first in {layer}" if layer else f", gradients of {_list(fault.parameters)}" if fault.parameters else ""
    cause = f"clean training sample(s) {_list(bad)}" if bad else "lower --model.lr or inspect that batch"
    if not bad and trainer.precision == "16-true":
        # the smallest positive number in float16 is 6e-8
        cause = "Adam's epsilon of 1e-8 is 0 in float16: give --trainer.precision 16-mixed or bf16-true"
    return (
        f"{fault.consecutive} steps in a row were not finite (epoch {fault.epoch}, batch {fault.batch}: "
        f"{', '.join(fault.terms)}{where}): {cause}; the last good checkpoint is kept; see {folder / FILE}"
        f"{f'; reproduce with: {command}' if command else ''}"
    )


def _list(items: list[Any]) -> str:
    text = ", ".join(map(str, items[:_SHOWN]))
    return text if len(items) <= _SHOWN else f"{text}, ... ({len(items)} total)"


def _bad_samples(trainer: pl.Trainer, fault: Fault, batch: Any) -> list[int]:
    """Return the indices of samples in a batch that are not finite; positions in the batch if these are unknown."""
    x = None if batch is None else unpack(batch)[0]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return []
    invalid_mask = getattr(trainer.lightning_module, "invalid_mask", not_finite)
    bad = invalid_mask(x).nonzero().flatten().tolist()
    rows = _rows(trainer, fault) if bad else []
    return [rows[i] if i < len(rows) else i for i in bad]


def _rows(trainer: pl.Trainer, fault: Fault) -> list[int]:
    """Return the indices of the training samples in the batch of a fault; empty for loaders of other packages."""
    loader = trainer.train_dataloader
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if not (isinstance(sampler, EpochSampler) and isinstance(size, int)):
        return []
    sampler = copy.copy(sampler)
    sampler.skip, sampler.epoch = (-1, 0), fault.epoch
    return sampler.rows()[fault.batch * size : (fault.batch + 1) * size].tolist()


def _command(trainer: pl.Trainer, folder: Path) -> str | None:
    """Return how to reproduce the fault: a command if the run was started by one, else a line of Python."""
    if not (folder / "config.yaml").is_file():
        last = getattr(checkpoint_callback(trainer), "last_model_path", None)
        seed = getattr(trainer.lightning_module, "_fit_seed", None)
        where = f"ckpt_path={last!r}" if last else f"after seed_everything({seed})"
        return f"trainer.fit(model, data, {where}) with FaultGuard(patience=1) among the trainer's callbacks"
    saved = any(checkpoints_of(folder).glob("*.ckpt"))
    start = ["--resume", str(folder)] if saved else ["-c", str(folder / "config.yaml")]
    return shlex.join(["aezoo", "fit", *start, "--fault_guard.patience", "1"])


def _first_broken(module: pl.LightningModule, batch_idx: int, batch: Any) -> str | None:
    """Return the first layer whose output is not finite for finite inputs, found by another forward pass."""
    found: list[str] = []

    def make_hook(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            if not found and all(map(_is_finite, inputs)) and not _is_finite(output):
                found.append(f"{name} ({type(layer).__name__})")

        return hook

    # only layers without children: a module that contains a broken layer is broken, too
    leaves = [(name, layer) for name, layer in module.named_modules() if name and not any(layer.children())]
    handles = [layer.register_forward_hook(make_hook(name)) for name, layer in leaves]
    try:
        with _restored_buffers(module), torch.no_grad():
            model: Any = module
            if hasattr(model, "_seed_step"):
                model._seed_step(batch_idx)
            # as in the training step, whose batch may be uint8
            (model._terms if hasattr(model, "_terms") else model.loss)(*unpack(batch))
    except Exception:  # an error here must not hide the fault
        return None
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@contextmanager
def _restored_buffers(module: nn.Module) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return True
