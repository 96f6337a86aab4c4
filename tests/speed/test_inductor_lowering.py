"""Compiled linear layers call oneDNN with matrices that are written once, and equal uncompiled layers."""

import itertools
import math
import re

import pytest
import torch
from torch import nn

from aezoo.speed import inductor_lowering, linear

pytestmark = [
    pytest.mark.skipif(
        not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
        reason="torch was built without oneDNN",
    ),
    # inductor loads the deprecated torch.jit
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _told(monkeypatch):
    """As on a processor where MKL uses half of the vector width, for layers of any size, without compiled functions."""
    torch.manual_seed(7)
    torch._dynamo.reset()
    from torch._functorch import config as of_autograd
    from torch._inductor import config

    monkeypatch.setattr(linear, "MKL_HALF_WIDTH", True)
    monkeypatch.setattr(linear, "_LARGE", 0)
    monkeypatch.setattr(linear, "_MIN_MULTIPLICATIONS", 0)
    assert inductor_lowering.register()
    with config.patch(fx_graph_cache=False), of_autograd.patch(enable_autograd_cache=False):
        yield


def network(*widths):
    parts = [part for pair in itertools.pairwise(widths) for part in (linear.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*parts[:-1])


def code_of(function, *args):
    """A function's result, and inductor's code of its forward and backward passes, both of which are run."""
    from torch._inductor.utils import run_fw_bw_and_get_code

    return run_fw_bw_and_get_code(lambda: torch.compile(function, dynamic=False)(*args))


def calls(code):
    return len(re.findall(r"= torch\.ops\.mkldnn\._linear_pointwise\.default\(", code))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [(6,), (2, 3)], ids=str)
def test_compiled_step_calls_onednn_and_writes_matrices_once(rows):
    layers = network(32, 16, 48)
    x = torch.randint(0, 256, (*rows, 1, 4, 8), dtype=torch.uint8)

    def step(x):
        x = x.float() / 255
        return (layers(x.flatten(-3)).sigmoid() - x.mean()).square().mean()

    step(x).backward()
    wanted = [p.grad for p in layers.parameters()]
    layers.zero_grad()
    loss, (forward, backward) = code_of(step, x)
    torch.testing.assert_close(loss, step(x))
    for p, gradient in zip(layers.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert "aezoo.product" not in re.sub("#.*|'.*?'|\".*?\"", "", forward + backward)
    # two layers; the first needs no gradient of its input
    assert calls(forward) == 2 and calls(backward) == 3
    # the first layer's input is used as it is and transposed
    sizes = [shape.split(", ") for shape in re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", forward)]
    assert sum(math.prod(int(n) for n in size if n) == 6 * 32 for size in sizes) == 1
    # oneDNN copies transposed matrices element by element, so its first factor is row-major
    for first in re.findall(r"_linear_pointwise\.default\((.*?), (?:reinterpret|buf|primals|tan)", backward):
        strides = re.search(r"reinterpret_tensor\(\w+, \((\d+), (\d+)\), \((\d+), (\d+)\)", first)
        assert strides is None or strides[2] == strides[3] or strides[4] == "1", first


@pytest.mark.slow
def test_strided_factors_are_made_contiguous():
    layer, wide = linear.Linear(8, 4), torch.randn(6, 16)
    with torch.no_grad():
        stored = torch.randn(4, 16)
        loose = torch.as_strided(stored, (4, 8), (16, 2))
        found = torch.compile(lambda x, w: linear.linear(x[:, ::2], w, layer.bias), dynamic=False)(wide, loose)
        torch.testing.assert_close(found, nn.functional.linear(wide[:, ::2], loose, layer.bias))


@pytest.mark.slow
def test_dynamic_sizes_call_operator_directly():
    layer = linear.Linear(8, 4)
    run = torch.compile(layer, dynamic=True)
    for rows in (5, 9, 13):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(run(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.slow
def test_missing_inductor_api_disables_lowering(monkeypatch):
    from torch._inductor import lowering

    inductor_lowering.register.cache_clear()
    with monkeypatch.context() as m:
        m.delattr(lowering, "register_lowering")
        assert not inductor_lowering.register()
    inductor_lowering.register.cache_clear()
    assert inductor_lowering.register()


def test_enabling_lowering_sets_linear_flag(monkeypatch):
    monkeypatch.setattr(linear, "lowered_by_inductor", False)
    inductor_lowering.enable()
    assert linear.lowered_by_inductor
    monkeypatch.setattr(linear, "MKL_HALF_WIDTH", False)
    inductor_lowering.enable()
    assert not linear.lowered_by_inductor
