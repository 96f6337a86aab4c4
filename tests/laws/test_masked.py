"""Laws of the masked models and of what they are made of: patches, masks, attention, and who sees what."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from scipy.stats import laplace, norm
from torch import Tensor, nn

import aezoo
from aezoo import nets
from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.nets import convnext, mixer, vit
from aezoo.testing import SharedNoise

SHAPES = [(2, 11), (1, 8, 8), (3, 5, 7), (2, 3, 4, 5)]
SHAPE = (2, 7, 6)  # 4 x 3 patches of 2 x 2, the last row half filled
SMALL: dict[str, dict[str, Any]] = {
    "mae": {"width": 12, "depth": 2, "decoder_width": 8, "patch_size": 2},
    "simmim": {"width": 12, "depth": 2, "patch_size": 2},
    "masked_conv_ae": {"hidden_dims": (6,), "latent_dim": 5, "patch_size": 2, "likelihood": "gaussian"},
}
VARIANTS = {"mae_norm": ("mae", {"norm_pix": True}), "simmim_mixer": ("simmim", {"net": "mixer"})}
MODELS = [*SMALL, *VARIANTS]


def build(name: str, shifted: Any, shape: tuple[int, ...] = SHAPE, **extra: Any) -> Any:
    torch.manual_seed(0)
    name, own = VARIANTS.get(name, (name, {}))
    return shifted(aezoo.create_model(name, input_shape=shape, **SMALL[name] | own | extra).double())


def patchify_of(model: Any) -> vit.Patchify:
    found: vit.Patchify = next(part for part in model.modules() if isinstance(part, vit.Patchify))
    return found


def data(n: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def masks(model: Any, n: int) -> tuple[Tensor, Tensor]:
    """The order of patches and the masked values of each sample, (n, N) and (n, *shape), that the seed 7 draws."""
    torch.manual_seed(7)
    patchify = patchify_of(model)
    order_BN = torch.rand(n, patchify.n).argsort(1)
    masked = torch.zeros(n, patchify.n, patchify.size).bool()
    for b in range(n):
        masked[b, order_BN[b, patchify.n - model.masked :]] = True
    return order_BN, patchify.inverse(masked)


def loss(model: Any, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(7)
    found: dict[str, Tensor] = model.loss(x)
    return found


# ---- patches and masks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_patches_put_together_are_the_sample(shape: tuple[int, ...], size: int) -> None:
    patchify, x = vit.Patchify(shape, size), data(3, shape)
    patches_BNP = patchify(x)
    assert patches_BNP.shape == (3, patchify.n, patchify.size)
    assert torch.equal(patchify.inverse(patches_BNP), x)
    assert int(patchify.real_NP.sum()) == math.prod(shape)
    assert not patches_BNP[:, patchify.real_NP == 0].any()
    assert patches_BNP.sum().item() == pytest.approx(x.sum().item())
    again = patchify(patchify.inverse(patches_BNP * 3 + 1))  # what fills up is no part of a sample
    torch.testing.assert_close(again, (patches_BNP * 3 + 1) * patchify.real_NP)


def test_a_patch_is_a_block_of_the_image_with_its_channels() -> None:
    patchify, x = vit.Patchify((3, 6, 8), 2), data(2, (3, 6, 8))
    for i in range(3):
        for j in range(4):
            block = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            assert torch.equal(patchify(x)[:, 4 * i + j], block.flatten(1))


@pytest.mark.parametrize(
    ("shape", "sides"),
    [((1, 28, 28), (4, 4)), ((3, 224, 224), (16, 16)), ((3, 64, 64), (8, 8)), ((2, 1), (1,)), ((1, 1, 64), (1, 2))],
)
def test_the_automatic_patch_suits_the_input(shape: tuple[int, ...], sides: tuple[int, ...]) -> None:
    assert vit.patch_sides(shape) == sides


@pytest.mark.parametrize("n", [2, 3, 16, 49, 100])
@pytest.mark.parametrize("ratio", [0.75, 0.6, 0.5, 0.29])
def test_exactly_the_floor_of_the_ratio_is_masked_in_every_sample(n: int, ratio: float) -> None:
    wanted = int(np.floor(np.round(ratio * n, 9)))
    if wanted == 0:
        with pytest.raises(AezooError, match="masks none"):
            vit.count_masked(n, ratio)
        return
    assert vit.count_masked(n, ratio) == wanted
    order_BN = vit.random_order(50, n, torch.device("cpu"))
    assert torch.equal(order_BN.sort(1).values, torch.arange(n).expand(50, -1))
    masked_BN = vit.is_masked(order_BN, wanted)
    assert (masked_BN.sum(1) == wanted).all()
    assert torch.equal(masked_BN.nonzero()[:, 1].view(50, -1), order_BN[:, n - wanted :].sort(1).values)
    hidden_KN = vit.is_masked(vit.fixed_orders(n, wanted), wanted)
    assert (hidden_KN.sum(1) == wanted).all()
    assert hidden_KN.any(0).all() and (~hidden_KN).any(0).all()


def test_masks_differ_between_samples_and_every_patch_is_as_likely() -> None:
    masked_BN = vit.is_masked(vit.random_order(4000, 8, torch.device("cpu")), 6).double()
    assert len(masked_BN.unique(dim=0)) == math.comb(8, 6)
    # five standard deviations
    assert (masked_BN.mean(0) - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 4000)


def test_unshuffling_what_was_shuffled_changes_nothing() -> None:
    tokens_BND, order_BN = torch.randn(4, 9, 3), torch.rand(4, 9).argsort(1)
    moved_BND = vit.shuffle(tokens_BND, order_BN)
    assert torch.equal(vit.unshuffle(moved_BND, order_BN), tokens_BND)
    assert torch.equal(moved_BND[2, 5], tokens_BND[2, order_BN[2, 5]])
    assert torch.equal(vit.shuffle(tokens_BND, order_BN[:, :4]), moved_BND[:, :4])
    # shuffling twice is the mistake: an order is its own inverse by chance alone
    assert not torch.equal(vit.shuffle(moved_BND, order_BN), tokens_BND)


def test_what_is_averaged_is_each_patch_where_it_was_hidden() -> None:
    orders_KN = vit.fixed_orders(10, 7)
    hidden_KN = vit.is_masked(orders_KN, 7)
    values_BKNP = torch.randn(3 * len(orders_KN), 10, 2)
    found = vit.average_masked(values_BKNP, orders_KN, 7)
    for b in range(3):
        for i in range(10):
            rows = [b * len(orders_KN) + k for k in range(len(orders_KN)) if hidden_KN[k, i]]
            torch.testing.assert_close(found[b, i], values_BKNP[rows, i].mean(0))


# ---- the transformer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "heads"), [(64, 2), (96, 3), (7, 1)])
def test_attention_is_that_of_torch(width: int, heads: int, shifted: Any) -> None:
    ours = shifted(vit.Attention(width)).double()
    theirs = nn.MultiheadAttention(width, heads, batch_first=True).double()
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": torch.cat([ours.bias_q, torch.zeros(2 * width)]),
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    x_BND = torch.randn(3, 5, width, dtype=torch.float64)
    assert ours.heads == heads
    torch.testing.assert_close(ours(x_BND), theirs(x_BND, x_BND, x_BND)[0])


def test_a_block_is_torch_s_pre_norm_encoder_layer(shifted: Any) -> None:
    ours = shifted(vit.Block(64, "gelu")).double()
    theirs = nn.TransformerEncoderLayer(64, 2, 256, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).double()
    pairs = {
        "self_attn.out_proj.": ours.attention.out,
        **{"linear1.": ours.mlp[0], "linear2.": ours.mlp[2], "norm1.": ours.norm_1, "norm2.": ours.norm_2},
    }
    state = {f"{a}{b}": getattr(part, b) for a, part in pairs.items() for b in ("weight", "bias")}
    state["self_attn.in_proj_weight"] = ours.attention.qkv.weight
    state["self_attn.in_proj_bias"] = torch.cat([ours.attention.bias_q, torch.zeros(128)])
    theirs.load_state_dict(state)
    x_BND = torch.randn(2, 6, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x_BND), theirs(x_BND))


def mixed(block: mixer.Block, x_BND: Tensor) -> Tensor:
    """A mixer's block by the paper's equation 1, sums over places and over channels written out."""

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
def test_a_mixer_s_block_is_its_formula(n: int, width: int, between: int, shifted: Any) -> None:
    block, x_BND = shifted(mixer.Block(n, width, "gelu")).double(), torch.randn(3, n, width, dtype=torch.float64)
    assert block.places[0].weight.shape == (between, n) and block.channels[0].weight.shape == (4 * width, width)
    torch.testing.assert_close(block(x_BND), mixed(block, x_BND))
    assert (block(x_BND) - x_BND).abs().max() > 1e-3


def test_layers_over_places_tell_them_apart_and_those_over_channels_do_not(shifted: Any) -> None:
    block, x_BND = shifted(mixer.Block(6, 10, "gelu")).double(), torch.randn(3, 6, 10, dtype=torch.float64)
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    assert (block(x_BND[:, order]) - block(x_BND)[:, order]).abs().max() > 1e-3
    # attention, without positions, has no order
    attention = shifted(vit.Block(10, "gelu")).double()
    torch.testing.assert_close(attention(x_BND[:, order]), attention(x_BND)[:, order])
    with torch.no_grad():
        block.places[2].weight.zero_()
    other = x_BND.clone()
    other[:, 4] += 1
    places = (block(other) != block(x_BND)).flatten(2).any(2)
    assert torch.equal(places, (torch.arange(6) == 4).expand(3, 6))
    with torch.no_grad():  # all places are alike then
        block.places[2].bias.zero_()
    torch.testing.assert_close(block(x_BND[:, order]), block(x_BND)[:, order])


def test_layers_over_places_are_the_same_for_each_channel(shifted: Any) -> None:
    """Without what mixes channels, the normalisation too, a channel is a function of itself, the same for all."""
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
def test_a_mixer_is_patches_through_its_blocks(shape: tuple[int, ...], shifted: Any) -> None:
    """Encoder and decoder of a map whole, by hand: widths that differ have a linear layer between them."""
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


def test_simmim_s_mixer_is_made_of_such_blocks_without_positions(shifted: Any) -> None:
    model, x = build("simmim_mixer", shifted, depth=3), data(4)
    masked_BN = vit.is_masked(torch.rand(4, patchify_of(model).n).argsort(1), model.masked)
    embed, blocks, _ = model.encoder.children()
    h = torch.where(masked_BN[..., None], model.mask_token, embed(x))
    *layers, last = blocks
    assert len(layers) == 3
    for layer in layers:
        h = mixed(layer, h)
    torch.testing.assert_close(model.tokens(x, masked_BN), last(h))


@pytest.mark.parametrize("sides", [(1,), (2, 3), (2, 3, 2)])
def test_a_code_s_grid_is_that_of_a_mixer_s_patches(sides: tuple[int, ...]) -> None:
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


def test_positions_are_the_sines_of_the_paper_and_tell_places_apart() -> None:
    table_ND = vit.sinusoids((4, 5), 16).double().numpy()
    omega = 1 / 10000 ** (np.arange(4) / 4)
    rows, columns = np.repeat(np.arange(4), 5), np.tile(np.arange(5), 4)
    angles = [np.outer(place, omega) for place in (rows, columns)]
    wanted = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    np.testing.assert_allclose(table_ND, wanted, atol=1e-6)
    assert vit.sinusoids((3, 3, 3), 5).shape == (27, 5)
    assert len(vit.sinusoids((3, 3, 3), 12).unique(dim=0)) == 27


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_convnext_block_is_its_formula(rank: int, shifted: Any) -> None:
    block = shifted(convnext.ConvNeXtBlock(rank, 4, "gelu"))
    x = torch.randn(2, 4, *([9] * rank))
    norm_, (first, _, last) = block.norm, block.pointwise
    h = block.depthwise(x)
    assert block.depthwise.weight.shape == (4, 1, *([7] * rank))
    mean, var = h.mean(1, keepdim=True), h.var(1, correction=0, keepdim=True)
    column = (4, *([1] * rank))
    h = (h - mean) / (var + 1e-6).sqrt() * norm_.weight.view(column) + norm_.bias.view(column)
    conv = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[rank]
    one = [1] * rank
    h = nn.functional.gelu(conv(h, first.weight.view(16, 4, *one), first.bias))
    torch.testing.assert_close(block(x), x + conv(h, last.weight.view(4, 16, *one), last.bias), rtol=1e-4, atol=1e-5)


# ---- the losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_visible_targets_do_not_enter_the_loss(name: str, shifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is changed where the model sees it, the input is not: only `nll` learns of x what it is asked for."""
    model, x = build(name, shifted), data(5)
    _, masked = masks(model, 5)
    before = loss(model, x)["nll"]
    nll, targets = Autoencoder.nll, []

    def tracked(self: Any, params: Tensor, target: Tensor) -> Tensor:
        targets.append(target.detach().clone().requires_grad_())
        return nll(self, params, targets[-1])

    monkeypatch.setattr(Autoencoder, "nll", tracked)
    (gradient,) = torch.autograd.grad(loss(model, x)["nll"], targets[0])
    patchify = patchify_of(model)
    if name == "masked_conv_ae":
        moved = gradient.view_as(x) != 0
    else:
        grid_BNP = gradient.view(5, patchify.n, patchify.size)
        assert not grid_BNP[:, patchify.real_NP == 0].any()
        moved = patchify.inverse(grid_BNP) != 0
    assert torch.equal(moved, masked)  # and every masked value counts
    assert before == loss(model, x)["nll"]


