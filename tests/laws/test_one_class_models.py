"""Laws of one-class models: AE-1SVM beside scikit-learn's one-class SVMs, Deep SVDD's centre, sphere and optimum."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import SGDOneClassSVM
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import OneClassSVM
from torch import Tensor
from torch.utils.data import DataLoader
from two_ranks import on_two_ranks

import aezoo
from aezoo import nets
from aezoo.nets.build import ACTIVATIONS, NETS
from aezoo.tasks.detect import detect

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
SHAPE, CODE = (2, 3, 3), 3


def images(n: int = 6, seed: int = 7, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small(name: str, **settings: Any) -> Any:
    settings = {"input_shape": SHAPE, "latent_dim": CODE, "hidden_dims": (16,), **settings}
    return aezoo.create_model(name, **settings).double()


def ae1svm(**settings: Any) -> Any:
    return small("ae1svm", **{"n_frequencies": 20, "bandwidth": 0.5, **settings})


def outside_by_hand(model: Any, z: np.ndarray) -> np.ndarray:
    """How far outside, rho - w'phi(z), by NumPy."""
    angles = z @ model.omega_DR.numpy()
    phi = np.hstack([np.cos(angles), np.sin(angles)]) / math.sqrt(angles.shape[1])
    return model.rho.item() - phi @ model.w_F.detach().numpy()


@torch.no_grad()
def between(model: Any, x: Tensor) -> Tensor:
    """A threshold that half of an even number of samples lie outside of."""
    return (model.features(model.encode(x)) @ model.w_F).quantile(0.5)


def all_grads(value: Tensor, of: Any) -> list[Tensor]:
    parameters = [*of]
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


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
        # 780 means over n frequencies of cosines, of a variance of at most 1/2
        assert off.abs().max() < 4.5 / math.sqrt(2 * n)
        assert off.square().mean() > 1e-3 / n  # no kernel by another way
    # as in PyOD's ae1svm, whose sigma multiplies frequencies and whose features have no factor
    slip = torch.cos(z @ (torch.randn(CODE, 10_000, dtype=torch.float64) * bandwidth))
    assert (slip @ slip.T - kernel).abs().max() > 1


def test_frequencies_are_drawn_by_the_seed_and_stay() -> None:
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
        found = model.outside(z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model.outside(z), rtol=1e-5, atol=1e-5)


# ---- AE-1SVM: the loss and its optimum -------------------------------------------------------------------------------


@pytest.mark.parametrize("nu", [0.05, 0.5, 1.0])
def test_the_loss_is_error_norm_threshold_and_hinge(nu: float, shifted: Any) -> None:
    model, x = shifted(ae1svm(nu=nu, svm_weight=3.0)), images(30)
    with torch.no_grad():
        z = model.encode(x).numpy()
        model.rho.copy_(between(model, x))
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


def test_the_gradients_of_threshold_and_normal_count_what_lies_outside(shifted: Any) -> None:
    model, x, nu = shifted(ae1svm(nu=0.25)), images(20), 0.25
    with torch.no_grad():
        phi = model.features(model.encode(x))
        model.rho.copy_(between(model, x))
    out = torch.from_numpy(outside_by_hand(model, model.encode(x).detach().numpy())) > 0
    assert out.sum() == 10
    rho, w = all_grads(model.loss(x)["svm"], [model.rho, model.w_F])
    torch.testing.assert_close(rho, out.double().mean() / nu - 1)
    torch.testing.assert_close(w, model.w_F.detach() - phi[out].sum(0) / (nu * 20))


def test_only_what_lies_outside_moves_the_encoder(shifted: Any) -> None:
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
    """Fixed codes as samples, of which some lie apart, and the model that takes them as they are."""

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

    def put(self, w: np.ndarray, rho: float) -> float:
        """The SVM's term with these."""
        with torch.no_grad():
            self.model.w_F.copy_(torch.from_numpy(w))
            self.model.rho.fill_(rho)
            return float(self.model.loss(self.x)["svm"])


