"""Models with constrained weights, for example on a sphere or above 0."""

from typing import Any

import lightning.pytorch as pl


class Constrained(pl.LightningModule):
    """Mixin, before `Autoencoder`, for models that change their weights after each optimiser step.

    The fast loop uses Lightning's step if other code takes part, but it calls `after_optimizer_step` itself.
    """

    def after_optimizer_step(self) -> None:
        """Project the weights onto the constraint."""
        raise NotImplementedError(f"{type(self).__name__} must implement after_optimizer_step")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.after_optimizer_step()
