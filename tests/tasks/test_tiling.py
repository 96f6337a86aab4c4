"""Tiles: encoder and decoder give the same results in tiles as on the whole, and unsupported models are refused."""

import pytest
import torch

import aezoo
from aezoo.errors import AezooError

CASES = {
    "conv": ("conv_ae", {"latent_map": True, "hidden_dims": (4, 8), "latent_dim": 3}),
    "denoiser": ("dncnn", {"depth": 4, "width": 4}),
    "gdn, hyperprior": ("mean_scale_hyperprior", {"hidden_dims": (4, 4, 4), "latent_dim": 2}),
    "indices": ("vq_vae", {"net": "conv_keras", "hidden_dims": (4, 8), "latent_dim": 2, "codebook_size": 8}),
    "convnext": ("fsq_vae", {"net": "convnext", "hidden_dims": (4, 4)}),
}


def made(case, shape=(1, 8, 8)):
    name, settings = CASES[case]
    torch.manual_seed(0)
    model = aezoo.create_model(name, shape, **settings).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_tiled_equals_whole(case):
    model, size = made(case), (61, 100)
    x = torch.rand(2, 1, *size)
    whole, parts = aezoo.at_size(model, size), aezoo.tiled(model, size, tile=24)
    with torch.no_grad():
        torch.testing.assert_close(parts.encoder(x), whole.encoder(x), rtol=0, atol=1e-5)
        z = whole.encode(x)
        torch.testing.assert_close(parts.decode(z), whole.decode(z), rtol=0, atol=1e-5)
        torch.testing.assert_close(parts(x), whole(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(parts.score(x), whole.score(x), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("depth", "margin"), [(2, 1), (5, 4), pytest.param(20, 19, marks=pytest.mark.slow)])
def test_margin_of_convolutions_of_stride_1_is_their_number(depth, margin):
    model = aezoo.create_model("dncnn", (1, 8, 8), depth=depth, width=2).eval()
    assert aezoo.tiled(model, (40, 40), 16).encoder.margins == [margin, margin]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 16), (1, 8, 8, 8)])
def test_series_and_volumes_work_in_tiles(shape):
    model = made("conv", shape)
    size = tuple(3 * n + 1 for n in shape[1:])
    x = torch.rand(1, shape[0], *size)
    torch.testing.assert_close(aezoo.tiled(model, size, 8)(x), aezoo.at_size(model, size)(x), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_margins_smaller_by_one_change_the_codes():
    model, size = made("gdn, hyperprior"), (64, 64)
    x, whole, parts = torch.rand(1, 1, *size), aezoo.at_size(model, size), aezoo.tiled(model, size, 16)
    parts.encoder.margins = [margin - 1 for margin in parts.encoder.margins]
    assert (parts.encoder(x) - whole.encoder(x)).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("resnet_ae", {"latent_map": True}, "depends on the whole sample"),
        ("autoencoder_kl", {}, "depends on the whole sample"),
        ("vq_vae_2", {"net": "conv"}, "its code is not a map"),
        ("conv_ae", {}, "its weights belong to this size"),
    ],
)
def test_models_that_cannot_be_tiled_are_refused_in_one_line(name, settings, said):
    model = aezoo.create_model(name, (3, 16, 16), hidden_dims=(8, 8), **settings).eval()
    with pytest.raises(AezooError, match=said) as refused:
        aezoo.tiled(model, (64, 64), 32)
    assert "\n" not in str(refused.value)


def test_a_tile_without_points_is_refused():
    with pytest.raises(AezooError, match="above 0, got 0"):
        aezoo.tiled(made("conv"), (16, 16), 0)


def residual():
    """A network that normalises over all positions."""
    torch.manual_seed(0)
    model = aezoo.create_model("resnet_ae", (1, 8, 8), latent_map=True, hidden_dims=(4, 8), latent_dim=3).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model


def test_one_blended_tile_is_the_whole():
    model, x = residual(), torch.rand(1, 1, 24, 16)
    torch.testing.assert_close(aezoo.tiled(model, (24, 16), 32, blend=0.25)(x), aezoo.at_size(model, (24, 16))(x))


def test_blended_tiles_are_weighted_along_each_axis():
    """Four tiles of 48 points that overlap by 12: a position in all overlaps is a bilinear mixture."""
    model = residual()
    x, tile = torch.rand(1, 1, 84, 84), aezoo.at_size(model, (48, 48))
    with torch.no_grad():
        found = aezoo.tiled(model, (84, 84), 48, blend=0.25).encode(x)
        z = {(i, j): tile.encode(x[..., i : i + 48, j : j + 48]) for i in (0, 36) for j in (0, 36)}
    stride = 48 // z[0, 0].shape[-1]
    step, overlap = 36 // stride, 12 // stride
    assert overlap == 3 and found.shape[-1] == 84 // stride
    torch.testing.assert_close(found[..., :step, :step], z[0, 0][..., :step, :step])
    for y in range(overlap):
        for x_ in range(overlap):
            v, h = y / overlap, x_ / overlap
            a, b = step + y, step + x_
            expected = (1 - v) * ((1 - h) * z[0, 0][..., a, b] + h * z[0, 36][..., a, x_])
            expected = expected + v * ((1 - h) * z[36, 0][..., y, b] + h * z[36, 36][..., y, x_])
            torch.testing.assert_close(found[..., a, b], expected)


@torch.no_grad()
def test_blended_tiles_are_those_of_diffusers():
    """Except for a narrow tile at the end, which ours leaves out."""
    torch.manual_seed(0)
    model = aezoo.create_model("diffusers_ae", (3, 32, 32)).eval()
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    for size, kept in (((32, 80), (24, 72)), ((80, 32), (72, 24))):
        x = torch.rand(1, 3, *size)
        whole, parts = aezoo.at_size(model, size), aezoo.tiled(model, size, 32, blend=0.25)
        z = whole.encode(x)
        want = []
        for net, tensor in ((whole.encoder, x), (whole.decoder, z)):
            net.net.enable_tiling()
            assert (net.net.tile_sample_min_size, net.net.tile_overlap_factor) == (32, 0.25)
            want.append(net(tensor))
            net.net.disable_tiling()
        found = parts.encode(x), parts.decode(z)
        for ours, theirs, scale in ((found[0], want[0].chunk(2, 1)[0], 2), (found[1], want[1], 1)):
            cut = (..., slice(kept[0] // scale), slice(kept[1] // scale))
            torch.testing.assert_close(ours[cut], theirs[cut], rtol=0, atol=1e-5)
        assert (found[0] - z).abs().max() > 1e-3  # blended tiles differ from the whole


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"blend": 0.7}, "blend must be a share"),
        ({"blend": -0.1}, "blend must be a share"),
        ({"blend": 0.25, "tile": 2}, "at"),
    ],
)
def test_impossible_blends_are_refused(settings, said):
    with pytest.raises(AezooError, match=said):
        aezoo.tiled(residual(), (64, 64), **settings)
