"""Laws of Asymmetric autoencoder for inpainting (Zhu et al. 2023)."""

import math
from typing import Any

import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from latent_diffusion_laws import (  # noqa: F401
    SHAPE,
    by_hand,
    images,
    last_layer,
    losses,
    sets,
    small,
    test_missing_feature_file_is_named_before_training,
)
from torch import Tensor, nn

import aezoo
from aezoo.errors import AezooError
from aezoo.nets.blocks.adversarial import last_layer_vjp
from aezoo.nets.vit import Patchify

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

NETS = ("resnet", "conv", "convnext", "conv_keras", "unet", "dc")


def model_of(shifted: Any, **settings: Any) -> Any:
    given = {"decoder_dims": (10, 7), "beta": 0.3, "perceptual_weight": 0.7, **settings}
    return shifted(small("asymmetric_kl", **given))


def mask(n: int = 6, grid: tuple[int, ...] = SHAPE[1:], seed: int = 3) -> Tensor:
    return torch.rand(n, 1, *grid, generator=torch.Generator().manual_seed(seed)) < 0.6


def drawn(model: Any, x: Tensor) -> Tensor:
    """The mask of a training step, from the random numbers after those of the code."""
    full, share = (torch.rand(len(x), 1)[:, 0].tolist() for _ in range(2))
    of_patch = torch.rand(len(x), model.patchify.n).tolist()
    sides = Patchify((1, *x.shape[2:])).sides
    visible = torch.zeros(len(x), 1, *x.shape[2:], dtype=torch.bool)
    for i in range(len(x)):
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                patch = row // sides[0] * math.ceil(x.shape[3] / sides[1]) + column // sides[1]
                visible[i, 0, row, column] = full[i] >= model.full_mask and of_patch[i][patch] >= share[i]
    return visible


# ---- the decoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_full_mask_equals_autoencoder_kl(net: str, training: bool, shifted: Any) -> None:
    model, x = model_of(shifted, net=net, full_mask=1.0 if training else 0.0), images()
    other = small(net=net, beta=0.3, perceptual_weight=0.7)
    other.encoder, other.discriminator = model.encoder, model.discriminator
    other.likelihood.load_state_dict(model.likelihood.state_dict())
    other.decoder = nn.Sequential(*model.decoder.stages, model.decoder.last)
    found, gradients = [], []
    for each in (model.train(training), other.train(training)):
        torch.manual_seed(3)
        found.append(each.loss(x))
        parts = [*model.encoder.parameters(), *other.decoder.parameters(), *model.discriminator.parameters()]
        gradients.append(torch.autograd.grad(found[-1]["loss"], parts, retain_graph=True))
    assert found[0].keys() == found[1].keys()
    for term, value in found[1].items():
        torch.testing.assert_close(found[0][term], value, rtol=1e-9, atol=1e-12, msg=term)
    for mine, theirs in zip(*gradients, strict=True):
        assert theirs.any() or theirs.numel() == 1  # the last bias of the discriminator cancels in the hinge loss
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    of_sight = [*model.decoder.condition.parameters()]
    none = torch.autograd.grad(found[0]["loss"], of_sight, allow_unused=True)
    assert all(g is None or not g.any() for g in none)
    z = model.encode(x)
    torch.testing.assert_close(model.decode(z), other.decode(z))
    torch.testing.assert_close(model.score(x), other.score(x))
    torch.testing.assert_close(model.decoder(z, x, torch.zeros_like(mask())), other.decoder(z))


