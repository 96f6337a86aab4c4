"""Alternative convolutions compared with torch's: values, derivatives of every kind, and when they are used."""

import csv
from itertools import groupby, product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from aezoo.speed import conv2d, conv_products, linear

KERNELS, STRIDES, PADDINGS = (
    [(3, 3), (2, 3), (4, 4), (1, 3)],
    [(1, 1), (2, 2), (2, 1), (3, 3)],
    [(0, 0), (1, 1), (2, 1), (1, 2)],
)


@pytest.fixture(autouse=True)
def _seed(monkeypatch) -> None:
    torch.manual_seed(7)
    monkeypatch.setattr(linear, "MKL_HALF_WIDTH", False)


@pytest.fixture
def always(monkeypatch):
    """Use products for layers of any size."""
    for most in ("_POINTS", "_FEW_POINTS"):
        monkeypatch.setattr(conv2d, most, 10**6)
    for least in ("_CHANNELS", "_CHANNELS_UNSTRIDED"):
        monkeypatch.setattr(conv2d, least, 0)


@pytest.fixture
def halved(monkeypatch):
    """As on a processor where MKL uses half of the vector width."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(linear, "MKL_HALF_WIDTH", True)


@pytest.fixture
def between(monkeypatch):
    """Use a convolution of the smaller grid for transposed layers of any size."""
    monkeypatch.setattr(conv2d, "_CHANNELS", 10**6)
    monkeypatch.setattr(conv2d, "_LARGE", 0)
    monkeypatch.setattr(conv2d, "_LARGE_IN_16_BITS", 0)
    monkeypatch.setattr(conv2d, "_BETWEEN", 10**6)
    monkeypatch.setattr(conv2d, "_FEW", 0)
    monkeypatch.setattr(conv2d, "_FEW_IN_16_BITS", 0)


@pytest.fixture
def taken(monkeypatch):
    """The paths that were taken."""
    ways: list[str] = []
    for layer in (conv2d.Conv2d, conv2d.ConvTranspose2d):
        for name in {"with_products", "with_overlap_add", "with_sub_pixels", "with_separate_gradients"} & set(
            vars(layer)
        ):
            monkeypatch.setattr(layer, name, noted(ways, name, getattr(layer, name)))
    return ways


def noted(ways, name, method):
    def spy(self, *args):
        ways.append(name)
        return method(self, *args)

    return spy


def twins(ours, *args, **kwargs):
    """Our layer and torch's with the same weights, in float64."""
    mine = ours(*args, **kwargs).double()
    theirs = ours.plain(*args, **kwargs).double()
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


@pytest.mark.slow
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
    assert taken == ["with_products"] * cases


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_sub_pixel_transpose_matches_torch_for_any_geometry(between, taken, kernel, bias):
    cases = 0
    for stride, padding, h, w in product([*STRIDES, (3, 2)], PADDINGS, (1, 4), (5,)):
        if stride == (1, 1):
            continue
        for extra in product(range(min(stride[0], padding[0] + 1)), range(min(stride[1], padding[1] + 1))):
            size = zip((h, w), stride, padding, kernel, extra, strict=True)
            if all((n - 1) * s - 2 * p + k + e > 0 for n, s, p, k, e in size):
                x = torch.randn(2, 3, h, w, dtype=torch.float64, requires_grad=True)
                assert_same(*twins(conv2d.ConvTranspose2d, 3, 2, kernel, stride, padding, extra, bias=bias), x)
                cases += 1
    assert cases > 20
    assert taken == ["with_sub_pixels"] * cases


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [(3, 3), (4, 4), (3, 4)])
def test_single_channel_transpose_with_onednn_matches_torch(halved, between, taken, kernel, bias):
    cases = 0
    for stride, padding, h, w in product([(2, 2), (2, 1), (2, 3)], PADDINGS, (1, 4), (5,)):
        for extra in product(range(min(stride[0], padding[0] + 1)), range(min(stride[1], padding[1] + 1))):
            size = zip((h, w), stride, padding, kernel, extra, strict=True)
            if all((n - 1) * s - 2 * p + k + e > 0 for n, s, p, k, e in size):
                mine = conv2d.ConvTranspose2d(3, 1, kernel, stride, padding, extra, bias=bias)
                theirs = nn.ConvTranspose2d(3, 1, kernel, stride, padding, extra, bias=bias)
                theirs.load_state_dict(mine.state_dict())
                assert_same(mine, theirs, torch.randn(2, 3, h, w, requires_grad=True))
                cases += 1
    assert cases > 10
    assert taken == ["with_overlap_add"] * cases
    geometry = conv2d.Conv2d(1, 3, 3, 2, 1).geometry(torch.zeros(1, 1, 28, 28))
    assert conv2d.use_overlap_add(conv2d.ConvTranspose2d(3, 1, 3, 2, 1, 1), geometry)
    for settings in ((3, 2, 3, 2, 1, 1), (3, 1, 3, 1, 1)):
        assert not conv2d.use_overlap_add(conv2d.ConvTranspose2d(*settings), geometry)
    up = conv2d.ConvTranspose2d(3, 1, 2, 2)
    assert not conv2d.use_overlap_add(up, up.geometry(torch.zeros(1, 3, 14, 14)))
    for settings in ({"dtype": torch.float64}, {"dtype": torch.bfloat16}):
        assert not conv2d.use_overlap_add(conv2d.ConvTranspose2d(3, 1, 3, 2, 1, 1, **settings), geometry)
    with torch.autocast("cpu", torch.bfloat16):
        assert not conv2d.use_overlap_add(conv2d.ConvTranspose2d(3, 1, 3, 2, 1, 1), geometry)


