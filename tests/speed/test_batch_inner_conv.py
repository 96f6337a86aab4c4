"""Convolutions with the batch as the innermost dimension, compared with torch's."""

import random
from itertools import product

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import aezoo
from aezoo.nets import conv
from aezoo.speed import batch_inner_conv, conv2d, conv_products, linear
from aezoo.speed.layers import swap_in
from aezoo.speed.memory_format import (
    Flatten,
    convert_layout,
    is_batch_inner,
    is_channels_last,
    to_channels_last,
    to_layout,
    with_layout_of,
)

KERNELS, STRIDES, PADDINGS = [(3, 3), (2, 3), (4, 4), (1, 3)], [(1, 1), (2, 2), (2, 1)], [(0, 0), (1, 1), (0, 1)]
# torch refuses these on processors without AVX512
needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 convolutions here"
)
ORDERS = {
    "first": torch.Tensor.contiguous,
    "last": lambda x: to_layout(x, batch_inner=False),
    "batch_inner": lambda x: to_layout(x, batch_inner=True),
}
DOWN_AND_UP = [conv2d.Conv2d, conv2d.ConvTranspose2d]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


@pytest.fixture
def on(monkeypatch):
    """Enable the path for layers of any size, as on a processor where it is faster."""
    if not batch_inner_conv.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(linear, "MKL_HALF_WIDTH", True)
    monkeypatch.setattr(linear, "HAS_AMX", False)
    for name, least in (("_MIN_SAMPLES", 2), ("_MIN_CHANNELS", 1), ("_MIN_PRODUCTS", 0)):
        monkeypatch.setattr(conv2d, name, least)


def order_of(x):
    return "batch_inner" if is_batch_inner(x) else "last" if is_channels_last(x) else "first"


def twins(ours, *args, **kwargs):
    """Our layer, marked as part of a convolutional network, and torch's with the same weights in float64."""
    mine = ours(*args, **kwargs).to(memory_format=torch.channels_last)
    mine.feeds_convolutions = True
    theirs = ours.plain(*args, **kwargs).double()
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def assert_near(found, wanted, atol=2e-5):
    found, wanted = found.detach().double(), wanted.detach().double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=atol * (1 + float(wanted.abs().max())))


def assert_same(mine, theirs, x, **near):
    """Compare values, gradients, and their memory layout."""
    ours, wanted = mine(x), theirs(x.double())
    assert_near(ours, wanted, **near)
    assert order_of(ours) == "batch_inner"
    weight = torch.randn_like(ours)
    found = torch.autograd.grad(ours, [x, *mine.parameters()], weight)
    for a, b in zip(found, torch.autograd.grad(wanted, [x, *theirs.parameters()], weight.double()), strict=True):
        assert_near(a, b, **near)
    assert found[0].stride() == (to_layout(x, batch_inner=False) if order_of(x) == "first" else x).stride()
    assert found[1].stride() == mine.weight.stride()


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_same_values_and_gradients_as_torch_for_any_geometry(on, monkeypatch, kernel, order):
    monkeypatch.setattr(conv2d, "use_batch_inner", lambda *_: True)
    cases, draw = 0, random.Random(0)
    for stride, padding, h, w, weight_by_product in product(STRIDES, PADDINGS, (3, 4, 5), (4, 5), (False, True)):
        if draw.random() < 0.5:
            continue
        bias = draw.random() < 0.5
        monkeypatch.setattr(conv2d, "use_products", lambda *_, weight_by_product=weight_by_product: weight_by_product)
        x = ORDERS[order](torch.randn(6, 3, h, w)).requires_grad_()
        if all(n + 2 * p >= k for n, p, k in zip((h, w), padding, kernel, strict=True)):
            assert_same(*twins(conv2d.Conv2d, 3, 5, kernel, stride, padding, bias=bias), x)
            cases += 1
        for extra in product(*(range(min(2, s)) for s in stride)):
            size = zip((h, w), stride, padding, kernel, extra, strict=True)
            if all((n - 1) * s - 2 * p + k + e > 1 for n, s, p, k, e in size):
                assert_same(*twins(conv2d.ConvTranspose2d, 3, 5, kernel, stride, padding, extra, bias=bias), x)
                cases += 1
    assert cases > 75


