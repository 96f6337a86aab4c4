"""Ranks, Friedman's and Nemenyi's tests and Holm's correction, compared with values printed in Demsar (2006)."""

import numpy as np
import pytest
from scipy import stats

from benchmarks import plots_ranks, rankings

# table 6 and section 3.2.2 of Demsar 2006: average ranks of C4.5, C4.5+m, C4.5+cf and C4.5+m+cf on 14 data sets
RANKS, N_SETS = np.array([3.143, 2.000, 2.893, 1.964]), 14


def test_average_ranks_share_ties_and_the_highest_value_is_first():
    values = np.array([[0.9, 0.5, 0.9], [0.1, 0.2, 0.3], [0.7, 0.7, 0.7]])
    assert rankings.average_ranks(values) == pytest.approx([6.5 / 3, 7 / 3, 4.5 / 3])
    assert rankings.average_ranks(values[:2]).tolist() == [2.25, 2.5, 1.25]


def test_friedman_of_the_published_example():
    # chi2 = 9.28, F = 3.69 with 3 and 39 degrees of freedom, whose critical value at 5 % is 2.85
    found = rankings.friedman(RANKS, N_SETS)
    assert found.chi2 == pytest.approx(9.28, abs=0.01) and found.f == pytest.approx(3.69, abs=0.01)
    assert found.p == pytest.approx(stats.f.sf(3.69, 3, 39), rel=0.01) and 0.01 < found.p < 0.05
    assert rankings.friedman(np.array([1.0, 2.0, 3.0]), 4).p == 0.0


def test_friedman_without_ties_equals_scipy():
    values = np.random.default_rng(0).normal(size=(12, 5))
    found = rankings.friedman(rankings.average_ranks(values), 12)
    assert found.chi2 == pytest.approx(stats.friedmanchisquare(*values.T).statistic)


@pytest.mark.parametrize(
    ("n_methods", "q"),
    # table 5 (a) of Demsar 2006
    [*enumerate((1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164), start=2)],
)
def test_critical_differences_have_the_published_factors(n_methods, q):
    n_sets = 14
    expected = q * (n_methods * (n_methods + 1) / (6 * n_sets)) ** 0.5
    assert rankings.critical_difference(n_methods, n_sets) == pytest.approx(expected, abs=1e-3)


def test_critical_difference_of_the_published_example():
    assert rankings.critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)
    assert rankings.critical_difference(4, 14, alpha=0.1) == pytest.approx(2.291 * (20 / 84) ** 0.5, abs=1e-3)


def test_groups_are_largest_runs_within_critical_difference():
    assert rankings.indistinct_groups([1.0, 1.5, 2.2, 4.0, 4.4], 1.0) == [(0, 1), (1, 2), (3, 4)]
    assert rankings.indistinct_groups([1.0, 2.0, 3.0], 1.0) == []  # a difference equal to it is significant
    assert rankings.indistinct_groups([1.0, 1.2, 1.4], 5.0) == [(0, 2)]


def test_wilcoxon_by_hand_and_of_equal_methods():
    # six differences of one sign: two of the 2^6 sign assignments are as extreme
    values = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 0.65])
    assert rankings.wilcoxon_p(values, values - [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]) == pytest.approx(2 / 64)
    assert rankings.wilcoxon_p(values, values) == 1.0


def test_holm_multiplies_in_steps_and_never_decreases():
    assert rankings.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert rankings.holm([0.9, 0.8]) == [1.0, 1.0] and rankings.holm([]) == []


def test_the_picture_names_methods_and_joins_groups():
    ranks = {"a": 1.2, "b": 2.0, "c": 3.9, "d": 2.9}
    figure = plots_ranks.critical_differences(ranks, 1.25, "four")
    (ax,) = figure.axes
    words = [text.get_text() for text in ax.texts]
    assert {"a  1.20", "b  2.00", "2.90  d", "3.90  c"} <= {*words} and "critical difference 1.25" in words
    bars = [line for line in ax.lines if line.get_linewidth() == 3.5]
    assert [(round(line.get_xdata()[0], 1), round(line.get_xdata()[1], 1)) for line in bars] == [
        (1.2, 2.0), (2.0, 2.9), (2.9, 3.9),
    ]  # fmt: skip
