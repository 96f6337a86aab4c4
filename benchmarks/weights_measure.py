"""Figures of pretrained weights on the test split, and what `generate` and `detect` need of the training data."""

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

import aezoo
from aezoo.corruptions import corruption
from aezoo.data.source import ArrayDataset, Stage
from aezoo.metrics.similarity import psnr
from aezoo.tasks.denoise import denoise
from aezoo.tasks.detect_labels import Protocol
from aezoo.tasks.detect_scores import Scores
from aezoo.tasks.detectors import Detector
from aezoo.tasks.embed_codes import encode_samples, probe_accuracies
from aezoo.tasks.fidelity import fid
from aezoo.tasks.fidelity_features import Features, choose_features
from aezoo.tasks.generate import generate
from aezoo.tasks.samples import SampleSet, evaluation_mode
from aezoo.training.data_statistics import DataStatistics
from aezoo.training.tags import Figure

from .quality_row import quiet_trainer

# test samples whose log-likelihood is measured, and draws of the code for each
_MAX_LIKELIHOOD, _DRAWS = 1_000, 100
# samples of each kind that FID and AUROC compare
_MAX_COMPARED = 2_000
_MAX_PROBE_TRAIN, _MAX_PROBE_DIM = 5_000, 256
# scores kept for detect; codes and numbers in them kept for generate, at least so many codes
_SCORES, _CODES, _MAX_CODE_VALUES, _MIN_CODES = 1_000, 2_000, 100_000, 500
_KEPT_SCORES = ("deviance", "nll", "mse")
_COLUMNS = 16


def statistics(model: aezoo.Autoencoder, data: aezoo.DataModule) -> DataStatistics:
    """Codes of training samples, for a model without a prior, and scores of validation samples."""
    held_out = SampleSet.from_data(data, "val").subsample(_SCORES, 0)
    scores = {name: torch.from_numpy(score(model, name, held_out)).float() for name in _KEPT_SCORES}
    size = math.prod(model.code_shape)
    n = min(_CODES, _MAX_CODE_VALUES // size)
    codes = None
    if not model.has_prior and n >= _MIN_CODES:
        with evaluation_mode(model):
            found = encode_samples(model, SampleSet.from_data(data, "train"), n, 256, 0, False)[0]
        codes = torch.from_numpy(found)
    return DataStatistics(codes, scores)


def score(model: aezoo.Autoencoder, name: str, samples: SampleSet) -> Scores:
    """Anomaly scores as `detect` computes them."""
    return Detector(model, name).fit(samples.subsample(2, 0)).decision_function(samples)


def reconstruction(model: aezoo.Autoencoder, data: aezoo.DataModule) -> dict[str, float]:
    """Test figures of the loss and of reconstructions."""
    model.importance_samples = 1
    pl.seed_everything(0, workers=True, verbose=False)
    found = quiet_trainer({"accelerator": "cpu"}).test(model, data, verbose=False)[0]
    return {name.removeprefix("test/"): float(value) for name, value in found.items()}


def figures(
    model: aezoo.Autoencoder,
    data: aezoo.DataModule,
    other: aezoo.DataModule,
    features: Path,
    corrupt: str | None = None,
    normal: str | None = None,
) -> list[Figure]:
    """All figures that apply to a model.

    Args:
        model: the weights.
        data: the data that they were trained on.
        other: other data of the same shape, whose samples are anomalies.
        features: file that keeps the classifier for FID, the same for all weights of a data set.
        corrupt: noise to remove.
        normal: the class that it was trained on, the others are anomalies.
    """
    test = SampleSet.from_data(data, "test")
    found = reconstruction(model, data)
    given = [Figure(name, found[name]) for name in ("psnr", "ssim", "mse", "bpp", "l0", "loss") if name in found]
    if "elbo" in found:
        given.append(Figure("ELBO", found["elbo"], note="nats"))
    log_likelihood: Any = getattr(model, "log_likelihood", None)
    if log_likelihood is not None:
        part = test.subsample(_MAX_LIKELIHOOD, 0)
        with evaluation_mode(model):
            values = torch.cat([log_likelihood(x, _DRAWS) for x in part.batches(50)])
        value, note = float(values.mean()), f"nats, {len(values):,} samples, {_DRAWS} draws"
        given.insert(0, Figure("log p(x)", value, note=note))
        if data.binarise != "none":
            bits = -value / math.log(2) / math.prod(model.input_shape)
            given.append(Figure("bits/dim", bits, note="-log p(x), what lossless compression approaches"))
    if model.has_prior or (model.data_statistics is not None and model.data_statistics.codes is not None):
        given.append(_fid(model, data, features))
    if corrupt is not None:
        row = denoise(model, test.subsample(_MAX_COMPARED, 0), corrupt=corrupt, baselines=False, n_shown=0).rows
        given[:0] = [
            Figure("denoised psnr", psnr(row[0]["mse"]), note=f"dB, {corrupt}, {_MAX_COMPARED:,} samples"),
            Figure("noisy psnr", psnr(row[1]["mse"]), note=f"dB, {corrupt}"),
        ]
    given += _auroc(model, data, other, normal)
    given += _accuracies(model, data)
    return given


def _fid(model: aezoo.Autoencoder, data: aezoo.DataModule, file: Path) -> Figure:
    train = SampleSet.from_data(data, "train")
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(choose_features(train, torch.device("cpu"), 0, False)))
    space: Features = pickle.loads(file.read_bytes())
    drawn = torch.from_numpy(np.array(generate(model, n=_MAX_COMPARED).samples))
    fake = space.all(SampleSet(ArrayDataset(drawn)), 256)
    value = fid(space.all(train.subsample(_MAX_COMPARED, 0), 256), fake)
    return Figure("FID", value, note=f"{_MAX_COMPARED:,} samples, features of {space.name}")


