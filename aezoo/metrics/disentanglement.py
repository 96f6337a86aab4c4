"""How well the dimensions of a code separate known factors: MIG, SAP, DCI and modularity.

Each metric collects codes and factor values as integers (`Shapes.factors`) and computes its score from all of them:

    MIG          Chen et al. 2018, https://arxiv.org/abs/1802.04942
                 mean over factors of (I(z_1; v) - I(z_2; v)) / H(v), z_1 and z_2 the dimensions with the largest I
    SAP          Kumar et al. 2018, https://arxiv.org/abs/1711.00848
                 mean over factors of the gap between the two dimensions that predict v best
    DCI          Eastwood and Williams 2018, https://openreview.net/forum?id=By-7dz-AZ
                 from R (dimensions x factors), the importances of dimensions for predicting each factor
    Modularity   Ridgeway and Mozer 2018, https://arxiv.org/abs/1802.05312
                 mean over dimensions of 1 - sum_k!=1 I(z; v_k)^2 / ((F - 1) I(z; v_1)^2), v_1 the one with largest I

For I, codes are binned into 20 equal parts of their range, as in disentanglement_lib; docstrings of metrics say if they
differ from it. A dimension that never changes is always left out and has no effect; codes without any other dimension
score 0. Ordered factors are ordered by their integers: the last value of an orientation is next to the first in the
image, but not here.

Shapes: N samples, D dimensions of a code, F factors.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from aezoo.metrics.disentanglement_base import FactorMetric, Floats, Ints, check_at_least, standardise


class MIG(FactorMetric):
    """Mutual information gap, from 0 to 1, of the codes themselves; the paper samples them from q(z|x).

    A score of 1 needs each factor in a separate dimension, and bins that separate its values: at most `bins` values.

    Args:
        bins: equal parts of a dimension's range.
    """

    def __init__(self, bins: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = check_at_least(self, "bins", bins, 2)

    def min_samples(self, sizes: Sequence[int]) -> int:
        return self.bins

    def score(self, codes: Floats, factors: Ints) -> float:
        best, second = top_two(mutual_information(codes, factors, self.bins))
        return float(np.mean((best - second) / entropies(factors)))


class Modularity(FactorMetric):
    """Share of a dimension's information that is about a single factor, from 0 to 1; mean over dimensions.

    Uninformative codes do not score 0: a finite sample shows spurious information about each factor.

    Args:
        bins: equal parts of a dimension's range.
    """

    min_factors = 2

    def __init__(self, bins: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = check_at_least(self, "bins", bins, 2)

    def min_samples(self, sizes: Sequence[int]) -> int:
        return self.bins

    def score(self, codes: Floats, factors: Ints) -> float:
        known = np.square(mutual_information(codes, factors, self.bins))
        most, rest = known.max(1), known.sum(1) - known.max(1)
        spread = np.divide(rest, most * (known.shape[1] - 1), out=np.ones_like(most), where=most > 0)
        return float(np.mean(1 - spread)) if len(known) else 0.0


class SAP(FactorMetric):
    """Separated attribute predictability, from 0 to 1.

    The score of a dimension for an ordered factor is r^2, their squared correlation. A categorical factor is predicted
    by scikit-learn's LinearSVC (C = 0.01, balanced classes) from the standardised dimension; the score is the accuracy
    on a held-out third of the samples. disentanglement_lib uses this for all factors. The second best dimension reaches
    at least chance accuracy, so the gap of a categorical factor does not reach 1.

    Args:
        categorical: columns of factors without an order.
        seed: determines which third is held out.
    """

    def __init__(self, categorical: tuple[int, ...] = (), seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.categorical, self.seed = tuple(categorical), seed

    def score(self, codes: Floats, factors: Ints) -> float:
        codes = standardise(codes)
        columns = [
            self._accuracies(codes, column) if k in self.categorical else _r2(codes, column)
            for k, column in enumerate(factors.T)
        ]
        best, second = top_two(np.stack(columns, 1))
        return float(np.mean(best - second))

    def _accuracies(self, codes: Floats, column: Ints) -> Floats:
        from sklearn.svm import LinearSVC

        train, test = train_test_rows(len(column), self.seed)
        if (column[train] == column[train[0]]).all():  # only one value to learn: every dimension predicts it
            return np.full(codes.shape[1], (column[test] == column[train[0]]).mean())
        accuracies = []
        for z in codes.T[:, :, None]:
            svm = LinearSVC(C=0.01, class_weight="balanced", random_state=0).fit(z[train], column[train])
            accuracies.append(svm.score(z[test], column[test]))
        return np.array(accuracies, dtype=np.float64)


class DCI(FactorMetric):
    """Disentanglement, completeness and informativeness, each from 0 to 1.

    disentanglement: 1 - the entropy, in units of log F, of a dimension's importances for the factors, averaged with the
    dimension's share of all importance as weight. completeness: the same for a factor's importances over dimensions, in
    units of log D. informativeness: how well all dimensions together predict a held-out third of the samples: the mean
    of r^2, at least 0, for ordered factors and of the accuracy for categorical ones.

    Predictors are random forests, as in the paper: regression, or classification if a factor is categorical. Each
    split chooses among all dimensions, and each leaf has 5 samples; the importance is the decrease of impurity.
    disentanglement_lib uses boosted trees and classification for all factors, at many times the cost.

    Args:
        categorical: columns of factors without an order.
        trees: number of trees in each forest.
        seed: determines the forests and which third is held out.
    """

    min_factors = 2

    def __init__(self, categorical: tuple[int, ...] = (), trees: int = 20, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.categorical, self.trees, self.seed = tuple(categorical), check_at_least(self, "trees", trees, 1), seed

    def score(self, codes: Floats, factors: Ints) -> dict[str, float]:
        from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

        if not codes.shape[1]:
            return dict.fromkeys(("disentanglement", "completeness", "informativeness"), 0.0)
        codes = standardise(codes)  # trees do not split values that are less than 1e-7 apart
        train, test = train_test_rows(len(codes), self.seed)
        importances, shares = [], []
        for k, column in enumerate(factors.T):
            kind = RandomForestClassifier if k in self.categorical else RandomForestRegressor
            forest = kind(self.trees, max_features=None, min_samples_leaf=5, random_state=self.seed)
            forest.fit(codes[train], column[train])
            importances.append(forest.feature_importances_)
            shares.append(max(0.0, forest.score(codes[test], column[test])))
        r_DF = np.stack(importances, 1)
        figures = {"disentanglement": _concentration(r_DF), "completeness": _concentration(r_DF.T)}
        return {**figures, "informativeness": float(np.mean(shares))}


def mutual_information(codes: Floats, factors: Ints, bins: int) -> Floats:
    """I(z; v) in nats of the binned dimensions and the factors: (N, D), (N, F) -> (D, F)."""
    from sklearn.metrics import mutual_info_score

    binned = [np.digitize(z, np.histogram_bin_edges(z, bins)[1:-1]) for z in codes.T]
    known = [[mutual_info_score(column, z) for column in factors.T] for z in binned]
    return np.array(known, dtype=np.float64).reshape(len(binned), factors.shape[1])


def entropies(factors: Ints) -> Floats:
    """H(v) in nats of each factor: (N, F) -> (F,)."""
    shares = [np.unique(column, return_counts=True)[1] / len(column) for column in factors.T]
    return np.array([-(p * np.log(p)).sum() for p in shares])


def top_two(values: Floats) -> tuple[Floats, Floats]:
    """The largest and the second largest of each column, 0 if there is none: (D, F) -> (F,), (F,)."""
    ordered = np.sort(np.concatenate([values, np.zeros((2, values.shape[1]))]), axis=0)
    return ordered[-1], ordered[-2]


def train_test_rows(n: int, seed: int) -> tuple[Ints, Ints]:
    """Split `range(n)` into two thirds for fitting and one third for evaluation."""
    order = np.random.default_rng(seed).permutation(n)
    return order[n // 3 :], order[: n // 3]


def _r2(codes: Floats, column: Ints) -> Floats:
    return np.square(codes.T @ (column - column.mean()) / len(column) / column.std())


def _concentration(importances: Floats) -> float:
    """1 - H(row) / log(columns), averaged over rows weighted by their share of the sum; 1 for a single column."""
    total = importances.sum(1)
    if importances.shape[1] == 1 or not total.sum():
        return float(total.sum() > 0)
    share = importances / np.where(total > 0, total, 1)[:, None]
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1)
    return float(((1 - entropy / np.log(importances.shape[1])) * total).sum() / total.sum())
