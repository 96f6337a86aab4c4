"""The picture of errors at equal bits, in the style of `plots`."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import labels
from .labels import SIZE
from .plots import _MARKERS, COLOURS, Row, _group_by, _panels, _plain_ticks, _positive, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# options that only set sizes
_SIZES = ("codebook_size", "levels", "latent_dim", "n_values", "n_tokens", "width", "decoder_width")


def variant_text(row: Row) -> str:
    """The model and the options that distinguish its rows: vq_vae, vq_vae rotation."""
    parts = [row["model"]]
    for word in row.get("options", "").split():
        key, _, value = word.partition("=")
        if key not in _SIZES:
            parts.append(key if value == "True" else word if value.isdigit() else value)
    return " ".join(parts)


def bits(rows: Sequence[Row]) -> "Figure | None":
    """Error against bits per sample, one panel per data set and one line per quantisation method."""
    sets = _group_by(_positive(rows, "mse", "bits"), "dataset")
    if not sets:
        return None
    ways = list(dict.fromkeys(variant_text(row) for row in rows))
    figure, axes = _panels(len(sets), 6.4, 5.6, yscale="log")
    for ax, (dataset, part) in zip(axes, sets.items(), strict=True):
        ends = []
        for i, name in enumerate(ways):
            points = sorted((number(row, "bits"), number(row, "mse")) for row in part if variant_text(row) == name)
            if points:
                xs, ys = zip(*points, strict=True)
                ax.plot(xs, ys, color=COLOURS[i % 6], marker=_MARKERS[i // 6 % 7], markersize=6, linewidth=1.4)
                ends.append((xs[-1], ys[-1], name, COLOURS[i % 6]))
        ax.set_xticks(
            [
                statistics.median(number(row, "bits") for row in same)
                for same in _group_by(part, "bits_per_place").values()
            ]
        )
        _plain_ticks(ax.yaxis, ax.get_ylim())
        ax.set_title(dataset, fontsize=SIZE + 2, loc="left")
        ax.set_xlabel("bits a sample", fontsize=SIZE)
        ax.set_ylabel("← better  test error (mse, log)", fontsize=SIZE)
        labels.label_curve_ends(ax, ends)
    return figure
