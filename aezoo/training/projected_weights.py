"""Models with constrained weights, for example on a sphere or above 0."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from aezoo.errors import AezooError


class Constrained(pl.LightningModule):
    """Mixin, before `Autoencoder`, for models that change their weights after each optimiser step.

    The fast loop leaves steps with foreign code to Lightning, but it calls `after_optimizer_step` itself.
    """

    def after_optimizer_step(self) -> None:
        """Project the weights onto the constraint."""
        raise NotImplementedError(f"{type(self).__name__} must say where its weights belong")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.after_optimizer_step()

    def check_averages(self) -> None:
        """Refuse averages of the weights that do not project them: a mean of directions is shorter than 1.

        Raises:
            AezooError: a callback of the trainer or a schedule-free optimiser averages so.
        """
        averaging = [
            type(callback).__name__
            for callback in self.trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging)
            and not getattr(callback, "projects_weights", False)
        ]
        # schedulefree's optimisers switch to their average by `eval()`
        averaging += [
            type(optimizer).__name__
            for optimizer in self.trainer.optimizers
            if callable(getattr(optimizer, "eval", None))
        ]
        if averaging:
            raise AezooError(
                f"{averaging[0]} averages directions of norm 1 to shorter ones: take aezoo.callbacks.EMA "
                f"(--ema.decay 0.999), which gives them norm 1 again"
            )
