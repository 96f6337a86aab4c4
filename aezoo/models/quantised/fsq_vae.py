"""FSQ autoencoder, finite scalar quantisation (Mentzer et al. 2023), https://arxiv.org/abs/2309.15505

Each channel of the encoder's output is bounded and rounded to one of its L values:

    z = f(x)    z_q = round(bound(z)) / floor(L / 2)    gradient of bound(z) = gradient of z_q

    L = -log p(x | g(z_q))

No codebook can collapse, so there is no other term. The number of codes is the product of the levels. With depth above
1, each further level rounds the remaining error to the L values of a cell that is L times as fine.
"""

from torch import Tensor

from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.quantisers.residual_fsq import ResidualFSQ


class FSQVAE(DiscreteAutoencoder):
    """A map of channels, each rounded to one of a few values.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        levels: number of values of each channel of a code, which the paper advises to be 5 or more; K is their product.
        depth: how often a place is quantised: each time gives one index, with the same levels.
        dropout: share of training samples that keep only their first indices.
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
        levels: tuple[int, ...] = (8, 5, 5, 5),
        depth: int = 1,
        dropout: float = 0.0,
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
        self.quantiser = ResidualFSQ(tuple(levels), depth, dropout=dropout)
        self.build_nets(net, (len(levels), len(levels)), hidden_dims, activation, places)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = self.nll(self.decoder(self.quantise(x).z_q), x).mean()
        return {"loss": nll, "nll": nll}
