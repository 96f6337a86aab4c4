"""QLAE, quantised-latent autoencoder (Hsu et al. 2023), https://arxiv.org/abs/2305.18378

Each number of the code becomes the nearest of a few learned values, which are its own:

    z = f(x)    z_q,d = v_dk, k = argmin_j |z_d - v_dj|    gradient of z = gradient of z_q

    L = -log p(x | g(z_q)) + ||sg(z) - z_q||^2 + beta ||z - sg(z_q)||^2

Strong weight decay keeps the decoder simple, so that each value gets one meaning, whatever the other numbers are. Thus
numbers come to represent the factors of the data. AdamW decays matrices and kernels only.

The paper weights both terms by 0.01, with means over the code and over the sample. For d values and D numbers, this is
a beta of 0.01 d / D here: 10 for its 64 x 64 colour images and 12 numbers. With a much smaller beta, z moves away from
the values, which move by one Adam step at a time whatever the weight of their own term, and few values are in use.

Shapes: B batch, D numbers of a code, K values of each.
"""

from typing import Any

from torch import Tensor

from aezoo import nets
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.quantisers.latent_quantisation import LatentQuantisation
from aezoo.training.limits import at_least


class QLAE(DiscreteAutoencoder):
    """A vector of numbers with few values each, and weight decay.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: D, numbers of a code; the paper takes twice the number of factors of the data.
        n_values: K, values of each number.
        beta: weight of the commitment loss.
        net: mlp, conv, resnet, convnext, conv_keras, unet, gdn, dc, vit, mixer, lstm or transformer.
        hidden_dims: widths of the encoder's layers (mlp) or channels of its stages; the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers.
        likelihood: how outputs are compared with data: bernoulli, continuous_bernoulli, gaussian, gaussian:0.1,
            gaussian:learned, laplace, discretised_logistic, beta_binomial, logcosh, logit_laplace.
        lr: learning rate.
        optimizer: adam, adamw, adamax, nadam, radam, rmsprop, adagrad, adadelta or sgd; also adam:beta1=0.5,eps=1e-4.
        weight_decay: the optimiser's weight decay, of matrices and kernels alone.
        lr_schedule: constant, cosine, linear, exponential, step or multistep:FACTOR@P,P, from warm-up to the last step.
        warmup_steps: optimiser steps over which the learning rate rises linearly.
    """

    quantiser: LatentQuantisation

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 10,
        n_values: int = 10,
        beta: float = 10.0,
        net: str = "mlp",
        hidden_dims: tuple[int, ...] = (400,),
        activation: str = "relu",
        likelihood: str = "bernoulli",
        lr: float = 1e-3,
        optimizer: str = "adamw",
        weight_decay: float = 0.1,
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
        at_least(1, latent_dim=latent_dim)
        at_least(2, n_values=n_values)
        at_least(0, beta=beta)
        self.beta = beta
        self.code_shape = (latent_dim,)
        self.encoder = nets.encoder(net, self.input_shape, self.code_shape, hidden_dims, activation)
        self.decoder = nets.decoder(net, self.code_shape, self.input_shape, hidden_dims[::-1], activation)
        self.quantiser = LatentQuantisation(latent_dim, n_values)

    def parameter_groups(self) -> list[dict[str, Any]]:
        values = self.quantiser.value_DK
        decays, rest = (
            [p for p in self.parameters() if (p.ndim > 1 and p is not values) == chosen] for chosen in (True, False)
        )
        return [{"params": decays}, {"params": rest, "weight_decay": 0.0}]

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        return {"loss": nll + terms["codebook"] + self.beta * terms["commitment"], "nll": nll, **terms}
