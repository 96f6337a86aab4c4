"""U-Net autoencoder (Ronneberger et al. 2015), https://arxiv.org/abs/1505.04597

Minimises the reconstruction's negative log-likelihood in nats per sample:

    L = -log p(x | g(f(x)))     f: stages of two convolutions and a pooling     g: stages of a doubling and the two

A U-Net with its usual skip connections has no code: feature maps of f reach g directly, and the finest of them holds
all of x. Here skip connections stay within f and within g, see `aezoo.nets.unet`. Every stage of f feeds the code, and
the code feeds every stage of g. Nothing bypasses the code, so decode needs the code alone.
"""

from typing import Unpack

from torch import Tensor

from aezoo import nets
from aezoo.autoencoder import Autoencoder
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import at_least


class UNetAE(Autoencoder):
    """A U-Net split at its code, with skip connections on either side.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), any size.
        latent_dim: size of the code, or its channels if `latent_map` is on.
        latent_map: the code is a feature map on the grid that the stages leave, instead of a vector.
        hidden_dims: channels of the encoder's stages, each of which halves the grid; the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers.
        **kwargs: see `Autoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 32,
        latent_map: bool = False,
        hidden_dims: tuple[int, ...] = (16, 32),
        activation: str = "silu",
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        at_least(1, latent_dim=latent_dim)
        self.code_shape = (latent_dim,)
        if latent_map:
            self.code_shape = nets.map_shape("unet", self.input_shape, hidden_dims, latent_dim)
        self.encoder = nets.encoder("unet", self.input_shape, self.code_shape, hidden_dims, activation)
        self.decoder = nets.decoder("unet", self.code_shape, self.input_shape, hidden_dims[::-1], activation)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll_B = self.nll(self.decoder(self.encoder(x)), x)
        nll = nll_B.mean()
        return {"loss": nll, "nll": nll}
