"""detect: scores compared with closed forms and other libraries, p-values, PyOD's conventions, all kinds of samples."""

import csv

import numpy as np
import pytest
import torch
from quiet_trainer import quiet_trainer
from representative_models import SLOW_REPRESENTATIVE, others_slow
from scipy import special, stats
from scipy.spatial.distance import cdist
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch.utils.data import DataLoader

import aezoo
from aezoo.data.source import ArrayDataset
from aezoo.errors import AezooError
from aezoo.tasks import detect_scores
from aezoo.tasks.detect import Detector, _reconstruction_errors, detect, p_values
from aezoo.tasks.detect_labels import ranking_metrics
from aezoo.tasks.detect_scores import Mahalanobis
from aezoo.tasks.detectors import Baseline
from aezoo.tasks.reconstruct import reconstruct
from aezoo.tasks.samples import SampleSet


def gaussian(n, d=6, seed=0):
    """Correlated normal data with a nonzero mean."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(0, 1, (d, d))
    return (rng.normal(0, 1, (n, d)) @ mix + 3).astype(np.float32)


def linear(d=6, latent_dim=None, seed=0):
    """A linear model with weights that are not orthogonal, and biases."""
    model = aezoo.create_model("linear_ae", (d,), latent_dim=latent_dim or d)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def blobs():
    """Vectors of three named classes, 40 of each in each split."""
    rng = np.random.default_rng(5)
    y = np.repeat(["cat", "dog", "eel"], 40)
    centre = {"cat": 0.2, "dog": 0.5, "eel": 0.9}
    parts = [np.array([rng.normal(centre[name], 0.05, 5) for name in y], np.float32) for _ in range(3)]
    return aezoo.DataModule.from_arrays(
        parts[0], y, x_val=parts[1], y_val=y, x_test=parts[2], y_test=y, scale="none", batch_size=16
    )


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_full_linear_code_mahalanobis_equals_data_mahalanobis():
    # a Mahalanobis distance is invariant to invertible linear maps
    train, x = gaussian(500), gaussian(100, seed=1)
    found = detect(linear(), x, score="mahalanobis", fit_on=train, baselines=False).scores
    exact = cdist(x, train.mean(0, keepdims=True), "mahalanobis", VI=np.linalg.inv(np.cov(train.T)))[:, 0] ** 2
    assert np.array_equal(found.argsort(), exact.argsort())
    assert np.allclose(found, exact, rtol=1e-3)


def test_narrow_code_mahalanobis_matches_scikit_learn():
    train, x, model = gaussian(500), gaussian(100, seed=1), linear(latent_dim=3)
    with torch.no_grad():
        codes, z = (model.eval().encode(torch.from_numpy(part)).double().numpy() for part in (train, x))
    found = Detector(model, "mahalanobis", batch_size=33).fit(train).decision_function(x)
    # scikit-learn divides by n
    assert np.allclose(found, EmpiricalCovariance().fit(codes).mahalanobis(z) * 499 / 500, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["mahalanobis", "nap"])
def test_training_scores_leave_one_out(score):
    train, model = gaussian(40), linear(latent_dim=3, seed=3)
    # only the input has variance in all of its directions for nap
    model.encoder[1].weight.data.mul_(1e-4)
    found = Detector(model, score).fit(train).decision_scores_
    refitted = [
        Detector(model, score).fit(np.delete(train, i, 0)).decision_function(train[i : i + 1])[0] for i in range(40)
    ]
    assert np.allclose(found, refitted, rtol=2e-2)


def test_nap_of_pca_is_residual_mahalanobis_distance():
    # x - x_hat is the projection on the other components, and its code is 0
    train, x = gaussian(500), gaussian(100, seed=1)
    pca = PCA(6).fit(train)
    model, V = linear(latent_dim=2), torch.from_numpy(pca.components_[:2])
    with torch.no_grad():
        model.encoder[1].weight.copy_(V)
        model.encoder[1].bias.copy_(-V @ torch.from_numpy(pca.mean_))
        model.decoder[0].weight.copy_(V.T)
        model.decoder[0].bias.copy_(torch.from_numpy(pca.mean_))
    found = detect(model, x, score="nap", fit_on=train, baselines=False).scores
    left_out = pca.transform(x)[:, 2:] ** 2 / (500 * pca.transform(train)[:, 2:].var(0))
    # float32 leaves small values in the first two
    assert np.allclose(found, left_out.sum(1), rtol=5e-3, atol=3e-5)


@pytest.mark.parametrize(("n", "m"), [(30, 8), (9, 8), (8, 8), (6, 40)])
@pytest.mark.parametrize("name", ["nap", "mahalanobis"])
def test_whitening_agrees_for_few_and_many_samples(n, m, name):
    rng = np.random.default_rng(0)
    # centred samples do not span at least one direction if n <= m
    train, x = (rng.normal(1, rng.uniform(0.5, 3, m), (k, m)) for k in (n, 5))

    def by_hand(train, x):
        centred = train - train.mean(0)
        squares = centred.T @ centred
        floor = 1e-10 * np.trace(squares) / m
        h = ((x - train.mean(0)) @ np.linalg.inv(squares + floor * np.eye(m)) * (x - train.mean(0))).sum(1)
        return h * (len(train) - 1 if name == "mahalanobis" else 1)

    def fitted(train):
        scorer = Mahalanobis(lambda x: x, name)
        scorer.fit(torch.from_numpy(train).split(4), len(train))
        return scorer

    scorer = fitted(train)
    assert np.allclose(scorer(torch.from_numpy(x)), by_hand(train, x), rtol=1e-3)
    left_out = scorer.leave_one_out(scorer(torch.from_numpy(train)).numpy())
    refitted = [by_hand(np.delete(train, i, 0), train[i : i + 1])[0] for i in range(n)]
    assert np.allclose(left_out, refitted, rtol=0.3 if n < m + 2 else 1e-3)  # of few samples, one makes a large part


def layers_by_hand(model, x):
    """The input and all layers of a dense encoder with ReLU in between, from its weights."""
    state = {name: p.detach().double().numpy() for name, p in model.encoder.named_parameters()}
    weights, biases = ([v for k, v in state.items() if k.endswith(kind)] for kind in ("weight", "bias"))
    h = [x.reshape(len(x), -1).astype(np.float64)]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        z = h[-1] @ weight.T + bias
        h.append(z if i == len(weights) - 1 else np.maximum(z, 0))
    return h


def test_sap_and_nap_match_paper_formulas():
    torch.manual_seed(0)
    model = aezoo.create_model("dense_ae", (12,), hidden_dims=(9, 7), latent_dim=4, activation="relu")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    rng = np.random.default_rng(0)
    train, x = (rng.uniform(0, 1, (n, 12)).astype(np.float32) for n in (300, 40))

    def d(x):
        with torch.no_grad():
            x_hat = model.eval()(torch.from_numpy(x)).numpy()
        pairs = zip(layers_by_hand(model, x), layers_by_hand(model, x_hat), strict=True)
        return np.concatenate([h - h_hat for h, h_hat in pairs], axis=1)

    assert d(x).shape[1] == 12 + 9 + 7 + 4
    sap = Detector(model, "sap").fit(train).decision_function(x)
    assert np.allclose(sap, (d(x) ** 2).sum(1), rtol=1e-4)
    # the code is a linear map of the layer before it, so four singular values are 0
    mu = d(train).mean(0)
    _, s, vt = np.linalg.svd(d(train) - mu, full_matrices=False)
    kept = s > 1e-6 * s[0]
    nap = Detector(model, "nap").fit(train).decision_function(x)
    assert np.allclose(nap, ((((d(x) - mu) @ vt.T)[:, kept] / s[kept]) ** 2).sum(1), rtol=1e-2)


def test_layer_features_are_activations_or_posterior_means():
    torch.manual_seed(0)
    x = torch.rand(5, 1, 8, 8)
    conv = aezoo.create_model("conv_ae", (1, 8, 8), hidden_dims=(3, 4), latent_dim=2, activation="relu").eval()
    resnet = aezoo.create_model("resnet_ae", (1, 8, 8), hidden_dims=(4, 8), latent_dim=2, activation="relu").eval()
    vae = aezoo.create_model("vae", (1, 8, 8), hidden_dims=(7,), latent_dim=2).eval()
    sae = aezoo.create_model("topk_sae", (1, 8, 8), latent_dim=9, k=2).eval()
    with torch.no_grad():
        for model, ends in ((conv, (2, 4)), (resnet, (1, 2, 3, 5)), (vae, (3,)), (sae, ())):
            x_hat = model(x)
            parts = [torch.nn.Sequential(*list(model.encoder)[:end]) for end in ends]
            pairs = [(x, x_hat), *((part(x), part(x_hat)) for part in parts)]
            pairs.append((model.encode(x), model.encode(x_hat)))
            expected = torch.cat([(h - h_hat).flatten(1) for h, h_hat in pairs], 1)
            assert torch.allclose(detect_scores.pathway(model, x), expected, atol=1e-6), type(model)


def test_nap_with_many_features_is_fitted_on_subset(monkeypatch):
    monkeypatch.setattr(detect_scores, "_MAX_FEATURES", 8)
    train, x, model = gaussian(300), gaussian(400, seed=1), linear(latent_dim=3)
    detector = Detector(model, "nap").fit(train)  # 9 features
    direct = detector.decision_function(train)
    left_out = ~np.isclose(direct, detector.decision_scores_)
    # the 8 / 2 samples used in the fit get leave-one-out scores; the others are not used in it
    assert left_out.sum() == 4 and len(direct) == 300
    part = np.flatnonzero(left_out)
    again = Detector(model, "nap").fit(train[part])
    assert np.allclose(again.decision_function(x), detector.decision_function(x), rtol=1e-3)
    monkeypatch.setattr(detect_scores, "_MAX_VALUES", 9 * 3)
    fewer = Detector(model, "nap").fit(train)
    assert (~np.isclose(fewer.decision_function(train), fewer.decision_scores_)).sum() == 3


@pytest.mark.parametrize("score", ["nll", "sap"])
def test_perfect_autoencoder_scores_are_constant(score):
    model = aezoo.create_model("linear_ae", (6,), latent_dim=6)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.eye(6) if p.ndim == 2 else torch.zeros(6))
    found = Detector(model, score).fit(gaussian(30)).decision_function(gaussian(9, seed=1))
    # the Gaussian likelihood has a constant: see aezoo.distributions.likelihoods
    assert np.allclose(found, 3 * np.log(np.pi) if score == "nll" else 0, atol=1e-5)


def linear_vae():
    model = aezoo.create_model("vae", (3,), latent_dim=2, hidden_dims=(), likelihood="gaussian:0.7")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("most", [2**26, 3 * 7000], ids=["at once", "in parts"])
def test_elbo_matches_linear_vae_closed_form_per_sample(monkeypatch, most):
    monkeypatch.setattr(detect_scores, "_MAX_VALUES", most)
    model, x = linear_vae(), np.random.default_rng(0).normal(0, 1, (12, 3)).astype(np.float32)
    encoder, decoder = (
        {k.rpartition(".")[2]: p.detach().double().numpy() for k, p in net.named_parameters()}
        for net in (model.encoder, model.decoder)
    )
    mu, log_var = np.split(x @ encoder["weight"].T + encoder["bias"], 2, axis=1)
    W, b, s2 = decoder["weight"], decoder["bias"], 0.7**2
    # E ||x - W z - b||^2 = ||x - W mu - b||^2 + sum_j sigma_j^2 ||W_j||^2
    error = ((x - mu @ W.T - b) ** 2).sum(1) + np.exp(log_var) @ (W**2).sum(0)
    kl = 0.5 * (mu**2 + np.exp(log_var) - 1 - log_var).sum(1)
    expected = error / (2 * s2) + 1.5 * np.log(2 * np.pi * s2) + kl
    found = Detector(model, "elbo", n_draws=20_000, batch_size=5).fit(x).decision_scores_
    assert np.allclose(found, expected, rtol=0.02)


def test_iwae_score_matches_linear_vae_likelihood():
    model, x = linear_vae(), np.random.default_rng(0).normal(0, 1, (12, 3)).astype(np.float32)
    decoder = {k.rpartition(".")[2]: p.detach().double().numpy() for k, p in model.decoder.named_parameters()}
    p_x = stats.multivariate_normal(decoder["bias"], decoder["weight"] @ decoder["weight"].T + 0.49 * np.eye(3))
    found = Detector(model, "iwae", n_draws=20_000).fit(x).decision_scores_
    assert np.allclose(found, -p_x.logpdf(x), atol=0.1)


# ---- threshold and p-values ------------------------------------------------------------------------------------------


def test_threshold_labels_and_probabilities_follow_pyod():
    # 201 scores, so that the threshold is one of them
    train, x = gaussian(201), gaussian(50, seed=1)
    detector = Detector(linear(latent_dim=2), contamination=0.1).fit(train)
    scores = detector.decision_scores_
    # pyod.models.base.BaseDetector, version 3.6: _process_decision_scores, predict, predict_proba
    assert detector.threshold_ == np.percentile(scores, 100 * (1 - 0.1))
    assert np.array_equal(detector.labels_, (scores > detector.threshold_).astype(int))
    assert detector.threshold_ in scores and detector.labels_.sum() == 20
    new = detector.decision_function(x)
    assert np.array_equal(detector.predict(x), (new > detector.threshold_).astype(int))
    assert set(detector.predict(np.concatenate([x, 100 * x])).tolist()) == {0, 1}
    low, high = scores.min(), scores.max()
    assert np.allclose(detector.predict_proba(x)[:, 1], ((new - low) / (high - low)).clip(0, 1))
    assert np.allclose(detector.predict_proba(x).sum(1), 1)
    assert np.allclose(detector.fit(train).decision_scores_, detector.decision_function(train))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "contamination"), [(50, 0.2), (200, 0.005), (1000, 0.123), (10, 0.5), (40, 0.1)])
def test_contamination_is_training_share_above_threshold(n, contamination):
    x = gaussian(n)
    detector = Detector(linear(latent_dim=2), contamination=contamination).fit(x)
    assert detector.labels_.sum() == round(n * contamination)
    rows = detect(linear(latent_dim=2), x, contamination=contamination, n_fit=n).rows
    assert [row["flagged"] for row in rows] == pytest.approx([contamination] * 5)


def test_p_values_count_reference_scores_at_least_as_large():
    assert p_values(np.array([0.0, 2.0, 9.0]), np.array([1.0, 2.0, 3.0, 2.0])).tolist() == [1.0, 4 / 5, 1 / 5]
    scores = np.array([3.0, 1.0, 2.0, 2.0])
    # each compared with the three others
    assert p_values(scores, scores, among=True).tolist() == [1 / 4, 4 / 4, 3 / 4, 3 / 4]


@pytest.mark.parametrize("score", ["nll", "mahalanobis", "nap"])
def test_p_values_of_new_normal_samples_are_uniform(score):
    detector = Detector(linear(latent_dim=3), score).fit(gaussian(10_000))
    found = detector.p_values(gaussian(1000, seed=3))
    assert stats.kstest(found, "uniform").pvalue > 0.05
    strange = detector.p_values(gaussian(50, seed=2) * 20)
    assert np.median(strange) < 0.01


def test_perfect_grey_costs_nll_but_no_deviance_nor_mse():
    """A perfect reconstruction of grey costs log 2 per value under a Bernoulli, one of white nothing."""
    model = aezoo.create_model("dense_ae", (9,))
    grey, white = torch.full((1, 9), 0.5), torch.ones(1, 9)
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.zero_()  # every output is 1/2
    scores = {name: Detector(model, name).fit(torch.rand(20, 9)) for name in ("mse", "nll", "deviance")}
    found = {
        name: np.concatenate([score.decision_function(x) for x in (grey, white)]) for name, score in scores.items()
    }
    assert found["mse"] == pytest.approx([0, 0.25]) and found["nll"] == pytest.approx([9 * np.log(2)] * 2)
    assert found["deviance"] == pytest.approx([0, 9 * np.log(2)], abs=1e-5)


@pytest.mark.parametrize("name", ["dense_ae", "vae", "conditional_vae", "mmvae", "mae", "deep_svdd"])
def test_anomaly_score_is_score_without_entropy_of_pixels(name):
    torch.manual_seed(0)
    model = aezoo.create_model(name, (1, 8, 8), likelihood="bernoulli")
    x = torch.rand(5, 1, 8, 8)
    if name == "mmvae":
        x[0, :, :4] = torch.nan
    known = x.nan_to_num(0).double().numpy()
    entropy = (special.entr(known) + special.entr(1 - known)).sum((1, 2, 3))  # deep_svdd also adds a distance
    with torch.no_grad():
        apart = model.eval().score(x) - model.anomaly_score(x)
    assert np.allclose(apart, 0 if name == "deep_svdd" else entropy, atol=1e-3)


@pytest.mark.slow
def test_default_score_finds_bursts_in_a_series():
    random = np.random.default_rng(0)
    x = np.sin(0.2 * np.arange(32 * 600)).reshape(-1, 32) + random.normal(0, 0.1, (600, 32))
    x[500:, 8:16] += random.normal(size=(100, 8))
    x = ((x + 2) / 4).clip(0, 1).astype(np.float32)
    model = aezoo.create_model("dense_ae", (32,), latent_dim=4, hidden_dims=(32,), lr=0.01)  # bernoulli
    loader = DataLoader(torch.from_numpy(x[:400]), 40)
    quiet_trainer(max_epochs=30).fit(model, loader, loader)
    found = {score: detect(model, x[400:], score=score, baselines=False).scores for score in ("deviance", "nll")}
    auroc = {score: roc_auc_score(np.arange(200) >= 100, scores) for score, scores in found.items()}
    assert auroc["deviance"] > 0.98 and auroc["nll"] < 0.8
    assert np.array_equal(found["deviance"], detect(model, x[400:], baselines=False).scores)


@pytest.mark.parametrize("score", ["nll", "mahalanobis", "sap", "nap", "combined"])
def test_held_out_p_values_are_uniform(score):
    # with 40 features and 120 samples, p-values by training scores are far too small
    train, held_out, x = gaussian(120, d=40), gaussian(1500, d=40, seed=1), gaussian(800, d=40, seed=2)
    model, pca = linear(d=40, latent_dim=20), PCA(20).fit(train)
    V, mean = torch.from_numpy(pca.components_), torch.from_numpy(pca.mean_)
    with torch.no_grad():
        for p, value in zip(model.parameters(), (V, -V @ mean, V.T, mean), strict=True):
            p.copy_(value)
    found = detect(model, x, score=score, fit_on=train, calibrate_on=held_out, baselines=False)
    assert stats.kstest(found.p_values, "uniform").pvalue > 0.01
    if score in ("nll", "sap", "combined"):
        fitted = detect(model, x, score=score, fit_on=train, baselines=False)
        assert stats.kstest(fitted.p_values, "uniform").pvalue < 1e-6 and "calibrate_on" in fitted.summary()


def test_nap_threshold_is_calibrated_with_n_features():
    # with scores of training samples, nearly all new samples would be flagged
    model = linear(d=40, latent_dim=20)
    flagged = Detector(model, "nap").fit(gaussian(60, d=40)).predict(gaussian(1000, d=40, seed=1)).mean()
    assert 0.02 < flagged < 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("dense_ae", 40), ("memory_ae", 40), ("dense_ae", 400)])
def test_share_of_new_samples_above_is_contamination(name, steps):
    train, held_out, x = np.split(np.random.default_rng(0).normal(size=(2480, 30)).astype(np.float32), [80, 480])
    model = aezoo.create_model(name, (30,), likelihood="gaussian", latent_dim=8, hidden_dims=(64,), lr=1e-2)
    data = aezoo.DataModule.from_arrays(train, x_val=held_out, x_test=x, scale="none", batch_size=20)
    quiet_trainer(max_steps=steps, check_val_every_n_epoch=steps).fit(model, data)
    found = detect(model, data)
    # for each detector, 400 held-out samples and new ones are exchangeable
    low, high = stats.betabinom(2000, 40, 401 - 40).ppf([0.001, 0.999]) / 2000
    assert all(low <= row["flagged"] <= high for row in found.rows), found.rows
    shares = "7.2 to 13 % of new normal samples exceed it, 95 % interval"
    assert f"the upper 10 % of the scores of 400 held-out samples ({shares})" in found.summary()
    by_class = Detector(model).fit(data)
    assert by_class.threshold_ == pytest.approx(found.threshold) and np.allclose(by_class.p_values(x), found.p_values)
    assert np.array_equal(by_class.predict(x), Detector(model).fit(train, calibrate_on=held_out).predict(x))
    if steps == 400:
        trained = detect(model, x, fit_on=train, baselines=False)
        assert trained.is_anomaly.mean() > 0.5 and "too many new samples will be flagged" in trained.summary()


def test_missing_values_have_zero_error_map():
    model, x = aezoo.create_model("mvae", (6,), latent_dim=2, hidden_dims=(4,)), torch.rand(3, 6)
    x[0, :3] = torch.nan
    error = _reconstruction_errors(model, x, x)[1].detach()
    assert (error == 0).nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]


def test_threshold_is_quantile_of_held_out_scores():
    train, held_out, x = gaussian(100), gaussian(80, seed=1) * 2, gaussian(20, seed=2)
    model = linear(latent_dim=2)
    found = detect(model, x, fit_on=train, calibrate_on=held_out, quantile=0.8)
    reference = Detector(model).fit(train).decision_function(held_out)
    assert np.isclose(found.threshold, np.quantile(reference, 0.8))
    assert np.allclose(found.p_values, [(1 + (reference >= s).sum()) / 81 for s in found.scores])
    knn = next(row for row in found.rows if row["method"] == "knn")
    near = NearestNeighbors(n_neighbors=5).fit(train)
    assert np.isclose(knn["threshold"], np.quantile(near.kneighbors(held_out)[0][:, 4], 0.8))
    assert "0.8 quantile of the scores of 80 held-out samples" in found.summary()
    with pytest.raises(AezooError, match="val_fraction"):
        detect(model, x, fit_on=train, quantile=0.8)


# ---- baselines and labels --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_baselines_match_scikit_learn():
    train, x = gaussian(120, d=8), gaussian(30, d=8, seed=1)
    found = {
        name: Baseline(name, n_components=3, batch_size=7)
        .fit(SampleSet.from_data(train))
        .decision_function(SampleSet.from_data(x))
        for name in ("pca", "mean", "knn", "isolation_forest")
    }
    pca = PCA(3).fit(train)
    expected = {
        "pca": ((x - pca.inverse_transform(pca.transform(x))) ** 2).sum(1),
        "mean": cdist(x, train.mean(0, keepdims=True), "sqeuclidean")[:, 0],
        "knn": np.sort(cdist(x, train), axis=1)[:, 4],
        "isolation_forest": -IsolationForest(random_state=0).fit(train).score_samples(x),
    }
    for name, scores in expected.items():
        assert np.allclose(found[name], scores, rtol=1e-3), name
    own = Baseline("knn").fit(SampleSet.from_data(train)).decision_scores_
    assert np.allclose(own, np.sort(cdist(train, train), axis=1)[:, 5], rtol=1e-3)


def test_auroc_and_aupr_match_scikit_learn():
    scores, anomalous = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    # the example in scikit-learn's documentation: 0.75 and 0.83...
    assert ranking_metrics(scores, anomalous) == {"auroc": 0.75, "aupr": pytest.approx(0.8333333)}
    for one_kind in (np.zeros(4, bool), np.ones(4, bool), None):
        assert ranking_metrics(scores, one_kind) == {"auroc": None, "aupr": None}


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "strange"), [({"normal": "dog"}, [0, 2]), ({"anomaly": "dog"}, [1])])
def test_protocol_removes_anomalies_from_training(protocol, strange):
    data, model = blobs(), linear(d=5, latent_dim=2)
    found = detect(model, data, **protocol)
    x, y = data.tensors("test")
    train, y_train = data.tensors("train")
    val, y_val = data.tensors("val")
    is_strange = np.isin(y.numpy(), strange)
    normal, normal_val = train[~np.isin(y_train, strange)], val[~np.isin(y_val, strange)]
    by_hand = Detector(model).fit(normal, calibrate_on=normal_val)
    assert np.isclose(found.threshold, by_hand.threshold_)
    reference = by_hand.decision_function(normal_val)
    assert np.allclose(found.p_values, p_values(by_hand.decision_function(x), reference))
    rows = {row["method"]: row for row in found.rows}
    assert rows["deviance"]["auroc"] == pytest.approx(roc_auc_score(is_strange, found.scores))
    distance = ((x - normal.mean(0)) ** 2).sum(1)
    assert rows["mean"]["aupr"] == pytest.approx(average_precision_score(is_strange, distance))
    assert f"{is_strange.sum()} of 120 samples are anomalies" in found.summary()
    assert f"{len(normal_val)} held-out samples" in found.summary()


def some_labels(data):
    """The same samples and labels, with two of three labels in each split removed."""
    parts = {stage: data.tensors(stage) for stage in ("train", "val", "test")}
    arrays = {f"x_{stage}": x.numpy() for stage, (x, _) in parts.items()}
    for stage, (_, y) in parts.items():
        arrays[f"y_{stage}"] = np.where(np.arange(len(y)) % 3 == 1, y, -1)
    arrays = {name.removesuffix("_train"): array for name, array in arrays.items()}
    return aezoo.DataModule.from_arrays(**arrays, scale="none", batch_size=16)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["normal", "anomaly"])
def test_unlabelled_samples_are_not_evaluated(protocol):
    data, model = some_labels(blobs()), linear(d=5, latent_dim=2)
    found = detect(model, data, **{protocol: "1"})
    y = data.tensors("test")[1]
    train, y_train = data.tensors("train")
    is_strange = (y == 1).numpy() != (protocol == "normal")
    normal = train[(y_train != -1) & ((y_train == 1) == (protocol == "normal"))]
    val, y_val = data.tensors("val")
    normal_val = val[(y_val != -1) & ((y_val == 1) == (protocol == "normal"))]
    assert np.isclose(found.threshold, Detector(model).fit(normal, calibrate_on=normal_val).threshold_)
    labelled = (y != -1).numpy()
    expected = roc_auc_score(is_strange[labelled], found.scores[labelled])
    assert len(found.scores) == 120 and found.rows[0]["auroc"] == pytest.approx(expected)
    n, n_strange = int(labelled.sum()), int(is_strange[labelled].sum())
    assert f"{n_strange} of {n} samples are anomalies; {120 - n} without a label" in found.summary()
    assert f"\n{int((y_train != -1).sum()) - len(normal)} anomalies among the training samples" in found.summary()


def test_missing_labels_are_not_a_class():
    data, model = some_labels(blobs()), linear(d=5, latent_dim=2)
    with pytest.raises(AezooError, match=r"no sample of .* has the label '-1': it has 0, 1, 2$"):
        detect(model, data, anomaly="-1")
    x, y = data.tensors("test")
    without = SampleSet(ArrayDataset(x, torch.full_like(y, -1)), class_names=("0", "1", "2"))
    with pytest.raises(AezooError, match="has no labels to say"):
        detect(model, without, anomaly="1")
    found = detect(model, data, fit_on=without, anomaly="1")
    val, y_val = data.tensors("val")
    normal = val[(y_val == 0) | (y_val == 2)]
    assert np.isclose(found.threshold, Detector(model).fit(x, calibrate_on=normal).threshold_)
    assert "among the training samples" not in found.summary()


@pytest.mark.slow
def test_split_scored_on_itself_leaves_one_out():
    data, model = blobs(), linear(d=5, latent_dim=2)
    x, y = data.tensors("train")
    train, val = SampleSet.from_data(data, "train"), SampleSet.from_data(data, "val")
    own = detect(model, SampleSet.from_data(data, "train"), fit_on=train, calibrate_on=train)
    assert np.allclose(own.p_values, stats.rankdata(-own.scores, "max") / 120)
    knn = next(row for row in own.rows if row["method"] == "knn")
    nearest = np.sort(cdist(x, x), axis=1)[:, 5]  # without the sample itself
    expected = np.sort(nearest)[-12]  # of 121, new samples exceed it with probability 12 / 121
    assert knn["threshold"] == pytest.approx(expected, rel=1e-4) and knn["flagged"] == pytest.approx(11 / 120)
    # of normal samples only
    one = detect(model, SampleSet.from_data(data, "train"), fit_on=train, calibrate_on=val, normal="dog")
    distances = cdist(x, x[y == 1])
    distances[np.flatnonzero(y == 1), np.arange(40)] = np.inf
    expected = roc_auc_score(y != 1, np.sort(distances, axis=1)[:, 4])
    assert next(row for row in one.rows if row["method"] == "knn")["auroc"] == pytest.approx(expected)
    part = detect(model, SampleSet.from_data(data, "train"), fit_on=val, calibrate_on=train, normal="dog")
    own_places = y.numpy() == 1
    assert np.allclose(part.p_values[own_places], stats.rankdata(-part.scores[own_places], "max") / 40)
    assert (part.p_values[~own_places] >= 1 / 41).all()


def test_baseline_fitted_on_a_part_scores_leave_one_out():
    x = gaussian(60)
    found = detect(linear(latent_dim=2), x, n_fit=30)
    baseline = Baseline("knn", n_fit=30).fit(SampleSet.from_data(x))
    distances = cdist(x, x[baseline.fitted_on])
    distances[baseline.fitted_on, np.arange(30)] = np.inf
    nearest = np.sort(distances, axis=1)[:, 4]
    flagged = (nearest > np.percentile(nearest[baseline.fitted_on], 90)).mean()
    assert next(row for row in found.rows if row["method"] == "knn")["flagged"] == pytest.approx(flagged)


@pytest.mark.slow
def test_training_on_anomalies_is_reported():
    data, model = blobs(), linear(d=5, latent_dim=2)
    assert "80 anomalies among the training samples" in detect(model, data, normal="dog").summary()
    assert "--data.train_classes" in detect(model, data, anomaly="dog").summary()
    parts = {stage: data.tensors(stage) for stage in ("train", "val", "test")}
    names = np.array(["cat", "dog", "eel"])
    arrays = {f"x_{s}": x.numpy() for s, (x, _) in parts.items()} | {f"y_{s}": names[y] for s, (_, y) in parts.items()}
    arrays = {name.removesuffix("_train"): array for name, array in arrays.items()}
    only = aezoo.DataModule.from_arrays(**arrays, scale="none", train_classes=["dog"])
    found, same = (detect(model, d, normal="dog", batch_size=40) for d in (only, data))
    assert "anomalies among the training" not in found.summary()
    assert np.allclose(found.p_values, same.p_values) and found.rows[0]["auroc"] == same.rows[0]["auroc"]


@pytest.mark.slow
def test_summary_reports_best_baseline():
    x, y = gaussian(100), np.repeat(["odd", "normal"], [50, 50])
    x[:50] += 40  # far from the mean of the others
    data = aezoo.DataModule.from_arrays(
        gaussian(90, seed=1), np.repeat("normal", 90), x_test=x, y_test=y, scale="none", val_fraction=0.2
    )
    noise = linear(latent_dim=2)
    with torch.no_grad():
        for p in noise.parameters():
            p.zero_()
        noise.decoder[0].bias.copy_(torch.from_numpy(x[:50].mean(0)))
    found = detect(noise, data, normal="normal")
    assert found.rows[0]["auroc"] < 0.5 and "a baseline separates them best: pca, by AUROC" in found.summary()
    with torch.no_grad():
        noise.decoder[0].bias.copy_(torch.from_numpy(x[50:].mean(0)))
    assert "a baseline" not in detect(noise, data, normal="normal").summary()


def test_labels_without_protocol_are_not_evaluated():
    found = detect(linear(d=5, latent_dim=2), blobs())
    assert "auroc" not in found.rows[0] and "--normal CLASS" in found.summary()


# ---- files and every kind of sample ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(9,), (2, 16), (1, 8, 8), (3, 9, 7), (1, 4, 8, 8)], ids=str)
def test_every_kind_of_sample_is_judged_and_written(tmp_path, shape):
    torch.manual_seed(0)
    model = aezoo.create_model("dense_ae", shape, latent_dim=3, hidden_dims=(5,))
    generator = torch.Generator().manual_seed(0)
    train, x = torch.rand(30, *shape, generator=generator), torch.rand(6, *shape, generator=generator)
    found = detect(model, x, score="sap,nap", fit_on=train, maps=True, n_shown=4, out=str(tmp_path), batch_size=4)
    assert [path.name for path in found.files] == ["maps.npy", "scores.csv", "detect.csv", "anomalies.png"]
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert list(rows[0]) == ["index", "score", "p_value", "is_anomaly", "nap"]
    nap = Detector(model, "nap", batch_size=4).fit(train).decision_function(x)
    assert np.allclose([float(row["nap"]) for row in rows], nap, rtol=1e-3)
    assert np.allclose([float(row["score"]) for row in rows], found.scores)
    with torch.no_grad():
        errors = (model.eval()(x) - x).abs()
    maps = np.load(tmp_path / "maps.npy")
    assert np.allclose(maps, errors, atol=1e-6)
    # the mean of a sample's map is the error that `reconstruct` reports
    told = reconstruct(model, x)
    assert np.allclose(maps.reshape(6, -1).mean(1), told.mae, rtol=1e-5)
    assert np.allclose((maps.reshape(6, -1) ** 2).mean(1), told.mse, rtol=1e-5)
    assert [row["method"] for row in found.rows] == ["sap", "nap", "pca", "mean", "knn", "isolation_forest"]
    assert (tmp_path / "anomalies.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", others_slow(SLOW_REPRESENTATIVE))
def test_models_of_each_kind_have_scores_of_code_and_layers(name):
    torch.manual_seed(0)
    model = aezoo.create_model(name, (1, 8, 8))
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    scores = ["nll", "mahalanobis", "combined", "sap", "nap"]
    if not hasattr(model, "encoder"):
        with pytest.raises(AezooError, match=f"nap reads the layers of the encoder, and {name} sets none"):
            detect(model, x[:4], score="nap", fit_on=x)
        scores = scores[:3]
    found = detect(model, x[:4], score=",".join(scores), fit_on=x, baselines=False)
    assert len(found.rows) == len(scores)
    if getattr(model, "log_likelihood", None) is not None:
        assert len(detect(model, x, score="elbo,iwae", n_draws=2, baselines=False).rows) == 2
        return
    if "elbo" in model.loss(x):
        assert len(detect(model, x, score="elbo", baselines=False).rows) == 1
    else:
        with pytest.raises(AezooError, match="elbo needs a model whose loss has an ELBO"):
            detect(model, x, score="elbo")
    with pytest.raises(AezooError, match="iwae needs a model with a log_likelihood"):
        detect(model, x, score="iwae")


def test_parquet_table_contains_labels(tmp_path):
    import pandas as pd

    data = blobs()
    detect(linear(d=5, latent_dim=2), data, table="parquet", out=str(tmp_path), baselines=False, n_shown=0)
    frame = pd.read_parquet(tmp_path / "scores.parquet")
    assert frame["label"].tolist() == [name for name in ("cat", "dog", "eel") for _ in range(40)]
    assert list(frame) == ["index", "score", "p_value", "is_anomaly", "label"]


@pytest.mark.parametrize("score", ["nll", "mahalanobis", "nap", "combined"])
@pytest.mark.parametrize("x", [np.full((1, 6), 0.5), np.full((7, 6), 0.5)], ids=["one sample", "constant samples"])
def test_degenerate_samples_give_finite_scores(score, x):
    found = detect(linear(latent_dim=2), x, score=score)
    assert np.isfinite(found.scores).all() and (found.p_values == 1).all() and not found.is_anomaly.any()


@pytest.mark.slow
def test_knn_fitted_on_itself_excludes_each_sample():
    x = gaussian(50)
    found = detect(linear(latent_dim=2), x, contamination=0.2)
    assert np.allclose(found.p_values, stats.rankdata(-found.scores, "max") / 50)
    assert found.is_anomaly.sum() == 10 and "these samples themselves" in found.summary()
    narrow = gaussian(12)
    left_out = Detector(linear(latent_dim=4), "mahalanobis").fit(narrow).decision_scores_
    assert np.allclose(detect(linear(latent_dim=4), narrow, score="mahalanobis").scores, left_out)


def test_lossless_pca_baseline_is_noted_and_others_run():
    found = detect(linear(), gaussian(20), fit_on=gaussian(50, seed=1))
    notes = {row["method"]: row["note"] for row in found.rows}
    assert "reconstruct exactly" in notes["pca"] and notes["knn"] is None
    assert "reconstruct exactly" in found.summary()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_draws():
    model, x = linear_vae(), np.random.default_rng(0).normal(0, 1, (12, 3)).astype(np.float32)
    first, again, other = (detect(model, x, score="elbo", seed=seed).scores for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "nothing"}, "unknown score 'nothing'"),
        ({"contamination": 0.0}, "contamination is 0.0"),
        ({"contamination": 0.6}, "contamination is 0.6"),
        ({"quantile": 1.0}, "quantile is 1.0"),
        ({"normal": "a", "anomaly": "b"}, "both given"),
        ({"normal": "a"}, "has no labels"),
        ({"n_fit": 1}, "n_fit"),
        ({"score": ""}, "unknown score ''"),
        ({"table": "txt"}, "table is 'txt'"),
        ({"n_shown": -1}, "n_shown"),
        ({"n_draws": 0}, "n_draws"),
        ({"n_draws": 10**12}, "n_draws takes 1 to 1,000,000"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_values_are_refused_in_one_line(options, message):
    with pytest.raises(AezooError, match=message) as refused:
        detect(linear(), gaussian(9), **options)
    assert "\n" not in str(refused.value)


def test_unfitted_detector_and_unknown_label_are_refused():
    with pytest.raises(AezooError, match="not fitted"):
        Detector(linear()).predict(gaussian(3))
    with pytest.raises(AezooError, match=r"no sample of .* has the label 'cow': it has cat, dog, eel"):
        detect(linear(d=5), blobs(), normal="cow")
