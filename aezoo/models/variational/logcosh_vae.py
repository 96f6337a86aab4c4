"""Log-cosh VAE (Chen et al. 2019), https://openreview.net/forum?id=rkglvsC9Ym

    L = E_q[sum_x log cosh(a (x - xhat)) + X log(pi / a)] + beta KL(q(z|x) || p(z))     xhat = g(z)

in nats per sample. Small errors count by their squares and large ones by their size, so that outliers pull no harder
than other values. The first term is the negative log-density a / (pi cosh(a (x - xhat))), the likelihood `logcosh:S`
with S = 1/a, and L is a bound on -log p(x). The paper weights log cosh by 1/a and leaves out the constant: its loss is
L / a for beta = a, and a = 10.

Shapes: X data dimensions.
"""

from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE


class LogCoshVAE(VAE):
    """A VAE with a likelihood between the Gaussian and the Laplace density.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: D, size of the code.
        a: errors well below 1/a count by their square, those well above by their size.
        beta: weight of the KL term.
        net: mlp, conv, resnet, convnext, conv_keras, unet, gdn, dc, vit, mixer, lstm or transformer.
        hidden_dims: widths of the encoder's layers (mlp) or channels of its stages; the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers.
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
        latent_dim: int = 16,
        a: float = 10.0,
        beta: float = 1.0,
        net: str = "mlp",
        hidden_dims: tuple[int, ...] = (400,),
        activation: str = "relu",
        lr: float = 1e-3,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_steps: int = 0,
    ) -> None:
        if not 1e-4 <= a <= 1e4:
            raise AezooError(f"a must lie between 1e-4 and 1e4, for data of about unit range, got {a}")
        super().__init__(
            input_shape,
            latent_dim=latent_dim,
            beta=beta,
            net=net,
            hidden_dims=hidden_dims,
            activation=activation,
            likelihood=f"logcosh:{1 / a!r}",
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            warmup_steps=warmup_steps,
        )
        self.save_hyperparameters()
