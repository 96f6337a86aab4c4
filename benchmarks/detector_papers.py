"""Detectors in the settings of their papers, on sets that these papers use, beside the published figures.

    python -m benchmarks.detector_papers --adbench DIR                    the tables
    python -m benchmarks.detector_papers --root DIR                       one digit of MNIST against the rest
    python -m benchmarks.detector_papers --adbench DIR --root DIR --only deep_svdd --classes 0 1

Each row is one training. The figure is the area under the ROC curve on held-out samples; `predictions` is that of the
two-valued predictions "score above 0", which AE-1SVM's authors publish as AUROC. Nothing is chosen on the test
samples: settings are those of the paper or its code as far as they are known.

- ae1svm: half of the samples, anomalies included, for training and half for the test, scaled to [0, 1]; layers,
  batches, epochs, nu, alpha, sigma and frequencies of the authors' notebooks (https://github.com/minh-nghia/AE-1SVM).
  There, the hinge term is doubled, so nu is half of theirs here, and alpha weighs the mean squared error. `shuttle` is
  their set. Their ForestCover has 54 columns, of which ADBench's `cover` keeps the 10 numeric ones, so the layers are
  smaller. Their log of ForestCover has an AUROC of 0.44, 0.38, 0.46, 0.39 and 0.95 after epochs 1 to 5.
- deep_svdd: trained on one digit, scaled by its L1 contrast and to [0, 1] (section 4.2): first as an autoencoder, then
  the encoder by the one-class objective around the mean of all codes; network, epochs, learning rates and weight decay
  of the authors' code (https://github.com/lukasruff/Deep-SVDD-PyTorch). The weight decay of the autoencoder is half of
  theirs, since the loss here has half of the summed squares. The published figures are of their earlier code
  (https://github.com/lukasruff/Deep-SVDD), where the first layer's filters start as atoms of a dictionary of patches.
- memory_ae: trained on one digit, in [0, 1]; the score is the error of the reconstruction. The encoder has one code for
  each image. The convolutional network is the zoo's with 16 and 32 channels.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aezoo.errors import AezooError

from . import adbench_data
from .common import ResultsCSV, at_least, build_parser, command_line, environment, run_script

if TYPE_CHECKING:
    from torch import Tensor

KEY = ("model", "data", "normal", "seed")
_DIGITS = tuple(str(i) for i in range(10))
# images that are scored at a time
_CHUNK = 500


class Phase(NamedTuple):
    """A part of a training.

    Attributes:
        epochs: its length.
        lr: learning rate of Adam.
        term: what is minimised, a term of the model's loss; svdd trains only the encoder.
        decay_at: share of the epochs after which the learning rate is divided by 10.
        weight_decay: of Adam, added to the gradient.
    """

    epochs: int
    lr: float
    term: str = "loss"
    decay_at: float = 1.0
    weight_decay: float = 0.0


class Paper(NamedTuple):
    """A published figure and the setting in which it is measured here.

    Attributes:
        model: a name of the registry.
        data: `adbench:NAME` or `mnist`.
        published: AUROC of each normal class, "" for a table; "mean" if only the mean over classes is known.
        source: where the figures were read.
        hyperparameters: of the model; `svm_weight` is replaced by that of `alpha`.
        phases: of the training.
        batch: samples of an optimiser step.
        contrast: whether images are divided by their mean absolute contrast.
        by_error: whether the score is the squared error of the reconstruction, not the model's own.
        alpha: weight of the mean squared error in AE-1SVM; None for other models.
        init_rows: training samples that set the centre or the plane before the last phase; 0 for models without one.
        lenet: whether encoder and decoder are replaced by those of `detector_networks.lenet_autoencoder`.
    """

    model: str
    data: str
    published: dict[str, float]
    source: str
    hyperparameters: dict[str, Any]
    phases: tuple[Phase, ...]
    batch: int
    contrast: bool = False
    by_error: bool = False
    alpha: float | None = None
    init_rows: int = 0
    lenet: bool = False

    @property
    def set_name(self) -> str:
        """The name of the data without the kind before it."""
        return self.data.rpartition(":")[2]


_NOTEBOOKS = "the authors' notebooks, AUROC of predictions"
_SIGMOID = {"activation": "sigmoid", "bandwidth": 3.0, "likelihood": "gaussian"}
PAPERS = (
    Paper(
        "ae1svm",
        "adbench:shuttle",
        {"": 0.9748},
        _NOTEBOOKS,
        {**_SIGMOID, "hidden_dims": (6,), "latent_dim": 2, "nu": 0.2, "n_frequencies": 50},
        (Phase(11, 1e-3),),
        batch=16,
        alpha=1e3,
        init_rows=2000,
    ),
    Paper(
        "ae1svm",
        "adbench:cover",
        {"": 0.9486},
        _NOTEBOOKS,
        {**_SIGMOID, "hidden_dims": (8,), "latent_dim": 4, "nu": 0.15, "n_frequencies": 200},
        (Phase(5, 1e-2),),
        batch=1024,
        alpha=1e3,
        init_rows=2000,
    ),
    Paper(
        "deep_svdd",
        "mnist",
        dict(zip(_DIGITS, (0.980, 0.997, 0.917, 0.919, 0.949, 0.885, 0.983, 0.946, 0.939, 0.965), strict=True)),
        "Ruff et al. 2018, table 1, one-class",
        {"net": "conv", "latent_dim": 32},
        (Phase(150, 1e-4, "nll", 1 / 3, weight_decay=2.5e-4), Phase(150, 1e-4, "svdd", 1 / 3, weight_decay=5e-7)),
        batch=200,
        contrast=True,
        init_rows=60_000,
        lenet=True,
    ),
    Paper(
        "memory_ae",
        "mnist",
        {"mean": 0.9751},
        "Gong et al. 2019, table 1, mean over digits",
        {"net": "conv", "hidden_dims": (16, 32), "latent_dim": 16, "n_items": 100},
        (Phase(40, 1e-3),),
        batch=200,
        by_error=True,
    ),
)


class Samples(NamedTuple):
    """Training samples, test samples, and which of the test samples are anomalies."""

    train: "Tensor"
    test: "Tensor"
    anomalous: npt.NDArray[np.bool_]


def halves(path: Path, seed: int) -> Samples:
    """Half of the normal samples and half of the anomalies for training, the rest for the test, scaled to [0, 1]."""
    import torch

    x, y = adbench_data.read_set(path)
    low, high = x.min(0), x.max(0)
    x = (x - low) / np.where(high > low, high - low, 1)
    generator, is_train = np.random.default_rng(seed), np.zeros(len(y), bool)
    for value in (0, 1):
        index = generator.permutation(np.flatnonzero(y == value))
        is_train[index[: len(index) // 2]] = True
    train, test = (torch.from_numpy(part.astype(np.float32)) for part in (x[is_train], x[~is_train]))
    return Samples(train, test, y[~is_train] > 0)


def one_digit(root: str, digit: str, contrast: bool) -> Samples:
    """Training samples of one digit, and all test samples of MNIST, whose other digits are anomalies."""
    from torchvision.datasets import MNIST

    try:
        parts = [MNIST(root, train=train) for train in (True, False)]
    except RuntimeError as error:
        raise AezooError(f"MNIST is not in {root}: give the folder that contains MNIST/raw with --root") from error
    train, test = (part.data.float()[:, None] / 255 for part in parts)
    train = train[parts[0].targets == int(digit)]
    if contrast:
        train, test = (local_contrast(x) for x in (train, test))
        low, high = train.min(), train.max()
        train, test = ((x - low) / (high - low) for x in (train, test))
    return Samples(train, test, (parts[1].targets != int(digit)).numpy())


def local_contrast(x: "Tensor") -> "Tensor":
    """Each image minus its mean, divided by its mean absolute value (contrast normalisation with the L1 norm)."""
    dims = tuple(range(1, x.ndim))
    x = x - x.mean(dims, keepdim=True)
    return x / x.abs().mean(dims, keepdim=True).clamp(min=1e-8)


def measure(paper: Paper, samples: Samples, seed: int, epochs: int | None = None) -> dict[str, Any]:
    """Train a model and rank the test samples.

    Args:
        paper: the setting.
        samples: scaled samples.
        seed: of weights and batches.
        epochs: of each phase, instead of the paper's.
    """
    import torch

    import aezoo
    from aezoo.tasks.detect_labels import ranking_metrics

    from .detector_networks import lenet_autoencoder

    torch.manual_seed(seed)
    x, settings = samples.train, dict(paper.hyperparameters)
    if paper.alpha is not None:
        # the zoo's loss has half of the summed squares where theirs has alpha times their mean
        settings["svm_weight"] = x[0].numel() / 2 / paper.alpha
    model: Any = aezoo.create_model(paper.model, tuple(x.shape[1:]), **settings)
    if paper.lenet:
        model.encoder, model.decoder = lenet_autoencoder()
        model.to(memory_format=torch.channels_last)  # a third less time on a CPU
    start = time.perf_counter()
    for i, phase in enumerate(paper.phases):
        if paper.init_rows and i == len(paper.phases) - 1:
            model.eval()
            with torch.no_grad():
                model.init_from_data(x[torch.randperm(len(x))[: paper.init_rows]])
        train(model, x, phase._replace(epochs=epochs or phase.epochs), paper.batch)
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        scores = torch.cat([score(model, part, paper.by_error) for part in samples.test.split(_CHUNK)]).double().numpy()
    row = ranking_metrics(scores, samples.anomalous)
    if paper.alpha is not None:
        row["predictions"] = ranking_metrics((scores > 0).astype(np.float64), samples.anomalous)["auroc"]
    sizes = {
        "train_rows": len(x),
        "test_rows": len(scores),
        "epochs": sum(epochs or part.epochs for part in paper.phases),
    }
    return {**row, **sizes, "seconds": seconds}


def train(model: Any, x: "Tensor", phase: Phase, batch: int) -> None:
    """Minimise one term of the loss with Adam."""
    import torch

    is_svdd = phase.term == "svdd"
    part = model.encoder if is_svdd else model
    optimizer = torch.optim.Adam(part.parameters(), phase.lr, weight_decay=phase.weight_decay)
    model.train()
    for epoch in range(phase.epochs):
        if epoch and epoch == round(phase.decay_at * phase.epochs):
            optimizer.param_groups[0]["lr"] /= 10
        for index in torch.randperm(len(x)).split(batch):
            if len(index) == batch or len(x) < batch:
                optimizer.zero_grad()
                chosen = x[index]
                # the loss would also decode, which takes longer
                term = model.distances(model.encode(chosen)).mean() if is_svdd else model.loss(chosen)[phase.term]
                term.backward()
                optimizer.step()


def score(model: Any, x: "Tensor", by_error: bool) -> "Tensor":
    """The score of each sample, (B, *shape) -> (B,)."""
    found: Tensor = (model(x) - x).square().flatten(1).sum(1) if by_error else model.score(x)
    return found


def settings_of(arguments: Any, tables: Mapping[str, Path]) -> list[tuple[Paper, str]]:
    """Each paper whose data are at hand, with each normal class; "" for a table."""
    found: list[tuple[Paper, str]] = []
    for paper in PAPERS:
        if paper.model not in arguments.only:
            continue
        if paper.data == "mnist":  # ADBench also has a set of that name
            found += [(paper, digit) for digit in arguments.classes if arguments.root is not None]
        elif paper.set_name in tables:
            found.append((paper, ""))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the missing rows, and write the CSV."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser("detector_papers", __doc__)
    add, models = parser.add_argument, sorted({paper.model for paper in PAPERS})
    add("--adbench", type=Path, metavar="DIR", help="folder with ADBench's .npz files")
    add("--root", metavar="DIR", help="folder that contains MNIST/raw")
    add("--only", nargs="+", choices=models, default=models, metavar="NAME", help=f"models, of {', '.join(models)}")
    add("--classes", nargs="+", choices=_DIGITS, default=_DIGITS, metavar="N", help="digits (default: all)")
    add("--seeds", type=at_least(1), default=1, metavar="N", help="seeds 0 to N - 1 (default 1)")
    add("--epochs", type=at_least(1), metavar="N", help="epochs of each phase, instead of the papers'")
    arguments = parser.parse_args(argv)
    tables = {} if arguments.adbench is None else adbench_data.sets_in(arguments.adbench)
    found = settings_of(arguments, tables)
    if not found:
        parser.error("give --adbench DIR, --root DIR or both, with the data of one of the models")
    command = command_line("detector_papers", argv, folders=("--adbench", "--root"))
    where = environment(arguments, accelerator="cpu")
    table = ResultsCSV(arguments.results / f"detector-papers-{where}.csv", KEY, command, arguments.again)
    for seed in range(arguments.seeds):
        for paper, normal in found:
            key = {"model": paper.model, "data": paper.set_name, "normal": normal, "seed": seed}
            if table.needs(key):
                if paper.data == "mnist":
                    samples = one_digit(arguments.root, normal, paper.contrast)
                else:
                    samples = halves(tables[paper.set_name], seed)
                published = {"published": paper.published.get(normal), "source": paper.source}
                table.put(key | published | measure(paper, samples, seed, arguments.epochs))
                print(table.find(key), flush=True)
    print(table.path)


if __name__ == "__main__":
    run_script(main)
