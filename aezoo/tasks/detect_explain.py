"""Explanations of anomalous samples, in a table and on a page.

Of each sample:

    contributions      of its values to the score, see `aezoo.tasks.detect_contributions`
    reconstruction     its reconstruction as a counterfactual: the values that the model expects instead, and
                       their score
    nearest normal     by the Euclidean distance of scaled values, for samples that are not vectors by
    samples            that of their codes, among the training samples; if they are scored, too, among those that are
                       not above the threshold

Shapes: D values of a sample, M numbers that distances are measured in.
"""

import base64
import functools
import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.data.columns import Columns
from aezoo.errors import AezooError
from aezoo.tasks.detect_contributions import Contributions, contributions
from aezoo.tasks.detect_scores import Scorer, Scores
from aezoo.tasks.embed_codes import nearest_codes
from aezoo.tasks.result_store import Row, row_of
from aezoo.tasks.results import Result
from aezoo.tasks.samples import SampleSet, evaluation_mode, random_rows
from aezoo.training.data_units import DataUnits
from aezoo.training.model_names import display_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

# values of a sample that have a row each; of larger samples those that contribute most
_MAX_ROWS, _MANY_ROWS = 256, 64
# values in a table of the page
_MAX_LINES = 20
_NEIGHBOURS = 3
# numbers of normal samples, and of explained ones, that are searched, 256 MiB
_MAX_VALUES = 2**26


@dataclass(repr=False)
class Explanation(Result):
    """Explanation of one sample; `table` has a row for each value and each other term, as `explanations.csv`.

    Attributes:
        index: of the sample.
        score: its score.
        threshold: larger scores are anomalies.
        p_value: of the score.
        features: (D,) names of the values.
        values: (*shape) in the units of the data.
        reconstruction: (*shape), the counterfactual: what the model expects instead of the values.
        reconstruction_score: the score of the reconstruction.
        contributions: (*shape) in the units of the score; None if the score is not a sum over values.
        terms: other terms of the score, by name; contributions and terms add up to the score.
        parts: (*shape) by name, the parts of contributions of the score combined.
        neighbours: indices of the normal samples nearest to it, nearest first.
        distances: their distances.
        neighbour_values: (k, *shape) in the units of the data.
        text: where neighbours come from and, if there are no contributions, why.
    """

    index: int
    score: float
    threshold: float
    p_value: float
    features: Sequence[str]
    values: Array
    reconstruction: Array
    reconstruction_score: float
    contributions: Array | None
    terms: dict[str, float]
    parts: dict[str, Array]
    neighbours: Array
    distances: Array
    neighbour_values: Array
    text: str

    @property
    def sizes(self) -> Array:
        """(*shape) what values are ranked by: contributions, or without these the distance to the reconstruction."""
        return np.abs(self.values - self.reconstruction) if self.contributions is None else self.contributions

    @property
    def kind(self) -> str:
        """What `sizes` are, in a word."""
        return "difference" if self.contributions is None else "contribution"

    def about(self) -> str:
        side = "above" if self.score > self.threshold else "not above"
        return (
            f"sample {self.index}: score {self.score:.4g}, p {self.p_value:.2g}, {side} the threshold "
            f"{self.threshold:.4g}; the score of its reconstruction is {self.reconstruction_score:.4g}"
        )

    def summary(self) -> str:
        """The values that contribute most, and the nearest normal samples."""
        lines = [self.about()]
        if self.contributions is not None:
            size, values, expected = (
                part.reshape(-1) for part in (self.contributions, self.values, self.reconstruction)
            )
            lines += [
                f"{size[d]:.4g} of {self.features[d]}: {values[d]:.4g}, expected {expected[d]:.4g}"
                for d in _ranked(size)[:5]
            ]
            lines += [f"{value:.4g} of {name}" for name, value in self.terms.items()]
        near = zip(self.neighbours.tolist(), self.distances.tolist(), strict=True)
        lines.append("nearest normal samples: " + ", ".join(f"{j} ({distance:.3g} away)" for j, distance in near))
        return "\n".join([*lines, self.text])

    def rows(self) -> Iterator[Row]:
        """A row for each value, or of a large sample for those that contribute most, and for each other term."""
        values, expected = self.values.reshape(-1), self.reconstruction.reshape(-1)
        found = {} if self.contributions is None else {"contribution": self.contributions.reshape(-1)}
        parts = {name: part.reshape(-1) for name, part in self.parts.items()}
        order = _ranked(self.sizes.reshape(-1))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(1, len(order) + 1)
        few = len(order) <= _MAX_ROWS
        empty = {"value": None, "reconstruction": None, "contribution": None, "rank": None}
        for d in range(len(order)) if few else order[:_MANY_ROWS]:
            row = empty | {"value": float(values[d]), "reconstruction": float(expected[d])}
            row |= {name: float(part[d]) for name, part in (found | parts).items()}
            row["rank"] = int(rank[d]) if found else None
            yield {"index": self.index, "feature": self.features[d]} | row
        if found and not few:
            left = order[_MANY_ROWS:]
            sums = {name: float(part[left].sum()) for name, part in (found | parts).items()}
            yield {"index": self.index, "feature": f"({len(left):,} other values)"} | empty | sums
        for name, value in self.terms.items():
            yield {"index": self.index, "feature": f"({name})"} | empty | {"contribution": value}


