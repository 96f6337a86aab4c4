"""FVQ autoencoder, vector quantisation with all codes in use (Chang et al. 2025), https://arxiv.org/abs/2509.10140

This is `sim_vq_vae` with trained codes C and, instead of the matrix, a transformer over groups of codes, VQBridge:

    z = f(x)    z_q = e_k, k = argmin_j ||z - e_j||, e = bridge(C)    gradient of z = gradient of z_q

    L = -log p(x | g(z_q)) + ||sg(z) - e_k||^2 + beta ||z - sg(e_k)||^2

summed over places. Codes that are not chosen move with the chosen ones, each in its own way. The authors also decay the
learning rate to a hundredth; without this, their rFID was twice as large: see `lr_schedule`. The bridge serves only
training: `quantiser.codebook()` gives all the codes that indices stand for.
"""

from aezoo.models.quantised.sim_vq_vae import SimVQVAE
from aezoo.quantisers.fvq import FVQ


class FVQVAE(SimVQVAE):
    """A map of codes from one codebook, which a transformer moves as a whole.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: D, channels of a code.
        codebook_size: K, number of codes.
        beta: weight of the commitment loss.
        group_size: P, codes in one token of the bridge.
        width: width of a token.
        depth: number of blocks of the bridge.
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
        group_size: int = 4,
        width: int = 64,
        depth: int = 2,
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
            latent_dim=latent_dim,
            codebook_size=codebook_size,
            beta=beta,
            estimator=estimator,
            places=places,
            net=net,
            hidden_dims=hidden_dims,
            activation=activation,
            likelihood=likelihood,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            warmup_steps=warmup_steps,
        )
        self.save_hyperparameters()
        self.quantiser = FVQ(
            latent_dim, codebook_size, group_size=group_size, width=width, depth=depth, estimator=estimator
        )
