"""Explanations: contributions sum to the score and match closed forms; files, neighbours, pages."""

import csv
import html
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from representative_models import others_slow
from scipy import special
from sklearn.neighbors import NearestNeighbors
from test_detect_combined import fitted, gaussian, pca_model

import aezoo
from aezoo.errors import AezooError
from aezoo.sklearn import AutoencoderDetector
from aezoo.tasks import detect_explain
from aezoo.tasks.detect import detect
from aezoo.tasks.detect_contributions import contributions, likelihood_contributions
from aezoo.tasks.detectors import Detector
from aezoo.tasks.samples import evaluation_mode

# models whose score is not a sum over the values of one reconstruction
OTHER_SCORES = {
    *("ae1svm", "alad", "dagmm", "deep_svdd", "draem", "ganomaly", "mae", "simmim", "msssim_vae", "perceptual_vae"),
    *("conditional_vae", "semi_supervised_vae", "cmvae", "mmvae", "mmvae_plus", "mopoe_vae", "hvae", "rhvae"),
    *("fre", "padim", "patchcore", "student_teacher", "reverse_distillation"),
}


def of_score(model, x, score="deviance", train=None):
    """Contributions to a score, and the score."""
    detector = Detector(model, score).fit(x if train is None else train)
    with evaluation_mode(model):
        return contributions(model, score, detector.scorer, x), torch.from_numpy(detector.decision_function(x))


def total(found):
    return found.values.flatten(1).sum(1) + sum(found.terms.values())


@pytest.mark.parametrize(
    "name", others_slow(aezoo.list_models(), ("dense_ae", "vae", "conv_ae", "msssim_vae", "compressai"))
)
def test_contributions_of_every_model_add_up_or_are_refused(name):
    torch.manual_seed(0)
    model, x = aezoo.create_model(name, (1, 8, 8)), torch.rand(4, 1, 8, 8)
    with evaluation_mode(model):
        if name in OTHER_SCORES:
            with pytest.raises(AezooError, match=f"the score of {name} is not a sum over the values of a sample"):
                likelihood_contributions(model, model.anomaly_score, x)
            return
        found, score = likelihood_contributions(model, model.anomaly_score, x), model.anomaly_score(x).double()
    assert found.values.shape == x.shape and torch.allclose(total(found), score, rtol=1e-5, atol=1e-4)
    assert "nll" not in vars(model)


LIKELIHOODS = ["bernoulli", "continuous_bernoulli", "gaussian:0.3", "sigmoid_gaussian", "laplace:0.2", "logcosh"]
LIKELIHOODS += ["discretised_logistic", "beta_binomial", "logit_laplace", "gaussian:learned"]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", ["dense_ae", "vae"])
def test_contributions_of_every_likelihood_add_up(name, likelihood):
    torch.manual_seed(0)
    model = aezoo.create_model(name, (12,), likelihood=likelihood, hidden_dims=(6,), latent_dim=3)
    x = (torch.rand(5, 12) * 255).round() / 255
    for score in ("deviance", "nll"):
        found, scores = of_score(model, x, score)
        assert torch.allclose(total(found), scores, rtol=1e-5, atol=1e-4)
        assert list(found.terms) == (["kl"] if name == "vae" else [])
        # an expected value contributes nothing to a deviance, whatever the others are
        assert score == "nll" or found.values.min() > -1e-5


def test_contributions_are_the_terms_of_the_formulas():
    torch.manual_seed(0)
    x = torch.rand(7, 6)
    model = aezoo.create_model("vae", (6,), likelihood="gaussian:0.3", latent_dim=2, hidden_dims=(5,)).eval()
    found, _ = of_score(model, x)
    with torch.no_grad():
        error, kl = x - model(x), model.kl(*model.posterior(x))
    assert torch.allclose(found.values, (error**2 / (2 * 0.09)).double(), rtol=1e-3, atol=1e-5)
    assert torch.allclose(found.terms["kl"], kl.double(), atol=1e-4)
    with_constant, _ = of_score(model, x, "nll")
    constant = torch.full_like(found.values, math.log(0.3 * math.sqrt(2 * math.pi)))
    assert torch.allclose(with_constant.values - found.values, constant, atol=1e-4)
    mse, scores = of_score(model, x, "mse")
    assert torch.allclose(mse.values, error.double() ** 2 / 6) and torch.allclose(total(mse), scores)
    sap, scores = of_score(model, x, "sap")
    assert torch.allclose(sap.values, error.double() ** 2) and torch.allclose(total(sap), scores)
    model = aezoo.create_model("dense_ae", (6,), likelihood="bernoulli", latent_dim=2, hidden_dims=(5,)).eval()
    with torch.no_grad():
        p = model(x).double().numpy()
    # the Kullback-Leibler divergence of two Bernoulli distributions
    expected = special.rel_entr(x.numpy(), p) + special.rel_entr(1 - x.numpy(), 1 - p)
    assert np.allclose(of_score(model, x)[0].values, expected, atol=1e-5)