@pytest.mark.parametrize("shape", [SHAPE, (1, 8, 8), (3, 11), (1, 5, 4, 3)])
def test_condition_maps_are_computed_from_visible_values(shape: tuple[int, ...], shifted: Any) -> None:
    """A position of a smaller map reads the mask at the first of the positions that it covers."""
    model, x = model_of(shifted, input_shape=shape), images(4, shape=shape)
    z, visible = torch.randn(4, *model.code_shape, dtype=torch.float64), mask(4, shape[1:])
    seen = x.clone()
    for i, *place in (~visible[:, 0]).nonzero().tolist():
        seen[(i, slice(None), *place)] = 0
    maps, decoder = [seen], model.decoder
    for i, layer in enumerate(decoder.condition):
        conv = layer if i == 0 else layer[1]
        maps.append(conv(maps[-1] if i == 0 else nn.functional.silu(maps[-1])))
    h = z
    for stage, c in zip(decoder.stages, maps[:0:-1], strict=True):
        h = stage(h)
        assert h.shape == c.shape
        h = h.clone()
        for i, *place in torch.ones_like(h[:, 0]).nonzero().tolist():
            of_mask = [at * n // m for at, n, m in zip(place, shape[1:], h.shape[2:], strict=True)]
            if visible[(i, 0, *of_mask)]:
                h[(i, slice(None), *place)] = c[(i, slice(None), *place)]
    torch.testing.assert_close(model.decoder(z, x, visible), decoder.last(h))


def test_gradient_reaches_visible_values_only(shifted: Any) -> None:
    model, x, visible = model_of(shifted), images().requires_grad_(), mask()
    z = torch.randn(6, *model.code_shape, dtype=torch.float64).requires_grad_()
    of_x, of_z = torch.autograd.grad(model.decoder(z, x, visible).square().sum(), (x, z))
    assert not of_x[~visible.expand_as(x)].any() and (of_x[visible.expand_as(x)] != 0).all()
    assert of_z.any()
    # with all values visible, the image does not depend on the code
    (of_z,) = torch.autograd.grad(model.decoder(z, x, torch.ones_like(visible)).sum(), z, allow_unused=True)
    assert of_z is None or not of_z.any()


def test_decoder_is_larger_than_encoder() -> None:
    model: Any = aezoo.create_model("asymmetric_kl", (3, 32, 32), hidden_dims=(8, 16))
    assert model.decoder.stages[0].weight.shape[:2] == (24, 4) and model.decoder.last[1].weight.shape[:2] == (3, 12)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder.stages)]
    assert sizes[1] > 1.5 * sizes[0]
    own: Any = aezoo.create_model("asymmetric_kl", (3, 32, 32), hidden_dims=(8, 16), decoder_dims=(5, 9))
    seen = own.decoder.condition
    assert [conv.weight.shape[0] for conv in (seen[0], seen[1][1], seen[2][1])] == [9, 9, 5]


@pytest.mark.parametrize("net", NETS)
def test_last_layer_is_found_behind_condition_maps(net: str, shifted: Any) -> None:
    model, x = model_of(shifted, net=net), images(2)
    z = torch.randn(2, *model.code_shape, dtype=torch.float64)
    out, to_last = last_layer_vjp(model.decoder, z, x, mask(2))
    g = torch.randn_like(out)
    assert last_layer(model) is model.decoder.last[1].weight
    (expected,) = torch.autograd.grad(model.decoder(z, x, mask(2)), last_layer(model), g)
    torch.testing.assert_close(out, model.decoder(z, x, mask(2)))
    torch.testing.assert_close(to_last(g), expected)


