"""Batches as the steps of training, evaluation and prediction read them."""

from typing import Any

from torch import Tensor

from aezoo.training import input_checks
from aezoo.training.interface import ModelInterface
from aezoo.training.precision import from_bytes


class BatchUnpacker(ModelInterface):
    """Unpacks batches, and checks the first of training and the first of evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self._checked: set[bool] = set()

    def _unpack(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        x, y = input_checks.unpack(batch)
        if self.training not in self._checked:
            input_checks.warn_unused_parts(batch)
            self.check_batch(from_bytes(x) if self.takes_bytes else x)
            self._checked.add(self.training)
        return x, y

    def check_batch(self, x: Tensor) -> None:
        """Refuse a batch that the model cannot use; the loop calls it on the first batches of training and evaluation.

        Training data must lie in the likelihood's interval; other data may exceed the range of the training data, but
        not tenfold, as unscaled images from 0 to 255 do.

        Raises:
            AezooError: wrong shape or dtype, values that are not finite, or outside the likelihood's [0, 1].
        """
        input_checks.check_batch(self, x)
