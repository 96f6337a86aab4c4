"""combined: compared with SciPy, NumPy and scikit-learn, and the anomalies that each of its scores detects."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score

import aezoo
from aezoo.tasks import detect_combined
from aezoo.tasks.detect import Detector
from aezoo.tasks.detect_combined import CombinedScore
from aezoo.tasks.detect_isolation import fit_forest, forest_score, split_shares

SPREAD = np.array([3, 2, 0.5, 0.4, 0.3, 0.2])


def gaussian(n, seed=0):
    """Independent values, the first two with the largest variance."""
    return (np.random.default_rng(seed).normal(size=(n, 6)) * SPREAD + 1).astype(np.float32)


def pca_model(train, latent_dim=2):
    """A linear autoencoder with the weights of PCA."""
    model, pca = aezoo.create_model("linear_ae", (train.shape[1],), latent_dim=latent_dim), PCA(latent_dim).fit(train)
    V, mean = torch.from_numpy(pca.components_), torch.from_numpy(pca.mean_)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), (V, -V @ mean, V.T, mean), strict=True):
            parameter.copy_(value)
    return model.eval()


def fitted(model, train):
    found = CombinedScore(model)
    with torch.no_grad():
        found.fit([torch.from_numpy(part) for part in np.array_split(train, 3)], len(train))
    return found


def parts(model, train, x):
    """The four scores by NumPy, SciPy and scikit-learn, (N, 4), in the order of PARTS."""
    with torch.no_grad():
        (z, x_hat), (z_train, hat_train) = (
            [out.double().numpy() for out in (model.encode(values), model(values))]
            for values in (torch.from_numpy(x), torch.from_numpy(train))
        )
    error = ((x - x_hat) ** 2 / ((train - hat_train) ** 2).mean(0)).mean(1)
    tails = []
    for values, ours in zip(x.T, train.T, strict=True):
        # percentages, with one more sample at each end
        ends = [-np.inf, *ours, np.inf]
        left = np.array([stats.percentileofscore(ends, value, "weak") for value in values])
        right = np.array([100 - stats.percentileofscore(ends, value, "strict") for value in values])
        tails.append(-np.log(np.minimum(1, np.minimum(left, right) / 50)))
    code = EmpiricalCovariance().fit(z_train).mahalanobis(z) / z.shape[1]
    isolation = -IsolationForest(random_state=0).fit(train).score_samples(x)
    return np.stack([np.mean(tails, 0), error, code, isolation], 1)


def test_score_is_fishers_statistic_of_four_scores():
    # rotated, so that the two components leave an error in each value
    turn = np.linalg.qr(np.random.default_rng(7).normal(size=(6, 6)))[0].astype(np.float32)
    train, x = gaussian(400) @ turn, gaussian(60, seed=1) @ turn
    model = pca_model(train)
    reference, new = parts(model, train, train), parts(model, train, x)
    # leave-one-out distances of training codes: divide by 1 - 1/n - h
    reference[:, 2] /= 1 - 1 / 400 - 2 * reference[:, 2] / 400
    inside = (new < reference.max(0)).all(1) & (new > reference.min(0)).all(1)
    assert inside.sum() > 40
    # SciPy's statistic is -2 sum log p; between two training scores, log p is between theirs
    larger = (reference[:, None] > new).sum(0)
    low, high = (
        [stats.combine_pvalues(row, "fisher").statistic / 2 for row in (larger[inside] + shift) / 401]
        for shift in (0.5, -0.5)
    )
    with torch.no_grad():
        found = fitted(model, train)(torch.from_numpy(x[inside])).numpy()
    assert ((np.array(low) <= found + 1e-3) & (found <= np.array(high) + 1e-3)).all()


def test_scores_of_training_samples_are_left_out():
    train = gaussian(25)
    model = pca_model(train)
    found = fitted(model, train)
    without = []
    for i in range(25):
        others = CombinedScore(model)
        with torch.no_grad():
            others.fit([torch.from_numpy(np.delete(train, i, 0))], 24)
            z, error = others._code_and_error(torch.from_numpy(train[i : i + 1]))
            without.append(float(others._parts(torch.from_numpy(train[i : i + 1]).double(), error, z)[0, 2]))
    assert np.allclose(found.state["sorted"][2], np.sort(without), rtol=1e-4)


def test_log_p_is_exponential_for_new_normal_samples():
    train, x = gaussian(4000), gaussian(1500, seed=2)
    model = pca_model(train)
    found = fitted(model, train)
    with torch.no_grad():
        z, error = found._code_and_error(torch.from_numpy(x))
    for score, reference in zip(
        found._parts(torch.from_numpy(x).double(), error, z).T, found.state["sorted"], strict=True
    ):
        surprise = detect_combined._surprise(score.contiguous(), reference)
        assert stats.kstest(surprise.numpy(), "expon").pvalue > 0.01


@pytest.mark.parametrize(
    ("axis", "size"), [(0, 20), (4, 3)], ids=["along the code, without error", "across the code, with error"]
)
def test_anomalies_along_and_across_the_code_are_found(axis, size):
    train, x = gaussian(500), gaussian(200, seed=3)
    strange = x.copy()
    strange[:, axis] += size
    model = pca_model(train)
    y = np.repeat([0, 1], 200)
    scores = {name: Detector(model, name).fit(train).decision_function(np.r_[x, strange]) for name in
              ("combined", "mse", "mahalanobis")}  # fmt: skip
    aurocs = {name: roc_auc_score(y, score) for name, score in scores.items()}
    assert aurocs["combined"] > 0.99
    assert aurocs["mse" if axis == 0 else "mahalanobis"] < 0.6


def test_score_never_decreases_and_does_not_saturate():
    train = gaussian(300)
    model = pca_model(train)
    direction = torch.tensor(SPREAD, dtype=torch.float32)
    x = torch.ones(1, 6) + torch.linspace(0, 1e4, 2001)[:, None] * direction
    with torch.no_grad():
        found = fitted(model, train)(x)
    assert (found.diff() >= 0).all() and (found.diff()[1:] > 0).all()


def test_units_of_the_values_do_not_matter():
    train, x = gaussian(300), gaussian(50, seed=4)
    factor = np.float32([1e3, 1e-3, 1, 10, 0.1, 1])
    model, scaled = pca_model(train), pca_model(train)
    with torch.no_grad():
        scaled.encoder[1].weight.div_(torch.from_numpy(factor))
        scaled.decoder[0].weight.mul_(torch.from_numpy(factor)[:, None])
        scaled.decoder[0].bias.mul_(torch.from_numpy(factor))
        first = fitted(model, train)(torch.from_numpy(x))
        second = CombinedScore(scaled)
        second.fit([torch.from_numpy(train * factor)], 300)
        assert torch.allclose(first, second(torch.from_numpy(x * factor)), rtol=1e-3, atol=1e-3)


def test_tail_scores_depend_only_on_ranks():
    # a log-normal value, and ties
    random = np.random.default_rng(0)
    train = np.stack([random.normal(size=300), np.exp(3 * random.normal(size=300)), random.integers(0, 3, 300)], 1)
    train, x = np.float32(train[:200]), torch.from_numpy(np.float32(train[200:]))
    logs = train.copy()
    logs[:, 1] = np.log(train[:, 1])
    x_logs = x.clone()
    x_logs[:, 1] = x[:, 1].log()
    raw, log = (
        detect_combined._tails(new, detect_combined._kept_values(torch.from_numpy(old)))
        for new, old in ((x, train), (x_logs, logs))
    )
    assert torch.equal(raw, log) and (raw >= 0).all() and raw.max() < np.log(202 / 2) + 1e-6


def test_missing_values_count_in_no_tail():
    train = torch.from_numpy(gaussian(50))
    lacking = train.clone()
    lacking[10:, 0] = torch.nan
    full, some = (detect_combined._kept_values(x.double()) for x in (train[:10], lacking))
    x = torch.from_numpy(gaussian(20, seed=1)).double()
    assert torch.equal(detect_combined._tails(x, full)[:, 0], detect_combined._tails(x, some)[:, 0])
    assert detect_combined._tails(lacking.double(), some)[10:, 0].isnan().all()


def test_large_codes_count_by_their_own_variances(monkeypatch):
    train, x = gaussian(400), gaussian(30, seed=1)
    model = pca_model(train)
    # codes of PCA are uncorrelated, so the covariance is diagonal
    full = fitted(model, train)
    monkeypatch.setattr(detect_combined, "_MAX_CODE", 1)
    diagonal = fitted(model, train)
    assert diagonal.state["code_scale"].ndim == 1
    with torch.no_grad():
        assert torch.allclose(full(torch.from_numpy(x)), diagonal(torch.from_numpy(x)), atol=1e-3)


@pytest.mark.parametrize("n", [2, 3, 60, 3000])
def test_isolation_is_that_of_scikit_learn(n):
    random = np.random.default_rng(n)
    train, x = (np.float32(np.c_[random.normal(size=(rows, 3)), random.integers(0, 3, (rows, 2))]) for rows in (n, 200))
    # ties with training values, and samples far away
    x[:50], x[50:60] = train[random.integers(0, n, 50)], 1e6 * x[50:60]
    trees = fit_forest(torch.from_numpy(train).double(), seed=3)
    expected = -IsolationForest(random_state=3).fit(train).score_samples(x)
    assert np.allclose(forest_score(torch.from_numpy(x), trees), expected, rtol=1e-5)


def test_split_shares_are_gains_along_paths():
    train = gaussian(300)
    x = torch.from_numpy(gaussian(20, seed=1))
    forest = IsolationForest(random_state=0).fit(train)
    norm = 2 * (np.log(255) + np.euler_gamma) - 2 * 255 / 256
    expected = np.zeros((20, 6))
    for estimator in forest.estimators_:
        tree = estimator.tree_
        for row, leaf in enumerate(estimator.apply(x.numpy())):
            path, n = estimator.decision_path(x.numpy()[row : row + 1]).indices, tree.n_node_samples
            m = n[leaf]
            further = 0 if m == 1 else 1 if m == 2 else 2 * (np.log(m - 1) + np.euler_gamma) - 2 * (m - 1) / m
            for node, following in itertools.pairwise(path):
                gain = np.log(n[node] / n[following])
                expected[row, tree.feature[node]] += gain * norm / (len(path) - 1 + further)
    assert np.allclose(split_shares(x, fit_forest(torch.from_numpy(train), 0)), expected, rtol=1e-5)


def test_missing_values_are_isolated_as_the_training_mean():
    train = gaussian(80)
    lacking = torch.from_numpy(gaussian(5, seed=1)).double()
    lacking[:, 2] = torch.nan
    mean = torch.from_numpy(train.mean(0)).double()
    filled = torch.where(lacking.isnan(), mean, lacking)
    found = fitted(pca_model(train), train)
    zeros = torch.zeros(5, 6, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.float64)
    some, full = (found._parts(x, *zeros)[:, 3] for x in (lacking, filled))
    assert some.isfinite().all() and torch.allclose(some, full)
