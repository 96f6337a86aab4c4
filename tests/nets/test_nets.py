"""Networks: every input shape is restored, codes are vectors or maps, samples are independent."""

import math

import pytest
import torch
from finite_differences import assert_network_gradients_match
from torch import nn

from aezoo import nets
from aezoo.errors import AezooError

# every side from 1 to 97 in one dimension and in two, sides of 1 and odd ones beside even ones in three
SHAPES = [(2, n) for n in range(1, 98)] + [(1, n, 98 - n) for n in range(1, 50)]
SHAPES += [(3, n, m) for n, m in ((1, 1), (1, 64), (33, 1))]
SHAPES += [(1, n, 1 + n % 5, 1 + n % 7) for n in (1, 2, 5, 12, 97)]


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("conv", (2, 3, 4)),
        pytest.param("resnet", (2, 4), marks=pytest.mark.slow),
        pytest.param("conv_keras", (2, 4), marks=pytest.mark.slow),
        ("conv", ()),
        ("resnet", ()),
        ("conv_keras", ()),
        pytest.param("unet", (2, 3, 4), marks=pytest.mark.slow),
        pytest.param("unet", (2, 4), marks=pytest.mark.slow),
        ("unet", ()),
        pytest.param("gdn", (2, 3, 4), marks=pytest.mark.slow),
        ("gdn", ()),
        pytest.param("dc", (2, 3, 4), marks=pytest.mark.slow),
        ("dc", ()),
        pytest.param("ldm", (2, 3, 4), marks=pytest.mark.slow),
        pytest.param("ldm", (2, 4), marks=pytest.mark.slow),
        pytest.param("ldm", (), marks=pytest.mark.slow),
    ],
)
def test_every_input_shape_is_restored(name: str, stages: tuple[int, ...]) -> None:
    # every third shape still covers all remainders
    for i, shape in enumerate(SHAPES if name == "conv" else SHAPES[::3]):
        grid = tuple(math.ceil(n / 2 ** len(stages)) for n in shape[1:])
        assert nets.map_shape(name, shape, stages, 5) == (5, *grid)
        with torch.device("meta"):
            code = (5, *grid) if i % 2 else (3,)
            encoder = nets.encoder(name, shape, code, stages)
            decoder = nets.decoder(name, code, shape, stages[::-1])
            z = encoder(torch.empty(2, *shape))
            assert z.shape == (2, *code)
            assert decoder(z).shape == (2, *shape)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("mlp", (30,))]
    + [
        (name, shape)
        for name in nets.NETS
        for shape in ((1, 28, 28), (3, 32, 32), (1, 27, 35), (3, 128), (1, 12, 12, 12), (2, 1, 1))
    ],
)
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_networks_use_all_parameters_and_separate_samples(name: str, shape: tuple[int, ...], act: str) -> None:
    torch.manual_seed(0)
    encoder, decoder = nets.encoder(name, shape, (6,), (8, 12), act), nets.decoder(name, (6,), shape, (12, 8), act)
    x = torch.rand(3, *shape)
    found = decoder(encoder(x))
    assert found.shape == x.shape
    torch.testing.assert_close(decoder(encoder(x[1:2])), found[1:2], rtol=1e-4, atol=1e-5)
    (found * torch.randn_like(found)).sum().backward()
    parameters = [*encoder.parameters(), *decoder.parameters()]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)


def test_mlp_layer_widths_match_article() -> None:
    hidden = [128, 64]
    encoder, decoder = nets.encoder("mlp", (1, 28, 28), (32,), hidden), nets.decoder("mlp", (32,), (784,), hidden[::-1])
    widths = [m.weight.shape[::-1] for m in [*encoder, *decoder] if isinstance(m, nn.Linear)]
    assert widths == [(784, 128), (128, 64), (64, 32), (32, 64), (64, 128), (128, 784)]
    assert sum(isinstance(m, nn.ReLU) for m in [*encoder, *decoder]) == 4
    assert isinstance(encoder[-2], nn.Linear)
    assert isinstance(decoder[-2], nn.Linear)
    assert hidden == [128, 64]  # the caller's list is not reversed in place


def test_gated_layer_is_linear_times_sigmoid() -> None:
    torch.manual_seed(0)
    encoder, x = nets.encoder("mlp", (5,), (2,), (3,), "gated"), torch.randn(4, 5)
    first, last = (m for m in encoder if isinstance(m, nn.Linear))
    (w, v), (b, c) = first.weight.chunk(2), first.bias.chunk(2)
    hidden = (x @ w.T + b) * torch.sigmoid(x @ v.T + c)
    torch.testing.assert_close(encoder(x), hidden @ last.weight.T + last.bias)
    for net in ("conv", "resnet"):
        with pytest.raises(AezooError, match="only available with net='mlp'"):
            nets.encoder(net, (1, 8, 8), (2,), (3,), "gated")


