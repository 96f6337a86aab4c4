"""show: a picture of data, samples or a result in one call."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aezoo.data.classes import original_labels
from aezoo.data.columns import Columns
from aezoo.data.in_memory import nan_std_mean
from aezoo.data.source import Stage
from aezoo.errors import AezooError
from aezoo.tasks.results import Result
from aezoo.tasks.samples import SampleSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# rows from which the scale of columns is taken
_MAX_MEASURED = 10_000


def show(x: Any, n: int = 16, split: Stage = "train") -> "Figure":
    """A picture: of the result of a command, of a DataModule, or of samples.

    Images form a mosaic, sequences and vectors are curves, and the rows of a table are bars by column, with their
    values; the length of a bar is the distance from the column's mean. A notebook shows the figure that is returned;
    `figure.savefig(path)` writes it.

    Args:
        x: a result of a command, a DataModule, or samples (N, *shape): an array, a tensor, a DataFrame.
        n: number of samples, from the first on.
        split: which split of a DataModule.

    Raises:
        AezooError: these are not samples, or n is below 1.
    """
    from aezoo.callbacks import plotting

    if isinstance(x, Result):
        return x.figure
    if n < 1:
        raise AezooError(f"n must be at least 1, got {n}")
    samples = SampleSet.from_data(x, split, allow_missing=True)
    n = min(n, len(samples))
    shown = samples.rows(range(n))
    title = f"{samples.name}: {n} of {len(samples):,}"
    if plotting.is_image(samples.shape):
        tiles = plotting.square(plotting.tiles(shown, plotting.value_range(shown)))
        return plotting.displayable(plotting.mosaic_figure(tiles, title=title))
    columns = samples.columns
    if columns is not None and not columns.scaling:
        # columns of other units on one scale would leave only the largest visible
        columns = Columns(columns.names, _standard(samples), samples.shape[0])
        shown = (shown - columns.scaling["offset"]) / columns.scaling["factor"]
    labels = () if samples.labels is None else original_labels(samples.labels[:n], samples.class_names)
    panels = [{"sample": sample} for sample in torch.unbind(shown)]
    figure = plotting.panel_figure(panels, [str(label) for label in labels], title, columns=columns)
    return plotting.displayable(figure)


def _standard(samples: SampleSet) -> dict[str, Tensor]:
    """The mean and the deviation of each column, over the values that are not missing."""
    x_ND = samples.rows(range(min(len(samples), _MAX_MEASURED))).double()
    deviation_D, mean_D = nan_std_mean(x_ND)
    return {"offset": mean_D.nan_to_num(0), "factor": torch.where(deviation_D > 0, deviation_D, 1)}
