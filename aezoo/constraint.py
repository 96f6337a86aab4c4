"""Models whose weights are held somewhere by hand, such as on a sphere or above 0."""

from typing import Any

import lightning.pytorch as pl


class Constrained(pl.LightningModule):
    """What a model that changes its weights after each step of the optimiser inherits before `Autoencoder`.

    The light loop, which leaves steps of unknown code to Lightning, calls `after_optimizer_step` by itself.
    """

    def after_optimizer_step(self) -> None:
        """Put the weights where they belong."""
        raise NotImplementedError(f"{type(self).__name__} must say where its weights belong")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.after_optimizer_step()