@needs_bf16
@pytest.mark.slow
@pytest.mark.parametrize("weight_by_product", [False, True], ids=["by_onednn", "with_products"])
@pytest.mark.parametrize("half", [False, True], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("kernel", [(3, 3), (4, 4), (2, 3)])
def test_batch_inner_conv_matches_torch_in_16_bits(on, monkeypatch, kernel, half, weight_by_product):
    monkeypatch.setattr(conv2d, "use_products", lambda *_: weight_by_product)
    monkeypatch.setattr(conv2d, "use_batch_inner", lambda *_: True)
    dtype = torch.bfloat16 if half else torch.float32
    taken, weighed = spied(monkeypatch), []
    for module in (batch_inner_conv, conv_products):
        real = module.conv_weight_grad
        monkeypatch.setattr(
            module, "conv_weight_grad", lambda *a, m=module, real=real: (weighed.append(m), real(*a))[1]
        )
    for ours, stride, h, w in product(DOWN_AND_UP, (1, 2), (4, 5, 6), (4, 7)):
        mine, theirs = twins(ours, 6, 8, kernel, stride, 1)
        mine.to(dtype)
        theirs.load_state_dict(mine.state_dict())
        # inputs exact in bfloat16, so that only sums are rounded
        x = torch.randn(20, 6, h, w).bfloat16().to(dtype)
        with torch.no_grad():
            for layer in (mine, theirs):
                layer.load_state_dict({n: p.bfloat16().to(p.dtype) for n, p in layer.state_dict().items()})
        x = to_layout(x, batch_inner=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=not half):
            y = mine(x)
        wanted = theirs(x.double())
        assert y.dtype == torch.bfloat16
        assert_near(y, wanted, atol=0.01)
        g = torch.randn_like(y)
        for a, b in zip(
            torch.autograd.grad(y, [x, *mine.parameters()], g),
            torch.autograd.grad(wanted, [x, *theirs.parameters()], g.double()),
            strict=True,
        ):
            assert a.dtype == dtype
            assert_near(a, b, atol=0.01)
    assert len(taken) == 24 and weighed == [conv_products if weight_by_product else batch_inner_conv] * 24


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)], ids=str)
@pytest.mark.parametrize(("batch", "n_in", "n_out"), [(65, 17, 33), (64, 48, 16), (100, 8, 130)])
def test_partial_register_sizes_match_torch(on, monkeypatch, batch, n_in, n_out, dtype):
    taken = spied(monkeypatch)
    atol = 2e-5 if dtype == torch.float32 else 0.02
    for ours, (h, w) in product(DOWN_AND_UP, [(4, 5), (7, 6), (8, 8)]):
        mine, theirs = twins(ours, n_in, n_out, 3, 2, 1)
        mine.to(dtype)
        theirs.load_state_dict(mine.state_dict())
        x = to_layout(torch.randn(batch, n_in, h, w, dtype=dtype), batch_inner=False).requires_grad_()
        y, wanted = mine(x), theirs(x.double())
        assert_near(y, wanted, atol)
        g = torch.randn_like(y)
        found = torch.autograd.grad(y, [x, *mine.parameters()], g)
        for a, b in zip(found, torch.autograd.grad(wanted, [x, *theirs.parameters()], g.double()), strict=True):
            assert_near(a, b, atol)
    assert len(taken) == 6


def spied(monkeypatch):
    """The layers called with the batch as the innermost dimension."""
    taken = []
    for ours in DOWN_AND_UP:
        real = ours.with_batch_inner
        monkeypatch.setattr(
            ours, "with_batch_inner", lambda self, *a, real=real: (taken.append(self), real(self, *a))[1]
        )
    return taken


def test_batch_inner_conv_uses_onednn_for_batch_sums(on, monkeypatch):
    down, up = (ours(4, 6, 3, 2, 1) for ours in DOWN_AND_UP)
    made = []
    for name in ("convolve", "transpose"):
        real = getattr(batch_inner_conv, name)
        monkeypatch.setattr(batch_inner_conv, name, lambda *a, n=name, real=real: (made.append(n), real(*a))[1])
    monkeypatch.setattr(batch_inner_conv, "conv_weight_grad", lambda *a: pytest.fail("of 16 bits"))
    for layer, wanted in ((down, ["convolve", "transpose"]), (up, ["transpose", "transpose", "convolve"])):
        x = torch.randn(4, 4, 5, 5, requires_grad=True)
        layer.with_batch_inner(x, layer.geometry(x)).sum().backward()
        assert made == wanted  # the bias of an uneven grid is added separately
        made.clear()


def test_bias_is_added_separately_on_uneven_grid(on):
    up, x = conv2d.ConvTranspose2d(16, 16, 3, 2, 1), torch.randn(32, 16, 3, 3)
    for extra, apart in ((0, True), (1, False)):
        up.output_padding = (extra, extra)
        with Given() as given:
            up.with_batch_inner(x, up.geometry(x))
        assert given.bias == [not apart]


