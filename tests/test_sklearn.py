"""The scikit-learn interface: its own estimator checks, and comparisons with its estimators."""

import copy
import logging
import pickle
import pickletools
import random

import joblib
import numpy as np
import pytest
import torch
from representative_models import SLOW_REPRESENTATIVE, others_slow
from scipy.special import kl_div
from scipy.stats import betabinom, false_discovery_control, loguniform, randint, spearmanr
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.covariance import EmpiricalCovariance
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

import aezoo
from aezoo.errors import AezooError
from aezoo.models.classic.dense_ae import DenseAE
from aezoo.sklearn import AutoencoderDenoiser, AutoencoderDetector, AutoencoderTransformer
from aezoo.speed import fast_loop
from aezoo.tasks.detect_calibration import held_out_threshold

ALL = (AutoencoderTransformer, AutoencoderDetector, AutoencoderDenoiser)
FEW = {"max_epochs": 2, "latent_dim": 2, "random_state": 0}


@pytest.fixture(scope="module")
def digits():
    return load_digits(return_X_y=True)


def gaussian(n, seed=0):
    """Samples of N(mean, C) with decreasing eigenvalues, in units that need no scaling."""
    random = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(random.normal(size=(6, 6)))
    return random.normal(size=(n, 6)) @ np.diag([2, 1.5, 0.5, 0.3, 0.2, 0.1]) @ axes.T + random.normal(size=6)


# these checks want exactly the contamination among training samples, but the threshold is from held-out samples
OF_TRAINING_SHARE = ("check_outliers_train", "check_outliers_fit_predict")


def of_training_share(estimator):
    held_out = isinstance(estimator, AutoencoderDetector)
    return dict.fromkeys(OF_TRAINING_SHARE, "the threshold is for new samples") if held_out else {}


# no other check is expected to fail; scikit-learn skips the check of array libraries unless SCIPY_ARRAY_API=1 is set
# before SciPy is imported, for a library that is not used here; with it, the check passes
@parametrize_with_checks([cls(**FEW) for cls in ALL], expected_failed_checks=of_training_share)
def test_scikit_learn_estimator_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("check", OF_TRAINING_SHARE)
def test_uncalibrated_detector_flags_training_share(check):
    getattr(estimator_checks, check)("AutoencoderDetector", AutoencoderDetector(**FEW, calibration_fraction=0.0))


@pytest.mark.slow
def test_supervised_models_use_labels(digits):
    X, y = (part[:900] for part in digits)
    names = np.array(list("abcdefghij"))
    half = np.where(np.arange(len(y)) % 2, y, -1)
    settings = {"scale": "unit", "likelihood": "bernoulli", "lr": 3e-3, "batch_size": 100, "random_state": 0}
    settings["max_epochs"] = 25
    model = AutoencoderTransformer("semi_supervised_vae", 4, **settings).fit(X, half)
    assert model.classes_.tolist() == list(range(10))
    guessed = model.transform(X)[:, 4:].argmax(1)  # a code is [z, one-hot y]
    assert (guessed == y)[half < 0].mean() > 0.85
    settings["max_epochs"], X, y = 1, X[:200], y[:200]
    named = AutoencoderTransformer("semi_supervised_vae", 4, **settings).fit(X, names[y])
    whole = AutoencoderTransformer("semi_supervised_vae", 4, **settings).fit(X, y)
    assert named.classes_.tolist() == names.tolist()
    np.testing.assert_array_equal(named.transform(X), whole.transform(X))
    again = pickle.loads(pickle.dumps(named)).partial_fit(X[:100], names[y[:100]])
    with pytest.raises(AezooError, match="'k', which the first fit did not have"):
        again.partial_fit(X[:2], ["a", "k"])
    assert not hasattr(again.fit(X), "classes_")
    with pytest.raises(AezooError, match="from its first call on"):
        again.partial_fit(X[:100], y[:100])


@pytest.mark.parametrize(
    ("y", "says"), [(np.linspace(0, 1, 30), "continuous"), ([-1] * 30, "all labels are -1"), ([0] * 29, "inconsistent")]
)
def test_invalid_labels_are_refused(y, says):
    with pytest.raises(ValueError, match=says):
        AutoencoderTransformer("conditional_vae", **FEW).fit(gaussian(30), y)


@pytest.mark.parametrize("name", ["triplet_ae", "triplet_vae", "ada_gvae", "mlvae"])
def test_weakly_supervised_models_use_labels(name):
    X, y = gaussian(30), np.array(list("ab") * 15)
    plain, told = (AutoencoderTransformer(name, **FEW).fit(X, labels) for labels in (None, y))
    assert told.classes_.tolist() == ["a", "b"] and not hasattr(plain, "classes_")
    assert not np.allclose(plain.transform(X), told.transform(X))


