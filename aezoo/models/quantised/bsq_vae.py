"""BSQ autoencoder, binary spherical quantisation (Zhao et al. 2024), https://arxiv.org/abs/2406.07548

This is `lfq_vae` on the unit sphere, where the distance to a code is bounded:

    z = f(x)    u = z / ||z||    z_q = sign(u) / sqrt(D)    gradient of u = gradient of z_q

    L = -log p(x | g(z_q)) + w (E H(p(c|u)) - gamma H(E p(c|u))) + beta ||u - sg(z_q)||^2

u cannot drift away from its code, so beta may be 0, which is the default. For w see `lfq_vae`.
"""

from torch import Tensor

from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.quantisers.bsq import BSQ
from aezoo.training.limits import at_least


class BSQVAE(DiscreteAutoencoder):
    """A map of binary codes: the corners of a hypercube on the unit sphere.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: D, channels of a code and bits of its index.
        entropy_weight: w, weight of both entropy terms.
        gamma: weight of the diversity term relative to the entropy term.
        beta: weight of the commitment loss.
        temperature: temperature of the code probabilities.
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
        latent_dim: int = 9,
        entropy_weight: float = 0.3,
        gamma: float = 1.0,
        beta: float = 0.0,
        temperature: float = 0.1,
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
        at_least(0, entropy_weight=entropy_weight, gamma=gamma, beta=beta)
        self.entropy_weight, self.gamma, self.beta = entropy_weight, gamma, beta
        self.build_nets(net, (latent_dim, latent_dim), hidden_dims, activation, places)
        self.quantiser = BSQ(latent_dim, temperature=temperature)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        spread = terms["entropy"] - self.gamma * terms["diversity"]
        loss = nll + self.entropy_weight * spread + self.beta * terms["commitment"]
        return {"loss": loss, "nll": nll, **terms}
