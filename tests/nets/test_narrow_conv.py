"""Convolutions that oneDNN computes wrongly in bfloat16 with AVX-512 have correct values and gradients."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import aezoo
from aezoo.nets import narrow_conv
from aezoo.nets.conv_grids import larger_grid, smaller_grid
from aezoo.nets.narrow_conv import Conv2d, ConvTranspose2d
from aezoo.speed import conv2d

CONVS = {1: narrow_conv.Conv1d, 2: Conv2d, 3: narrow_conv.Conv3d}
TRANSPOSED = {1: narrow_conv.ConvTranspose1d, 2: ConvTranspose2d, 3: narrow_conv.ConvTranspose3d}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


@pytest.fixture
def taken(monkeypatch):
    """The results of all calls of `needs_float32`."""
    found, real = [], narrow_conv.needs_float32
    for module in (narrow_conv, conv2d):
        monkeypatch.setattr(module, "needs_float32", lambda *args: (found.append(real(*args)), found[-1])[1])
    return found


def poison(value):
    """Fill freed memory, so that reads of uninitialised memory return this value."""
    for n in (16, 64, 256, 1024, 4096, 16384):
        held = [torch.full((n,), value) for _ in range(4)]
        del held


def assert_right(layer, shape):
    """Compare a bfloat16 layer with a float64 layer of the same values."""
    x = torch.randn(shape).bfloat16()
    torchs = type(layer).__base__
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
    more = {"output_padding": layer.output_padding} if layer.transposed else {}
    exact = torchs(*(getattr(layer, name) for name in names), **more).double()
    exact.load_state_dict(layer.bfloat16().state_dict())
    exact_x, x = x.double().requires_grad_(), x.requires_grad_()
    wanted = exact(exact_x)
    g = torch.randn_like(wanted).bfloat16()
    poison(1e30)
    found = layer(x)
    assert found.dtype == torch.bfloat16
    poison(1e30)
    of_found = torch.autograd.grad(found, [x, *layer.parameters()], g)
    of_wanted = torch.autograd.grad(wanted, [exact_x, *exact.parameters()], g.double())
    for a, b in zip((found, *of_found), (wanted, *of_wanted), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.05 * float(b.detach().abs().max()) + 1e-3)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", [CONVS, TRANSPOSED], ids=["convolution", "transposed"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (3, 1), (4, 2), (5, 3), (4, 4)])
def test_values_and_gradients_are_correct_for_any_grid_width(kind, rank, kernel, stride):
    for size, channels in product((1, 2, 3, 5), ((16, 8), (8, 16))):
        padding = kernel // 2
        if kind is TRANSPOSED and (size - 1) * stride - 2 * padding + kernel < 1:
            continue
        layer = kind[rank](*channels, kernel, stride, padding)
        assert_right(layer, (3, channels[0], *[4] * (rank - 1), size))
        assert_right(layer, (3, channels[0], *[size] * rank))


@pytest.mark.parametrize("net", ["conv", "resnet", "convnext", "conv_keras"])
def test_deep_encoder_on_single_point_grid_has_gradients(net):
    x = torch.rand(16, 1, 8, 8)
    gradients = []
    for lowers in (False, True):
        torch.manual_seed(3)
        model = aezoo.create_model("rae", (1, 8, 8), net=net, hidden_dims=(16, 16, 32, 32, 32), latent_dim=4)
        with torch.autocast("cpu", torch.bfloat16, enabled=lowers):
            poison(float("nan"))
            loss = model.loss(x)["loss"]
        poison(float("nan"))
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.2, atol=0.2 * float(wanted.abs().max()) + 1e-2)


@pytest.mark.parametrize(
    ("layer", "shape", "wanted"),
    [
        (Conv2d(8, 8, 3, 2, 1), (1, 1), True),
        (Conv2d(8, 8, 3, 2, 1), (4, 2), True),
        (Conv2d(8, 8, 3, 2, 1), (2, 4), False),
        (Conv2d(8, 8, 3, 1, 1), (4, 1), False),
        (Conv2d(8, 8, 3, (1, 2), 1), (4, 1), True),
        (Conv2d(8, 8, 3, (2, 1), 1), (4, 1), False),
        (Conv2d(8, 8, 4, 2, 3), (9, 9), True),
        (Conv2d(8, 8, 4, 2, 2), (9, 9), False),
        (Conv2d(8, 8, 4, 2, 2), (9, 3), True),
        (Conv2d(8, 8, 3, 2, 2, dilation=2), (9, 1), True),
        (Conv2d(8, 8, 3, 2, 2, dilation=2), (9, 9), False),
        (Conv2d(8, 8, 3, 2, 2, dilation=2), (9, 4), True),
        (ConvTranspose2d(8, 8, 3, 2, 2, 1, dilation=2), (4, 2), True),
        (ConvTranspose2d(8, 8, 3, 2, 2, 1, dilation=2), (4, 5), False),
        (Conv2d(8, 8, 3, 2, "valid"), (9, 3), False),
        (ConvTranspose2d(8, 8, 3, 2, 1, 1), (1, 1), True),
        (ConvTranspose2d(8, 8, 3, 2, 1), (4, 2), False),
        (ConvTranspose2d(8, 8, 5, 2, 2), (4, 2), True),
        (ConvTranspose2d(8, 8, 4, 3, 2), (4, 2), True),
        (ConvTranspose2d(8, 8, 4, 3, 2, 1), (4, 2), False),
        (narrow_conv.Conv1d(8, 8, 3, 2, 1), (2,), True),
        (narrow_conv.Conv1d(8, 8, 3, 2, 1), (3,), False),
        (narrow_conv.ConvTranspose1d(8, 8, 3, 2, 1), (1,), True),
        (narrow_conv.Conv3d(8, 8, 3, 2, 1), (3, 3, 3), False),
        (narrow_conv.Conv3d(8, 8, 3, 1, 1), (3, 1, 3), True),
        (narrow_conv.Conv3d(8, 8, 3, 2, 1), (2, 3, 3), True),
        (narrow_conv.ConvTranspose3d(8, 8, 3, 2, 1), (1, 2, 2), True),
    ],
    ids=str,
)
def test_layers_needing_float32_are_detected(taken, layer, shape, wanted):
    x = torch.randn(2, 8, *shape)
    with torch.no_grad():
        exact = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            lowered = layer(x)
    assert taken == [False, wanted]
    assert lowered.dtype == torch.bfloat16
    torch.testing.assert_close(lowered.float(), exact, rtol=0.05, atol=0.05)
    assert narrow_conv.needs_float32(layer.bfloat16(), x.bfloat16()) is wanted
    assert not narrow_conv.needs_float32(layer, x[0].bfloat16())


@pytest.mark.slow
def test_every_layer_with_out_of_range_tap_is_detected():
    for kernel, stride, padding, n in product(range(1, 8), range(1, 5), range(8), range(1, 11)):
        small = (n + 2 * padding - kernel) // stride + 1
        if n + 2 * padding < kernel:
            continue
        met = F.conv1d(torch.ones(1, 1, n), torch.eye(kernel)[:, None], stride=stride, padding=padding)[0]
        dead = not met.any(1).all()
        assert narrow_conv._is_narrow(kernel, padding, small, n) or not dead
        assert smaller_grid(nn.Conv1d(1, 1, kernel, stride, padding), (n,)) == (small,)
        for extra in range(stride):
            if n == (small - 1) * stride - 2 * padding + kernel + extra:
                assert larger_grid(nn.ConvTranspose1d(1, 1, kernel, stride, padding, extra), (small,)) == (n,)


@pytest.mark.slow
def test_exported_graph_contains_plain_convolution():
    layer, x = Conv2d(4, 8, 3, 2, 1).bfloat16(), torch.randn(2, 4, 1, 1).bfloat16()
    assert narrow_conv.needs_float32(layer, x)
    ops = [str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes if node.op == "call_function"]
    assert ops == ["aten.conv2d.default"]
    found = torch.compile(layer, backend="aot_eager")(x)
    torch.testing.assert_close(found, nn.Conv2d.forward(layer.float(), x.float()).bfloat16())
