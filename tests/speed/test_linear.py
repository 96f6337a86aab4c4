"""Linear layers with oneDNN compared with torch's: values, derivatives, and when they are used."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from aezoo.speed import linear

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="torch was built without oneDNN",
)
ZEN_5 = {"cpu_name": "AMD EPYC", "avx512_vp2intersect": True}
# inductor and forward-mode AD load the deprecated torch.jit
OF_TORCH = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
SHAPES = [(5,), (2, 3), (2, 1, 4)]


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """As on a processor where MKL uses half of the vector width, for layers of any size; the shapes given to oneDNN."""
    torch.manual_seed(7)
    shapes, product = [], linear.onednn_linear
    monkeypatch.setattr(linear, "MKL_HALF_WIDTH", True)
    monkeypatch.setattr(linear, "_LARGE", 0)
    monkeypatch.setattr(linear, "lowered_by_inductor", False)
    monkeypatch.setattr(linear, "onednn_linear", lambda a, *rest: (shapes.append(tuple(a.shape)), product(a, *rest))[1])
    return shapes


def twins(n_in, n_out, bias=True):
    mine, theirs = linear.Linear(n_in, n_out, bias), nn.Linear(n_in, n_out, bias)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def derivatives(layer, x, weight):
    """Derivatives of a weighted sum of squared outputs, and of the sum of their squares."""
    loss = (layer(x).square() * weight).sum()
    first = torch.autograd.grad(loss, [x, *layer.parameters()], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *layer.parameters()])
    return *first, *second


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", SHAPES, ids=str)
def test_linear_matches_torch_to_second_order(taken, rows, bias):
    mine, theirs = twins(4, 3, bias)
    x, weight = torch.randn(*rows, 4, requires_grad=True), torch.randn(*rows, 3)
    torch.testing.assert_close(mine(x), theirs(x))
    assert taken == [(*rows, 4)]
    for found, wanted in zip(derivatives(mine, x, weight), derivatives(theirs, x, weight), strict=True):
        torch.testing.assert_close(found, wanted)
    assert len(taken) > 6


@pytest.mark.parametrize("rows", SHAPES, ids=str)
def test_batched_gradients_match_torch(taken, rows):
    """Vmap over gradients of both orders, which only supports torch's operators."""
    x, many = torch.randn(*rows, 4), torch.randn(5, *rows, 3)
    found, wanted = (
        [
            torch.autograd.functional.jacobian(layer, x, vectorize=True),
            torch.autograd.functional.hessian(lambda t, layer=layer: layer(t).pow(3).sum(), x, vectorize=True),
            *torch.autograd.grad(layer(x), [*layer.parameters()], many, is_grads_batched=True),
        ]
        for layer in twins(4, 3)
    )
    torch.testing.assert_close(found, wanted)
    assert taken


