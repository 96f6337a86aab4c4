"""Calibration: bounds on false positives and false discoveries with conformal p-values, and the share of anomalies.

Scores are drawn directly if the model does not matter: all bounds hold for any exchangeable scores.
"""

import csv

import numpy as np
import pytest
import torch
from quiet_trainer import quiet_trainer
from refusals import refused_in_one_line
from scipy import stats

import aezoo
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.tasks.detect import Detector, detect
from aezoo.tasks.detect_calibration import (
    Rule,
    anomaly_share,
    clear_of_ties,
    drift,
    fdr_threshold,
    held_out_threshold,
    p_values,
)


def at_most(successes, trials, bound):
    """Whether the share is at most the bound, with a tolerance that a binomial count exceeds once in 10,000 times."""
    return successes <= stats.binom.ppf(0.9999, trials, bound)


def mixture(random, m, share, shift=3.0):
    """Scores of m samples, a share of which are anomalies, and a mask of these."""
    strange = np.arange(m) < round(m * share)
    return random.normal(size=m) + shift * strange, strange


@pytest.fixture(scope="module")
def trained():
    """A small model trained on normal samples, and exchangeable samples not used for training."""
    x = np.random.default_rng(0).normal(size=(3100, 6)).astype(np.float32) * [3, 2, 1, 1, 1, 1]
    torch.manual_seed(0)
    model = aezoo.create_model("dense_ae", (6,), likelihood="gaussian", latent_dim=2, hidden_dims=(8,), lr=1e-2)
    data = aezoo.DataModule.from_arrays(np.float32(x[:100]), scale="none", batch_size=20, val_fraction=0)
    quiet_trainer(max_epochs=3).fit(model, data)
    return model, np.float32(x[:100]), np.float32(x[100:])


# ---- false alarms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "alpha"), [(19, 0.05), (19, 0.25), (200, 0.1), (53, 0.02)])
@pytest.mark.parametrize("draw", ["standard_normal", "standard_cauchy", "integers"])
def test_false_positive_rate_is_at_most_alpha(n, alpha, draw):
    random, trials = np.random.default_rng(1), 2000
    make = (lambda k: random.integers(0, 4, k).astype(float)) if draw == "integers" else getattr(random, draw)
    by_p = by_threshold = 0
    for _ in range(trials):
        # one new sample for each calibration set, so that trials are independent
        scores = make(n + 1)
        by_p += bool(p_values(scores[:1], scores[1:])[0] <= alpha)
        by_threshold += bool(scores[0] > held_out_threshold(scores[1:], alpha))
    assert at_most(by_p, trials, alpha)
    assert by_threshold == by_p or draw == "integers"
    assert at_most(by_threshold, trials, alpha)
    if draw != "integers":
        assert by_p >= stats.binom.ppf(0.0001, trials, np.floor(alpha * (n + 1)) / (n + 1))


@pytest.mark.parametrize("score", ["deviance", "combined"])
def test_false_positive_rate_of_a_model_is_at_most_alpha(score, trained):
    model, train, rest = trained
    detector = Detector(model, score).fit(train, calibrate_on=rest[:20])
    scores = detector.decision_function(rest)
    random, trials, alpha = np.random.default_rng(2), 2000, 0.1
    # the model is fixed, the calibration set is drawn again
    found = 0
    for _ in range(trials):
        drawn = random.choice(scores, 51, replace=False)
        found += bool(p_values(drawn[:1], drawn[1:])[0] <= alpha)
    assert at_most(found, trials, alpha) and found > 0.05 * trials


# ---- false discoveries -----------------------------------------------------------------------------------------------


def test_flagged_samples_match_benjamini_and_hochberg():
    """Compared with the definition, and with the equivalent threshold."""
    random = np.random.default_rng(3)
    for m, n, share, q in [(40, 60, 0.3, 0.2), (300, 500, 0.05, 0.1), (5, 9, 1.0, 0.5), (100, 40, 0.0, 0.3)]:
        scores, _ = mixture(random, m, share)
        reference = random.normal(size=n)
        p = p_values(scores, reference)
        order = np.sort(p)
        passes = np.flatnonzero(order <= q * np.arange(1, m + 1) / m)
        expected = p <= order[passes[-1]] if len(passes) else np.zeros(m, bool)
        assert np.array_equal(scores > fdr_threshold(scores, reference, q), expected)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("rule", [Rule(fdr=0.2), Rule(fdr=0.2, estimates_share=True)], ids=str)
