"""Dense autoencoder (Hinton & Salakhutdinov 2006), https://doi.org/10.1126/science.1127647

Minimises the reconstruction's negative log-likelihood in nats per sample through fully connected layers:

    L = -log p(x | g(f(x)))     f: X -> 128 -> 64 -> 32     g: 32 -> 64 -> 128 -> X

With the Bernoulli likelihood, L is the summed binary cross-entropy; with `gaussian`, it is the squared error
||x - x_hat||^2 plus a constant.
"""

from torch import Tensor, nn

from aezoo import nets
from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError


class DenseAE(Autoencoder):
    """Encodes with fully connected layers to a short code and decodes back.

    Args:
        input_shape: shape of one sample; any.
        latent_dim: size of the code.
        hidden_dims: widths of the encoder's hidden layers; the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers.
        code_activation: also applied to the code, such as relu; identity leaves the code free.
        likelihood: how outputs are compared with data: bernoulli, continuous_bernoulli, gaussian, gaussian:0.1,
            gaussian:learned, laplace, discretised_logistic, beta_binomial, logcosh, logit_laplace.
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
        latent_dim: int = 32,
        hidden_dims: tuple[int, ...] = (128, 64),
        activation: str = "relu",
        code_activation: str = "identity",
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
        self.code_shape = (latent_dim,)
        layers = nets.encoder("mlp", self.input_shape, self.code_shape, hidden_dims, activation)
        self.encoder = nn.Sequential(layers, nets.activation(code_activation))
        self.decoder = nets.decoder("mlp", self.code_shape, self.input_shape, hidden_dims[::-1], activation)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll_B = self.nll(self.decoder(self.encoder(x)), x)
        nll = nll_B.mean()
        return {"loss": nll, "nll": nll}
