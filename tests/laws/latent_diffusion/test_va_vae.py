"""Laws of VA-VAE: alignment by explicit sums, its weight by autograd, and gradients of each network."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from latent_diffusion_laws import (
    SHAPE,
    by_hand,
    images,
    last_layer,
    losses,
    sets,
    small,
)
from torch import Tensor

import aezoo
from aezoo.errors import AezooError
from aezoo.nets.blocks.adversarial import adaptive_weight, input_gradient
from aezoo.nets.blocks.features import random_features

ALIGNED = {"alignment_weight": 0.7, "cosine_margin": 0.1, "matrix_margin": 0.05}


def aligned(**settings: Any) -> Any:
    return small("va_vae", **(ALIGNED | settings))


def features(x: Tensor, grid: Any) -> Tensor:
    return F.adaptive_avg_pool2d(random_features(SHAPE).double()(x)[-1], tuple(grid))


def alignment_loss(model: Any, z: Tensor, f: Tensor) -> Tensor:
    """The alignment loss A of the paper with a loop over pairs of positions, differentiable in z and W."""
    v = torch.einsum("fc,bchw->bfhw", model.projection.weight[:, :, 0, 0], z).flatten(2).transpose(1, 2)
    f = f.flatten(2).transpose(1, 2)
    cosine_margin, matrix_margin = model.margins
    near, apart = [], []
    for v_P, f_P in zip(v, f, strict=True):
        near += [
            torch.clamp(1 - cosine_margin - F.cosine_similarity(a, b, 0), min=0) for a, b in zip(v_P, f_P, strict=True)
        ]
        for i in range(len(v_P)):
            for j in range(len(v_P)):
                between = F.cosine_similarity(v_P[i], v_P[j], 0) - F.cosine_similarity(f_P[i], f_P[j], 0)
                apart.append(torch.clamp(between.abs() - matrix_margin, min=0))
    return torch.stack(near).mean() + torch.stack(apart).mean()


def whole(model: Any, x: Tensor, seed: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    """Terms, and the autoencoder's loss, with gradients at the encoder's last layer by autograd."""
    torch.manual_seed(seed)
    player = losses(model, x)["autoencoder"]
    torch.manual_seed(seed)
    terms = by_hand(model, x)
    rec = terms["nll"] + model.perceptual_weight * terms["perceptual"]
    torch.manual_seed(seed)
    mu, log_var = model.encoder(x).chunk(2, 1)
    z = mu + (0.5 * log_var).exp() * torch.randn(mu.shape, dtype=mu.dtype)
    A = alignment_loss(model, z, features(x, z.shape[2:]))
    W = [p for p in model.encoder.parameters() if p.ndim > 1][-1]
    norms = [torch.autograd.grad(term, W, retain_graph=True)[0].norm() for term in (rec, A)]
    terms |= {"alignment": A, "alignment_weight": (norms[0] / (norms[1] + 1e-4)).detach()}
    return terms, player + model.alignment_weight * terms["alignment_weight"] * A


@pytest.mark.slow
@pytest.mark.parametrize("net", ["resnet", "conv", "vit", "mixer"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_terms_match_explicit_sums_and_autograd(net: str, training: bool, shifted: Any) -> None:
    model, x = shifted(aligned(net=net, beta=0.3, perceptual_weight=0.7)).train(training), images()
    torch.manual_seed(3)
    found = model.loss(x)
    expected, _ = whole(model, x)
    assert found.keys() == {*expected, "elbo"}
    assert expected["alignment"] > 0.1 and 0 < expected["alignment_weight"] < 1e8
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_each_network_gets_gradient_of_its_own_loss(shifted: Any) -> None:
    model, x = shifted(aligned(beta=0.3, perceptual_weight=0.7)), images()
    torch.manual_seed(3)
    terms = model.loss(x)
    _, expected = whole(model, x)
    part = [*sets(model)["autoencoder"], *model.projection.parameters()]
    for mine, theirs in zip(
        *(torch.autograd.grad(v, part, retain_graph=True) for v in (terms["loss"], expected)), strict=True
    ):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    others = [*model.decoder.parameters(), *model.discriminator.parameters(), *model.likelihood.parameters()]
    assert all(g is None for g in torch.autograd.grad(terms["alignment"], others, allow_unused=True))
    assert not terms["alignment_weight"].requires_grad


def test_zero_weight_equals_autoencoder_kl(shifted: Any) -> None:
    model, x = shifted(aligned(alignment_weight=0.0)), images()
    plain = small()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "projection" not in key})
    found = []
    for each in (model, plain):
        torch.manual_seed(3)
        terms = each.loss(x)
        found.append((terms, torch.autograd.grad(terms["loss"], sets(each)["autoencoder"])))
    assert found[0][0].keys() == found[1][0].keys()
    for name, value in found[1][0].items():
        assert found[0][0][name].equal(value), name
    for mine, theirs in zip(found[0][1], found[1][1], strict=True):
        assert mine.equal(theirs)


def test_codes_parallel_to_features_have_zero_misalignment() -> None:
    model, x = aligned(latent_dim=5, cosine_margin=0.0, matrix_margin=0.0), images()
    with torch.no_grad():
        model.projection.weight.copy_(torch.eye(64, 5, dtype=torch.float64)[:, :, None, None])
    z = torch.randn(6, 5, 3, 2, dtype=torch.float64)
    f = F.pad(z, (0, 0, 0, 0, 0, 59))
    length = 0.1 + 5 * torch.rand(6, 1, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(
        model.alignment_loss(length * z, f), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert model.alignment_loss(z.roll(1, 0), f) > 0.5
    # a rotation of all positions changes only the cosine similarities of z and f
    turned = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    rest = model.alignment_loss(torch.einsum("dc,bchw->bdhw", turned, z), f)
    cosines = F.cosine_similarity(torch.einsum("dc,bchw->bdhw", turned, z), z)
    torch.testing.assert_close(rest, (1 - cosines).mean())
    assert model.features_on_grid(x, torch.Size((3, 2))).equal(features(x, (3, 2)))


def test_margins_ignore_small_misalignment() -> None:
    model = aligned(cosine_margin=2.0, matrix_margin=2.0)
    z = torch.randn(6, *model.code_shape, dtype=torch.float64)
    f = torch.randn(6, 64, *model.code_shape[1:], dtype=torch.float64)
    assert model.alignment_loss(z, f) == 0
    values = []
    for margin in (0.0, 0.3):
        model.margins = (margin, 2.0)
        values.append(model.alignment_loss(z, f).item())
    assert values[1] < values[0] < values[1] + 0.3 + 1e-9


def test_alignment_gradient_is_balanced_at_last_layer(shifted: Any) -> None:
    model, x = shifted(aligned(beta=0.0, discriminator_weight=0.0, features="none", alignment_weight=0.5)), images()
    W = [p for p in model.encoder.parameters() if p.ndim > 1][-1]
    torch.manual_seed(3)
    terms = model.loss(x)
    total, rec = (torch.autograd.grad(terms[name], W, retain_graph=True)[0] for name in ("loss", "nll"))
    torch.testing.assert_close((total - rec).norm(), 0.5 * rec.norm(), rtol=1e-3, atol=0)


def test_feature_network_stays_out_of_state_dict() -> None:
    model = aligned()
    assert not any("foundation" in name for name, _ in [*model.named_parameters(), *model.named_buffers()])
    assert {name for name in model.state_dict() if "projection" in name} == {"projection.weight"}
    assert model.projection.weight.shape == (64, 3, 1, 1)


def test_input_gradient_matches_autograd(shifted: Any) -> None:
    model = shifted(aligned())
    z = torch.randn(2, *model.code_shape, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(input_gradient(model.decoder, z, g), torch.autograd.grad(model.decoder(z), z, g)[0])
    assert adaptive_weight(torch.ones(4), torch.zeros(4), max_weight=1e3) == 1e3
    assert last_layer(model).grad is None


def test_invalid_values_are_refused() -> None:
    for name in ("alignment_weight", "cosine_margin", "matrix_margin"):
        with pytest.raises(AezooError, match=name):
            aligned(**{name: -0.1})
    with pytest.raises(AezooError, match="foundation must be a network: without one use autoencoder_kl"):
        aligned(foundation="none")
    with pytest.raises(AezooError, match="foundation takes"):
        aezoo.create_model("va_vae", SHAPE, foundation="dino")