def test_false_discovery_rate_is_at_most_its_level(rule, share):
    random, trials = np.random.default_rng(4), 500
    false, found = [], []
    for _ in range(trials):
        scores, strange = mixture(random, 100, share)
        flagged = scores > rule.threshold(scores, random.normal(size=200))[0]
        false.append((flagged & ~strange).sum() / max(flagged.sum(), 1))
        found.append(flagged[strange].mean() if share else 0)
    # the standard deviation of the share of false discoveries is at most that of a coin
    error = np.std(false) / np.sqrt(trials)
    # exactly pi_0 q for Benjamini and Hochberg, up to the discreteness of p-values
    bound = 0.2 if rule.estimates_share else 0.2 * (1 - share)
    assert np.mean(false) <= bound + 3.5 * error
    if share:
        assert np.mean(found) > 0.5 and np.mean(false) > 0.3 * bound


def test_estimated_share_finds_more_anomalies():
    random, found = np.random.default_rng(5), {False: 0, True: 0}
    for _ in range(50):
        scores, strange = mixture(random, 200, 0.6, shift=2.0)
        reference = random.normal(size=1000)
        for adaptive in found:
            threshold, share = Rule(fdr=0.1, estimates_share=adaptive).threshold(scores, reference)
            found[adaptive] += (scores > threshold)[strange].sum()
            assert (share is not None) == adaptive
    assert found[True] > 1.1 * found[False]


def test_adaptive_level_flags_no_p_value_above_one_half():
    scores, reference = np.linspace(-60.0, 60.0, 50), np.arange(99.0) - 49
    # the adjusted level, fdr / normal_share, is 2
    flagged = scores > fdr_threshold(scores, reference, 0.2, normal_share=0.1)
    assert np.array_equal(flagged, p_values(scores, reference) <= 0.5) and 0 < flagged.sum() < 50


def test_too_few_calibration_samples_are_refused():
    with pytest.raises(AezooError, match=r"fdr 0.1 needs at least 9 held-out samples; with 8 no p-value is below 0.11"):
        fdr_threshold(np.ones(3), np.arange(8.0), 0.1)
    assert np.isfinite(fdr_threshold(np.full(3, 99.0), np.arange(9.0), 0.1))
    assert fdr_threshold(np.zeros(3), np.arange(9.0), 0.1) == np.inf


# ---- the share of anomalies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "share"), [(50, 30, 0.2), (200, 400, 0.0), (201, 1000, 0.35), (30, 2000, 0.9)])
def test_interval_contains_the_share_of_anomalies(n, m, share):
    random, trials = np.random.default_rng(6), 300
    missed, estimates = 0, []
    true = round(m * share) / m
    for _ in range(trials):
        scores, _ = mixture(random, m, share, shift=8.0)
        found = anomaly_share(scores, random.normal(size=n))
        missed += not found.low <= true <= found.high
        estimates.append(found.share)
        assert 0 <= found.low <= found.share <= found.high <= 1
    assert at_most(missed, trials, 0.05)
    assert np.mean(estimates) == pytest.approx(true, abs=0.03 + 3 / np.sqrt(m * n))


def test_lower_limit_is_valid_for_inconspicuous_anomalies():
    """Anomalies with large p-values count as normal, so the estimate and the lower limit are too small."""
    random = np.random.default_rng(7)
    above = 0
    for _ in range(300):
        scores, _ = mixture(random, 500, 0.3, shift=0.5)
        found = anomaly_share(scores, random.normal(size=500))
        above += found.low > 0.3
    assert at_most(above, 300, 0.025) and found.share < 0.3


# ---- thresholds ------------------------------------------------------------------------------------------------------


def test_threshold_on_a_score_is_above_its_rounding():
    scores = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert 4 < clear_of_ties(4.0, scores) < 4 * (1 + 1e-4)
    assert 4 < clear_of_ties(4.0, np.array([1.0, 4.0, 4.000001])) < 4.000001
    assert clear_of_ties(3.5, scores) == 3.5
    # 19 scores, so that the threshold is one of them
    held_out = np.arange(1.0, 20.0)
    assert 18 < held_out_threshold(held_out, 0.1) < 18 * (1 + 1e-4)
    # 100 * 0.29 is 28.999999999999996 in floating point; 29 scores are at least 71
    assert 71 < held_out_threshold(np.arange(1.0, 100.0), 0.29) < 71 * (1 + 1e-4)