def test_scales_of_single_values_are_kept_apart():
    torch.manual_seed(0)
    model, x = aezoo.create_model("dvae", (3, 8, 8)), torch.rand(2, 3, 8, 8)
    with evaluation_mode(model):
        found = likelihood_contributions(model, model.score, x)
        z, size = model.encode(x), 8 * 8
        mu, log_b = model.likelihood.split(model.decoder(z))
    y = 0.8 * x.double() + 0.1
    expected = (torch.logit(y) - mu).abs() / log_b.exp() + log_b + math.log(2) + (y * (1 - y)).log() - math.log(0.8)
    assert found.values[0].numel() == 3 * size and torch.allclose(found.values, expected, rtol=1e-3, atol=1e-3)


def test_weight_of_the_nll_and_rate_are_found():
    torch.manual_seed(0)
    model, x = aezoo.create_model("factorized_prior", (1, 16, 16), likelihood="gaussian:0.5"), torch.rand(3, 1, 16, 16)
    model.weight = 2.75
    found, scores = of_score(model, x)
    with torch.no_grad():
        error = x - model(x)
    assert torch.allclose(found.values, (2.75 * error**2 / (2 * 0.25)).double(), rtol=1e-3, atol=1e-4)
    assert list(found.terms) == ["rate"] and torch.allclose(total(found), scores)


def test_missing_values_contribute_nothing():
    torch.manual_seed(0)
    model, x = aezoo.create_model("mvae", (6,), latent_dim=2, hidden_dims=(4,)), torch.rand(3, 6)
    x[0, :3] = torch.nan
    found, scores = of_score(model, x)
    assert (found.values[0, :3] == 0).all() and (found.values[1:] != 0).all()
    assert torch.allclose(total(found), scores, atol=1e-5)


# ---- combined --------------------------------------------------------------------------------------------------------


def test_parts_of_combined_add_up_and_follow_the_terms():
    turn = np.linalg.qr(np.random.default_rng(7).normal(size=(6, 6)))[0].astype(np.float32)
    train, x = gaussian(400) @ turn, torch.from_numpy(gaussian(30, seed=1) @ turn)
    model = pca_model(train)
    with torch.no_grad():
        score = fitted(model, train)
        parts, scores = score.contributions(x), score(x)
    assert list(parts) == ["tails", "error", "code", "isolation"] and all(part.min() >= 0 for part in parts.values())
    assert torch.allclose(sum(parts.values()).sum(1), scores, rtol=1e-9)
    # by NumPy, as shares of each part
    z = pca_codes(train, x)
    with torch.no_grad():
        error, of_train = (x - model(x)).numpy(), train - model(torch.from_numpy(train)).numpy()
    terms = {
        "error": error**2 / (of_train**2).mean(0),
        # d/dx of (z - mu)' C^-1 (z - mu), times x - mean
        "code": np.abs((z[0] / z[1]) @ z[2] * (x.numpy() - train.mean(0))),
    }
    for name, term in terms.items():
        assert np.allclose(parts[name] / parts[name].sum(1, keepdim=True), term / term.sum(1, keepdims=True), rtol=1e-2,
                           atol=1e-3)  # fmt: skip


def pca_codes(train, x):
    """Centred codes of PCA, their variances, and the components."""
    from sklearn.decomposition import PCA

    pca = PCA(2).fit(train)
    return pca.transform(x.numpy()), pca.transform(train).var(0), pca.components_


def test_the_changed_value_contributes_most():
    train = gaussian(500)
    model = pca_model(train)
    for axis, size in ((0, 20), (4, 3)):
        x = gaussian(1, seed=3)
        x[0, axis] += size
        found, scores = of_score(model, torch.from_numpy(x), "combined", train)
        assert int(found.values.argmax()) == axis and found.values.max() > 0.45 * scores[0]


