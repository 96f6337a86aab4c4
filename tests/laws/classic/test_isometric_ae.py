"""Laws of the isometric autoencoder, I-AE (Gropp et al. 2020)."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from code_geometry_laws import (  # noqa: F401
    CODE,
    SHAPE,
    images,
    small,
    test_outputs_equal_plain_autoencoder,
    test_zero_weight_equals_plain_autoencoder,
)
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from torch import Tensor
from two_ranks import on_two_ranks

from aezoo.testing import SharedNoise

# ---- isometry: Gropp et al. 2020, Lee et al. 2022 --------------------------------------------------------------------


def jacobians(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The Jacobian of each sample by autograd, one by one: (B, ...) -> (B, outputs, inputs)."""
    found = [torch.autograd.functional.jacobian(lambda v: f(v[None])[0].flatten(), row) for row in at]
    return torch.stack([j.flatten(1) for j in found])


def directions(n: int = 6) -> Tensor:
    return F.normalize(torch.randn(n, CODE, dtype=torch.float64), dim=1)


def linear(scale: float, shifted: Any, **settings: Any) -> Any:
    """A linear decoder with orthonormal columns times a scale, its pseudo-inverse as the encoder, squared error."""
    model = small("isometric_ae", shifted, hidden_dims=(), likelihood="gaussian", **settings)
    basis = torch.linalg.qr(torch.randn(math.prod(SHAPE), CODE, dtype=torch.float64)).Q
    with torch.no_grad():
        model.decoder[1].weight.copy_(scale * basis)
        model.encoder[1].weight.copy_(basis.T / scale)
    return model


NETS: list[dict[str, Any]] = [
    {"net": "mlp"},
    {"net": "mlp", "activation": "gated"},
    {"net": "conv", "hidden_dims": (4,), "activation": "tanh"},
    {"net": "resnet", "hidden_dims": (4,), "likelihood": "gaussian"},
]


@pytest.mark.parametrize("settings", NETS, ids=lambda settings: "-".join(str(v) for v in settings.values()))
def test_jacobian_products_match_autograd(settings: dict[str, Any], shifted: Any) -> None:
    model, x, u = small("isometric_ae", shifted, **settings), images(), directions()
    z = model.encoder(x).detach()
    at = jacobians(lambda v: model.decode(v), z)
    push, pull = model.linearised(z)
    w = torch.randn(6, math.prod(SHAPE), dtype=torch.float64)
    torch.testing.assert_close(push(u), torch.einsum("bxd,bd->bx", at, u), rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(pull(w), torch.einsum("bxd,bx->bd", at, w), rtol=1e-8, atol=1e-11)
    length = torch.einsum("bxd,bd->bx", at, u).norm(dim=1)
    torch.testing.assert_close(model.iso(z, u), (length - 1) ** 2, rtol=1e-8, atol=1e-11)
    back = torch.einsum("bdx,bd->bx", jacobians(model.encoder, x), u).norm(dim=1)
    torch.testing.assert_close(model.piso(x, u), (back - 1) ** 2, rtol=1e-8, atol=1e-11)
    # the Jacobian of the logits would give another result
    if settings.get("likelihood") != "gaussian":
        assert (push(u) - torch.einsum("bxd,bd->bx", jacobians(model.decoder, z), u)).abs().max() > 1e-3


@pytest.mark.slow
def test_jacobian_products_match_forward_mode(shifted: Any) -> None:
    model, u = small("isometric_ae", shifted), directions()
    z = model.encoder(images()).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 uses the deprecated torch.jit.script
        expected = torch.func.jvp(lambda v: model.decode(v).flatten(1), (z,), (u,))[1]
    torch.testing.assert_close(model.linearised(z)[0](u), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0])
def test_scaled_isometry_has_closed_form_penalty(scale: float, shifted: Any) -> None:
    """0 for orthonormal columns and their transpose; (c - 1)^2 and (1/c - 1)^2 at a scale c, for any direction."""
    model, x = linear(scale, shifted), images()
    terms = model.loss(x)
    assert float(terms["iso"].detach()) == pytest.approx((scale - 1) ** 2, abs=1e-12)
    assert float(terms["piso"].detach()) == pytest.approx((1 / scale - 1) ** 2, abs=1e-12)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 10 * (terms["iso"] + terms["piso"]))


def test_encoder_term_is_zero_only_for_pseudo_inverse(shifted: Any) -> None:
    """An encoder that is a left inverse of the decoder, but not its pseudo-inverse, has a positive penalty."""
    model, x = linear(1.0, shifted), images()
    basis = model.decoder[1].weight.detach()
    away = torch.linalg.qr(basis, mode="complete").Q[:, CODE:]
    with torch.no_grad():
        model.encoder[1].weight.add_(0.5 * torch.randn(CODE, away.shape[1], dtype=torch.float64) @ away.T)
        torch.testing.assert_close(model.encoder[1].weight @ basis, torch.eye(CODE, dtype=torch.float64))
    terms = model.loss(x)
    assert float(terms["iso"].detach()) == pytest.approx(0, abs=1e-12)
    assert float(terms["piso"].detach()) > 1e-2


