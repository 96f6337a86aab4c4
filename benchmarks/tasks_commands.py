"""The results of each command for a trained model, as rows of `benchmarks.tasks`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import aezoo
from aezoo.corruptions import corruption
from aezoo.distributions.likelihoods import Bernoulli
from aezoo.errors import AezooError
from aezoo.metrics import Evaluation
from aezoo.tasks import fidelity, fidelity_features, priors
from aezoo.tasks.compress import compress
from aezoo.tasks.denoise import denoise, noisy_rows
from aezoo.tasks.embed import embed
from aezoo.tasks.embed_codes import Array, probe_accuracies, umap
from aezoo.tasks.generate import generate
from aezoo.tasks.reconstruct import reconstruct
from aezoo.tasks.samples import SampleSet

Row = dict[str, Any]

OURS, BASELINE, REFERENCE = "ours", "baseline", "reference"
# on smaller images bm3d 4 ends the process
_LEAST_SIDE_OF_BM3D = 16
# samples of each split; exact t-SNE is quadratic
_MOST_NEIGHBOURS = 2000


@dataclass
class CommandInputs:
    """The inputs for a command's rows.

    Attributes:
        spec: see `tasks_row.measure`.
        model: the trained model.
        train: at most `fit_rows` training samples.
        test: at most `test_rows` test samples.
        baselines: requested baselines, as parts of the command (column `task`); "" stands for the whole command.
        out: folder for the command's pictures, or None.
    """

    spec: Row
    model: aezoo.Autoencoder
    train: SampleSet
    test: SampleSet
    baselines: list[str]
    out: str | None

    @property
    def name(self) -> str:
        """The model's name in the tables."""
        return str(self.spec["model"])

    @property
    def seed(self) -> int:
        """The seed of training and of the commands' random draws."""
        return int(self.spec["seed"])

    @property
    def size(self) -> int:
        """The number of values in a code."""
        return math.prod(self.model.code_shape)


def _reconstruct(work: CommandInputs) -> list[Row]:
    found = reconstruct(work.model, work.test, out=work.out, seed=work.seed)
    outputs = {(work.name, OURS): torch.from_numpy(np.array(found.x_hat))}
    if work.baselines:
        from sklearn.decomposition import PCA

        fit, flat = (_all_samples(part).flatten(1).numpy() for part in (work.train, work.test))
        pca = PCA(min(work.size, *fit.shape), random_state=0).fit(fit)
        outputs[f"PCA, {work.size} numbers", BASELINE] = torch.from_numpy(pca.inverse_transform(pca.transform(flat)))
        outputs["mean sample", BASELINE] = torch.from_numpy(fit.mean(0)).expand(len(flat), -1)
    x = _all_samples(work.test)
    rows = []
    for (method, kind), x_hat in outputs.items():
        evaluation = Evaluation(work.test.shape, torch.device("cpu"))
        evaluation.add({}, x, x_hat.reshape(x.shape))
        rows.append({"method": method, "kind": kind} | {k: float(v) for k, v in evaluation.compute().items()})
    return rows


def _generate(work: CommandInputs) -> list[Row]:
    quality, n = _SampleQuality(work), len(work.test)
    rows: list[Row] = []
    for name in ("own", "gmm") if work.model.has_prior else priors.NAMES:
        found = generate(work.model, prior=name, n=n, fit_on=work.train, seed=work.seed)
        prior_text = "own prior" if name == "own" else f"prior {name}"
        rows.append({"method": f"{work.name}, {prior_text}", "kind": OURS} | quality(torch.from_numpy(found.samples)))
    if work.out is not None:
        generate(work.model, n=64, fit_on=work.train, out=work.out, seed=work.seed)
    if work.baselines:
        flat = _all_samples(work.train).flatten(1).numpy()
        drawn = {("real samples, held out", REFERENCE): _all_samples(work.test)}
        drawn["training samples, copied", REFERENCE] = _all_samples(work.train.subsample(n, work.seed + 1))
        for name, method in (("gmm", "Gaussian mixture of PCA's codes"), ("knn", "between neighbours, in pixels")):
            x = priors.fit(name, flat, seed=work.seed).sample(n, work.seed).clip(0, 1)
            drawn[method, BASELINE] = torch.from_numpy(x).reshape(-1, *work.test.shape)
        rows += [{"method": method, "kind": kind} | quality(x) for (method, kind), x in drawn.items()]
    return rows


