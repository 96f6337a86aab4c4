"""Convolutions by matrix products against torch's own: values, derivatives of every kind, and where they are taken."""

import csv
from itertools import product

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from aezoo.nets import conv2d

KERNELS, STRIDES, PADDINGS = (
    [(3, 3), (2, 3), (4, 4), (1, 3)],
    [(1, 1), (2, 2), (2, 1), (3, 3)],
    [(0, 0), (1, 1), (2, 1)],
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


@pytest.fixture
def always(monkeypatch):
    """Products for layers of any size."""
    monkeypatch.setattr(conv2d, "_POINTS", 10**6)
    monkeypatch.setattr(conv2d, "_CHANNELS", 0)


@pytest.fixture
def taken(monkeypatch):
    """Which ways were taken."""
    ways: list[str] = []
    for layer in (conv2d.Conv2d, conv2d.ConvTranspose2d):
        for name in {"by_products", "with_bias_apart"} & set(vars(layer)):
            monkeypatch.setattr(layer, name, noted(ways, name, getattr(layer, name)))
    return ways


def noted(ways, name, method):
    def spy(self, *args):
        ways.append(name)
        return method(self, *args)

    return spy


def twins(ours, *args, **kwargs):
    """Our layer and torch's with the same weights, in double precision."""
    mine = ours(*args, **kwargs).double()
    theirs = ours.__base__(*args, **kwargs).double()
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def assert_same(mine, theirs, x):
    ours, wanted = mine(x), theirs(x)
    assert ours.shape == wanted.shape
    torch.testing.assert_close(ours, wanted)
    weight = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(ours, [x, *mine.parameters()], weight),
        torch.autograd.grad(wanted, [x, *theirs.parameters()], weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_same_values_and_gradients_as_torch_for_any_geometry(always, taken, kernel, bias):
    cases = 0
    for stride, padding, h, w in product(STRIDES, PADDINGS, (3, 4, 5), (4, 5)):
        x = torch.randn(2, 3, h, w, dtype=torch.float64, requires_grad=True)
        if all(n + 2 * p >= k for n, p, k in zip((h, w), padding, kernel, strict=True)):
            assert_same(*twins(conv2d.Conv2d, 3, 5, kernel, stride, padding, bias=bias), x)
            cases += 1
        for extra in product(range(min(2, stride[0])), range(min(2, stride[1]))):
            size = zip((h, w), stride, padding, kernel, extra, strict=True)
            if all((n - 1) * s - 2 * p + k + e > 0 for n, s, p, k, e in size):
                assert_same(*twins(conv2d.ConvTranspose2d, 3, 5, kernel, stride, padding, extra, bias=bias), x)
                cases += 1
    assert cases > 150
    assert taken == ["by_products"] * cases


def autoencoder(conv, transposed):
    return nn.Sequential(conv(2, 4, 3, 2, 1), nn.Tanh(), transposed(4, 2, 3, 2, 1, 1)).double()


def both():
    mine, theirs = autoencoder(conv2d.Conv2d, conv2d.ConvTranspose2d), autoencoder(nn.Conv2d, nn.ConvTranspose2d)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


# torch.func's forward mode loads what torch itself has deprecated
FORWARD = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@FORWARD
@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
def test_derivatives_of_torch_func(always, taken, transform):
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    found, wanted = (vmap(transform(lambda t, m=m: m(t[None])[0]))(x) for m in both())
    torch.testing.assert_close(found, wanted)
    assert set(taken) == {"by_products"}


@FORWARD
def test_directions_gradients_of_samples_and_gradients_of_gradients(always):
    x, v = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    mine, theirs = both()
    torch.testing.assert_close(jvp(mine, (x,), (v,)), jvp(theirs, (x,), (v,)))

    def of_samples(m):
        loss = grad(lambda p, t: functional_call(m, p, (t[None],)).square().sum())
        return vmap(loss, (None, 0))(dict(m.named_parameters()), x)

    torch.testing.assert_close(of_samples(mine), of_samples(theirs))
    assert torch.autograd.gradgradcheck(mine, x[:1].requires_grad_())


def test_by_autocast_as_torch_in_bfloat16(always, taken, monkeypatch):
    copied, real = [], conv2d.Patches.apply
    monkeypatch.setattr(conv2d.Patches, "apply", lambda x, geometry: (copied.append(x.dtype), real(x, geometry))[1])
    x = torch.randn(5, 8, 4, 4)
    mine, theirs = (
        autoencoder_of_8(conv2d.Conv2d, conv2d.ConvTranspose2d),
        autoencoder_of_8(nn.Conv2d, nn.ConvTranspose2d),
    )
    theirs.load_state_dict(mine.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = mine(x), theirs(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02)
    assert taken == ["by_products"] * 2
    assert copied == [torch.bfloat16]  # half of the bytes of the input


def autoencoder_of_8(conv, transposed):
    return nn.Sequential(conv(8, 16, 3, 2, 1), transposed(16, 8, 3, 2, 1, 1))


def test_products_where_grids_are_small_and_channels_many():
    """What `benchmarks.convolutions` found: the rule is read off its rows."""
    for n_in, n_out, side, wanted in [
        (256, 512, 2, True),
        (256, 256, 4, True),
        (128, 256, 4, True),
        (128, 128, 4, False),
        (64, 128, 2, True),
        (64, 64, 2, False),
        (512, 512, 5, False),
        (64, 64, 1, False),
        (512, 512, 1, True),
    ]:
        assert conv2d.products_pay(conv2d.Conv2d(n_in, n_out, 3), (side, side)) is wanted, (n_in, n_out, side)
    assert not conv2d.products_pay(conv2d.Conv2d(512, 512, 1), (2, 2))


def test_a_layer_takes_the_way_that_pays(taken):
    down, up = conv2d.Conv2d(128, 128, 3, 2, 1), conv2d.ConvTranspose2d(128, 128, 3, 2, 1, 1)
    small, large = torch.randn(2, 128, 2, 2), torch.randn(2, 128, 16, 16)
    down(large)
    assert taken == []
    up(large)
    assert taken == ["with_bias_apart"]
    with torch.no_grad():  # the bias costs in the backward pass alone
        up(large)
    assert taken == ["with_bias_apart"]
    down(up(small))
    assert taken == ["with_bias_apart", "by_products", "by_products"]
    torch.testing.assert_close(up(large), nn.ConvTranspose2d.forward(up, large))


@pytest.mark.parametrize(
    "settings",
    [{"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}, {"padding": "same"}, {"padding": "valid"}],
    ids=str,
)
def test_settings_that_products_lack_are_torchs(always, taken, settings):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    assert_same(*twins(conv2d.Conv2d, 4, 6, 3, **({"padding": 1} | settings)), x)
    if settings.keys() & {"groups", "dilation"}:
        assert_same(*twins(conv2d.ConvTranspose2d, 4, 6, 3, padding=1, **settings), x)
    assert taken == []


def test_what_does_not_fit_is_told_in_torchs_words(always):
    down, up = conv2d.Conv2d(4, 6, 5), conv2d.ConvTranspose2d(4, 6, 3)
    for layer, x, words in (
        (down, torch.zeros(2, 4, 3, 3), "Kernel size can't be greater than actual input size"),
        (down, torch.zeros(2, 3, 6, 6), "expected input.* to have 4 channels, but got 3"),
        (up, torch.zeros(2, 3, 6, 6), "expected input.* to have 4 channels, but got 3"),
    ):
        with pytest.raises(RuntimeError, match=words):
            layer(x)


def test_autocast_leaves_double_precision(always):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        for layer in (conv2d.Conv2d(4, 6, 3).double(), conv2d.ConvTranspose2d(4, 6, 3).double()):
            assert layer(x).dtype == torch.float64


def test_one_image_and_a_size_that_is_asked_for_are_torchs(always, taken):
    x = torch.randn(4, 5, 5, dtype=torch.float64, requires_grad=True)
    assert_same(*twins(conv2d.Conv2d, 4, 6, 3), x)
    up, theirs = twins(conv2d.ConvTranspose2d, 4, 6, 3, 2, 1)
    torch.testing.assert_close(up(x[None], [10, 10]), theirs(x[None], [10, 10]))
    assert taken == []


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_graphs_say_convolution(always, taken):
    net = nn.Sequential(conv2d.Conv2d(4, 6, 3), conv2d.ConvTranspose2d(6, 4, 3))
    x = torch.randn(2, 4, 6, 6)
    graphs = []
    torch.compile(net, backend=lambda module, inputs: (graphs.append(module.graph), module.forward)[1])(x)
    calls = [node.target.__name__ for graph in graphs for node in graph.nodes if node.op == "call_function"]
    assert calls == ["conv2d", "conv_transpose2d"]
    traced = torch.jit.trace(net, x, check_trace=False)
    assert str(traced.inlined_graph).count("aten::_convolution") == 2
    ops = [str(node.target) for node in torch.export.export(net, (x,)).graph.nodes if node.op == "call_function"]
    assert [op.partition(".default")[0] for op in ops] == ["aten.conv2d", "aten.conv_transpose2d.input"]
    assert taken == []


def test_gradients_lie_as_their_weights_do(always):
    """Else the first thing that happens to them is a copy, and fused optimisers read both as one."""
    for layout in (torch.contiguous_format, torch.channels_last):
        for layer in (conv2d.Conv2d(8, 16, 3, 2, 1), conv2d.ConvTranspose2d(8, 16, 3, 2, 1, 1)):
            layer.to(memory_format=layout)
            out = layer(torch.randn(5, 8, 4, 4))
            (gradient,) = torch.autograd.grad(out.square().sum(), [layer.weight])
            layer.weight.grad = None
            layer(torch.randn(5, 8, 4, 4)).square().sum().backward()
            assert layer.weight.grad.stride() == layer.weight.stride()
            if layout is torch.channels_last:
                assert gradient.stride() == layer.weight.stride()
            assert out.is_contiguous(memory_format=torch.channels_last)


def test_the_benchmark_measures_both_ways(tmp_path, capsys):
    from benchmarks import convolutions

    words = ["--results", str(tmp_path), "--channels", "8", "--sides", "2", "--batch", "2", "--repeats", "1"]
    convolutions.main(words)
    (path,) = tmp_path.glob("convolutions-fp32-*.csv")
    rows = [*csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#"))]
    assert [(row["layer"], row["stride"]) for row in rows] == [*product(("conv", "transposed"), "12")]
    for row in rows:
        usual = row["bias_apart_ms" if row["layer"] == "transposed" else "torch_ms"]
        assert float(row["speedup"]) == pytest.approx(float(usual) / float(row["products_ms"]), rel=1e-3)
        assert row["chosen"] == "torch"
    assert f"of {len(rows)}" in capsys.readouterr().out
    convolutions.main(words)  # all there already
    assert len(path.read_text().splitlines()) == len(rows) + 2
