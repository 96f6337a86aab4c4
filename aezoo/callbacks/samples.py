"""Pictures of samples from the prior."""

from typing import TYPE_CHECKING

from torch import Tensor

from aezoo.callbacks.base import MAX_DRAWN, Picture, check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from aezoo.autoencoder import Autoencoder


class Samples(Picture):
    """Draws pictures/samples.png: decoded samples from the prior, the same in each epoch; for models with a prior.

    Args:
        n: number of samples.
        every_n_epochs: epochs between two pictures; 0 disables them. None: every 5 epochs, or less often if all
            pictures would take more than 3 % of the fit's time.
    """

    def __init__(self, n: int = 64, every_n_epochs: int | None = None) -> None:
        super().__init__(every_n_epochs, n_inputs=0)
        self.n = check_count(self, "n", n, maximum=MAX_DRAWN)

    def draw(self, model: "Autoencoder", x: Tensor, y: Tensor | None) -> "dict[str, Figure]":
        if not model.has_prior:
            return {}
        from aezoo.callbacks import plotting

        with self._trainer.precision_plugin.forward_context():
            drawn = model.sample(self.n).float().cpu()
        if plotting.is_image(model.input_shape):
            rows = plotting.square(plotting.tiles(drawn, plotting.value_range(drawn)))
            return {"samples": plotting.mosaic_figure(rows, title=self.caption)}
        return {
            "samples": plotting.panel_figure(
                [{"sample": s} for s in drawn[:16]], title=self.caption, columns=self.columns
            )
        }
