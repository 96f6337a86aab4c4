"""Optimistic steps: many steps are checked for finiteness together, and they are undone if one was not finite.

Checking each gradient costs two to four per cent of the step of a dense network, mostly for reading memory. Second
moments show the same information later: Adam's v <- b2 v + (1 - b2) g^2 keeps non-finite values forever and large
values for a long time, and so do the moments of other optimisers except SGD. So each step checks only its loss. The
moments are checked after `PERIOD` steps and before any code reads the weights. If they are bad, weights, moments and
buffers are restored, and all of these steps are repeated with a check of each gradient. The noise of a step is a
function of seed, epoch and batch, so the repeated steps are the same, bit for bit. The copy for this takes three times
the memory of the weights.
"""

import copy
import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

from aezoo.data.loaders import local_processes
from aezoo.data.resident import fits_in_memory
from aezoo.speed.fused_optimizer import FusedStep, Group
from aezoo.training.buffers import Buffers

if TYPE_CHECKING:
    from aezoo.speed.fast_loop import FastLoop

# steps between two checks; and seconds, because slow steps would be slow to repeat
PERIOD, SECONDS = 256, 10.0
# smallest decay factor of a squared gradient per step; with a smaller one the moments forget too soon
_MIN_DECAY = 0.9
# a sum of squared gradients that is a tenth of the float32 range
_LARGE = 3e37


class _Copy:
    """A copy of everything that steps change, made between two steps.

    Args:
        loop: the loop of the steps.
        groups: groups of its optimiser, whose changes are all known.
    """

    def __init__(self, loop: "FastLoop", groups: list[Group]) -> None:
        self._loop, self._module, self.groups = loop, cast(Any, loop.trainer.lightning_module), groups
        self._tensors = [tensor for group in groups for tensor in group.changed]
        self._copies = [torch.empty_like(tensor) for tensor in self._tensors]
        self._buffers = Buffers(self._module)

    @staticmethod
    def fits(loop: "FastLoop", groups: list[Group]) -> bool:
        """Whether there is enough memory for the copy."""
        size = sum(tensor.nbytes for group in groups for tensor in group.changed)
        return fits_in_memory(size, torch.device("cpu"), local_processes(loop.trainer))

    @property
    def has_buffers(self) -> bool:
        """Whether a forward pass may change more than the optimiser does."""
        return bool(self._buffers)

    def remember(self) -> None:
        """Copy the current state."""
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._tensors)
        self._buffers.remember()
        self._means, self._counters = copy.deepcopy(self._module._train_means), self._loop.counters()
        self._settings = [{k: v for k, v in group.settings.items() if k != "params"} for group in self.groups]
        configs = self._loop.trainer.lr_scheduler_configs
        self._schedules = [copy.deepcopy(config.scheduler.state_dict()) for config in configs]

    def restore(self) -> None:
        """Restore the copied state."""
        with torch.no_grad():
            torch._foreach_copy_(self._tensors, self._copies)
        self._buffers.restore()
        self._module._train_means = self._means
        self._loop.set_counters(self._counters)
        for group, settings in zip(self.groups, self._settings, strict=True):
            group.settings.update(settings)
        for config, state in zip(self._loop.trainer.lr_scheduler_configs, self._schedules, strict=True):
            config.scheduler.load_state_dict(state)

    def is_finite(self, steps: int) -> bool:
        """Whether all gradients since the copy, over `steps` steps, were finite; False if that is uncertain."""
        return all(group.most_squared(steps) < _LARGE for group in self.groups)


