"""Contractive autoencoder (Rifai et al. 2011), https://icml.cc/2011/papers/455_icmlpaper.pdf

Penalises how much the code changes with the input, by the squared Frobenius norm of the encoder's Jacobian:

    L = -log p(x | g(h)) + lam ||dh/dx||_F^2     h = sigmoid(W x + b)     g(h) = W' h + c
    ||dh/dx||_F^2 = sum_j (h_j (1 - h_j))^2 ||W_j||^2

The encoder is one sigmoid layer (eq. 8), so the penalty is exact and needs no second backward pass. The decoder uses
the encoder's weights: W' is the transpose of W, as throughout the paper (section 2). With separate weights, the encoder
can shrink while the decoder grows by the same factor; the penalty then goes to 0 and nothing is learned (Goodfellow et
al. 2016, "Deep Learning", section 14.7).

The output can approach the mean of the data fastest if all sigmoid units behave alike. The units then saturate there,
for a long time or, with separate decoder weights, permanently. With data_init, the output biases therefore start at
the mean of the first batch, as those of an RBM do (Hinton 2010, "A practical guide to training RBMs", section 8.1).

Shapes: B batch, X data dimensions, D code.
"""

import math
from typing import Unpack

from torch import Tensor, nn

from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.nets.blocks.tied import Transposed
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import check_at_least


class ContractiveAE(Autoencoder, tags=("representation",)):
    """One sigmoid layer whose output is insensitive to its input; the penalty applies in training and in evaluation.

    Args:
        input_shape: shape of one sample; any.
        latent_dim: D, size of the code.
        contraction: lam, weight of the Jacobian's squared norm.
        tied: the decoder uses the encoder's weights, transposed; with separate weights, it can undo the penalty.
        data_init: initialise the output biases from the first training batch.
        **kwargs: see `Autoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 128,
        contraction: float = 0.1,
        tied: bool = True,
        data_init: bool = True,
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(0, contraction=contraction)
        self.contraction = contraction
        self.code_shape = (latent_dim,)
        x_dim = math.prod(self.input_shape)
        layer = nn.Linear(x_dim, latent_dim)
        self.encoder = nn.Sequential(nn.Flatten(), layer, nn.Sigmoid())
        back = Transposed(layer, (x_dim,)) if tied else nn.Linear(latent_dim, x_dim)
        self.decoder = nn.Sequential(back, nn.Unflatten(1, self.input_shape))
        if data_init:
            self.enable_data_init()

    def init_from_data(self, x: Tensor) -> None:
        """Set the output biases to those of the mean of the samples (N, *input_shape)."""
        self.decoder.get_parameter("0.bias").copy_(self.likelihood.params_from_mean(x.mean(0)).flatten())

    def jacobian_norm(self, h_BD: Tensor) -> Tensor:
        """||dh/dx||_F^2 of each sample, (B, D) -> (B,)."""
        h_BD, W_DX = at_least_float32(h_BD), self.encoder.get_parameter("1.weight")
        # not a matrix product, which autocast would compute in half precision
        return ((h_BD * (1 - h_BD)).square() * W_DX.square().sum(1)).sum(1)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        h_BD = self.encoder(x)
        nll_B = self.nll(self.decoder(h_BD), x)
        jacobian_B = self.jacobian_norm(h_BD)
        return {
            "loss": (nll_B + self.contraction * jacobian_B).mean(),
            "nll": nll_B.mean(),
            "jacobian": jacobian_B.mean(),
        }
