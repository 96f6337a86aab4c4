"""The pictures of the report, drawn with matplotlib's object interface: no window, no global state.

The colours are those of Okabe and Ito, which readers with any colour vision can distinguish
(https://jfly.uni-koeln.de/color/). A marker or a label always repeats the information of a colour.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import common, labels
from .labels import SIZE
from .pareto import panels as pareto_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, str]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY, _LIGHT = "0.35", "0.85"
_HATCH = "////"
_PEERS = {
    "loop": "compiled loop by hand",
    "loop_eager": "textbook loop",
    "lightning": "textbook Lightning",
    "lightning_bf16": "textbook Lightning bf16",
}


def number(row: Row, name: str) -> float:
    """A cell as a number, or NaN."""
    found = common.number(row, name)
    return math.nan if found is None else found


def _positive(rows: Sequence[Row], *names: str) -> list[Row]:
    return [row for row in rows if not row.get("error") and all(number(row, name) > 0 for name in names)]


def _panels(n: int, width: float, height: float, **shared: Any) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    columns = 2 if n == 4 else min(n, 3)
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(width * columns if n > 1 else width * 1.25, height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1, **shared) for i in range(n)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color=_LIGHT, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=SIZE - 1)
    return figure, axes


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Plain tick labels at 1, 2 and 5 of each decade; more where values span less than one, fewer from 300."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    narrow, wide = max(values) / min(values) < 4, max(values) / min(values) > 300
    axis.set_major_locator(
        LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9) if narrow else (1, 3) if wide else (1, 2, 5))
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _group_by(rows: Sequence[Row], name: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get(name, ""), []).append(row)
    return groups


def _legend(figure: "Figure", handles: Sequence[Any]) -> None:
    """Put the legend below the panels, where there are no points."""
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize=SIZE)


def pareto(rows: Sequence[Row]) -> "Figure | None":
    """Error against training throughput, one panel per data set, see `benchmarks.pareto`.

    Rates from another processor than the most common one have hollow markers and are not on the front.
    """
    from matplotlib.lines import Line2D

    found = pareto_panels(rows)
    if not found:
        return None
    families = list(dict.fromkeys(point.row.get("family", "") for panel in found for point in panel.points))
    style = {family: (COLOURS[i % 7], _MARKERS[i % 7]) for i, family in enumerate(families)}
    figure, axes = _panels(len(found), 6.4, 5.2, xscale="log", yscale="log")
    for ax, panel in zip(axes, found, strict=True):
        ax.plot(*zip(*panel.front, strict=True), color=_LIGHT, linewidth=5, zorder=0, solid_capstyle="round")
        points = []
        for point in panel.points:
            colour, marker = style[point.row.get("family", "")]
            face, edge = (colour, "white") if point.compared else ("white", colour)
            ax.plot(point.speed, point.error, marker, color=face, markersize=8, markeredgecolor=edge)
            points.append((point.speed, point.error, point.label, colour))
        xs = [point.speed for point in panel.points]
        ys = [point.error for point in panel.points] + ([] if panel.pca is None else [panel.pca])
        if panel.pca is not None:
            ax.axhline(panel.pca, color=_GREY, linestyle="--", linewidth=1.2)
        ax.set_xlim(min(xs) / 1.6, max(xs) * 1.9)
        low, high = min(ys), max(ys)
        ax.set_ylim(low / (high / low) ** 0.12 / 1.05, high * (high / low) ** 0.12 * 1.05)
        for axis, values in ((ax.xaxis, xs), (ax.yaxis, ax.get_ylim())):
            _plain_ticks(axis, values)
        ax.set_title(f"{panel.dataset}, code of {panel.code_size} numbers", fontsize=SIZE + 2, loc="left")
        ax.set_xlabel("training throughput (samples/s, log)  faster →", fontsize=SIZE)
        ax.set_ylabel("← better  test error (mse, log)", fontsize=SIZE)
        labels.label_points(ax, points)
        if panel.pca is not None:
            ax.text(
                0.995, panel.pca, "PCA", transform=ax.get_yaxis_transform(), ha="right", va="bottom",
                fontsize=SIZE - 1.5, color=_GREY,
            )  # fmt: skip
    marks = [
        Line2D([], [], linestyle="", marker=style[f][1], color=style[f][0], markersize=8, label=f) for f in families
    ]
    marks += [Line2D([], [], color=_LIGHT, linewidth=5, label="no model is both faster and better")]
    if not all(point.compared for panel in found for point in panel.points):
        marks += [
            Line2D(
                [], [], linestyle="", marker="o", color="white", markeredgecolor=_GREY, markersize=8,
                label="on another processor",
            )
        ]  # fmt: skip
    _legend(figure, marks)
    return figure


def code_size(rows: Sequence[Row]) -> "Figure | None":
    """Error against code size, one panel per data set: a line for each model with more than two sizes, and for PCA."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    sets: dict[str, list[Row]] = {}
    for dataset, part in _group_by(_positive(rows, "mse", "code_size"), "dataset").items():
        for group in _group_by(part, "model").values():
            if len({row["code_size"] for row in group}) > 2:
                sets.setdefault(dataset, []).extend(group)
    if not sets:
        return None
    names = list(dict.fromkeys(row["model"] for part in sets.values() for row in part))
    figure, axes = _panels(len(sets), 6.4, 5.0, yscale="log")
    for ax, (dataset, part) in zip(axes, sets.items(), strict=True):
        ends = []
        ax.set_xscale("log", base=2)
        for name, group in _group_by(part, "model").items():
            group = sorted(group, key=lambda row: number(row, "code_size"))
            xs, ys = ([number(row, key) for row in group] for key in ("code_size", "mse"))
            i = names.index(name)
            ax.plot(xs, ys, color=COLOURS[i % 6], marker=_MARKERS[i // 6 % 7], markersize=6, linewidth=1.8)
            ends.append((xs[-1], ys[-1], name, COLOURS[i % 6]))
        floor = sorted({number(row, "code_size"): number(row, "pca_mse") for row in _positive(part, "pca_mse")}.items())
        if floor:
            ax.plot(*zip(*floor, strict=True), color="black", linestyle="--", linewidth=1.8)
            ends.append((*floor[-1], "PCA", "black"))
        sizes = sorted({number(row, "code_size") for row in part})
        ax.set_xlim(sizes[0] / 1.15, sizes[-1] * 1.08)
        ax.set_xticks(sizes)
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_minor_formatter(NullFormatter())
        _plain_ticks(ax.yaxis, ax.get_ylim())
        ax.set_title(dataset, fontsize=SIZE + 2, loc="left")
        ax.set_xlabel("code size (numbers, log)", fontsize=SIZE)
        ax.set_ylabel("← better  test error (mse, log)", fontsize=SIZE)
        labels.label_curve_ends(ax, ends)
    return figure


def scaling(rows: Sequence[Row]) -> "Figure | None":
    """Throughput relative to one device against devices, and the ideal; rows must be from one machine in one state."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    good = _positive(rows, "samples_per_s", "devices")
    # columns that put two rows on different curves
    keys = ("name", "shape", "precision", "batch", "compile", "threads", "memory", "interface", "machine")
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for row in good:
        key = tuple(row.get(name, "") for name in keys)
        found.setdefault(key, {})[int(row["devices"])] = number(row, "samples_per_s")
    found = {key: dict(sorted(curve.items())) for key, curve in found.items() if 1 in curve and len(curve) > 1}
    if not found:
        return None
    # the name, and the other columns in which the curves differ
    shown = [i for i, values in enumerate(zip(*found, strict=True)) if i == 0 or len({*values}) > 1]
    labels_of = {key: [key[0], *(f"{keys[i]} {key[i]}" for i in shown[1:] if key[i])] for key in found}
    curves = {", ".join(labels_of[key]): curve for key, curve in found.items()}
    figure, (ax,) = _panels(1, 6.4, 4.6)
    counts = sorted({count for curve in curves.values() for count in curve})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.plot(counts, counts, color=_GREY, linestyle="--", linewidth=1.4)
    ends = [(float(counts[-1]), float(counts[-1]), "ideal", _GREY)]
    for i, (title, curve) in enumerate(curves.items()):
        colour = COLOURS[i % 7]
        multiples = [rate / curve[1] for rate in curve.values()]
        ax.plot([*curve], multiples, color=colour, marker=_MARKERS[i % 7], markersize=8, linewidth=1.8)
        last = max(curve)
        ends.append((float(last), multiples[-1], f"{title}: {100 * multiples[-1] / last:.0f} %", colour))
    ax.set_xticks(counts)
    ax.set_xlim(counts[0] / 1.05, counts[-1] * 1.05)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("devices", fontsize=SIZE)
    ax.set_ylabel("training throughput (one device = 1)", fontsize=SIZE)
    ax.set_title("More devices, the same batch on each, and the share of the ideal", fontsize=SIZE + 2, loc="left")
    labels.label_curve_ends(ax, ends)
    return figure


def peers(files: Mapping[str, Sequence[Row]]) -> "Figure | None":
    """Bars of each party's ratio to the compiled loop, one panel per workload; hatched where losses do not agree.

    Args:
        files: rows by workload and the rest of the file name, which starts with the precision; all from one machine.
    """
    from matplotlib.patches import Patch

    panels = {title: _positive(rows, "ratio") for title, rows in files.items()}
    panels = {title: sorted(rows, key=lambda row: number(row, "ratio")) for title, rows in panels.items() if rows}
    # the fastest network first, regardless of its name
    panels = dict(sorted(panels.items(), key=lambda panel: -max(number(row, "samples_per_s") for row in panel[1])))
    if not panels:
        return None
    most = max(len(rows) for rows in panels.values())
    figure, axes = _panels(len(panels), 4.8, 1.5 + 0.42 * most)
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        ax.grid(visible=False, axis="y")
        ax.axvline(1, color=_GREY, linestyle="--", linewidth=1.2, zorder=0)
        reach = 0.0
        for i, row in enumerate(rows):
            ratio, low, high = (number(row, name) for name in ("ratio", "ratio_min", "ratio_max"))
            ours = row["party"].startswith("aezoo")
            hatch = None if _agrees(row) else _HATCH
            ax.barh(i, ratio, height=0.68, color=COLOURS[0] if ours else "0.72", hatch=hatch, edgecolor="white")
            edge = ratio
            if low > 0 and high > 0:
                ax.plot([low, high], [i, i], color="black", linewidth=1.4, solid_capstyle="butt")
                edge = max(edge, high)
            reach = max(reach, edge)
            ax.annotate(
                f"{ratio:.2f}×  {number(row, 'samples_per_s'):,.0f}/s",
                (edge, i),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=SIZE - 1.5,
                fontweight="bold" if ours else "normal",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )
        workload, _, rest = title.partition("-")
        precision = rest.partition("-")[0]
        ax.set_yticks(range(len(rows)), [_party(row, precision) for row in rows], fontsize=SIZE - 1)
        for tick, row in zip(ax.get_yticklabels(), rows, strict=True):
            tick.set_fontweight("bold" if row["party"].startswith("aezoo") else "normal")
        ax.tick_params(axis="y", length=0)
        ax.set_xlim(0, 1.7 * reach)
        ax.set_title(f"{workload} ({rest.replace('-', ', ')})", fontsize=SIZE, loc="left")
        ax.set_xlabel("training speed (compiled loop = 1)", fontsize=SIZE)
    shown = [row for rows in panels.values() for row in rows]
    machines = dict.fromkeys(row["processor"] for row in shown if row.get("processor"))
    if machines:
        figure.suptitle(f"on {', '.join(machines)}", fontsize=SIZE + 2, x=0.01, ha="left")
    if not all(map(_agrees, shown)):
        label = "hatched: its losses are not those of the loop, so its speed does not compare"
        _legend(figure, [Patch(facecolor="0.72", edgecolor="white", hatch=_HATCH, label=label)])
    return figure


def _agrees(row: Row) -> bool:
    return row.get("agrees") == "yes"


def _party(row: Row, precision: str) -> str:
    """A party's name, with its precision if that differs from the panel's."""
    name = _PEERS.get(row["party"], row["party"].replace("_", " "))
    own = row.get("precision") or precision
    return name if own == precision else f"{name}, {own}"