class _SampleQuality:
    """The figures of `generate --quality`; the feature network is trained once, from seed 0, for all samples."""

    def __init__(self, work: CommandInputs) -> None:
        self.train = work.train
        self.features = fidelity_features.choose_features(work.train, torch.device("cpu"), 0, False)
        self.real = self.features.all(work.train, 256)
        self.held = fidelity.nearest_samples(_all_samples(work.test), work.train).distances

    def __call__(self, fake: torch.Tensor) -> Row:
        with torch.no_grad():
            drawn = torch.cat([self.features.extract(part) for part in fake.split(256)])
        nearest = fidelity.nearest_samples(fake, self.train)
        row = fidelity.fidelity_metrics(self.real, drawn, nearest)
        return row | {
            "closer": fidelity.closer_probability(nearest.distances, self.held),
            "features": self.features.name,
        }


def _denoise(work: CommandInputs) -> list[Row]:
    noise = work.spec["corrupt"]
    found = denoise(
        work.model, work.test, corrupt=noise, baselines=bool(work.baselines) or work.out is not None,
        n_compared=work.spec["test_rows"], out=work.out, seed=work.seed,
    )  # fmt: skip
    ours, *others = found.rows
    rows = [ours | {"method": work.name, "kind": OURS}]
    if work.baselines:
        rows += [row | {"kind": BASELINE, "error": row["setting"] if row["mse"] is None else ""} for row in others]
        rows.append({"method": "BM3D", "kind": BASELINE} | _bm3d(work, noise))
    names = {"identity": "the noisy samples"}
    return [row | {"method": names.get(row["method"], row["method"]), "corrupt": noise} for row in rows]


def _bm3d(work: CommandInputs, noise: str) -> Row:
    """Errors of BM3D (Dabov et al. 2007, https://doi.org/10.1109/TIP.2007.901238), which is told the noise's sigma."""
    height, width = work.test.shape[-2:]
    if len(work.test.shape) != 3 or min(height, width) < _LEAST_SIDE_OF_BM3D:
        return {"error": f"needs images with sides of at least {_LEAST_SIDE_OF_BM3D} pixels"}
    try:
        from bm3d import bm3d
    except ImportError:
        return {"error": "needs bm3d (not for commercial use): pip install bm3d"}
    clean = _all_samples(work.test)
    noisy = noisy_rows(work.test, torch.arange(len(clean)), corruption(noise), work.seed)
    sigma = float((noisy - clean).square().mean().sqrt())
    evaluation = Evaluation(work.test.shape, torch.device("cpu"))
    for x, x_noisy in zip(clean, noisy, strict=True):
        planes = [bm3d(plane, sigma) for plane in x_noisy.double().numpy()]
        evaluation.add({}, x[None], torch.from_numpy(np.stack(planes)).float()[None])
    return {name: float(value) for name, value in evaluation.compute().items()} | {"setting": f"sigma {sigma:.3g}"}


def _embed(work: CommandInputs) -> list[Row]:
    method = "tsne" if work.out else "pca"
    found = embed(work.model, work.test, fit_on=work.train, method=method, out=work.out, seed=work.seed)
    names = {"codes": work.name, "raw values": "raw values", "pca": f"PCA, {work.size} numbers"}
    neighbours = _neighbour_embeddings(work) if work.baselines else []
    return neighbours + [
        {"method": names[row["features"]], "kind": OURS if row["features"] == "codes" else BASELINE}
        | {key: value for key, value in row.items() if key != "features"}
        for row in found.accuracies
        if work.baselines or row["features"] == "codes"
    ]


