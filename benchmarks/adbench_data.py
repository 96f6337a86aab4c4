"""Data sets of ADBench as training and test rows (Han et al. 2022, https://arxiv.org/abs/2206.09426).

A set is an .npz file with X, (n, d), and y, (n,): 1 for an anomaly, 0 for a normal row. A seed fixes which rows are
kept, the split, the resampled anomalies and the irrelevant features.
"""

import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aezoo.errors import AezooError

Array = npt.NDArray[Any]
# shares of the training rows that are anomalies, and of the columns that are irrelevant; clean training is share 0
LEVELS: dict[str, tuple[float, ...]] = {
    "unsupervised": (0.0,),
    "clean": (0.0,),
    "contamination": (0.1, 0.2, 0.3),
    "noise": (0.1, 0.5),
}
TEST_SHARE = 0.3
# fewest anomalies of a large set; at their share, `smtp` would have only two among 6,000 rows
LEAST_ANOMALIES = 20


class Split(NamedTuple):
    """Standardised rows of a set.

    Attributes:
        train: (n, d), the training rows.
        train_labels: (n,), for counts only; they are not passed to a detector.
        test: (m, d).
        test_labels: (m,).
    """

    train: Array
    train_labels: Array
    test: Array
    test_labels: Array


def sets_in(folder: Path) -> dict[str, Path]:
    """Sets of a folder by name, in alphabetical order; without ADBench's number before the name.

    Raises:
        AezooError: there is no set, two sets have the same name, or a file is not a set.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.expanduser().resolve().glob("*.npz")):
        name = re.sub(r"^\d+_", "", path.stem)
        if name in found:
            raise AezooError(f"{path.name} and {found[name].name} are both the set {name}: rename or remove one")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                missing = {"X", "y"} - {*arrays.files}
        except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
            raise AezooError(f"cannot read {path} as .npz: fix or remove it") from error
        if missing:
            raise AezooError(f"{path} contains no array {', '.join(sorted(missing))}: a set has X and y")
        found[name] = path
    if not found:
        raise AezooError(f"no .npz in {folder}: give the folder of ADBench's sets, each with X and y")
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def read_set(path: Path) -> tuple[Array, Array]:
    """X, (n, d), in float64, and y, (n,), of 0 and 1.

    Raises:
        AezooError: the arrays are not such a set.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["X"], np.asarray(arrays["y"]).ravel()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise AezooError(f"cannot read X and y of {path.name}: {error}") from error
    if x.ndim != 2 or len(x) != len(y) or x.dtype.kind not in "fiub":
        raise AezooError(f"{path.name}: X must be numbers (n, d) and y (n,), got {x.dtype} {x.shape} and {y.shape}")
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise AezooError(f"{path.name}: X contains values that are not finite: clean it")
    if not np.isin(y, (0, 1)).all() or min(np.sum(y == 0), np.sum(y == 1)) < 2:
        raise AezooError(f"{path.name}: y must be 0 for normal rows and 1 for anomalies, at least two of each")
    return x, y.astype(np.int64)


def subsample(x: Array, y: Array, max_rows: int, seed: int) -> tuple[Array, Array]:
    """At most `max_rows` random rows with the same share of anomalies, but at least 20 anomalies, or all."""
    if len(y) <= max_rows:
        return x, y
    generator = np.random.default_rng(seed)
    normal, anomalies = (generator.permutation(np.flatnonzero(y == label)) for label in (0, 1))
    n = min(len(anomalies), max(LEAST_ANOMALIES, round(max_rows * len(anomalies) / len(y))), max_rows // 2)
    chosen = np.sort(np.concatenate([anomalies[:n], normal[: max_rows - n]]))
    return x[chosen], y[chosen]


def contaminate(y: Array, share: float, generator: np.random.Generator) -> Array:
    """Indices of training rows of which this share are anomalies: all normal ones, and anomalies that are drawn.

    As in ADBench, all normal rows are used and anomalies are resampled: without replacement if there are enough,
    otherwise with replacement.
    """
    normal, anomalies = np.flatnonzero(y == 0), np.flatnonzero(y == 1)
    n = round(share / (1 - share) * len(normal))
    return np.concatenate([normal, generator.choice(anomalies, n, replace=n > len(anomalies))])


def add_irrelevant_columns(x: Array, share: float, generator: np.random.Generator) -> Array:
    """X with uniform columns, so that this share of all is irrelevant, in random order: (n, d) -> (n, d + noise).

    The range of an irrelevant column is that of a random column of X. Their number is rounded up; ADBench rounds down,
    which adds none to a set of few columns.
    """
    n_columns = x.shape[1]
    n = int(np.ceil(share / (1 - share) * n_columns - 1e-9))
    copied = generator.integers(n_columns, size=n)
    noise = generator.uniform(x.min(0)[copied], x.max(0)[copied], (len(x), n))
    return np.concatenate([x, noise], axis=1)[:, generator.permutation(n_columns + n)]


def split(x: Array, y: Array, setting: str, level: float, seed: int, max_rows: int) -> Split:
    """Training rows and the 30 % for the test, stratified; the test rows of a seed are the same in all settings.

    Args:
        x: (n, d).
        y: (n,), 1 for an anomaly.
        setting: one of `LEVELS`. unsupervised trains on normal rows and anomalies, clean on normal rows only.
        level: the share of anomalies (contamination) or of irrelevant columns (noise).
        seed: fixes all draws.
        max_rows: most rows of a set, before it is split.
    """
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    x, y = subsample(x, y, max_rows, seed)
    generator = np.random.default_rng([seed, 1])
    if setting == "noise":
        x = add_irrelevant_columns(x, level, generator)
    train, test = train_test_split(np.arange(len(y)), test_size=TEST_SHARE, stratify=y, random_state=seed)
    if setting == "clean":
        train = train[y[train] == 0]
    elif setting == "contamination":
        train = train[contaminate(y[train], level, generator)]
    scaler = StandardScaler().fit(x[train])
    return Split(scaler.transform(x[train]), y[train], scaler.transform(x[test]), y[test])