@pytest.mark.parametrize("nu", [0.1, 0.4])
def test_scikit_learns_one_class_svm_is_the_optimum_of_normal_and_threshold(nu: float) -> None:
    codes = Codes(nu, 30)
    learnt = OneClassSVM(kernel="linear", nu=nu, tol=1e-10).fit(codes.phi)
    # libsvm's problem times nu N
    scale = nu * len(codes.x)
    w, rho = learnt.coef_[0] / scale, learnt.offset_[0] / scale
    least = codes.put(w, rho)
    assert least == pytest.approx(-0.5 * np.sum(w**2), rel=1e-6)  # no gap to the dual
    expected = -learnt.decision_function(codes.phi) / scale
    np.testing.assert_allclose(codes.model.score(codes.x).detach(), expected, rtol=1e-9, atol=1e-12)
    assert nu - 0.08 < (codes.model.score(codes.x) > 1e-6).double().mean() <= nu
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        off = rng.normal(0, size, (20, len(w) + 1))
        assert all(codes.put(w + each[1:] / math.sqrt(len(w)), rho + each[0]) > least for each in off)
    # the other of scikit-learn's, by stochastic steps on the same objective times nu
    stochastic = SGDOneClassSVM(nu=nu, max_iter=2000, tol=None, random_state=0, average=1000).fit(codes.phi)
    assert codes.put(stochastic.coef_.ravel(), stochastic.offset_[0]) == pytest.approx(least, rel=0.02)


def test_training_finds_that_optimum(adam: Any) -> None:
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
def test_the_first_batch_starts_normal_and_threshold_at_the_optimum_of_nu_1(nu: float, quiet: Any) -> None:
    codes = Codes(nu, 30)
    with torch.no_grad():
        codes.model.init_from_data(codes.x)
    np.testing.assert_allclose(codes.model.w_F.detach(), codes.phi.mean(0), rtol=1e-9, atol=1e-12)
    assert (codes.model.score(codes.x) > 1e-12).double().mean() == pytest.approx(nu, abs=1 / 150)
    if nu == 1:  # the dual has one feasible point, where all samples weigh 1 / N, and there is no gap to it
        dual = -0.5 * np.mean(codes.phi @ codes.phi.T)
        assert codes.model.loss(codes.x)["svm"].item() == pytest.approx(dual)
    # training calls it once
    quiet(max_epochs=1).fit(codes.model, DataLoader([codes.x] * 2, batch_size=None))  # type: ignore[arg-type]
    assert codes.model.started and (codes.model.w_F - torch.from_numpy(codes.phi.mean(0))).abs().max() < 0.01


def test_with_many_frequencies_it_is_the_svm_of_the_gaussian_kernel() -> None:
    nu = 0.2
    codes = Codes(nu, 3000)
    linear, kernel = (
        OneClassSVM(nu=nu, tol=1e-8, **settings).fit(x)
        for settings, x in (({"kernel": "linear"}, codes.phi), ({"gamma": 0.5}, codes.x.numpy()))
    )
    codes.put(linear.coef_[0] / (nu * 160), linear.offset_[0] / (nu * 160))
    new = torch.randn(200, CODE).double()
    score, expected = codes.model.score(new).detach().numpy(), -kernel.decision_function(new.numpy())
    assert np.corrcoef(score, expected)[0, 1] > 0.995
    assert np.mean((score > 0) == (expected > 0)) > 0.95


# ---- AE-1SVM: neutral limit and score --------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_without_the_svm_it_is_dense_ae(likelihood: str, shifted: Any) -> None:
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


def test_the_score_is_how_far_outside_a_code_lies(shifted: Any) -> None:
    model, x = shifted(ae1svm()).eval(), images(20)
    score, z = model.score(x).detach(), model.encode(x).detach().numpy()
    np.testing.assert_allclose(score, outside_by_hand(model, z), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.score(x[4:5]).detach(), score[4:5])
    # PyOD's ae1svm scores by the distance of sample and reconstruction, whatever its SVM says
    with torch.no_grad():
        model.w_F.zero_()
    assert model.score(x).unique().numel() == 1


def test_far_from_all_codes_lies_outside(adam: Any) -> None:
    codes = Codes(0.1, 300)
    adam(codes.model, codes.x, steps=150, lr=0.02, batch=len(codes.x))
    z = 30 * torch.randn(200, CODE).double()
    assert (codes.model.outside(z) > 0).double().mean() > 0.95
    assert codes.model.outside(codes.model.encode(codes.x[:140])).mean() < 0


# ---- Deep SVDD: what keeps the encoder from being constant -----------------------------------------------------------

FIT = ("mlp", "conv", "resnet", "convnext", "conv_keras", "unet", "gdn", "dc")


def svdd(**settings: Any) -> Any:
    return small("deep_svdd", **settings)