def _neighbour_embeddings(work: CommandInputs) -> list[Row]:
    """Classifiers on UMAP and t-SNE of as many numbers as a code, of at most 2,000 training samples.

    t-SNE cannot map further samples, so that it is fitted to training and test samples together, without labels.
    """
    train, test = work.train.subsample(_MOST_NEIGHBOURS), work.test.subsample(_MOST_NEIGHBOURS)
    if train.labels is None or test.labels is None:
        return []
    flat, labels = [_all_samples(part).flatten(1).numpy() for part in (train, test)], (train.labels, test.labels)
    rows = []
    for name, project in ((f"UMAP, {work.size} numbers", _umap), (f"t-SNE, {work.size} numbers, transductive", _tsne)):
        row: Row = {"method": name, "kind": BASELINE, "size": work.size}
        try:
            codes = project(flat[0], flat[1], work.size, work.seed)
            row |= probe_accuracies(codes[0], labels[0].numpy(), codes[1], labels[1].numpy())
        except AezooError as error:
            row["error"] = str(error)
        rows.append(row)
    return rows


def _umap(train: Array, test: Array, size: int, seed: int) -> tuple[Array, Array]:
    model = umap()(n_components=size, random_state=seed, n_jobs=1).fit(train)
    return model.embedding_, model.transform(test)


def _tsne(train: Array, test: Array, size: int, seed: int) -> tuple[Array, Array]:
    from sklearn.manifold import TSNE

    # the fast method has at most three dimensions
    method = "barnes_hut" if size <= 3 else "exact"
    both = TSNE(size, method=method, init="random", random_state=seed).fit_transform(np.concatenate([train, test]))
    return both[: len(train)], both[len(train) :]


def compress_tasks(model: aezoo.Autoencoder, lossy: bool) -> list[str]:
    """The modes of compress for a model: lossy if requested, and lossless if the model supports it."""
    tasks = ["lossy"] if lossy else []
    if model.has_prior and hasattr(model, "posterior") and model.likelihood.discrete:
        tasks.append(f"lossless, {'binarised' if isinstance(model.likelihood, Bernoulli) else 'bytes'}")
    return tasks


def _compress(work: CommandInputs) -> list[Row]:
    """Lossy compression, and lossless if the model supports it."""
    rows = []
    for task in compress_tasks(work.model, not work.spec["lossless_only"]):
        with_baselines = task in work.baselines
        if task == "lossy":
            lossy = compress(
                work.model, work.test, mode="lossy", quality=tuple(work.spec["qualities"]),
                compare=with_baselines or work.out is not None, fit_on=work.train, out=work.out, seed=work.seed,
            )  # fmt: skip
            for row in lossy.rows:
                ours = row["method"].startswith("aezoo")
                # a lossless method has no place on a rate-distortion curve
                if ours or (with_baselines and "(lossless)" not in row["method"]):
                    method = work.name.partition(":")[0] if ours else row["method"]
                    rows.append({"task": task} | row | {"method": method, "kind": OURS if ours else BASELINE})
            continue
        try:
            binary = task.endswith("binarised")
            lossless = compress(
                work.model, work.test, mode="lossless", binarise=binary, compare=with_baselines, seed=work.seed
            )
            rows += [{"task": task} | row | _method_and_kind(row["method"], work.name) for row in lossless.rows]
        except AezooError as error:  # such as values that are not whole numbers from 0 to 255, as in digits
            rows.append({"task": task, "method": work.name, "kind": OURS, "error": str(error)})
    return [{key: value for key, value in row.items() if value == value} for row in rows]  # without NaN


def _method_and_kind(method: str, model: str) -> Row:
    """Method and kind of a row of the command's lossless table."""
    match method:
        case "-ELBO, the bound":
            return {"method": f"{model}, -ELBO", "kind": REFERENCE}
        case "aezoo, net":
            return {"method": f"{model}, without initial bits", "kind": REFERENCE}
        case "aezoo, the file with initial bits":
            return {"method": model, "kind": OURS}
    return {"method": method.removesuffix(" (lossless)"), "kind": BASELINE}


COMMANDS: dict[str, Callable[[CommandInputs], list[Row]]] = {
    "reconstruct": _reconstruct,
    "generate": _generate,
    "denoise": _denoise,
    "embed": _embed,
    "compress": _compress,
}


def _all_samples(samples: SampleSet) -> torch.Tensor:
    return torch.cat([*samples.batches(1024)])
