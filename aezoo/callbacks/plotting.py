"""Figures from tensors: mosaics of images, panels of curves, scatter plots and bars.

All figures use matplotlib's object interface, without pyplot's global state. matplotlib is imported where it is used,
since the import takes a third of a second.
"""

import functools
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aezoo.data.columns import Columns
from aezoo.io import atomic_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

_DPI = 100
_GREY = "0.35"
_WIDE = 1200
_MIN_SIZE = 24
_MOSAIC, _MAX_CELLS = 256, 256**2
_LINEAR = 4096
# maximum columns of a table in a panel, and maximum bars per column for which all values are written
_MAX_BARS, _MAX_WRITTEN = 24, 3


# ---- samples as images ----------------------------------------------------------------------------------------------


def is_image(shape: Sequence[int]) -> bool:
    """Return whether a sample of this shape is shown as an image instead of curves."""
    return len(shape) in (3, 4) or (len(shape) == 2 and shape[0] > 3)


def planes(x: Tensor) -> Floats:
    """Convert samples to images: (B, H, W, 3) for colour, else (B, H, W, 1).

    A volume is shown by its middle slice, many channels by their mean, and a sequence of many channels as an image.
    """
    x = torch.nan_to_num(x.detach().float().cpu())
    if x.ndim == 5:
        x = x[:, :, x.shape[2] // 2]
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4:
        raise ValueError(f"samples of shape {tuple(x.shape[1:])} cannot be shown as images")
    if x.shape[1] != 3:
        x = x.mean(1, keepdim=True)
    shown: Floats = x.permute(0, 2, 3, 1).numpy()
    return shown


def value_range(x: Tensor) -> tuple[float, float]:
    """Return the values of black and white: [0, 1] if it contains the data, else the range of the data."""
    x = torch.nan_to_num(x.detach().float())
    low, high = float(x.min()), float(x.max())
    if low >= -1e-3 and high <= 1 + 1e-3:
        return 0.0, 1.0
    return low, max(high, low + 1e-6)


def tiles(x: Tensor, limits: tuple[float, float]) -> Floats:
    """Convert samples to RGB tiles, (B, H, W, 3) in [0, 1]."""
    low, high = limits
    shown = np.clip((planes(x) - low) / (high - low), 0, 1)
    return np.broadcast_to(shown, (*shown.shape[:3], 3))


def error_tiles(error: Tensor, maximum: float) -> Floats:
    """Convert absolute errors to RGB tiles, from black (0) to bright (`maximum`)."""
    from matplotlib import colormaps

    shown = planes(error.abs()).mean(-1)
    rgb: Floats = colormaps["magma"](np.clip(shown / max(maximum, 1e-12), 0, 1))[..., :3].astype(np.float32)
    return rgb


def signed_tiles(weights: Tensor) -> Floats:
    """Convert weights to RGB tiles, each scaled by its maximum: blue < 0, white, red > 0; grey for 0 in colour."""
    from matplotlib import colormaps

    shown = planes(weights)
    shown = shown / np.maximum(np.abs(shown).max(axis=(1, 2, 3), keepdims=True), 1e-12)
    if shown.shape[-1] == 3:
        return (shown + 1) / 2
    rgb: Floats = colormaps["RdBu_r"]((shown[..., 0] + 1) / 2)[..., :3].astype(np.float32)
    return rgb


def mosaic_figure(
    rows: Sequence[Floats],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    gap: int | None = None,
) -> "Figure":
    """Draw rows of RGB tiles, enlarged by a whole number, with labels at the left and above.

    Args:
        rows: each (n, H, W, 3); rows may differ in n.
        row_labels: one per row, or none.
        column_labels: one per column, or none.
        title: title of the figure.
        gap: pixels between tiles before enlargement; None for automatic.
    """
    from matplotlib.figure import Figure

    height, width = rows[0].shape[1:3]
    columns = max(len(row) for row in rows)
    if gap is None:
        gap = max(1, round(min(height, width) / 16))
    canvas = np.ones((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), np.float32)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            top, left = i * (height + gap), j * (width + gap)
            canvas[top : top + height, left : left + width] = tile
    longest = max(canvas.shape[:2])
    # a whole number, so that all pixels have the same size; less than 1 if the figure would not fit on a screen
    zoom: float = max(1, min(round(80 / max(height, width)), _WIDE // longest))
    zoom = min(zoom, 2 * _WIDE / longest)
    # flat samples, such as sequences of many channels, are stretched to the size of a label
    zooms = max(zoom, -(-_MIN_SIZE // height)), max(zoom, -(-_MIN_SIZE // width))
    wide, high = canvas.shape[1] * zooms[1], canvas.shape[0] * zooms[0]
    step = (height + gap) * zooms[0], (width + gap) * zooms[1]
    margin = 12
    # in points; readable if a wide mosaic is shown at a small size, as in TensorBoard
    size = min(max(9.0, 0.018 * wide), 18.0)
    # in pixels; not wider than the column
    letter = 0.9 * size
    column_size = min(size, step[1] / (0.9 * max((len(label.strip()) for label in column_labels), default=1)))
    label_width = round(letter * max((len(label) for label in row_labels), default=-1)) + 8
    header = round(2.2 * size) * bool(title) + round(2 * column_size) * bool(column_labels)
    full_width = max(wide + label_width + 2 * margin, round(letter * len(title)) + 2 * margin)
    full_height = high + header + 2 * margin
    figure = Figure(figsize=(full_width / _DPI, full_height / _DPI), dpi=_DPI, facecolor="white")
    left, bottom = label_width + margin, margin
    axes = figure.add_axes((left / full_width, bottom / full_height, wide / full_width, high / full_height))
    axes.imshow(canvas, interpolation="nearest" if zoom >= 1 else "antialiased", aspect="auto")
    axes.set_axis_off()
    for i, label in enumerate(row_labels):
        y = bottom + high - i * step[0] - height * zooms[0] / 2
        figure.text((left - 8) / full_width, y / full_height, label, ha="right", va="center", fontsize=size)
    for j, label in enumerate(column_labels):
        x, y = left + j * step[1] + width * zooms[1] / 2, bottom + high + 4
        figure.text(x / full_width, y / full_height, label, ha="center", va="bottom", fontsize=column_size)
    if title:
        figure.text(margin / full_width, 1 - margin / full_height, title, va="top", fontsize=size, color=_GREY)
    return figure


def square(x: Floats) -> list[Floats]:
    """Split tiles into the rows of a nearly square mosaic."""
    columns = max(1, round(len(x) ** 0.5 + 0.49))
    return [x[i : i + columns] for i in range(0, len(x), columns)]


# ---- samples as curves ----------------------------------------------------------------------------------------------


def panel_figure(
    panels: Sequence[Mapping[str, Tensor]],
    labels: Sequence[str] = (),
    title: str = "",
    ordered: bool = False,
    columns: Columns | None = None,
) -> "Figure":
    """Draw panels of curves, vectors (D,) or sequences (C, L) of at most three channels, or of table columns.

    Args:
        panels: the curves of each panel by name; a name has the same meaning in all panels.
        labels: a title for each panel, or none.
        title: title of the figure.
        ordered: use a sequence of colours (for a traversal) instead of distinct ones.
        columns: columns of the table that the vectors are from; each is drawn as a bar with its value in its unit.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = list(panels[0])
    hues = [colormaps["viridis"](i / max(1, len(names) - 1)) for i in range(len(names))] if ordered else None
    plain = {"original": "0.15", "corrupted": "0.75", "output": "tab:red"}
    colours: list[Any] = hues or [plain.get(name, f"C{i}") for i, name in enumerate(names)]
    shown = [] if columns is None else _shown_columns(panels, -1 if ordered else 1)
    width = 2.9 if columns is None else 3.4
    height = (
        1.7
        if columns is None
        else 0.35 + len(shown) * max(0.2, (0.13 if len(names) <= _MAX_WRITTEN else 0.08) * len(names))
    )
    left = 0.5 if columns is None else 0.3 + 0.07 * min(24, max(len(columns.names[i]) for i in shown))
    across = min(4, len(panels))
    lines = -(-len(panels) // across)
    wide, high = width * across + left, height * lines + 0.6
    figure = Figure(figsize=(wide, high), dpi=_DPI, facecolor="white")
    # fixed margins, since a constrained layout takes four times as long as the rest of the drawing
    room = {
        "left": left / wide,
        "right": 1 - 0.1 / wide,
        "bottom": 0.3 / high,
        "top": 1 - (0.35 + 0.2 * bool(labels)) / high,
    }
    room |= {"wspace": 0.25, "hspace": 0.3} if columns is None else {"wspace": 0.05, "hspace": 0.3 / height}
    grid = figure.subplots(lines, across, squeeze=False, sharex=True, sharey=columns is not None, gridspec_kw=room)
    for k, axes in enumerate(grid.flat):
        if k >= len(panels):
            axes.set_axis_off()
            continue
        if columns is None:
            _curves(axes, panels[k], colours)
            # drawing ticks takes longer than drawing curves
            axes.locator_params(nbins=3)
            axes.tick_params(labelsize=7)
            if k + across < len(panels):
                axes.xaxis.set_visible(False)
            axes.margins(x=0)
        else:
            _bars(axes, panels[k], colours, columns, shown)
        if labels:
            # without y, matplotlib lays out all ticks a second time to place the title above them
            axes.set_title(labels[k], fontsize=8, y=1)
    if columns is not None and len(shown) < len(columns.names):
        title = f"{title}  " * bool(title) + f"{len(shown)} of {len(columns.names)} columns, by largest difference"
    if len(names) > 1:
        ends = {names[0], names[-1]} if ordered else set(names)
        handles, texts = grid.flat[0].get_legend_handles_labels()
        picked = [(h, t) for h, t in zip(handles, texts, strict=True) if t in ends]
        figure.legend(
            [h for h, _ in picked],
            [t for _, t in picked],
            loc="upper right",
            ncols=len(picked),
            fontsize=8,
            frameon=False,
        )
    if title:
        figure.suptitle(title, x=0.01, y=1 - 0.05 / high, ha="left", va="top", fontsize=9, color=_GREY)
    return figure


def _curves(axes: "Axes", panel: Mapping[str, Tensor], colours: Sequence[Any]) -> None:
    for (name, values), colour in zip(panel.items(), colours, strict=True):
        curves = values.detach().float().cpu().reshape(-1, values.shape[-1]).numpy()
        for channel, curve in enumerate(curves):
            style = ("-", "--", ":")[channel % 3]
            axes.plot(curve, color=colour, linestyle=style, linewidth=1, label=name if channel == 0 else None)


def _shown_columns(panels: Sequence[Mapping[str, Tensor]], other: int) -> list[int]:
    """Return all columns or, if there are many, those in which the first curve and `other` differ most, in order."""
    parts = [[values.detach().float().cpu() for values in panel.values()] for panel in panels]
    size = torch.stack([(part[0] - part[other]).abs() if len(part) > 1 else part[0].abs() for part in parts])
    most = min(_MAX_BARS, max(4, _MAX_WRITTEN * _MAX_BARS // len(parts[0])))
    return sorted(torch.nan_to_num(size).sum(0).argsort(descending=True, stable=True)[:most].tolist())


def _digits(value: float) -> str:
    """Format a value with five digits, and all digits before the decimal point."""
    if math.isnan(value):
        return "missing"
    if not 1e-4 <= abs(value) < 1e12:
        return f"{value:.4g}"
    digits = max(0, 4 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"


def _bars(
    axes: "Axes", panel: Mapping[str, Tensor], colours: Sequence[Any], columns: Columns, shown: list[int]
) -> None:
    """Draw a bar for each column: its length is the scaled value, its label the value in its own unit."""
    place, thick = np.arange(len(shown)), 0.8 / len(panel)
    for i, ((name, values), colour) in enumerate(zip(panel.items(), colours, strict=True)):
        scaled = values.detach().float().cpu().numpy()
        own = columns.errors(scaled) if name == "error" else columns.values(scaled)
        y, length = place - 0.4 + thick * (i + 0.5), np.nan_to_num(scaled[shown])
        axes.barh(y, length, thick, color=colour, label=name)
        if len(panel) <= _MAX_WRITTEN or i in (0, len(panel) - 1):
            for at, end, value in zip(y, length.clip(0), own[shown], strict=True):
                axes.text(end, at, f" {_digits(value)}", va="center", fontsize=6)
    axes.set_yticks(
        place, [name if len(name) <= 24 else f"{name[:23]}…" for name in (columns.names[i] for i in shown)], fontsize=7
    )
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.tick_params(labelbottom=False, bottom=False)
    axes.margins(x=0.3)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


# ---- losses ---------------------------------------------------------------------------------------------------------


def curve_figure(epochs: Sequence[int], losses: Mapping[str, Sequence[float]], title: str = "") -> "Figure":
    """Draw losses by epoch, for the whole run and its second half; the minimum of the last loss is marked.

    Args:
        epochs: counted from 1.
        losses: values by name, one per epoch; NaN if there is none.
        title: title of the figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    half = len(epochs) // 2 if len(epochs) >= 6 else 0
    parts = {"all epochs": 0, "second half": half} if half else {"all epochs": 0}
    wide = 4.6 * len(parts)
    figure = Figure(figsize=(wide, 3.4), dpi=_DPI, facecolor="white")
    # fixed margins, since a constrained layout takes four times as long
    room = {"left": 0.7 / wide, "right": 1 - 0.1 / wide, "bottom": 0.15, "top": 0.86, "wspace": 0.22}
    known = {name: np.asarray(values, float) for name, values in losses.items() if np.isfinite(values).any()}
    grid = figure.subplots(1, len(parts), squeeze=False, gridspec_kw=room)
    for axes, (heading, start) in zip(grid[0], parts.items(), strict=True):
        place = np.asarray(epochs[start:])
        for name, values in known.items():
            shown = np.isfinite(values[start:])
            colour = "tab:blue" if name.startswith("train") else "tab:orange"
            marker = "o" if len(place) <= 30 else None
            axes.plot(place[shown], values[start:][shown], marker=marker, ms=3, color=colour, label=name)
        if known:
            last = [*known.values()][-1]
            best = int(np.nanargmin(last))
            if best >= start:
                text = f"lowest: {last[best]:.5g}, epoch {epochs[best]}"
                axes.plot([epochs[best]], [last[best]], "o", ms=8, mfc="none", color="0.15", label=text)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("epoch")
        axes.set_title(heading, fontsize=9, color=_GREY, loc="left")
        axes.grid(color="0.9")
        if known:
            axes.legend(fontsize=8, frameon=False)
    grid[0][0].set_ylabel("nats per sample")
    figure.suptitle(title, fontsize=9, color=_GREY)
    return figure


# ---- codes ----------------------------------------------------------------------------------------------------------


def scatter_figure(points: Tensor, labels: Tensor | None, axis_labels: tuple[str, str], title: str = "") -> "Figure":
    """Draw points (N, 2), coloured by label."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.4), dpi=_DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    x, y = points.float().numpy().T
    size = float(np.clip(12000 / max(1, len(points)), 6, 30))
    classes = [] if labels is None else torch.unique(labels).tolist()
    if labels is not None and len(classes) <= 20:
        colours = colormaps["tab10" if len(classes) <= 10 else "tab20"].resampled(20 if len(classes) > 10 else 10)
        for i, name in enumerate(classes):
            chosen = (labels == name).numpy()
            axes.scatter(x[chosen], y[chosen], s=size, color=colours(i), label=str(name), linewidths=0, alpha=0.8)
        figure.legend(loc="outside right upper", fontsize=9, frameon=False, markerscale=(40 / size) ** 0.5)
    elif labels is not None:
        dots = axes.scatter(x, y, s=size, c=labels.numpy(), cmap="viridis", linewidths=0, alpha=0.8)
        figure.colorbar(dots, ax=axes, label="label")
    else:
        axes.scatter(x, y, s=size, linewidths=0, alpha=0.7)
    axes.set_xlabel(axis_labels[0])
    axes.set_ylabel(axis_labels[1])
    axes.set_title(title, fontsize=9, color=_GREY, loc="left")
    return figure


def bar_figure(values: Tensor, label: str, title: str = "", marked: Tensor | None = None) -> "Figure":
    """Draw values (D,) in descending order, as bars or, if there are many, as a filled curve.

    Args:
        values: one per dimension.
        label: name of the values.
        title: title of the figure.
        marked: (D,) bool: drawn dark; the others light.
    """
    from matplotlib.figure import Figure

    order = values.argsort(descending=True)
    shown = values[order].float().numpy()
    strong = np.ones(len(shown), bool) if marked is None else marked[order].numpy()
    figure = Figure(figsize=(7.2, 3.4), dpi=_DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(shown))
    if len(shown) <= 64:
        axes.bar(place, shown, color=np.where(strong, "tab:blue", "lightsteelblue"), width=0.85)
        names = [str(i) for i in order.tolist()]
        skip = -(-len(names) // 32)
        axes.set_xticks(place[::skip], names[::skip], fontsize=7)
        axes.set_xlabel("dimension of the code")
    else:
        axes.fill_between(place, shown, step="mid", color="lightsteelblue", linewidth=0)
        axes.fill_between(place, np.where(strong, shown, 0), step="mid", color="tab:blue", linewidth=0)
        axes.set_xlabel("dimensions of the code in descending order")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=9, color=_GREY, loc="left")
    return figure


def map_figure(x: Tensor, ticks: tuple[list[float], list[float]], limits: tuple[float, float], title: str) -> "Figure":
    """Draw a decoded grid of a two-dimensional code, (side * side, *shape) from the top row, codes at the edges."""
    side = len(ticks[0])
    rgb = tiles(x, limits)
    rows = [rgb[i * side : (i + 1) * side] for i in range(side)]
    skip = max(1, side // 5)
    row_labels = [f"{t:.1f}" if i % skip == 0 or i == side - 1 else "" for i, t in enumerate(ticks[1])]
    column_labels = [f"{t:.1f}" if i % skip == 0 or i == side - 1 else "" for i, t in enumerate(ticks[0])]
    return mosaic_figure(rows, row_labels, column_labels, title, gap=0)


def histogram_figure(counts: Floats, edges: Floats, title: str = "") -> "Figure":
    """Draw bars of counts (N,) between edges (N + 1,)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 2.7), dpi=_DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.stairs(counts, edges, fill=True, color="tab:blue")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=9, color=_GREY, loc="left")
    return figure


# ---- indices --------------------------------------------------------------------------------------------------------


def index_grid(index: Tensor) -> Tensor:
    """Arrange indices (B, *positions) as (B, H, W): a sequence as a row, a volume as its middle slice."""
    if index.ndim == 4:
        index = index[:, index.shape[1] // 2]
    return index.reshape(len(index), *((1,) * (3 - index.ndim)), *index.shape[1:])


def index_colours(index: Tensor) -> Floats:
    """Return a fixed colour for each index, (...) -> (..., 3); white for -1.

    Hues are multiples of the golden angle, so that consecutive indices have very different colours.
    """
    from matplotlib.colors import hsv_to_rgb

    index = index.long().cpu()
    hue = (index * 2654435769 % 2**32).double() / 2**32
    rgb = hsv_to_rgb(torch.stack([hue, 1 - index % 3 * 0.25, 1 - index // 3 % 3 * 0.25], -1).numpy())
    shown: Floats = np.where((index < 0).numpy()[..., None], 1, rgb).astype(np.float32)
    return shown


def index_tiles(index: Tensor, size: tuple[int, int]) -> Floats:
    """Convert indices (B, *positions) to RGB tiles (B, *size, 3)."""
    return enlarged(index_colours(index_grid(index)), size)


def enlarged(x: Floats, size: tuple[int, int]) -> Floats:
    """Resize tiles (B, H, W, 3) without interpolation."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, x.shape[1:3], strict=True))
    return x[:, rows][:, :, columns]


def count_cells(counts_K: Tensor) -> Tensor:
    """Arrange counts (K,) as a nearly square mosaic (H, W), -1 in empty cells; cells are sums of ranges for large K."""
    run = -(-len(counts_K) // _MAX_CELLS)
    cells = torch.nn.functional.pad(counts_K, (0, -len(counts_K) % run)).unflatten(0, (-1, run)).sum(1)
    columns = math.ceil(len(cells) ** 0.5)
    return torch.nn.functional.pad(cells, (0, -len(cells) % columns), value=-1).unflatten(0, (-1, columns))


def count_figure(counts: Sequence[Tensor], labels: Sequence[str], unit: str, title: str = "") -> "Figure":
    """Draw mosaics of counts on a logarithmic scale from black (0) to bright.

    Args:
        counts: (K,) each.
        labels: one per mosaic.
        unit: what is counted.
        title: title of the figure.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure

    # starts with a colour that is distinguishable from black
    colours = ListedColormap(colormaps["inferno"](np.linspace(0.25, 1, 256)))
    cells = [count_cells(counts_K) for counts_K in counts]
    scale = ScalarMappable(LogNorm(1, max(2, *(int(part.max()) for part in cells))), colours)
    # whole numbers, so that all cells have the same size
    zooms = [max(2, _MOSAIC // part.shape[1]) for part in cells]
    side = max(_MOSAIC, *(zoom * part.shape[1] for zoom, part in zip(zooms, cells, strict=True)))
    columns = min(4, len(cells))
    margin, header, label_height, gap, legend = 12, 24, 20, 16, 90
    wide = max(margin + columns * (side + gap) + legend, 8 * len(title) + 2 * margin)
    high = header + -(-len(cells) // columns) * (label_height + side + gap)
    figure = Figure(figsize=(wide / _DPI, high / _DPI), dpi=_DPI, facecolor="white")

    def axes_at(left: int, top: int, width: int, height: int) -> "Axes":
        return figure.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high))

    for i, (part, zoom, label) in enumerate(zip(cells, zooms, labels, strict=True)):
        rgb = np.array(scale.to_rgba(part.clamp(min=1).numpy()))[..., :3]
        rgb[(part == 0).numpy()], rgb[(part < 0).numpy()] = 0, 1
        left, top = margin + i % columns * (side + gap), header + i // columns * (label_height + side + gap)
        axes = axes_at(left, top + label_height, zoom * part.shape[1], zoom * part.shape[0])
        axes.imshow(rgb, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        figure.text(left / wide, 1 - (top + label_height - 4) / high, label, va="bottom", fontsize=8)
    bar = axes_at(margin + columns * (side + gap), header + label_height, 14, side)
    figure.colorbar(scale, cax=bar).set_label(unit, fontsize=8)
    bar.tick_params(labelsize=7)
    if title:
        figure.text(margin / wide, 1 - margin / high, title, va="top", fontsize=9, color=_GREY)
    return figure


def rank_figure(counts: Mapping[str, Tensor], axis_labels: tuple[str, str], title: str = "") -> "Figure":
    """Draw relative frequencies of counts (K,) in descending order on a logarithmic axis; uniform is a dashed line.

    Args:
        counts: counts by name.
        axis_labels: labels of the two axes, rank and relative frequency.
        title: title of the figure.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4), dpi=_DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for i, (name, counts_K) in enumerate(counts.items()):
        share_K = (counts_K.sort(descending=True).values / counts_K.sum().clamp(min=1)).numpy()
        used = int((share_K > 0).sum())
        # drawing more points than pixels would be slow
        rank = np.arange(1, used + 1) if used <= _LINEAR else np.unique(np.geomspace(1, used, _LINEAR).astype(int))
        colour = colormaps["viridis"](i / len(counts))
        axes.step(rank, share_K[rank - 1], where="mid", linewidth=1.2, color=colour, label=name)
        axes.plot([1, len(share_K)], [1 / len(share_K)] * 2, "--", linewidth=1, color=colour)
    axes.set_yscale("log")
    if max(len(counts_K) for counts_K in counts.values()) > _LINEAR:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel(axis_labels[0])
    axes.set_ylabel(axis_labels[1])
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(title, fontsize=9, color=_GREY, loc="left")
    return figure


# ---- files ----------------------------------------------------------------------------------------------------------


def render(figure: "Figure") -> Pixels:
    """Return the figure's pixels, (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()


def png_bytes(figure: "Figure") -> bytes:
    """Return the figure as PNG data."""
    return encode_png(render(figure))


def displayable(figure: "Figure") -> "Figure":
    """Make a figure displayable in notebooks without pyplot, and return it."""
    # IPython looks up this method on each object
    vars(figure)["_repr_png_"] = functools.partial(png_bytes, figure)
    return figure


def write_png(path: Path, pixels: Pixels) -> bytes:
    """Write a PNG file atomically, and return its contents.

    Raises:
        AezooError: it could not be written; an existing file is unchanged.
    """
    png = encode_png(pixels)
    atomic_files.write(path, lambda file: file.write(png), cure="free disk space, or make the folder writable")
    return png


def encode_png(pixels: Pixels) -> bytes:
    """Encode pixels, (H, W, 3), as PNG data."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()