@pytest.mark.parametrize("net", FIT)
def test_the_code_of_nothing_is_0_whatever_the_weights(net: str, shifted: Any) -> None:
    """The constant of a network without biases, which c is not."""
    model = shifted(svdd(input_shape=(1, 8, 8), net=net, hidden_dims=(8, 12)))
    assert not any("bias" in name for name, _ in model.encoder.named_parameters())
    assert any("bias" in name for name, _ in model.decoder.named_parameters())
    assert not model.encode(torch.zeros(2, 1, 8, 8).double()).any()
    assert model.encode(images(2, shape=(1, 8, 8))).abs().min() > 1e-4


@pytest.mark.parametrize("net", [net for net in NETS if net not in FIT])
def test_networks_that_know_places_or_gates_are_refused(net: str) -> None:
    made = nets.encoder(net, (1, 8, 8), (CODE,), (8,))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "bias" in name:
                p.zero_()
            if net == "mixer" and name.endswith(".2.weight"):
                p.zero_()
    gates = net == "lstm"  # its cells saturate
    x = torch.rand(1, 1, 8, 8)
    if net == "mixer":  # whose last normalisation makes one code of all multiples of a sample
        assert made(x).any()
        torch.testing.assert_close(made(2 * x), made(x))
    else:
        assert gates or made(torch.zeros(1, 1, 8, 8)).any()
    with pytest.raises(aezoo.AezooError, match=f"by net '{net}': take one of mlp"):
        svdd(input_shape=(1, 8, 8), net=net)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_that_stand_in_for_a_bias_are_refused(name: str) -> None:
    """Proposition 3, and what is not 0 at 0."""
    act = nets.activation(name)
    at_0, (low, lower, high, higher) = act(torch.zeros(1)), act(torch.tensor([-100.0, -1000.0, 100.0, 1000.0]))
    saturates = any(a == b and a != 0 for a, b in ((low, lower), (high, higher)))
    if at_0 != 0 or saturates:
        with pytest.raises(aezoo.AezooError, match=f"by activation '{name}': take one of relu"):
            svdd(activation=name)
    else:
        svdd(activation=name)


def test_a_gated_network_is_0_at_0(shifted: Any) -> None:
    assert not shifted(svdd(activation="gated")).encode(torch.zeros(2, *SHAPE).double()).any()


def test_the_centre_is_the_mean_of_the_first_codes_and_stays(quiet: Any) -> None:
    model, batches = svdd(nu=0.1, lr=1e-2), [images(8, seed=i) for i in range(3)]
    mean = model.encode(batches[0]).detach().numpy().mean(0)
    expected = np.where(np.abs(mean) < 0.1, np.where(mean < 0, -0.1, 0.1), mean)
    quiet(max_epochs=2).fit(model, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    np.testing.assert_allclose(model.centre_D, expected, rtol=1e-9)
    assert model.started and "centre_D" not in dict(model.named_parameters())
    assert not np.allclose(model.encode(batches[0]).detach().numpy().mean(0), mean, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.03, -0.03, 0.5, -0.5])
def test_the_centre_is_never_near_0(value: float) -> None:
    model = svdd(input_shape=(CODE,), hidden_dims=())
    with torch.no_grad():
        model.encoder[1].weight.copy_(value * torch.eye(CODE))
        model.init_from_data(torch.ones(5, CODE).double())
    expected = value if abs(value) > 0.1 else -0.1 if value < 0 else 0.1
    torch.testing.assert_close(model.centre_D, torch.full((CODE,), expected).double())
    assert (svdd().centre_D.abs() >= 0.1 - 1e-6).all()


# ---- Deep SVDD: the loss ---------------------------------------------------------------------------------------------


def distances_by_hand(model: Any, x: Tensor) -> np.ndarray:
    z = model.encode(x).detach().numpy()
    return np.array([np.linalg.norm(each - model.centre_D.numpy()) ** 2 for each in z])


def test_the_loss_of_one_class_is_error_and_mean_squared_distance(shifted: Any) -> None:
    model, x = shifted(svdd(nll_weight=0.3)), images(20)
    error = (x - model(x)).detach().flatten(1).square().sum(1).mean().item() + 9 * math.log(math.pi)
    d = distances_by_hand(model, x)
    terms = model.loss(x)
    assert terms["nll"].item() == pytest.approx(error, rel=1e-9)
    assert terms["svdd"].item() == pytest.approx(d.mean(), rel=1e-9)
    assert terms["loss"].item() == pytest.approx(0.3 * error + d.mean(), rel=1e-9)
    np.testing.assert_allclose(model.score(x).detach(), d, rtol=1e-9)
    assert not model.radius