class Scored(Protocol):
    """Scores of samples."""

    scores: Scores
    p_values: Scores
    threshold: float


class Explainer:
    """Explains samples that were scored.

    Args:
        model: the model.
        name: of the score.
        scorer: computes it.
        samples: that were scored.
        found: their scores, p-values and the threshold.
        normal: samples in which neighbours are searched.
        own: (N,) indices among `samples` of those of `normal`, if they are some of these; otherwise (0,).
        batch_size: samples at a time.
        seed: of random draws.
    """

    def __init__(
        self,
        model: Autoencoder,
        name: str,
        scorer: Scorer,
        samples: SampleSet,
        found: Scored,
        normal: SampleSet,
        own: npt.NDArray[np.int64],
        batch_size: int,
        seed: int,
    ) -> None:
        self._model, self._name, self._scorer, self._samples = model, name, scorer, samples
        self._scores, self._p_values, self._threshold = found.scores, found.p_values, found.threshold
        self._batch_size, self._seed, self._normal = batch_size, seed, normal
        self._by_code = len(model.input_shape) > 1
        # samples above the threshold are not normal neighbours
        chosen = np.flatnonzero(self._scores[own] <= found.threshold) if len(own) else np.arange(len(normal))
        width = math.prod(model.code_shape if self._by_code else model.input_shape)
        self._most = max(1, _MAX_VALUES // width)
        self._chosen = chosen[random_rows(len(chosen), self._most, seed).numpy()]
        self._own = own[self._chosen] if len(own) else None
        self._library: Array | None = None

    @functools.cached_property
    def strangest(self) -> npt.NDArray[np.int64]:
        """The samples above the threshold, the largest score first."""
        order = np.argsort(-self._scores, kind="stable")
        return order[self._scores[order] > self._threshold]

    @functools.cached_property
    def note(self) -> str:
        """Why there are no contributions; empty if there are."""
        try:
            with evaluation_mode(self._model, self._seed) as like:
                self._contributions(self._samples.rows([0]).to(like))
        except AezooError as error:
            return f"no contributions: {error}"
        return ""

    def text(self) -> str:
        """What distances are, in words, and why there may be no contributions."""
        kind = "codes" if self._by_code else "values as the model sees them"
        n = len(self._chosen)
        near = f"neighbours by the Euclidean distance of {kind}, among {n:,} samples of {self._normal.name}"
        return "; ".join(filter(None, [near, self.note]))

    def report(self) -> str:
        """The content of the files, in one line."""
        n = len(self.strangest)
        return f"explanations of {n:,} samples above the threshold; {self.text()}"

    def explain(self, i: int) -> Explanation:
        """The explanation of one sample.

        Raises:
            AezooError: there is no such sample.
        """
        if not -len(self._samples) <= i < len(self._samples):
            raise AezooError(f"there is no sample {i}: give a number from 0 to {len(self._samples) - 1:,}")
        (found,) = self.explanations(np.array([i % len(self._samples)]))
        return found

    def explanations(self, index: npt.NDArray[np.int64], neighbours: bool = True) -> Iterator[Explanation]:
        """Explanations of samples, in the order of `index`."""
        for start in range(0, len(index), self._batch_size):
            yield from self._batch(index[start : start + self._batch_size], neighbours)

    def rows(self) -> Iterator[Row]:
        """The rows of explanations.csv, for all samples above the threshold."""
        for found in self.explanations(self.strangest, neighbours=False):
            yield from found.rows()

    def neighbour_rows(self) -> Iterator[Row]:
        """The rows of neighbours.csv, for as many samples above the threshold as are searched at a time."""
        index, notes = self.strangest[: self._most], self._normal.notes
        neighbours, distances = self._neighbours(index)
        for i, line, away in zip(index.tolist(), neighbours, distances, strict=True):
            for rank, (j, distance) in enumerate(zip(line.tolist(), away.tolist(), strict=True), start=1):
                yield {"index": i, "rank": rank, "neighbour": j, "distance": distance} | row_of(notes, j)

    def page(self, n_shown: int) -> bytes:
        """explanations.html: the `n_shown` samples with the largest scores, in one file that loads no others."""
        n = len(self.strangest)
        shown = self.strangest[:n_shown]
        left = f"; the first {len(shown):,} are shown" if len(shown) < n else ""
        kind = display_name(type(self._model))
        about = f"{n:,} of {len(self._samples):,} samples lie above the threshold {self._threshold:.4g}{left}."
        parts = [f"<h1>{html.escape(f'{kind}: {self._name} of {self._samples.name}')}</h1>", f"<p>{about}</p>"]
        parts.append(f"<p>{html.escape(self.text())}.</p>")
        fields = self._samples.notes
        for found in self.explanations(shown):
            notes = "".join(f", {name} {value}" for name, value in row_of(fields, found.index).items())
            parts += [
                f"<h2>{html.escape(f'sample {found.index}{notes}')}</h2>",
                f"<p>{html.escape(found.about())}.</p>",
            ]
            parts.append(self._table(found) if len(self._model.input_shape) == 1 else self._picture(found))
        head = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{kind}</title><style>{_STYLE}</style>'
        )
        return f"{head}</head><body>{''.join(parts)}</body></html>\n".encode("utf-8", "backslashreplace")

    # ---- parts of it ------------------------------------------------------------------------------------------------

    def _contributions(self, x: Tensor) -> Contributions:
        return contributions(self._model, self._name, self._scorer, x)

    def _batch(self, index: npt.NDArray[np.int64], neighbours: bool) -> Iterator[Explanation]:
        shape = self._model.input_shape
        x = self._samples.rows(torch.from_numpy(index))
        with evaluation_mode(self._model, self._seed) as like:
            given = x.to(like)
            x_hat = self._model(given)
            of_x_hat = self._scorer(x_hat).double().cpu().numpy()
            parts = None if self.note else self._contributions(given)
        k = self._neighbours(index) if neighbours else (np.empty((len(index), 0), np.int64), np.empty((len(index), 0)))
        near = self._normal.rows(torch.from_numpy(k[0].flatten())) if k[0].size else torch.empty(0, *shape)
        near_values = self._in_units(near).reshape(len(index), -1, *shape)
        values, expected = self._in_units(x), self._in_units(x_hat.float().cpu())
        text, features = self.text(), self._features
        for row, i in enumerate(index.tolist()):
            found = Explanation(
                i, float(self._scores[i]), self._threshold, float(self._p_values[i]), features, values[row],
                expected[row], float(of_x_hat[row]), None if parts is None else parts.values[row].cpu().numpy(),
                {} if parts is None else {name: float(part[row]) for name, part in parts.terms.items()},
                {} if parts is None else {name: part[row].cpu().numpy() for name, part in parts.parts.items()},
                k[0][row], k[1][row], near_values[row], text,
            )  # fmt: skip
            found.tabulate, found.draw = found.rows, functools.partial(self._draw, found)
            yield found

    @functools.cached_property
    def _features(self) -> Sequence[str]:
        """The name of each value: its column in a table, otherwise its position."""
        if self._samples.columns is not None:
            return self._samples.columns.names
        return [",".join(map(str, place)) for place in np.ndindex(*self._model.input_shape)]

    def _in_units(self, x: Tensor) -> Array:
        if self._samples.columns is not None:
            return self._samples.columns.values(x)
        return (self._model.data_units or DataUnits()).values(x.numpy())

    def _numbers(self, samples: SampleSet, index: npt.NDArray[np.int64]) -> Array:
        """What distances are measured in, (n, M): codes, or of vectors the values; missing ones are 0."""
        parts = []
        with evaluation_mode(self._model, self._seed) as like:
            for start in range(0, len(index), self._batch_size):
                x = samples.rows(torch.from_numpy(index[start : start + self._batch_size]))
                x = self._model.encode(x.to(like)).float().cpu() if self._by_code else x
                parts.append(x.flatten(1).nan_to_num())
        return torch.cat(parts).numpy() if parts else np.empty((0, 1), np.float32)

    def _neighbours(self, index: npt.NDArray[np.int64]) -> tuple[Array, Array]:
        """Indices of the nearest normal samples other than the sample itself, and their distances, (n, k) each."""
        k = min(_NEIGHBOURS, len(self._chosen) - (self._own is not None))
        if k < 1 or not len(index):
            return np.empty((len(index), 0), np.int64), np.empty((len(index), 0))
        if self._library is None:
            self._library = self._numbers(self._normal, self._chosen)
        if self._own is None:
            found, distances = nearest_codes(self._library, self._numbers(self._samples, index), k)
            return self._chosen[found], distances
        found, distances = nearest_codes(self._library, self._numbers(self._samples, index), k + 1)
        # the sample itself is sorted to the end, and removed with the surplus neighbour
        order = np.argsort(self._own[found] == index[:, None], axis=1, kind="stable")[:, :k]
        return self._chosen[np.take_along_axis(found, order, 1)], np.take_along_axis(distances, order, 1)

    # ---- the page and pictures --------------------------------------------------------------------------------------

    def _table(self, found: Explanation) -> str:
        """The values that contribute most, with bars."""
        values, expected = found.values.tolist(), found.reconstruction.tolist()
        size = found.sizes
        order = _ranked(size)
        largest = max(float(np.abs(np.nan_to_num(size)).max()), *map(abs, found.terms.values()), 1e-300)
        near = [f"normal {j}" for j in found.neighbours.tolist()]
        names = ["feature", "value", "reconstruction", *near, found.kind, ""]
        lines = [[f"<th>{html.escape(name)}</th>" for name in names]]

        def line(name: str, cells: Sequence[Any], total: float) -> list[str]:
            sign, width = "less" if total < 0 else "more", 200 * abs(total) / largest
            bar = f'<div class={sign} style="width:{width:.0f}px"></div>'
            numbers = [f"<td>{_number(cell)}</td>" for cell in (*cells, total)]
            return [f"<td class=name>{html.escape(name)}</td>", *numbers, f"<td class=bar>{bar}</td>"]

        for d in order[:_MAX_LINES].tolist():
            cells = [values[d], expected[d], *found.neighbour_values[:, d].tolist()]
            lines.append(line(found.features[d], cells, float(size[d])))
        empty = [None] * (len(names) - 3)
        if found.contributions is not None:
            if len(order) > _MAX_LINES:
                left = order[_MAX_LINES:]
                lines.append(line(f"{len(left):,} other features", empty, float(size[left].sum())))
            lines += [line(name, empty, value) for name, value in found.terms.items()]
        rows = "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
        return f"<table>{rows}</table>"

    def _picture(self, found: Explanation) -> str:
        from aezoo.callbacks.plotting import png_bytes

        content = base64.b64encode(png_bytes(self._draw(found))).decode()
        terms = ", ".join(f"{name} {value:.4g}" for name, value in found.terms.items())
        sums = "" if found.contributions is None else f"<p>values {found.contributions.sum():.4g}"
        sums += f", {html.escape(terms)}</p>" if terms else "</p>" if sums else ""
        return f'<img alt="sample {found.index}" src="data:image/png;base64,{content}">{sums}'

    def _draw(self, found: Explanation) -> "Figure":
        """The sample, its reconstruction, contributions, and its neighbours."""
        from aezoo.callbacks import plotting

        size, kind = found.sizes, found.kind
        near = [f"normal {j}" for j in found.neighbours.tolist()]
        if not plotting.is_image(size.shape):
            if size.ndim == 1:
                labels = [
                    f"{name} = {_number(value)}" for name, value in zip(found.features, found.values, strict=True)
                ]
                bars = {kind: torch.from_numpy(size)}
                return plotting.panel_figure([bars], [f"{kind} of each value"], columns=Columns(labels, {}, len(size)))
            curves = [found.values, found.reconstruction, size, *found.neighbour_values]
            panels = [{"curve": torch.from_numpy(np.asarray(curve))} for curve in curves]
            return plotting.panel_figure(panels, ["sample", "reconstruction", kind, *near])
        shown = torch.from_numpy(np.stack([found.values, found.reconstruction, *found.neighbour_values])).float()
        tiles = plotting.tiles(shown, plotting.value_range(shown[:1]))
        heat = plotting.error_tiles(torch.from_numpy(size)[None].clamp(min=0).float(), float(np.nanmax(size)))
        row = np.concatenate([tiles[:2], heat, tiles[2:]])
        return plotting.mosaic_figure([row], column_labels=["sample", "reconstruction", kind, *near])


def _ranked(size: Array) -> npt.NDArray[np.int64]:
    """Indices from the largest to the smallest, missing values last."""
    return np.argsort(-np.nan_to_num(size, nan=-np.inf), kind="stable")


def _number(value: float | None) -> str:
    return "" if value is None else "missing" if math.isnan(value) else f"{value:.4g}"


_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:75em;color:#222}h2{font-size:1.1em;margin-top:2em}"
    "table{border-collapse:collapse}td,th{padding:2px 10px;text-align:right;border-bottom:1px solid #ddd}"
    ".name,.bar{text-align:left}.more{background:#c44e52;height:12px}.less{background:#4c72b0;height:12px}"
    "img{max-width:100%}"
)
