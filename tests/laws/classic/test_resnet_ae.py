"""Laws of the residual autoencoder: the formula of its blocks, the limit of zero residuals, the likelihood."""

from typing import Any

import torch
import torch.nn.functional as F
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from torch import Tensor, nn

import aezoo
from aezoo.nets.resnet import ResidualBlock


def small(shifted: Any) -> Any:
    """Two stages of stride 2 and a code that is a map."""
    return shifted(
        aezoo.create_model(
            "resnet_ae", (2, 16, 16), latent_dim=3, latent_map=True, hidden_dims=(4, 8), activation="relu"
        ).double()
    )


def images(n: int = 3) -> Tensor:
    return torch.rand(n, 2, 16, 16, dtype=torch.float64)


def blocks(net: nn.Module) -> list[ResidualBlock]:
    return [m for m in net.modules() if isinstance(m, ResidualBlock)]


def test_residual_block_matches_its_formula(shifted: Any) -> None:
    for block in blocks(small(shifted)):
        norm, _, first, last_norm, _, second = block.body
        h = torch.randn(2, first.in_channels, 5, 6, dtype=torch.float64)
        inner = F.group_norm(h, norm.num_groups, norm.weight, norm.bias).relu()
        inner = F.conv2d(inner, first.weight, first.bias, padding=1)
        inner = F.group_norm(inner, last_norm.num_groups, last_norm.weight, last_norm.bias).relu()
        torch.testing.assert_close(block(h), h + F.conv2d(inner, second.weight, second.bias, padding=1))


def test_zero_residuals_leave_strided_convolutions(shifted: Any) -> None:
    model, x = small(shifted), images()
    before = model.encode(x)
    with torch.no_grad():
        for block in blocks(model):
            block.body[-1].weight.zero_()
            block.body[-1].bias.zero_()
    first, _, second, _, _, head = model.encoder
    h = F.conv2d(x, first.weight, first.bias, stride=2, padding=1)
    h = F.conv2d(h, second.weight, second.bias, stride=2, padding=1).relu()
    torch.testing.assert_close(model.encode(x), F.conv2d(h, head.weight, head.bias))
    assert (before - model.encode(x)).abs().max() > 1e-3


def test_loss_is_bernoulli_likelihood_of_decoded_logits(shifted: Any) -> None:
    model, x = small(shifted), images()
    logits = model.decoder(model.encoder(x))
    nll = -torch.distributions.Bernoulli(logits=logits, validate_args=False).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(model.loss(x)["loss"], nll.mean())
    torch.testing.assert_close(model.score(x), nll)
    torch.testing.assert_close(model(x), logits.sigmoid())