def test_unsupervised_models_ignore_labels():
    X = gaussian(30)
    plain, given = AutoencoderTransformer(**FEW).fit(X), AutoencoderTransformer(**FEW).fit(X, np.linspace(0, 1, 30))
    np.testing.assert_array_equal(plain.transform(X), given.transform(X))


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["none", "standard"])
def test_linear_autoencoder_reconstructions_match_pca(scale):
    X = gaussian(600)
    ours = AutoencoderTransformer(
        "linear_ae", 2, scale=scale, max_epochs=150, batch_size=100, lr=0.01, random_state=0
    ).fit(X)
    theirs = make_pipeline(StandardScaler() if scale == "standard" else "passthrough", PCA(2)).fit(X)
    expected = theirs.inverse_transform(theirs.transform(X))
    found = ours.inverse_transform(ours.transform(X))
    assert np.allclose(found, ours.reconstruct(X), atol=1e-5)
    # tolerance: 0.001 of the variance of the data, and an error within 1 % of the minimum
    s = X.std(0) if scale == "standard" else 1
    spread = (((X - X.mean(0)) / s) ** 2).mean()
    assert (((found - expected) / s) ** 2).mean() < 0.001 * spread
    assert (((found - X) / s) ** 2).mean() == pytest.approx((((expected - X) / s) ** 2).mean(), rel=0.01)


@pytest.mark.slow
def test_detector_ranks_gaussian_like_mahalanobis():
    # -ELBO of a linear VAE at its optimum is -log p(x) of probabilistic PCA (Lucas et al. 2019, arXiv:1911.02469)
    random = np.random.default_rng(0)
    axes, _ = np.linalg.qr(random.normal(size=(6, 2)))
    X = random.normal(size=(2400, 2)) @ (axes * [2, 1.2]).T + 0.4 * random.normal(size=(2400, 6)) + 1
    X, unseen = X[:2000], X[2000:]
    linear = {"hidden_dims": (), "lr_schedule": "cosine"}
    found = AutoencoderDetector(
        "vae", 2, scale="none", likelihood="gaussian:learned", model_params=linear, max_epochs=60, lr=0.02,
        batch_size=100, random_state=0,
    ).fit(X).score_samples(unseen)  # fmt: skip
    assert spearmanr(-found, EmpiricalCovariance().fit(X).mahalanobis(unseen))[0] > 0.98
    assert spearmanr(found, PCA(2).fit(X).score_samples(unseen))[0] > 0.98


@pytest.mark.slow
def test_linear_denoiser_is_wiener_filter():
    X, unseen = np.split(gaussian(4000), [3000])
    noisy = unseen + np.random.default_rng(5).normal(0, 0.5, unseen.shape)
    linear = {"hidden_dims": (), "lr_schedule": "cosine"}
    ours = AutoencoderDenoiser(
        latent_dim=6, corruption="gaussian:0.5", scale="none", model_params=linear, max_epochs=40, lr=0.02,
        random_state=0,
    ).fit(X)  # fmt: skip
    # E[x | x + noise] = mean + C (C + 0.25 I)^-1 (x + noise - mean)
    C = np.cov(X.T)
    expected = X.mean(0) + (noisy - X.mean(0)) @ np.linalg.solve(C + 0.25 * np.eye(6), C)
    found, error = ours.transform(noisy), ((expected - unseen) ** 2).mean()
    assert ((found - expected) ** 2).mean() < 0.005 * error
    # within 0.02 dB of its PSNR
    assert 10 * abs(np.log10(((found - unseen) ** 2).mean() / error)) < 0.02


@pytest.mark.parametrize("scale", ["none", "standard", "unit"])
def test_score_samples_is_in_data_units(scale):
    X = gaussian(80) * [1, 10, 100, 1, 1, 1]
    model = AutoencoderTransformer("dense_ae", scale=scale, likelihood="gaussian:0.5", **FEW).fit(X)
    # N(x_hat, (0.5 s_i)^2) for each feature, with the scale s_i
    deviation = 0.5 * {"none": np.ones(6), "standard": X.std(0), "unit": np.ptp(X, 0)}[scale]
    residual = (X - model.reconstruct(X)) / deviation
    expected = (-0.5 * residual**2 - np.log(deviation) - 0.5 * np.log(2 * np.pi)).sum(1)
    assert np.allclose(model.score_samples(X), expected, rtol=1e-3, atol=1e-3)
    assert model.score(X) == pytest.approx(expected.mean(), rel=1e-3)
    assert np.allclose(model.inverse_transform(model.transform(X)), model.reconstruct(X), rtol=1e-4, atol=1e-3)