def test_grid_off_the_stride_adds_bias_separately(taken, monkeypatch):
    """Otherwise oneDNN adds the bias element by element, which in bfloat16 takes five times as long as all else."""
    layers = [conv2d.ConvTranspose2d(3, n, 3, 2, 1) for n in (5, 6)]
    assert [conv2d.has_slow_bias(up, up.geometry(torch.zeros(2, 3, 4, 4)).large) for up in layers] == [False, True]
    monkeypatch.setattr(conv2d, "_MANY", 0)
    biases, real = [], F.conv_transpose2d
    monkeypatch.setattr(F, "conv_transpose2d", lambda y, w, b, *a: (biases.append(b), real(y, w, b, *a))[1])
    for stride, extra in (((2, 2), (0, 0)), ((2, 2), (1, 0)), ((2, 2), (0, 1)), ((3, 1), (1, 0))):
        up, theirs = twins(conv2d.ConvTranspose2d, 3, 5, 3, stride, 1, extra)
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        biases.clear()
        assert_same(up, theirs, x)
        assert [b is None for b in biases] == [True, False]
        with torch.no_grad():
            up(x)
    assert taken == ["with_separate_gradients"] * 8
    taken.clear()
    for settings in ({"output_padding": 1}, {"bias": False}):
        conv2d.ConvTranspose2d(3, 5, 3, 2, 1, **settings)(torch.randn(2, 3, 4, 4))
    assert taken == []
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = up.float()(x.float()), theirs.float()(x.float())
    assert taken == ["with_separate_gradients"]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


def test_unreached_output_padding_matches_torch(between, taken):
    up, theirs = twins(conv2d.ConvTranspose2d, 3, 2, 2, 2, 0, 1)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert_same(up, theirs, x)
    assert taken == ["with_separate_gradients"]


def test_sub_pixel_transpose_passes_gradgradcheck(between):
    up = conv2d.ConvTranspose2d(2, 2, 3, 2, 1, 1).double()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: up(x), (x, *up.parameters()))


@pytest.mark.parametrize(("stride", "padding"), [*product(STRIDES, PADDINGS)])
def test_products_skip_zero_padding(stride, padding):
    for (h, w), kernel in product([(4, 4), (5, 3)], [(3, 3), (2, 3)]):
        layer = conv2d.Conv2d(3, 5, kernel, stride, padding)
        x, weight = torch.randn(2, h, w, 3), torch.randn(5, *kernel, 3)
        geometry = layer.geometry(x.permute(0, 3, 1, 2))
        y = torch.zeros(2, *geometry.small, 5)
        work = sum(a.shape[0] * a.shape[1] for a, _, _ in conv_products.direct_products(x, weight, y, geometry))
        points = F.conv2d(torch.ones(1, 1, h, w), torch.ones(1, 1, *kernel), stride=stride, padding=padding).sum()
        assert work == 2 * 3 * points


@pytest.fixture(params=["blocks", "im2col"])
def way(request, monkeypatch):
    """Both paths that copy, for layers of any size."""
    monkeypatch.setattr(conv_products, "_LARGE", 0 if request.param == "blocks" else 10**9)
    monkeypatch.setattr(conv_products, "_FEW_POINTS", 10**6 if request.param == "blocks" else 0)
    monkeypatch.setattr(linear, "HAS_AMX", False)
    return request.param


def all_three(x, weight, y):
    return (
        (conv_products.conv_forward, x, weight),
        (conv_products.conv_input_grad, y, weight),
        (conv_products.conv_weight_grad, x, y),
    )


def sizes(kernels=((3, 3), (2, 3), (4, 3))):
    return product([(4, 4), (5, 3), (9, 8)], kernels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("stride", "padding"), [*product(STRIDES, PADDINGS)])
def test_conv2d_matches_torch_in_16_bits(way, stride, padding, dtype):
    """Exactly, with integers small enough for exact sums."""
    for size, kernel in sizes():
        geometry = conv2d.Conv2d(3, 2, kernel, stride, padding).geometry(torch.zeros(1, 3, *size))
        shapes = ((2, *size, 3), (2, *kernel, 3), (2, *geometry.small, 2))
        x, weight, y = (torch.randint(-1, 2, shape).double() for shape in shapes)
        for work, a, b in all_three(x, weight, y):
            found = work(a.to(dtype), b.to(dtype), geometry)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), work(a, b, geometry), rtol=0, atol=0)
        assert conv_products.choose_algorithm(x.to(dtype), weight, geometry) == way
        assert conv_products.choose_algorithm(x, weight, geometry) == "direct"


@pytest.mark.parametrize(("stride", "padding"), [*product(STRIDES, PADDINGS)])
def test_onednn_products_match_float64(halved, way, stride, padding):
    for size, kernel in sizes(((3, 3), (2, 3), (1, 3), (4, 3))):
        geometry = conv2d.Conv2d(3, 2, kernel, stride, padding).geometry(torch.zeros(1, 3, *size))
        shapes = ((2, *size, 3), (2, *kernel, 3), (2, *geometry.small, 2))
        x, weight, y = (torch.randn(shape) for shape in shapes)
        for work, a, b in all_three(x, weight, y):
            torch.testing.assert_close(work(a, b, geometry), work(a.double(), b.double(), geometry).float())
        assert conv_products.choose_algorithm(x, weight, geometry) == way
        assert (
            conv_products.choose_algorithm(x.double(), weight, geometry)
            == conv_products.choose_algorithm(x[:0], weight, geometry)
            == "direct"
        )