@pytest.mark.parametrize("name", ["mae", "mae_norm"])
def test_the_loss_of_an_mae_is_a_function_of_the_masked_targets_alone(name: str, shifted: Any) -> None:
    """All of it, the head of norm_pix too: the encoder is held at the old sample, the targets are a new one."""
    model, x, other = build(name, shifted), data(5), data(5)
    order_BN, masked = masks(model, 5)
    embed, blocks, _ = model.encoder.children()
    kept = len(order_BN[0]) - model.masked
    hidden_BND = model.decoder.hidden(blocks(vit.shuffle(embed(x), order_BN[:, :kept])), order_BN)

    def of(target: Tensor) -> Tensor:
        factor, masked_BN1 = len(order_BN[0]) / model.masked / 5, vit.is_masked(order_BN, model.masked)[..., None]
        total: Tensor = sum((masked_BN1 * term).sum() * factor for term in model.terms(target, hidden_BND))
        return total

    torch.testing.assert_close(of(x), loss(model, x)["loss"])
    torch.testing.assert_close(of(torch.where(masked, x, other)), of(x), rtol=1e-12, atol=0)
    assert (of(torch.where(masked, other, x)) - of(x)).abs() > 0.1


@pytest.mark.parametrize("name", ["mae", "simmim", "simmim_mixer", "masked_conv_ae"])
def test_predictions_do_not_depend_on_what_is_masked(name: str, shifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The derivative of each prediction by each masked value is 0; by visible ones it is not."""
    model, x = build(name, shifted), data(3).requires_grad_()
    _, masked = masks(model, 3)
    seen: list[Tensor] = []
    nll = Autoencoder.nll

    def tracked(self: Any, params: Tensor, target: Tensor) -> Tensor:
        seen.append(params)
        return nll(self, params, target)

    monkeypatch.setattr(Autoencoder, "nll", tracked)
    loss(model, x)
    (gradient,) = torch.autograd.grad((seen[0] * torch.randn_like(seen[0])).sum(), x)
    assert not gradient[masked].any()
    assert (gradient[~masked] != 0).double().mean() > 0.9


def test_the_leak_of_a_mixer_that_is_masked_late_would_be_seen(shifted: Any) -> None:
    """The mixer of autoencodersplz masks what has been mixed: a visible token then tells of every masked value."""
    model, x = build("simmim_mixer", shifted), data(3).requires_grad_()
    order_BN, masked = masks(model, 3)
    embed, blocks, _ = model.encoder.children()
    kept_BVD = vit.shuffle(blocks(embed(x)), order_BN[:, : len(order_BN[0]) - model.masked])
    (gradient,) = torch.autograd.grad((kept_BVD * torch.randn_like(kept_BVD)).sum(), x)
    assert (gradient[masked] != 0).all()


def test_the_encoder_of_an_mae_gets_visible_patches_alone(shifted: Any) -> None:
    model, x, sizes = build("mae", shifted), data(4).requires_grad_(), []
    blocks = model.encoder[1]
    blocks[0].register_forward_hook(lambda module, given, out: sizes.append((given[0].shape, out)))
    order_BN, masked = masks(model, 4)
    loss(model, x)
    (shape, out_BVD), n = sizes[0], len(order_BN[0])
    assert shape == (4, n - math.floor(0.75 * n), 12)
    (gradient,) = torch.autograd.grad((out_BVD * torch.randn_like(out_BVD)).sum(), x)
    assert torch.equal(gradient != 0, ~masked)
    # a token for each visible patch, in the order that was drawn
    with torch.no_grad():
        tokens_BND = model.encoder[0](x)
        picked = torch.stack([tokens_BND[b, order_BN[b, : n - model.masked]] for b in range(4)])
        torch.testing.assert_close(out_BVD, blocks[0](picked))


@pytest.mark.parametrize("name", ["simmim", "simmim_mixer"])
def test_mask_tokens_go_through_the_encoder_of_simmim_in_place_of_the_patches(name: str, shifted: Any) -> None:
    model, x, found = build(name, shifted), data(4), []
    order_BN, _ = masks(model, 4)
    model.encoder[1].register_forward_hook(lambda module, given, out: found.append(given[0]))
    loss(model, x)
    n = len(order_BN[0])
    assert model.masked == math.floor(0.6 * n)
    for b in range(4):
        for i in range(n):
            is_masked = i in order_BN[b, n - model.masked :]
            wanted = model.mask_token if is_masked else model.encoder[0](x)[b, i]
            torch.testing.assert_close(found[0][b, i], wanted)


@pytest.mark.parametrize("name", [*SMALL, "simmim_mixer"])
def test_the_loss_is_the_likelihood_of_the_masked_values_scaled_to_all(name: str, shifted: Any) -> None:
    """In nats by scipy's densities, N/|M| times the sum over masked values, the same in training and evaluation."""
    model, x = build(name, shifted), data(5)
    order_BN, masked = masks(model, 5)
    patchify = patchify_of(model)
    n, kept = patchify.n, patchify.n - model.masked
    with torch.no_grad():
        if name == "mae":
            embed, blocks, _ = model.encoder.children()
            visible_BVD = blocks(vit.shuffle(embed(x), order_BN[:, :kept]))
            x_hat = patchify.inverse(model.decoder.out(model.decoder.hidden(visible_BVD, order_BN)))
        elif name.startswith("simmim"):
            x_hat = patchify.inverse(model.head(model.tokens(x, vit.is_masked(order_BN, model.masked))))
        else:
            x_hat = model(torch.where(masked, model.token, x))
        density = laplace(scale=1.0) if name.startswith("simmim") else norm(scale=math.sqrt(0.5))
        nats = -density.logpdf((x - x_hat).numpy())
        wanted = (nats * masked.numpy()).sum() / 5 * n / model.masked
        for training in (True, False):
            assert loss(model.train(training), x)["nll"].item() == pytest.approx(wanted, rel=1e-6)


def test_over_all_masks_the_loss_is_a_sum_over_the_whole_sample(shifted: Any) -> None:
    """With a model that does not look at its input: whatever the ratio, the scale is that of any other model."""
    x = data(1)
    found = []
    for ratio in (0.25, 0.5, 0.75):
        model = build("masked_conv_ae", shifted, mask_ratio=ratio)
        with torch.no_grad():
            for p in model.encoder.parameters():
                p.zero_()
            torch.manual_seed(3)
            found.append(model.loss(x.expand(5000, *SHAPE))["loss"].item())
            whole = model.score(x).item()
    assert found == pytest.approx([whole] * 3, rel=0.02)


def test_normalised_targets_are_the_patch_less_its_mean_by_its_deviation(shifted: Any) -> None:
    model, x = build("mae_norm", shifted), data(5)
    order_BN, _ = masks(model, 5)
    embed, blocks, _ = model.encoder.children()
    decoder, n = model.decoder, len(order_BN[0])
    hidden_BND = decoder.hidden(blocks(vit.shuffle(embed(x), order_BN[:, : n - model.masked])), order_BN)
    out_BNP, scale_BN2, nll, scale = decoder.out(hidden_BND), decoder.scale(hidden_BND), 0.0, 0.0
    real_NP = decoder.patchify.real_NP.bool()
    for b in range(5):
        for i in order_BN[b, n - model.masked :]:
            values = decoder.patchify(x)[b, i][real_NP[i]].numpy()  # without what fills the patch up
            deviation = np.sqrt((values.var(ddof=1) if len(values) > 1 else 0.0) + 1e-6)
            e = (values - values.mean()) / deviation - out_BNP[b, i][real_NP[i]].detach().numpy()
            nll -= norm(scale=math.sqrt(0.5)).logpdf(e).sum()
            scale += ((np.array([values.mean(), deviation]) - scale_BN2[b, i].detach().numpy()) ** 2).sum()
    terms, factor = loss(model, x), n / model.masked / 5
    assert terms["nll"].item() == pytest.approx(nll * factor, rel=1e-6)
    assert terms["scale"].item() == pytest.approx(scale * factor, rel=1e-9)
    assert terms["loss"].item() == pytest.approx(terms["nll"].item() + terms["scale"].item())


def test_patches_are_normalised_as_in_the_official_code() -> None:
    """A patch that has one value of the sample's alone, at the far corner, is 0 after it."""
    patchify, x = vit.Patchify((1, 8, 8), 4), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    target = patchify(x)
    mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    found, moments = patchify.standardise(target)
    torch.testing.assert_close(found, (target - mean) / (var + 1.0e-6) ** 0.5)
    torch.testing.assert_close(moments, torch.cat([mean, (var + 1.0e-6) ** 0.5], dim=2))
    filled_up = vit.Patchify((1, 5, 5), 4)
    found, moments = filled_up.standardise(filled_up(x[:, :, :5, :5]))
    assert found.isfinite().all() and found[:, 3, 0].abs().max() < 1e-9
    torch.testing.assert_close(moments[:, 3, 0], x[:, 0, 4, 4])
    torch.testing.assert_close(moments[:, 3, 1], torch.full((3,), 1e-3, dtype=torch.float64))
    torch.testing.assert_close(moments[:, 1, 1], (x[:, 0, :4, 4].var(dim=1) + 1.0e-6) ** 0.5)


def test_the_head_of_norm_pix_and_the_readout_move_nothing_else(shifted: Any) -> None:
    for name, term, own in (
        ("mae_norm", "scale", "decoder.scale."),
        ("simmim", "readout", "decoder.1."),
        ("simmim_mixer", "readout", "decoder.1."),
    ):
        model, x = build(name, shifted), data(5)
        terms = loss(model, x)
        parameters = dict(model.named_parameters())
        found = torch.autograd.grad(terms[term], [*parameters.values()], retain_graph=True, allow_unused=True)
        assert {key for key, g in zip(parameters, found, strict=True) if g is not None} == {
            key for key in parameters if key.startswith(own)
        }
        others = torch.autograd.grad(terms["nll"], [*parameters.values()], allow_unused=True)
        assert {key for key, g in zip(parameters, others, strict=True) if g is None} == {
            key for key in parameters if key.startswith(own)
        }


def test_a_reconstruction_knows_nothing_that_the_code_does_not_tell(shifted: Any) -> None:
    """MAE-pytorch shows patches with the mean and deviation of the target: decode has the code alone."""
    model, x = build("mae_norm", shifted), data(4)
    z = model.encode(x)
    torch.testing.assert_close(model(x), model.decode(z))
    # and what it says of a patch comes from the tokens of the others, whatever the patch's own
    other = z.clone()
    other[:, :, 0, 0] += torch.randn(4, 12)
    reached = (model.decode(other) != model.decode(z)).flatten(1).any(1)
    assert reached.all()
    assert torch.equal(model.decode(other)[..., :2, :2], model.decode(z)[..., :2, :2])


def test_a_score_hides_each_patch_from_the_model_and_counts_it_once(shifted: Any) -> None:
    for name in ("mae", "simmim", "simmim_mixer"):
        model, x = build(name, shifted), data(3)
        patchify = patchify_of(model)
        orders_KN = vit.fixed_orders(patchify.n, model.masked)
        hidden_KN = vit.is_masked(orders_KN, model.masked)
        total = torch.zeros(3, patchify.n, dtype=torch.float64)
        for order_N, hidden_N in zip(orders_KN, hidden_KN, strict=True):
            if name == "mae":
                embed, blocks, _ = model.encoder.children()
                order_BN = order_N.expand(3, -1)
                seen = blocks(vit.shuffle(embed(x), order_BN[:, : patchify.n - model.masked]))
                x_hat, q = model.decoder.out(model.decoder.hidden(seen, order_BN)), D.Normal
                log_p = q(x_hat, math.sqrt(0.5)).log_prob(patchify(x))
            else:
                log_p = D.Laplace(model.head(model.tokens(x, hidden_N.expand(3, -1))), 1.0).log_prob(patchify(x))
            total -= (log_p * patchify.real_NP).sum(2) * hidden_N / hidden_KN.sum(0)
        torch.testing.assert_close(model.score(x), total.sum(1))


def test_a_mask_is_of_the_sample_not_of_the_batch(shifted: Any) -> None:
    """Each sample of a batch has a mask of its own, which another batch around it does not change."""
    for name in SMALL:
        model, x = build(name, shifted), data(6)
        with torch.no_grad():
            with SharedNoise(range(6), 6):
                whole = model.loss(x)["loss"]
            halves = []
            for rows in (range(3), range(3, 6)):
                with SharedNoise(rows, 6):
                    halves.append(model.loss(x[rows.start : rows.stop])["loss"])
        torch.testing.assert_close(sum(halves) / 2, whole)


# ---- what is learned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [True, False])
def test_the_token_of_the_convolutional_one_is_learned_or_zero(learned: bool) -> None:
    model: Any = aezoo.create_model("masked_conv_ae", SHAPE, **SMALL["masked_conv_ae"], learned_token=learned)
    assert not model.token.any() and model.token.shape == (2, 1, 1)
    model.loss(data(4).float())["loss"].backward()
    assert (model.token.grad is not None and bool((model.token.grad != 0).all())) is learned


def test_what_is_hidden_is_filled_in_from_what_is_seen(adam: Any) -> None:
    """Samples of one grey value each: a model that looks at the visible patches is right, the mean sample is not."""
    torch.manual_seed(0)
    model = aezoo.create_model("mae", (1, 4, 4), **SMALL["mae"])
    x = torch.rand(512, 1, 1, 1).expand(-1, 1, 4, 4)
    adam(model, x, steps=100, lr=5e-3, batch=64)
    with torch.no_grad():
        error = (model(x[:100]) - x[:100]).square().mean()
    assert error < 0.2 * x.var()


@pytest.mark.parametrize(
    ("name", "shape", "given", "words"),
    [
        ("mae", (30,), {}, "denoising_ae, or give it as a sequence, \\(1, 30\\)"),
        ("simmim", (1, 8, 8), {"patch_size": 8}, "masks none of 1 patches"),
        ("mae", (1, 8, 8), {"mask_ratio": 1.0}, "between 0 and 1"),
        ("masked_conv_ae", (1, 8, 8), {"mask_ratio": 0.01}, "smaller patch_size or a larger ratio"),
        ("mae", (1, 8, 8), {"norm_pix": True, "likelihood": "bernoulli"}, "norm_pix"),
        ("mae", (1, 8, 8), {"decoder_depth": 0}, "at least 1"),
        ("simmim", (1, 8, 8), {"depth": 0}, "at least 1"),
        ("simmim", (1, 8, 8), {"net": "conv"}, "net must be vit or mixer"),
        ("masked_conv_ae", (1, 8, 8), {"patch_size": -1}, "patch_size"),
    ],
)
def test_what_cannot_work_is_refused_with_a_cure(
    name: str, shape: tuple[int, ...], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(AezooError, match=words):
        aezoo.create_model(name, shape, **given)
