"""TAESD, a tiny copy of a latent diffusion model's autoencoder (Boer Bohan 2023), https://github.com/madebyollin/taesd

The encoder learns the codes of another model T, the teacher, and the decoder the images behind these:

    L = -log p(x | g(z_T)) + 1/2 ||f(x) - z_T||^2     z_T = (T(x) - m) / s     xhat = g(f(x))

in nats per sample; neither half passes a gradient to the other, or to the teacher. m and s are mean and deviation of
each channel as autoencoder_kl keeps them, which makes codes those of a diffusion model; a teacher without them has 0
and 1. Codes, reconstructions and scores need no teacher, whose weights are not saved. Without one L = -log p(x | xhat).

A stage has three blocks of three convolutions and a shortcut each, and g begins with 3 tanh(z / 3). For three channels,
hidden_dims of (64, 64, 64) and latent_dim 4, f and g have the 1,222,532 and 1,222,531 weights of the original, whose
decoder was trained against a discriminator as well. Shapes: B batch.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

import aezoo
from aezoo import nets
from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.errors import AezooError
from aezoo.hub_files import on_disk
from aezoo.limits import at_least
from aezoo.nets.conv import CONVS, grids


class Clamp(nn.Module):
    """3 tanh(z / 3): about z where z is small, and never beyond 3."""

    def forward(self, z: Tensor) -> Tensor:
        return 3 * torch.tanh(z / 3)


class Block(nn.Module):
    """act(x + three convolutions of x), channels and grid unchanged."""

    def __init__(self, conv: type[nn.Module], width: int, act: str) -> None:
        super().__init__()
        layers = [part for _ in range(3) for part in (conv(width, width, 3, padding=1), nets.activation(act))]
        self.body, self.act = nn.Sequential(*layers[:-1]), layers[-1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x + self.body(x))
        return x


class TAESD(Autoencoder):
    """A small deterministic autoencoder that learns codes and images of a larger one.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), of any size.
        latent_dim: channels of the code; with a teacher as many as it has.
        teacher: none, or the path of a run, checkpoint or saved model of the zoo, whose codes lie on the same grid.
        hidden_dims: channels of the encoder's stages, the decoder mirrors them; (64, 64, 64) in the original.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers.
        likelihood: how outputs are compared with data, see vae; with gaussian they are the image, as in the original.
        lr: learning rate.
        optimizer: adam, adamw, adamax, nadam, radam, rmsprop, adagrad, adadelta or sgd; also adam:beta1=0.5,eps=1e-4.
        weight_decay: the optimiser's weight decay.
        lr_schedule: constant, cosine, linear, exponential, step or multistep:FACTOR@P,P, from warm-up to the last step.
        warmup_steps: optimiser steps over which the learning rate rises linearly.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 4,
        teacher: str = "none",
        hidden_dims: tuple[int, ...] = (16, 32),
        activation: str = "relu",
        likelihood: str = "gaussian",
        lr: float = 1e-3,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_steps: int = 0,
    ) -> None:
        how: dict[str, Any] = {"optimizer": optimizer, "lr_schedule": lr_schedule, "warmup_steps": warmup_steps}
        super().__init__(input_shape, likelihood=likelihood, lr=lr, weight_decay=weight_decay, **how)
        teacher = str(teacher)
        if teacher != "none" and len(Path(teacher).parts) < 2:
            if not teacher or not Path(teacher).exists():
                raise AezooError(f"teacher takes none or the path of a model of the zoo, got {teacher!r}")
            teacher = str(Path(teacher).absolute())  # still a path where there is no such file
        self.save_hyperparameters()
        at_least(1, latent_dim=latent_dim)
        self.teacher, self.code_shape = teacher, nets.map_shape("conv", self.input_shape, hidden_dims, latent_dim)
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
        # in a tuple, which keeps it from the state_dict, the optimiser, train() and the exchange between ranks
        self.frozen: tuple[Autoencoder, ...] = ()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        for model in self.frozen:
            model._apply(fn)
        return super()._apply(fn, recurse)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.teacher != "none":
            self.taught_by()

    def taught_by(self) -> Autoencoder:
        """The teacher, read from its file at the first call: not in the constructor, so that a model loads without.

        Raises:
            AezooError: there is no such model, or it does not fit the data or the code.
        """
        if not self.frozen:
            model = aezoo.load_model(on_disk(self.teacher))
            theirs, own = ((each.input_shape, each.code_shape) for each in (model, self))
            if theirs != own:
                cure = "set latent_dim and hidden_dims to fit, or take another"
                raise AezooError(f"teacher: {self.teacher} has samples and codes of {theirs}, not {own}: {cure}")
            self.frozen = (model.requires_grad_(False).to(next(self.decoder.parameters())),)
        return self.frozen[0]

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z = self.encode(x)
        if self.teacher == "none":
            nll = self.nll(self.decoder(z), x).mean()
            return {"loss": nll, "nll": nll}
        z_T = self.teach(x)
        nll = self.nll(self.decoder(z_T.to(z.dtype)), x).mean()
        code = 0.5 * (at_least_float32(z) - z_T).square().flatten(1).sum(1).mean()
        return {"loss": nll + code, "nll": nll, "code": code}

    @torch.no_grad()
    def teach(self, x: Tensor) -> Tensor:
        """The teacher's codes z_T, in at least float32: (B, *input_shape) -> (B, *code_shape)."""
        teacher = self.taught_by()
        with torch.autocast(x.device.type, enabled=False):
            z = at_least_float32(teacher.encode(x.to(next(teacher.parameters()).dtype)))
            return getattr(teacher, "standardiser", nn.Identity())(z)
