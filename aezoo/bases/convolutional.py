"""Plain autoencoders with convolutional networks of one kind."""

from typing import ClassVar, Unpack

from torch import Tensor

from aezoo import nets
from aezoo.autoencoder import Autoencoder
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import check_at_least


class ConvolutionalAutoencoder(Autoencoder):
    """An encoder with convolutional stages and a mirrored decoder; a subclass sets the `net`.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), any size.
        latent_dim: size of the code, or number of its channels if `latent_map` is on.
        latent_map: use a feature map on the grid of the last stage as the code, instead of a vector.
        hidden_dims: channels of the encoder's stages, each of which halves the grid; the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers.
        **kwargs: see `Autoencoder`.
    """

    net: ClassVar[str]

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 32,
        latent_map: bool = False,
        hidden_dims: tuple[int, ...] = (32, 64),
        activation: str = "silu",
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        self.code_shape = (latent_dim,)
        if latent_map:
            self.code_shape = nets.map_shape(self.net, self.input_shape, hidden_dims, latent_dim)
        self.encoder = nets.encoder(self.net, self.input_shape, self.code_shape, hidden_dims, activation)
        self.decoder = nets.decoder(self.net, self.code_shape, self.input_shape, hidden_dims[::-1], activation)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll_B = self.nll(self.decoder(self.encoder(x)), x)
        nll = nll_B.mean()
        return {"loss": nll, "nll": nll}