# ---- drift -----------------------------------------------------------------------------------------------------------


def test_drift_equals_two_sample_tests_of_scipy():
    random = np.random.default_rng(8)
    for m, n, shift in [(30, 50, 0.0), (200, 100, 0.5), (1, 40, 3.0), (12_000, 300, 0.1)]:
        scores, reference = np.round(random.normal(size=m) + shift, 1), np.round(random.normal(size=n), 1)
        found, expected = drift(scores, reference), stats.ks_2samp(scores, reference)
        assert found.p_value == pytest.approx(expected.pvalue) and found.distance == pytest.approx(expected.statistic)
        assert found.superiority == pytest.approx(stats.mannwhitneyu(scores, reference).statistic / (m * n))
        assert found.n_reference == n and found.has_left == (expected.pvalue < 0.01)


def test_false_alarms_of_drift_are_at_most_its_level():
    random, trials = np.random.default_rng(9), 1500
    alarms = sum(drift(random.normal(size=40), random.normal(size=60)).has_left for _ in range(trials))
    assert at_most(alarms, trials, 0.01)
    # in location and in scale
    for move in (lambda x: x + 1.5, lambda x: 4 * x):
        assert drift(move(random.normal(size=100)), random.normal(size=100)).has_left


def test_detect_reports_drift_from_reference(samples, tmp_path):
    model, train, held_out, x = samples
    given = {"fit_on": train, "calibrate_on": held_out, "n_shown": 0, "baselines": False}
    found, same = detect(model, x + np.float32(1.5), out=str(tmp_path), **given), detect(model, x[:200], **given)
    assert found.drift.has_left and not same.drift.has_left and found.drift.n_reference == 1000
    assert found.drift.superiority > 0.6 and abs(same.drift.superiority - 0.5) < 0.1
    assert "\ndrift: the scores differ from those of the 1,000 held-out samples (Kolmogorov" in found.summary()
    assert "\nno drift: the scores are like those of the 1,000 held-out samples (Kolmogorov" in same.summary()
    (row,) = csv.DictReader((tmp_path / "detect.csv").read_text().splitlines())
    assert float(row["drift_p"]) == pytest.approx(found.drift.p_value) and float(row["drift_distance"]) > 0.2
    # another reference, used for drift only
    other = detect(model, x + np.float32(1.5), reference=held_out[:300] + np.float32(1.5), **given)
    assert not other.drift.has_left and other.drift.n_reference == 300
    assert np.array_equal(other.p_values, found.p_values) and "of the 300 samples of x (" in other.summary()
    # no drift without calibration, nor for the calibration samples themselves
    assert detect(model, x, baselines=False).drift is None


# ---- detect ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def samples(trained):
    """A model, normal samples in two parts, and new samples of which the last 30 are anomalies."""
    model, train, rest = trained
    x = rest[1000:1300].copy()
    x[270:] += 12
    return model, train, rest[:1000], x


def test_detect_flags_by_false_discovery_rate(tmp_path, samples):
    model, train, held_out, x = samples
    given = {"fit_on": train, "calibrate_on": held_out, "n_shown": 0}
    found = detect(model, x, fdr=0.1, out=str(tmp_path), **given)
    p = found.p_values
    adjusted = stats.false_discovery_control(p)
    assert np.array_equal(found.is_anomaly, adjusted <= 0.1) and 20 < found.is_anomaly.sum() < 40
    assert "Benjamini-Hochberg at a false-discovery rate of 0.1 on p-values among 1,000 held-out" in found.summary()
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [row["is_anomaly"] == "True" for row in rows] == found.is_anomaly.tolist()
    detector = Detector(model).fit(train, calibrate_on=held_out)
    assert np.array_equal(detector.predict(x, fdr=0.1), found.is_anomaly)
    # each baseline uses its own p-values
    assert all(0.05 < row["flagged"] < 0.15 for row in found.rows)
    same = detect(model, x, contamination="unknown", **given)
    assert np.array_equal(same.is_anomaly, found.is_anomaly) and same.anomaly_share is None
    none = detect(model, x[:100], fdr=0.01, calibrate_on=held_out[:150], baselines=False)
    assert none.threshold == np.inf and not none.is_anomaly.any() and "0 of 100 samples are flagged: " in none.summary()
    assert "allow, " not in none.summary()
    few = detect(model, x, fdr=0.05, calibrate_on=held_out[:20], baselines=False)
    n = (few.p_values == 1 / 21).sum()
    assert n and not few.is_anomaly.any()
    assert f"{n} of the samples have the smallest p-value that these allow, 0.048: with more held-out" in few.summary()