def test_keras_vae_network_has_published_parameter_count() -> None:
    """The counts that the page of the example prints, https://keras.io/examples/generative/vae/"""
    encoder = nets.encoder("conv_keras", (1, 28, 28), (4,), (32, 64))
    decoder = nets.decoder("conv_keras", (2,), (1, 28, 28), (64, 32))
    assert [sum(p.numel() for p in net.parameters()) for net in (encoder, decoder)] == [69_076, 65_089]


def test_keras_vq_vae_network_has_published_parameter_count() -> None:
    """Those of https://keras.io/examples/generative/vq_vae/; with 64 codes of 16 numbers 48,913, as printed there."""
    encoder = nets.encoder("conv_keras", (1, 28, 28), (16, 7, 7), (32, 64))
    decoder = nets.decoder("conv_keras", (16, 7, 7), (1, 28, 28), (64, 32))
    assert [sum(p.numel() for p in net.parameters()) for net in (encoder, decoder)] == [19_856, 28_033]


def test_ldm_network_has_the_size_of_stable_diffusions() -> None:
    """34,163,592 and 49,490,179 in diffusers' AutoencoderKL, including redundant biases of keys and values."""
    with torch.device("meta"):
        parts = (
            nets.encoder("ldm", (3, 64, 64), (8, 8, 8), (128, 256, 512), "silu"),
            nets.decoder("ldm", (4, 8, 8), (3, 64, 64), (512, 256, 128), "silu"),
        )
    counts = [sum(p.numel() for p in net.parameters()) + 2 * 512 for net in parts]
    assert counts == [34_163_592, 49_490_179]


def test_without_hidden_layers_an_mlp_is_linear() -> None:
    encoder = nets.encoder("mlp", (2, 3), (4,), ())
    a, b, zero = torch.randn(1, 2, 3), torch.randn(1, 2, 3), torch.zeros(1, 2, 3)
    torch.testing.assert_close(encoder(a + 2 * b) - encoder(zero), encoder(a) + 2 * encoder(b) - 3 * encoder(zero))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_residual_block_with_zero_last_conv_is_identity(rank: int) -> None:
    from aezoo.nets.resnet import ResidualBlock

    block = ResidualBlock(rank, 8, "relu")
    x = torch.randn(2, 8, *([5] * rank))
    assert not torch.equal(block(x), x)
    nn.init.zeros_(block.body[-1].weight)
    nn.init.zeros_(block.body[-1].bias)
    assert torch.equal(block(x), x)


def shortcuts(net: nn.Module) -> nn.Module:
    """Set all parameters to 0, so that only shortcuts remain."""
    for p in net.parameters():
        nn.init.zeros_(p)
    return net.double()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_space_to_channel_shuffle_roundtrips(rank: int) -> None:
    from aezoo.nets.dc import shuffle, unshuffle

    x = torch.randn(2, 3, *(4, 6, 2)[:rank])
    cells = unshuffle(x)
    assert cells.shape == (2, 3 * 2**rank, *(2, 3, 1)[:rank])
    assert torch.equal(shuffle(cells), x)
    z = torch.randn(2, 3 * 2**rank, *(2, 3, 1)[:rank])
    assert torch.equal(unshuffle(shuffle(z)), z)
    # the values of a cell are in adjacent channels
    corner = x[:, :, *[slice(2)] * rank].flatten(2)
    assert torch.equal(cells[:, :, *[0] * rank].unflatten(1, (3, -1)), corner)


@pytest.mark.parametrize("shape", [(1, 9), (2, 8, 12), (1, 7, 5), (1, 4, 3, 5)])
def test_dc_shortcuts_with_enough_channels_are_lossless(shape: tuple[int, ...]) -> None:
    """With zero parameters a stage only rearranges values: in 2-D, 4 C and 16 C channels hold all of them."""
    cell = 2 ** (len(shape) - 1)
    stages = (cell * shape[0], cell**2 * shape[0])
    code = nets.map_shape("dc", shape, stages, stages[-1])
    encoder = shortcuts(nets.encoder("dc", shape, code, stages))
    decoder = shortcuts(nets.decoder("dc", code, shape, stages[::-1]))
    x = torch.rand(3, *shape, dtype=torch.float64)
    z = encoder(x)
    assert z.shape == (3, *code)
    torch.testing.assert_close(decoder(z), x)
    if len(shape) == 3 and shape[1] % 4 == shape[2] % 4 == 0:
        once = torch.nn.functional.pixel_unshuffle(x, 2)
        assert torch.equal(z, torch.nn.functional.pixel_unshuffle(once, 2))


