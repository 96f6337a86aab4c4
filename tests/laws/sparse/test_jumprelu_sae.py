"""Laws of JumpReLU sparse autoencoder (Rajamanoharan et al. 2024)."""

from typing import Any

import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from sae_laws import (  # noqa: F401
    assert_same,
    build,
    create,
    data,
    gap,
    gradients,
    test_bias_can_start_at_geometric_median,
    test_directions_keep_unit_norm_without_radial_gradient,
    test_invalid_values_are_refused,
    test_penalty_warms_up_linearly_and_is_full_in_eval,
    trained,
)
from scipy import stats
from torch import Tensor
from two_ranks import on_two_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- jumprelu_sae: Rajamanoharan et al. 2024, 2407.14435 -------------------------------------------------------------


def jump(shifted: Any, **settings: Any) -> Any:
    """Thresholds of different sizes, and a bandwidth that includes some pre-activations."""
    model = shifted(build("jumprelu_sae", **{"latent_dim": 12, "bandwidth": 0.5, "l0_weight": 0.3, **settings}))
    with torch.no_grad():
        model.theta_N.abs_()
    return model


def test_jumprelu_passes_values_above_threshold(shifted: Any) -> None:
    model, x = jump(shifted), data(20)
    pi = (x.flatten(1) - model.decoder.b_X) @ model.encoder.weight.T + model.encoder.bias
    f = torch.where(pi > model.theta_N, pi, 0.0)
    terms = model.loss(x)
    assert torch.equal(model.encode(x), model.encode(x).clamp(min=0))
    torch.testing.assert_close(model.encode(x), f)
    torch.testing.assert_close(model(x).flatten(1), f @ model.decoder.W_NX + model.decoder.b_X)
    torch.testing.assert_close(terms["l0"], (f > 0).sum(1).double().mean())
    torch.testing.assert_close(terms["nll"], model.score(x).mean())
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.3 * terms["l0"])
    assert ((pi > 0) & (pi < model.theta_N)).any()  # values that a ReLU passes and JumpReLU does not
    assert gap(f, (pi - model.theta_N).clamp(min=0)) > 0.1  # not a soft threshold, which shrinks the code


def test_zero_thresholds_equal_relu_sae(shifted: Any) -> None:
    model, x = jump(shifted, l0_weight=0.0), data(9)
    relu = build("sae_l1", latent_dim=12, l1=0.0)
    with torch.no_grad():
        model.theta_N.zero_()
    relu.load_state_dict({name: value for name, value in model.state_dict().items() if name != "theta_N"})
    torch.testing.assert_close(model.encode(x), relu.encode(x))
    found, expected = gradients(model.loss(x)["loss"], model), gradients(relu.loss(x)["loss"], relu)
    assert (found.pop("theta_N") == 0).all()  # the gradient is -theta / eps K(...), which is 0 for theta = 0
    assert_same(found, expected)