@pytest.mark.parametrize("n", [1, 2])
def test_block_products_are_used_for_large_layers_on_small_grids(halved, monkeypatch, n):
    """Patches are used otherwise; the limits are results of `benchmarks.convolutions`."""
    monkeypatch.setattr(linear, "HAS_AMX", False)
    ways = {}
    for batch, side, dtype in product((31, 32), (1, 2, 4, 5), (torch.float32, torch.bfloat16)):
        geometry = conv2d.Conv2d(256, 256, 3, n, 1).geometry(torch.empty(0, 256, side * n, side * n))
        x, weight = torch.empty(batch, side * n, side * n, 256, dtype=dtype), torch.empty(256, 3, 3, 256, dtype=dtype)
        ways[batch, side, dtype] = conv_products.choose_algorithm(x, weight, geometry)
        monkeypatch.setattr(linear, "HAS_AMX", True)
        assert dtype == torch.float32 or conv_products.choose_algorithm(x, weight, geometry) == "im2col"
        monkeypatch.setattr(linear, "HAS_AMX", False)
    assert {(b, s) for (b, s, _), way in ways.items() if way == "blocks"} == {(31, 1), (32, 1), (32, 2), (32, 4)}
    assert len({*ways.values()}) == 2


@pytest.mark.parametrize("group_by", ["taps", "points"])
@pytest.mark.parametrize(("stride", "padding"), [*product(STRIDES, PADDINGS)])
def test_block_products_cover_each_valid_tap_once(stride, padding, group_by):
    """Without products by zero padding, and with as few products as there are distinct taps or points."""
    for (h, w), kernel in sizes():
        geometry = conv2d.Conv2d(3, 5, kernel, stride, padding).geometry(torch.zeros(1, 3, h, w))
        x, weight, y = torch.zeros(2, h, w, 3), torch.zeros(5, *kernel, 3), torch.zeros(2, *geometry.small, 5)
        found = [*conv_products.block_products(x, weight, y, geometry, group_by)]
        # [h, w, rows, columns]: whether a tap of a point lies inside the image
        taps = torch.eye(kernel[0] * kernel[1]).view(-1, 1, *kernel)
        seen = F.conv2d(torch.ones(1, 1, h, w), taps, stride=stride, padding=padding)[0]
        seen = seen.permute(1, 2, 0).unflatten(2, kernel)
        assert sum(out[0, ..., 0].numel() * part[0, ..., 0].numel() for _, part, out in found) == seen.sum()
        for at, part, out in found:
            assert at.shape == (2, *out.shape[1:3], *part.shape[1:3], 3)
            whole, own = (x, at) if group_by == "taps" else (y, out)
            own += 1
            assert whole.max() == 1
            own -= 1
            for view in (part, out)[group_by == "points" :]:
                view += 1
        alone, kinds = (
            (weight, seen.flatten(0, 1).flatten(1).t()) if group_by == "taps" else (y, seen.flatten(2).flatten(0, 1))
        )
        assert alone.max() == 1
        assert alone.sum(0)[..., 0].count_nonzero() == kinds.any(1).sum()
        # runs of equal neighbours along each axis
        runs = [
            sum(-(-len([*run]) // (stride[axis] if group_by == "taps" else n)) for key, run in groupby(of) if any(key))
            for axis, n in enumerate(geometry.small)
            for of in [kinds_along(seen, axis, group_by)]
        ]
        assert len(found) == runs[0] * runs[1]


def kinds_along(seen, axis, group_by):
    """For each tap (or point) along an axis, the points (or taps) that it combines with inside the border."""
    met = seen.any(1 - axis).any(2 - axis)
    return [tuple(kind) for kind in (met.t() if group_by == "taps" else met).tolist()]


def test_bf16_products_are_rounded_once(way):
    """Partial sums would each be rounded."""
    geometry = conv2d.Conv2d(64, 32, 3, 2, 1).geometry(torch.zeros(1, 64, 8, 8))
    x, weight, y = (
        torch.randn(shape, dtype=torch.bfloat16) for shape in ((8, 8, 8, 64), (32, 3, 3, 64), (8, 4, 4, 32))
    )
    for work, a, b in ((conv_products.conv_forward, x, weight), (conv_products.conv_weight_grad, x, y)):
        wanted = work(a.double(), b.double(), geometry)
        error = (work(a, b, geometry) - wanted).square().mean() / wanted.square().mean()
        assert error.sqrt() < 2**-9


def test_onednn_product_operands_are_contiguous(halved, way, monkeypatch):
    """oneDNN, or torch before it, copies operands with gaps element by element."""
    multiplied, real = [], linear.onednn_linear
    monkeypatch.setattr(linear, "onednn_linear", lambda *a: (multiplied.extend(a), real(*a))[1])
    geometry = conv2d.Conv2d(4, 8, 3, 2, 1).geometry(torch.zeros(1, 4, 4, 4))
    x, weight, y = torch.randn(6, 4, 4, 4), torch.randn(8, 3, 3, 4), torch.randn(6, 2, 2, 8)
    for work, a, b in all_three(x, weight, y):
        work(a, b, geometry)
    assert len(multiplied) == 3 * 2 * (4 if way == "blocks" else 1)
    assert all(m.flatten(0, -2).is_contiguous() or m.t().is_contiguous() for m in multiplied)


@pytest.mark.parametrize("bias", [True, False])
def test_onednn_conv_network_matches_torch(halved, always, taken, bias):
    layers = [(conv2d.Conv2d, nn.Conv2d, (3, 5, 3, 2, 1)), (conv2d.ConvTranspose2d, nn.ConvTranspose2d, (5, 3, 4, 2))]
    mine, theirs = (nn.Sequential(*(pair[i](*pair[2], bias=bias) for pair in layers)) for i in (0, 1))
    theirs.load_state_dict(mine.state_dict())
    assert_same(mine, theirs, torch.randn(2, 3, 6, 6, requires_grad=True))
    assert taken == ["with_products"] * 2


def test_direct_products_multiply_whole_batch_rows():
    """The minimal number of products: only half of the kernel rows meet the border."""
    down = conv2d.Conv2d(3, 5, 3, 2, 1)
    x, weight, y = torch.randn(6, 4, 4, 3), torch.randn(5, 3, 3, 3), torch.randn(6, 2, 2, 5)
    rows = [len(out) for _, _, out in conv_products.direct_products(x, weight, y, down.geometry(x.permute(0, 3, 1, 2)))]
    assert rows == [6, 6, 12, 12, 12, 12]


def test_flop_counter_counts_nonzero_products(always):
    down, up = conv2d.Conv2d(3, 5, 3, 2, 1), conv2d.ConvTranspose2d(5, 3, 3, 2, 1, 1)
    with FlopCounterMode(display=False) as counter:
        up(down(torch.randn(2, 3, 4, 4, requires_grad=True))).sum().backward()
    # a point of 2x2 has 25 of 36 nonzero taps; forward, and for both gradients
    assert counter.get_total_flops() == 2 * 3 * 2 * 25 * 3 * 5 * 2


def autoencoder(conv, transposed):
    return nn.Sequential(conv(2, 4, 3, 2, 1), nn.Tanh(), transposed(4, 2, 3, 2, 1, 1)).double()


def both():
    mine, theirs = autoencoder(conv2d.Conv2d, conv2d.ConvTranspose2d), autoencoder(nn.Conv2d, nn.ConvTranspose2d)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


# torch.func's forward mode loads deprecated parts of torch
FORWARD = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@FORWARD
@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
def test_torch_func_derivatives_match_torch(always, taken, transform):
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    found, wanted = (vmap(transform(lambda t, m=m: m(t[None])[0]))(x) for m in both())
    torch.testing.assert_close(found, wanted)
    assert taken == []


@FORWARD
def test_jvp_and_per_sample_gradients_match_torch(always, taken):
    x, v = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    mine, theirs = both()
    wanted = jvp(theirs, (x,), (v,))
    torch.testing.assert_close(jvp(mine, (x,), (v,)), wanted)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(mine(forward_ad.make_dual(x, v)))
    torch.testing.assert_close(found.tangent, wanted[1])

    def of_samples(m):
        loss = grad(lambda p, t: functional_call(m, p, (t[None],)).square().sum())
        return vmap(loss, (None, 0))(dict(m.named_parameters()), x)

    torch.testing.assert_close(of_samples(mine), of_samples(theirs))
    assert taken == []


@pytest.mark.slow
def test_product_path_passes_gradgradcheck(always, taken):
    mine, _ = both()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: mine(x), (x, *mine.parameters()))
    assert set(taken) == {"with_products"}


@pytest.mark.parametrize("ways", ["always", "between", "halved always"])
@pytest.mark.parametrize("extra", [0, 1])
def test_batched_gradients_match_torch(request, taken, ways, extra):
    """Vmap over gradients of both orders, which only supports torch's operators."""
    for fixture in ways.split():
        request.getfixturevalue(fixture)
    made = [
        nn.Sequential(conv(2, 4, 3, 2, 1), nn.Tanh(), transposed(4, 2, 3, 2, 1, extra))
        for conv, transposed in ((conv2d.Conv2d, conv2d.ConvTranspose2d), (nn.Conv2d, nn.ConvTranspose2d))
    ]
    made[1].load_state_dict(made[0].state_dict())
    x = torch.randn(1, 2, 5, 5)
    many = torch.randn(3, *made[0](x).shape)
    taken.clear()
    found, wanted = (
        [
            jacobian(net, x, vectorize=True),
            torch.autograd.functional.hessian(lambda t, net=net: net(t).square().sum(), x, vectorize=True),
            *torch.autograd.grad(net(x), [*net.parameters()], many, is_grads_batched=True),
        ]
        for net in made
    )
    torch.testing.assert_close(found, wanted)
    assert {*taken} == ({"with_sub_pixels"} if ways == "between" else {"with_products"})


class Asked(TorchDispatchMode):
    """Records the output_mask of torch's convolution gradients."""

    def __init__(self):
        super().__init__()
        self.of_weight_and_bias: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.of_weight_and_bias.append(tuple(args[-1][1:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("weight_by_product", [False, True], ids=["by_torch", "with_products"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ours", [conv2d.Conv2d, conv2d.ConvTranspose2d])
def test_separate_gradient_path_matches_torch(monkeypatch, ours, bias, weight_by_product):
    monkeypatch.setattr(conv2d, "use_separate_gradients", lambda *_: True)
    monkeypatch.setattr(conv2d, "use_weight_grad_product", lambda *_: weight_by_product)
    weighed, real = [], conv_products.conv_weight_grad
    monkeypatch.setattr(conv_products, "conv_weight_grad", lambda *a: (weighed.append(a), real(*a))[1])
    for kernel, stride, padding in product(KERNELS, STRIDES, PADDINGS):
        x = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
        mine, theirs = twins(ours, 3, 5, kernel, stride, padding, bias=bias)
        weighed.clear()
        with Asked() as output_mask:
            assert_same(mine, theirs, x)
        assert len(weighed) == weight_by_product
        # products replace torch's weight gradient, and the bias is summed separately; the input gradient comes last
        assert output_mask.of_weight_and_bias == [(True, False)] * (not weight_by_product) + [
            (False, False),
            (True, bias),
        ]
        mine.requires_grad_(False)
        torch.testing.assert_close(torch.autograd.grad(mine(x).sum(), x), torch.autograd.grad(theirs(x).sum(), x))
        assert len(weighed) == weight_by_product
    mine, theirs = twins(ours, 2, 3, 3, 2, 1, bias=bias)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: mine(x), (x, *mine.parameters()))
    x = x.detach()
    torch.testing.assert_close(jacobian(mine, x, vectorize=True), jacobian(theirs, x, vectorize=True))


@pytest.mark.parametrize("lowers", [False, True])
@pytest.mark.parametrize("tiles", [False, True])
def test_separate_gradients_are_used_where_benchmarked_faster(monkeypatch, tiles, lowers):
    """By `benchmarks.convolutions`: for 16-bit weights without AMX tiles, and where an input fills the cache."""
    monkeypatch.setattr(linear, "HAS_AMX", tiles)
    small = lowers and not tiles
    for layer, side, wanted in [
        (conv2d.Conv2d(64, 128, 3, 2, 1), 16, small),
        (conv2d.Conv2d(64, 128, 3, 2, 1), 18, False),
        (conv2d.Conv2d(64, 64, 3, 2, 1), 16, False),
        (conv2d.Conv2d(64, 128, 3, 1, 1), 8, False),
        (conv2d.Conv2d(64, 128, 1, 2), 16, False),
        (conv2d.Conv2d(32, 32, 3, 2, 1), 256, not lowers),
        (conv2d.Conv2d(32, 32, 3, 2, 1), 252, False),
        (conv2d.Conv2d(3, 128, 3, 2, 1), 256, not lowers),
        (conv2d.Conv2d(3, 128, 3, 2, 1), 252, False),
        (conv2d.ConvTranspose2d(128, 64, 3, 2, 1, 1, bias=False), 8, small),
        (conv2d.ConvTranspose2d(128, 64, 3, 2, 1, 1, bias=False), 9, False),
    ]:
        x = torch.zeros(1, layer.in_channels, side, side)
        with torch.autocast("cpu", torch.bfloat16, enabled=lowers):
            assert conv2d.use_separate_gradients(layer, layer.geometry(x), x) is wanted, (layer, side)
            with torch.no_grad():
                assert not conv2d.use_separate_gradients(layer, layer.geometry(x), x)


@pytest.mark.parametrize("way", ["with_separate_gradients", "with_sub_pixels", "with_overlap_add"])
def test_batched_gradients_of_each_transpose_path_match_torch(way):
    up, x = conv2d.ConvTranspose2d(3, 2, 3, 2, 1, 1), torch.randn(1, 3, 3, 3)
    found = jacobian(lambda t: getattr(up, way)(t, up.geometry(t)), x, vectorize=True)
    torch.testing.assert_close(found, jacobian(lambda t: nn.ConvTranspose2d.forward(up, t), x, vectorize=True))


def test_unneeded_gradients_are_not_computed(always, monkeypatch):
    made = []
    for name in ("conv_forward", "conv_input_grad", "conv_weight_grad"):
        work = getattr(conv_products, name)
        monkeypatch.setattr(conv_products, name, lambda *a, n=name, work=work: (made.append(n), work(*a))[1])
    down, up = conv2d.Conv2d(2, 4, 3), conv2d.ConvTranspose2d(2, 4, 3)
    down(torch.randn(2, 2, 4, 4)).sum().backward()
    up(torch.randn(2, 2, 4, 4)).sum().backward()
    assert made == ["conv_forward", "conv_weight_grad", "conv_input_grad", "conv_weight_grad"]
    made.clear()
    for layer in (down, up):
        layer.requires_grad_(False)
        layer(torch.randn(2, 2, 4, 4, requires_grad=True)).sum().backward()
    assert made == ["conv_forward", "conv_input_grad", "conv_input_grad", "conv_forward"]


@pytest.mark.parametrize("ways", ["always", "between"])
def test_autocast_matches_torch_bfloat16(request, taken, monkeypatch, ways):
    request.getfixturevalue(ways)
    copied, real = [], conv_products.im2col
    monkeypatch.setattr(conv_products, "im2col", lambda x, geometry: (copied.append(x.dtype), real(x, geometry))[1])
    x, weight = torch.randn(5, 8, 4, 4), torch.randn(5, 8, 4, 4)
    mine, theirs = (
        autoencoder_of_8(conv2d.Conv2d, conv2d.ConvTranspose2d),
        autoencoder_of_8(nn.Conv2d, nn.ConvTranspose2d),
    )
    theirs.load_state_dict(mine.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = mine(x), theirs(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02)
    for a, b in zip(
        torch.autograd.grad(found, [*mine.parameters()], weight.bfloat16()),
        torch.autograd.grad(wanted, [*theirs.parameters()], weight.bfloat16()),
        strict=True,
    ):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))
    assert taken == (["with_products"] * 2 if ways == "always" else ["with_sub_pixels"])
    # copies of the first layer's input, twice of the second's gradient, and again of the input, in half the bytes
    assert copied == ([torch.bfloat16] * 4 if ways == "always" else [])


@pytest.mark.parametrize("ways", ["always", "halved always"])
def test_autocast_around_backward_only_keeps_float32_gradients(request, ways):
    for fixture in ways.split():
        request.getfixturevalue(fixture)
    for mine, theirs in (
        twins(conv2d.Conv2d, 8, 16, 3, 2, 1),
        twins(conv2d.ConvTranspose2d, 8, 16, 3, 2, 1),
    ):
        mine, theirs = mine.float(), theirs.float()
        x = torch.randn(5, 8, 4, 4)
        y, wanted = mine(x), theirs(x)
        with torch.autocast("cpu", torch.bfloat16):
            y.square().sum().backward()
        wanted.square().sum().backward()
        torch.testing.assert_close(mine.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("way", ["always", "between", "plain"])
def test_saved_tensors_match_torch(request, way):
    """No more tensors than torch saves: others may change or be freed."""
    if way != "plain":
        request.getfixturevalue(way)
    down, up, x = conv2d.Conv2d(3, 4, 3), conv2d.ConvTranspose2d(3, 2, 3, 2, 1, 1), torch.randn(2, 3, 6, 6)
    for layer in (down, up):
        for frozen in (False, True):
            for needs in (False, True):
                layer.requires_grad_(not frozen)
                kept = []
                for forward in (type(layer).forward, type(layer).plain.forward):
                    seen: list[int] = []
                    keep = lambda t, seen=seen: (seen.append(t.numel()), t)[1]  # noqa: E731
                    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                        forward(layer, x.clone().requires_grad_(needs))
                    kept.append(sorted(seen))
                assert sum(kept[0]) <= sum(kept[1]), (layer, frozen, needs)
                if way == "always":
                    assert kept[0] == [layer.weight.numel()] * needs + [x.numel()] * (not frozen)


@pytest.mark.parametrize("way", ["with_separate_gradients", "with_sub_pixels"])
def test_bf16_backward_stays_in_bf16(way):
    """OneDNN refuses some layers with mixed float32 and bfloat16 on some processors."""
    layer, x = conv2d.ConvTranspose2d(32, 1, 3, 1, 1), torch.randn(64, 32, 1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = getattr(layer, way)(x, layer.geometry(x)), nn.ConvTranspose2d.forward(layer, x)
    assert {saved.dtype for saved in found.grad_fn.saved_tensors} == {torch.bfloat16}
    # without AVX512 torch sums in another order, so sums near 0 differ by the rounding of their terms
    torch.testing.assert_close(found, wanted, rtol=0.016, atol=2**-8 * float(wanted.detach().abs().max()))
    g = torch.ones_like(found)
    for a, b in zip(*(torch.autograd.grad(y, [x, *layer.parameters()], g) for y in (found, wanted)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))


def autoencoder_of_8(conv, transposed):
    return nn.Sequential(conv(8, 16, 3, 2, 1), transposed(16, 8, 3, 2, 1, 1))


def test_products_are_used_on_small_grids_with_many_channels():
    """By the results of `benchmarks.convolutions`."""
    for n_in, n_out, side, wanted in [
        (256, 512, 2, True),
        (256, 256, 4, True),
        (128, 256, 4, True),
        (128, 128, 4, False),
        (64, 128, 2, True),
        (64, 64, 2, False),
        (512, 512, 5, True),
        (256, 512, 8, True),
        (256, 512, 9, False),
        (512, 512, 9, False),
        (64, 64, 1, False),
        (512, 512, 1, True),
    ]:
        assert conv2d.use_products(conv2d.Conv2d(n_in, n_out, 3), (side, side)) is wanted, (n_in, n_out, side)
    assert not conv2d.use_products(conv2d.Conv2d(512, 512, 1), (2, 2))


def test_products_are_chosen_for_fewer_layers_with_onednn(halved):
    """Its convolutions are faster."""
    for n_in, n_out, side, stride, wanted in [
        (256, 512, 4, 2, True),
        (256, 512, 5, 2, False),
        (128, 256, 4, 2, True),
        (64, 128, 3, 2, False),
        (64, 128, 2, 2, True),
        (256, 256, 2, 1, True),
        (256, 256, 4, 1, True),
        (256, 256, 5, 1, False),
        (128, 256, 2, 1, False),
        (64, 128, 1, 1, True),
        (64, 128, 1, 2, True),
        (64, 64, 1, 2, False),
    ]:
        assert conv2d.use_products(conv2d.Conv2d(n_in, n_out, 3, stride), (side, side)) is wanted, (n_in, side, stride)


def test_fastest_path_is_chosen_per_layer_and_grid(taken):
    down, up, out = (
        conv2d.Conv2d(128, 128, 3, 2, 1),
        conv2d.ConvTranspose2d(128, 128, 3, 2, 1, 1),
        conv2d.ConvTranspose2d(128, 3, 3, 2, 1, 1),
    )
    small, medium, large = (torch.randn(2, 128, n, n) for n in (2, 4, 16))
    down(large)
    up(medium)
    out(medium)
    assert taken == []
    up(large)
    assert taken.pop() == "with_separate_gradients"
    with torch.no_grad():  # the bias is slow in the backward pass only
        up(large)
        assert taken == []
        out(large)
    out(large)
    down(up(small))
    assert taken == ["with_sub_pixels"] * 2 + ["with_products"] * 2
    torch.testing.assert_close(up(large), nn.ConvTranspose2d.forward(up, large))
    torch.testing.assert_close(out(large), nn.ConvTranspose2d.forward(out, large))
    assert not conv2d.use_overlap_add(conv2d.ConvTranspose2d(128, 1, 3, 2, 1, 1), up.geometry(large))
    assert not conv2d.use_sub_pixels(conv2d.ConvTranspose2d(128, 5, 3, 2, 1, 1), up.geometry(large))
    assert not conv2d.use_sub_pixels(conv2d.ConvTranspose2d(128, 3, 3, 1, 1), up.geometry(large))


@pytest.mark.parametrize("half", [False, True], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("tiles", [False, True], ids=["without", "with"])
def test_path_in_16_bits_depends_on_processor(taken, monkeypatch, tiles, half):
    monkeypatch.setattr(linear, "HAS_AMX", tiles)
    dtype = torch.bfloat16 if half else None
    plain, strided = conv2d.Conv2d(256, 256, 3, 1, 1, dtype=dtype), conv2d.Conv2d(256, 512, 3, 2, 1, dtype=dtype)
    up = conv2d.ConvTranspose2d(32, 32, 3, 2, 1, 1, dtype=dtype)

    def ways(layer, *shape):
        with torch.autocast("cpu", torch.bfloat16, enabled=not half):
            layer(torch.randn(2, *shape, dtype=dtype))
        return [taken.pop() for _ in taken[:]]

    assert ways(plain, 256, 2, 2) == ["with_products"]
    assert ways(plain, 256, 5, 5) == (["with_products"] if tiles else [])
    assert ways(strided, 256, 8, 8) == ["with_products"]
    assert ways(strided, 256, 10, 10) == (["with_products"] if tiles else ["with_separate_gradients"])
    assert ways(up, 32, 3, 3) == ([] if tiles else ["with_separate_gradients"])
    assert ways(up, 32, 2, 2) == []


@pytest.mark.parametrize(("lowers", "few"), [(False, 16), (True, 4)])
def test_bias_of_few_channels_is_not_separated(taken, monkeypatch, lowers, few):
    monkeypatch.setattr(linear, "HAS_AMX", False)
    for n, wanted in ((few, []), (few + 1, ["with_separate_gradients"])):
        with torch.autocast("cpu", torch.bfloat16, enabled=lowers):
            conv2d.ConvTranspose2d(8, n, 3, 1, 1)(torch.randn(2, 8, 10, 10))
        assert [taken.pop() for _ in taken[:]] == wanted


@pytest.mark.parametrize(
    "settings",
    [{"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}, {"padding": "same"}, {"padding": "valid"}],
    ids=str,
)
def test_unsupported_conv_settings_fall_back_to_torch(always, taken, settings):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    assert_same(*twins(conv2d.Conv2d, 4, 6, 3, **({"padding": 1} | settings)), x)
    if settings.keys() & {"groups", "dilation"}:
        assert_same(*twins(conv2d.ConvTranspose2d, 4, 6, 3, padding=1, **settings), x)
    assert taken == []


@pytest.mark.parametrize("ways", ["always", "between", "halved between", "halved always"])
def test_output_can_be_modified_in_place(request, taken, ways):
    for fixture in ways.split():
        request.getfixturevalue(fixture)
    for channels in (1, 3):
        up, theirs = conv2d.ConvTranspose2d(8, channels, 3, 2, 1, 1), nn.ConvTranspose2d(8, channels, 3, 2, 1, 1)
        theirs.load_state_dict(up.state_dict())
        x = torch.randn(2, 8, 5, 5, requires_grad=True)
        assert_same(nn.Sequential(up, nn.ReLU(inplace=True)), nn.Sequential(theirs, nn.ReLU(inplace=True)), x)
    assert len(taken) == 2


@pytest.mark.parametrize("ways", ["always", "between", "halved between", "halved always"])
def test_empty_batch_has_zero_gradients(request, ways):
    for fixture in ways.split():
        request.getfixturevalue(fixture)
    for layer in (conv2d.Conv2d(8, 4, 3, 2, 1), *(conv2d.ConvTranspose2d(8, n, 3, 2, 1, 1) for n in (1, 3))):
        x = torch.zeros(0, 8, 4, 4, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == x.shape
        assert all(not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("ways", ["always", "between"])
def test_parametrised_weights_are_computed_once(request, taken, ways):
    """Otherwise spectral norm, for example, takes several steps of its power iteration."""
    request.getfixturevalue(ways)

    class Counts(nn.Module):
        def forward(self, weight):
            calls.append(1)
            return weight

    calls: list[int] = []
    for layer in (conv2d.Conv2d(4, 6, 3, 2, 1), conv2d.ConvTranspose2d(4, 2, 3, 2, 1)):
        register_parametrization(layer, "weight", Counts())
        calls.clear()
        layer(torch.randn(2, 4, 5, 5))
        assert calls == [1]
    assert taken == []


@pytest.mark.parametrize("ways", ["always", "between"])
def test_torch_errors_are_reproduced(request, ways):
    request.getfixturevalue(ways)
    for layer, x in (
        (conv2d.ConvTranspose2d(4, 2, 3, 2, 1, 2), torch.zeros(2, 4, 4, 4)),
        (conv2d.Conv2d(4, 6, 3, 2, 2), torch.zeros(2, 4, 0, 4)),
        (conv2d.Conv2d(4, 6, 3, 2, 1), torch.zeros(2, 4, 4, 4, dtype=torch.float64)),
        (conv2d.ConvTranspose2d(4, 2, 3, 2, 1, 1), torch.zeros(2, 4, 4, 4, dtype=torch.float64)),
    ):
        with pytest.raises(RuntimeError) as wanted:
            type(layer).plain.forward(layer, x)
        with pytest.raises(RuntimeError) as found:
            layer(x)
        assert str(found.value) == str(wanted.value)


def test_shape_mismatch_raises_torch_error(always):
    down, up = conv2d.Conv2d(4, 6, 5), conv2d.ConvTranspose2d(4, 6, 3)
    for layer, x, words in (
        (down, torch.zeros(2, 4, 3, 3), "Kernel size can't be greater than actual input size"),
        (down, torch.zeros(2, 3, 6, 6), "expected input.* to have 4 channels, but got 3"),
        (up, torch.zeros(2, 3, 6, 6), "expected input.* to have 4 channels, but got 3"),
    ):
        with pytest.raises(RuntimeError, match=words):
            layer(x)


@pytest.mark.parametrize("ways", ["always", "between"])
def test_negative_output_size_raises_torch_error(request, ways):
    request.getfixturevalue(ways)
    up, x = conv2d.ConvTranspose2d(4, 2, 3, 2, 20), torch.zeros(2, 4, 10, 10)
    with pytest.raises(RuntimeError) as wanted:
        nn.ConvTranspose2d.forward(up, x)
    with pytest.raises(RuntimeError) as found:
        up(x)
    assert str(found.value) == str(wanted.value)


def test_autocast_leaves_double_precision(always):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        for layer in (conv2d.Conv2d(4, 6, 3).double(), conv2d.ConvTranspose2d(4, 6, 3).double()):
            assert layer(x).dtype == torch.float64


def test_unbatched_input_and_output_size_match_torch(always, taken):
    x = torch.randn(4, 5, 5, dtype=torch.float64, requires_grad=True)
    assert_same(*twins(conv2d.Conv2d, 4, 6, 3), x)
    up, theirs = twins(conv2d.ConvTranspose2d, 4, 6, 3, 2, 1)
    torch.testing.assert_close(up(x[None], [10, 10]), theirs(x[None], [10, 10]))
    assert taken == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_exported_graphs_contain_plain_convolutions(always, taken):
    net = nn.Sequential(conv2d.Conv2d(4, 6, 3), conv2d.ConvTranspose2d(6, 4, 3))
    x = torch.randn(2, 4, 6, 6)
    graphs = []
    backend = lambda module, inputs: (graphs.append(module.graph), module.forward)[1]  # noqa: E731
    torch.compile(net, backend=backend, dynamic=False)(x)
    calls = [node.target.__name__ for graph in graphs for node in graph.nodes if node.op == "call_function"]
    assert calls == ["conv2d", "conv_transpose2d"]
    traced = torch.jit.trace(net, x, check_trace=False)
    assert str(traced.inlined_graph).count("aten::_convolution") == 2
    ops = [str(node.target) for node in torch.export.export(net, (x,)).graph.nodes if node.op == "call_function"]
    assert [op.partition(".default")[0] for op in ops] == ["aten.conv2d", "aten.conv_transpose2d.input"]
    assert taken == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "extra", "bias", "separate"),
    [(3, 0, True, True), (4, 1, True, True), (3, 1, True, False), (3, 0, False, False)],
)
def test_compiled_graph_adds_bias_separately_off_stride(kernel, extra, bias, separate):
    up, x = conv2d.ConvTranspose2d(3, 6, kernel, 2, 1, extra, bias=bias), torch.randn(2, 3, 4, 4)
    graphs = []
    compiled = torch.compile(up, backend=lambda module, _: (graphs.append(module.graph), module.forward)[1])
    torch.testing.assert_close(compiled(x), nn.ConvTranspose2d.forward(up, x))
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
    calls = [node for node in graphs[0].nodes if node.op == "call_function"]
    assert calls[0].target.__name__ == "conv_transpose2d"
    assert len(calls) == 1 or separate
    assert (calls[0].args[2] is None) is (separate or not bias)
    exported = torch.export.export(up, (x,)).graph.nodes
    assert [str(n.target) for n in exported if n.op == "call_function"] == ["aten.conv_transpose2d.input"]


@pytest.mark.parametrize("ways", ["always", "between"])
def test_gradients_have_layout_of_their_tensors(request, ways):
    """Other layouts would need a copy, and activations and fused optimisers read both in memory order."""
    request.getfixturevalue(ways)
    for layout in (torch.contiguous_format, torch.channels_last):
        for layer in (conv2d.Conv2d(8, 16, 3, 2, 1), conv2d.ConvTranspose2d(8, 16, 3, 2, 1, 1)):
            layer.to(memory_format=layout)
            x = torch.randn(5, 8, 4, 4).contiguous(memory_format=layout).requires_grad_()
            out = layer(x)
            of_x, gradient = torch.autograd.grad(out.square().sum(), [x, layer.weight])
            layer.weight.grad = None
            layer(x).square().sum().backward()
            assert layer.weight.grad.stride() == layer.weight.stride()
            if ways == "always":
                assert of_x.stride() == x.stride()
            if layout is torch.channels_last:
                assert gradient.stride() == layer.weight.stride()
                assert of_x.is_contiguous(memory_format=torch.channels_last)
                assert out.is_contiguous(memory_format=torch.channels_last)


def test_convolution_benchmark_measures_every_path(tmp_path, capsys):
    from benchmarks import convolutions

    words = ["--results", str(tmp_path), "--channels", "1", "3", "--sides", "2", "--batch", "2", "--repeats", "1"]
    convolutions.main(words)
    (path,) = tmp_path.glob("convolutions-fp32-*.csv")
    rows = [*csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#"))]
    found = [(row["layer"], row["channels"], row["stride"]) for row in rows]
    assert found == [*product(("conv", "transposed"), "13", "12"), *product(["transposed_odd"], "13", "2")]
    for row in rows:
        ways = {name.removesuffix("_ms") for name, value in row.items() if name.endswith("_ms") and value}
        more = set()
        if row["layer"] != "conv" and row["stride"] == "2":
            more = {"sub_pixels", "overlap_add"} if row["channels"] == "1" else {"sub_pixels"}
        assert ways == {"torch", "products", "separate_gradients", "batch_inner"} | more
        took = float(row[row["chosen"] + "_ms"])
        assert float(row["speedup"]) == pytest.approx(float(row["torch_ms"]) / took, rel=1e-3)
        assert float(row["lost"]) == pytest.approx(took / min(float(row[f"{way}_ms"]) for way in ways), rel=1e-3)
        assert row["chosen"] == "torch"
    assert f"of {len(rows)}" in capsys.readouterr().out
    convolutions.main(words)  # all rows exist
    assert len(path.read_text().splitlines()) == len(rows) + 2
