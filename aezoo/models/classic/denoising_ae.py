"""Denoising autoencoder (Vincent et al. 2008), https://doi.org/10.1145/1390156.1390294

Reconstructs a clean sample from a corrupted one, x~ ~ C(x~ | x):

    L = E_C[ -log p(x | g(f(x~))) ]

With Gaussian noise of standard deviation s and the squared error, the best reconstruction is
r(x~) = x~ + s^2 grad log p_s(x~). The gradient is the score of the noisy density (Alain & Bengio 2014,
https://arxiv.org/abs/1211.4246). Training draws new noise for every batch; evaluation draws it once, from a fixed seed.
"""

from torch import Tensor

from aezoo import corruptions, nets
from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError


class DenoisingAE(Autoencoder):
    """Learns to undo a corruption; in evaluation, reconstructions and metrics also start from corrupted input.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        corruption: gaussian:STD, masking:SHARE, salt_and_pepper:SHARE or none.
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

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        corruption: str = "gaussian:0.3",
        net: str = "mlp",
        latent_dim: int = 64,
        hidden_dims: tuple[int, ...] = (256,),
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
        self.code_shape = (latent_dim,)
        self.corruption = corruptions.corruption(corruption)
        self.encoder = nets.encoder(net, self.input_shape, self.code_shape, hidden_dims, activation)
        self.decoder = nets.decoder(net, self.code_shape, self.input_shape, hidden_dims[::-1], activation)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        noisy = x if self.corruption is None else self.corruption(x)
        nll_B = self.nll(self.decoder(self.encoder(noisy)), x)
        nll = nll_B.mean()
        return {"loss": nll, "nll": nll}