def test_a_code_without_gradient_is_shared_equally():
    train = gaussian(100)
    model = pca_model(train)
    encode = model.encode
    model.encode = lambda x: encode(x).detach()
    with torch.no_grad():
        part = fitted(model, train).contributions(torch.from_numpy(train[:3]))["code"]
    assert torch.allclose(part, part.mean(1, keepdim=True).expand(3, 6)) and (part > 0).all()


@pytest.mark.parametrize("score", ["mahalanobis", "nap", "deep_svdd", "elbo"])
def test_scores_of_codes_have_no_contributions(score, tmp_path):
    torch.manual_seed(0)  # with this seed some samples are above the threshold for every score
    model, x = aezoo.create_model("vae", (6,), latent_dim=2, hidden_dims=(4,)), torch.rand(20, 6)
    options = {"svdd_epochs": 1, "n_draws": 2, "baselines": False, "score": score, "explain": True, "n_shown": 2}
    found = detect(model, x[:5], fit_on=x, out=str(tmp_path), contamination=0.5, **options)
    assert f"no contributions: the score {score} is not a sum over the values of a sample" in found.summary()
    assert found.explain(0).contributions is None and len(found.explain(0).neighbours) == 3
    rows = list(csv.DictReader((tmp_path / "explanations.csv").read_text().splitlines()))
    assert len(rows) == 6 * found.is_anomaly.sum() and {row["contribution"] for row in rows} == {""}


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    """A model of a table, training samples, and new ones of which the first three have an anomalous value."""
    columns = ["a", "<b>&", "=c", "d", "e", "f"]
    train, x = gaussian(300), gaussian(40, seed=1)
    x[:3, 3] += 4
    return pca_model(train), pd.DataFrame(train, columns=columns), pd.DataFrame(x, columns=columns)


def explained(tmp_path, model, x, **options):
    found = detect(model, x, explain=True, baselines=False, out=str(tmp_path), **options)
    return found, pd.read_csv(tmp_path / "explanations.csv"), pd.read_csv(tmp_path / "neighbours.csv")


@pytest.mark.parametrize("score", ["combined", "deviance"])
def test_rows_of_flagged_samples_add_up_to_scores(tmp_path, table, score):
    model, train, x = table
    found, rows, near = explained(tmp_path, model, x, fit_on=train, score=score, contamination=0.05)
    flagged = np.flatnonzero(found.is_anomaly)
    assert set(rows["index"]) == set(flagged) == set(near["index"]) and {0, 1, 2} <= set(flagged)
    sums = rows.groupby("index")["contribution"].sum()
    assert np.allclose(sums[flagged], found.scores[flagged], rtol=1e-5)
    first = rows[(rows["index"] == 0)].set_index("rank")
    assert first.loc[1, "feature"] == "d" and np.isclose(first.loc[1, "value"], x.iloc[0, 3])
    with torch.no_grad():
        assert np.isclose(first.loc[1, "reconstruction"], model(torch.tensor(x.to_numpy()))[0, 3], rtol=1e-4)
    if score == "combined":
        assert np.allclose(rows[["tails", "error", "code", "isolation"]].sum(axis=1), rows["contribution"])
    search = NearestNeighbors(n_neighbors=3).fit(train.to_numpy())
    distances, neighbours = search.kneighbors(x.to_numpy()[[0]])
    assert near[near["index"] == 0]["neighbour"].tolist() == neighbours[0].tolist()
    assert np.allclose(near[near["index"] == 0]["distance"], distances[0], rtol=1e-4)


def test_page_is_self_contained_and_says_what_is_left_out(tmp_path, table):
    model, train, x = table
    found, _, _ = explained(tmp_path, model, x, fit_on=train, contamination=0.5, n_shown=2)
    page = (tmp_path / "explanations.html").read_text()
    assert "<b>&" not in page and html.escape("<b>&") in page
    assert page.count("<h2>") == 2 and f"{found.is_anomaly.sum()} of 40 samples" in page
    assert "the first 2 are shown" in page
    assert not re.search(r"https?:|<script|<link|src=(?!\"data:)|url\(", page)
    strangest = int(found.scores.argmax())
    assert page.index(f"sample {strangest}") < page.index("d</td>")


