"""Common functions of quantisers: nearest code, mixed-radix numbers, entropies, quantiser dropout and k-means.

Shapes: N rows, D channels, K codes, Q digits or levels.
"""

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo.deprecated import renamed
from aezoo.training.precision import at_least_float32

# maximum numbers of rows and multiplications for k-means
_MAX_ROWS, _MAX_WORK = 2**14, 1e10
# mask of the bits of a float32 that TF32 preserves
_TF32 = -(2**13)


@torch.no_grad()
def nearest(z_ND: Tensor, code_KD: Tensor) -> Tensor:
    """Return the index of the code with the smallest ||z - e||, the first in case of ties, (N, D), (K, D) -> (N,)."""
    # centring at the mean of the codes minimises the rounding error of the expanded square
    centre_D = code_KD.mean(0)
    z_ND, code_KD = z_ND - centre_D, code_KD - centre_D
    norm_K = code_KD.square().sum(1)
    if uses_tf32(z_ND):
        z_ND, code_KD = split_for_tf32(z_ND, code_KD)
    return torch.addmm(norm_K, z_ND, code_KD.T, alpha=-2).argmin(1)


def uses_tf32(z_ND: Tensor) -> bool:
    """Return whether float32 products of rows may be computed in TF32."""
    return z_ND.device.type == "cuda" and z_ND.dtype == torch.float32


def split_for_tf32(z_ND: Tensor, code_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and codes whose products in TF32 have float32 precision, (N, 3D), (K, 3D).

    Each number is split into its leading bits, which TF32 can represent, and the rest; the product of two rests is
    omitted.
    """
    (z_high, z_low), (high, low) = ((part, x - part) for x in (z_ND, code_KD) for part in (_leading(x),))
    return torch.cat([z_high, z_high, z_low], 1), torch.cat([high, low, high], 1)


def _leading(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & _TF32).view(torch.float32)


def relative_distance(z_ND: Tensor, code_KD: Tensor) -> Tensor:
    """Return ||z - e||^2 - ||z||^2 = ||e||^2 - 2 z.e, with the same order of codes, (N, D), (K, D) -> (N, K)."""
    return torch.addmm(code_KD.square().sum(1), z_ND, code_KD.T, alpha=-2)


def to_index(digit_NQ: Tensor, sizes: Sequence[int]) -> Tensor:
    """Convert digits to one number, least significant digit first, (N, Q) -> (N,)."""
    base, index_N = 1, torch.zeros_like(digit_NQ[:, 0])
    for digit_N, size in zip(digit_NQ.unbind(1), sizes, strict=True):
        index_N, base = index_N + base * digit_N, base * size
    return index_N


def to_digits(index_N: Tensor, sizes: Sequence[int]) -> Tensor:
    """Invert `to_index`, (N,) -> (N, Q)."""
    digits = []
    for size in sizes:
        digits.append(index_N % size)
        index_N = index_N // size
    return torch.stack(digits, 1)


def entropy(p: Tensor) -> Tensor:
    """Return -sum p log p over the last dimension in nats, with a finite gradient at p = 0, (..., K) -> (...)."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)


def binary_entropy(logit: Tensor) -> Tensor:
    """Return the entropy in nats of a bit that is 1 with probability sigmoid(logit), elementwise."""
    size = logit.abs()
    return F.softplus(-size) + size * (-size).sigmoid()


def level_dropout_mask(z_ND: Tensor, rows_per_sample: int, levels: int, dropout: float) -> Tensor:
    """Return a mask of the levels that rows keep, (N, Q): n ~ U{1..levels} with probability `dropout`, or all."""
    samples = z_ND.shape[0] // rows_per_sample
    drop_B, depth_B = (torch.rand(samples, device=z_ND.device) for _ in range(2))
    n_B = torch.where(drop_B < dropout, (depth_B * levels).floor() + 1, levels)
    kept_BQ = torch.arange(levels, device=z_ND.device) < n_B[:, None]
    return kept_BQ.repeat_interleave(rows_per_sample, 0)


def k_means(z_ND: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return means and sizes of clusters of rows, by scikit-learn, deterministic, (N, D) -> (K, D), (K,).

    Rows above a maximum number are not used, and sizes are scaled. If there are fewer distinct rows than clusters, each
    row is a cluster; the others have size 1 and means from a normal distribution with the mean and spread of the rows.
    """
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    max_rows = max(_MAX_ROWS, 2 * size)
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(len(z_ND), generator=generator)[:max_rows]
    rows = z_ND.detach()[index.to(z_ND.device)].cpu().numpy()
    distinct, weight = np.unique(rows, axis=0, return_counts=True)
    if len(distinct) > size:
        steps = int(min(50, max(1, _MAX_WORK / (len(distinct) * size * rows.shape[1]))))
        kmeans = KMeans(size, init="k-means++" if size <= 1024 else "random", n_init=1, max_iter=steps, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # nearly equal rows
            label = kmeans.fit(distinct, sample_weight=weight).labels_
        count = np.bincount(label, weight, size)
        mean = np.zeros((size, rows.shape[1]))
        np.add.at(mean, label, distinct * weight[:, None])
        mean = np.where(count[:, None] > 0, mean / count.clip(1)[:, None], kmeans.cluster_centers_)
    else:
        noise = at_least_float32(torch.randn(size - len(distinct), rows.shape[1], generator=generator))
        fill = noise.numpy() * rows.std(0) + rows.mean(0)
        mean, count = np.concatenate([distinct, fill]), np.concatenate([weight, np.ones(len(fill))])
    scale = len(z_ND) / len(rows)
    return torch.from_numpy(mean).to(z_ND), torch.from_numpy(np.maximum(count, 1) * scale).to(z_ND)


def group_sizes(total: int, max_size: int) -> list[int]:
    """Split `total` into as few groups as possible of at most `max_size` each, as evenly as possible."""
    groups = math.ceil(total / max_size)
    return [total // groups + (i < total % groups) for i in range(groups)]


__getattr__ = renamed(__name__)
