"""Laws of Deep SVDD with an autoencoder (Ruff et al. 2018)."""

import math
from typing import Any

import numpy as np
import pytest
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
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.utils.data import DataLoader

import aezoo
from aezoo import nets
from aezoo.nets.build import ACTIVATIONS, NETS
from aezoo.tasks.detect import detect

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- Deep SVDD: why the encoder cannot be constant -------------------------------------------------------------------


BIAS_FREE = ("mlp", "conv", "resnet", "convnext", "conv_keras", "unet", "gdn", "dc")


def svdd(**settings: Any) -> Any:
    return small("deep_svdd", **settings)


@pytest.mark.parametrize("net", BIAS_FREE)
def test_bias_free_code_of_zero_input_is_zero(net: str, shifted: Any) -> None:
    """It is the only constant code of a network without biases, and differs from the centre c."""
    model = shifted(svdd(input_shape=(1, 8, 8), net=net, hidden_dims=(8, 12)))
    assert not any("bias" in name for name, _ in model.encoder.named_parameters())
    assert any("bias" in name for name, _ in model.decoder.named_parameters())
    assert not model.encode(torch.zeros(2, 1, 8, 8).double()).any()
    assert model.encode(images(2, shape=(1, 8, 8))).abs().min() > 1e-4


@pytest.mark.parametrize("net", [net for net in NETS if net not in BIAS_FREE])
def test_networks_with_position_or_gate_offsets_are_refused(net: str) -> None:
    made = nets.encoder(net, (1, 8, 8), (CODE,), (8,))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "bias" in name:
                p.zero_()
            if net == "mixer" and name.endswith(".2.weight"):
                p.zero_()
    gates = net == "lstm"  # its cells saturate
    x = torch.rand(1, 1, 8, 8)
    if net == "mixer":  # its last normalisation gives all multiples of a sample the same code
        assert made(x).any()
        torch.testing.assert_close(made(2 * x), made(x))
    else:
        assert gates or made(torch.zeros(1, 1, 8, 8)).any()
    with pytest.raises(aezoo.AezooError, match=f"by net '{net}': choose from mlp"):
        svdd(input_shape=(1, 8, 8), net=net)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bias_like_activations_are_refused(name: str) -> None:
    """Those that saturate (proposition 3), and those that are not 0 at 0."""
    act = nets.activation(name)
    at_0, (low, lower, high, higher) = act(torch.zeros(1)), act(torch.tensor([-100.0, -1000.0, 100.0, 1000.0]))
    saturates = any(a == b and a != 0 for a, b in ((low, lower), (high, higher)))
    if at_0 != 0 or saturates:
        with pytest.raises(aezoo.AezooError, match=f"by activation '{name}': choose from relu"):
            svdd(activation=name)
    else:
        svdd(activation=name)


def test_gated_network_maps_zero_to_zero(shifted: Any) -> None:
    assert not shifted(svdd(activation="gated")).encode(torch.zeros(2, *SHAPE).double()).any()


def test_centre_is_mean_of_first_codes_and_does_not_change(quiet: Any) -> None:
    model, batches = svdd(nu=0.1, lr=1e-2), [images(8, seed=i) for i in range(3)]
    mean = model.encode(batches[0]).detach().numpy().mean(0)
    expected = np.where(np.abs(mean) < 0.1, np.where(mean < 0, -0.1, 0.1), mean)
    quiet(max_epochs=2).fit(model, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    np.testing.assert_allclose(model.centre_D, expected, rtol=1e-9)
    assert model.started and "centre_D" not in dict(model.named_parameters())
    assert not np.allclose(model.encode(batches[0]).detach().numpy().mean(0), mean, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.03, -0.03, 0.5, -0.5])
def test_centre_is_kept_away_from_zero(value: float) -> None:
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