@pytest.mark.parametrize("pool", [nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d])
def test_dc_shortcuts_average_and_repeat_cells(pool: type[nn.Module]) -> None:
    rank = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d).index(pool) + 1
    shape = (3, *(7, 8, 5)[:rank])
    code = nets.map_shape("dc", shape, (3,), 3)
    x = torch.rand(2, *shape, dtype=torch.float64)
    z = shortcuts(nets.encoder("dc", shape, code, (3,)))(x)
    even = nn.functional.pad(x, [n for side in shape[:0:-1] for n in (0, side % 2)], mode="replicate")
    torch.testing.assert_close(z, pool(2)(even))
    found = shortcuts(nets.decoder("dc", code, shape, (3,)))(z)
    repeated = nn.functional.interpolate(z, scale_factor=2, mode="nearest")
    torch.testing.assert_close(found, repeated[..., *(slice(side) for side in shape[1:])])


@pytest.mark.parametrize(("before", "after"), [(6, 2), (2, 6), (6, 4), (4, 6), (1, 5), (5, 5)])
def test_match_channels_averages_by_overlap(before: int, after: int) -> None:
    """Each new channel is the mean of the old ones, weighted by the overlap of equal parts of [0, 1]."""
    from aezoo.nets.dc import match_channels

    x = torch.randn(2, before, 3, dtype=torch.float64)
    shares = torch.zeros(after, before, dtype=torch.float64)
    for i in range(after):
        for j in range(before):
            common = min((i + 1) / after, (j + 1) / before) - max(i / after, j / before)
            shares[i, j] = max(0.0, common) * after
    torch.testing.assert_close(match_channels(x, after), torch.einsum("ij,bjl->bil", shares, x))
    images = x[..., None].expand(2, before, 3, 4).contiguous(memory_format=torch.channels_last)
    found = match_channels(images, after)
    torch.testing.assert_close(found[..., 2], torch.einsum("ij,bjl->bil", shares, x))


def test_dc_stage_adds_convolution_to_shortcut() -> None:
    from aezoo.nets.dc import _Down, _Up

    x = torch.rand(2, 3, 8, 6, dtype=torch.float64)
    down, up = _Down(2, 3, 6).double(), _Up(2, 3, 2, (16, 11), "silu").double()
    cells = torch.nn.functional.pixel_unshuffle
    # the first 6 of 2 x 4 convolved channels, plus means of adjacent pairs of 3 x 4 channels
    expected = cells(down.conv(x), 2)[:, :6] + cells(x, 2).unflatten(1, (6, 2)).mean(2)
    torch.testing.assert_close(down(x), expected)
    # 3 channels, repeated 8 times each, are averaged in groups of 3 to 8 channels
    eight = torch.stack([x[:, [i * 3 // 8, (i * 3 + 1) // 8, (i * 3 + 2) // 8]].mean(1) for i in range(8)], 1)
    expected = torch.nn.functional.pixel_shuffle(up.conv(nn.functional.silu(x)) + eight, 2)[..., :11]
    torch.testing.assert_close(up(x), expected)


@pytest.mark.parametrize("name", nets.ACTIVATIONS)
def test_activation_returns_a_new_module(name: str) -> None:
    assert nets.activation(name) is not nets.activation(name)
    assert type(nets.activation(name)) is nets.ACTIVATIONS[name]


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: nets.encoder("perceiver", (4,), (2,), ()), "unknown net 'perceiver'"),
        (lambda: nets.encoder("mlp", (4,), (2,), (8,), "swish"), "unknown activation 'swish'"),
        (lambda: nets.encoder("mlp", (4,), (2,), (8, 0)), "hidden_dims"),
        (lambda: nets.decoder("mlp", (2,), (4,), (-1,)), "hidden_dims"),
        (lambda: nets.encoder("conv", (30,), (2,), (8,)), "convolutions take"),
        (lambda: nets.decoder("resnet", (2,), (30,), (8,)), "convolutions take"),
        (lambda: nets.map_shape("resnet", (30,), (8,), 2), "convolutions take"),
        (lambda: nets.encoder("conv", (1, 8, 8), (4, 3, 3), (8,)), "does not fit"),
        (lambda: nets.decoder("resnet", (4, 7), (1, 8, 8), (8,)), "does not fit"),
        (lambda: nets.decoder("conv_keras", (4, 7, 7), (1, 8, 8), (8,)), "does not fit"),
        (lambda: nets.map_shape("mlp", (1, 8, 8), (8,), 2), "no feature map"),
    ],
)
def test_invalid_values_are_refused_in_one_line(build: object, word: str) -> None:
    with pytest.raises(AezooError, match=word) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mlp", "conv", "resnet", "conv_keras", "dc", "ldm"])
def test_gradients_match_finite_differences(name: str) -> None:
    assert_network_gradients_match(name)