def test_bernoulli_score_samples_is_unscaled():
    X = gaussian(80)
    settings = {"scale": "unit", "likelihood": "bernoulli", **FEW}
    model = AutoencoderTransformer("dense_ae", **settings).fit(X)
    detector = AutoencoderDetector("dense_ae", anomaly_score="deviance", **settings).fit(X)
    offset, scale = detector.offset_of_scale_, detector.scale_
    x, p = ((rows - X.min(0)) / np.ptp(X, 0) for rows in (X, model.reconstruct(X)))
    assert np.allclose(model.score_samples(X), (x * np.log(p) + (1 - x) * np.log1p(-p)).sum(1), atol=1e-4)
    # the detector compares with a perfect reconstruction; held-out samples may lie outside [0, 1]
    x, p = ((rows - offset) / scale for rows in (X, detector.reconstruct(X)))
    inside = ((x >= 0) & (x <= 1)).all(1)
    x = x.clip(0, 1)
    deviance = (kl_div(x, p) + kl_div(1 - x, 1 - p)).sum(1)
    assert inside.sum() >= 50 and np.allclose(detector.score_samples(X)[inside], -deviance[inside], atol=1e-4)


@pytest.mark.slow
def test_transformer_works_in_pipeline_and_grid_search(digits):
    X, y = digits
    codes = AutoencoderTransformer("dense_ae", 16, max_epochs=20, lr=5e-3, random_state=0)
    accuracy = cross_val_score(make_pipeline(codes, LogisticRegression(max_iter=2000)), X, y, cv=2).mean()
    assert accuracy > 0.85
    few = AutoencoderTransformer(max_epochs=5, lr=5e-3, random_state=0)
    search = GridSearchCV(few, {"latent_dim": [1, 16]}, cv=2).fit(X[:600])
    assert search.best_params_ == {"latent_dim": 16}


@pytest.mark.slow
def test_search_accepts_numpy_scalars():
    X = gaussian(60)
    drawn = {
        "latent_dim": np.arange(1, 4), "batch_size": randint(16, 64), "lr": loguniform(1e-3, 1e-2),
        "model_params": [{"hidden_dims": np.array([4])}, {"hidden_dims": [8, 4]}],
    }  # fmt: skip
    search = RandomizedSearchCV(AutoencoderTransformer(**FEW), drawn, n_iter=3, cv=2, error_score="raise")
    best = search.fit(X).best_estimator_
    assert best.autoencoder_.code_shape == (search.best_params_["latent_dim"],)
    assert np.isfinite(AutoencoderDetector(contamination=np.float64(0.2), max_epochs=np.int64(1)).fit(X).offset_)


@pytest.mark.slow
def test_a_search_in_two_processes_finds_the_same(digits):
    grid = {"latent_dim": [1, 8], "model": ["dense_ae", "vae"]}
    one, two = (
        GridSearchCV(AutoencoderTransformer(max_epochs=1, random_state=0), grid, cv=2, n_jobs=n).fit(digits[0][:200])
        for n in (1, 2)
    )
    assert np.array_equal(one.cv_results_["mean_test_score"], two.cv_results_["mean_test_score"])


def test_convolutional_model_reshapes_rows_to_images(digits):
    X = digits[0][:300]
    model = AutoencoderTransformer(
        "conv_ae", 8, sample_shape=(1, 8, 8), scale="unit", likelihood="bernoulli", max_epochs=2, random_state=0
    ).fit(X)
    assert model.autoencoder_.input_shape == (1, 8, 8) and model.transform(X).shape == (300, 8)
    inside = torch.from_numpy(((X - X.min(0)) / np.maximum(np.ptp(X, 0), 1e-9)).astype(np.float32)).view(-1, 1, 8, 8)
    expected = model.autoencoder_.encode(inside).detach().numpy()
    assert np.allclose(model.transform(X), expected, atol=1e-5)
    with pytest.raises(AezooError, match=r"sample_shape \(1, 9, 9\) has 81 values, X has 64 features"):
        clone(model).set_params(sample_shape=(1, 9, 9)).fit(X)


