"""Laws of Gated sparse autoencoder (Rajamanoharan et al. 2024)."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from sae_laws import (  # noqa: F401
    assert_same,
    build,
    data,
    gradients,
    sae,
    test_bias_can_start_at_geometric_median,
    test_directions_keep_unit_norm_without_radial_gradient,
    test_penalty_warms_up_linearly_and_is_full_in_eval,
)
from torch import Tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- gated_sae: Rajamanoharan et al. 2024, 2404.16014 ----------------------------------------------------------------


def gated(shifted: Any, **settings: Any) -> Any:
    return shifted(build("gated_sae", **{"latent_dim": 12, "l1": 0.7, **settings}))


def gated_by_hand(model: Any, x: Tensor, frozen: bool = True) -> dict[str, Tensor]:
    W, b, D = model.encoder.weight, model.decoder.b_X, model.decoder.W_NX
    W_mag = torch.diag(model.r_N.exp()) @ W
    gate = (x.flatten(1) - b) @ W.T + model.encoder.bias
    f = torch.where(gate > 0, ((x.flatten(1) - b) @ W_mag.T + model.b_mag_N).clamp(min=0), 0.0)
    via = gate.clamp(min=0) @ (D.detach() if frozen else D) + (b.detach() if frozen else b)
    return {
        "f": f, "x_hat": f @ D + b, "l1": gate.clamp(min=0).sum(1).mean(),
        "aux": (via - x.flatten(1)).square().sum(1).mean(), "sse": (f @ D + b - x.flatten(1)).square().sum(1).mean(),
    }  # fmt: skip


def test_gated_loss_and_gradients_match_paper(shifted: Any) -> None:
    model, x = gated(shifted), data(20)
    expected, terms = gated_by_hand(model, x), model.loss(x)
    torch.testing.assert_close(model.encode(x), expected["f"])
    torch.testing.assert_close(model(x).flatten(1), expected["x_hat"])
    torch.testing.assert_close(terms["nll"], expected["sse"] + 12 * math.log(math.pi))
    for term in ("l1", "aux"):
        torch.testing.assert_close(terms[term], expected[term])
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.7 * terms["l1"] + terms["aux"])
    by_hand_loss = expected["sse"] + 0.7 * expected["l1"] + expected["aux"]
    assert_same(gradients(terms["loss"], model), gradients(by_hand_loss, model))
    assert 0 < (expected["f"] == 0).sum() < expected["f"].numel()


def test_each_gated_term_trains_its_own_parameters(shifted: Any) -> None:
    model, x = gated(shifted), data(20)
    terms = model.loss(x)
    gate = {"encoder.weight", "encoder.bias", "decoder.b_X"}
    for term, moved in (
        ("aux", gate), ("l1", gate),
        ("nll", {"encoder.weight", "r_N", "b_mag_N", "decoder.W_NX", "decoder.b_X"}),
    ):  # fmt: skip
        found = gradients(terms[term], model)
        assert {name for name, g in found.items() if g.any()} == moved, term
    # the decoder's bias is detached, the encoder's is not
    found, thawed = (gradients(aux, model)["decoder.b_X"] for aux in (
        terms["aux"], gated_by_hand(model, x, frozen=False)["aux"],
    ))  # fmt: skip
    of_gate = torch.autograd.grad(terms["aux"], model.encoder.bias)[0]
    torch.testing.assert_close(found, -of_gate @ model.encoder.weight)
    assert (thawed - found).abs().max() > 1e-2


def test_equal_gates_and_magnitudes_equal_relu_sae(shifted: Any) -> None:
    model, x = gated(shifted), data(20)
    relu = shifted(sae())
    with torch.no_grad():
        model.r_N.zero_()
        model.b_mag_N.copy_(model.encoder.bias)
    relu.load_state_dict({name: v for name, v in model.state_dict().items() if name not in ("r_N", "b_mag_N")})
    torch.testing.assert_close(model.encode(x), relu.encode(x))
    torch.testing.assert_close(model.loss(x)["nll"], relu.loss(x)["nll"])
    torch.testing.assert_close(model.loss(x)["l1"], relu.loss(x)["l1"])
    with torch.no_grad():
        model.r_N.fill_(math.log(2))
        model.b_mag_N.mul_(2)
    torch.testing.assert_close(model.encode(x), 2 * relu.encode(x))  # r is used as exp(r), not as r or 1 + r


def test_gated_sae_avoids_l1_shrinkage(lbfgs: Any) -> None:
    """One direction with coefficients of at least 1: the L1 code is too small by lam / 2, the gated code is exact."""
    d = F.normalize(torch.randn(6, dtype=torch.float64), dim=0)
    a = torch.linspace(1, 3, 40, dtype=torch.float64)[:, None]
    share = {}
    for name in ("sae_l1", "gated_sae"):
        model = build(name, input_shape=(6,), latent_dim=1, l1=0.8)
        with torch.no_grad():
            model.decoder.W_NX.copy_(d[None])
            model.encoder.weight.copy_(d[None])
        for fixed in (model.decoder.W_NX, model.decoder.b_X, model.encoder.weight):
            fixed.requires_grad_(False)
        lbfgs(model, a * d, 60)
        share[name] = float((a - model.encode(a * d)).detach().mean())
    assert share["sae_l1"] == pytest.approx(0.4, abs=1e-4)
    assert share["gated_sae"] == pytest.approx(0, abs=1e-4)


def test_april_form_weighs_gates_and_keeps_the_bias(shifted: Any) -> None:
    model, x = shifted(build("gated_sae", latent_dim=12, l1=0.3, form="april")), data(9)
    model.decoder.W_NX.data.mul_(torch.linspace(0.5, 2, 12, dtype=torch.float64)[:, None])
    shared = x.flatten(1) @ model.encoder.weight.T
    gate, magnitude = shared + model.encoder.bias, model.r_N.exp() * shared + model.b_mag_N
    torch.testing.assert_close(model.encode(x), torch.where(gate > 0, magnitude.clamp(min=0), 0))
    penalty = (gate.clamp(min=0) * model.decoder.W_NX.norm(dim=1)).sum(1).mean()
    torch.testing.assert_close(model.loss(x)["l1"], penalty)
    before = model.decoder.W_NX.detach().clone()
    model.after_optimizer_step()
    assert torch.equal(model.decoder.W_NX, before)
