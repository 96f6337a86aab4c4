"""RQ-VAE, residual-quantised autoencoder (Lee et al. 2022), https://arxiv.org/abs/2203.01941

Each place of the encoder's output becomes a sum of codes, where each code is the nearest to the current residual:

    z = f(x)    r_0 = z    r_l = r_(l-1) - e_l, e_l = the nearest code of codebook l    z_q = sum_l e_l

    L = -log p(x | g(z_q)) + sum_l ||sg(r_(l-1)) - e_l||^2 + beta sum_l ||z - sg(sum_(i<=l) e_i)||^2

summed over places. K codes per level give K^levels sums: more levels, not larger codebooks, give more bits. Each level
has its own codebook, as in SoundStream (Zeghidour et al. 2021, arXiv:2107.03312); in the paper, levels share one. The
second term applies to update gradient; with ema, as in the paper, codes are moving averages. With SoundStream's
quantiser dropout, a sample keeps its first n levels, n uniform, so that one model decodes at every rate.
"""

from torch import Tensor

from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.quantisers.residual_vq import ResidualVQ
from aezoo.training.limits import at_least


class RQVAE(DiscreteAutoencoder):
    """A map of sums of codes, one code from each of several codebooks.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: D, channels of a code.
        levels: codes per place, each from its own codebook.
        codebook_size: K, codes of each codebook.
        dropout: share of training samples that keep only their first levels.
        beta: weight of the commitment loss.
        update: how codes learn: ema, moving averages, or gradient.
        decay: decay rate of the moving averages.
        dead_below: mean rows per batch below which a code moves to a row; at most rows / 2K where rows <= K; 0: never.
        estimator: how the gradient passes through the quantiser: ste, rotation, gumbel or diveq.
        data_init: initialise the codes by k-means on the first training batch, each level on the residuals.
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
        levels: int = 2,
        codebook_size: int = 32,
        dropout: float = 0.0,
        beta: float = 0.25,
        update: str = "ema",
        decay: float = 0.99,
        dead_below: float = 1.0,
        estimator: str = "ste",
        data_init: bool = True,
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
        at_least(1, levels=levels, codebook_size=codebook_size)
        self.beta = beta
        self.build_nets(net, (latent_dim, latent_dim), hidden_dims, activation, places)
        self.quantiser = ResidualVQ(
            latent_dim,
            levels,
            codebook_size,
            dropout=dropout,
            update=update,
            decay=decay,
            dead_below=dead_below,
            estimator=estimator,
        )
        if data_init:
            self.enable_data_init()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        loss = nll + self.beta * terms["commitment"] + terms.get("codebook", 0)
        return {"loss": loss, "nll": nll, **terms}
