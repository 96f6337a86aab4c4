"""Autoencoder with a triplet loss on its codes (Schroff et al. 2015), https://arxiv.org/abs/1503.03832

    L = -log p(x | g(z)) + lambda T     z = f(x)
    T = mean over triplets of max(0, ||z_a - z_p|| - ||z_a - z_n|| + m)

L is in nats per sample. An anchor a must be nearer, by the margin m, to each positive p (another sample with its label)
than to a negative n (a sample with another label). The distance is not squared (Hermans et al. 2017,
https://arxiv.org/abs/1703.07737). Triplets are mined in the batch of all ranks:

    all         every triplet
    active      every triplet whose loss is above 0; the others do not count in the mean (Hermans et al. 2017)
    semi_hard   for each a and p, the nearest n that is farther than p, or the farthest n if there is none (section 3.2)

Samples without a label (-1) are in no triplet. If there are no triplets, T is 0 and this is the plain autoencoder.

Shapes: B batch on this rank, D code.
"""

import torch
from torch import Tensor

from aezoo import nets
from aezoo.autoencoder import at_least_float32
from aezoo.bases.triplet import TripletAutoencoder
from aezoo.errors import AezooError


class TripletAE(TripletAutoencoder):
    """Codes of samples with the same label lie together; encoding and scores never use labels.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: D, size of the code.
        triplet_weight: lambda, weight of the triplet loss.
        margin: m, how much farther than the positives the negatives must be.
        mining: which triplets of a batch count: all, active or semi_hard.
        net: mlp, conv, resnet, convnext, conv_keras, unet, gdn, dc, vit, mixer, lstm or transformer.
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
        latent_dim: int = 16,
        triplet_weight: float = 10.0,
        margin: float = 1.0,
        mining: str = "active",
        net: str = "mlp",
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
        self.set_triplet_loss(triplet_weight, margin, mining)
        self.code_shape = (latent_dim,)
        self.encoder = nets.encoder(net, self.input_shape, self.code_shape, hidden_dims, activation)
        self.decoder = nets.decoder(net, self.code_shape, self.input_shape, hidden_dims[::-1], activation)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BD = self.encoder(x)
        nll = self.nll(self.decoder(z_BD), x).mean()
        triplet = torch.zeros_like(nll) if y is None else self.triplet_loss(at_least_float32(z_BD), y)
        return {"loss": nll + self.triplet_weight * triplet, "nll": nll, "triplet": triplet}
