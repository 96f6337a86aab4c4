"""RAE, representation autoencoder (Zheng et al. 2025), https://arxiv.org/abs/2510.11690

An encoder f that was trained for another purpose stays frozen. A vision transformer g learns to decode its codes z with
added noise, and is therefore robust to errors of a diffusion model of these codes; in nats per sample:

    L = R + w_D lambda L_G     R = -log p(x | g(z + n)) + w_P X P(x, xhat)     z = (f(x) - m) / s
    n ~ N(0, sigma^2 I)     sigma ~ |N(0, tau^2)| for each sample of a training step; else n = 0

P, L_G, the discriminator's L_D and lambda, which is at most 1e4 X, are as in vqgan: terms are sums over the X values of
a sample, and P counts once for each of them; L_G and L_D enter through their gradients only, from step
discriminator_start on. With the Laplace likelihood, -log p is ||x - xhat||_1 plus a constant. m and s are mean and
standard deviation of each channel over all codes of the training so far. In the authors' code and in diffusers, f ends
with a layer norm without weights, m and s are applied after the noise, and sigma ~ U(0, tau).

f is the encoder of another model of aezoo, the teacher, whose weights are not saved: encoding and scoring need its
file, decoding does not. Without a teacher, f is a vision transformer with fixed random weights. The model `rae` is
unrelated: it is the regularised autoencoder of 2020. Shapes: B batch, C channels.
"""

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.distillation import DistilledAutoencoder, teacher_path
from aezoo.bases.perceptual_adversarial import AdversarialArgs, PerceptualAdversarial
from aezoo.errors import AezooError
from aezoo.nets import vit
from aezoo.nets.blocks.channel_stats import Standardiser
from aezoo.nets.conv import head
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import check_at_least


class RepresentationAEArgs(TrainingArgs, AdversarialArgs, total=False):
    """Arguments that `RepresentationAE` passes to its bases."""


class RepresentationAE(
    PerceptualAdversarial,
    DistilledAutoencoder,
    defaults={"discriminator_weight": 0.75, "likelihood": "laplace"},
    tags=("latent diffusion",),
):
    """Learns a decoder for the codes of a frozen encoder.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), of any size.
        teacher: none, or the path of a run, checkpoint or saved model of aezoo, whose codes are decoded.
        code_shape: shape of the teacher's codes, a vector or a map; empty: that of mae, 64 channels for each patch.
        tau: scale of the noise in training, 0.8 in the paper.
        discriminator_start: optimiser steps before the adversarial loss is used; half of all in the paper.
        discriminator_dims: channels of the discriminator's stages, each of stride 2. Empty: 32 and 64.
        width: size of the decoder's tokens, of which a code map has one for each position.
        depth: number of blocks of the decoder.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, within a block.
        likelihood: how outputs are compared with data, see vae; laplace is the paper's absolute error.
        lr: learning rate of the decoder.
        **kwargs: see `PerceptualAdversarial` and `Autoencoder`.
    """

    shape_arguments = "code_shape"

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        teacher: str = "none",
        code_shape: tuple[int, ...] = (),
        tau: float = 0.8,
        width: int = 64,
        depth: int = 4,
        activation: str = "gelu",
        **kwargs: Unpack[RepresentationAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        teacher = teacher_path(teacher)
        self.update_hyperparameters(teacher=teacher)
        check_at_least(1, width=width, depth=depth)
        check_at_least(0, tau=tau)
        if len(code_shape) not in (0, 1, len(self.input_shape)) or any(int(n) != n or n < 1 for n in code_shape):
            raise AezooError(f"code_shape takes (C,), or C and {len(self.input_shape) - 1} sides, got {code_shape}")
        self.teacher = teacher
        self.tau = tau
        sides = [-(-n // places) for n, places in zip(self.input_shape[1:], code_shape[1:], strict=False)]
        patchify = vit.Patchify(self.input_shape, max(sides, default=0))
        self.code_shape = tuple(code_shape) or (64, *patchify.grid)
        down, up = head(self.code_shape, (width, *patchify.grid), len(patchify.grid))
        place, blocks = vit.Positions(patchify.grid, width), vit.blocks((width,) * depth, activation)
        out = nn.Linear(width, patchify.size), vit.Unpatchify(patchify)
        self.encoder = nn.Identity()
        self.decoder = nn.Sequential(up, vit.ToTokens(), place, *blocks, *out)
        if teacher == "none":
            layers = patchify, vit.embedding(patchify.size, width), place, *vit.blocks((width,) * depth, activation)
            self.encoder = nn.Sequential(*layers, vit.ToMap(patchify.grid), down).requires_grad_(False)
        self.build_adversarial_losses((32, 64))
        self.normaliser = Standardiser(self.code_shape[0], decay=1.0)

    def parameter_groups(self) -> list[dict[str, Any]]:
        rest, discriminator_group = super().parameter_groups()
        return [{**rest, "params": [p for p in rest["params"] if p.requires_grad]}, discriminator_group]

    def represent(self, x: Tensor) -> Tensor:
        """Return the output of f, without a gradient for f, (B, *input_shape) -> (B, *code_shape)."""
        f: Tensor = self.encoder(x if self.teacher == "none" else self.load_teacher().encode(x))
        return f

    def encode(self, x: Tensor) -> Tensor:
        return self.normaliser.forward(self.represent(x))

    def noised(self, z: Tensor) -> Tensor:
        """Return the decoder's input in training, z + n, (B, *code_shape) -> (B, *code_shape)."""
        one = [1] * (z.ndim - 1)
        sigma, n = (torch.randn(len(z), *rest, device=z.device, dtype=z.dtype) for rest in (one, z.shape[1:]))
        return z + self.tau * sigma.abs() * n

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        f = at_least_float32(self.represent(x)).detach()
        if self.training:
            self.normaliser.observe(f.reshape(*f.shape[:2], -1), self.batch_mean)
        z = self.noised(self.normaliser(f)) if self.training else self.normaliser(f)
        loss, terms, _ = self.adversarial_objective(x, z.to(x.dtype), max_weight=1e4 * x[0].numel())
        return {"loss": loss, **terms}
