"""Skip and count steps that are not finite, and stop the run after several in a row."""

import math
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from aezoo.callbacks import fault_report
from aezoo.callbacks.base import check_count
from aezoo.errors import AezooError
from aezoo.training import distributed
from aezoo.training.arguments import Checked
from aezoo.training.buffers import Buffers
from aezoo.training.optimizers import with_gradients


class FaultGuard(Checked, pl.Callback):
    """Skips optimiser steps whose loss or gradient is not finite; stops the run after `patience` such steps in a row.

    Parameters, optimiser moments, averaged weights and buffers, such as the statistics of BatchNorm, are left as before
    that batch; the step counter and the learning rate schedule advance. A gradient is also treated as not finite if the
    sum of its squares overflows, which would make the moments of an adaptive optimiser infinite. With several
    optimisers, only those with bad gradients skip the step. With gradient accumulation, all batches of the step are
    dropped. Steps that a gradient scaler skips to find its scale are not counted as long as the scale is at least 1.

    Skips are logged at increasing intervals. A run that is stopped in this way leaves `fault.txt` in its folder. A
    shorter run of which all steps were skipped fails at its end. With several processes, only the gradients are
    checked, which all processes share, so that all skip the same steps.

    On a GPU with a fused optimiser, the kernel itself skips the step, without synchronisation: the counters are read
    every `every_n_steps` batches, at the end of an epoch and before saving. Other optimisers on a GPU synchronise once
    per step.

    Args:
        patience: number of consecutive bad steps after which the run is stopped; 0 disables the guard.
        every_n_steps: batches between two checks of the counters on a GPU.

    Attributes:
        skipped: number of steps skipped so far.
        by_term: number of skipped steps for each loss term that was not finite; `gradient` if all terms were finite.
        by_part: number of skipped steps for each part of the model with a gradient that was not finite.
    """

    def __init__(self, patience: int = 5, every_n_steps: int = 50) -> None:
        super().__init__()
        self.patience = check_count(self, "patience", patience, 0)
        self.every_n_steps = check_count(self, "every_n_steps", every_n_steps)
        self.skipped = 0
        self.by_term: Counter[str] = Counter()
        self.by_part: Counter[str] = Counter()
        self._in_a_row = 0
        self._losses: list[Tensor] = []
        self._bad: list[str] | None = None
        self._stepped = False
        self._buffers: Buffers | None = None
        self._device: _DeviceCounters | None = None
        self._captured: Tensor | None = None
        self._averages: list[Any] = []
        self._names: dict[int, str] = {}
        self._scaler: Any = None
        self._defers: bool | None = None  # None: if on a GPU and supported by the optimisers

    @property
    def capturable(self) -> bool:
        """Return whether the hooks can be captured in a CUDA graph: no synchronisation, no state per batch."""
        return self._device is not None and self._buffers is None

    @property
    def is_passive(self) -> bool:
        """Return whether the hooks only call `remember` in finite steps (`is_finite_step`) of a single optimiser."""
        return type(self) is FaultGuard and self.patience > 0 and self._device is None and self._scaler is None

    def remember(self) -> None:
        """Store the state that a skip restores, at the first batch of a step."""
        self._losses.clear()
        if self._buffers is not None:
            self._buffers.remember()

    def is_finite_step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether this step and the previous one are finite; if so, the caller may omit the hooks."""
        gradients = [parameter.grad for parameter in with_gradients(optimizer)]
        return self.is_finite_loss(loss) and bool(gradients) and not _overflows(gradients)

    def is_finite_loss(self, loss: Tensor) -> bool:
        """Return the same from the loss alone, for a step whose gradients are known to be finite."""
        return not self._in_a_row and math.isfinite(loss)

    def replayed(self) -> None:
        """Update the state after the replay of a CUDA graph that contains the hooks, also after its capture."""
        if self._device is None:
            return
        if self._captured is None:
            self._captured = self._device.is_bad
        self._stepped, self._device.is_bad = True, self._captured
        # overwritten by a batch of another size, which is run without a graph
        self._notify_averages(self._captured)

    def state_dict(self) -> dict[str, Any]:
        skipped, in_a_row, by_term, by_part = self.skipped, self._in_a_row, self.by_term, self.by_part
        if self._device is not None:
            # the counts are not reset, since the next read reports them
            counts_read = self._device.read(keep=True)
            skipped, in_a_row = skipped + counts_read.total, counts_read.row
            by_term, by_part = by_term + Counter(counts_read.terms), by_part + self._by_part(counts_read)
        counts = {"by_term": dict(by_term), "by_part": dict(by_part)}
        return {"skipped": skipped, "in_a_row": in_a_row, **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self._in_a_row = int(state_dict["skipped"]), int(state_dict["in_a_row"])
        self.by_term, self.by_part = Counter(state_dict["by_term"]), Counter(state_dict["by_part"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._device, self._buffers, self._bad, self._stepped = None, None, None, False
        self._captured, self._averages = None, []
        self._losses.clear()
        if stage == "fit" and trainer.ckpt_path is None:
            self.load_state_dict({"skipped": 0, "in_a_row": 0, "by_term": {}, "by_part": {}})
        distributed.release_collectives_at_exit(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        fused = all(group.get("fused") for optimizer in trainer.optimizers for group in optimizer.param_groups)
        defers = pl_module.device.type == "cuda" if self._defers is None else self._defers
        if self.patience and defers and fused and self._scaler is None:
            self._device = _DeviceCounters(
                pl_module.device, self._in_a_row, self.every_n_steps, len(trainer.optimizers)
            )
        buffers = Buffers(pl_module)
        self._buffers = buffers if self.patience and buffers else None
        self._averages = list(_averages(trainer))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.remember()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self.patience:
            loss = loss.detach()
            self._losses.append(loss if loss.dtype == torch.float32 else loss.float())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        losses, self._losses = self._losses, []
        parameters = with_gradients(optimizer)
        if not self.patience or not parameters:
            return
        self._stepped = True
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        # losses differ between ranks, but all ranks must make the same decision
        if trainer.world_size > 1 and self._scaler is None:
            losses = []
        if self._device is not None:
            _begin_momentum(optimizer)
            is_bad = self._device.check(optimizer, parameters, [*_norms(gradients), *losses])
            optimizer.found_inf, optimizer.grad_scale = is_bad, None  # type: ignore[attr-defined]
            self._notify_averages(is_bad)
            if self._buffers is not None:
                self._buffers.restore_where(is_bad)
            return
        if self._scaler is not None:
            # the scaler itself skips steps if its scale is too large
            bad = self._overflows_under_scaler(trainer, losses, gradients)
        else:
            bad = _overflows(gradients) or not all(math.isfinite(loss) for loss in losses)
        if bad:
            self._skip(trainer, parameters)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._stepped = self._stepped, False
        if not stepped:
            return
        if self._device is not None:
            self._device.count(outputs, (trainer.current_epoch, batch_idx, trainer.global_step))
            if (batch_idx + 1) % self.every_n_steps == 0 or trainer.is_last_batch:
                self._read_counters(trainer, pl_module, batch)
            return
        bad, self._bad = self._bad, None
        if bad is None:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        terms = fault_report.broken_terms(outputs) or ["gradient"]
        self.by_term.update(terms)
        self.by_part.update({name.partition(".")[0] for name in bad})
        fault = fault_report.Fault(
            trainer.current_epoch, batch_idx, trainer.global_step, terms, bad, self._in_a_row, self.skipped
        )
        fault_report.print_warning(trainer, fault, batch)
        if self._in_a_row >= self.patience:
            self._raise_fault(trainer, pl_module, fault, batch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._device = self._buffers = None
        steps = trainer.global_step // max(1, len(trainer.optimizers))
        if self.patience and 0 < steps <= self.skipped:
            raise AezooError(
                f"all {steps} steps were skipped, since {', '.join(self.by_term)} was not finite: "
                "scale the data (--data.scale standard), or lower --model.lr"
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            return  # the counters go into the file that is being saved
        self._device = self._buffers = None

    def _overflows_under_scaler(self, trainer: pl.Trainer, losses: list[Tensor], gradients: list[Tensor]) -> bool:
        bad = not all(math.isfinite(loss) for loss in losses)
        if not bad and self._scaler.get_scale() < 1:
            bad = _overflows(gradients)
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        return bad

    def _skip(self, trainer: pl.Trainer, parameters: list[nn.Parameter]) -> None:
        """Make the optimiser step a no-op, and restore the state that the batch has already changed."""
        named = [self._names.get(id(p), "?") for p in parameters if _overflows([p.grad])]
        self._bad = [*(self._bad or []), *named]
        for parameter in parameters:
            parameter.grad = None
        if self._buffers is not None:
            self._buffers.restore()
        if len(trainer.optimizers) == 1:
            for callback in self._averages:
                # the number of the skipped step
                callback._latest_update_step = trainer.global_step + 1

    def _read_counters(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Read the counters of the device, the only synchronisation."""
        assert self._device is not None
        counts_read = self._device.read()
        before = self.skipped
        self._add_counts(counts_read)
        if self.skipped == before:
            return
        epoch, batch_idx, step = self._device.position(counts_read)
        terms, names = list(counts_read.terms), [self._names.get(key, "?") for key in counts_read.parameters]
        row = max(counts_read.peak, counts_read.row)
        fault = fault_report.Fault(epoch, batch_idx, step, terms, names, row, self.skipped)
        # report the samples of the current batch only if it is the bad one
        batch = batch if counts_read.ago == 0 else None
        fault_report.print_warning(trainer, fault, batch)
        if row >= self.patience:
            self._raise_fault(trainer, pl_module, fault, batch)

    def _add_counts(self, counts_read: "_Counts") -> None:
        self.skipped += counts_read.total
        self._in_a_row = counts_read.row
        self.by_term.update(counts_read.terms)
        self.by_part.update(self._by_part(counts_read))

    def _by_part(self, counts_read: "_Counts") -> Counter[str]:
        """Return the number of bad steps of each part: the maximum over its parameters."""
        parts: Counter[str] = Counter()
        for key, count in counts_read.parameters.items():
            part = self._names.get(key, "?").partition(".")[0]
            parts[part] = max(parts[part], count)
        return parts

    def _notify_averages(self, is_bad: Tensor | None) -> None:
        # with several optimisers, some weights still change
        if self._device is not None and self._device.n_optimizers == 1:
            for callback in self._averages:
                callback.skipped = is_bad

    def _raise_fault(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, fault: "fault_report.Fault", batch: Any
    ) -> None:
        report = fault_report.write_report(trainer, pl_module, fault, batch, self.by_term, self.by_part)
        raise AezooError(report)


