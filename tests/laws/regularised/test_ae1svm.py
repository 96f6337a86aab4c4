"""Laws of AE-1SVM (Nguyen & Vien 2018)."""

import math
from typing import Any

import numpy as np
import pytest
import sklearn
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from one_class_laws import (  # noqa: F401
    CODE,
    SHAPE,
    all_grads,
    images,
    small,
    test_one_class_training_detects_malignant_tumours,
    test_two_ranks_equal_one_process,
)
from sklearn.linear_model import SGDOneClassSVM
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import OneClassSVM
from torch import Tensor
from torch.utils.data import DataLoader

import aezoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def ae1svm(**settings: Any) -> Any:
    return small("ae1svm", **{"n_frequencies": 20, "bandwidth": 0.5, **settings})


def outside_by_hand(model: Any, z: np.ndarray) -> np.ndarray:
    """The margin rho - w'phi(z), positive outside, by NumPy."""
    angles = z @ model.omega_DR.numpy()
    phi = np.hstack([np.cos(angles), np.sin(angles)]) / math.sqrt(angles.shape[1])
    return model.rho.item() - phi @ model.w_F.detach().numpy()


@torch.no_grad()
def median_threshold(model: Any, x: Tensor) -> Tensor:
    """A threshold rho with half of an even number of samples outside."""
    return (model.features(model.encode(x)) @ model.w_F).quantile(0.5)


# ---- AE-1SVM: random Fourier features --------------------------------------------------------------------------------


@pytest.mark.parametrize("bandwidth", [0.7, 3.0])
def test_products_of_features_tend_to_the_gaussian_kernel(bandwidth: float) -> None:
    z = torch.randn(40, CODE, dtype=torch.float64)
    kernel = torch.from_numpy(rbf_kernel(z.numpy(), gamma=1 / (2 * bandwidth**2)))
    assert 0.05 < kernel.mean() < 0.95
    for n in (100, 10_000):
        phi = ae1svm(n_frequencies=n, bandwidth=bandwidth).features(z)
        assert phi.shape == (40, 2 * n)
        off = phi @ phi.T - kernel
        assert off.diagonal().abs().max() < 1e-12
        # 780 means over n cosines with a variance of at most 1/2
        assert off.abs().max() < 4.5 / math.sqrt(2 * n)
        assert off.square().mean() > 1e-3 / n  # an estimate, not the exact kernel
    # PyOD's ae1svm multiplies frequencies by sigma, and its features have no factor
    wrong = torch.cos(z @ (torch.randn(CODE, 10_000, dtype=torch.float64) * bandwidth))
    assert (wrong @ wrong.T - kernel).abs().max() > 1


def test_fourier_frequencies_are_seeded_and_saved() -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(ae1svm())
    first, again, other = (model.omega_DR for model in found)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert "omega_DR" in found[0].state_dict() and "omega_DR" not in dict(found[0].named_parameters())
    assert 0.5 * ae1svm(n_frequencies=5000).omega_DR.std().item() == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_are_not_rounded_under_autocast(dtype: torch.dtype) -> None:
    model: Any = aezoo.create_model("ae1svm", SHAPE, latent_dim=CODE, bandwidth=0.01)
    with torch.no_grad():
        model.w_F.normal_()
    z = torch.rand(50, CODE)
    with torch.autocast("cpu", dtype):
        found = model.hinge_margin(z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model.hinge_margin(z), rtol=1e-5, atol=1e-5)


# ---- AE-1SVM: the loss and its optimum -------------------------------------------------------------------------------


@pytest.mark.parametrize("nu", [0.05, 0.5, 1.0])
def test_the_loss_is_error_norm_threshold_and_hinge(nu: float, shifted: Any) -> None:
    model, x = shifted(ae1svm(nu=nu, svm_weight=3.0)), images(30)
    with torch.no_grad():
        z = model.encode(x).numpy()
        model.rho.copy_(median_threshold(model, x))
        error = (x - model(x)).flatten(1).square().sum(1).mean().item() + 9 * math.log(math.pi)
    out = outside_by_hand(model, z)
    assert (out > 0).mean() == 0.5
    hinge = np.maximum(0, out).sum() / (nu * 30)
    svm = 0.5 * np.linalg.norm(model.w_F.detach().numpy()) ** 2 - model.rho.item() + hinge
    terms = model.loss(x)
    assert terms["nll"].item() == pytest.approx(error, rel=1e-9)
    assert terms["svm"].item() == pytest.approx(svm, rel=1e-9)
    assert terms["loss"].item() == pytest.approx(error + 3 * svm, rel=1e-9)
    # mean(m + |m|) / nu, as in https://github.com/minh-nghia/AE-1SVM, is twice the hinge
    assert np.mean(out + np.abs(out)) / nu == pytest.approx(2 * hinge)


