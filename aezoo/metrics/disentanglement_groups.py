"""How a code behaves while one factor is fixed (FactorVAE score, IRS), and how far models agree (UDR).

    FactorVAEScore   Kim and Mnih 2018, https://arxiv.org/abs/1802.05983
                     how often the dimension that varies least identifies the factor that was fixed
    IRS              Suter et al. 2019, https://arxiv.org/abs/1811.00007
                     mean over dimensions of 1 - largest deviation while its factor is fixed / largest deviation overall
    UDR              Duan et al. 2020, https://arxiv.org/abs/1905.12614
                     median over other models of how well each dimension corresponds to a single one of theirs

The papers generate samples with a factor fixed. Here, these are the collected samples that share its value. The result
is the same if factors are sampled independently, as those of `shapes` are. A constant dimension is left out.

Shapes: N samples, D dimensions of a code, F factors, M models.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from aezoo.errors import AezooError
from aezoo.metrics.disentanglement_base import (
    FactorMetric,
    Floats,
    Ints,
    check_at_least,
    check_codes,
    drop_constant,
    gather_rows,
    standardise,
    to_tensors,
)


class FactorVAEScore(FactorMetric):
    """Accuracy of a majority vote, from about 1 / F, for uninformative codes, to 1.

    A vote draws a factor and a sample at random. Among the samples with the same value of the factor, it finds the
    dimension that varies least, relative to its own variance. Each dimension is assigned to the factor for which
    it was found most often, and separate votes evaluate this assignment.

    Args:
        votes: number of votes for the assignment; half as many evaluate it.
        batch_size: maximum number of samples per vote.
        seed: determines the votes.
    """

    min_factors = 2

    def __init__(self, votes: int = 10_000, batch_size: int = 64, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.votes = check_at_least(self, "votes", votes, 2)
        self.batch_size, self.seed = check_at_least(self, "batch_size", batch_size, 2), seed

    def score(self, codes: Floats, factors: Ints) -> float:
        if not codes.shape[1]:
            return 0.0
        codes = codes / codes.std(0)
        # a value of a single sample shows no variance
        groups = [[rows for rows in _by_value(column) if len(rows) > 1] for column in factors.T]
        rng = np.random.default_rng(self.seed)
        trained, evaluated = (self._vote(codes, groups, n, rng) for n in (self.votes, max(1, self.votes // 2)))
        return float(evaluated[trained.argmax(0), np.arange(codes.shape[1])].sum() / evaluated.sum())

    def _vote(self, codes: Floats, groups: list[list[Ints]], n: int, rng: np.random.Generator) -> Ints:
        """How often each dimension varied least while a factor was fixed: (F, D)."""
        votes = np.zeros((len(groups), codes.shape[1]), dtype=np.int64)
        for k in rng.integers(len(groups), size=n):
            sizes = np.array([len(rows) for rows in groups[k]])
            rows = groups[k][rng.choice(len(sizes), p=sizes / sizes.sum())]
            rows = rng.choice(rows, min(self.batch_size, len(rows)), replace=False)
            votes[k, codes[rows].var(0).argmin()] += 1
        return votes


class IRS(FactorMetric):
    """Interventional robustness, 0 to 1: how little a dimension changes while the factor that affects it most is fixed.

    A deviation is the distance from the mean, either of all samples or of those with the same value of the factor,
    averaged over values. Dimensions are averaged with their deviation as weight, as in the authors' code, so the score
    does not change if all dimensions are scaled by the same factor, but does if only one is. The largest deviation is a
    quantile for all samples too; the authors' code uses the maximum there, which gives independent codes a score of 0.

    Args:
        quantile: quantile that counts as the largest deviation; the paper uses 1, the authors' code 0.99.
    """

    def __init__(self, quantile: float = 0.99, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < quantile <= 1:
            raise AezooError(f"IRS: quantile must lie in (0, 1], got {quantile}")
        self.quantile = quantile

    def score(self, codes: Floats, factors: Ints) -> float:
        total = self._deviation(codes)
        # a dimension that differs only for a few samples has deviation 0
        codes, total = codes[:, total > 0], total[total > 0]
        if not len(total):
            return 0.0
        conditional = [
            np.mean([self._deviation(codes[rows]) for rows in _by_value(column)], axis=0) for column in factors.T
        ]
        robust = 1 - np.min(conditional, axis=0) / total
        return float(np.average(robust.clip(0, 1), weights=total))

    def _deviation(self, codes: Floats) -> Floats:
        return np.quantile(np.abs(codes - codes.mean(0)), self.quantile, axis=0)


class UDR(Metric):
    """Unsupervised disentanglement ranking: a score for each of several models, from 0 to 1; no factors are needed.

    R (dimensions of one model x those of another) is the absolute rank correlation (spearman), or the absolute
    coefficients of a Lasso regression of standardised codes with alpha 0.1 (lasso; two equal codes then score 0.9,
    since Lasso shrinks coefficients). With a over rows and b over columns, a pair scores

        1 / (D_1 + D_2) (sum_b max_a R_ab^2 / sum_a R_ab + sum_a max_b R_ab^2 / sum_b R_ab)

    and a model scores the median of its pairs. disentanglement_lib averages rows and columns separately, which is the
    same for D_1 = D_2.

    Args:
        models: M, number of models.
        correlation: spearman or lasso.
        kl_threshold: dimensions are left out unless their KL to the prior, averaged over samples, in nats, exceeds it.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, models: int, correlation: str = "spearman", kl_threshold: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**{"dist_sync_fn": gather_rows} | kwargs)
        if correlation not in ("spearman", "lasso"):
            raise AezooError(f"UDR: correlation takes spearman or lasso, got {correlation!r}")
        self.models, self.correlation, self.kl_threshold = (
            check_at_least(self, "models", models, 2),
            correlation,
            kl_threshold,
        )
        for m in range(models):
            self.add_state(f"codes_{m}", [], dist_reduce_fx="cat")
            self.add_state(f"kl_{m}", [], dist_reduce_fx="cat")

    def update(self, codes: Sequence[Tensor], kl: Sequence[Tensor] | None = None) -> None:
        """Add each model's codes (B, D) of the same samples, and the KL terms (B, D) of their posteriors."""
        if len(codes) != self.models or (kl is not None and len(kl) != self.models):
            raise AezooError(f"UDR compares {self.models} models: give codes, and KL terms if any, of each")
        parts = [check_codes(part, "codes").flatten(1).to(self.device) for part in codes]
        if len({len(part) for part in parts}) > 1:
            raise AezooError(f"UDR needs codes of the same samples, got {[len(part) for part in parts]} of them")
        terms = [torch.full_like(part, torch.inf) for part in parts] if kl is None else [k.detach().float() for k in kl]
        for m, (part, term) in enumerate(zip(parts, terms, strict=True)):
            if term.shape != part.shape:
                raise AezooError(
                    f"KL terms must have the shape of the codes {tuple(part.shape)}, got {tuple(term.shape)}"
                )
            getattr(self, f"codes_{m}").append(part)
            getattr(self, f"kl_{m}").append(term.to(self.device))

    def compute(self) -> Tensor:
        """The score of each model, (M,)."""
        first: Any = self.codes_0
        if not len(first):
            raise AezooError("UDR has seen no codes: call update first")
        if (n := len(dim_zero_cat(first))) < 10:
            raise AezooError(f"UDR needs 10 samples, got {n}")
        codes = []
        for m in range(self.models):
            active = (dim_zero_cat(getattr(self, f"kl_{m}")).mean(0) > self.kl_threshold).cpu().numpy()
            active_codes = drop_constant(dim_zero_cat(getattr(self, f"codes_{m}")).double().cpu().numpy()[:, active])
            codes.append(standardise(active_codes))
        scores = np.array(
            [[0.0 if i == j else self._pair_score(a, b) for i, a in enumerate(codes)] for j, b in enumerate(codes)]
        )
        return to_tensors([float(np.median(np.delete(row, j))) for j, row in enumerate(scores)])

    def _pair_score(self, a: Floats, b: Floats) -> float:
        if not a.shape[1] or not b.shape[1]:
            return 0.0
        r = self._correlation(a, b)
        shares = [np.divide(part.max(0) ** 2, part.sum(0), out=np.zeros(part.shape[1]), where=part.sum(0) > 0)
                  for part in (r, r.T)]  # fmt: skip
        return float((shares[0].sum() + shares[1].sum()) / sum(r.shape))

    def _correlation(self, a: Floats, b: Floats) -> Floats:
        if self.correlation == "spearman":
            from scipy.stats import rankdata

            ranks = rankdata(np.concatenate([a, b], axis=1), axis=0)
            return np.abs(np.corrcoef(ranks, rowvar=False)[: a.shape[1], a.shape[1] :])
        from sklearn.linear_model import Lasso

        return np.abs(Lasso(alpha=0.1).fit(a, b).coef_.reshape(b.shape[1], a.shape[1]).T)


def _by_value(column: Ints) -> list[Ints]:
    """The rows of each value."""
    order = np.argsort(column, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(column[order])) + 1)
