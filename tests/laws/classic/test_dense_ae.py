"""Laws of the dense autoencoder: the network as matrix products, code activation, initial weights, linear limit."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from torch import Tensor, nn

import aezoo


def written_out(net: nn.Module, h: Tensor) -> Tensor:
    """Affine maps with tanh between them, by matrix products."""
    layers = [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert all(a.out_features == b.in_features for a, b in pairwise(layers))
    for i, layer in enumerate(layers):
        h = (h.tanh() if i else h) @ layer.weight.T + layer.bias
    return h


def test_loss_is_likelihood_of_written_out_network(shifted: Any) -> None:
    model = shifted(
        aezoo.create_model("dense_ae", (2, 3), latent_dim=3, hidden_dims=(5, 4), activation="tanh").double()
    )
    x = torch.rand(7, 2, 3, dtype=torch.float64)
    z = written_out(model.encoder, x.flatten(1))
    logits = written_out(model.decoder, z).unflatten(1, (2, 3))
    torch.testing.assert_close(model.encode(x), z)
    torch.testing.assert_close(model(x), logits.sigmoid())
    nll = -torch.distributions.Bernoulli(logits=logits, validate_args=False).log_prob(x).sum((1, 2))
    torch.testing.assert_close(model.loss(x)["loss"], nll.mean())
    torch.testing.assert_close(model.score(x), nll)


def test_code_activation_is_applied_to_the_code(shifted: Any) -> None:
    model = shifted(aezoo.create_model("dense_ae", (6,), latent_dim=3, activation="tanh", code_activation="relu"))
    x = torch.rand(9, 6)
    z = written_out(model.encoder[0], x)
    assert (z < 0).any() and (z > 0).any()
    torch.testing.assert_close(model.encode(x), z.clamp(min=0))


def test_glorot_weights_are_those_of_keras() -> None:
    model: Any = aezoo.create_model("dense_ae", (200,), latent_dim=30, hidden_dims=(100,), weight_init="glorot")
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for layer in layers:
        limit = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.99 * limit < layer.weight.abs().max() <= limit
        assert not layer.bias.any()
    with pytest.raises(aezoo.AezooError, match="unknown weight_init 'kaiming': choose from default, glorot"):
        aezoo.create_model("dense_ae", (6,), weight_init="kaiming")


def test_no_hidden_layers_equal_linear_ae(shifted: Any) -> None:
    linear = shifted(aezoo.create_model("linear_ae", (3, 5), latent_dim=2).double())
    dense = aezoo.create_model("dense_ae", (3, 5), latent_dim=2, hidden_dims=(), likelihood="gaussian").double()
    for mine, theirs in zip(dense.parameters(), linear.parameters(), strict=True):
        mine.data.copy_(theirs)
    x = torch.rand(7, 3, 5, dtype=torch.float64)
    found, expected = dense.loss(x)["loss"], linear.loss(x)["loss"]
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(loss, [*m.parameters()]) for loss, m in ((found, dense), (expected, linear)))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