class Rollback:
    """Undoes the steps of a fast loop that were not finite.

    A step is trusted, checked by itself, or repeated. The first step of an epoch is checked, because it shows what a
    step changes. Steps after an undone step are also checked.

    Args:
        loop: the loop of the steps; its plan allows repeating them.
    """

    def __init__(self, loop: "FastLoop") -> None:
        self._loop = loop
        self._step: FusedStep | None = None
        self._copy: _Copy | None = None
        # (index of the batch, whether it is the epoch's last) of the steps since the copy; None if none is trusted
        self._unchecked: list[tuple[int, bool]] | None = None
        self._ends_at = 0.0
        self._remove_hook: Callable[[], None] = _nothing

    def begin_epoch(self, step: FusedStep | None) -> None:
        """Start an epoch whose steps are trusted, or with None, checked individually."""
        self._step, self._unchecked = step, None

    def prepare_step(self) -> None:
        """Start to trust steps or, after `PERIOD` steps, check the trusted ones; call it between two steps."""
        if self._unchecked is not None and len(self._unchecked) < PERIOD and time.monotonic() < self._ends_at:
            return
        self.finish_checks()
        groups = [] if self._step is None else self._step.groups
        if groups and all(group.decay >= _MIN_DECAY for group in groups) and self._has_room(groups):
            self._begin()

    @property
    def is_deferring(self) -> bool:
        """Whether the current step is taken without checking its gradients."""
        return self._unchecked is not None

    def record(self, loss: Any, batch_idx: int) -> bool:
        """Record the current, trusted step with this loss; return False if it cannot be trusted."""
        plan = self._loop.plan
        if self._unchecked is None or plan is None or loss is None or not plan.guard.is_finite_loss(loss):
            return False
        if self._step is None or self._copy is None or self._step.groups is not self._copy.groups:
            return False  # it changes more than was copied
        self._unchecked.append((batch_idx, self._loop.batch_progress.is_last_batch))
        return True

    def finish_checks(self, in_step: bool = False) -> bool:
        """End the trust: check the moments, and repeat the steps if they are bad.

        Args:
            in_step: another step has begun and cannot be trusted; its changes of buffers are undone.

        Returns:
            Whether weights, moments and buffers have changed.
        """
        try:
            return self._finish_checks(in_step)
        finally:
            self._remove_hook()

    def close(self) -> None:
        """Forget everything."""
        self._remove_hook()
        self._step = self._copy = self._unchecked = None

    def _has_room(self, groups: list[Group]) -> bool:
        if self._copy is None or self._copy.groups is not groups:
            had_room, self._copy = self._copy is not None, None
            # checked once, because weights do not grow and the check reads several files
            if not had_room and not _Copy.fits(self._loop, groups):
                self._step = None
                return False
            self._copy = _Copy(self._loop, groups)
        return True

    def _begin(self) -> None:
        assert self._copy is not None
        self._copy.remember()
        self._unchecked, self._ends_at = [], time.monotonic() + SECONDS
        # all code that saves weights calls state_dict. A hook must not remove itself, so it calls `_finish_checks`
        watch = self._loop.trainer.lightning_module.register_state_dict_pre_hook(lambda *_: self._finish_checks())
        self._remove_hook = watch.remove

    def _finish_checks(self, in_step: bool = False) -> bool:
        unchecked, self._unchecked = self._unchecked, None
        if unchecked is None or self._copy is None:
            return False
        if self._copy.is_finite(len(unchecked)) and not (in_step and self._copy.has_buffers):
            return False
        self._step = None  # for the rest of the epoch
        # the caller of state_dict may have disabled gradients or enabled autocast
        with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            self._replay_steps(self._copy, unchecked)
        return True

    def _replay_steps(self, saved: _Copy, unchecked: list[tuple[int, bool]]) -> None:
        """Repeat the steps; after an error the state is that of the step that raised it."""
        loop = self._loop
        counters = loop.counters()
        saved.restore()
        if unchecked:
            loader: Any = loop.trainer.train_dataloader
            # the epoch's own iterator keeps its position
            batches = itertools.islice(loader.batches_from(unchecked[0][0]), len(unchecked))
            for (batch_idx, is_last), batch in zip(unchecked, batches, strict=True):
                loop.replay_step(batch, batch_idx, is_last)
        # the current step has also been counted
        loop.set_counters(counters)


def _nothing() -> None:
    pass