# ---- training steps --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("full_mask", [0.0, 0.4])
def test_terms_and_gradients_match_visible_decoding(full_mask: float, shifted: Any) -> None:
    model, x = model_of(shifted, full_mask=full_mask), images()

    def in_sight(x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return x, z, x, drawn(model, x)

    for seed in range(3):
        torch.manual_seed(seed)
        found = model.loss(x)
        torch.manual_seed(seed)
        for name, value in by_hand(model, x, in_sight).items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)
        torch.manual_seed(seed)
        expected = losses(model, x, tau=in_sight)
        for player, part in sets(model).items():
            mine, theirs = (torch.autograd.grad(t, part, retain_graph=True) for t in (found["loss"], expected[player]))
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    torch.manual_seed(3)
    blind = model.eval().loss(x)
    torch.manual_seed(3)
    for name, value in by_hand(model, x).items():
        torch.testing.assert_close(blind[name], value, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("full_mask", [0.0, 0.3, 1.0])
def test_masking_hides_full_images_or_uniform_shares(full_mask: float) -> None:
    """The visible share s is uniform: mean 1/2, variance 1/12, plus the variance of 20 independently drawn patches."""
    model: Any = small("asymmetric_kl", full_mask=full_mask)
    visible = model.visible(torch.zeros(4000, *SHAPE))
    assert visible.shape == (4000, 1, *SHAPE[1:]) and visible.dtype == torch.bool
    patches = model.patchify(visible.double())
    of_patch = patches.amax(2)
    assert model.patchify.n == 20 and torch.equal(patches, of_patch[..., None] * model.patchify.real_NP)
    shares = of_patch.mean(1)
    hidden = shares == 0
    # with a uniform share, all 20 patches are hidden in one image of 21
    assert hidden.double().mean().item() == pytest.approx(full_mask + (1 - full_mask) / 21, abs=0.03)
    if full_mask < 1:
        torch.manual_seed(5)
        own = shares[torch.rand(4000) < 1]
        mean = own.mean().item() / (1 - full_mask)
        square = own.square().mean().item() / (1 - full_mask)
        assert mean == pytest.approx(1 / 2, abs=0.03)
        # E[s^2] + E[s (1 - s)] / 20
        assert square == pytest.approx(1 / 3 + (1 / 6) / 20, abs=0.03)


# ---- inpainting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["laplace:learned", "bernoulli"])
def test_inpainting_keeps_and_reads_visible_values_only(likelihood: str, shifted: Any) -> None:
    model, x, visible = model_of(shifted, likelihood=likelihood).eval(), images(), mask()
    found = model.inpaint(x, visible)
    assert torch.equal(found[visible.expand_as(x)], x[visible.expand_as(x)])
    assert (found - x)[~visible.expand_as(x)].abs().min() > 0
    torn = torch.where(visible, x, math.nan)
    assert torch.equal(model.inpaint(torn, visible), found)
    z = model.encode(torch.where(visible, x, 0))
    decoded = model.likelihood.mean(model.decoder(z, x, visible))
    torch.testing.assert_close(found, torch.where(visible, x, decoded))


def test_inpainting_uses_given_code(shifted: Any) -> None:
    model, x, visible = model_of(shifted).eval(), images(), mask()
    z = torch.randn(6, *model.code_shape, dtype=torch.float64)
    found = model.inpaint(x, visible, z)
    assert torch.equal(found[visible.expand_as(x)], x[visible.expand_as(x)])
    decoded = model.likelihood.mean(model.decoder(z, x, visible))
    assert torch.equal(found[~visible.expand_as(x)], decoded[~visible.expand_as(x)])
    nothing, everything = torch.zeros_like(visible), torch.ones_like(visible)
    torch.testing.assert_close(model.inpaint(x, nothing, z), model.decode(z), rtol=0, atol=0)
    torch.testing.assert_close(model.inpaint(x, nothing), model(torch.zeros_like(x)), rtol=0, atol=0)
    assert torch.equal(model.inpaint(x, everything, z), x)


@pytest.mark.parametrize("visible", [mask().double(), mask(5), mask().expand(-1, 2, -1, -1), mask()[:, 0], None])
def test_invalid_mask_is_refused(visible: Any) -> None:
    with pytest.raises(AezooError, match=r"^inpaint takes as visible a boolean tensor of shape \(6, 1, 9, 7\)"):
        small("asymmetric_kl").eval().inpaint(images(), visible)


def test_codes_of_wrong_shape_are_refused() -> None:
    with pytest.raises(AezooError, match=r"inpaint takes codes z of shape \(6, 3, 3, 2\), got \(6, 3, 3, 3\)"):
        small("asymmetric_kl").eval().inpaint(images(), mask(), torch.zeros(6, 3, 3, 3, dtype=torch.float64))


@pytest.mark.slow
def test_training_uses_visible_values(digits: Tensor) -> None:
    """After 150 steps: visible values have a lower error, and decoding without any is better than the mean image."""
    torch.manual_seed(0)
    x = digits[:1024].float()
    settings: dict[str, Any] = {"hidden_dims": (12,), "latent_dim": 1, "lr": 3e-3, "discriminator_weight": 0.0}
    model: Any = aezoo.create_model("asymmetric_kl", (1, 8, 8), features="none", **settings)
    optimizer: Any = model.configure_optimizers()
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(x[torch.randint(1024, (64,))])["loss"].backward()
        optimizer.step()
    model.eval()
    visible = torch.zeros(1024, 1, 8, 8, dtype=torch.bool)
    visible[..., :4] = True
    with torch.no_grad():
        z = model.encode(x)
        errors = [(model.likelihood.mean(y) - x).square() for y in (model.decoder(z, x, visible), model.decoder(z))]
    seen, blind = (error[visible].mean() for error in errors)
    assert seen < 0.5 * blind
    assert errors[1].mean() < 0.6 * (x - x.mean(0)).square().mean()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"input_shape": (30,)}, "convolutions take"),
        ({"net": "mlp"}, "feature map"),
        ({"net": "vit"}, "cannot decode stage by stage"),
        ({"net": "mixer"}, "cannot decode stage by stage"),
        ({"net": "gdn"}, "cannot decode stage by stage"),
        ({"full_mask": 1.1}, "full_mask must be from 0 to 1"),
        ({"decoder_dims": (8,)}, "decoder_dims must be as many widths"),
        ({"decoder_dims": (8, 0)}, "decoder_dims must be as many widths"),
    ],
)
def test_unsupported_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AezooError, match=words):
        small("asymmetric_kl", **settings)
