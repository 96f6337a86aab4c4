"""Anomalies and normal samples by label, and how well scores separate them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aezoo.autoencoder import Autoencoder
from aezoo.data import DataModule
from aezoo.data.classes import UNLABELLED, describe_classes, label_names
from aezoo.data.source import Stage
from aezoo.errors import AezooError
from aezoo.tasks.result_store import Row
from aezoo.tasks.samples import SampleSet

Flags = npt.NDArray[np.bool_]
# 1 for an anomaly, 0 for a normal sample, UNLABELLED if unknown
AnomalyLabels = npt.NDArray[np.int64]


class Protocol:
    """One class against all others.

    Args:
        normal: one-vs-rest: this class is normal, all others are anomalies.
        anomaly: leave-one-out: this class, which training left out, is the anomaly, all others are normal.
    """

    def __init__(self, normal: str | None, anomaly: str | None) -> None:
        if normal is not None and anomaly is not None:
            raise AezooError("normal and anomaly are both given: name the one normal class or the one anomalous class")
        self.class_name = anomaly if normal is None else normal
        self.normal_is_named = normal is not None

    def __str__(self) -> str:
        if self.normal_is_named:
            return f"one-vs-rest: {self.class_name} is normal, all other classes are anomalies"
        return f"leave-one-out: {self.class_name} is the anomaly, all other classes are normal"

    def anomalies(self, samples: SampleSet) -> AnomalyLabels | None:
        """Which samples are anomalies, (N,); None if no class is named.

        Raises:
            AezooError: there are no labels, or none of the named class.
        """
        if self.class_name is None:
            return None
        known = _classes(samples)
        if known is None:
            raise AezooError(f"{samples.name} has no labels to say what is normal: drop normal and anomaly, or give "
                             "samples with labels")  # fmt: skip
        classes, labelled = known
        if not (classes[labelled] == str(self.class_name)).any():
            classes_text = describe_classes(classes[labelled])
            raise AezooError(f"no sample of {samples.name} has the label {self.class_name!r}: it has {classes_text}")
        return np.where(labelled, (classes == str(self.class_name)) != self.normal_is_named, UNLABELLED)

    def normal_indices(self, samples: SampleSet) -> npt.NDArray[np.int64]:
        """The indices of samples that are normal by their labels; all of them without labels."""
        known = None if self.class_name is None else _classes(samples)
        if known is None:
            return np.arange(len(samples))
        classes, labelled = known
        normal = np.flatnonzero(labelled & ((classes == str(self.class_name)) == self.normal_is_named))
        if not len(normal):
            raise AezooError(f"{samples.name} contains no normal samples, {self}: give others to fit and calibrate on")
        return normal


@dataclass
class Reference:
    """Normal samples to fit or to calibrate on.

    Attributes:
        samples: the samples.
        own: their indices among the scored samples, if they are some of these.
        n_left_out: how many were left out, as anomalies or without a label.
    """

    samples: SampleSet
    own: npt.NDArray[np.int64]
    n_left_out: int

    @classmethod
    def from_split(
        cls, model: Autoencoder, given: Any, x: Any, split: Stage, protocol: Protocol, scored: SampleSet | None = None
    ) -> "Reference | None":
        """`given`, or a split of x if that is a DataModule, or None; `scored` may contain the same samples."""
        if given is None and isinstance(x, DataModule) and split in x.splits():
            given = x
        if given is None:
            return None
        split_samples = SampleSet.from_data(given, split, model.takes_missing).check(model)
        normal = protocol.normal_indices(split_samples)
        samples = split_samples if len(normal) == len(split_samples) else split_samples.subset(torch.from_numpy(normal))
        own = normal if scored is not None and split_samples.dataset is scored.dataset else normal[:0]
        labels = split_samples.labels
        unlabelled = 0 if labels is None or len(normal) == len(split_samples) else int((labels == UNLABELLED).sum())
        return cls(samples, own, len(split_samples) - len(normal) - unlabelled)


def ranking_metrics(scores: npt.NDArray[Any], anomalous: AnomalyLabels | Flags | None) -> dict[str, float | None]:
    """Area under the ROC curve and average precision; None without anomalies or without normal samples."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    if anomalous is not None:
        labelled = anomalous != UNLABELLED
        scores, anomalous = scores[labelled], anomalous[labelled]
    if anomalous is None or anomalous.all() or not anomalous.any():
        return {"auroc": None, "aupr": None}
    return {
        "auroc": float(roc_auc_score(anomalous, scores)),
        "aupr": float(average_precision_score(anomalous, scores)),
    }


def label_report(
    rows: list[Row],
    baselines: Collection[str],
    train: Reference,
    protocol: Protocol,
    anomalous: AnomalyLabels | None,
    labelled: bool,
) -> list[str]:
    """The samples behind AUROC and AUPR, in words, and whether a baseline is best."""
    if anomalous is None:
        hint = "AUROC and AUPR need to know what an anomaly is: give normal or anomaly, as in --normal CLASS"
        return [hint] if labelled else []
    anomaly_labels = anomalous[anomalous != UNLABELLED]
    lines = [f"{protocol}: {int(anomaly_labels.sum()):,} of {len(anomaly_labels):,} samples are anomalies"]
    if unlabelled := len(anomalous) - len(anomaly_labels):
        lines[0] += f"; {unlabelled:,} without a label are left out of AUROC and AUPR"
    if train.n_left_out:
        lines.append(f"{train.n_left_out:,} anomalies among the training samples are not used here; if the model was "
                     "trained on them, it has learned them: train with --data.train_classes")  # fmt: skip
    best = max((row for row in rows if row.get("auroc") is not None), key=lambda row: row["auroc"], default=None)
    if best is not None and best["method"] in baselines:
        lines.append(f"a baseline separates them best: {best['method']}, by AUROC")
    return lines


def _classes(samples: SampleSet) -> tuple[npt.NDArray[Any], Flags] | None:
    """The class name of each sample, and whether it has one; None if no sample has."""
    y = samples.labels
    if y is None:
        return None
    # among labels with fractions, -1 is a label
    labelled = np.full(len(y), True) if y.is_floating_point() else (y != UNLABELLED).numpy()
    return (label_names(y, samples.class_names), labelled) if labelled.any() else None