@pytest.mark.slow
def test_detector_finds_outliers():
    X, random = gaussian(400), np.random.default_rng(1)
    strange = X[:40] + random.normal(size=(40, 6))
    model = AutoencoderDetector(
        "linear_ae", 2, contamination=0.05, calibration_fraction=0.0, max_epochs=60, lr=0.01, random_state=0
    ).fit(X)
    assert (model.predict(X) == -1).mean() == pytest.approx(0.05, abs=0.003)
    assert model.offset_ == pytest.approx(np.percentile(model.score_samples(X), 5)) and model.n_calibration_ == 0
    assert np.allclose(model.decision_function(X), model.score_samples(X) - model.offset_)
    y = np.r_[np.zeros(360), np.ones(40)]
    assert roc_auc_score(y, -model.decision_function(np.r_[X[40:], strange])) > 0.9
    for bad in (0.6, 0, "auto"):
        with pytest.raises(AezooError, match="contamination"):
            clone(model).set_params(contamination=bad).fit(X)
    with pytest.raises(AezooError, match="calibration_fraction"):
        clone(model).set_params(calibration_fraction=0.6).fit(X)
    with pytest.raises(AezooError, match=r"a number in \(0, 0.5\], the share of outliers, got 'auto'"):
        AutoencoderDetector(contamination="auto").fit(X)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "epochs"), [("memory_ae", 10), ("dense_ae", 80)])
def test_share_of_new_samples_flagged_is_contamination(name, epochs):
    X = np.random.default_rng(0).normal(size=(2400, 30))
    model = AutoencoderDetector(name, max_epochs=epochs, batch_size=64, lr=1e-2, random_state=0).fit(X[:400])
    assert model.n_calibration_ == 80
    flagged = (model.predict(X[400:]) == -1).sum()
    # 80 held-out samples and new ones are exchangeable, also after partial_fit
    low, high = betabinom(2000, 8, 81 - 8).ppf([0.005, 0.995])
    assert low <= flagged <= high
    again = model.partial_fit(X[:400])
    assert low <= (again.predict(X[400:]) == -1).sum() <= high
    if epochs == 80:  # with the training samples, the threshold would be another
        trained = model.set_params(calibration_fraction=0.0, anomaly_score="deviance").fit(X[:400])
        assert (trained.predict(X[:400]) == -1).sum() == 40 and (trained.predict(X[400:]) == -1).mean() > 0.5


def test_auto_score_depends_on_model_and_shape():
    X = gaussian(40)
    chosen = {name: AutoencoderDetector(name, max_epochs=1).fit(X).chosen_ for name in ("dense_ae", "deep_svdd")}
    assert chosen["dense_ae"]["anomaly_score"] == "combined" and chosen["dense_ae"]["latent_dim"] == 2
    assert chosen["deep_svdd"]["anomaly_score"] == "deviance"
    pictures = np.random.default_rng(0).random((40, 64))
    found = AutoencoderDetector("conv_ae", sample_shape=(1, 8, 8), max_epochs=1).fit(pictures)
    assert found.chosen_["anomaly_score"] == "deviance" and found.chosen_["latent_dim"] > 2
    given = AutoencoderDetector(anomaly_score="deviance", max_epochs=1, random_state=0).fit(X)
    assert "anomaly_score" not in given.chosen_
    nll = aezoo.detect(given.autoencoder_, np.float32((X - given.offset_of_scale_) / given.scale_)).scores
    assert np.allclose(-given.score_samples(X), nll, rtol=1e-4)
    with pytest.raises(AezooError, match="anomaly_score is 'best': choose from auto, combined, deviance"):
        AutoencoderDetector(anomaly_score="best", **FEW).fit(X)


def test_default_detector_finds_anomalies_without_error():
    # a one-dimensional code represents outliers along the axis of largest variance exactly
    random = np.random.default_rng(0)
    X, new = (np.outer(random.normal(size=n), np.ones(5)) + 0.1 * random.normal(size=(n, 5)) for n in (400, 200))
    y, new = np.repeat([0, 1], 100), new + np.repeat([0, 6], 100)[:, None]
    aurocs = {
        score: roc_auc_score(y, -AutoencoderDetector("linear_ae", 1, anomaly_score=score, lr=1e-2, random_state=0)
                             .fit(X).score_samples(new))
        for score in ("auto", "deviance")
    }  # fmt: skip
    assert aurocs["auto"] > 0.99 > aurocs["deviance"]


def test_combined_score_is_pickled_with_its_model():
    X = gaussian(60)
    found = AutoencoderDetector(**FEW).fit(X)
    again = pickle.loads(pickle.dumps(found))
    assert np.array_equal(again.score_samples(X), found.score_samples(X)) and again.offset_ == found.offset_
    # a later fit with another score keeps nothing of it
    found.set_params(anomaly_score="deviance").fit(X)
    assert np.allclose(pickle.loads(pickle.dumps(found)).score_samples(X), found.score_samples(X), rtol=1e-6)


