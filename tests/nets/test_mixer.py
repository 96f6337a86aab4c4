"""Tests of aezoo/nets/mixer.py."""

from typing import Any

import pytest
import torch
from finite_differences import assert_network_gradients_match
from torch import Tensor, nn

from aezoo import nets
from aezoo.errors import AezooError
from aezoo.nets import mixer, vit

SHAPE = (2, 7, 6)  # 4 x 3 patches of 2 x 2, padding is half of the last row


def data(n: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


# ---- MLP-Mixer -------------------------------------------------------------------------------------------------------


def mixed(block: mixer.Block, x_BND: Tensor) -> Tensor:
    """A block by the paper's equation 1, with explicit sums over positions and channels."""

    def norm_(layer: nn.LayerNorm, h: Tensor) -> Tensor:
        mean, var = h.mean(2, keepdim=True), h.var(2, correction=0, keepdim=True)
        return (h - mean) / (var + 1e-6).sqrt() * layer.weight + layer.bias

    (w_1, b_1), (w_2, b_2) = ((block.places[i].weight, block.places[i].bias) for i in (0, 2))
    (w_3, b_3), (w_4, b_4) = ((block.channels[i].weight, block.channels[i].bias) for i in (0, 2))
    h_BSD = torch.einsum("sn,bnd->bsd", w_1, norm_(block.norm_1, x_BND)) + b_1[:, None]
    x_BND = x_BND + torch.einsum("ns,bsd->bnd", w_2, nn.functional.gelu(h_BSD)) + b_2[:, None]
    h_BNC = torch.einsum("cd,bnd->bnc", w_3, norm_(block.norm_2, x_BND)) + b_3
    return x_BND + torch.einsum("dc,bnc->bnd", w_4, nn.functional.gelu(h_BNC)) + b_4


@pytest.mark.parametrize(("n", "width", "between"), [(6, 10, 5), (9, 4, 2), (1, 1, 1)])
def test_mixer_block_matches_formula(n: int, width: int, between: int, shifted: Any) -> None:
    block, x_BND = shifted(mixer.Block(n, width, "gelu")).double(), torch.randn(3, n, width, dtype=torch.float64)
    assert block.places[0].weight.shape == (between, n) and block.channels[0].weight.shape == (4 * width, width)
    torch.testing.assert_close(block(x_BND), mixed(block, x_BND))
    assert (block(x_BND) - x_BND).abs().max() > 1e-3


def test_only_token_mixing_depends_on_position(shifted: Any) -> None:
    block, x_BND = shifted(mixer.Block(6, 10, "gelu")).double(), torch.randn(3, 6, 10, dtype=torch.float64)
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    assert (block(x_BND[:, order]) - block(x_BND)[:, order]).abs().max() > 1e-3
    # attention without positions is permutation equivariant
    attention = shifted(vit.Block(10, "gelu")).double()
    torch.testing.assert_close(attention(x_BND[:, order]), attention(x_BND)[:, order])
    with torch.no_grad():
        block.places[2].weight.zero_()
    other = x_BND.clone()
    other[:, 4] += 1
    places = (block(other) != block(x_BND)).flatten(2).any(2)
    assert torch.equal(places, (torch.arange(6) == 4).expand(3, 6))
    with torch.no_grad():  # all positions are then treated alike
        block.places[2].bias.zero_()
    torch.testing.assert_close(block(x_BND[:, order]), block(x_BND)[:, order])


def test_layers_over_places_are_the_same_for_each_channel(shifted: Any) -> None:
    """Without channel mixing and normalisation, each channel is the same function of itself alone."""
    block, x_BND = shifted(mixer.Block(6, 10, "gelu")).double(), torch.randn(3, 6, 10, dtype=torch.float64)
    block.norm_1 = nn.Identity()
    with torch.no_grad():
        for p in block.channels[2].parameters():
            p.zero_()
    order = torch.randperm(10)
    torch.testing.assert_close(block(x_BND[..., order]), block(x_BND)[..., order])
    (gradient,) = torch.autograd.grad(block(x_BND.requires_grad_())[0, :, 3].sum(), x_BND)
    assert torch.equal(gradient.flatten(0, 1).any(0), torch.arange(10) == 3)
    assert (gradient[0, :, 3] != 1).all()


@pytest.mark.parametrize("shape", [(2, 11), (3, 5, 7), (2, 3, 4, 5)])
def test_mixer_networks_match_hand_written_forward(shape: tuple[int, ...], shifted: Any) -> None:
    """The whole encoder and decoder of a code map; a linear layer joins different widths."""
    patchify, x = vit.Patchify(shape), data(2, shape)
    code = (5, *patchify.grid)
    encoder = shifted(nets.encoder("mixer", shape, code, (8, 6), "gelu")).double()
    decoder = shifted(nets.decoder("mixer", code, shape, (6, 8), "gelu")).double()
    z, found = torch.ones(2, *code, dtype=torch.float64), []
    for layers, h in (([*encoder][1:6], patchify(x)), ([*decoder][2:7], decoder[1](decoder[0](z)))):
        for layer in layers:
            h = mixed(layer, h) if isinstance(layer, mixer.Block) else layer(h)
        found.append(h)
    kinds = [type(layer).__name__ for layer in (*encoder, *decoder)]
    assert kinds.count("Block") == 4 and kinds.count("LayerNorm") == 2 and "Positions" not in kinds
    code_BCN = torch.einsum("cd,bnd->bcn", encoder[6].weight, found[0]) + encoder[6].bias[:, None]
    torch.testing.assert_close(encoder(x), code_BCN.reshape(2, *code))
    torch.testing.assert_close(decoder(z), patchify.inverse(found[1]))


@pytest.mark.parametrize("sides", [(1,), (2, 3), (2, 3, 2)])
def test_mixer_code_grid_must_match_patch_grid(sides: tuple[int, ...]) -> None:
    shape = (1, *(4 * side for side in sides))
    assert nets.map_shape("mixer", shape, (8,), 5) == (5, *vit.Patchify(shape).grid)
    for build_, shapes in ((nets.encoder, (shape, (5, *sides[1:], 9))), (nets.decoder, ((5, *sides[1:], 9), shape))):
        with pytest.raises(AezooError, match="does not fit: patches leave a grid"):
            build_("mixer", *shapes, (8,))


def test_a_mixer_without_blocks_is_linear() -> None:
    encoder, x = nets.encoder("mixer", (1, 5, 6), (3,), ()), torch.randn(2, 1, 5, 6)
    zero = torch.zeros(1, 1, 5, 6)
    torch.testing.assert_close(encoder(2 * x) - encoder(zero), 2 * (encoder(x) - encoder(zero)), rtol=1e-4, atol=1e-5)
    for build_, shapes in ((nets.encoder, ((1, 5, 6), (3,))), (nets.decoder, ((3,), (1, 5, 6)))):
        with pytest.raises(AezooError, match="unknown activation"):
            build_("mixer", *shapes, (), "no")


def test_gradients_match_finite_differences() -> None:
    assert_network_gradients_match("mixer")
