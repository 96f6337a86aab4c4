"""Tests of aezoo/nets/lstm.py."""

import copy
from typing import Any

import pytest
import torch
from finite_differences import assert_gradients_match, assert_network_gradients_match
from torch import nn

from aezoo import nets
from aezoo.nets import lstm

# ---- sequence networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9,), (3, 7), (2, 5, 6), (2, 3, 4, 5)])
def test_steps_follow_first_axis_after_channels(shape: tuple[int, ...]) -> None:
    x = torch.rand(2, *shape)
    steps = lstm.Steps()(x)
    n, features = lstm.steps_of(shape)
    assert steps.shape == (2, n, features) and n * features == x[0].numel()
    for t in range(n):
        assert torch.equal(steps[:, t], x[:, t : t + 1] if len(shape) == 1 else x[:, :, t].flatten(1))
    assert torch.equal(lstm.FromSteps(shape)(steps), x)


@pytest.mark.parametrize("width", [5, 8])
def test_lstm_matches_torch_with_residual_for_equal_widths(width: int, shifted: Any) -> None:
    own, theirs = lstm.LSTM(5, width).double(), nn.LSTM(5, width, batch_first=True).double()
    assert (own.bias[width : 2 * width] == 1).all()
    own = shifted(own)
    for name, p in (("weight_ih_l0", own.weight_ih), ("weight_hh_l0", own.weight_hh), ("bias_ih_l0", own.bias)):
        theirs.get_parameter(name).data.copy_(p)
    theirs.bias_hh_l0.data.zero_()
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(own(x), theirs(x)[0] + (x if width == 5 else 0))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_runs_in_float32_where_onednn_has_no_lstm(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lstm, "_HAS_BF16_LSTM", False)
    layer, x = lstm.LSTM(3, 4), torch.randn(2, 5, 3).bfloat16()
    layer, x = (layer, x.float()) if autocast else (layer.bfloat16(), x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    out.float().sum().backward()
    exact = copy.deepcopy(layer).float()(x.float()).to(x.dtype)
    assert out.dtype == x.dtype and torch.equal(out, exact)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("has_bf16", [True, False])
def test_compiled_layer_is_one_graph(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lstm, "_HAS_BF16_LSTM", has_bf16)
    explained = torch._dynamo.explain(lstm.LSTM(3, 4))(torch.randn(2, 5, 3))
    assert explained.graph_count == 1


def test_gradients_match_finite_differences() -> None:
    assert_network_gradients_match("lstm")
    encoder = nets.encoder("lstm", (2, 6), (3,), (8, 8), "silu")
    assert_gradients_match(encoder, torch.rand(3, 2, 6), length_B=torch.tensor([1, 4, 6]))
