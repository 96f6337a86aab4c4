"""Detectors of image anomalies: on features of MVTec AD's pictures, and models on one class of a set against the rest.

    python -m benchmarks.image_anomalies --features DIR                 only the features
    python -m benchmarks.image_anomalies --data mnist --classes 0 1     only the models
    python -m benchmarks.image_anomalies --features DIR --data fashion_mnist --root /usr/share/datasets

DIR contains a folder for each network, such as CV_by_ResNet18, with an .npz for each class of products: X (n, d), one
vector for each picture, and y (n,), 1 for a defect, as ADBench publishes them (https://github.com/Minqi824/ADBench).
These files do not distinguish training and test pictures: 70 % of the good ones, drawn by the seed, are for training,
all others for the test. The methods are those of the zoo's models at a single place: gaussian (padim's Mahalanobis
distance), nearest (patchcore's distance to the nearest neighbour, with all vectors in memory), fre (principal
components, 220 or half of the possible number); models of vectors as `AutoencoderDetector` trains them, default being
the one without arguments; and, for comparison, mean (the distance to the mean).

With --data, models are trained with their defaults on one class of a set; the other classes of the test split are
anomalies. A tenth of the class's training samples is for validation: a training has converged if the validation loss
has not fallen for 1,000 steps by 0.5 % of its fall since the first step, and is capped after --seconds of one core.
padim and patchcore take one epoch. Models on frozen features have a network with random weights here
(`features=random`), since no others could be downloaded: good results on photographs need ImageNet weights.

A row has AUROC and AUPR (average precision) of the test samples. Existing rows are kept; a longer --seconds repeats
rows that were capped.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from aezoo.errors import AezooError

from .common import at_least, build_parser, command_line, environment, run_script, seconds
from .quality_table import CappedTable

if TYPE_CHECKING:
    from aezoo.autoencoder import Autoencoder
    from aezoo.data.datamodule import DataModule

KEY = ("data", "normal", "method", "seed")
MODELS = (
    *("fre", "padim", "patchcore", "student_teacher", "reverse_distillation"),
    *("draem", "conv_ae", "deep_svdd"),
)
BASELINES = ("pca", "knn", "isolation_forest")
# of `AutoencoderDetector`
VECTOR_MODELS = ("default", "dense_ae", "deep_svdd", "memory_ae", "vae")
# evaluations every 200 steps
PATIENCE, LEAST = 5, 0.005
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
        choices=(*MODELS, *BASELINES),
        default=[*MODELS, *BASELINES],
        metavar="NAME",
        help=f"models to train, of {', '.join(MODELS)}, and baselines on pixels, of {', '.join(BASELINES)}",
    )
    add("--seconds", type=seconds, default=300.0, metavar="S", help="limit of a training (default 300)")
    add("--seeds", type=at_least(1), default=3, metavar="N", help="seeds 0 to N - 1 (default 3)")
    arguments = parser.parse_args(argv)
    if arguments.features is None and not arguments.data:
        parser.error("give --features DIR or --data NAME")
    command = command_line("image_anomalies", argv, folders=("--features", "--root"))
    where = environment(arguments, accelerator="cpu")
    table = CappedTable(arguments.results / f"image-anomalies-{where}.csv", KEY, command, arguments.again)
    for file in _files(arguments.features):
        for seed in range(arguments.seeds):
            for name in (*METHODS, *VECTOR_MODELS):
                key = {"data": file.parent.name, "normal": file.stem, "method": name, "seed": seed}
                if table.needs(key):
                    table.put(key | _vector_row(file, name, seed))
    for data in arguments.data:
        for seed in range(arguments.seeds):
            for normal in arguments.classes:
                for name in arguments.models:
                    key = {"data": data, "normal": normal, "method": name, "seed": seed}
                    limit = {} if name in BASELINES else {"most_seconds": arguments.seconds}
                    if table.needs(key | limit):
                        table.put(key | limit | _image_row(data, normal, name, seed, arguments))
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
    start = time.process_time()
    scores = _fit_vectors(name, x[train], seed)(x[test])
    spent = time.process_time() - start
    sizes = {"train_rows": len(train), "test_rows": len(test)}
    return {**ranking_metrics(scores, y[test]), **sizes, "seconds": spent}


def _fit_vectors(name: str, train: Rows, seed: int) -> Scorer:
    if name in METHODS:
        return METHODS[name](train)
    from .adbench_detectors import parse_detector
    from .adbench_row import detector

    fit, _ = detector(**parse_detector(name), seed=seed)
    return fit(train)


def _image_row(data: str, normal: str, name: str, seed: int, arguments: Any) -> dict[str, Any]:
    from aezoo.tasks.detect import detect
    from aezoo.tasks.detect_labels import Protocol, ranking_metrics
    from aezoo.tasks.detectors import Baseline
    from aezoo.tasks.samples import SampleSet

    from .quality_row import open_data

    options = {"name": data, "root": arguments.root}
    part = open_data(options | {"train_classes": [normal]}, seed)
    train, test = SampleSet.from_data(part, "train"), SampleSet.from_data(open_data(options, seed), "test")
    sizes = {"train_rows": len(train), "test_rows": len(test)}
    start = time.process_time()
    if name in BASELINES:
        baseline = Baseline(name, seed=seed).fit(train)
        columns = {"seconds": time.process_time() - start}
        anomalies = Protocol(normal, None).anomalies(test)
        return {**ranking_metrics(baseline.decision_function(test), anomalies), **sizes, **columns}
    model, columns = _trained(name, part, seed, arguments.seconds)
    found = detect(model, test, normal=normal, baselines=False, n_shown=0, fit_on=train).rows[0]
    return {"auroc": found["auroc"], "aupr": found["aupr"], **sizes, **columns}


def _trained(name: str, data: "DataModule", seed: int, limit: float) -> "tuple[Autoencoder, dict[str, Any]]":
    """A trained model, and the columns that say how its training ended."""
    import lightning.pytorch as pl

    import aezoo

    from .convergence import Budget
    from .quality_row import quiet_trainer, train_to_convergence

    pl.seed_everything(seed, workers=True, verbose=False)
    model: Any = aezoo.create_model(name, data.input_shape)
    model.compile_mode = "off"
    start, spec = time.process_time(), {"accelerator": "cpu"}
    if getattr(model, "one_epoch", False):
        quiet_trainer(spec, max_epochs=1).fit(model, data)
        return model.eval(), {"stopped": "one epoch", "seconds": time.process_time() - start}
    rule, _ = train_to_convergence(spec, model, data, Budget(patience=PATIENCE, least=LEAST, seconds=limit))
    return model.eval(), {name: rule.columns[name] for name in ("stopped", "steps", "seconds")}


if __name__ == "__main__":
    run_script(main)
