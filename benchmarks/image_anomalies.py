"""Detectors of image anomalies: on features of MVTec AD's pictures, and models on one class of a set against the rest.

    python -m benchmarks.image_anomalies --features DIR                     only the features
    python -m benchmarks.image_anomalies --data mnist5k --classes 0 1       only the models
    python -m benchmarks.image_anomalies --features DIR --data fashion_mnist --root /usr/share/datasets

DIR contains a folder for each network, such as CV_by_ResNet18, with an .npz for each class of products: X (n, d), one
vector for each picture, and y (n,), 1 for a defect, as ADBench publishes them (https://github.com/Minqi824/ADBench).
These files do not distinguish training and test pictures: 70 % of the good ones, drawn by the seed, are for training,
all others for the test. The methods are those of the zoo's models at a single place: gaussian (padim's Mahalanobis
distance), nearest (patchcore's distance to the nearest neighbour, with all vectors in memory), fre (principal
components, 220 or half of the possible number), and, for comparison, mean (the distance to the mean).

With --data, models are trained on one class of a set with their defaults, for --epochs, and --trained limits the
samples; the other classes of the test split are anomalies. Those on frozen features have a network with random weights
here (`features=random`), since no others could be downloaded: good results on photographs need ImageNet weights.

A row has AUROC and AUPR (average precision) of the test samples. Existing rows are kept.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aezoo.errors import AezooError

from .common import ResultsCSV, at_least, build_parser, command_line, environment, run_script

KEY = ("data", "normal", "method", "epochs", "seed")
MODELS = (
    *("fre", "padim", "patchcore", "student_teacher", "reverse_distillation"),
    *("draem", "conv_ae", "deep_svdd"),
)
# one epoch is all that they need
ONE_PASS = ("padim", "patchcore")
_TRAIN_SHARE = 0.7

Rows = npt.NDArray[np.float64]
Scorer = Callable[[Rows], Rows]


def gaussian(train: Rows) -> Scorer:
    """The Mahalanobis distance, with padim's 0.01 added to the variances."""
    mean = train.mean(0)
    factor = np.linalg.cholesky(np.cov(train.T) + 0.01 * np.eye(train.shape[1]))
    return lambda x: np.linalg.norm(np.linalg.solve(factor, (x - mean).T), axis=0)


