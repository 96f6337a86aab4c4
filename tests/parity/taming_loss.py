"""The loss of taming-transformers with our feature distance."""

from typing import Any
from unittest import mock

from taming.modules.losses import vqperceptual
from torch import Tensor, nn


class Distance(nn.Module):
    """Our feature distance in place of LPIPS, whose weights need a download."""

    def __init__(self, distance: Any) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        return self.distance(x_hat, x)[:, None, None, None]


def their_loss(distance: Any, discriminator: nn.Module, **settings: Any) -> Any:
    """`VQLPIPSWithDiscriminator` with our feature distance and discriminator."""
    with mock.patch.object(vqperceptual, "LPIPS", return_value=Distance(distance)):
        loss = vqperceptual.VQLPIPSWithDiscriminator(disc_weight=0.6, perceptual_weight=0.7, **settings).train()
    loss.discriminator = discriminator
    return loss
