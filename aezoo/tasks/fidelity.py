"""Quality of generated samples: fidelity, diversity, and copies of training samples.

Metrics compare features (N, F) of real and generated samples; see `aezoo.tasks.fidelity_features` for the space.
"""

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from aezoo.data.source import ArrayDataset
from aezoo.tasks.fidelity_features import choose_features
from aezoo.tasks.result_store import Row, Store
from aezoo.tasks.samples import SampleSet
from aezoo.training.seeding import forked_rng

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

# number of training samples for the metrics: precision and recall compare all pairs
_MAX_REAL = 5_000
# the neighbours that set the radius of precision and recall, as in the paper
_K = 3
_CHUNK = 256


@dataclass
class Nearest:
    """The nearest training sample of each sample.

    Attributes:
        distances: (N,), Euclidean, in raw values.
        rows: (N,), its index.
    """

    distances: Array
    rows: Array


def evaluate_fidelity(
    fake: Tensor,
    train: SampleSet,
    held_out: SampleSet | None,
    device: torch.device,
    store: Store,
    *,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> tuple[list[Row], str]:
    """Compare generated samples with training samples and, as a reference, real samples that are new to the model.

    Args:
        fake: (N, *shape) generated samples on the CPU, at least two.
        train: training samples.
        held_out: other real samples; at most N of them are used.
        device: where features are computed.
        store: receives quality.csv and copies.png, the samples nearest to training samples above these.
        batch_size: samples at a time.
        seed: of random draws.
        progress: show bars on a terminal.

    Returns:
        A row of metrics for the generated samples and one for `held_out`, and the name of the features.
    """
    features = choose_features(train, device, seed, progress)
    real = features.all(train.subsample(_MAX_REAL, seed), batch_size, progress)
    fake_features = features.all(SampleSet(ArrayDataset(fake)), batch_size, progress)
    nearest = nearest_samples(fake, train, batch_size, progress)
    rows: list[Row] = [{"samples": "generated"} | fidelity_metrics(real, fake_features, nearest, seed)]
    if held_out is not None and len(held_out) > 1:
        held_out = held_out.subsample(len(fake), seed)
        held_out_nearest = nearest_samples(held_out.rows(range(len(held_out))), train, batch_size, progress)
        held_out_metrics = fidelity_metrics(real, features.all(held_out, batch_size, progress), held_out_nearest, seed)
        rows.append({"samples": "real, held out"} | held_out_metrics)
        rows[0]["closer"], rows[1]["closer"] = (
            closer_probability(nearest.distances, held_out_nearest.distances),
            0.5,
        )
    store.table("quality", rows)
    if store.folder is not None:
        store.picture("copies", lambda: _picture(fake, nearest, train))
    return rows, features.name


def fidelity_metrics(real: Tensor, fake: Tensor, nearest: Nearest, seed: int = 0) -> Row:
    """The metrics of samples with features `fake`, (N, F), whose nearest training samples are known."""
    precision, recall = precision_recall(real, fake)
    return {
        "n": len(fake),
        "fid": fid(real, fake),
        "kid": kid(real, fake, seed),
        "precision": precision,
        "recall": recall,
        "distance": float(np.median(nearest.distances)),
    }


def fid(real: Tensor, fake: Tensor) -> float:
    """Frechet distance of the two Gaussians with the sets' means and covariances (Heusel et al. 2017, eq. (6)).

    |m - m_w|^2 + tr(C + C_w - 2 (C C_w)^1/2), https://arxiv.org/abs/1706.08500; it falls as sets grow, so values are
    only comparable for equal numbers of samples.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_PrecomputedFeatures(real.shape[1]))
    metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return max(float(metric.compute()), 0.0)


def kid(real: Tensor, fake: Tensor, seed: int = 0) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (a.b / F + 1)^3; it may be below 0.

    Binkowski et al. 2018, https://arxiv.org/abs/1801.01401: the mean over 100 subsets of 1,000.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(1000, len(real), len(fake))
    subsets = 1 if size == len(real) == len(fake) else 100
    with warnings.catch_warnings(), forked_rng(torch.device("cpu")):
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        metric = KernelInceptionDistance(feature=_PrecomputedFeatures(real.shape[1]), subsets=subsets, subset_size=size)
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        torch.manual_seed(seed)
        return float(metric.compute()[0])


class _PrecomputedFeatures(nn.Module):
    """Precomputed features, as torchmetrics takes them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size

    def forward(self, features: Tensor) -> Tensor:
        return features


def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eqs. (1) and (2), https://arxiv.org/abs/1904.06991).

    The share of `fake` that is covered by `real`, and the share of `real` covered by `fake`. A point is covered by a
    set if its distance from some member is at most that of the member's third nearest neighbour in the set.
    """
    return _share_within(fake, real), _share_within(real, fake)


def _share_within(points: Tensor, members: Tensor) -> float:
    points, members = points.double(), members.double()
    k = min(_K, len(members) - 1)
    # the nearest is the member itself
    radii = torch.cat([_distances(part, members).kthvalue(k + 1, dim=1).values for part in members.split(_CHUNK)])
    within = torch.cat([(_distances(part, members) <= radii).any(1) for part in points.split(_CHUNK)])
    return float(within.double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # not by |a|^2 - 2ab + |b|^2, whose rounding would push a point away from itself
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def nearest_samples(x: Tensor, train: SampleSet, batch_size: int = 256, progress: bool = False) -> Nearest:
    """The training sample nearest to each of x (N, *shape) in raw values; reads the training samples once."""
    flat = x.flatten(1).double()
    smallest = torch.full((len(x),), math.inf, dtype=torch.float64)
    rows = torch.zeros(len(x), dtype=torch.int64)
    start = 0
    for batch in train.batches(batch_size, "copies" if progress else ""):
        # in float64 the rounding of |a|^2 - 2ab + |b|^2 is 1e-7 of a sample's norm
        distance, index = torch.cdist(flat, batch.flatten(1).double(), compute_mode="use_mm_for_euclid_dist").min(1)
        is_closer = distance < smallest
        smallest[is_closer], rows[is_closer] = distance[is_closer], index[is_closer] + start
        start += len(batch)
    return Nearest(smallest.numpy(), rows.numpy())


def closer_probability(fake: Array, held_out: Array) -> float:
    """P(a generated sample is closer to the training set than a real, held-out one): 0.5 without copies, 1 if all are.

    The Mann-Whitney statistic of Meehan et al. 2020, section 3 (https://arxiv.org/abs/2004.05675). Blurred samples are
    closer as well: look at copies.png.
    """
    from scipy.stats import mannwhitneyu

    farther = mannwhitneyu(fake, held_out).statistic
    return float(1 - farther / (len(fake) * len(held_out)))


def _picture(fake: Tensor, nearest: Nearest, train: SampleSet, n: int = 8) -> "Figure":
    """The samples that are nearest to a training sample, and that training sample."""
    from aezoo.callbacks import plotting

    order = torch.from_numpy(np.argsort(nearest.distances, kind="stable")[:n])
    above, below = fake[order], train.rows(torch.from_numpy(nearest.rows)[order])
    distances = [f"{nearest.distances[i]:.3g}" for i in order]
    if not plotting.is_image(train.shape):
        panels = [{"generated": a, "training": b} for a, b in zip(above, below, strict=True)]
        return plotting.panel_figure(panels, [f"distance {d}" for d in distances])
    limits = plotting.value_range(below)
    tiles = [plotting.tiles(part, limits) for part in (above, below)]
    return plotting.mosaic_figure(tiles, ["generated", "nearest training sample"], distances)