def test_detector_p_values_are_conformal_and_control_fdr():
    X, new = np.split(gaussian(500), [300])
    new[180:] += 20
    model = AutoencoderDetector(**FEW).fit(X)
    assert len(model.calibration_scores_) == model.n_calibration_ == 60
    scores = -model.score_samples(new)
    p = np.array([(1 + (model.calibration_scores_ >= score).sum()) / 61 for score in scores])
    assert model.p_values(new) == pytest.approx(p)
    # 6 of 60 calibration samples, or one in ten new ones, have a p-value of at most 0.1
    assert np.array_equal(model.predict(new) == -1, p <= 0.1)
    assert np.array_equal(model.predict(new, fdr=0.2) == -1, false_discovery_control(p) <= 0.2)
    assert 15 < (model.predict(new, fdr=0.2) == -1).sum() < 40
    share = model.anomaly_share(new)
    assert 0 <= share.low <= 0.1 <= share.high and share.low <= share.share <= share.high
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict(new, fdr=0.2), model.predict(new, fdr=0.2))
    with pytest.raises(AezooError, match=r"fdr 0.01 needs at least 99 held-out samples; with 60"):
        model.predict(new, fdr=0.01)
    with pytest.raises(AezooError, match="fdr needs samples that training leaves out: set calibration_fraction above"):
        AutoencoderDetector(**FEW, calibration_fraction=0.0).fit(X).predict(new, fdr=0.1)


def test_small_sets_hold_out_enough_samples_for_threshold():
    counts = {n: AutoencoderDetector(**FEW).fit(gaussian(n)).n_calibration_ for n in (1, 2, 12, 30, 100)}
    assert counts == {1: 0, 2: 1, 12: 6, 30: 9, 100: 20}


@pytest.mark.slow
def test_denoiser_reduces_noise(digits):
    X = digits[0] / 16
    noise = np.random.default_rng(0).normal(0, 0.3, X.shape)
    model = AutoencoderDenoiser(
        latent_dim=32, corruption="gaussian:0.3", scale="none", max_epochs=20, random_state=0
    ).fit(X[:1500])
    clean = model.transform((X + noise)[1500:])
    assert ((clean - X[1500:]) ** 2).mean() < 0.5 * (noise[1500:] ** 2).mean()
    with pytest.raises(AezooError, match="dense_ae is not trained on corrupted samples"):
        AutoencoderDenoiser("dense_ae").fit(X)


@pytest.mark.slow
@pytest.mark.parametrize("cls", ALL)
def test_copies_of_estimators_are_equal(cls, tmp_path):
    X, new = gaussian(50), cls(**FEW, model_params={"hidden_dims": (8,)})
    assert pickle.loads(pickle.dumps(new)).get_params() == new.get_params()
    model = pickle.loads(pickle.dumps(new)).fit(X)
    joblib.dump(model, tmp_path / "model")
    for again in (copy.deepcopy(model), joblib.load(tmp_path / "model")):
        assert np.array_equal(again.score_samples(X), model.score_samples(X))
        assert vars(again).keys() == vars(model).keys()
        assert np.array_equal(again.partial_fit(X).reconstruct(X), copy.deepcopy(model).partial_fit(X).reconstruct(X))


@pytest.mark.parametrize("cls", ALL)
def test_pickle_contains_safetensors_and_restores_the_estimator(cls):
    X = gaussian(50)
    model = cls(**FEW).fit(X)
    content = pickle.dumps(model)
    named = [arg for code, arg, _ in pickletools.genops(content) if code.name in ("SHORT_BINUNICODE", "BINUNICODE")]
    assert "aezoo.sklearn" in named
    assert not {name for name in named if str(name).startswith(("torch", "aezoo.models", "lightning"))}
    again = pickle.loads(content)
    assert np.array_equal(again.score_samples(X), model.score_samples(X))
    assert again.get_params() == model.get_params()


def test_pickle_larger_than_its_weights_is_refused():
    model = AutoencoderTransformer(**FEW).fit(gaussian(30))
    state = model.__getstate__()
    name, settings, content = state["_saved"]
    state["_saved"] = (name, {**settings, "hidden_dims": (100_000, 100_000)}, content)
    with pytest.raises(AezooError, match="does not describe a dense_ae"):
        AutoencoderTransformer().__setstate__(state)


@pytest.mark.parametrize("n", [1, 2, 3, 129])
@pytest.mark.parametrize("cls", ALL)
def test_small_sample_counts_are_supported(cls, n):
    X = gaussian(n)
    model = cls(**FEW).fit(X)
    assert np.isfinite(model.score_samples(X)).all() and model.reconstruct(X).shape == (n, 6)
    assert np.allclose(model.score_samples(X[:1]), model.score_samples(X)[:1])


