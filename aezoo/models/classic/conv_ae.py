"""Convolutional autoencoder (Masci et al. 2011), https://doi.org/10.1007/978-3-642-21735-7_7

Minimises the reconstruction's negative log-likelihood in nats per sample through strided convolutions:

    L = -log p(x | g(f(x)))     f: stages of stride 2     g: transposed stages back to the exact size

Takes sequences, images and volumes of any size, according to the rank of `input_shape`.
"""

from typing import Unpack

from torch import Tensor

from aezoo import nets
from aezoo.autoencoder import Autoencoder
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import at_least


class ConvAE(Autoencoder):
    """Encodes with strided convolutions and decodes with transposed convolutions.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), any size.
        latent_dim: size of the code, or its channels if `latent_map` is on.
        latent_map: the code is a feature map on the grid that the stages leave, instead of a vector.
        hidden_dims: channels of the encoder's stages, each of which halves the grid; the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers.
        **kwargs: see `Autoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 32,
        latent_map: bool = False,
        hidden_dims: tuple[int, ...] = (32, 64),
        activation: str = "relu",
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        at_least(1, latent_dim=latent_dim)
        self.code_shape = (latent_dim,)
        if latent_map:
            self.code_shape = nets.map_shape("conv", self.input_shape, hidden_dims, latent_dim)
        self.encoder = nets.encoder("conv", self.input_shape, self.code_shape, hidden_dims, activation)
        self.decoder = nets.decoder("conv", self.code_shape, self.input_shape, hidden_dims[::-1], activation)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll_B = self.nll(self.decoder(self.encoder(x)), x)
        nll = nll_B.mean()
        return {"loss": nll, "nll": nll}
