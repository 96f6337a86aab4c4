"""SimVQ autoencoder, vector quantisation with one linear layer (Zhu et al. 2024), https://arxiv.org/abs/2411.02038

This is `vq_vae` with codes C_0 W: C_0 is drawn once and frozen, and W is a D x D matrix that all codes share:

    z = f(x)    z_q = e_k, k = argmin_j ||z - e_j||, e = C_0 W    gradient of z = gradient of z_q

    L = -log p(x | g(z_q)) + ||sg(z) - e_k||^2 + beta ||z - sg(e_k)||^2

summed over places. A chosen code moves all others with it, so no code is left behind and none needs to be revived.
"""

from torch import Tensor

from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.quantisers.sim_vq import SimVQ
from aezoo.training.limits import at_least


class SimVQVAE(DiscreteAutoencoder):
    """A map of codes from one codebook that moves as a whole.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: D, channels of a code.
        codebook_size: K, number of codes.
        beta: weight of the commitment loss.
        estimator: how the gradient passes through the quantiser: ste or rotation.
        places: codes per sample with net mlp, lstm and transformer; others have a code at each place of their grid.
        net: resnet, conv, convnext, conv_keras, unet, gdn, dc, vit, mixer, mlp, lstm or transformer.
        hidden_dims: channels of the encoder's stages (mlp: widths of its layers); the decoder mirrors them.
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
        latent_dim: int = 16,
        codebook_size: int = 512,
        beta: float = 0.25,
        estimator: str = "ste",
        places: int = 16,
        net: str = "resnet",
        hidden_dims: tuple[int, ...] = (32, 64),
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
        at_least(0, beta=beta)
        at_least(1, codebook_size=codebook_size)
        self.beta = beta
        self.build_nets(net, (latent_dim, latent_dim), hidden_dims, activation, places)
        self.quantiser = SimVQ(latent_dim, codebook_size, estimator=estimator)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        loss = nll + self.beta * terms["commitment"] + terms["codebook"]
        return {"loss": loss, "nll": nll, **terms}
