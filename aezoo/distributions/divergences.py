"""Distances between sets of codes, and density estimates of the codes of all data.

Shapes: B samples of this rank, N of all ranks, D code.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# estimators of the density of all codes from the codes of a batch, see `aggregate_log_weights`
ESTIMATORS = ("mss", "mss_mean", "mws")


def squared_distances(a_BD: Tensor, b_ND: Tensor) -> Tensor:
    """Return ||a - b||^2 between all pairs, (B, D), (N, D) -> (B, N); never negative."""
    with torch.autocast(a_BD.device.type, enabled=False):  # autocast would round the product to half precision
        ab_BN = a_BD @ b_ND.T
    return ((a_BD**2).sum(1)[:, None] + (b_ND**2).sum(1) - 2 * ab_BN).clamp(min=0)


def distances(points_ND: Tensor) -> Tensor:
    """Return ||a - b|| between all pairs of one set, computed from differences, (N, D) -> (N, N).

    Equal points have distance 0; with a matrix product, their distance would be above 0.
    """
    if points_ND.device.type != "cpu":
        return torch.cdist(points_ND, points_ND, compute_mode="donot_use_mm_for_euclid_dist")
    # on a CPU, pdist is tens of times faster than cdist
    n = len(points_ND)
    i, j = torch.triu_indices(n, n, 1)
    above_NN = points_ND.new_zeros(n, n).index_put((i, j), torch.pdist(points_ND))
    return above_NN + above_NN.T


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """Return sqrt(||a - b||^2 + c^2) - c with c = 0.00054 sqrt(X) for samples of X values, (B, ...), (B, ...) -> (B,).

    This is the distance of improved consistency training (Song & Dhariwal 2023, https://arxiv.org/abs/2310.14189).
    """
    c, sse_B = 0.00054 * math.sqrt(a[0].numel()), (a - b).flatten(1).square().sum(1)
    return sse_B / ((sse_B + c**2).sqrt() + c)


def mmd(
    a_BD: Tensor,
    b_BD: Tensor,
    kernel: Callable[[Tensor], Tensor],
    *,
    all_gather: Callable[[Tensor], Tensor] = lambda values: values,
    unbiased: bool = False,
) -> Tensor:
    """Return the squared maximum mean discrepancy, E k(a, a') + E k(b, b') - 2 E k(a, b), (B, D), (B, D) -> ().

    Gretton et al. 2012, https://jmlr.org/papers/v13/gretton12a.html. Equation 5, the V-statistic, is never negative and
    does not change if both sets are duplicated. For equal distributions its mean is 2 (k(a, a) - E k(a, a')) / N.
    Equation 3, the U-statistic, excludes the pairs of a sample with itself. For equal distributions, its mean is 0, so
    it can be negative.

    Args:
        a_BD: codes of this rank.
        b_BD: the same number of draws from the distribution that the codes are compared with.
        kernel: maps squared distances to values of k, elementwise.
        all_gather: gathers the rows of all ranks; the mean of the result over ranks is the value for all codes.
        unbiased: use the U-statistic; for a single sample, its first two terms are 0.
    """
    a_ND, b_ND = all_gather(a_BD), all_gather(b_BD)
    k_aa, k_bb, k_ab = (kernel(squared_distances(x, y)).mean() for x, y in ((a_BD, a_ND), (b_BD, b_ND), (a_BD, b_ND)))
    if unbiased:
        n, k_own = len(a_ND), kernel(a_BD.new_zeros(()))
        k_aa, k_bb = ((n * k - k_own) / max(n - 1, 1) for k in (k_aa, k_bb))
    return k_aa + k_bb - 2 * k_ab


def aggregate_log_weights(estimator: str, row_B: Tensor, n: int, n_data: Tensor) -> Tensor:
    """Return log W, (B, n), such that log sum_j W_ij q(z_i|x_j) over a batch estimates log q(z_i) of all data.

    Chen et al. 2018, https://arxiv.org/abs/1802.04942, for a data set of N, a batch of n over all ranks, and M = n - 1:

        mws        W_ij = 1 / (N n)                                                        (equation 5)
        mss        W_ii = 1/N,  W_ij = 1/M except for one j, with (N - M) / (N M)      (appendix C.2)
        mss_mean   W_ii = 1/N,  W_ij = (N - 1) / (N M): the mean of mss over the choice of that j

    Rows of mss and mss_mean sum to 1 and estimate q(z) without bias; rows of mws sum to n/N and are biased by about
    log(n/N) per factor. For n = N, mss_mean gives q(z) itself.

    Args:
        estimator: mws, mss or mss_mean.
        row_B: positions of the codes z_i in the batch.
        n: size of the batch, the number of samples x_j.
        n_data: N, at least n, of shape (); its dtype is the dtype of the weights.
    """
    N, M = n_data, max(1, n - 1)
    row_B1, column_n = row_B[:, None], torch.arange(n, device=row_B.device)
    own_Bn = row_B1 == column_n
    if estimator == "mws":
        return torch.zeros_like(own_Bn, dtype=N.dtype) - torch.log(N) - math.log(n)
    if n == 1:
        return torch.zeros_like(own_Bn, dtype=N.dtype)  # no other sample represents the rest of the data
    if estimator == "mss_mean":
        return torch.where(own_Bn, -torch.log(N), torch.log((N - 1) / N) - math.log(M))
    stratum_Bn = (row_B1 + 1) % n == column_n
    others_Bn = torch.where(stratum_Bn, torch.log((N - M) / N), 0.0) - math.log(M)
    return torch.where(own_Bn, -torch.log(N), others_Bn)
