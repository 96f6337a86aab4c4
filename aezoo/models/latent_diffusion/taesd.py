"""TAESD, a tiny copy of a latent diffusion model's autoencoder (Boer Bohan 2023), https://github.com/madebyollin/taesd

The encoder learns the codes of another model T, the teacher, and the decoder learns to decode them to images:

    L = -log p(x | g(z_T)) + 1/2 ||f(x) - z_T||^2     z_T = (T(x) - m) / s     xhat = g(f(x))

in nats per sample. No gradient passes between encoder and decoder or to the teacher. m and s are the mean and standard
deviation of each channel that autoencoder_kl stores, so that the codes are those of a diffusion model; they are 0 and 1
for a teacher without them. Codes, reconstructions and scores do not need the teacher, and its weights are not saved.
Without a teacher, L = -log p(x | xhat).

A stage has three blocks, each with three convolutions and a shortcut, and g begins with 3 tanh(z / 3). For three
channels, hidden_dims of (64, 64, 64) and latent_dim 4, f and g have 1,222,532 and 1,222,531 weights, as in the
original, whose decoder was also trained with a discriminator. Shapes: B batch.
"""

from itertools import pairwise
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo import nets
from aezoo.autoencoder import at_least_float32
from aezoo.bases.distillation import DistilledAutoencoder, teacher_path
from aezoo.nets.conv import CONVS, grids
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import check_at_least


class Clamp(nn.Module):
    """Computes 3 tanh(z / 3), which is about z for small z and bounded by 3."""

    def forward(self, z: Tensor) -> Tensor:
        return 3 * torch.tanh(z / 3)


class Block(nn.Module):
    """Computes act(x + three convolutions of x), with the same channels and grid."""

    def __init__(self, conv: type[nn.Module], width: int, act: str) -> None:
        super().__init__()
        layers = [part for _ in range(3) for part in (conv(width, width, 3, padding=1), nets.activation(act))]
        self.body = nn.Sequential(*layers[:-1])
        self.act = layers[-1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x + self.body(x))
        return x


class TAESD(DistilledAutoencoder, defaults={"likelihood": "gaussian"}, tags=("latent diffusion",)):
    """Learns the codes and the decoding of a larger autoencoder with a small deterministic one.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), of any size.
        latent_dim: channels of the code; with a teacher, as many as its codes have.
        teacher: none, or the path of a run, checkpoint or saved model of aezoo, whose codes have the same grid.
        hidden_dims: channels of the encoder's stages, mirrored by the decoder; (64, 64, 64) in the original.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers.
        likelihood: how outputs are compared with data, see vae; with gaussian, they are the image, as in the original.
        **kwargs: see `Autoencoder`.
    """

    shape_arguments = "latent_dim and hidden_dims"

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 4,
        teacher: str = "none",
        hidden_dims: tuple[int, ...] = (16, 32),
        activation: str = "relu",
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        teacher = teacher_path(teacher)
        self.update_hyperparameters(teacher=teacher)
        check_at_least(1, latent_dim=latent_dim)
        self.teacher = teacher
        self.code_shape = nets.map_shape("conv", self.input_shape, hidden_dims, latent_dim)
        channels, conv = self.input_shape[0], CONVS[len(self.input_shape) - 1]
        widths = (*(hidden_dims[:1] or (channels,)), *hidden_dims)
        down: list[nn.Module] = [conv(channels, widths[0], 3, padding=1), Block(conv, widths[0], activation)]
        for a, b in pairwise(widths):
            down += [conv(a, b, 3, stride=2, padding=1, bias=False), *(Block(conv, b, activation) for _ in range(3))]
        up: list[nn.Module] = [Clamp(), conv(latent_dim, widths[-1], 3, padding=1), nets.activation(activation)]
        for (a, b), grid in zip(pairwise(widths[::-1]), grids(self.input_shape, len(hidden_dims))[-2::-1], strict=True):
            up += [Block(conv, a, activation) for _ in range(3)]
            up += [nn.Upsample(grid), conv(a, b, 3, padding=1, bias=False)]
        self.encoder = nn.Sequential(*down, conv(widths[-1], latent_dim, 3, padding=1))
        self.decoder = nn.Sequential(*up, Block(conv, widths[0], activation), conv(widths[0], channels, 3, padding=1))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z = self.encode(x)
        if self.teacher == "none":
            nll = self.nll(self.decoder(z), x).mean()
            return {"loss": nll, "nll": nll}
        z_T = self.teacher_codes(x)
        nll = self.nll(self.decoder(z_T.to(z.dtype)), x).mean()
        code = 0.5 * (at_least_float32(z) - z_T).square().flatten(1).sum(1).mean()
        return {"loss": nll + code, "nll": nll, "code": code}

    @torch.no_grad()
    def teacher_codes(self, x: Tensor) -> Tensor:
        """Return the teacher's codes z_T, in at least float32, (B, *input_shape) -> (B, *code_shape)."""
        teacher = self.load_teacher()
        with torch.autocast(x.device.type, enabled=False):
            z = at_least_float32(teacher.encode(x.to(next(teacher.parameters()).dtype)))
            return getattr(teacher, "standardiser", nn.Identity())(z)