def test_one_class_loss_is_error_plus_mean_distance(shifted: Any) -> None:
    model, x = shifted(svdd(nll_weight=0.3)), images(20)
    error = (x - model(x)).detach().flatten(1).square().sum(1).mean().item() + 9 * math.log(math.pi)
    d = distances_by_hand(model, x)
    terms = model.loss(x)
    assert terms["nll"].item() == pytest.approx(error, rel=1e-9)
    assert terms["svdd"].item() == pytest.approx(d.mean(), rel=1e-9)
    assert terms["loss"].item() == pytest.approx(0.3 * error + d.mean(), rel=1e-9)
    np.testing.assert_allclose(model.score(x).detach(), d, rtol=1e-9)
    assert not model.radius


def test_soft_boundary_uses_radius_of_previous_batch(shifted: Any) -> None:
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
    # evaluation does not change the radius and has the loss of training
    before, x = model.radius.clone(), images(18, seed=9)
    evaluated = model.eval().loss(x)
    assert torch.equal(model.radius, before)
    trained = model.train().loss(x)
    assert all(torch.equal(evaluated[term], trained[term]) for term in trained)


@pytest.mark.parametrize("nu", [0.05, 0.3])
def test_quantile_minimises_soft_boundary(nu: float) -> None:
    model, d = svdd(nu=nu), torch.from_numpy(np.random.default_rng(0).chisquare(3, 200)) / 2
    model.update_radius(d)

    def objective(r2: np.ndarray) -> np.ndarray:
        return r2 + np.maximum(0, d.numpy() - r2[:, None]).mean(1) / nu

    found = objective(np.array([model.radius.item() ** 2]))[0]
    assert found == pytest.approx(objective(np.linspace(0, float(d.max()), 10_001)).min(), rel=1e-4)
    # the first version of the authors' code uses the quantile of squared distances as the radius
    wrong = np.quantile(d.numpy(), 1 - nu) ** 2
    assert objective(np.array([wrong]))[0] > found * 1.02


def test_svdd_reconstructs_as_dense_ae_distance_trains_encoder(shifted: Any) -> None:
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
    for mine, other, of_distance in zip(
        all_grads(terms["loss"], own), all_grads(expected["loss"], theirs), by_distance, strict=True
    ):
        torch.testing.assert_close(mine, 0.7 * other + of_distance)
        assert of_distance.abs().max() > 1e-4
    for mine, other in zip(
        all_grads(terms["loss"], own_decoder), all_grads(expected["loss"], parent.decoder.parameters()), strict=True
    ):
        torch.testing.assert_close(mine, 0.7 * other)
    # alpha = 0, the paper's objective: the decoder gets no gradient
    alone = svdd(nll_weight=0.0)
    alone.load_state_dict(model.state_dict())
    alone_terms = alone.loss(x)
    torch.testing.assert_close(alone_terms["loss"], alone_terms["svdd"])
    assert not any(g.any() for g in all_grads(alone_terms["loss"], alone.decoder.parameters()))


def test_linear_encoder_reaches_least_squares_solution(lbfgs: Any) -> None:
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


@pytest.mark.slow
def test_bias_would_collapse_codes_to_a_point(lbfgs: Any) -> None:
    """Proposition 2: with a bias the least loss is 0, and all samples have the same score."""
    model, x = svdd(input_shape=(5,), hidden_dims=(), nll_weight=0.0), images(60, shape=(5,)) + 0.2
    with torch.no_grad():
        model.init_from_data(x)
    model.encoder[1].register_parameter("bias", torch.nn.Parameter(torch.zeros(CODE).double()))
    assert lbfgs(model, x, rounds=200) < 1e-9
    assert model.score(x).max() < 1e-8


# ---- detection -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"nll_weight": 0.0, "nu": 0.1}], ids=["one-class", "soft-boundary"])
def test_deep_svdd_detects_other_digits(settings: dict[str, Any]) -> None:
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
    result = detect(model, data, score="nll,mse", normal="3", n_shown=0)
    auroc = result.rows[0]["auroc"]
    assert auroc == pytest.approx(roc_auc_score(y != 3, result.scores))
    assert auroc > 0.9 and auroc > untrained
