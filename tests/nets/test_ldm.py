"""Networks of latent diffusion: those of diffusers on even grids, and sizes of any grid."""

import diffusers
import pytest
import torch

import aezoo
from aezoo import nets
from aezoo.io.exporters.diffusers import save_diffusers
from aezoo.nets.ldm import group_count


@pytest.mark.parametrize("hidden_dims", [(8,), (8, 12), (4, 8, 8)])
def test_networks_are_those_of_diffusers(tmp_path, hidden_dims):
    torch.manual_seed(0)
    settings = {"latent_dim": 3, "features": "none", "discriminator_weight": 0.0}
    model = aezoo.create_model("autoencoder_kl", (3, 16, 24), net="ldm", hidden_dims=hidden_dims, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():  # norms with gain 1 and biases of 0 would hide mistakes
            p.add_(0.1 * torch.randn_like(p))
        save_diffusers(model, tmp_path)
        theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path).eval()
        x, z = torch.rand(2, 3, 16, 24), torch.randn(2, *model.code_shape)
        moments = torch.cat([*theirs.encode(2 * x - 1).latent_dist.parameters.chunk(2, 1)], 1)
        torch.testing.assert_close(model.encoder(x), moments, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.decoder(z), theirs.decode(z).sample / 2 + 0.5, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 11), (1, 7, 10), (1, 5, 6, 9)])
def test_any_grid_is_restored(shape):
    encoder = nets.encoder("ldm", shape, (4,), (8, 8), "silu")
    decoder = nets.decoder("ldm", (4,), shape, (8, 8), "silu")
    x = torch.rand(2, *shape)
    assert decoder(encoder(x)).shape == x.shape


@pytest.mark.parametrize(("widths", "groups"), [((128, 256, 512), 32), ((64, 64), 16), ((8, 12), 2), ((3, 5), 1)])
def test_groups_have_four_channels_or_more(widths, groups):
    assert group_count(widths) == groups
