"""Laws of MAETok: masks, histograms of oriented gradients, and the gradients of both decoders."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from skimage.feature import hog as of_skimage
from torch import Tensor

import aezoo
from aezoo.errors import AezooError
from aezoo.models.masked import maetok
from aezoo.nets import vit
from aezoo.testing import SharedNoise

SHAPE = (2, 11, 12)  # 6 x 6 patches of 2 x 2, of which the last row is half padding


SMALL: dict[str, Any] = {"n_tokens": 3, "latent_dim": 5, "width": 12, "decoder_width": 8, "patch_size": 2}


P = 36


def build(shifted: Any, **extra: Any) -> Any:
    torch.manual_seed(0)
    return shifted(aezoo.create_model("maetok", input_shape=SHAPE, **SMALL | extra).double())


def data(n: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def loss(model: Any, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(7)
    found: dict[str, Tensor] = model.loss(x)
    return found


def masks(n: int, least: float = 0.4, most: float = 0.6, patches: int = P) -> Tensor:
    """The patches masked with seed 7, (n, P): for each sample a share, rounded up."""
    torch.manual_seed(7)
    order_BP = torch.rand(n, patches).argsort(1)
    share_B = least + (most - least) * torch.rand(n, 1)[:, 0]
    masked = torch.zeros(n, patches).bool()
    for b in range(n):
        count = min(math.ceil(share_B[b].item() * patches - 1e-4), patches - 1)
        masked[b] = order_BP[b] < count
    return masked


# ---- histograms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "side"), [(1, 4), (3, 4), (3, 8)])
def test_hog_features_match_scikit_image(channels: int, side: int) -> None:
    x, patchify = data(5, (channels, 16, 24)), vit.Patchify((channels, 16, 24), side)
    found = maetok.hog(x, vit.Patchify((9, 16, 24), side))
    for image, own in zip(x.numpy(), found, strict=True):
        given: dict[str, Any] = {"pixels_per_cell": (side, side), "cells_per_block": (1, 1), "block_norm": "L2"}
        wanted = of_skimage(image.transpose(1, 2, 0), 9, **given, feature_vector=False, channel_axis=-1)
        assert wanted.shape == (*patchify.grid, 1, 1, 9)
        # scikit-image averages in float32
        np.testing.assert_allclose(own.permute(1, 2, 0).numpy(), wanted[:, :, 0, 0], rtol=1e-4, atol=1e-5)


def test_hog_of_ramp_is_one_hot_and_of_flat_image_zero() -> None:
    patchify = vit.Patchify((9, 9, 9), 3)
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    for angle, place in ((10, 0), (50, 2), (90, 4), (170, 8), (190, 0)):
        a = math.radians(angle)
        found = maetok.hog((math.sin(a) * rows + math.cos(a) * columns)[None, None] / 9, patchify)
        assert found.shape == (1, 9, 3, 3)
        torch.testing.assert_close(found[0, :, 1, 1], torch.eye(9)[place])
    flat = maetok.hog(torch.full((2, 3, 9, 9), 0.7), patchify)
    assert not flat.any()
    for shape in ((1, 1, 5), (1, 2, 1), (2, 1, 1)):  # sides of one or two pixels have no gradient
        assert maetok.hog(torch.rand(2, *shape), vit.Patchify((9, *shape[1:]), 1)).isfinite().all()


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("least", "most"), [(0.4, 0.6), (0.6, 0.6), (0.0, 0.9), (0.0, 0.0)])
def test_the_share_of_masked_patches_is_drawn_for_each_sample(least: float, most: float, shifted: Any) -> None:
    model, x = build(shifted, least_masked=least, most_masked=most), data(300)
    torch.manual_seed(7)
    masked_BP = model.draw_mask(x)
    assert torch.equal(masked_BP, masks(300, least, most))
    counts = masked_BP.sum(1)
    assert math.ceil(least * P - 1e-4) <= counts.min() and counts.max() <= math.ceil(most * P)
    assert counts.double().mean().item() == pytest.approx((least + most) / 2 * P, abs=0.5 + (most - least) * P / 12)
    assert len(counts.unique()) > 5 if most - least > 0.1 else len(counts.unique()) == 1
    if most == 0.6:
        assert (masked_BP.double().mean(0) - counts.double().mean() / P).abs().max() < 5 * math.sqrt(0.25 / 300)
    assert not model.eval().draw_mask(x).any()


@pytest.mark.parametrize("side", [1, 2, 6])
def test_at_least_one_patch_stays_visible(side: int, shifted: Any) -> None:
    model = build(shifted, least_masked=0.999, most_masked=0.999, patch_size=side)
    assert (~model.draw_mask(data(50))).sum(1).tolist() == [1] * 50


def test_pixels_of_masked_patches_do_not_reach_the_code(shifted: Any) -> None:
    model, x, found = build(shifted).train(), data(5).requires_grad_(), []
    model.decoder.register_forward_pre_hook(lambda module, given: found.append(given[0]))
    loss(model, x)
    patchify = model.encoder.embed[0]
    masked = patchify.inverse(masks(5)[..., None].expand(-1, -1, patchify.size))
    (gradient,) = torch.autograd.grad((found[0] * torch.randn_like(found[0])).sum(), x)
    assert torch.equal(gradient != 0, ~masked)
    with torch.no_grad():
        loss(model, torch.where(masked, data(5), x))
        assert torch.equal(found[1], found[0])
        loss(model.eval(), x)  # evaluation does not mask
        assert torch.equal(found[2], model.encode(x))


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("training", "likelihood"), [(True, "gaussian"), (False, "bernoulli")])
def test_the_loss_is_of_all_pixels_and_of_masked_histograms(training: bool, likelihood: str, shifted: Any) -> None:
    model, x, codes = build(shifted, aux_weight=0.3, likelihood=likelihood).train(training), data(5), []
    model.decoder.register_forward_pre_hook(lambda module, given: codes.append(given[0]))
    terms = loss(model, x)
    params = model.decoder(codes[0])
    if likelihood == "gaussian":
        log_p = torch.distributions.Normal(params, math.sqrt(0.5)).log_prob(x)
    else:
        log_p = torch.distributions.Bernoulli(logits=params, validate_args=False).log_prob(x)
    torch.testing.assert_close(terms["nll"], -log_p.sum() / 5)
    wanted, masked_BP, patchify = 0.0, masks(5), vit.Patchify((9, *SHAPE[1:]), 2)
    error_BP = (model.aux(codes[0]) - maetok.hog(x, patchify)).square().sum(1).flatten(1)
    for b in range(5):
        wanted += (error_BP[b, masked_BP[b]] if training else error_BP[b]).mean().item() * P / 5
    assert terms["hog"].item() == pytest.approx(wanted, rel=1e-9)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.3 * terms["hog"])
    assert model.aux(codes[0]).shape == (5, 9, 6, 6)


def test_each_decoder_gets_gradient_of_its_own_term(shifted: Any) -> None:
    model = build(shifted).train()
    terms, parameters = loss(model, data(5)), dict(model.named_parameters())
    for term, other in (("nll", "aux."), ("hog", "decoder.")):
        found = torch.autograd.grad(terms[term], [*parameters.values()], retain_graph=True, allow_unused=True)
        assert {key for key, g in zip(parameters, found, strict=True) if g is None} == {
            key for key in parameters if key.startswith(other)
        }


def test_weight_0_has_no_second_decoder(shifted: Any) -> None:
    whole, plain = build(shifted), build(shifted, aux_weight=0.0)
    assert not [name for name, _ in plain.named_parameters() if name.startswith("aux")]
    plain.load_state_dict({key: value for key, value in whole.state_dict().items() if not key.startswith("aux")})
    x = data(5)
    terms, nll = loss(plain.train(), x), loss(whole.train(), x)["nll"]
    assert terms.keys() == {"loss", "nll"} and torch.equal(terms["loss"], nll)
    names = [name for name, _ in plain.named_parameters()]
    own = torch.autograd.grad(terms["loss"], [*plain.parameters()])
    torch.testing.assert_close(own, torch.autograd.grad(nll, [whole.get_parameter(name) for name in names]))


def test_without_masks_training_is_evaluation(shifted: Any) -> None:
    model, x = build(shifted, least_masked=0.0, most_masked=0.0), data(5)
    assert not model.mask_W.requires_grad
    torch.testing.assert_close(loss(model.train(), x), loss(model.eval(), x))


def test_masks_are_drawn_per_sample(shifted: Any) -> None:
    model, x = build(shifted).train(), data(6)
    with torch.no_grad():
        with SharedNoise(range(6), 6):
            whole = model.loss(x)["loss"]
        halves = []
        for rows in (range(3), range(3, 6)):
            with SharedNoise(rows, 6):
                halves.append(model.loss(x[rows.start : rows.stop])["loss"])
    torch.testing.assert_close(sum(halves) / 2, whole)


@pytest.mark.parametrize(
    ("shape", "given", "words"),
    [
        ((30,), {}, "takes images"),
        ((1, 30), {}, "takes images"),
        ((1, 4, 4, 4), {}, "takes images"),
        ((1, 8, 8), {"least_masked": 0.7}, "least_masked"),
        ((1, 8, 8), {"most_masked": 1.0}, "below 1|< 1"),
        ((1, 8, 8), {"aux_depth": 0}, "at least 1"),
        ((1, 8, 8), {"aux_weight": -1.0}, "at least 0"),
    ],
)
def test_invalid_values_are_refused_with_a_cure(shape: tuple[int, ...], given: dict[str, Any], words: str) -> None:
    with pytest.raises(AezooError, match=words):
        aezoo.create_model("maetok", shape, **given)