def test_pandas_frames_are_supported():
    import pandas as pd

    X = pd.DataFrame(gaussian(40), columns=list("abcdef"), index=range(100, 140))
    model = AutoencoderTransformer(**FEW).set_output(transform="pandas").fit(X)
    codes = model.transform(X)
    assert list(codes.columns) == ["autoencodertransformer0", "autoencodertransformer1"] and codes.index[0] == 100
    assert list(model.feature_names_in_) == list("abcdef")
    assert np.allclose(model.inverse_transform(codes), model.reconstruct(X), atol=1e-5)
    clean = AutoencoderDenoiser(**FEW).set_output(transform="pandas").fit(X).transform(X)
    assert list(clean.columns) == list("abcdef")
    # matching names give no warning, in fit either
    assert (AutoencoderDetector(**FEW, calibration_fraction=0.0).fit_predict(X) == -1).sum() == 4
    parts = ColumnTransformer(
        [("codes", AutoencoderTransformer(**FEW), ["a", "b", "c"]), ("rest", "passthrough", ["d"])]
    )
    both = make_union(parts, AutoencoderTransformer("vae", **FEW)).set_output(transform="pandas").fit(X).transform(X)
    assert both.shape == (40, 5) and "columntransformer__rest__d" in both.columns


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtype_is_kept(dtype):
    X = gaussian(30).astype(dtype)
    model = AutoencoderTransformer(**FEW).fit(X)
    codes, clean = model.transform(X), AutoencoderDenoiser(**FEW).fit_transform(X)
    assert codes.dtype == model.inverse_transform(codes).dtype == clean.dtype == dtype


def test_estimator_ignores_torch_default_dtype():
    X, model = gaussian(10), AutoencoderTransformer(**FEW)
    codes = model.fit(X).transform(X)
    torch.set_default_dtype(torch.float64)
    try:
        assert np.allclose(copy.deepcopy(model).transform(X), codes)
        assert pickle.loads(pickle.dumps(model.fit(X))).transform(X).shape == codes.shape
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("light", [True, False])
def test_random_state_is_deterministic_and_keeps_global_rng(light, monkeypatch):
    if not light:  # Lightning's own loop also seeds NumPy and Python, which other libraries' models may use
        monkeypatch.setattr(fast_loop, "install_fast_loop", lambda trainer: False)
    X = gaussian(60)

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    def seed():
        torch.manual_seed(7), np.random.seed(7), random.seed(7)

    seed()
    expected = draw()
    seed()
    one, two = (AutoencoderTransformer("vae", **FEW).fit(X) for _ in range(2))
    assert np.array_equal(one.transform(X), two.transform(X))
    assert draw() == expected
    other = AutoencoderTransformer("vae", **{**FEW, "random_state": 1}).fit(X)
    assert not np.allclose(one.transform(X), other.transform(X))


def test_random_state_instance_and_none_follow_numpy():
    X, few = gaussian(20), {"max_epochs": 1, "latent_dim": 2}
    drawn = AutoencoderTransformer(**few, random_state=np.random.RandomState(0))
    one, two = drawn.fit(X).transform(X), drawn.fit(X).transform(X)
    again = AutoencoderTransformer(**few, random_state=np.random.RandomState(0)).fit(X).transform(X)
    assert np.array_equal(one, again) and not np.allclose(one, two)
    codes = []
    for _ in range(2):
        np.random.seed(3)
        codes.append(AutoencoderTransformer(**few).fit(X).transform(X))
    assert np.array_equal(*codes) and not np.allclose(codes[0], AutoencoderTransformer(**few).fit(X).transform(X))


@pytest.mark.slow
def test_parallel_threads_give_independent_results(digits):
    X = digits[0][:300]

    def score(seed):
        return AutoencoderTransformer("vae", max_epochs=3, random_state=seed).fit(X).score(X)

    level = logging.getLogger("lightning.pytorch").level
    together = joblib.Parallel(2, backend="threading")(joblib.delayed(score)(seed) for seed in range(4))
    assert together == [score(seed) for seed in range(4)]
    assert logging.getLogger("lightning.pytorch").level == level