@pytest.mark.parametrize("shape", others_slow([(9,), (2, 16), (1, 8, 8), (3, 20, 20), (1, 4, 8, 8)], [(3, 20, 20)]))
def test_every_kind_of_sample_is_explained(tmp_path, shape):
    torch.manual_seed(0)
    model = aezoo.create_model("dense_ae", shape, latent_dim=3, hidden_dims=(5,))
    train, x = torch.rand(30, *shape), torch.rand(8, *shape)
    found, rows, near = explained(tmp_path, model, x, fit_on=train, contamination=0.5, n_shown=2)
    flagged = np.flatnonzero(found.is_anomaly)
    assert np.allclose(rows.groupby("index")["contribution"].sum()[flagged], found.scores[flagged], rtol=1e-4)
    # for large samples, only the values that contribute most have a row
    size = math.prod(shape)
    assert len(rows) == len(flagged) * (size if size <= 256 else 65)
    assert ("data:image/png;base64," in (tmp_path / "explanations.html").read_text()) == (len(shape) > 1)
    one = found.explain(int(flagged[0]))
    assert one.values.shape == one.contributions.shape == shape and one.neighbour_values.shape == (3, *shape)
    with torch.no_grad():
        codes = [model.eval().encode(part).numpy() if len(shape) > 1 else part.numpy() for part in (train, x)]
    nearest = NearestNeighbors(n_neighbors=3).fit(codes[0]).kneighbors(codes[1])[1]
    assert near[near["index"] == flagged[0]]["neighbour"].tolist() == nearest[flagged[0]].tolist()
    assert one.figure.axes and len(one.table) == min(size, 65 if size > 256 else size)


def test_no_sample_is_its_own_neighbour_and_no_anomaly_is_one(table):
    model, train, _ = table
    found = detect(model, train, baselines=False, contamination=0.1)
    normal = set(np.flatnonzero(~found.is_anomaly))
    for i in (0, int(found.scores.argmax()), int(found.scores.argmin())):
        one = found.explain(i)
        assert i not in one.neighbours and set(one.neighbours) <= normal and one.distances.min() > 0
        order = np.linalg.norm(train.to_numpy() - train.to_numpy()[i], axis=1).argsort()
        assert one.neighbours.tolist() == [j for j in order if j in normal and j != i][:3]


def test_explanation_of_one_sample(table):
    model, train, x = table
    found = detect(model, x, fit_on=train, score="combined", baselines=False)
    one = found.explain(0)
    assert np.isclose(one.contributions.sum(), one.score) and one.score == found.scores[0]
    assert np.allclose(one.values, x.iloc[0]) and "of d: " in one.summary().splitlines()[1]
    # the counterfactual has a lower score
    assert one.reconstruction_score < one.threshold < one.score
    assert found.explain(-1).index == 39
    with pytest.raises(AezooError, match="there is no sample 40: give a number from 0 to 39"):
        found.explain(40)


def test_many_samples_are_searched_in_part(monkeypatch, table):
    model, train, _ = table
    monkeypatch.setattr(detect_explain, "_MAX_VALUES", 6 * 10)
    found = detect(model, train, fit_on=train.copy(), baselines=False)
    assert "among 10 samples" in found.explain(0).text
    assert len({row["index"] for row in found.explainer.neighbour_rows()}) == 10 < found.is_anomaly.sum()


# ---- scikit-learn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"model": "vae", "latent_dim": 2}])
def test_estimator_says_which_features_contribute(settings):
    train, x = gaussian(200), gaussian(10, seed=1)
    x[0, 4] += 5
    detector = AutoencoderDetector(max_epochs=5, random_state=0, **settings).fit(train)
    found = detector.contributions(x)
    assert found.shape == x.shape and found[0].argmax() == 4
    rest = -detector.score_samples(x) - found.sum(1)
    if settings:
        model = detector.autoencoder_
        with torch.no_grad():
            kl = model.kl(*model.posterior(torch.from_numpy((x - detector.offset_of_scale_) / detector.scale_).float()))
        assert np.allclose(rest, kl, atol=1e-4)
    else:
        assert np.allclose(rest, 0, atol=1e-9)


def test_estimator_refuses_scores_that_are_not_sums():
    detector = AutoencoderDetector("deep_svdd", max_epochs=1, random_state=0).fit(gaussian(50))
    with pytest.raises(AezooError, match="the score of deep_svdd is not a sum over the values"):
        detector.contributions(gaussian(3))
