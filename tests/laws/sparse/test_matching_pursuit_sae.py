"""Laws of Matching pursuit sparse autoencoder (Costa et al. 2025)."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from topk_sae_laws import (  # noqa: F401
    build,
    create,
    data,
    same_gradients,
    test_a_fit_keeps_unit_norm_and_starts_from_data,
    test_data_init_runs_once_and_only_if_enabled,
    test_invalid_topk_values_are_refused,
    test_resumed_fit_equals_uninterrupted_fit,
)
from torch import Tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- matching_pursuit_sae: Costa et al. 2025 -------------------------------------------------------------------------


def pursuit(model: Any, x: Tensor, k: int) -> tuple[Tensor, list[Tensor]]:
    """The code and residuals of each sample by the formula, with gradients."""
    W, codes, residuals = model.decoder.W_NX, [], []
    for row in x.flatten(1):
        r, code, rest = row - model.decoder.b_X, torch.zeros(len(W), dtype=x.dtype), []
        for _ in range(k):
            inner = torch.stack([d @ r for d in W])
            i = int(inner.argmax())
            c = inner[i].clamp(min=0)
            code = code + c * torch.eye(len(W), dtype=x.dtype)[i]
            r = r - c * W[i]
            rest.append(r)
        codes.append(code)
        residuals.append(torch.stack(rest))
    return torch.stack(codes), residuals


@pytest.mark.parametrize("k", [1, 4, 12])
def test_code_matches_reference_pursuit_with_gradients(k: int, shifted: Any) -> None:
    model, x = shifted(build("matching_pursuit_sae", k=k)), data(5) * 3
    code, _ = pursuit(model, x, k)
    torch.testing.assert_close(model.encode(x), code)
    terms, expected = model.loss(x), model.nll(model.decoder(code), x).mean()
    torch.testing.assert_close(terms["loss"], expected)
    same_gradients(model, terms["loss"], expected)
    assert ((model.encode(x) > 0).sum(1) <= k).all()
    assert terms["l0"] == (code > 0).sum(1).float().mean()
    if k == 12:
        assert terms["l0"] < 12  # some directions were chosen more than once, and their coefficients are added


def test_residual_shrinks_each_step_and_is_error(shifted: Any) -> None:
    x = data(6) * 3
    model = shifted(build("matching_pursuit_sae", k=8))
    _, residuals = pursuit(model, x, 8)
    lengths = []
    for k in range(1, 9):
        model.k = k
        rest = (x - model(x)).flatten(1)
        torch.testing.assert_close(rest, torch.stack([r[k - 1] for r in residuals]))
        lengths.append(rest.norm(dim=1))
    assert all((b <= a + 1e-12).all() for a, b in pairwise(lengths))
    assert (lengths[-1] < lengths[0]).all()
    with torch.no_grad():  # without unit norm the residual may grow
        model.decoder.W_NX *= 1.6
    model.k = 1
    first = (x - model(x)).flatten(1).norm(dim=1)
    model.k = 8
    assert ((x - model(x)).flatten(1).norm(dim=1) > first).any()


def test_with_orthogonal_directions_matching_pursuit_is_topk(shifted: Any) -> None:
    x = (data(20) - 0.5) * 5
    settings = {"latent_dim": 24, "k": 5}
    model, parallel = shifted(build("matching_pursuit_sae", **settings)), build("topk_sae", **settings)
    with torch.no_grad():
        torch.nn.init.orthogonal_(model.decoder.W_NX)
        parallel.decoder.load_state_dict(model.decoder.state_dict())
        parallel.encoder.weight.copy_(model.decoder.W_NX)
    torch.testing.assert_close(model.encode(x), parallel.encode(x))
    torch.testing.assert_close(model.loss(x)["nll"], parallel.loss(x)["nll"])
    with torch.no_grad():
        model.decoder.W_NX[1:] += model.decoder.W_NX[:1] / 2
        model.decoder.normalise()
        parallel.encoder.weight.copy_(model.decoder.W_NX)
    assert (model.encode(x) - parallel.encode(x)).abs().max() > 0.1


def test_autocast_does_not_change_pursuit_selection() -> None:
    model = create("matching_pursuit_sae", input_shape=(32,), latent_dim=400, k=6)
    x = torch.randn(40, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.encode(x)
        rival = (x @ model.decoder.W_NX.T).argmax(1)
    torch.testing.assert_close(found, model.encode(x))
    apart = rival != (x @ model.decoder.W_NX.T).argmax(1)
    assert apart.any()
    torch.testing.assert_close(found[apart][:3], pursuit(model, x[apart][:3], 6)[0])