def test_the_soft_boundary_has_the_radius_of_the_batch_before(shifted: Any) -> None:
    model, nu, radius = shifted(svdd(nu=0.25)).train(), 0.25, 0.0
    for seed in range(3):
        x = images(18, seed)
        d = distances_by_hand(model, x)
        expected = radius**2 + np.maximum(0, d - radius**2).sum() / (nu * 18)
        terms = model.loss(x)
        assert terms["svdd"].item() == pytest.approx(expected, rel=1e-9)
        assert terms["radius"].item() == pytest.approx(radius, rel=1e-9)
        assert not terms["radius"].requires_grad
        radius = np.quantile(np.sqrt(d), 1 - nu)
        assert model.radius.item() == pytest.approx(radius, rel=1e-9)
        np.testing.assert_allclose(model.score(x).detach(), d - radius**2, rtol=1e-7)
        assert (model.score(x) > 0).double().mean() == pytest.approx(nu, abs=0.06)
    # what evaluation looks at leaves the radius, and has the loss of training
    held, x = model.radius.clone(), images(18, seed=9)
    evaluated = model.eval().loss(x)
    assert torch.equal(model.radius, held)
    trained = model.train().loss(x)
    assert all(torch.equal(evaluated[term], trained[term]) for term in trained)


@pytest.mark.parametrize("nu", [0.05, 0.3])
def test_the_quantile_is_the_radius_at_which_the_objective_is_least(nu: float) -> None:
    model, d = svdd(nu=nu), torch.from_numpy(np.random.default_rng(0).chisquare(3, 200)) / 2
    model.remember(d)

    def objective(r2: np.ndarray) -> np.ndarray:
        return r2 + np.maximum(0, d.numpy() - r2[:, None]).mean(1) / nu

    found = objective(np.array([model.radius.item() ** 2]))[0]
    assert found == pytest.approx(objective(np.linspace(0, float(d.max()), 10_001)).min(), rel=1e-4)
    # the first version of the authors' code takes the quantile of squares for a length
    wrong = np.quantile(d.numpy(), 1 - nu) ** 2
    assert objective(np.array([wrong]))[0] > found * 1.02


def test_its_reconstruction_is_dense_aes_and_its_distance_moves_the_encoder_alone(shifted: Any) -> None:
    parent = small("dense_ae", likelihood="gaussian", activation="leaky_relu")
    model, x = shifted(svdd(nll_weight=0.7)), images(20)
    with torch.no_grad():
        for p in parent.encoder.parameters():
            p.zero_()
        for name, p in model.named_parameters():
            parent.get_parameter(name.replace("encoder.", "encoder.0.")).copy_(p)
    terms, expected = model.loss(x), parent.loss(x)
    torch.testing.assert_close(terms["nll"], expected["nll"])
    own, own_decoder = ([*net.parameters()] for net in (model.encoder, model.decoder))
    theirs = [p for p in parent.encoder.parameters() if p.ndim > 1]
    by_distance = all_grads((model.encode(x) - model.centre_D).square().sum(1).mean(), own)
    for mine, other, apart in zip(
        all_grads(terms["loss"], own), all_grads(expected["loss"], theirs), by_distance, strict=True
    ):
        torch.testing.assert_close(mine, 0.7 * other + apart)
        assert apart.abs().max() > 1e-4
    for mine, other in zip(
        all_grads(terms["loss"], own_decoder), all_grads(expected["loss"], parent.decoder.parameters()), strict=True
    ):
        torch.testing.assert_close(mine, 0.7 * other)
    # alpha = 0, the paper's objective: the decoder stays where it is
    alone = svdd(nll_weight=0.0)
    alone.load_state_dict(model.state_dict())
    alone_terms = alone.loss(x)
    torch.testing.assert_close(alone_terms["loss"], alone_terms["svdd"])
    assert not any(g.any() for g in all_grads(alone_terms["loss"], alone.decoder.parameters()))


def test_a_linear_encoder_ends_where_least_squares_do(lbfgs: Any) -> None:
    """The least mean of ||W x - c||^2 has W = c a', a = E[xx']^-1 E[x], and leaves ||c||^2 (1 - a'x)^2."""
    x = images(60, shape=(5,)) + 0.2
    model = svdd(input_shape=(5,), hidden_dims=(), nll_weight=0.0)
    with torch.no_grad():
        model.init_from_data(x)
    c, rows = model.centre_D.numpy(), x.numpy()
    a = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    least = c @ c * np.mean((1 - rows @ a) ** 2)
    assert lbfgs(model, x, rounds=200) == pytest.approx(least, rel=1e-6)
    np.testing.assert_allclose(model.encoder[1].weight.detach(), np.outer(c, a), atol=1e-4)
    new = images(20, seed=1, shape=(5,))
    np.testing.assert_allclose(model.score(new).detach(), c @ c * (1 - new.numpy() @ a) ** 2, atol=1e-4)