class _Counts:
    """Counts of a device since the last read.

    Attributes:
        row: current number of bad steps in a row.
        peak: maximum number of bad steps in a row.
        total: number of bad steps.
        ago: number of good steps since the last bad one.
        terms: number of steps in which each loss term was not finite.
        parameters: number of steps in which each parameter had a bad gradient, by id.
    """

    def __init__(self, numbers: list[float], terms: dict[str, int], parameters: dict[int, int]) -> None:
        self.row, self.peak, self.total, self.ago = (int(number) for number in numbers)
        self.terms, self.parameters = terms, parameters


class _DeviceCounters:
    """Counters on the training device.

    Args:
        device: the training device.
        in_a_row: bad steps in a row so far.
        window: batches between two reads.
        n_optimizers: number of optimisers that step per batch.

    Attributes:
        is_bad: 1 if a step of the current batch was not finite, else 0.
    """

    def __init__(self, device: torch.device, in_a_row: int, window: int, n_optimizers: int = 1) -> None:
        self.n_optimizers = n_optimizers
        self.is_bad: Tensor | None = None
        # bad steps: current in a row, maximum in a row, total; good steps since the last
        self._numbers = torch.tensor([float(in_a_row), 0.0, 0.0, 0.0], device=device)
        self._keys: dict[int, list[int]] = {}
        self._by_value: dict[int, Tensor] = {}
        self._by_term: Tensor | None = None
        self._terms: list[str] = []
        self._positions: deque[tuple[int, int, int]] = deque(maxlen=window + 1)

    def check(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], values: list[Tensor]) -> Tensor:
        """Return 1 if any value is not finite, else 0."""
        bad = torch.stack(values).isfinite().logical_not_()
        is_bad = bad.any().float()
        key, count = id(optimizer), bad[: len(parameters)]
        if key in self._by_value and len(self._by_value[key]) == len(count):
            self._by_value[key].add_(count)
        else:
            self._keys[key], self._by_value[key] = [id(p) for p in parameters], count.int()
        self.is_bad = is_bad if self.is_bad is None else torch.maximum(self.is_bad, is_bad)
        return is_bad

    def count(self, outputs: Any, position: tuple[int, int, int]) -> None:
        """Count the batch that has ended."""
        self._positions.append(position)
        is_bad, self.is_bad = self.is_bad, None
        if is_bad is None:
            return
        row, peak, total, age = self._numbers.unbind()
        row.add_(1).mul_(is_bad)
        torch.maximum(peak, row, out=peak)
        total.add_(is_bad)
        age.add_(1).mul_(1 - is_bad)
        terms = {k: v for k, v in outputs.items() if isinstance(v, Tensor) and v.numel() == 1} if outputs else {}
        if terms:
            bad = (
                torch.stack([value.detach().float().reshape(()) for value in terms.values()]).isfinite().logical_not_()
            )
            if self._terms == list(terms) and self._by_term is not None:
                self._by_term.add_(bad)
            else:
                self._terms, self._by_term = list(terms), bad.int()

    def read(self, keep: bool = False) -> _Counts:
        """Return all counts since the last read, and reset them unless `keep`."""
        numbers = self._numbers.tolist()
        terms: dict[str, int] = {}
        parameters: dict[int, int] = {}
        if numbers[2]:
            if self._by_term is not None:
                terms = {n: c for n, c in zip(self._terms, self._by_term.tolist(), strict=True) if c}
            for key, counts in self._by_value.items():
                parameters |= {p: c for p, c in zip(self._keys[key], counts.tolist(), strict=True) if c}
            # as in a report on one step: the loss only if no other term is listed, and gradients if no term is
            if len(terms) > 1:
                terms.pop("loss", None)
            rest = int(numbers[2]) - max(terms.values(), default=0)
            if rest > 0:
                terms["gradient"] = rest
        if not keep:
            self._numbers[1:3] = 0
            for counted in (*self._by_value.values(), *([] if self._by_term is None else [self._by_term])):
                counted.zero_()
        return _Counts(numbers, terms, parameters)

    def position(self, counts_read: _Counts) -> tuple[int, int, int]:
        """Return epoch, batch and step of the last bad step."""
        return self._positions[max(0, len(self._positions) - 1 - counts_read.ago)]


