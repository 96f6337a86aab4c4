"""Sparse autoencoder with an L1 penalty on its code, a Laplace prior (Olshausen & Field 1996), https://doi.org/10.1038/381607a0

    L = -log p(x | g(h)) + lam ||h||_1     h = relu(f(x))

L is in nats per sample, with the penalty summed over the code. lam = 0 is the dense autoencoder with a ReLU code.

This is the textbook model (Goodfellow et al. 2016, "Deep Learning", section 14.2.1), and it has no optimum. With a free
decoder, a code of h / c and first decoder weights of c V give the same reconstruction at a lower cost, for any c > 1,
so longer training weakens the penalty. `sae_l1` keeps the decoder's directions at unit norm, or includes their norms in
the penalty; here `weight_decay` limits the weights.
"""

import math

from torch import Tensor

from aezoo import nets
from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.errors import AezooError


class SparseAEL1(Autoencoder):
    """Few units of a wide ReLU code are active for each sample.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        l1: lam, weight of the sum of activations; its effect fades as the decoder grows, see `weight_decay`.
        net: mlp, conv, resnet, convnext, conv_keras, unet, gdn, dc, vit, mixer, lstm or transformer.
        latent_dim: size of the code.
        hidden_dims: widths of the encoder's layers (mlp) or channels of its stages; the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers.
        likelihood: how outputs are compared with data: bernoulli, continuous_bernoulli, gaussian, gaussian:0.1,
            gaussian:learned, laplace, discretised_logistic, beta_binomial, logcosh, logit_laplace.
        lr: learning rate.
        optimizer: adam, adamw, adamax, nadam, radam, rmsprop, adagrad, adadelta or sgd; also adam:beta1=0.5,eps=1e-4.
        weight_decay: the optimiser's weight decay.
        lr_schedule: constant, cosine, linear, exponential, step or multistep:FACTOR@P,P, from warm-up to the last step.
        warmup_steps: optimiser steps over which the learning rate rises linearly.
    """

    sparse_code = True

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        l1: float = 0.1,
        net: str = "mlp",
        latent_dim: int = 256,
        hidden_dims: tuple[int, ...] = (),
        activation: str = "relu",
        likelihood: str = "bernoulli",
        lr: float = 1e-3,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(
            input_shape,
            likelihood=likelihood,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            warmup_steps=warmup_steps,
        )
        self.save_hyperparameters()
        if latent_dim < 1:
            raise AezooError(f"latent_dim must be at least 1, got {latent_dim}")
        if not 0 <= l1 < math.inf:
            raise AezooError(f"l1 must be at least 0 and finite, got {l1}")
        self.l1 = l1
        self.code_shape = (latent_dim,)
        self.encoder = nets.encoder(net, self.input_shape, self.code_shape, hidden_dims, activation)
        self.decoder = nets.decoder(net, self.code_shape, self.input_shape, hidden_dims[::-1], activation)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x).relu()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        h_BD = self.encode(x)
        nll_B = self.nll(self.decoder(h_BD), x)
        l1_B = at_least_float32(h_BD).sum(1)
        return {"loss": (nll_B + self.l1 * l1_B).mean(), "nll": nll_B.mean(), "l1": l1_B.mean()}