@pytest.mark.parametrize("bandwidth", [0.2, 1.0])
def test_threshold_gradient_is_rectangle_kernel(bandwidth: float) -> None:
    model = build("jumprelu_sae", latent_dim=12, bandwidth=bandwidth)
    with torch.no_grad():
        model.theta_N.uniform_(0.1, 1)
    pi = torch.randn(400, 12, dtype=torch.float64, requires_grad=True)
    weight, theta = torch.randn(400, 12, dtype=torch.float64), model.theta_N.detach()
    near: Any = ((pi.detach() - theta) / bandwidth > -0.5) & ((pi.detach() - theta) / bandwidth < 0.5)
    assert near.any(0).all()
    in_pi, in_theta = torch.autograd.grad((model.jump(pi) * weight).sum(), (pi, model.theta_N))
    torch.testing.assert_close(in_pi, weight * (pi > theta))
    torch.testing.assert_close(in_theta, (-theta / bandwidth * near * weight).sum(0))
    steps = model.step(pi)
    torch.testing.assert_close(steps, (pi > theta).double())
    in_theta, in_pi = torch.autograd.grad((steps * weight).sum(), (model.theta_N, pi), allow_unused=True)
    torch.testing.assert_close(in_theta, (-1 / bandwidth * near * weight).sum(0))
    assert in_pi is None or (in_pi == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("theta", [0.01, 0.5, 1.5])
def test_mean_l0_gradient_is_minus_threshold_density(theta: float) -> None:
    """With pre-activations after a ReLU or a JumpReLU, the kernel is cut off and the gradient is wrong."""
    eps, n = 0.05, 1_000_000
    model = build("jumprelu_sae", latent_dim=1, bandwidth=eps, threshold=theta)
    pi = torch.randn(n, 1, dtype=torch.float64)

    def slope(values: Tensor) -> float:
        return float(torch.autograd.grad(values.sum() / n, model.theta_N)[0])

    density = float(stats.norm.pdf(theta))
    exact = float(stats.norm.cdf(theta + eps / 2) - stats.norm.cdf(theta - eps / 2)) / eps
    assert exact == pytest.approx(density, rel=1e-3)
    error = 5 * (density / eps / n) ** 0.5
    assert slope(model.step(pi)) == pytest.approx(-density, abs=error)
    # the mean of pi H(pi - theta) is the integral of u p(u) from theta
    assert slope(model.jump(pi)) == pytest.approx(-theta * density, abs=error * max(theta, 0.01))
    halved = slope(model.step(model.jump(pi).detach()))  # dictionary_learning #55
    after_relu = slope(model.step(pi.relu()))
    assert abs(halved + density) > 0.3 * density
    assert theta != 0.01 or after_relu < -5 * density


def test_l0_trains_thresholds_only(shifted: Any) -> None:
    model, x = jump(shifted, l0_weight=0.5), data(20)
    terms = model.loss(x)
    found = gradients(terms["l0"], model)
    pi, theta = model.pre_activations(x).detach(), model.theta_N.detach()
    near = (pi - theta).abs() < 0.25
    assert (near & (pi < theta)).any()  # the kernel includes inactive latents, unlike dictionary_learning #55
    torch.testing.assert_close(found.pop("theta_N"), -near.double().mean(0) / 0.5)
    assert all((g == 0).all() for g in found.values())
    whole, fit = gradients(terms["loss"], model), gradients(terms["nll"], model)
    torch.testing.assert_close(whole["theta_N"] - fit["theta_N"], 0.5 * gradients(terms["l0"], model)["theta_N"])


def test_l0_target_is_approached_by_mean_over_ranks(shifted: Any) -> None:
    model, x = jump(shifted, l0_weight=0.5, target_l0=3.0).train(), data(12)
    one, together, apart = model.loss(x), on_two_ranks(model, x), on_two_ranks(model, x, exchange=False)
    torch.testing.assert_close(one["loss"], one["nll"] + 0.5 * (one["l0"] / 3 - 1) ** 2)
    torch.testing.assert_close(together.terms["loss"], one["loss"])
    for a, b in zip(together.gradients(), gradients(one["loss"], model).values(), strict=True):
        torch.testing.assert_close(a, b)
    assert gap(apart.terms["loss"], one["loss"]) > 1e-6  # mean of squares, not square of the mean
    slopes = []
    for target in (0.5, 11.0):
        model.target_l0 = target
        terms = model.loss(x)
        slopes.append(gradients(terms["loss"] - terms["nll"], model)["theta_N"].sum())
    assert slopes[0] < 0 < slopes[1]


@pytest.mark.slow
def test_thresholds_move_under_adam(digits: Any) -> None:
    x = digits[:200].float()
    model = create("jumprelu_sae", input_shape=(1, 8, 8), latent_dim=32, threshold=0.001, l0_weight=1.0)
    log_theta = torch.nn.Parameter(model.theta_N.detach().log())
    optimizer = torch.optim.Adam([model.theta_N, log_theta], 1e-3)
    for _ in range(200):
        (slope,) = torch.autograd.grad(model.loss(x)["loss"], model.theta_N)
        model.theta_N.grad, log_theta.grad = slope, slope * log_theta.detach().exp()
        optimizer.step()
    assert model.theta_N.mean() > 0.02
    assert (log_theta.exp() < 0.0015).all()  # SAELens #494: log(theta) hardly moves


def test_half_precision_model_keeps_float32_thresholds() -> None:
    model = create("jumprelu_sae", input_shape=(9,), latent_dim=5, threshold=0.0123).bfloat16()
    assert model.theta_N.dtype == torch.float32
    assert (model.theta_N == torch.tensor(0.0123)).all()
    assert {p.dtype for name, p in model.named_parameters() if name != "theta_N"} == {torch.bfloat16}
    lost = torch.full((5,), 0.0123, dtype=torch.bfloat16)
    assert torch.equal(lost + 1e-5, lost)  # SAELens #728: small steps are lost in bf16
    assert model.double().theta_N.dtype == torch.float64


def test_thresholds_do_not_fall_below_zero(digits: Any, quiet: Any) -> None:
    model = create(
        "jumprelu_sae", input_shape=(1, 8, 8), latent_dim=32, threshold=0.02, l0_weight=10.0, target_l0=31.0, lr=1e-2
    )
    least = trained(model, digits[:200].float(), quiet, lambda m, terms: float(m.theta_N.detach().min()))
    assert min(least) == 0


def test_april_form_does_not_subtract_the_bias_and_leaves_norms(shifted: Any) -> None:
    model, x = jump(shifted, form="april"), data(9)
    model.decoder.W_NX.data.mul_(2)
    pi = x.flatten(1) @ model.encoder.weight.T + model.encoder.bias
    f = torch.where(pi > model.theta_N, pi, 0.0)
    torch.testing.assert_close(model.encode(x), f)
    torch.testing.assert_close(model(x).flatten(1), f @ model.decoder.W_NX + model.decoder.b_X)
    torch.testing.assert_close(model.loss(x)["l0"], (pi > model.theta_N).sum(1).double().mean())
    before = model.decoder.W_NX.detach().clone()
    model.after_optimizer_step()
    assert torch.equal(model.decoder.W_NX, before)