def test_a_bias_would_let_everything_be_one_point(lbfgs: Any) -> None:
    """Proposition 2: with one the least loss is 0, and all samples score alike."""
    model, x = svdd(input_shape=(5,), hidden_dims=(), nll_weight=0.0), images(60, shape=(5,)) + 0.2
    with torch.no_grad():
        model.init_from_data(x)
    model.encoder[1].register_parameter("bias", torch.nn.Parameter(torch.zeros(CODE).double()))
    assert lbfgs(model, x, rounds=200) < 1e-9
    assert model.score(x).max() < 1e-8


@pytest.mark.parametrize("name", ["ae1svm", "deep_svdd"])
def test_two_ranks_are_one(name: str, shifted: Any) -> None:
    settings = {"nu": 0.25} | ({"n_frequencies": 20} if name == "ae1svm" else {})
    model, x = shifted(small(name, **settings)).train(), images(18)
    if name == "deep_svdd":
        model.loss(images(18, seed=1))
    whole = copy.deepcopy(model)
    terms = whole.loss(x)
    together = on_two_ranks(model, x)
    for term, value in terms.items():
        torch.testing.assert_close(together.terms[term], value, rtol=1e-9, atol=1e-12)
    expected = torch.autograd.grad(terms["loss"], [*whole.parameters()])
    for mine, theirs in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)
    for own in together.copies:
        for buffer_name, buffer in own.named_buffers():
            torch.testing.assert_close(buffer, whole.get_buffer(buffer_name), rtol=1e-9, atol=1e-12)
    if name == "deep_svdd":  # the radius of each rank by itself
        apart = on_two_ranks(model, x, exchange=False)
        assert (apart.copies[0].radius - whole.radius).abs() > 1e-4


# ---- what they find --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [("ae1svm", {}), ("deep_svdd", {"nu": 0.1})],
)
def test_they_find_malignant_tumours_once_they_know_benign_ones(name: str, settings: Any, adam: Any) -> None:
    """Rows of a table; of the samples that they know about a share nu lies outside."""
    found = load_breast_cancer()
    benign, malignant = found.data[found.target == 1], found.data[found.target == 0]
    train, x = (
        torch.from_numpy((part - benign.mean(0)) / benign.std(0)).float()
        for part in (benign[:250], np.concatenate([benign[250:], malignant]))
    )
    model: Any = aezoo.create_model(name, (30,), hidden_dims=(32,), **settings)
    if name == "deep_svdd":
        with torch.no_grad():
            model.init_from_data(train)
    adam(model, train, steps=600, lr=2e-3, batch=64)
    y = np.repeat([0, 1], [len(benign) - 250, len(malignant)])
    with torch.no_grad():
        assert roc_auc_score(y, model.score(x)) > 0.92
        assert 0.02 < (model.score(train) > 0).double().mean() < 0.2


@pytest.mark.parametrize("settings", [{}, {"nll_weight": 0.0, "nu": 0.1}], ids=["one-class", "soft-boundary"])
def test_deep_svdd_tells_threes_from_other_digits(settings: dict[str, Any]) -> None:
    data = aezoo.DataModule("digits", batch_size=64, train_classes=[3])
    x, y = data.tensors("train")[0], np.asarray(data.tensors("test")[1])
    torch.manual_seed(0)
    model: Any = aezoo.create_model("deep_svdd", (1, 8, 8), hidden_dims=(64,), latent_dim=16, **settings)
    with torch.no_grad():
        model.init_from_data(x)
    untrained = roc_auc_score(y != 3, model.score(data.tensors("test")[0]).detach())
    optimizer = model.configure_optimizers()
    for _ in range(400):
        optimizer.zero_grad()
        model.loss(x[torch.randint(len(x), (64,))])["loss"].backward()
        optimizer.step()
    judged = detect(model, data, score="nll,mse", normal="3", n_shown=0)
    auroc = judged.table[0]["auroc"]
    assert auroc == pytest.approx(roc_auc_score(y != 3, judged.scores))
    assert auroc > 0.9 and auroc > untrained