def _auroc(
    model: aezoo.Autoencoder, data: aezoo.DataModule, other: aezoo.DataModule, normal: str | None
) -> list[Figure]:
    test = SampleSet.from_data(data, "test")
    if normal is not None:
        anomalous = Protocol(normal, None).anomalies(test)
        value = float(roc_auc_score(anomalous, score(model, "deviance", test)))
        return [Figure("AUROC", value, note=f"class {normal} against all others, deviance")]
    parts = [SampleSet.from_data(each, "test").subsample(_MAX_COMPARED, 0) for each in (data, other)]
    scores = [score(model, "deviance", part) for part in parts]
    labels = np.repeat([0, 1], [len(each) for each in scores])
    value = float(roc_auc_score(labels, np.concatenate(scores)))
    return [Figure("AUROC", value, note=f"{data.name} against {other.name}, deviance")]


def _accuracies(model: aezoo.Autoencoder, data: aezoo.DataModule) -> list[Figure]:
    if math.prod(model.code_shape) > _MAX_PROBE_DIM or data.train_classes:
        return []
    stages: tuple[Stage, ...] = ("train", "test")
    parts = [SampleSet.from_data(data, stage).subsample(_MAX_PROBE_TRAIN, 0) for stage in stages]
    with evaluation_mode(model):
        codes = [encode_samples(model, part, None, 256, 0, False)[0] for part in parts]
    labels = [np.asarray(part.y) for part in parts]
    accuracies = probe_accuracies(codes[0], labels[0], codes[1], labels[1])
    note = f"of codes, {len(labels[0]):,} training and {len(labels[1]):,} test samples"
    return [
        Figure("linear probe accuracy", accuracies["probe"], note=note),
        Figure("kNN accuracy", accuracies["knn"], note=note),
    ]


def picture(model: aezoo.Autoencoder, data: aezoo.DataModule, path: Path, corrupt: str | None) -> list[str]:
    """Write test samples, their reconstructions and generated samples, and return the meaning of the rows."""
    x, _ = data.tensors("test", range(_COLUMNS))
    rows, words = [x], ["test samples"]
    with evaluation_mode(model):
        if corrupt is not None:
            noise = corruption(corrupt)
            x = x if noise is None else noise(x)
            rows.append(x.clamp(0, 1))
            words.append(f"with noise ({corrupt})")
        rows.append(model(x))
        words.append("their reconstructions")
    if model.has_prior or (model.data_statistics is not None and model.data_statistics.codes is not None):
        drawn = torch.from_numpy(np.array(generate(model, n=2 * _COLUMNS).samples))
        rows += drawn.split(_COLUMNS)
        words.append("generated samples (2 rows)")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_mosaic(rows), "L").save(path, optimize=True)
    return words


def _mosaic(rows: Sequence[Tensor]) -> Any:
    tiles = torch.cat([torch.cat([tile[0] for tile in row.clamp(0, 1)], dim=1) for row in rows])
    return (255 * tiles).round().byte().numpy()
