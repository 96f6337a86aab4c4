"""Transposed convolutions of sequences and volumes whose bias is added apart, against torch's own."""

from itertools import product

import pytest
import torch
from test_conv2d import assert_same
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from aezoo.speed import transposed_conv

LAYERS = {
    1: (transposed_conv.ConvTranspose1d, nn.ConvTranspose1d),
    3: (transposed_conv.ConvTranspose3d, nn.ConvTranspose3d),
}


@pytest.fixture
def apart(monkeypatch):
    """Whether the last layer has taken its bias apart."""
    taken: list[bool] = []
    real = transposed_conv.with_bias_apart
    monkeypatch.setattr(transposed_conv, "with_bias_apart", lambda *args: (taken.append(True), real(*args))[1])
    return lambda: bool([taken.pop() for _ in taken[:]])


def twins(rank, *args, **kwargs):
    torch.manual_seed(5)
    mine, theirs = (cls(*args, **kwargs).double() for cls in LAYERS[rank])
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", LAYERS)
def test_same_values_and_gradients_as_torch(monkeypatch, apart, rank, bias):
    monkeypatch.setattr(transposed_conv, "_MANY", 0)
    cases = 0
    for kernel, stride, padding, dilation, groups in product((2, 3), (1, 2, 3), (0, 1), (1, 2), (1, 2)):
        for extra in range(max(stride, dilation)):
            mine, theirs = twins(rank, 4, 6, kernel, stride, padding, extra, groups, bias, dilation)
            x = torch.randn(2, 4, *(4, 3, 2)[:rank], dtype=torch.float64, requires_grad=True)
            rest = any(n % stride for n in theirs(x).shape[2:])
            assert_same(mine, theirs, x)
            assert apart() is (bias and rest)
            cases += rest
    assert cases > 20


@pytest.mark.parametrize("rank", LAYERS)
def test_a_bias_is_taken_apart_where_that_pays(apart, rank):
    x = torch.randn(2, 4, *[4] * rank)
    channels = {1: (36, 37), 3: (1, 1)}[rank]
    found = []
    for n in channels:
        up = LAYERS[rank][0](4, n, 3, 2, 1)
        torch.testing.assert_close(up(x), LAYERS[rank][1].forward(up, x))
        found.append(apart())
    # 7 points and 343
    assert found == [n * 7**rank >= 256 for n in channels]
    LAYERS[rank][0](4, 64, 3, 2, 1, (0, 1, 1)[:rank])(x)
    assert apart()
    up = LAYERS[rank][0](4, 64, 3, 2, 1)
    up(x[0])
    up(x, [8] * rank)
    assert not apart()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = up(x)
    assert apart()
    assert lowered.dtype == torch.bfloat16
    torch.testing.assert_close(lowered.float(), up(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("rank", LAYERS)
def test_a_bias_that_is_computed_is_computed_once(apart, rank):
    class Counts(nn.Module):
        def forward(self, bias):
            calls.append(1)
            return bias

    calls: list[int] = []
    up, x = LAYERS[rank][0](4, 64, 3, 2, 1), torch.randn(2, 4, *[4] * rank)
    wanted = up(x)
    assert apart()
    register_parametrization(up, "bias", Counts())
    calls.clear()
    torch.testing.assert_close(up(x), wanted)
    assert calls == [1]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("rank", LAYERS)
def test_graphs_for_elsewhere_say_convolution(apart, rank):
    up, x = LAYERS[rank][0](4, 64, 3, 2, 1), torch.randn(2, 4, *[4] * rank)
    traced = torch.jit.trace(up, x, check_trace=False)
    exported = torch.export.export(up, (x,))
    assert not apart()
    assert str(traced.inlined_graph).count("aten::add") == 0
    assert [str(n.target) for n in exported.graph.nodes if n.op == "call_function"] == [
        {1: "aten.conv_transpose1d.default", 3: "aten.conv_transpose3d.input"}[rank]
    ]
    compiled = torch.compile(up, backend="eager")
    torch.testing.assert_close(compiled(x), LAYERS[rank][1].forward(up, x))
