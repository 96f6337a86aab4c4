"""embed: codes of samples, a picture of them in the plane, classification by code, and nearest neighbours."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.data.classes import UNLABELLED, original_labels
from aezoo.errors import AezooError
from aezoo.tasks.embed_codes import (
    check_finite,
    choose_rows,
    encode_samples,
    has_class_labels,
    nearest_codes,
    pca,
    probe_accuracies,
    project_to_plane,
    same_classes,
    umap,
)
from aezoo.tasks.passes import current
from aezoo.tasks.result_store import Row, Store, check_table, row_of, table_text, write_batch
from aezoo.tasks.results import Result, sizes, takes_model
from aezoo.tasks.samples import SampleSet, evaluation_mode
from aezoo.tasks.samples import progress_bar as progress_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
Notes = Mapping[str, Sequence[Any]]

_METHODS = ("pca", "tsne", "umap")
# maximum points of the picture: with more, t-SNE takes minutes, and points hide each other
_MAX_POINTS = 10_000
# limits of samples for classifiers, and of their raw values: with more pixels they would take minutes
_MAX_PROBE_SAMPLES = 10_000
_MAX_VALUES = 2**26


@dataclass(repr=False)
class Embedding(Result):
    """The result of `embed`; codes are a memory-mapped file if a folder was given.

    Attributes:
        codes: (N, *code_shape), `model.encode` of each sample.
        plane: (M, 2), the points of the picture, for at most 10,000 samples.
        rows: (M,), the index of each point's sample.
        accuracies: one row each for codes, raw values and PCA: the share of labelled samples of x whose class a
            logistic regression (probe) and the 5 nearest neighbours (knn) predict; empty without labels or new samples.
        neighbours: (N, nearest), indices of the nearest samples of `fit_on`, nearest first.
        distances: (N, nearest), their Euclidean distances in code space.
    """

    codes: Array
    plane: Array
    rows: Array
    accuracies: list[Row]
    neighbours: Array
    distances: Array

    def about(self) -> str:
        n, *shape = self.codes.shape
        return f"{n:,} codes of {sizes(shape)}"

    def summary(self) -> str:
        """The accuracies, and the number and size of the codes."""
        n, *shape = self.codes.shape
        lines = [f"{n:,} codes of {' x '.join(map(str, shape))}"]
        if self.distances.size:
            lines.append(f"distance to the nearest sample: median {np.median(self.distances[:, 0]):.4g}")
        if self.accuracies:
            lines = [table_text(self.accuracies), *self._verdict(), *lines]
        return "\n".join(lines)

    def _verdict(self) -> list[str]:
        """Which other features a classifier does better on than on the codes."""
        codes, *others = self.accuracies
        found = [
            f"{max(others, key=lambda row: row[name])['features']}, by {name}"
            for name in ("probe", "knn")
            if max((row[name] for row in others), default=0.0) > codes[name]
        ]
        return [f"a baseline separates the classes best: {'; '.join(found)}"] if found else []


@takes_model
def embed(
    model: Autoencoder,
    x: Any,
    *,
    fit_on: Any = None,
    method: str = "pca",
    nearest: int = 0,
    table: str = "npy",
    n_shown: int = 8,
    out: str | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Embedding:
    """Embed samples: their codes, a picture of the codes, the accuracy of classifiers on them, and nearest neighbours.

    Writes codes.npy (or a table with the columns index, z0, z1, ... and label), plane.csv and plane.png. With training
    samples and labels it also writes accuracies.csv; with --nearest, neighbours.csv and neighbours.png.

    Args:
        model: a trained model.
        x: samples (N, *input_shape), a DataModule (its test split) or `SampleSet`.
        fit_on: training samples, for the classifiers and the nearest neighbours: an array, a DataModule (its training
            split) or `SampleSet`. Without it, or if it is x, there are no accuracies, and the nearest neighbour of each
            sample is the sample itself.
        method: how codes are projected to the plane: pca, tsne or umap.
        nearest: how many nearest training samples in code space to find for each sample; 0 finds none.
        table: npy, npz (x, the codes, and y, the labels: what --data.name takes), csv or parquet, the format of the
            codes; that of the other tables is parquet or else csv.
        n_shown: samples in the picture of neighbours; 0 draws no pictures.
        out: folder for the results; None keeps them in memory.
        batch_size: samples at a time.
        seed: seed of t-SNE, UMAP and of the choice of samples if there are too many.
        progress: show a bar on a terminal.

    Raises:
        AezooError: samples that the model cannot use, values out of range, or a folder that cannot be written.
    """
    _check(method, table, nearest, n_shown, batch_size)
    samples = SampleSet.from_data(x, allow_missing=model.takes_missing).check(model)
    train = None if fit_on is None else SampleSet.from_data(fit_on, "train", model.takes_missing).check(model)
    library = samples if train is None else train
    n, kind = len(samples), "parquet" if table == "parquet" else "csv"
    if nearest > len(library):
        raise AezooError(f"nearest is {nearest}, but there are {len(library)} samples to choose from")
    labels = None if samples.labels is None else samples.labels.numpy()
    with Store(out) as store, evaluation_mode(model, seed) as like:
        shape = (n, *model.code_shape)
        codes, passes = store.array("codes", shape) if table == "npy" else store.scratch(shape), current.get()
        for start, batch in passes.blocks(samples, batch_size, seed, "embed" if progress else ""):
            write_batch(codes, start, check_finite(model.encode(batch.to(like))))
        known = codes.reshape(n, -1)
        if nearest and train is not None:
            known = encode_samples(model, train, None, batch_size, seed, progress, store=store)[0]
        passes.finish()
        flat, notes = codes.reshape(n, -1), samples.notes
        if table == "npz":
            store.arrays("codes", {"x": codes} | ({} if labels is None else {"y": _samples_text(samples)}))
        elif table != "npy":
            store.table("codes", _code_rows(flat, notes), table)
        rows = choose_rows(n, _MAX_POINTS, seed)
        plane = project_to_plane(flat[rows], method, seed)
        shown = None if labels is None else labels[rows]
        store.table("plane", _plane_rows(rows, plane, notes), kind)
        accuracies: list[Row] = []
        # accuracies on the training samples of classifiers are meaningless
        new = train is not None and train.dataset is not samples.dataset
        if train is not None and new and has_class_labels(samples) and has_class_labels(train):
            accuracies = _accuracies(model, train, samples, flat, batch_size, seed, progress)
            store.table("accuracies", accuracies, kind)
        neighbours, distances = np.empty((n, 0), np.int64), np.empty((n, 0))
        if nearest:
            neighbours, distances = nearest_codes(known, flat, nearest)
            store.table("neighbours", _neighbour_rows(neighbours, distances, samples.fields, library.fields), kind)
        draw = functools.partial(_plane_picture, plane, shown, method, samples)
        if n_shown:
            store.picture("plane", draw)
        if n_shown and nearest:
            store.picture("neighbours", lambda: _neighbour_picture(samples, library, neighbours, n_shown))
    return Embedding(
        codes, plane, rows, accuracies, neighbours, distances,
        files=store.files, tabulate=functools.partial(_code_rows, flat, notes), draw=draw,
    )  # fmt: skip


def _check(method: str, table: str, nearest: int, n_shown: int, batch_size: int) -> None:
    if method not in _METHODS:
        raise AezooError(f"method is {method!r}: use pca, tsne or umap")
    check_table(table, ("npy", "npz", "csv", "parquet"))
    if nearest < 0 or n_shown < 0 or batch_size < 1:
        raise AezooError(
            f"nearest and n_shown must be at least 0 and batch_size at least 1, got {nearest}, {n_shown}, {batch_size}"
        )
    if method == "umap":
        umap()


def _accuracies(
    model: Autoencoder, train: SampleSet, test: SampleSet, test_codes: Array, batch_size: int, seed: int, progress: bool
) -> list[Row]:
    """Accuracies of the same two classifiers on codes, raw values and PCA of the code's size.

    All use the same labelled samples of either set, at most 10,000.
    """
    most = min(_MAX_PROBE_SAMPLES, max(100, _MAX_VALUES // math.prod(model.input_shape)))
    y_train, y_test = np.asarray(train.y), same_classes(test, train)
    # -1 means no label, see --data.num_labels
    known, known_test = (np.flatnonzero(y != UNLABELLED) for y in (y_train, y_test))
    rows, test_rows = (part[choose_rows(len(part), most, seed)] for part in (known, known_test))
    y_train, y_test = y_train[rows], y_test[test_rows]
    if len(np.unique(y_train)) < 2 or not len(y_test):
        return []  # fewer than two classes
    seen = train.subset(torch.from_numpy(rows))
    train_codes, test_codes = encode_samples(model, seen, None, batch_size, seed, progress)[0], test_codes[test_rows]
    raw_train, raw_test = (
        part.rows(torch.from_numpy(chosen)).flatten(1).numpy() for part, chosen in ((train, rows), (test, test_rows))
    )
    size = train_codes.shape[1]
    sets = {"codes": (train_codes, test_codes), "raw values": (raw_train, raw_test)}
    if np.isnan(raw_train).any() or np.isnan(raw_test).any():
        del sets["raw values"]  # classifiers do not accept NaN
    elif size <= min(raw_train.shape):
        sets["pca"] = pca(raw_train, raw_test, size)
    with progress_bar("classifiers" if progress else "", len(sets)) as advance:
        found = []
        for name, (a, b) in sets.items():
            found.append({"features": name, "size": a.shape[1]} | probe_accuracies(a, y_train, b, y_test))
            advance(1)
    return found


# ---- tables and pictures --------------------------------------------------------------------------------------------


def _samples_text(samples: SampleSet) -> Array:
    """Labels as in the data; class numbers if some samples have none."""
    assert samples.labels is not None
    given = np.asarray(original_labels(samples.labels, samples.class_names))
    return samples.labels.numpy() if given.dtype.kind == "U" and (samples.labels == UNLABELLED).any() else given


def _code_rows(flat: Array, notes: Notes) -> Iterator[Row]:
    for i, code in enumerate(flat):
        yield {"index": i} | {f"z{d}": float(value) for d, value in enumerate(code)} | row_of(notes, i)


def _plane_rows(rows: Array, plane: Array, notes: Notes) -> Iterator[Row]:
    for i, (u, v) in zip(rows, plane, strict=True):
        yield {"index": int(i), "u": float(u), "v": float(v)} | row_of(notes, i)


def _neighbour_rows(neighbours: Array, distances: Array, queries: Notes, library: Notes) -> Iterator[Row]:
    for i, line in enumerate(neighbours):
        query = {f"query_{name}": value for name, value in row_of(queries, i).items()}
        for j, found in enumerate(line):
            row = {"index": i, "rank": j + 1, "neighbour": int(found), "distance": float(distances[i, j])}
            yield row | query | row_of(library, int(found))


def _plane_picture(plane: Array, labels: Array | None, method: str, samples: SampleSet) -> "Figure":
    from aezoo.callbacks import plotting

    name = {"pca": "principal component", "tsne": "t-SNE", "umap": "UMAP"}[method]
    shown = None if labels is None else torch.from_numpy(labels)
    return plotting.scatter_figure(
        torch.from_numpy(plane), shown, (f"{name} 1", f"{name} 2"), f"codes of {samples.name}"
    )


def _neighbour_picture(samples: SampleSet, library: SampleSet, neighbours: Array, n_shown: int) -> "Figure":
    """Each sample and, to its right, its neighbours."""
    from aezoo.callbacks import plotting

    n, k = min(n_shown, len(samples)), min(neighbours.shape[1], 12)
    queries = samples.rows(range(n))
    found = library.rows(torch.from_numpy(neighbours[:n, :k].flatten())).unflatten(0, (n, k))
    columns = ["sample", *(str(j + 1) for j in range(k))]
    if not plotting.is_image(samples.shape):
        panels = [dict(zip(columns, [queries[i], *found[i]], strict=True)) for i in range(n)]
        return plotting.panel_figure(panels, columns=samples.columns)
    rows: list[Tensor] = [torch.cat([queries[i, None], found[i]]) for i in range(n)]
    limits = plotting.value_range(queries)
    return plotting.mosaic_figure([plotting.tiles(row, limits) for row in rows], column_labels=columns)