def nearest(train: Rows) -> Scorer:
    """The distance to the nearest training vector."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=1).fit(train)
    return lambda x: search.kneighbors(x)[0][:, 0]


def fre(train: Rows) -> Scorer:
    """The squared error of principal components."""
    from sklearn.decomposition import PCA

    pca = PCA(min(220, len(train) // 2, train.shape[1] // 2), random_state=0).fit(train)
    return lambda x: np.square(x - pca.inverse_transform(pca.transform(x))).sum(1)


def mean_distance(train: Rows) -> Scorer:
    """The distance to the mean."""
    mean = train.mean(0)
    return lambda x: np.linalg.norm(x - mean, axis=1)


METHODS: dict[str, Callable[[Rows], Scorer]] = {
    "gaussian": gaussian,
    "nearest": nearest,
    "fre": fre,
    "mean": mean_distance,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the missing rows, and write the CSV."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser("image_anomalies", __doc__)
    add = parser.add_argument
    add("--features", type=Path, metavar="DIR", help="folders of features, see below")
    add("--data", nargs="+", default=[], metavar="NAME", help="sets for the models, such as mnist5k")
    add("--root", default="data", metavar="DIR", help="folder of these sets (default data)")
    add(
        "--classes", nargs="+", default=[str(i) for i in range(10)], metavar="NAME", help="normal classes (default 0-9)"
    )
    add(
        "--models",
        nargs="+",
        choices=MODELS,
        default=[*MODELS],
        metavar="NAME",
        help=f"models to train, of {', '.join(MODELS)}",
    )
    add("--epochs", type=at_least(1), default=5, metavar="N", help="epochs; padim and patchcore take 1 (default 5)")
    add(
        "--trained",
        type=at_least(50),
        default=1000,
        metavar="N",
        help="maximum number of training samples (default 1000)",
    )
    add("--tested", type=at_least(50), default=1000, metavar="N", help="maximum number of test samples (default 1000)")
    add("--seeds", type=at_least(1), default=3, metavar="N", help="seeds 0 to N - 1 (default 3)")
    arguments = parser.parse_args(argv)
    if arguments.features is None and not arguments.data:
        parser.error("give --features DIR or --data NAME")
    command = command_line("image_anomalies", argv, folders=("--features", "--root"))
    where = environment(arguments, accelerator="cpu")
    table = ResultsCSV(arguments.results / f"image-anomalies-{where}.csv", KEY, command, arguments.again)
    for file in _files(arguments.features):
        for seed in range(arguments.seeds):
            for name in METHODS:
                key = {"data": file.parent.name, "normal": file.stem, "method": name, "epochs": "", "seed": seed}
                if table.needs(key):
                    table.put(key | _vector_row(file, name, seed))
    for data in arguments.data:
        for seed in range(arguments.seeds):
            for normal in arguments.classes:
                for name in arguments.models:
                    epochs = 1 if name in ONE_PASS else arguments.epochs
                    key = {"data": data, "normal": normal, "method": name, "epochs": epochs, "seed": seed}
                    if table.needs(key):
                        table.put(key | _model_row(data, normal, name, epochs, seed, arguments))
                        print(table.find(key), flush=True)
    print(table.path)


def _files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    files = sorted(folder.expanduser().glob("*/*.npz"))
    if not files:
        raise AezooError(f"{folder} has no folders with .npz files: give that of the features with --features")
    return files


def _vector_row(file: Path, name: str, seed: int) -> dict[str, Any]:
    from aezoo.tasks.detect_labels import ranking_metrics

    with np.load(file, allow_pickle=False) as arrays:
        x, y = arrays["X"].astype(np.float64), arrays["y"].ravel() > 0
    good = np.random.default_rng(seed).permutation(np.flatnonzero(~y))
    train, held_out = np.split(good, [round(_TRAIN_SHARE * len(good))])
    test = np.concatenate([held_out, np.flatnonzero(y)])
    start = time.perf_counter()
    scores = METHODS[name](x[train])(x[test])
    seconds = time.perf_counter() - start
    sizes = {"train_rows": len(train), "test_rows": len(test)}
    return {**ranking_metrics(scores, y[test]), **sizes, "seconds": seconds}


def _model_row(data: str, normal: str, name: str, epochs: int, seed: int, arguments: Any) -> dict[str, Any]:
    import lightning.pytorch as pl
    import torch

    import aezoo
    from aezoo.tasks.detect import detect
    from aezoo.tasks.detect_labels import Protocol
    from aezoo.tasks.samples import SampleSet

    pl.seed_everything(seed, workers=True, verbose=False)
    whole = aezoo.DataModule(data, root=arguments.root)
    train = SampleSet.from_data(whole, "train")
    train = train.subset(torch.from_numpy(Protocol(normal, None).normal_indices(train))).subsample(arguments.trained)
    x = train.rows(range(len(train)))
    fitted = aezoo.DataModule.from_arrays(x, val_fraction=0, test_fraction=0, scale="none", batch_size=64)
    model = aezoo.create_model(name, tuple(x.shape[1:]))
    switches = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet: dict[str, Any] = dict.fromkeys(switches, False)
    start = time.perf_counter()
    pl.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, **quiet).fit(model, fitted)
    seconds = time.perf_counter() - start
    test = SampleSet.from_data(whole, "test").subsample(arguments.tested, seed=0)
    row = detect(model, test, normal=normal, baselines=False, n_shown=0, fit_on=train).rows[0]
    return {
        "auroc": row["auroc"],
        "aupr": row["aupr"],
        "train_rows": len(x),
        "test_rows": len(test),
        "seconds": seconds,
    }


if __name__ == "__main__":
    run_script(main)
