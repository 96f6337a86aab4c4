"""combined: three anomaly scores of an autoencoder and an isolation forest as one, by Fisher's method.

An autoencoder with a wide code reconstructs anomalies, too, and one with a narrow code has large errors on rare normal
samples; an anomaly along the directions that the code describes has no error at all. So four scores look at a
sample x of D values with the reconstruction x_hat and the code z of M numbers:

    tails      mean_d -log min(1, 2 L_d, 2 R_d)           L_d and R_d: shares of training samples with a value of at
                                                          most, and of at least, x_d, independent of units and heavy
                                                          tails
    error      mean_d (x_d - x_hat_d)^2 / e_d             e_d: mean squared error of value d on the training samples
    code       (z - mu)' C^-1 (z - mu) / M                Mahalanobis' distance of the code
    isolation  2^(-mean_t h_t(x) / c)                     h_t: splits of random tree t that isolate x, see
                                                          `aezoo.tasks.detect_isolation`

and their p-values among the n training samples make the score (Fisher 1925, Statistical Methods for Research Workers,
section 21.1):

    score(x) = -sum_k log p_k(x)       p_k = (number of training scores that are larger + 1/2) / (n + 1)

between two training scores by interpolation of log p, and beyond the largest one with the slope
1 / (largest - median), so that far samples keep their order. Tail probabilities are those of ECOD (Li et al. 2022,
https://arxiv.org/abs/2201.00382), error and code are combined as by Denouden et al. 2018
(https://arxiv.org/abs/1812.02765) and DAGMM; `docs/results/adbench.md` has the measurements.

The contribution of a value of x is its share of each -log p_k: for tails and error, which are means over values,
the share of its term in their sum; for the code, the share of |dcode/dx_d (x_d - mean_d)|, which for a linear encoder
is how far the value moves the code; for isolation, by how much the splits at this value isolate x, see
`aezoo.tasks.detect_isolation.split_shares`. Contributions are at least 0 and add up to the score.

Shapes: B batch, N training samples, Q of them whose values are stored, D values of a sample, M numbers of a code, K = 4
scores.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.tasks.detect_isolation import fit_forest, forest_score, split_shares

# a larger matrix is not used: each number of the code is then divided by its variance
_MAX_CODE = 1024
# training samples, and their values, that are held at a time: at most 256 MiB
_MAX_SAMPLES, _MAX_VALUES = 100_000, 2**26
# training samples, and their values, that are kept for tail probabilities: at most 16 MiB of usual samples
_MIN_KEPT, _MAX_KEPT = 256, 2**22
# a variance below this share of the mean square is rounding of float32
_ROUNDING = 1e-12
# the smallest mean squared error of a value, in units of its variance: a share of the mean of all values, and another
# one for few samples, which a network overfits
_LEAST_ERROR, _LEAST_NOISE = 1e-2, 1e-4
# the smallest variance of a direction of the code, as a share of the mean one
_LEAST_SHARE = 1e-8
# the smallest width of the training scores as a share of the largest
_LEAST_WIDTH = 1e-2
_BATCH = 256
# training samples that go through the trees at a time, which takes 10 KB each
_ROWS = 4096
PARTS = ("tails", "error", "code", "isolation")
_CODE = PARTS.index("code")


class CombinedScore:
    """Fisher's combination of tail probabilities, error, distance of the code and an isolation forest.

    Args:
        model: in evaluation mode whenever the score is used.

    Attributes:
        state: what `fit` has found, tensors by name.
    """

    def __init__(self, model: Autoencoder) -> None:
        self._model = model
        self.state: dict[str, Tensor] = {}

    def max_samples(self, x: Tensor) -> int | None:
        """The most training samples that it uses, given one of them, (1, *shape)."""
        return max(2, min(_MAX_SAMPLES, _MAX_VALUES // x[0].numel()))

    def fit(self, batches: Iterable[Tensor], n: int) -> None:
        """Fit to n training samples, batches (B, *shape) on the model's device."""
        x_ND = torch.cat([x.flatten(1).cpu() for x in batches])
        shape, like = self._model.input_shape, next(self._model.parameters())
        parts = [self._code_and_error(x.reshape(len(x), *shape).to(like)) for x in x_ND.split(_BATCH)]
        z_NM, error_ND = (torch.cat(part) for part in zip(*parts, strict=True))
        x_ND = x_ND.double()
        mean_D, mu_M = x_ND.nanmean(0).nan_to_num(0.0), z_NM.mean(0)
        var_D = _variances(x_ND - mean_D, mean_D)
        share_D = error_ND.square().nanmean(0).nan_to_num(0.0) / var_D
        share_D = share_D.clamp(min=max(_LEAST_ERROR * float(share_D.mean()), _LEAST_NOISE))
        self.state = {
            "mean": mean_D,
            "error_scale": (share_D * var_D).rsqrt(),
            "values": _kept_values(x_ND),
            "code_mean": mu_M,
            "code_scale": _whitening(z_NM - mu_M),
            **fit_forest(_filled(x_ND, mean_D), 0),
        }
        columns = zip(*(values.split(_ROWS) for values in (x_ND, error_ND, z_NM)), strict=True)
        scores_NK = torch.cat([self._parts(*rows) for rows in columns])
        scores_NK[:, _CODE] = _leave_one_out(scores_NK[:, _CODE], z_NM.shape[1])
        self.state["sorted"] = scores_NK.sort(0).values.T.contiguous()
        self._training_scores: npt.NDArray[np.float64] = self._combine(scores_NK).numpy()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `fit` has found earlier."""
        self.state = dict(state)

    def __call__(self, x: Tensor) -> Tensor:
        """Scores of a batch, (B, *shape) -> (B,)."""
        z_BM, error_BD = self._code_and_error(x)
        return self._combine(self._parts(x.flatten(1).cpu().double(), error_BD, z_BM))

    def leave_one_out(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Scores of the samples it was fitted on, with mean and covariance of the code without each of them."""
        return self._training_scores

    def contributions(self, x: Tensor) -> dict[str, Tensor]:
        """What each value contributes to each of the four terms of the score, by name: (B, *shape) -> (B, D)."""
        z_BM, error_BD = self._code_and_error(x)
        x_BD = x.flatten(1).cpu().double()
        isolation_BD = split_shares(_filled(x_BD, self.state["mean"]), self.state)
        weights = (*self._terms(x_BD, error_BD), self._code_slopes(x), isolation_BD)
        surprises_KB = self._surprises(self._parts(x_BD, error_BD, z_BM))
        parts = zip(PARTS, surprises_KB, weights, strict=True)
        return {name: surprise_B[:, None] * _shares(weight_BD) for name, surprise_B, weight_BD in parts}

    def _code_slopes(self, x: Tensor) -> Tensor:
        """|dcode/dx_d (x_d - mean_d)| of the distance of the code, (B, *shape) -> (B, D); 0 without a gradient."""
        with torch.enable_grad():
            given = x.detach().clone().requires_grad_()
            distance = self._code_distance(self._model.encode(given).flatten(1).cpu().double()).sum()
            slope = torch.autograd.grad(distance, given, allow_unused=True)[0] if distance.requires_grad else None
        centred_BD = x.flatten(1).cpu().double() - self.state["mean"]
        return torch.zeros_like(centred_BD) if slope is None else slope.flatten(1).cpu().double().mul(centred_BD).abs()

    def _code_and_error(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Code, (B, M), and x_hat - x, (B, D), in float64 on the CPU."""
        z, x_hat, _ = self._model.code_reconstruction_score(x)
        return z.flatten(1).cpu().double(), (x_hat - x).flatten(1).cpu().double()

    def _parts(self, x_BD: Tensor, error_BD: Tensor, z_BM: Tensor) -> Tensor:
        """The four scores, (B, K). Missing values, NaN, count in none of the means; trees see the training mean."""
        means = [part.nanmean(1) for part in self._terms(x_BD, error_BD)]
        isolation_B = forest_score(_filled(x_BD, self.state["mean"]), self.state)
        return torch.stack([*means, self._code_distance(z_BM), isolation_B], 1)

    def _terms(self, x_BD: Tensor, error_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Tails and error of each value, of which the scores are means, (B, D) each."""
        return _tails(x_BD, self.state["values"]), (error_BD * self.state["error_scale"]).square()

    def _code_distance(self, z_BM: Tensor) -> Tensor:
        """Squared Mahalanobis distance of codes divided by M, (B, M) -> (B,)."""
        centred_BM, scale = z_BM - self.state["code_mean"], self.state["code_scale"]
        return (centred_BM @ scale if scale.ndim == 2 else centred_BM * scale).square().mean(1)

    def _combine(self, scores_BK: Tensor) -> Tensor:
        """-sum_k log p_k, (B, K) -> (B,)."""
        return self._surprises(scores_BK).sum(0)

    def _surprises(self, scores_BK: Tensor) -> Tensor:
        """-log p_k of each score, (B, K) -> (K, B)."""
        columns = zip(scores_BK.T.contiguous(), self.state["sorted"], strict=True)
        return torch.stack([_surprise(score_B, sorted_N) for score_B, sorted_N in columns])


def _filled(x_BD: Tensor, mean_D: Tensor) -> Tensor:
    """Missing values, NaN, as the training mean."""
    return torch.where(x_BD.isnan(), mean_D, x_BD)


def _variances(centred_ND: Tensor, mean_D: Tensor) -> Tensor:
    """The variance of each value; of one that does not vary, the mean of the others."""
    var_D = centred_ND.square().nanmean(0).nan_to_num(0.0)
    varies_D = var_D > _ROUNDING * (var_D + mean_D.square())
    return torch.where(varies_D, var_D, var_D[varies_D].mean() if varies_D.any() else 1.0)


def _kept_values(x_ND: Tensor) -> Tensor:
    """Sorted values of all or of evenly spaced ranks, (D, Q), in float32; missing ones come last, as infinity."""
    n, d = x_ND.shape
    sorted_DN = x_ND.float().nan_to_num(torch.inf).sort(0).values.T
    kept = min(n, max(_MIN_KEPT, _MAX_KEPT // d))
    return sorted_DN[:, torch.linspace(0, n - 1, kept).round().long()].contiguous()


def _tails(x_BD: Tensor, values_DQ: Tensor) -> Tensor:
    """-log of the two-sided tail probability of each value, (B, D), (D, Q) -> (B, D); NaN of one that is missing."""
    x_DB = x_BD.float().T.contiguous()
    n_D1 = values_DQ.isfinite().sum(1, keepdim=True)
    at_most_DB = torch.searchsorted(values_DQ, x_DB, right=True)
    below_DB = torch.searchsorted(values_DQ, x_DB)
    rarer_DB = torch.minimum(at_most_DB, n_D1 - below_DB)
    tails_DB = -torch.log((2 * (rarer_DB + 1) / (n_D1 + 2)).clamp(max=1).double())
    return torch.where(x_DB.isnan(), torch.nan, tails_DB).T


def _whitening(z_NM: Tensor) -> Tensor:
    """C^-1/2 of centred codes, (M, M), or of large codes the diagonal, (M,)."""
    n, m = z_NM.shape
    if m > _MAX_CODE:
        return _variances(z_NM, torch.zeros(m)).rsqrt()
    variances_M, axes_MM = torch.linalg.eigh(z_NM.T @ z_NM / n)
    # a direction in which no training code varies counts as the mean one
    mean = float(variances_M.mean()) or 1.0
    return (axes_MM * torch.where(variances_M > _LEAST_SHARE * mean, variances_M, mean).rsqrt()).contiguous()


def _leave_one_out(code_N: Tensor, m: int) -> Tensor:
    """Distances of training codes with mean and covariance of the others, by Sherman and Morrison's formula.

    d^2 / M becomes d^2 / M / (1 - 1/n - d^2 / n), see `aezoo.tasks.detect_scores.Mahalanobis.leave_one_out`.
    """
    n = len(code_N)
    return code_N / (1 - (1 + m * code_N) / n).clamp(min=1 / n**2)


def _shares(weight_BD: Tensor) -> Tensor:
    """Weights divided by their sum over the values of a sample, (B, D) -> (B, D); equal ones if all are 0."""
    weight_BD = weight_BD.nan_to_num(0.0, posinf=0.0)
    total_B1 = weight_BD.sum(1, keepdim=True)
    return torch.where(total_B1 > 0, weight_BD / total_B1.clamp(min=torch.finfo(weight_BD.dtype).tiny),
                       1 / weight_BD.shape[1])  # fmt: skip


def _surprise(score_B: Tensor, sorted_N: Tensor) -> Tensor:
    """-log p of scores among sorted training scores, (B,), (N,) -> (B,); it never decreases with the score."""
    n = len(sorted_N)
    # training score i, from 0: n - 1 - i others are larger
    surprise_N = -torch.log((n - torch.arange(n, dtype=sorted_N.dtype) - 0.5) / (n + 1))
    right_B = torch.searchsorted(sorted_N, score_B).clamp(1, n - 1) if n > 1 else torch.zeros(len(score_B)).long()
    left_B = (right_B - 1).clamp(min=0)
    gap_B = sorted_N[right_B] - sorted_N[left_B]
    share_B = ((score_B - sorted_N[left_B]) / gap_B.clamp(min=torch.finfo(gap_B.dtype).tiny)).clamp(0, 1)
    within_B = torch.lerp(surprise_N[left_B], surprise_N[right_B], share_B)
    # of few samples with equal scores, the width is rounding
    largest = sorted_N[-1]
    width = torch.maximum(largest - sorted_N[(n - 1) // 2], _LEAST_WIDTH * largest)
    return within_B + (score_B - largest).clamp(min=0) / torch.where(width > 0, width, 1.0)
