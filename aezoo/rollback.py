"""Steps on trust: whether they were finite is asked of many together, and where one was not they are taken back.

To look at each gradient costs two to four per cent of the step of a dense network, most of it the way of the numbers
from memory. Adam's second moments tell it later: v <- b2 v + (1 - b2) g^2 holds for good what is not finite, and for
long what is large. So a step is asked for its loss alone, and the moments are asked after `PERIOD` steps and before
anybody reads the weights. If they are bad, weights, moments and buffers become what they were before these steps, and
all are taken again with a look at each gradient. The noise of a step is a function of seed, epoch and batch: they are
the same steps, bit for bit. The copy that this needs takes three times the memory of the weights.
"""

import copy
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from aezoo.buffers import Buffers
from aezoo.data.resident import fits
from aezoo.errors import AezooError
from aezoo.fused import FusedStep, Group

if TYPE_CHECKING:
    from aezoo.loop import LightLoop

# steps between two looks; and seconds, since slow steps would be slow to take again
PERIOD, SECONDS = 256, 10.0
# Adam's second beta, below which moments soon forget
_LEAST_MEMORY = 0.9
# squares of gradients that add up to a tenth of what float32 holds
_LARGE = 3e37


class _Taken(NamedTuple):
    """A step on trust.

    Attributes:
        batch_idx: the number of its batch within the epoch.
        rates: the learning rate of each group.
    """

    batch_idx: int
    rates: list[float]


class Rollback:
    """Takes back the steps of a light loop that were not finite.

    Args:
        loop: whose steps they are; its plan says that they can be taken again.
    """

    def __init__(self, loop: "LightLoop") -> None:
        self._loop = loop
        self._step: FusedStep | None = None
        self._groups: list[Group] = []
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._buffers: Buffers | None = None
        self._means: Any = None
        self._taken: list[_Taken] | None = None
        self._until = 0.0
        self._over = self._goes_back = False
        self._unwatch: Callable[[], None] = _nothing

    def begin_epoch(self, step: FusedStep) -> None:
        """Trust the steps of an epoch again, from the second on: the first finds out what a step changes."""
        self._step, self._groups, self._taken, self._over = step, [], None, False

    def prepare_step(self) -> None:
        """Begin to trust or, after `PERIOD` steps, see whether they deserved it; call it between two steps."""
        if self._over or (self._taken is not None and len(self._taken) < PERIOD and time.monotonic() < self._until):
            return
        self.settle()
        groups = [] if self._over or self._step is None else self._step.groups
        if groups and all(group.settings["betas"][1] >= _LEAST_MEMORY for group in groups) and self._has_room(groups):
            self._copy()

    @property
    def is_trusting(self) -> bool:
        """Whether the step in hand is taken without a look at its gradients."""
        return self._taken is not None

    def takes(self, loss: Any, batch_idx: int) -> bool:
        """Whether it is, with this loss; the step is noted then."""
        plan = self._loop.plan
        if self._taken is None or loss is None or plan is None or not plan.guard.passes_loss(loss):
            return False
        self._taken.append(_Taken(batch_idx, [group.settings["lr"] for group in self._groups]))
        return True

    def settle(self, in_step: bool = False) -> bool:
        """End the trust: look at the moments, and take the steps again where they are bad.

        Args:
            in_step: a further step has begun and cannot be trusted: what it has changed of the buffers is taken back.

        Returns:
            Whether weights, moments and buffers have changed.
        """
        if self._goes_back:
            return False
        has_changed = self._settle(in_step)
        self._unwatch()
        return has_changed

    def close(self) -> None:
        """Forget everything."""
        self._unwatch()
        self._step, self._taken, self._tensors, self._copies, self._buffers = None, None, [], [], None

    def _has_room(self, groups: list[Group]) -> bool:
        """Whether memory holds the copies; from then on it does, as weights do not grow."""
        if groups is not self._groups:
            self._groups, self._tensors = groups, [tensor for group in groups for tensor in group.changed]
            if [tensor.shape for tensor in self._tensors] != [kept.shape for kept in self._copies]:
                fit = fits(sum(tensor.nbytes for tensor in self._tensors), torch.device("cpu"))
                self._copies = [torch.empty_like(tensor) for tensor in self._tensors] if fit else []
        return bool(self._copies)

    def _copy(self) -> None:
        module: Any = self._loop.trainer.lightning_module
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._tensors)
        if self._buffers is None:
            self._buffers = Buffers(module)
        self._buffers.remember()
        self._means, self._taken = copy.deepcopy(module._train_means), []
        self._until = time.monotonic() + SECONDS
        self._unwatch = module.register_state_dict_pre_hook(self._before_reading).remove

    def _settle(self, in_step: bool = False) -> bool:
        taken, self._taken = self._taken, None
        if taken is None or (self._is_finite(len(taken)) and not (in_step and self._buffers)):
            return False
        self._go_back(taken)
        return True

    def _is_finite(self, steps: int) -> bool:
        """Whether no gradient since the copy can have been bad; some that were good are taken for bad."""
        for group in self._groups:
            beta2 = group.settings["betas"][1]
            most = _LARGE * (1 - beta2) * beta2**steps
            if not sum(float(v.sum()) for v in group.squares) < most:
                return False
        return True

    def _go_back(self, taken: list[_Taken]) -> None:
        loop, plan = self._loop, self._loop.plan
        assert plan is not None
        self._over = self._goes_back = True
        with torch.no_grad():
            torch._foreach_copy_(self._tensors, self._copies)
        if self._buffers is not None:
            self._buffers.restore()
        plan.module._train_means = self._means
        loop.count_back(len(taken), "step", "zero_grad")
        rates = [group.settings["lr"] for group in self._groups]
        # the epoch's own iterator goes on where it is
        batches = loop.trainer.train_dataloader.again(taken[0].batch_idx) if taken else ()
        for step, batch in zip(taken, batches, strict=False):
            self._set_rates(step.rates)
            loop.take_again(batch, step.batch_idx)
        self._set_rates(rates)
        self._goes_back = False

    def _set_rates(self, rates: list[float]) -> None:
        for group, rate in zip(self._groups, rates, strict=True):
            group.settings["lr"] = rate

    def _before_reading(self, *_: Any) -> None:
        """Somebody asks the module for its weights, to save them as a rule."""
        if self._goes_back:
            raise AezooError("stopped while bad steps were being taken back: nothing is saved over the last checkpoint")
        self._settle()


def _nothing() -> None:
    pass
