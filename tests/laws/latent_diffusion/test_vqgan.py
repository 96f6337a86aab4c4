"""Laws of VQGAN, VQ-VAE with perceptual and adversarial losses (Esser et al. 2020)."""

from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from latent_diffusion_laws import (  # noqa: F401
    NETS,
    SHAPE,
    X,
    images,
    last_layer,
    test_missing_feature_file_is_named_before_training,
)
from quantised_laws import (  # noqa: F401
    test_inference_calls_do_not_update_codebook,
)
from torch import Tensor, nn
from two_ranks import on_two_ranks

import aezoo
from aezoo.errors import AezooError
from aezoo.nets.blocks.features import random_features

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- VQGAN -----------------------------------------------------------------------------------------------------------


def small_vqgan(**settings: Any) -> Any:
    settings = {"latent_dim": 3, "codebook_size": 9, "dead_below": 0.0, "data_init": False, **settings}
    settings = {"input_shape": SHAPE, "hidden_dims": (8, 6), "discriminator_dims": (8, 8), **settings}
    return aezoo.create_model("vqgan", **settings).double()


def vqgan_by_hand(model: Any, x: Tensor) -> dict[str, Tensor]:
    """All terms and the losses of both players, differentiable."""
    z, codes = model.encoder(x), model.quantiser.code_KD
    rows = z.movedim(1, -1).flatten(0, -2)
    chosen = codes[(rows[:, None] - codes).square().sum(2).argmin(1)]
    z_q = chosen.unflatten(0, (len(x), *z.shape[2:])).movedim(-1, 1)
    x_hat = model.decoder(z + (z_q - z).detach())
    net = random_features(SHAPE).double()
    pairs = zip(net(x_hat), net(x), strict=True)
    perceptual = X * torch.stack([0.5 * nn.functional.mse_loss(a, b) for a, b in pairs]).sum()
    nll = -D.Laplace(x_hat, torch.ones_like(x_hat)).log_prob(x).sum((1, 2, 3)).mean()
    gan = -model.discriminator(x_hat).mean()
    rec = nll + model.perceptual_weight * perceptual
    at_w = [torch.autograd.grad(term, last_layer(model), retain_graph=True)[0].norm() for term in (rec, gan)]
    real, fake = model.discriminator(x), model.discriminator(x_hat.detach())
    terms = {
        "nll": nll,
        "perceptual": perceptual,
        "commitment": (z - z_q.detach()).square().sum((1, 2, 3)).mean(),
        "codebook": (z.detach() - z_q).square().sum((1, 2, 3)).mean(),
        "adversarial": gan,
        "adaptive_weight": (at_w[0] / (at_w[1] + 1e-4)).detach(),
        "discriminator": (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean()) / 2,
    }
    terms["loss"] = rec + terms["codebook"] + model.beta * terms["commitment"]
    return terms


