"""Comparison of methods over data sets: average ranks, critical differences and Wilcoxon's test.

Source: Demsar 2006, Statistical comparisons of classifiers over multiple data sets,
https://www.jmlr.org/papers/v7/demsar06a.html. Values are (sets, methods), higher is better.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]


class Friedman(NamedTuple):
    """Friedman's test of whether all methods are alike.

    Attributes:
        chi2: his statistic, without correction for ties.
        f: that of Iman and Davenport, which is less conservative.
        p: its p-value.
    """

    chi2: float
    f: float
    p: float


def average_ranks(values: Values) -> Values:
    """The mean rank of each method, (methods,): 1 is best, ties share their ranks."""
    from scipy.stats import rankdata

    return rankdata(-values, axis=1).mean(0)


def friedman(ranks: Values, n_sets: int) -> Friedman:
    """Friedman's test from the average ranks of at least two methods on at least two sets."""
    from scipy.stats import f as f_distribution

    n, k = n_sets, len(ranks)
    chi2 = 12 * n / (k * (k + 1)) * (float((ranks**2).sum()) - k * (k + 1) ** 2 / 4)
    left = n * (k - 1) - chi2
    if left <= 1e-9 * n * k:  # all sets give the same ranks
        return Friedman(chi2, math.inf, 0.0)
    f = (n - 1) * chi2 / left
    return Friedman(chi2, f, float(f_distribution.sf(f, k - 1, (k - 1) * (n - 1))))


def critical_difference(n_methods: int, n_sets: int, alpha: float = 0.05) -> float:
    """The least difference of two average ranks that is significant, by Nemenyi's test of all pairs."""
    from scipy.stats import studentized_range

    # with infinite degrees of freedom, for which scipy computes a one-dimensional integral
    q = float(studentized_range.ppf(1 - alpha, n_methods, np.inf)) / math.sqrt(2)
    return q * math.sqrt(n_methods * (n_methods + 1) / (6 * n_sets))


def indistinct_groups(ranks: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """Largest runs of methods whose ranks differ by less than a critical difference: first and last, of sorted ranks.

    Runs of a single method, and runs that are part of another run, are left out.
    """
    runs: list[tuple[int, int]] = []
    for first, low in enumerate(ranks):
        last = max(i for i, rank in enumerate(ranks) if rank - low < difference)
        if last > first and (not runs or last > runs[-1][1]):
            runs.append((first, last))
    return runs


def wilcoxon_p(values: Values, others: Values) -> float:
    """The p-value of Wilcoxon's signed-rank test of two methods, two-sided; 1 if they are equal on all sets."""
    from scipy.stats import wilcoxon

    differences = values - others
    return float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's step-down procedure."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, least = [0.0] * len(order), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - place) * p_values[i]))
        adjusted[i] = least
    return adjusted
