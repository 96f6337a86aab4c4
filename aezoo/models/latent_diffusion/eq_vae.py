"""EQ-VAE, equivariant codes (Kouzelis et al. 2025), https://arxiv.org/abs/2502.09509

Rotating or shrinking an image should transform its code map in the same way; a diffusion model learns such codes more
easily. In a share p of the training steps, in nats per sample:

    L = R(tau x, D(tau z)) + beta KL(q(z|x) || p(z)) + w_D lambda L_G     z ~ q(z|x)
    tau: a rotation by 90, 180 or 270 degrees, then bilinear scaling by a factor between 1/4 and 1

and the discriminator classifies tau x and D(tau z). R, L_G, L_D and lambda are as in autoencoder_kl. In all other
steps, for p = 0 and in evaluation, the model is autoencoder_kl. tau is the same for all samples of a batch, as in
https://github.com/zelaki/eqvae, where a quarter of the other steps also reconstructs shrunken images. The code's sides
are rounded to whole positions, and the image has the size of the decoder's output; the loss of such a step is a sum
over the values of tau x.

Shapes: B batch, C channels.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.models.latent_diffusion.autoencoder_kl import AutoencoderKL, AutoencoderKLArgs
from aezoo.nets import is_timm
from aezoo.nets.conv import grids


class EQVAE(AutoencoderKL, steps_differ=True, tags=("latent diffusion",)):
    """Learns a Gaussian feature map that is equivariant to rotations and scaling of the image.

    Args:
        input_shape: (C, H, W), of any size.
        equivariance: p, share of steps that compare a rotated, shrunken image with the decoding of its code under tau.
        discriminator_start: optimiser steps before the adversarial loss is used.
        net: resnet, conv, convnext, conv_keras, gdn or dc.
        **kwargs: see `AutoencoderKL`.
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, equivariance: float = 0.5, **kwargs: Unpack[AutoencoderKLArgs]
    ) -> None:
        if len(input_shape) != 3:
            raise AezooError(f"eq_vae turns images (C, H, W), got {tuple(input_shape)}: use autoencoder_kl")
        if not 0 <= equivariance <= 1:
            raise AezooError(f"equivariance must be from 0 to 1, got {equivariance}")
        super().__init__(input_shape, **kwargs)
        if self.net in ("unet", "vit", "mixer") or is_timm(self.net):
            raise AezooError(f"net {self.net!r} only decodes maps of one size: use resnet, conv, convnext, gdn or dc")
        self.equivariance = equivariance
        self.larger_grids = grids(self.input_shape, len(self.hidden_dims))[-2::-1]

    # a compiled graph has one size only
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return super().loss(x, y)

    def decoder_inputs(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        if not (self.training and self.equivariance):
            return x, z
        # one draw of each for all samples
        share, turn, factor = (float(torch.rand(())) for _ in range(3))
        return self.transformed(x, z, 1 + int(3 * turn), (1 + 3 * factor) / 4) if share < self.equivariance else (x, z)

    def transformed(self, x: Tensor, z: Tensor, quarters: int, factor: float) -> tuple[Tensor, Tensor]:
        """Apply tau to images and codes, (B, C, H, W), (B, C, h, w) -> the same with other sides."""
        x, z = (part.rot90(quarters, (2, 3)) for part in (x, z))
        small = [max(1, round(factor * side)) for side in z.shape[2:]]
        return F.interpolate(x, self.decoded(small), mode="bilinear"), F.interpolate(z, small, mode="bilinear")

    def decoded(self, grid: list[int]) -> list[int]:
        """Return the decoder's output grid for a code grid; stages double sides, minus one if the full side is odd."""
        for larger in self.larger_grids:
            grid = [2 * side - full % 2 for side, full in zip(grid, larger, strict=True)]
        return grid