def test_svm_gradients_count_outliers(shifted: Any) -> None:
    model, x, nu = shifted(ae1svm(nu=0.25)), images(20), 0.25
    with torch.no_grad():
        phi = model.features(model.encode(x))
        model.rho.copy_(median_threshold(model, x))
    out = torch.from_numpy(outside_by_hand(model, model.encode(x).detach().numpy())) > 0
    assert out.sum() == 10
    rho, w = all_grads(model.loss(x)["svm"], [model.rho, model.w_F])
    torch.testing.assert_close(rho, out.double().mean() / nu - 1)
    torch.testing.assert_close(w, model.w_F.detach() - phi[out].sum(0) / (nu * 20))


def test_only_outliers_give_a_gradient_to_the_encoder(shifted: Any) -> None:
    model, x = shifted(ae1svm()), images()
    with torch.no_grad():
        model.rho.copy_(model.rho - 1 + model.features(model.encode(x)).mv(model.w_F).min())
    assert model.score(x).max() < 0
    assert not any(g.any() for g in all_grads(model.loss(x)["svm"], model.encoder.parameters()))
    with torch.no_grad():
        model.rho += 5
    assert all(g.abs().max() > 1e-6 for g in all_grads(model.loss(x)["svm"], model.encoder.parameters()))
    assert not any(g.any() for g in all_grads(model.loss(x)["svm"], model.decoder.parameters()))


class Codes:
    """Samples with some outliers, and a model whose encoder is the identity."""

    def __init__(self, nu: float, n_frequencies: int) -> None:
        torch.manual_seed(3)
        self.x = torch.cat([0.3 * torch.randn(140, CODE), torch.randn(20, CODE)]).double()
        self.model = small(
            "ae1svm", input_shape=(CODE,), hidden_dims=(), code_activation="identity",
            nu=nu, n_frequencies=n_frequencies, bandwidth=1.0,
        )  # fmt: skip
        with torch.no_grad():
            for p in self.model.encoder.parameters():
                p.copy_(torch.eye(CODE) if p.ndim == 2 else torch.zeros(CODE))
        self.phi = self.model.features(self.x).numpy()

    def svm_term(self, w: np.ndarray, rho: float) -> float:
        """The SVM term with these parameters."""
        with torch.no_grad():
            self.model.w_F.copy_(torch.from_numpy(w))
            self.model.rho.fill_(rho)
            return float(self.model.loss(self.x)["svm"])


@pytest.mark.parametrize("nu", [0.1, 0.4])
def test_scikit_learn_one_class_svm_minimises_loss(nu: float) -> None:
    codes = Codes(nu, 30)
    learnt = OneClassSVM(kernel="linear", nu=nu, tol=1e-10).fit(codes.phi)
    # libsvm's problem is scaled by nu N
    scale = nu * len(codes.x)
    w, rho = learnt.coef_[0] / scale, learnt.offset_[0] / scale
    least = codes.svm_term(w, rho)
    assert least == pytest.approx(-0.5 * np.sum(w**2), rel=1e-6)  # the optimum of the dual
    expected = -learnt.decision_function(codes.phi) / scale
    np.testing.assert_allclose(codes.model.score(codes.x).detach(), expected, rtol=1e-9, atol=1e-12)
    assert nu - 0.08 < (codes.model.score(codes.x) > 1e-6).double().mean() <= nu
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        off = rng.normal(0, size, (20, len(w) + 1))
        assert all(codes.svm_term(w + each[1:] / math.sqrt(len(w)), rho + each[0]) > least for each in off)
    if tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 9):
        return  # the averaged SGD of older versions gives another result
    # SGDOneClassSVM minimises the same objective times nu
    stochastic = SGDOneClassSVM(nu=nu, max_iter=2000, tol=None, random_state=0, average=1000).fit(codes.phi)
    assert codes.svm_term(stochastic.coef_.ravel(), stochastic.offset_[0]) == pytest.approx(least, rel=0.02)


