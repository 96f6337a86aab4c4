"""Dense autoencoder (Hinton & Salakhutdinov 2006), https://doi.org/10.1126/science.1127647

Minimises the reconstruction's negative log-likelihood in nats per sample through fully connected layers:

    L = -log p(x | g(f(x)))     f: X -> 128 -> 64 -> 32     g: 32 -> 64 -> 128 -> X

With the Bernoulli likelihood, L is the summed binary cross-entropy; with `gaussian`, it is the squared error
||x - x_hat||^2 plus a constant.
"""

from typing import Unpack

from torch import Tensor, nn

from aezoo import nets
from aezoo.autoencoder import Autoencoder
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import check_at_least


class DenseAE(Autoencoder, tags=("representation", "anomaly")):
    """Encodes with fully connected layers to a short code and decodes it with the mirrored layers.

    Args:
        input_shape: shape of one sample; any.
        latent_dim: size of the code.
        hidden_dims: widths of the encoder's hidden layers; the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers.
        code_activation: activation of the code, such as relu; identity for none.
        weight_init: default, or glorot for Keras' initial weights, with which fewer units of a ReLU code are dead.
        **kwargs: see `Autoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 32,
        hidden_dims: tuple[int, ...] = (128, 64),
        activation: str = "relu",
        code_activation: str = "identity",
        weight_init: str = "default",
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        self.code_shape = (latent_dim,)
        layers = nets.encoder("mlp", self.input_shape, self.code_shape, hidden_dims, activation)
        self.encoder = nn.Sequential(layers, nets.activation(code_activation))
        self.decoder = nets.decoder("mlp", self.code_shape, self.input_shape, hidden_dims[::-1], activation)
        nets.initialise(self, weight_init)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll_B = self.nll(self.decoder(self.encoder(x)), x)
        nll = nll_B.mean()
        return {"loss": nll, "nll": nll}