def test_each_term_trains_its_own_network(shifted: Any) -> None:
    model, x = small("isometric_ae", shifted), images()
    for term, own, other in (("iso", model.decoder, model.encoder), ("piso", model.encoder, model.decoder)):
        value = model.loss(x)[term]
        mine = torch.autograd.grad(value, [*own.parameters()], retain_graph=True, allow_unused=True)
        assert max(float(g.norm()) for g in mine if g is not None) > 1e-4
        for g in torch.autograd.grad(value, [*other.parameters()], allow_unused=True):
            assert g is None or not g.any()


class TermOf(torch.nn.Module):
    """One term at fixed codes and directions as a module's output."""

    def __init__(self, model: Any, call: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self) -> Tensor:
        return self.call(self.model)


def test_gradients_match_finite_differences(shifted: Any) -> None:
    x, u = images(3), directions(3)
    model = small("isometric_ae", shifted, activation="tanh", hidden_dims=(5,))
    z = model.encoder(x).detach()
    calls: list[tuple[str, Callable[[Any], Tensor]]] = [
        ("model.decoder.1.weight", lambda m: m.iso(z, u)),
        ("model.encoder.3.weight", lambda m: m.piso(x, u)),
        ("model.decoder.1.weight", lambda m: m.relaxed(z, u)),
    ]
    for name, call in calls:
        term = TermOf(model, call)
        weight = term.get_parameter(name).detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda w, term=term, name=name: torch.func.functional_call(term, {name: w}, ()), (weight,)
        )


def test_directions_are_uniform_and_independent(shifted: Any) -> None:
    model, seen = small("isometric_ae", shifted), list[Tensor]()

    def keep(at: Tensor, u: Tensor) -> Tensor:
        seen.append(u)
        return torch.zeros(len(u))

    model.iso = model.piso = keep
    model.loss(images(4000))
    assert len(seen) == 2
    for u in seen:
        torch.testing.assert_close(u.norm(dim=1), torch.ones(4000, dtype=torch.float64))
        torch.testing.assert_close(u.T @ u / 4000, torch.eye(CODE, dtype=torch.float64) / CODE, rtol=0, atol=0.02)
    assert float((seen[0] * seen[1]).sum(1).mean().abs()) < 0.05


@pytest.mark.parametrize("scale", [1.0, 0.2, 7.0])
def test_relaxed_term_is_minimal_for_scaled_isometries(scale: float, shifted: Any) -> None:
    model, x = linear(scale, shifted, distortion="relaxed"), images()
    terms = model.loss(x)
    assert float(terms["iso"].detach()) == pytest.approx(1 / CODE, rel=1e-9)
    assert float(terms["piso"]) == 0
    with torch.no_grad():
        model.decoder[1].weight.mul_(torch.tensor([1.0, 1, 1, 2], dtype=torch.float64))
    assert float(model.loss(images(2000))["iso"].detach()) > 1 / CODE + 0.02


def test_the_relaxed_term_is_the_ratio_of_the_traces(shifted: Any) -> None:
    """Against full Jacobians, with the coordinate axes as directions, which average to the same as random ones."""
    model, z = small("isometric_ae", shifted, distortion="relaxed"), 3 * torch.randn(3, CODE, dtype=torch.float64)
    jacobian = jacobians(lambda v: model.decode(v), z)
    metric = jacobian.mT @ jacobian
    traces = [torch.einsum("bii->b", part).mean() for part in (metric @ metric, metric)]
    axes = torch.eye(CODE, dtype=torch.float64)
    found = model.relaxed(z.repeat_interleave(CODE, 0), axes.repeat(3, 1))
    torch.testing.assert_close(found, traces[0] / traces[1] ** 2, rtol=1e-8, atol=1e-11)
    per_sample = (torch.einsum("bii->b", metric @ metric) / torch.einsum("bii->b", metric) ** 2).mean()
    assert (found - per_sample).abs() > 1e-4  # a mean of ratios would allow a different scale at each code


def test_the_relaxed_term_is_the_same_on_two_ranks(shifted: Any) -> None:
    model, x = small("isometric_ae", shifted, distortion="relaxed").train(), images(8)
    with SharedNoise(range(8), 8):
        one = model.loss(x)["loss"]
    two = on_two_ranks(model, x)
    torch.testing.assert_close(two.terms["loss"], one, rtol=1e-9, atol=1e-12)
    assert (on_two_ranks(model, x, exchange=False).terms["loss"] - one).abs() > 1e-4