@pytest.mark.slow
def test_training_reaches_one_class_svm_optimum(adam: Any) -> None:
    codes, nu = Codes(0.2, 30), 0.2
    for net in (codes.model.encoder, codes.model.decoder):
        net.requires_grad_(False)
    adam(codes.model, codes.x, steps=500, lr=0.03, batch=len(codes.x))
    found = codes.model.score(codes.x).detach().numpy()
    learnt = OneClassSVM(kernel="linear", nu=nu, tol=1e-10).fit(codes.phi)
    least = -0.5 * np.sum((learnt.coef_ / (nu * 160)) ** 2)
    assert codes.model.loss(codes.x)["svm"].item() == pytest.approx(least, rel=2e-3)
    assert np.corrcoef(found, -learnt.decision_function(codes.phi))[0, 1] > 0.999
    assert np.mean(found > 0) == pytest.approx(nu, abs=0.08)


@pytest.mark.parametrize("nu", [0.2, 1.0])
def test_first_batch_initialises_at_nu_1_optimum(nu: float, quiet: Any) -> None:
    codes = Codes(nu, 30)
    with torch.no_grad():
        codes.model.init_from_data(codes.x)
    np.testing.assert_allclose(codes.model.w_F.detach(), codes.phi.mean(0), rtol=1e-9, atol=1e-12)
    assert (codes.model.score(codes.x) > 1e-12).double().mean() == pytest.approx(nu, abs=1 / 150)
    if nu == 1:  # the only feasible point of the dual has weights 1 / N, and strong duality holds
        dual = -0.5 * np.mean(codes.phi @ codes.phi.T)
        assert codes.model.loss(codes.x)["svm"].item() == pytest.approx(dual)
    # training initialises once
    quiet(max_epochs=1).fit(codes.model, DataLoader([codes.x] * 2, batch_size=None))  # type: ignore[arg-type]
    assert codes.model.started and (codes.model.w_F - torch.from_numpy(codes.phi.mean(0))).abs().max() < 0.01


def test_many_fourier_features_give_gaussian_kernel_svm() -> None:
    nu = 0.2
    codes = Codes(nu, 3000)
    linear, kernel = (
        OneClassSVM(nu=nu, tol=1e-8, **settings).fit(x)
        for settings, x in (({"kernel": "linear"}, codes.phi), ({"gamma": 0.5}, codes.x.numpy()))
    )
    codes.svm_term(linear.coef_[0] / (nu * 160), linear.offset_[0] / (nu * 160))
    new = torch.randn(200, CODE).double()
    score, expected = codes.model.score(new).detach().numpy(), -kernel.decision_function(new.numpy())
    assert np.corrcoef(score, expected)[0, 1] > 0.995
    assert np.mean((score > 0) == (expected > 0)) > 0.95


# ---- AE-1SVM: neutral limit and score --------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_zero_svm_weight_equals_dense_ae(likelihood: str, shifted: Any) -> None:
    parent = shifted(small("dense_ae", likelihood=likelihood, code_activation="sigmoid"))
    x, named = images(), dict(parent.named_parameters())
    for weight in (0.0, 1.0):
        model = shifted(ae1svm(likelihood=likelihood, svm_weight=weight))
        model.load_state_dict(model.state_dict() | parent.state_dict())
        found, expected = model.loss(x), parent.loss(x)
        same = all(
            torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
            for mine, theirs in zip(
                all_grads(found["loss"], [p for key, p in model.named_parameters() if key in named]),
                all_grads(expected["loss"], [named[key] for key, _ in model.named_parameters() if key in named]),
                strict=True,
            )
        )
        assert same == torch.isclose(found["loss"], expected["loss"]).item() == (weight == 0)
        torch.testing.assert_close(found["nll"], expected["nll"])
        torch.testing.assert_close(model(x), parent(x))


def test_score_is_distance_beyond_svm_boundary(shifted: Any) -> None:
    model, x = shifted(ae1svm()).eval(), images(20)
    score, z = model.score(x).detach(), model.encode(x).detach().numpy()
    np.testing.assert_allclose(score, outside_by_hand(model, z), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.score(x[4:5]).detach(), score[4:5])
    # the score of PyOD's ae1svm is the reconstruction error, which does not depend on the SVM
    with torch.no_grad():
        model.w_F.zero_()
    assert model.score(x).unique().numel() == 1


@pytest.mark.slow
def test_distant_codes_are_outliers(adam: Any) -> None:
    codes = Codes(0.1, 300)
    adam(codes.model, codes.x, steps=150, lr=0.02, batch=len(codes.x))
    z = 30 * torch.randn(200, CODE).double()
    assert (codes.model.hinge_margin(z) > 0).double().mean() > 0.95
    assert codes.model.hinge_margin(codes.model.encode(codes.x[:140])).mean() < 0