@pytest.mark.parametrize("net", NETS)
def test_vqgan_terms_and_gradients_match_autograd(net: str, shifted: Any) -> None:
    model, x = shifted(small_vqgan(net=net, perceptual_weight=0.7, beta=0.6)), images()
    found, expected = model.loss(x), vqgan_by_hand(model, x)
    assert found.keys() == expected.keys() and 0 < expected["adaptive_weight"] < 1e4
    for name, value in expected.items():
        assert value != 0
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)
    game = model.discriminator_weight * expected["adaptive_weight"] * expected["adversarial"]
    judge = [*model.discriminator.parameters()]
    others = [p for p in model.parameters() if all(p is not q for q in judge)]
    for part, loss in ((others, expected["loss"] + game), (judge, expected["discriminator"])):
        mine = torch.autograd.grad(found["loss"], part, retain_graph=True)
        theirs = torch.autograd.grad(loss, part, retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert any(p is model.quantiser.code_KD for p in others)


@pytest.mark.parametrize(("scale", "perceptual_weight"), [(1e-3, 1.0), (0.0, 100.0)])
def test_vqgan_lambda_is_capped_relative_to_mean_loss(scale: float, perceptual_weight: float, shifted: Any) -> None:
    """The authors cap lambda at 1e4 for a mean over the X values, that is, at 1e4 X for a sum."""
    model, x = shifted(small_vqgan(perceptual_weight=perceptual_weight)), images()
    with torch.no_grad():
        model.discriminator[-1].weight *= scale
    x_hat = model.decoder(model.quantise(x).z_q)
    mean = (model.nll(x_hat, x).mean() + perceptual_weight * X * model.distance(x_hat, x).mean()) / X
    players = mean, -model.discriminator(x_hat).mean()
    of_R, of_G = (torch.autograd.grad(p, last_layer(model), retain_graph=True)[0].norm() for p in players)
    uncapped = (of_R / (of_G + 1e-4)).item()
    assert (uncapped > 1e4) == (scale == 0) and X * uncapped > 2e4
    assert model.loss(x)["adaptive_weight"].item() == pytest.approx(X * min(uncapped, 1e4))


def test_vqgan_without_discriminator_and_features_is_vq_vae(shifted: Any) -> None:
    model, x = shifted(small_vqgan(features="none", discriminator_weight=0.0)), images()
    settings: dict[str, Any] = {"latent_dim": 3, "codebook_size": 9, "dead_below": 0.0, "data_init": False}
    settings |= {"hidden_dims": (8, 6), "activation": "silu", "update": "gradient", "likelihood": "laplace"}
    other: Any = aezoo.create_model("vq_vae", SHAPE, **settings).double()
    other.load_state_dict({name: model.state_dict()[name] for name in other.state_dict()})
    mine, theirs = model.loss(x), other.loss(x)
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-12, atol=1e-12)
    mine["loss"].backward()
    theirs["loss"].backward()
    own = dict(model.named_parameters())
    for name, p in other.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(own[name].grad, p.grad, rtol=1e-9, atol=1e-12)
    assert torch.equal(model.encode_indices(x), other.encode_indices(x))


def test_vqgan_discriminator_is_inactive_before_start(shifted: Any) -> None:
    model, x = shifted(small_vqgan(discriminator_start=3)), images()
    for steps, moved in ((2, False), (3, True)):
        model.steps.fill_(steps)
        model.zero_grad()
        model.loss(x)["loss"].backward()
        assert any(bool(p.grad.any()) for p in model.discriminator.parameters()) == moved
        plain = torch.autograd.grad(vqgan_by_hand(model, x)["loss"], [*model.decoder.parameters()])
        found = [p.grad for p in model.decoder.parameters()]
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(found, plain, strict=True)) != moved


def test_vqgan_two_ranks_equal_one_process(shifted: Any) -> None:
    model, x = shifted(small_vqgan()), images()
    whole, together = model.loss(x), on_two_ranks(model, x)
    for term, value in whole.items():
        torch.testing.assert_close(together.terms[term], value, msg=term)
    expected = torch.autograd.grad(whole["loss"], [*model.parameters()])
    for found, g in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(found, g)
    alone = on_two_ranks(model, x, exchange=False).terms
    assert (alone["adaptive_weight"] - whole["adaptive_weight"]).abs() > 1e-3


def test_vqgan_codebook_is_in_autoencoder_parameter_group() -> None:
    model = small_vqgan(discriminator_lr=3e-3, lr=2e-3)
    first, second = model.configure_optimizers().param_groups
    assert {id(p) for p in second["params"]} == {id(p) for p in model.discriminator.parameters()}
    assert any(p is model.quantiser.code_KD for p in first["params"])
    assert (first["lr"], first["betas"], second["lr"], second["betas"]) == (2e-3, (0.5, 0.9), 3e-3, (0.5, 0.9))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"input_shape": (30,)}, "convolutions take"),
        ({"net": "mlp"}, "feature map"),
        ({"features": "vgg"}, "features takes none, random"),
        ({"codebook_size": 0}, "codebook_size must be at least 1"),
        ({"discriminator_start": -1}, "discriminator_start must be at least 0"),
    ],
)
def test_unsupported_vqgan_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AezooError, match=words):
        small_vqgan(**settings)
