"""What `embed` computes from codes: a plane, accuracies of classifiers, and nearest neighbours.

Codes are vectors here, (N, D); a feature map is one vector of all its channels and positions.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.data.classes import UNLABELLED
from aezoo.errors import AezooError, install_hint
from aezoo.tasks.passes import current
from aezoo.tasks.result_store import Store, release, write_batch
from aezoo.tasks.samples import SampleSet, reference_tensor
from aezoo.tasks.samples import progress_bar as progress_bar

Array = npt.NDArray[Any]

# 5 neighbours vote, as in `aezoo benchmark quality`
_VOTES = 5
# codes looked up at a time, and those that they are looked up in
_QUERIES, _LIBRARY = 1024, 2**16


def choose_rows(n: int, max_rows: int | None, seed: int = 0) -> Array:
    """At most `max_rows` of n row indices, drawn without replacement, in ascending order."""
    if max_rows is None or n <= max_rows:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).permutation(n)[:max_rows])


def encode_samples(
    model: Autoencoder,
    samples: SampleSet,
    max_samples: int | None,
    batch_size: int,
    seed: int,
    progress: bool,
    code: Callable[[Tensor], Tensor] | None = None,
    store: Store | None = None,
) -> tuple[Array, Array]:
    """Codes, (N, D) float32, of at most `max_samples` samples, and their indices. Use inside `evaluation_mode`.

    `code` replaces the encoder by another function with outputs of the same size. With a store, codes are in a file, so
    they may be larger than memory.
    """
    encode = code or model.encode
    rows = choose_rows(len(samples), max_samples, seed)
    shape = len(rows), math.prod(model.code_shape)
    if store is not None and len(rows) == len(samples):
        stored = store.scratch(shape)
        for start, batch in current.get().blocks(samples, batch_size, seed, "codes" if progress else ""):
            write_batch(stored, start, check_finite(encode(batch.to(reference_tensor(model))).flatten(1)))
        return stored, rows
    codes, start = np.empty(shape, np.float32), 0
    with progress_bar("codes" if progress else "", len(rows)) as advance:
        whole = len(rows) == len(samples)
        parts = [rows[i : i + batch_size].tolist() for i in range(0, len(rows), batch_size)]
        for batch in samples.batches(batch_size) if whole else map(samples.rows, parts):
            write_batch(codes, start, check_finite(encode(batch.to(reference_tensor(model))).flatten(1)))
            start += len(batch)
            advance(len(batch))
    return codes, rows


def check_finite(codes: Tensor) -> Tensor:
    """Return the codes if they are finite."""
    if not codes.float().isfinite().all():
        raise AezooError("some codes are NaN or infinite: the model is broken, train it again with a lower rate")
    return codes


def has_class_labels(samples: SampleSet) -> bool:
    """Whether each sample has one label, and labels are integers."""
    y = samples.labels
    return y is not None and not y.is_floating_point()


def same_classes(samples: SampleSet, known: SampleSet) -> Array:
    """Labels of `samples` numbered as in `known` if both name their classes; unknown classes get the next number."""
    y, names, known_names = np.asarray(samples.y), samples.class_names, known.class_names
    if names is None or known_names is None or names == known_names:
        return y
    numbers = [known_names.index(name) if name in known_names else len(known_names) for name in names]
    return np.array([*numbers, UNLABELLED])[y]  # an index of -1 counts from the end


# ---- the plane ------------------------------------------------------------------------------------------------------


def project_to_plane(codes: Array, method: str, seed: int) -> Array:
    """Codes (N, D) as points (N, 2).

    pca is the plane of largest variance. tsne (van der Maaten & Hinton 2008,
    https://jmlr.org/papers/v9/vandermaaten08a) and umap (McInnes et al. 2018, https://arxiv.org/abs/1802.03426) keep
    neighbours together; distances between groups mean nothing there.

    Raises:
        AezooError: too few samples, or umap is not installed.
    """
    n, size = codes.shape
    if method != "pca" and n < 4:
        raise AezooError(f"{method} needs at least 4 samples, got {n}: use method pca")
    codes = codes.astype(np.float64)
    if (codes == codes[0]).all():  # one point, once or many times
        return np.zeros((n, 2))
    if method == "pca":
        return pca(codes, codes, 2)[1]
    # both begin with the plane of PCA, which lays out groups as the codes do; a line has none
    start = "pca" if size > 1 else "random"
    if method == "umap":
        n_neighbors = min(15, n - 1)  # the default, limited by the number of samples
        model = umap()(n_neighbors=n_neighbors, init=start, random_state=seed, n_jobs=1)
        plane: Array = model.fit_transform(codes)
        return plane
    from sklearn.manifold import TSNE

    # 50 principal components first, as in the paper's section 4.2; perplexity as near to 30 as few samples allow
    codes = pca(codes, codes, 50)[1] if size > 50 else codes
    return TSNE(perplexity=min(30.0, (n - 1) / 3), init=start, random_state=seed).fit_transform(codes)


def umap() -> Any:
    """The class UMAP of umap-learn.

    Raises:
        AezooError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Tensorflow not installed", ImportWarning)  # only ParametricUMAP needs it
            from umap import UMAP
    except ImportError as error:
        raise AezooError(f"method umap needs umap-learn: {install_hint('umap')}") from error
    return UMAP


def pca(train: Array, test: Array, size: int) -> tuple[Array, Array]:
    """Codes of PCA with `size` components, fitted on `train`; components that it does not have are 0."""
    from sklearn.decomposition import PCA

    parts = np.zeros((len(train), size)), np.zeros((len(test), size))
    found = min(size, *train.shape)
    # sklearn takes an exact solver if it is fast, otherwise a randomised one
    fitted = PCA(found, random_state=0).fit(train)
    for part, values in zip(parts, (train, test), strict=True):
        part[:, :found] = fitted.transform(values)
    return parts


# ---- classifiers of codes ---------------------------------------------------------------------------------------


def fit_probe(x: Array, y: Array) -> Any:
    """A logistic regression on standardised vectors (N, D) and their classes (N,)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    with warnings.catch_warnings():
        # wide codes separate the classes, where logistic regression converges slowly and its accuracy has settled
        warnings.simplefilter("ignore", ConvergenceWarning)
        return probe.fit(x.astype(np.float64), y)


def probe_accuracies(train: Array, y_train: Array, test: Array, y_test: Array) -> dict[str, float]:
    """Test accuracies of classifiers that are trained on the training codes.

    Returns:
        `probe`, of logistic regression on standardised codes, and `knn`, of the 5 nearest neighbours on raw codes.
    """
    from sklearn.neighbors import KNeighborsClassifier

    probe = fit_probe(train, y_train)
    knn = KNeighborsClassifier(min(_VOTES, len(train))).fit(train, y_train)
    return {"probe": float(probe.score(test.astype(np.float64), y_test)), "knn": float(knn.score(test, y_test))}


# ---- neighbours -----------------------------------------------------------------------------------------------------


def nearest_codes(library: Array, codes: Array, k: int) -> tuple[Array, Array]:
    """Row indices (N, k) of the codes of `library` (M, D) nearest to each of `codes` (N, D), and their distances.

    Parts of the library are searched one after the other, so neither needs to fit in memory.
    """
    from sklearn.neighbors import NearestNeighbors

    neighbours, distances = np.zeros((len(codes), k), np.int64), np.full((len(codes), k), np.inf)
    for first in range(0, len(library), _LIBRARY):
        part = library[first : first + _LIBRARY].astype(np.float64)
        k_part = min(k, len(part))
        search = NearestNeighbors(n_neighbors=k_part).fit(part)
        for start in range(0, len(codes), _QUERIES):
            rows = slice(start, start + _QUERIES)
            z = codes[rows].astype(np.float64)
            found = search.kneighbors(z, return_distance=False)
            # for wide codes it computes |a|^2 - 2ab + |b|^2, which gives a code a small distance to itself
            exact = np.stack([np.linalg.norm(part[found[:, j]] - z, axis=1) for j in range(k_part)], axis=1)
            indices = np.concatenate([neighbours[rows], found + first], axis=1)
            exact = np.concatenate([distances[rows], exact], axis=1)
            order = np.argsort(exact, axis=1, kind="stable")[:, :k]
            neighbours[rows] = np.take_along_axis(indices, order, 1)
            distances[rows] = np.take_along_axis(exact, order, 1)
        release(library)
        release(codes)
    return neighbours, distances
