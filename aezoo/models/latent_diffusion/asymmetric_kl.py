"""Asymmetric autoencoder for inpainting (Zhu et al. 2023), https://arxiv.org/abs/2306.04632

An AutoencoderKL with a larger decoder, whose inputs are the code and the visible part v of an image:

    L = R(x, g(z, v x, v)) + beta KL(q(z|x) || p(z)) + w_D lambda L_G     z ~ q(z|x)
    h_i = c_i where v is 1, stage_i(h_i-1) elsewhere     c_i = conv(act(c_i+1)) the map of v x on the grid of h_i

R, L_G, L_D and lambda are as in autoencoder_kl. So are codes, scores, samples, bounds and evaluation, for which nothing
is visible. In training, a share full_mask of the images is hidden completely, and in the others each patch is hidden
with a probability drawn per image; elbo bounds log p(x | v x). In https://github.com/buxiangzhiren/Asymmetric_VQGAN
masks are strokes.

Shapes: B batch, C channels, N patches.
"""

from itertools import pairwise
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo import nets
from aezoo.deprecated import renamed
from aezoo.errors import AezooError
from aezoo.models.latent_diffusion.autoencoder_kl import AutoencoderKL, AutoencoderKLArgs
from aezoo.nets import vit
from aezoo.nets.conv import CONVS, grids


class ConditionalDecoder(nn.Module):
    """Decodes (B, *code_shape) -> (B, C, *grid); optional inputs: samples and their visibility mask (B, 1, *grid)."""

    def __init__(
        self, net: str, code_shape: tuple[int, ...], input_shape: tuple[int, ...], dims: tuple[int, ...], act: str
    ) -> None:
        super().__init__()
        channels, conv = input_shape[0], CONVS[len(input_shape) - 1]
        widths = (*(dims[-1:] or (channels,)), *dims[::-1])  # from the data to the code
        maps = [(width, *grid) for width, grid in zip(widths, grids(input_shape, len(dims)), strict=True)]
        down = (nn.Sequential(nets.activation(act), conv(a, b, 3, stride=2, padding=1)) for a, b in pairwise(widths))
        self.condition = nn.ModuleList([conv(channels, widths[0], 3, padding=1), *down])
        stages = (nets.decoder(net, a, b, a[:1], act) for a, b in pairwise(maps[::-1]))
        self.stages = nn.ModuleList([conv(code_shape[0], widths[-1], 3, padding=1), *stages])
        self.last = nn.Sequential(nets.activation(act), conv(widths[0], channels, 3, padding=1))

    def forward(self, z: Tensor, *seen: Tensor) -> Tensor:
        maps = [seen[0].where(seen[1], 0)] if seen else []
        for layer in self.condition if seen else ():
            maps.append(layer(maps[-1]))
        for i, stage in enumerate(self.stages, start=1):
            z = stage(z)
            z = maps[-i].where(F.interpolate(seen[1].to(z.dtype), z.shape[2:]) > 0, z) if seen else z
        z = self.last(z)
        return z


class AsymmetricKL(AutoencoderKL, tags=("latent diffusion", "imputation")):
    """Learns a Gaussian feature map, with a large decoder that uses the visible part of an image.

    Args:
        decoder_dims: channels of the decoder's stages, from the code to the output. Empty: 3/2 of hidden_dims,
            mirrored.
        full_mask: share of training images that are hidden completely.
        discriminator_start: optimiser steps before the adversarial loss is used.
        net: resnet, conv, convnext, conv_keras, unet or dc; also for each stage of the decoder.
        **kwargs: see `AutoencoderKL`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        decoder_dims: tuple[int, ...] = (),
        full_mask: float = 0.5,
        **kwargs: Unpack[AutoencoderKLArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        # a single stage of these networks is linear or needs layers around it
        if self.net in ("gdn", "ldm", "vit", "mixer") or nets.is_timm(self.net):
            raise AezooError(f"net {self.net!r} cannot decode stage by stage: use resnet, conv, convnext, unet or dc")
        if not 0 <= full_mask <= 1:
            raise AezooError(f"full_mask must be from 0 to 1, got {full_mask}")
        if decoder_dims and (len(decoder_dims) != len(self.hidden_dims) or min(decoder_dims) < 1):
            raise AezooError(
                f"decoder_dims must be as many widths as hidden_dims {self.hidden_dims}, got {decoder_dims}"
            )
        self.full_mask = full_mask
        self.patchify = vit.Patchify((1, *self.input_shape[1:]))
        dims = tuple(decoder_dims) or tuple(3 * width // 2 for width in self.hidden_dims[::-1])
        self.decoder = ConditionalDecoder(self.net, self.code_shape, self.input_shape, dims, self.activation)

    def decoder_inputs(self, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return (x, z, x, self.visible(x)) if self.training else (x, z)

    def visible(self, x: Tensor) -> Tensor:
        """Draw the positions that are visible to the decoder in a step, (B, *input_shape) -> (B, 1, *grid), boolean."""
        full_B1, share_B1, of_patch_BN = (torch.rand(len(x), n, device=x.device) for n in (1, 1, self.patchify.n))
        seen_BN = of_patch_BN >= share_B1.where(full_B1 >= self.full_mask, 1)
        return self.patchify.inverse(seen_BN[..., None].expand(-1, -1, self.patchify.size))

    def inpaint(self, x: Tensor, visible: Tensor, z: Tensor | None = None) -> Tensor:
        """Decode the hidden part of samples and keep the rest, (B, *input_shape) -> (B, *input_shape).

        Args:
            x: samples; their values at hidden positions are ignored.
            visible: (B, 1, *grid), boolean.
            z: codes of whole samples, e.g. from a diffusion model; by default those of x with 0 at hidden positions.

        Raises:
            AezooError: the mask or the codes have another type or shape.
        """
        mask = (len(x), 1, *self.input_shape[1:])
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool or visible.shape != mask:
            raise AezooError(f"inpaint takes as visible a boolean tensor of shape {mask}, true for what is to stay")
        x = x.where(visible, 0)
        z = self.encode(x) if z is None else z
        if z.shape != (len(x), *self.code_shape):
            raise AezooError(f"inpaint takes codes z of shape {(len(x), *self.code_shape)}, got {tuple(z.shape)}")
        return x.where(visible, self.likelihood.mean(self.decoder(z, x, visible)))


__getattr__ = renamed(__name__)
