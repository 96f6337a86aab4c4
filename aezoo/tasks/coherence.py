"""Coherence of generated parts: whether they have the same class, by classifiers that are trained on real parts."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.bases.multimodal import Multimodal
from aezoo.data.classes import UNLABELLED
from aezoo.metrics.coherence import CrossCoherence, JointCoherence
from aezoo.tasks.embed_codes import choose_rows, fit_probe
from aezoo.tasks.result_store import Row
from aezoo.tasks.samples import SampleSet

Array = npt.NDArray[Any]

_FOLDS = 5
# most samples that classifiers learn from, and number of samples drawn from the prior
_MAX_SAMPLES, _MAX_DRAWN = 2000, 1000


def coherence(model: Multimodal, samples: SampleSet, x_hat: Array, seed: int, batch_size: int) -> list[Row]:
    """One row for each part, and one for samples from the prior; no rows if there are too few labels.

    A classifier is a logistic regression on the raw values of a part. It is trained on the real parts of four fifths of
    the samples and evaluated on the others. A row has its accuracy on the parts that the model generates, its accuracy
    on real parts, which a perfect model would reach, and the share of the most common class.

    Args:
        model: in evaluation mode.
        samples: with labels.
        x_hat: the reconstructions, (N, *input_shape).
        seed: seed of the choice of at most 2000 samples, and of their split.
        batch_size: samples drawn at a time.
    """
    y = np.asarray(samples.y)
    known = np.flatnonzero(y != UNLABELLED)
    rows = known[choose_rows(len(known), _MAX_SAMPLES, seed)]
    x = samples.rows(torch.from_numpy(rows))
    whole = ~x.isnan().flatten(1).any(1)  # classifiers do not accept NaN
    x, rows = x[whole], rows[whole.numpy()]
    y, generated = y[rows], torch.from_numpy(np.asarray(x_hat[rows]))
    k = int(y.max(initial=0)) + 1
    folds = np.random.default_rng(seed).permutation(len(y)) % _FOLDS
    if len(y) < _FOLDS or any(len(np.unique(y[folds != fold])) < 2 for fold in range(_FOLDS)):
        return []
    cross_coherence, real_accuracy, joint_coherence = (
        CrossCoherence(len(model.sizes)),
        CrossCoherence(len(model.sizes)),
        JointCoherence(),
    )
    for fold in range(_FOLDS):
        generated_samples = torch.from_numpy(folds == fold)
        probes = [fit_probe(_flat(part), y[~generated_samples.numpy()]) for part in model.split(x[~generated_samples])]
        given = torch.from_numpy(y[generated_samples.numpy()])
        cross_coherence.update(_logits(probes, model, generated[generated_samples], k), given)
        real_accuracy.update(_logits(probes, model, x[generated_samples], k), given)
        joint_coherence.update(_logits(probes, model, x[generated_samples], k))
    common = float(np.bincount(y).max() / len(y))
    found: list[Row] = [
        {"part": str(i), "coherence": float(a), "of real parts": float(b), "most common class": common}
        for i, (a, b) in enumerate(
            zip(*(m.compute().reshape(-1) for m in (cross_coherence, real_accuracy)), strict=True)
        )
    ]
    if model.has_prior:
        probes, joint = [fit_probe(_flat(part), y) for part in model.split(x)], JointCoherence()
        for start in range(0, _MAX_DRAWN, batch_size):
            drawn = model.sample(min(batch_size, _MAX_DRAWN - start)).float().cpu()
            joint.update(_logits(probes, model, drawn, k))
        found.append({"part": "all, of the prior", "coherence": float(joint.compute()),
                      "of real parts": float(joint_coherence.compute())})  # fmt: skip
    return found


def _flat(part: Tensor) -> Array:
    return part.flatten(1).double().numpy()


def _logits(probes: list[Any], model: Multimodal, x: Tensor, k: int) -> list[Tensor]:
    """The logits of each part's classifier, (B, K) each; -inf for classes that it has not seen."""
    found = []
    for probe, part in zip(probes, model.split(x), strict=True):
        logits = torch.full((len(x), k), -torch.inf, dtype=torch.float64)
        logits[:, probe.classes_] = torch.from_numpy(probe.predict_log_proba(_flat(part)))
        found.append(logits)
    return found
