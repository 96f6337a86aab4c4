"""Pictures of weights."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from aezoo.callbacks.base import MAX_DRAWN, Picture, check_count
from aezoo.data.columns import Columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from aezoo.autoencoder import Autoencoder

_INPUTS = 256


class Filters(Picture):
    """Draws pictures/filters.png, the weights of the first layer, and for sparse codes pictures/atoms.png.

    A filter is the weight vector of one unit of the first linear or convolutional layer, in order of decreasing norm.
    An atom is the contribution of one entry of the code to the output, decode(e_i) - decode(0), in order of decreasing
    use; for a linear decoder, atoms are exactly its dictionary.

    Args:
        n: number of filters and atoms.
        every_n_epochs: epochs between two pictures; 0 disables them. None: every 5 epochs, or less often if all
            pictures would take more than 3 % of the fit's time.
    """

    def __init__(self, n: int = 64, every_n_epochs: int | None = None) -> None:
        super().__init__(every_n_epochs, n_inputs=_INPUTS)
        self.n = check_count(self, "n", n, maximum=MAX_DRAWN)

    def draw(self, model: "Autoencoder", x: Tensor, y: Tensor | None) -> "dict[str, Figure]":
        figures = {}
        weights = first_weights(model)
        if weights is not None:
            largest = weights.flatten(1).norm(dim=1).argsort(descending=True)[: self.n]
            figures["filters"] = self._figure(weights[largest], "unit")
        if model.sparse_code:
            use = self.apply(model.encode, x).abs().flatten(1).mean(0)
            most = use.argsort(descending=True)[: self.n]
            units = torch.zeros(len(most) + 1, len(use)).scatter_(1, torch.cat([most, most[:1]])[:, None], 1.0)
            units[-1] = 0
            decoded = self.apply(lambda z: model.decode(z.unflatten(1, model.code_shape)), units)
            figures["atoms"] = self._figure(decoded[:-1] - decoded[-1], "atom")
        return figures

    def _figure(self, weights: Tensor, name: str) -> "Figure":
        from aezoo.callbacks import plotting

        if plotting.is_image(weights.shape[1:]):
            return plotting.mosaic_figure(plotting.square(plotting.signed_tiles(weights)), title=self.caption)
        # weights have no units of measurement
        table = self.columns and Columns(self.columns.names, {}, len(self.columns.names))
        return plotting.panel_figure([{name: w} for w in weights[:16]], title=self.caption, columns=table)


def first_weights(model: "Autoencoder") -> Tensor | None:
    """Return the weights of the first linear or convolutional layer, (units, *shape), or None if there is none."""
    for layer in (getattr(model, "encoder", None) or model).modules():
        if isinstance(layer, nn.Linear):
            weights = layer.weight.detach().float().cpu()
            return (
                weights.unflatten(1, model.input_shape) if weights[0].numel() == math.prod(model.input_shape) else None
            )
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return layer.weight.detach().float().cpu() if max(layer.kernel_size) > 1 else None
    return None
