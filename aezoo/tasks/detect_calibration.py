"""Decisions about new samples from the scores of calibration samples: threshold, p-values, false discoveries, drift.

n calibration samples are normal, and the model was not trained on them; m samples are scored. If a scored sample is
normal, too, the n + 1 scores are exchangeable for any model, and

    p(x) = (1 + #{i: s_i >= s(x)}) / (n + 1)       is at most t with a probability of at most t      (Vovk et al. 2005)

    Benjamini-Hochberg: with p_(1) <= ... <= p_(m), the samples with the k smallest p-values are anomalies,
    k = max {j: p_(j) <= q j / m}                  share of normal ones among them at most q on average

for the p-values of one calibration set have positive regression dependence (Bates et al. 2023,
https://doi.org/10.1214/22-AOS2244). The share of normal samples pi_0 among the m is estimated from the large p-values,
which anomalies do not have (Storey 2002, https://doi.org/10.1111/1467-9868.00346; with 1 + as in Storey, Taylor and
Siegmund 2004, https://doi.org/10.1111/j.1467-9868.2004.00439.x):

    pi_0 = (1 + #{j: p_j > lambda}) / (m (1 - lambda))         lambda = 1/2

and Benjamini-Hochberg at the level q / pi_0, of p-values up to lambda, uses the level that it leaves unused otherwise.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aezoo.errors import AezooError

Scores = npt.NDArray[np.float64]
# p-values above it are those of normal samples, for the share of anomalies
_LAMBDA = 0.5
# relative increase of a threshold that equals a score: twice the difference of two runtimes in combined
_TIE = 5e-5
DEFAULT_CONTAMINATION, DEFAULT_FDR = 0.1, 0.1
# drift is reported for p-values below it
DRIFT_LEVEL = 0.01
_MAX_EXACT = 10_000


def threshold_of(
    scores: Scores, contamination: float, quantile: float | None = None, *, held_out: bool = True
) -> float:
    """The threshold on normal samples' scores: their quantile, or by the share of such samples above it.

    Args:
        scores: (M,).
        contamination: the share.
        quantile: between 0 and 1.
        held_out: whether the model was not trained on them, see `held_out_threshold`.
    """
    if quantile is not None:
        return clear_of_ties(float(np.quantile(scores, quantile)), scores)
    if held_out:
        return held_out_threshold(scores, contamination)
    return float(np.percentile(scores, 100 * (1 - contamination)))


def held_out_threshold(scores: Scores, contamination: float) -> float:
    """The threshold that a new normal sample exceeds with a probability of at most `contamination`, from n scores.

    It is the k-th largest score, k = floor((n + 1) contamination), so that samples above have p-values of at most
    contamination. Of a share below 1 / (n + 1) it is the largest score, which is exceeded with that probability.
    """
    k = _rank(len(scores), contamination)
    return clear_of_ties(float(np.partition(scores, -k)[-k]), scores)


def _rank(n: int, contamination: float) -> int:
    """k, from 1 to n; (n + 1) contamination may be rounded down from a whole number."""
    return min(max(int((n + 1) * contamination + 1e-9), 1), n)


def clear_of_ties(threshold: float, scores: Scores) -> float:
    """A threshold that the same scores exceed, also if they are rounded differently.

    If it is the score of a sample, that sample could be on either side, depending on the batch or the runtime that
    computes its score. Therefore it is increased by half the distance to the next score, at most by `_TIE`.
    """
    if not (np.abs(scores - threshold) <= _TIE * abs(threshold)).any():
        return threshold
    above = scores[scores > threshold]
    gap = float(above.min()) - threshold if len(above) else np.inf
    return threshold + min(gap / 2, _TIE * abs(threshold))


def flagged_interval(n: int, contamination: float) -> tuple[float, float]:
    """The 95 % interval of the share of normal samples above `held_out_threshold` of n scores.

    The share above the k-th largest of n exchangeable scores has the distribution Beta(k, n + 1 - k).
    """
    from scipy.stats import beta

    k = _rank(n, contamination)
    low, high = beta.ppf([0.025, 0.975], k, n + 1 - k)
    return float(low), float(high)


def p_values(scores: Scores, reference: Scores, among: bool = False) -> Scores:
    """Conformal p-values, (1 + #{reference >= score}) / (n + 1).

    If a sample and the n reference samples are normal, and no model was trained on them, its p-value is p or less with
    a probability of at most p (Bates et al. 2023, https://doi.org/10.1214/22-AOS2244).

    Args:
        scores: scores of the samples.
        reference: scores of normal samples.
        among: whether the samples are the reference samples; each is then compared with the n - 1 others.
    """
    at_least = len(reference) - np.searchsorted(np.sort(reference), scores, side="left")
    p: Scores = at_least / len(reference) if among else (1 + at_least) / (len(reference) + 1)
    return p


@dataclass(frozen=True)
class Rule:
    """What sets the threshold: a share of normal samples, a quantile, or a rate of false discoveries.

    Attributes:
        contamination: share of normal samples above it.
        quantile: of the calibration scores, instead of contamination.
        fdr: share of normal samples among the flagged ones, instead of both.
        estimates_share: whether fdr uses the estimated share of anomalies.
    """

    contamination: float = DEFAULT_CONTAMINATION
    quantile: float | None = None
    fdr: float | None = None
    estimates_share: bool = False

    @classmethod
    def of(cls, contamination: float | str | None, quantile: float | None = None, fdr: float | None = None) -> "Rule":
        """The rule that arguments of `detect` name.

        Args:
            contamination: a share, unknown, estimated, or None if another argument decides.
            quantile: see above.
            fdr: see above.

        Raises:
            AezooError: an invalid value, or two rules.
        """
        if quantile is not None and not 0 < quantile < 1:
            raise AezooError(f"quantile is {quantile}: give a number between 0 and 1, such as 0.95")
        if isinstance(contamination, str) and contamination not in ("unknown", "estimated"):
            raise AezooError(f"contamination is {contamination!r}: give a share of at most 0.5, unknown or estimated")
        by_rate = fdr is not None or isinstance(contamination, str)
        if by_rate and (quantile is not None or isinstance(contamination, int | float)):
            other = f"quantile {quantile}" if quantile is not None else f"contamination {contamination}"
            rate = f"fdr {fdr}" if fdr is not None else f"contamination {contamination}"
            raise AezooError(f"{other} and {rate} each set a threshold: give one of them")
        if by_rate:
            fdr = DEFAULT_FDR if fdr is None else fdr
            check_fdr(fdr)
            return cls(fdr=fdr, estimates_share=contamination == "estimated")
        return cls(DEFAULT_CONTAMINATION if contamination is None else float(contamination), quantile)

    @property
    def needs_held_out(self) -> str:
        """The argument that needs calibration samples that the model was not trained on; empty if none does."""
        return "fdr" if self.fdr is not None else "quantile" if self.quantile is not None else ""

    def threshold(
        self, scores: Scores, reference: Scores, *, held_out: bool = True
    ) -> tuple[float, "AnomalyShare | None"]:
        """The threshold for samples, and the estimated share of anomalies among them if that decides.

        Args:
            scores: (m,) of the samples, all of which a false discovery rate uses together.
            reference: (n,) scores of calibration samples.
            held_out: see `threshold_of`.
        """
        if self.fdr is None:
            return threshold_of(reference, self.contamination, self.quantile, held_out=held_out), None
        if not self.estimates_share:
            return fdr_threshold(scores, reference, self.fdr), None
        share = anomaly_share(scores, reference)
        return fdr_threshold(scores, reference, self.fdr, 1 - share.share), share

    def __str__(self) -> str:
        if self.fdr is not None:
            kind = "adaptive Benjamini-Hochberg" if self.estimates_share else "Benjamini-Hochberg"
            return f"{kind} at a false-discovery rate of {self.fdr:g} on"
        if self.quantile is not None:
            return f"the {self.quantile:g} quantile of"
        return f"the upper {100 * self.contamination:g} % of"


def check_fdr(fdr: float) -> None:
    """Refuse an invalid false discovery rate.

    Raises:
        AezooError: it is not between 0 and 1.
    """
    if not 0 < fdr < 1:
        raise AezooError(f"fdr is {fdr}: give the share of false alarms among the flagged samples, such as 0.1")


def fdr_threshold(scores: Scores, reference: Scores, fdr: float, normal_share: float = 1.0) -> float:
    """The threshold above which Benjamini and Hochberg's procedure flags samples; inf if it flags none.

    Args:
        scores: (m,) scores of the samples that are tested together.
        reference: (n,) scores of calibration samples.
        fdr: share of normal samples among the flagged ones, on average, at most.
        normal_share: pi_0, below 1 for the adaptive procedure, which flags p-values of at most lambda.

    Raises:
        AezooError: there are too few calibration samples for any p-value to be small enough.
    """
    from scipy.stats import false_discovery_control

    check_fdr(fdr)
    if (least := 1 / (len(reference) + 1)) > fdr / normal_share:
        raise AezooError(
            f"fdr {fdr:g} needs at least {int(np.ceil(normal_share / fdr)) - 1:,} held-out samples; with "
            f"{len(reference):,} no p-value is below {least:.2g}: hold out more, or give a larger fdr"
        )
    p = p_values(scores, reference)
    flagged = false_discovery_control(p) <= fdr / normal_share
    if normal_share < 1:
        flagged &= p <= _LAMBDA
    if not flagged.any():
        return float("inf")
    # p-values are steps of the scores, which fall at each score of the reference
    least_flagged = scores[flagged].min()
    threshold = float(reference[reference < least_flagged].max())
    return clear_of_ties(threshold, np.array([threshold, least_flagged]))


@dataclass(frozen=True)
class AnomalyShare:
    """The share of anomalies among samples, estimated from their p-values.

    Attributes:
        share: 1 - pi_0.
        low: lower limit of the 95 % interval; it is valid for any anomalies.
        high: upper limit; it assumes that no anomaly has a p-value above lambda. If some have, there are more.
    """

    share: float
    low: float
    high: float


def anomaly_share(scores: Scores, reference: Scores) -> AnomalyShare:
    """Storey's estimate of the share of anomalies among samples.

    A normal sample has a p-value above lambda with a probability that is 1 - lambda on average, and that has a Beta
    distribution given the n calibration samples. The interval joins the limits of this probability and those of
    Clopper and Pearson for the count, each with 97.5 %.

    Args:
        scores: (m,) scores of the samples.
        reference: (n,) scores of calibration samples.
    """
    from scipy.stats import beta

    n, m = len(reference), len(scores)
    # on a step of the p-values, so that none of a normal sample is above lambda with another probability
    k = int(_LAMBDA * (n + 1))
    above = int((p_values(scores, reference) > (k + 0.5) / (n + 1)).sum())
    # of a normal sample: its score is at most the k-th largest of the reference
    least, most = beta.ppf([0.0125, 0.9875], n + 1 - k, k)
    low = beta.ppf(0.0125, above, m - above + 1) if above else 0.0
    high = beta.ppf(0.9875, above + 1, m - above) if above < m else 1.0
    normal = (1 + above) / (m * (1 - k / (n + 1)))
    shares = np.clip(1 - np.array([normal, high / least, low / most]), 0, 1)
    return AnomalyShare(*map(float, shares))


@dataclass(frozen=True)
class Drift:
    """Whether scores still have the distribution of reference scores.

    Attributes:
        p_value: of the two-sample test of Kolmogorov and Smirnov: the probability of a distance as large without drift.
        distance: largest difference of the two distribution functions, 0 to 1.
        superiority: probability that a sample has a larger score than one of the reference, ties counted half: 0.5
            without drift, Mann and Whitney's U divided by the number of pairs.
        n_reference: reference samples.
    """

    p_value: float
    distance: float
    superiority: float
    n_reference: int

    @property
    def has_left(self) -> bool:
        """Whether the p-value is below 0.01."""
        return self.p_value < DRIFT_LEVEL

    def figures(self) -> dict[str, float]:
        """Columns of tables."""
        return {"drift_p": self.p_value, "drift_distance": self.distance, "drift_superiority": self.superiority}

    def describe(self, reference: str) -> str:
        """The result in words; `reference` names the reference samples."""
        verdict = "drift: the scores differ from those" if self.has_left else "no drift: the scores are like those"
        return (
            f"{verdict} of the {self.n_reference:,} {reference} (Kolmogorov-Smirnov p {self.p_value:.2g}, distance "
            f"{self.distance:.2g}; a sample scores above one of these with probability {self.superiority:.2g})"
        )


def drift(scores: Scores, reference: Scores) -> Drift:
    """A two-sample test of scores against those of reference samples.

    It is exact for up to 10,000 samples of each, and asymptotic beyond.

    Args:
        scores: (m,) scores of new samples.
        reference: (n,) scores of samples that are as new to the model.
    """
    from scipy.stats import ks_2samp, rankdata

    m, n = len(scores), len(reference)
    # exact p-values of large samples take long, and may overflow
    found = ks_2samp(scores, reference, method="exact" if max(m, n) <= _MAX_EXACT else "asymp")
    ranks = rankdata(np.concatenate([scores, reference]))[:m].sum()
    superiority = (ranks - m * (m + 1) / 2) / (m * n)
    return Drift(float(found.pvalue), float(found.statistic), float(superiority), n)
