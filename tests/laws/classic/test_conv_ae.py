"""Laws of the convolutional autoencoder: torch's convolutions, equivariance, receptive field."""

from typing import Any

import torch
import torch.nn.functional as F
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from torch import Tensor

import aezoo


def small(shifted: Any) -> Any:
    """Two stages of stride 2 and a code that is a map."""
    return shifted(
        aezoo.create_model("conv_ae", (2, 32, 32), latent_dim=3, latent_map=True, hidden_dims=(4, 6)).double()
    )


def images(n: int = 3) -> Tensor:
    return torch.rand(n, 2, 32, 32, dtype=torch.float64)


def test_encoder_and_decoder_match_torch_convolutions(shifted: Any) -> None:
    model, x = small(shifted), images()
    weights = [*model.encoder.parameters()]
    h = F.conv2d(x, *weights[:2], stride=2, padding=1).relu()
    h = F.conv2d(h, *weights[2:4], stride=2, padding=1).relu()
    z = F.conv2d(h, *weights[4:])
    torch.testing.assert_close(model.encode(x), z)
    weights = [*model.decoder.parameters()]
    h = F.conv2d(z, *weights[:2]).relu()
    h = F.conv_transpose2d(h, *weights[2:4], stride=2, padding=1, output_padding=1).relu()
    logits = F.conv_transpose2d(h, *weights[4:], stride=2, padding=1, output_padding=1)
    nll = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3)).mean()
    torch.testing.assert_close(model.loss(x)["loss"], nll)


def test_code_map_is_translation_equivariant(shifted: Any) -> None:
    model, x = small(shifted), images()
    z, moved = model.encode(x), model.encode(x.roll(4, 2))
    assert z.shape[2:] == (8, 8)
    torch.testing.assert_close(moved[:, :, 3:-2], z[:, :, 2:-3])
    assert (moved[:, :, 3:-2] - z[:, :, 3:-2]).abs().max() > 1e-3


def test_code_position_depends_on_its_receptive_field_only(shifted: Any) -> None:
    model, x = small(shifted), images(1).requires_grad_()
    (gradient,) = torch.autograd.grad(model.encode(x)[0, :, 4, 4].sum(), x)
    # two kernels of 3 with stride 2 cover 7 pixels, from 4 * 4 - 3
    inside = gradient[0, :, 13:20, 13:20]
    assert inside.abs().sum() > 0
    torch.testing.assert_close(inside.abs().sum(), gradient.abs().sum())