class Given(TorchDispatchMode):
    """Records whether oneDNN's transposed convolution gets a bias."""

    def __init__(self):
        super().__init__()
        self.bias: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_convolution_transpose_pointwise" in str(func):
            self.bias.append(args[2] is not None)
        return func(*args, **(kwargs or {}))


def autoencoder(conv, transposed):
    return nn.Sequential(conv(2, 4, 3, 2, 1), nn.Tanh(), transposed(4, 2, 3, 2, 1))


def both(monkeypatch):
    monkeypatch.setattr(conv2d, "use_batch_inner", lambda *_: True)
    mine, theirs = autoencoder(*DOWN_AND_UP), autoencoder(nn.Conv2d, nn.ConvTranspose2d)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def test_second_order_gradients_match_torch(on, monkeypatch):
    nets = both(monkeypatch)
    taken = spied(monkeypatch)
    x, found = torch.randn(3, 2, 5, 5, requires_grad=True), []
    for net in nets:
        (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        found.append([g, *torch.autograd.grad(g.square().sum(), [x, *net.parameters()])])
    torch.testing.assert_close(*found)
    assert len(taken) == 2


def test_vectorised_jacobian_matches_torch(on, monkeypatch):
    mine, theirs = both(monkeypatch)
    x = torch.randn(2, 2, 5, 5)
    found, wanted = (jacobian(net, x, vectorize=True) for net in (mine, theirs))
    torch.testing.assert_close(found, wanted)


def test_torch_func_uses_plain_convolution(on, monkeypatch):
    mine, theirs = both(monkeypatch)
    taken = spied(monkeypatch)
    x = torch.randn(3, 2, 4, 4)
    found, wanted = (vmap(jacrev(lambda t, net=net: net(t[None])[0]))(x) for net in (mine, theirs))
    torch.testing.assert_close(found, wanted)

    def of_samples(net):
        loss = grad(lambda p, t: functional_call(net, p, (t[None],)).square().sum())
        return vmap(loss, (None, 0))(dict(net.named_parameters()), x)

    torch.testing.assert_close(of_samples(mine), of_samples(theirs))
    assert taken == []


def test_output_can_be_modified_in_place(on, monkeypatch):
    mine, theirs = both(monkeypatch)
    x = torch.randn(3, 2, 5, 5, requires_grad=True)
    for net in (mine, theirs):
        net[1] = nn.ReLU(inplace=True)
        net.append(nn.ReLU(inplace=True))
    for a, b in zip(
        *(torch.autograd.grad(net(x).sum(), [x, *net.parameters()]) for net in (mine, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_unneeded_gradients_are_not_computed(on, monkeypatch):
    made = []
    for name in ("convolve", "transpose"):
        real = getattr(batch_inner_conv, name)
        monkeypatch.setattr(batch_inner_conv, name, lambda *a, n=name, real=real: (made.append(n), real(*a))[1])
    real_by_weight = batch_inner_conv.BatchInnerConv.weight_gradient
    monkeypatch.setattr(
        batch_inner_conv.BatchInnerConv,
        "weight_gradient",
        staticmethod(lambda *a: (made.append("weigh"), real_by_weight(*a))[1]),
    )
    down, x = conv2d.Conv2d(2, 4, 3), torch.randn(4, 2, 5, 5)
    down.with_batch_inner(x, down.geometry(x)).sum().backward()
    assert made == ["convolve", "weigh"]
    made.clear()
    down.requires_grad_(False)
    x.requires_grad_()
    down.with_batch_inner(x, down.geometry(x)).sum().backward()
    assert made == ["convolve", "transpose"]


def test_autocast_around_backward_only_keeps_float32_gradients(on, monkeypatch):
    monkeypatch.setattr(conv2d, "use_batch_inner", lambda *_: True)
    for ours in DOWN_AND_UP:
        mine, theirs = twins(ours, 8, 16, 3, 2, 1)
        x = torch.randn(5, 8, 4, 4)
        y = mine(x)
        with torch.autocast("cpu", torch.bfloat16):
            y.square().sum().backward()
        theirs(x.double()).square().sum().backward()
        assert_near(mine.weight.grad, theirs.weight.grad)


def test_batch_inner_conv_is_chosen_where_benchmarked_faster(monkeypatch):
    """By the results of `benchmarks.convolutions`."""
    monkeypatch.setattr(linear, "MKL_HALF_WIDTH", True)
    monkeypatch.setattr(linear, "HAS_AMX", False)
    monkeypatch.setattr(batch_inner_conv, "is_available", lambda: True)

    def pays(n_in=64, n_out=128, side=8, kernel=3, stride=2, padding=1, batch=64, among=True, dtype=torch.float32):
        layer = conv2d.Conv2d(n_in, n_out, kernel, stride, padding, dtype=dtype)
        layer.feeds_convolutions = among
        x = torch.empty(batch, n_in, side, side, dtype=dtype)
        return conv2d.use_batch_inner(layer, layer.geometry(x), x)

    assert pays()
    assert pays(dtype=torch.bfloat16)
    assert pays(side=16) and not pays(side=18)
    assert not pays(among=False)
    assert not pays(batch=63)
    assert pays(n_in=256, batch=16) and not pays(n_in=256, batch=15) and not pays(n_in=255, batch=16)
    assert pays(n_in=8, side=16) and not pays(n_in=7, side=16)
    assert pays(n_in=512, n_out=8, side=16) and not pays(n_in=512, n_out=7, side=16)
    assert pays(n_in=32, side=4) and not pays(n_in=32, n_out=28, side=4)  # 2.4 and 2.06 million multiplications
    assert not pays(kernel=1, padding=0) and not pays(stride=1)
    assert not pays(side=2)  # a single output point, where oneDNN's 16-bit results are wrong
    assert not pays(dtype=torch.float64) and not pays(dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        assert pays() and pays(dtype=torch.bfloat16) and not pays(dtype=torch.float64)
        monkeypatch.setattr(linear, "HAS_AMX", True)
        assert not pays()
    assert pays()
    for module, name, no in ((linear, "MKL_HALF_WIDTH", False), (batch_inner_conv, "is_available", lambda: False)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, no)
            assert not pays()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not pays()


def test_batch_inner_conv_is_unavailable_without_onednn(monkeypatch):
    find = batch_inner_conv.is_available.__wrapped__
    assert find() == hasattr(torch.ops.mkldnn, "_convolution_transpose_pointwise")
    torch.set_default_dtype(torch.float64)  # oneDNN does not support float64
    try:
        assert find() == batch_inner_conv.is_available()
    finally:
        torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(batch_inner_conv, "_onednn", object())
    assert not find()


def test_flop_counter_matches_torch(on, monkeypatch):
    monkeypatch.setattr(conv2d, "use_batch_inner", lambda *_: True)
    for ours in DOWN_AND_UP:
        mine, theirs = twins(ours, 4, 6, 3, 2, 1)
        counted = []
        for layer in (mine, theirs.float()):
            with FlopCounterMode(display=False) as counter:
                layer(torch.randn(5, 4, 6, 6, requires_grad=True)).sum().backward()
            counted.append(counter.get_total_flops())
        assert counted[0] == counted[1] > 0


def test_conv_network_keeps_batch_inner_layout_between_layers(on):
    torch.manual_seed(0)
    made = {"input_shape": (3, 28, 28), "code_shape": (5,)}
    encoder = conv.Encoder(**made, hidden_dims=(8, 16, 32), act="silu")
    decoder = conv.Decoder(**made, hidden_dims=(32, 16, 8), act="gelu")
    net = nn.Sequential(encoder, decoder)
    assert to_channels_last(net)
    swap_in(net, (3, 28, 28), channels_last=True)
    lies = []
    for layer in [*encoder, *decoder]:
        layer.register_forward_hook(lambda layer, _, y: lies.append((type(layer).__name__, order_of(y))))
    x = to_layout(torch.rand(20, 3, 28, 28), batch_inner=False).requires_grad_()
    y = net(x)
    small, large = "batch_inner", "last"
    down = [(name, lie) for lie in (large, small, small) for name in ("Conv2d", "SiLU")]
    up = [(name, lie) for lie in (large, small, small) for name in ("GELU", "ConvTranspose2d")]
    up = [("GELU", "last"), ("ConvTranspose2d", small), ("GELU", small), ("ConvTranspose2d", small)]
    assert lies == [
        *down,
        ("Sequential", "first"),
        ("Sequential", "last"),
        *up,
        ("GELU", small),
        ("ConvTranspose2d", "last"),
    ]
    found = torch.autograd.grad(y.square().sum(), [x, *net.parameters()])
    for layer in net.modules():
        layer.feeds_convolutions = False
    wanted = net(x)
    torch.testing.assert_close(y, wanted)
    gradients = torch.autograd.grad(wanted.square().sum(), [x, *net.parameters()])
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-3)
    assert [a.stride() for a in found] == [b.stride() for b in gradients]


def test_decoder_output_is_channels_last_after_batch_inner(on):
    decoder = conv.Decoder((5,), (3, 16, 16), (16, 8), act="relu")
    swap_in(decoder, (3, 16, 16), channels_last=True)
    lies: list[str] = []
    decoder[2].register_forward_hook(lambda _, __, y: lies.append(order_of(y)))
    assert order_of(decoder(torch.randn(20, 5))) == "last" and lies == ["batch_inner"]


def test_layers_accept_batch_inner_input(on):
    x = to_layout(torch.randn(6, 8, 4, 4), batch_inner=True)
    for layer in (conv2d.Conv2d(8, 4, 1), conv2d.Conv2d(8, 4, 3, 2, 1), conv2d.ConvTranspose2d(8, 1, 3, 2, 1, 1)):
        x.requires_grad_()
        y = layer(x)
        torch.testing.assert_close(y, layer.plain.forward(layer, x.detach()))
        (g,) = torch.autograd.grad(y.square().sum(), x)
        assert order_of(g) == "batch_inner"


def test_layout_of_each_memory_order_is_detected_and_kept():
    first = torch.randn(6, 5, 4, 3)
    for order, make in ORDERS.items():
        x = make(first)
        assert order_of(x) == order and torch.equal(x, first)
        assert make(x).data_ptr() == x.data_ptr()  # a tensor of this layout is not copied
        assert with_layout_of(first, x).stride() == x.stride()
        seen: list[torch.Tensor] = []
        image = x.clone().requires_grad_() * 1
        image.register_hook(seen.append)
        Flatten()(image).square().sum().backward()
        assert order_of(seen[0]) == order and torch.equal(seen[0], 2 * first)
    assert to_layout(first, batch_inner=True).permute(2, 3, 0, 1).is_contiguous()
    one = torch.randn(4, 3, 1, 5).permute(2, 3, 0, 1)
    for other in (one, first[:1], first[0], torch.randn(6, 5)):
        assert not is_batch_inner(other)
    last = to_layout(first, batch_inner=False)
    assert convert_layout(first, batch_inner=False) is first and convert_layout(last, batch_inner=False) is last
    assert order_of(convert_layout(to_layout(first, batch_inner=True), batch_inner=False)) == "last"


def test_layout_conversion_restores_layout_in_backward():
    last = to_layout(torch.randn(6, 5, 4, 3), batch_inner=False)
    for inner in (False, True):
        x = to_layout(last, batch_inner=inner).clone().requires_grad_()
        y = convert_layout(x, batch_inner=not inner)
        assert torch.equal(y, x) and is_batch_inner(y) is not inner
        (g,) = torch.autograd.grad(y.square().sum(), x)
        assert torch.equal(g, 2 * x) and is_batch_inner(g) is inner
        assert convert_layout(y, batch_inner=not inner) is y


@needs_bf16
def test_bf16_images_are_converted_to_batch_inner_once(on, monkeypatch):
    """The weight gradient uses the converted input of the forward pass, except where products compute it."""
    monkeypatch.setattr(conv2d, "use_batch_inner", lambda *_: True)
    layer = conv2d.Conv2d(4, 6, 3, 2, 1, dtype=torch.bfloat16)
    for weight_by_product, wanted in ((False, "batch_inner"), (True, "last")):
        monkeypatch.setattr(conv2d, "use_products", lambda *_, weight_by_product=weight_by_product: weight_by_product)
        y = layer(to_layout(torch.randn(5, 4, 6, 6, dtype=torch.bfloat16), batch_inner=False))
        assert order_of(y.grad_fn.saved_tensors[0]) == wanted


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=needs_bf16)])
def test_batch_inner_conv_keeps_model_gradients(on, precision, monkeypatch):
    grads = {}
    for known in (True, False):
        monkeypatch.setattr(batch_inner_conv, "is_available", lambda known=known: known)
        torch.manual_seed(0)
        model = aezoo.create_model("vae", (1, 28, 28), net="conv", hidden_dims=(16, 32, 64), latent_dim=4)
        to_channels_last(model)
        swap_in(model, model.input_shape, channels_last=True)
        torch.manual_seed(1)
        x = torch.rand(32, 1, 28, 28)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            loss = model.loss(x)
        (loss["loss"] if isinstance(loss, dict) else loss).backward()
        grads[known] = torch.cat([p.grad.flatten() for p in model.parameters()])
    off = (grads[True] - grads[False]).norm() / grads[False].norm()
    assert off < (1e-5 if precision == "32-true" else 0.05)