def _overflows(gradients: list[Any]) -> bool:
    """Return whether the sum of squares of any gradient is not finite; synchronises with the device."""
    norms = _norms(gradients)
    # reading values is free on the CPU; on a GPU, each read would synchronise
    total = sum(norm.item() for norm in norms) if norms[0].is_cpu else float(torch.stack(norms).sum())
    return not math.isfinite(total)


def _norms(gradients: list[Any]) -> list[Tensor]:
    """Return the norm of each gradient, in at least float32."""
    dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    kinds = {gradient.dtype for gradient in dense}
    low = bool(kinds & {torch.float16, torch.bfloat16})
    # torch does not allow a narrower dtype
    dtype = (torch.float64 if torch.float64 in kinds else torch.float32) if low else None
    # on a CPU, torch._foreach_norm takes longer
    if dense[0].is_cpu or not hasattr(torch, "_foreach_norm"):
        return [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient in dense]
    norms = torch._foreach_norm(dense, 2, dtype) if low else torch._foreach_norm(dense)
    return [norm if norm.dtype == torch.float32 else norm.float() for norm in norms]


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Initialise SGD's momentum to 0: the first step is the same, and the momentum is defined if it is skipped."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        if group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _averages(trainer: pl.Trainer) -> Iterator[Any]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            yield callback