def test_fit_is_silent_and_writes_no_files(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    model = AutoencoderTransformer(**FEW).fit(gaussian(20))
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    model.set_params(verbose=1).fit(gaussian(20))
    assert "Epoch" in capfd.readouterr().out and not list(tmp_path.iterdir())


def test_interrupted_fit_raises_and_keeps_previous_fit(monkeypatch):
    X = gaussian(40)
    model = AutoencoderTransformer(**FEW).fit(X)
    before = model.score_samples(X)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(DenseAE, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.fit(10 * X)
    assert np.array_equal(model.score_samples(X), before) and model.n_epochs_ == 2
    with pytest.raises(KeyboardInterrupt):
        model.fit(X[:, :3])
    assert np.array_equal(model.score_samples(X), before) and model.n_features_in_ == X.shape[1]
    with pytest.raises(KeyboardInterrupt):
        model.partial_fit(X)
    assert not model.autoencoder_.training and model.autoencoder_._trainer is None


@pytest.mark.slow
def test_partial_fit_continues_training():
    X = gaussian(200)
    model = AutoencoderTransformer(**{**FEW, "max_epochs": 1})
    scores = [model.partial_fit(X[:100]).partial_fit(X[100:]).score(X) for _ in range(10)]
    assert scores[-1] > scores[0] and model.n_epochs_ == 20
    first = AutoencoderTransformer(**FEW).partial_fit(X[:100])
    assert np.allclose(first.offset_of_scale_, X[:100].mean(0))
    assert np.allclose(model.offset_of_scale_, X[:100].mean(0))


def left_out(x):
    """The held-out samples of a call, and those that are trained on."""
    n = min(max(round(0.2 * len(x)), 9), len(x) // 2)
    rows = np.random.default_rng(0).permutation(len(x))
    return x[rows[:n]], x[np.sort(rows[n:])]


@pytest.mark.parametrize("score", ["combined", "deviance"])
def test_partial_fit_threshold_uses_last_held_out_samples(score):
    parts = np.split(gaussian(300), 5)
    model = AutoencoderDetector(**FEW, anomaly_score=score, stream_window=100)
    for part in parts:
        model.partial_fit(part)
    # 20 of 100 samples; each call holds out 12
    held_out = np.concatenate([left_out(part)[0] for part in parts])[-20:]
    assert model.n_calibration_ == 20
    assert model.offset_ == pytest.approx(-held_out_threshold(-model.score_samples(held_out), 0.1))
    if score == "combined":
        fitted = np.concatenate([left_out(part)[1] for part in parts])[-80:]
        anew = model._fit_combined(fitted)
        assert all(torch.equal(anew.state[name], value) for name, value in model._combined.state.items())
    again = pickle.loads(pickle.dumps(model))
    assert again.partial_fit(parts[0]).offset_ == copy.deepcopy(model).partial_fit(parts[0]).offset_
    # a new fit starts again and discards held-out samples
    assert model.fit(parts[0]).n_calibration_ == 12 and not hasattr(model, "_recent")
    with pytest.raises(AezooError, match="stream_window must be at least 1, got 0"):
        model.set_params(stream_window=0).partial_fit(parts[0])


@pytest.mark.slow
def test_threshold_follows_a_drifting_stream():
    rng = np.random.default_rng(0)
    first = AutoencoderDetector(**FEW).fit(rng.normal(size=(200, 4)))
    # with a window of 1, the threshold is that of the few samples of the last call
    follows, forgets = (AutoencoderDetector(**FEW, stream_window=n) for n in (400, 1))
    shares = {"follows": [], "forgets": []}
    for step in range(25):
        mean = 0.1 * step
        new = rng.normal(mean, 1, (1000, 4))
        if step > 10:
            shares["follows"].append((follows.predict(new) == -1).mean())
            shares["forgets"].append((forgets.predict(new) == -1).mean())
        part = rng.normal(mean, 1, (40, 4))
        follows.partial_fit(part), forgets.partial_fit(part)
    assert (first.predict(new) == -1).mean() > 0.5
    # on average somewhat above the contamination of 0.1, since the distribution drifts
    assert 0.07 < np.mean(shares["follows"]) < 0.2
    assert np.std(shares["follows"]) < np.std(shares["forgets"])
    strange = new + rng.choice([-6, 6], size=new.shape)
    assert (follows.predict(strange) == -1).mean() > 0.8


def test_partial_fit_continues_step_schedules():
    X = gaussian(60)
    model = AutoencoderTransformer("annealed_vae", batch_size=20, **FEW).partial_fit(X).partial_fit(X)
    assert pickle.loads(pickle.dumps(model)).partial_fit(X).autoencoder_.steps == 8
    assert model.fit(X).autoencoder_.steps == 5


def test_partial_fit_uses_current_learning_rate():
    X = gaussian(60)
    model = AutoencoderTransformer(**FEW).partial_fit(X)
    before = model.transform(X)
    np.testing.assert_allclose(model.set_params(lr=1e-9).partial_fit(X).transform(X), before, atol=1e-5)
    model.set_params(model_params={"lr": 1e-2}).partial_fit(X)
    assert np.abs(model.transform(X) - before).max() > 1e-2


@pytest.mark.parametrize("name", others_slow(SLOW_REPRESENTATIVE))
def test_models_of_each_kind_work_as_estimators(name):
    X = load_digits().data[:40]
    model = AutoencoderTransformer(name, 32, sample_shape=(1, 8, 8), max_epochs=1, random_state=0).fit(X)
    found = model.transform(X)
    assert len(found) == 40 and np.isfinite(found).all() and np.isfinite(model.score(X))
    assert np.array_equal(pickle.loads(pickle.dumps(model)).transform(X), found)


def test_index_prior_model_works_as_estimator():
    model = AutoencoderTransformer("index_transformer", max_epochs=1, random_state=0).fit(gaussian(60))
    assert model.autoencoder_.tokenizer.likelihood.__class__.__name__ == "Gaussian"
    assert np.isfinite(model.transform(gaussian(60))).all()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"scale": "robust"}, "scale is 'robust': choose from"),
        ({"max_epochs": 0}, "max_epochs must be at least 1, got 0"),
        ({"max_epochs": "3"}, "max_epochs takes a whole number"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size takes a whole number"),
        ({"model": "dense_aee"}, "did you mean"),
        ({"model": None}, "model takes a text"),
        ({"latent_dim": 2.5}, "latent_dim takes a whole number"),
        ({"sample_shape": 6}, "sample_shape takes a list"),
        ({"model_params": {"hidden": (3,)}}, "did you mean 'hidden_dims'"),
        ({"model_params": [1]}, "model_params takes a mapping"),
        ({"model_params": {"input_shape": (6,)}}, "give sample_shape"),
        ({"model": "topk_sae"}, r"latent_dim=2, got 16: give it in model_params=\{.k.: \.\.\.\}"),
        ({"model": "vae", "latent_dim": 0}, "latent_dim must be at least 1, got 0$"),
        ({"lr": 0}, "lr must be above 0"),
        ({"device": "abacus"}, "no device"),
    ],
)
def test_bad_values_are_refused(bad, words):
    with pytest.raises(AezooError, match=words):
        AutoencoderTransformer(**{**FEW, **bad}).fit(gaussian(10))