def test_detect_estimates_the_share_of_anomalies(samples):
    model, train, held_out, x = samples
    found = detect(model, x, contamination="estimated", fit_on=train, calibrate_on=held_out, baselines=False)
    share = found.anomaly_share
    assert share.low <= 0.1 <= share.high and found.rows[0]["anomaly_share"] == share.share
    assert f"about {100 * share.share:.3g} % of the samples are anomalies by their p-values" in found.summary()
    assert "adaptive Benjamini-Hochberg at a false-discovery rate of 0.1" in found.summary()
    assert Detector(model).fit(train, calibrate_on=held_out).anomaly_share(x) == share


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fdr": 0.0}, "fdr is 0.0: give the share"),
        ({"fdr": float("nan")}, "fdr is nan: give the share"),
        ({"fdr": 0.1, "quantile": 0.9}, "quantile 0.9 and fdr 0.1 each set a threshold"),
        ({"fdr": 0.1, "contamination": 0.2}, "contamination 0.2 and fdr 0.1 each set a threshold"),
        ({"contamination": "estimated", "quantile": 0.9}, "quantile 0.9 and contamination estimated each set"),
        ({"contamination": "auto"}, "contamination is 'auto': give a share of at most 0.5, unknown or estimated"),
        ({"fdr": 0.1}, "fdr needs held-out samples: set --data.val_fraction above 0"),
        ({"contamination": "unknown"}, "fdr needs held-out samples"),
        ({"fdr": 0.1, "calibrate_on": torch.rand(3, 6)}, "fdr 0.1 needs at least 9 held-out samples"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options, message):
    with pytest.raises(AezooError, match=message) as refused:
        detect(aezoo.create_model("dense_ae", (6,), latent_dim=2), torch.rand(9, 6), **options)
    assert "\n" not in str(refused.value)


def test_detector_without_calibration_controls_no_rate():
    detector = Detector(aezoo.create_model("dense_ae", (6,), latent_dim=2)).fit(torch.rand(9, 6))
    with pytest.raises(AezooError, match=r"fdr needs samples that the model was not trained on: call fit"):
        detector.predict(torch.rand(3, 6), fdr=0.1)
    with pytest.raises(AezooError, match=r"a share of anomalies needs samples"):
        detector.anomaly_share(torch.rand(3, 6))


def test_command_line_takes_rate_and_words(tmp_path, capsys, samples):
    model, _, _, x = samples
    np.savez(tmp_path / "data.npz", x_train=x[:100], x_val=x[100:200], x_test=x[200:])
    home = aezoo.save_model(model, tmp_path / "model")
    command = ["detect", "--ckpt_path", str(home), "--data", str(tmp_path / "data.npz"), "--data.scale", "none"]
    command += ["--baselines", "false", "--n_shown", "0", "--out", str(tmp_path / "out")]
    main([*command, "--fdr", "0.2"])
    assert "of 100 samples are flagged" in capsys.readouterr().out
    main([*command, "--contamination", "estimated"])
    assert "of the samples are anomalies by their p-values" in capsys.readouterr().out
    np.save(tmp_path / "other.npy", 3 * x[:50])
    main([*command, "--reference", str(tmp_path / "other.npy")])
    assert (
        f"drift: the scores differ from those of the 50 samples of {tmp_path / 'other.npy'}" in capsys.readouterr().out
    )
    for split in ("train", "val"):
        main([*command, "--input", str(tmp_path / "other.npy"), "--reference", split])
        assert f" ({split}) (Kolmogorov-Smirnov p " in capsys.readouterr().out
    assert "does not record what it was trained on: give --data.name SET or --reference FILE" in refused_in_one_line(
        capsys, "detect", "--ckpt_path", str(home), "--input", str(tmp_path / "other.npy"), "--reference", "val"
    )
    assert "--reference nowhere does not exist" in refused_in_one_line(capsys, *command, "--reference", "nowhere")
    assert "has no val split: use --reference train or test, or give --reference FILE" in refused_in_one_line(
        capsys, *command, "--data.name", "digits", "--data.val_fraction", "0", "--reference", "val"
    )
    main([*command, "--contamination", "0.2"])
    assert "the upper 20 % of the scores of 100 held-out samples" in capsys.readouterr().out
