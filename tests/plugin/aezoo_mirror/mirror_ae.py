"""Mirror autoencoder: tied weights, after Vincent et al. 2010, https://www.jmlr.org/papers/v11/vincent10a.html

The decoder is the encoder's transpose:

    L = -log p(x | W' h + c)     h = sigmoid(W x + b)
"""

import math

import torch
from torch import Tensor, nn

from aezoo import Autoencoder


class MirrorAE(Autoencoder, tags=("representation",)):
    """One sigmoid layer whose decoder is its transpose.

    Args:
        input_shape: shape of one sample; any.
        latent_dim: size of the code.
        likelihood: how outputs are compared with data.
        lr: learning rate.
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, latent_dim: int = 32, likelihood: str = "bernoulli", lr: float = 1e-3
    ) -> None:
        super().__init__(input_shape, likelihood=likelihood, lr=lr)
        self.save_hyperparameters()
        self.code_shape = (latent_dim,)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(self.input_shape), latent_dim), nn.Sigmoid())
        self.bias = nn.Parameter(torch.zeros(math.prod(self.input_shape)))

    def logits(self, h: Tensor) -> Tensor:
        return (h @ self.encoder[1].weight + self.bias).unflatten(1, self.input_shape)

    def decode(self, z: Tensor) -> Tensor:
        return self.likelihood.mean(self.logits(z))

    def score(self, x: Tensor) -> Tensor:
        return self.nll(self.logits(self.encode(x)), x)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = self.score(x).mean()
        return {"loss": nll, "nll": nll}