@pytest.mark.parametrize("scale", ["none", "standard", "unit"])
def test_values_beyond_float32_are_refused(scale):
    X, words = gaussian(10), "too large for float32"
    model = AutoencoderTransformer(scale=scale, **FEW).fit(X)
    with pytest.raises(AezooError, match=words):
        model.transform(1e39 * X)
    if scale != "unit":  # scaled values are between 0 and 1, but a variance of 1e600 overflows
        with pytest.raises(AezooError, match=words):
            model.fit(1e300 * X)


# ---- missing parts ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [AutoencoderTransformer, AutoencoderDetector])
def test_models_of_missing_parts_take_nan(estimator):
    X = np.random.default_rng(0).normal(size=(60, 6)) @ np.diag([1, 2, 3, 1, 2, 3]) + 5
    X[::3, :3] = np.nan
    made = estimator("mvae", **FEW).fit(X)
    assert made.__sklearn_tags__().input_tags.allow_nan and not estimator("vae").__sklearn_tags__().input_tags.allow_nan
    assert np.isfinite(made.score_samples(X)).all() and np.isfinite(made.reconstruct(X)).all()
    if estimator is AutoencoderTransformer:  # the detector holds samples out
        assert made.offset_of_scale_ == pytest.approx(np.nanmean(X, 0))
        assert made.scale_ == pytest.approx(np.nanstd(X, 0))
    for rows in (np.s_[4, 1], np.s_[4, :]):
        wrong = X.copy()
        wrong[rows] = np.nan
        for method in (made.fit, made.score_samples):
            with pytest.raises(AezooError, match="rows of X contain NaN in some values of a part or in all parts"):
                method(wrong)
    with pytest.raises(ValueError, match="contains NaN"):
        estimator("vae", **FEW).fit(X)


@pytest.mark.slow
def test_missing_values_do_not_change_log_likelihood():
    """Changing the units of missing values does not change the log-likelihood of a sample."""
    X = np.random.default_rng(0).normal(size=(60, 6))
    X[::3, :3] = np.nan
    wide = X * np.array([10, 10, 10, 1, 1, 1])
    scores = [AutoencoderTransformer("mvae", scale="standard", **FEW).fit(x).score_samples(x) for x in (X, wide)]
    lacks = np.isnan(X[:, 0])
    assert scores[0][lacks] == pytest.approx(scores[1][lacks], abs=1e-3)
    assert scores[0][~lacks] == pytest.approx(scores[1][~lacks] + 3 * np.log(10), abs=1e-3)
