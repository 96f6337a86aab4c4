"""Pictures of samples and their reconstructions."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aezoo.callbacks.base import MAX_DRAWN, Picture, check_count
from aezoo.errors import AezooError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from aezoo.autoencoder import Autoencoder

_ROWS = ("original", "corrupted", "output", "error")


class Reconstructions(Picture):
    """Draws pictures/reconstructions.png: originals and reconstructions of the same validation samples in each epoch.

    Images and the middle slices of volumes are shown in rows; vectors and sequences are shown as overlaid curves, the
    columns of a table as bars with their values. A denoising model receives the corrupted input; only its pictures have
    a `corrupted` row.

    Args:
        n: number of samples.
        every_n_epochs: epochs between two pictures; 0 disables them. None: every 5 epochs, or less often if all
            pictures would take more than 3 % of the fit's time.
        rows: rows to show, of original, corrupted, output and error.
    """

    def __init__(self, n: int = 10, every_n_epochs: int | None = None, rows: tuple[str, ...] = _ROWS) -> None:
        super().__init__(every_n_epochs, n_inputs=check_count(self, "n", n, maximum=MAX_DRAWN))
        if not rows or set(rows) - set(_ROWS):
            raise AezooError(
                f"Reconstructions.rows must be some of {', '.join(_ROWS)}, got {', '.join(rows) or 'nothing'}"
            )
        self.n, self.rows = n, tuple(rows)

    def draw(self, model: "Autoencoder", x: Tensor, y: Tensor | None) -> "dict[str, Figure]":
        from aezoo.callbacks import plotting

        given = x if model.corruption is None else self.apply(model.corruption, x)
        output = self.apply(model, given)
        names = [name for name in self.rows if name != "corrupted" or model.corruption is not None]
        shown = {"original": x, "corrupted": given, "output": output, "error": (output - x).abs()}
        if not plotting.is_image(model.input_shape):
            curves = [name for name in names if name != "error"] or ["error"]
            panels = [{name: shown[name][i] for name in curves} for i in range(min(len(x), 12))]
            return {"reconstructions": plotting.panel_figure(panels, title=self.caption, columns=self.columns)}
        limits, most = plotting.value_range(x), float(torch.nan_to_num(shown["error"]).max())
        rows = [
            plotting.error_tiles(shown[name], most) if name == "error" else plotting.tiles(shown[name], limits)
            for name in names
        ]
        labels = [f"error (to {most:.2g})" if name == "error" else name for name in names]
        return {"reconstructions": plotting.mosaic_figure(rows, labels, title=self.caption)}