# of torch 2.15, about its own tensors
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("rows", SHAPES, ids=str)
def test_product_operator_passes_opcheck(rows):
    """Schema, meta shapes, derivatives, and all of them under AOTAutograd."""
    for bias in (None, torch.randn(3, requires_grad=True)):
        a, b = torch.randn(*rows, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
        torch.library.opcheck(torch.ops.aezoo.product, (a, b, bias))


def test_non_contiguous_inputs_match_torch(taken):
    mine, theirs = twins(4, 3)
    x = torch.randn(4, 6).t()
    torch.testing.assert_close(mine(x), theirs(x))
    torch.testing.assert_close(mine(x[::2, :]), theirs(x[::2, :]))
    found = linear.linear(torch.randn(5, 3)[:, None].expand(5, 2, 3), theirs.weight.t())
    assert found.shape == (5, 2, 4) and not found._is_view()
    assert len(taken) == 3


def test_strided_bias_matches_torch(taken):
    x, weight = torch.randn(5, 4), torch.randn(3, 4)
    for bias in (torch.arange(6.0)[::2], torch.full((1,), 2.0).expand(3), torch.randn(3, 2)[:, 1]):
        torch.testing.assert_close(linear.linear(x, weight, bias), F.linear(x, weight, bias))
    assert len(taken) == 3


def test_overlapping_windows_match_torch(taken):
    mine, theirs = twins(4, 3)
    long = torch.randn(8)
    for x in (long.unfold(0, 4, 1), long.unfold(0, 4, 2), long.expand(3, 8)[:, :4]):
        found, wanted = (torch.autograd.grad(m(x).pow(2).sum(), [*m.parameters()]) for m in (mine, theirs))
        torch.testing.assert_close(found, wanted)
        weight = x.t()[:, :2].t()
        torch.testing.assert_close(linear.linear(x, weight), F.linear(x, weight))
    assert len(taken) == 9


class Strides(TorchDispatchMode):
    """Records the shape and strides of each weight matrix given to oneDNN."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.mkldnn._linear_pointwise.default:
            self.seen.append((tuple(args[1].shape), args[1].stride()))
        return function(*args, **(kwargs or {}))


def test_strided_weights_are_copied_for_onednn():
    """For example a prefix of a dictionary, or the gradient of a slice of a code."""
    wide, x = torch.randn(6, 9), torch.randn(5, 4)
    with Strides() as strides:
        for weight in (wide[:3, :4], wide.t()[:3, :4], wide[:4, ::3].t(), wide[:1, :4], wide[::5, :4][:, :4]):
            torch.testing.assert_close(linear.linear(x, weight), F.linear(x, weight))
        code, weight = torch.randn(5, 9)[:, 2:6], torch.randn(3, 4, requires_grad=True)
        found, wanted = (torch.autograd.grad(f(code, weight).pow(2).sum(), weight) for f in (linear.linear, F.linear))
    torch.testing.assert_close(found, wanted)
    assert len(strides.seen) == 7
    for (n, k), given in strides.seen:
        assert given in ((k, 1), (1, n))


def test_saved_tensors_match_torch(taken):
    """No more tensors than torch saves: others may change or be freed."""
    x = torch.randn(5, 4)
    for frozen in ((), ("weight",), ("weight", "bias"), ("bias",)):
        for needs in (False, True):
            kept = []
            for layer in twins(4, 3):
                for name in frozen:
                    getattr(layer, name).requires_grad_(False)
                seen: list[torch.Size] = []
                keep = lambda t, seen=seen: (seen.append(t.shape), t)[1]  # noqa: E731
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                    layer(x.clone().requires_grad_(needs))
                # torch saves the transpose
                kept.append(sorted(tuple(sorted(shape)) for shape in seen))
            assert kept[0] == kept[1], (frozen, needs)
    assert taken


@OF_TORCH
@pytest.mark.parametrize("again", [False, True])
def test_gradients_of_outer_graph_inside_transform(taken, again):
    x, of_each, results = torch.randn(5, 4, requires_grad=True), torch.randn(6, 5, 3), []
    for layer in twins(4, 3):
        y = layer(x).pow(3)
        of_x = lambda g, y=y: torch.autograd.grad(y, x, g, True, again)[0]  # noqa: E731
        with forward_ad.dual_level():
            results.append([vmap(of_x)(of_each), *forward_ad.unpack_dual(of_x(forward_ad.make_dual(*of_each[:2])))])
    torch.testing.assert_close(*results)
    assert taken


def test_unneeded_gradients_are_not_computed(taken):
    mine, _ = twins(4, 3)
    mine(torch.randn(5, 4)).sum().backward()
    assert taken == [(5, 4), (3, 5)]
    taken.clear()
    mine.requires_grad_(False)(torch.randn(5, 4, requires_grad=True)).sum().backward()
    assert taken == [(5, 4), (5, 3)]
    with torch.inference_mode():
        torch.testing.assert_close(mine(torch.ones(1, 4))[0], mine.weight.sum(1) + mine.bias)


def test_flop_counter_matches_torch():
    work = []
    for layer in twins(4, 3):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(2, 5, 4, requires_grad=True)).sum().backward()
        work.append(counter.get_total_flops())
    assert work == [3 * 2 * 10 * 4 * 3] * 2


def test_state_dict_and_deepcopy_match_torch():
    mine, theirs = twins(4, 3)
    assert isinstance(mine, nn.Linear) and [*mine.state_dict()] == [*theirs.state_dict()]
    x = torch.randn(5, 4)
    torch.testing.assert_close(copy.deepcopy(mine)(x), theirs(x))


@OF_TORCH
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_use_product_operator(backend):
    mine, theirs = twins(4, 3)
    x = torch.randn(5, 4, requires_grad=True)
    step, graphs = torch.compile(lambda x: mine(x).relu().sum(), backend=backend), []
    wanted = theirs(x).relu().sum()
    torch.testing.assert_close(step(x), wanted)
    for a, b in zip(
        torch.autograd.grad(step(x), [x, *mine.parameters()]),
        torch.autograd.grad(wanted, [x, *theirs.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    torch.compile(mine, backend=lambda module, inputs: (graphs.append(module.graph), module.forward)[1])(x)
    (graph,) = graphs
    assert "aezoo.product.default" in {str(node.target) for node in graph.nodes}


@pytest.mark.slow
@OF_TORCH
def test_transforms_and_forward_ad_use_torch_linear(taken):
    mine, theirs = twins(4, 3)
    x = torch.randn(5, 4)

    def same(use):
        torch.testing.assert_close(use(mine), use(theirs), rtol=0, atol=0)
        assert taken == []

    for transform in (jacrev, jacfwd, hessian):
        same(lambda m, transform=transform: vmap(transform(m))(x))
    same(lambda m: jvp(m, (x,), (x,))[1])
    with forward_ad.dual_level():
        same(lambda m: forward_ad.unpack_dual(m(forward_ad.make_dual(x, x))).tangent)
    of_sample = lambda m: grad(lambda p, t: functional_call(m, p, (t[None],)).square().sum())  # noqa: E731
    same(lambda m: vmap(of_sample(m), (None, 0))(dict(m.named_parameters()), x))
    same(lambda m: torch.compile(vmap(jacrev(m)), backend="aot_eager")(x))
    same(lambda m: m(x[0]))
    same(lambda m: copy.deepcopy(m).double()(x.double()))
    same(lambda m: copy.deepcopy(m).bfloat16()(x.bfloat16()))
    same(lambda m: torch.jit.trace(m, x, check_trace=False)(x))
    same(lambda m: torch.export.export(m, (x,)).module()(x))
    for strict in (False, True):
        assert "aezoo" not in str(torch.export.export(mine, (x,), strict=strict).graph)
    same(lambda m: torch.fx.symbolic_trace(nn.Sequential(m))(x))
    with torch.autocast("cpu", torch.bfloat16):
        same(lambda m: m(x))
    mine(x)
    assert taken == [(5, 4)]


class Own(torch.Tensor):
    """A subclass with its own implementation."""


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sparse_and_subclass_tensors_use_torch_linear(taken):
    x, weight, bias = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3)
    for a, b, c in (
        (x.to_sparse(), weight, None),
        (x, weight.to_sparse(), None),
        (x.as_subclass(Own), weight, bias),
        (x, nn.Parameter(weight.as_subclass(Own)), bias),
        (x, weight, bias.as_subclass(Own)),
        (torch.nested.nested_tensor([x, x[:2]]), weight, bias),
        (x, weight[0], None),
        (x, weight, bias[None]),
        (x, weight, bias[:1]),
        (x, weight, torch.tensor(2.0)),
    ):
        found, wanted = (f(a, b, c) for f in (linear.linear, F.linear))
        assert type(found) is type(wanted)
        if not found.is_nested:
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert taken == []


@pytest.mark.slow
def test_data_dependent_sizes_use_torch_linear(taken, monkeypatch):
    monkeypatch.setattr(linear, "_LARGE", 240)
    mine, theirs = twins(4, 3)
    x = torch.randn(100, 4)
    chosen = lambda m: lambda x: m(x[x[:, 0] > 0])  # noqa: E731
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = torch.compile(chosen(mine), backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, chosen(theirs)(x))
    for layer in (mine, theirs):
        part = x.clone().requires_grad_()
        torch._dynamo.mark_dynamic(part, 0, min=2, max=4000)
        torch.compile(layer, backend="aot_eager", dynamic=True)(part).sum().backward()
        assert part.grad is not None


@pytest.mark.slow
def test_linear_module_can_be_reloaded():
    code = "import importlib; from aezoo.nets import linear; importlib.reload(linear)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_small_products_and_other_processors_use_torch(taken, monkeypatch):
    mine, _ = twins(4, 3)
    monkeypatch.setattr(linear, "_LARGE", 5 * 4 * 3)
    mine(torch.randn(4, 4))
    assert taken == []
    mine(torch.randn(5, 4))
    assert taken.pop() == (5, 4)
    monkeypatch.setattr(linear, "MKL_HALF_WIDTH", False)
    mine(torch.randn(5, 4))
    assert taken == []


def test_shape_mismatch_raises_torch_error(taken):
    for layer in twins(4, 3):
        with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied \(5x6 and 4x3\)"):
            layer(torch.randn(5, 6))
    assert taken == []


def test_disabled_onednn_uses_torch_linear(taken, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    twins(4, 3)[0](torch.randn(5, 4))
    assert taken == []


def test_other_devices_use_torch_linear(taken):
    mine, _ = twins(4, 3)
    assert mine.to("meta")(torch.randn(5, 4, device="meta")).shape == (5, 3)
    assert taken == []


@pytest.mark.parametrize(
    ("has", "wanted"),
    [
        (ZEN_5, True),
        ({"cpu_name": "AMD EPYC", "avx512_vp2intersect": False}, False),
        ({"cpu_name": "AMD Ryzen 5"}, False),
        ({"cpu_name": "Intel(R) Core(TM)", "avx512_vp2intersect": True}, False),
        ({}, False),
    ],
    ids=str,
)
def test_half_width_is_detected_on_amd_avx512(monkeypatch, has, wanted):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert linear._mkl_uses_half_width() is wanted
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not linear._mkl_uses_half_width()


def gone(error):
    def product(a, b):
        raise error("the operator is another one")

    return product


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_missing_onednn_operator_disables_path(monkeypatch, error):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ZEN_5, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert linear._mkl_uses_half_width()
    monkeypatch.setattr(linear, "onednn_linear", gone(error))
    assert not linear._mkl_uses_half_width()


def test_half_width_is_false_without_capabilities_api(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not linear._mkl_uses_half_width()
