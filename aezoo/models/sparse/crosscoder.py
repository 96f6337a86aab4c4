"""Crosscoder (Lindsey et al. 2024), https://transformer-circuits.pub/2024/crosscoders

One code explains several streams at once: activations at several places of a network, or at one place of several
networks. The rows of a sample are its streams, x = (x^1, ..., x^S). The encoder sums over them, and each stream has its
own dictionary:

    f = relu(sum_s W_enc^s x^s + b_enc)     x_hat^s = sum_i f_i d_i^s + b^s
    L = -log p(x | x_hat) + lam sum_i f_i sum_s ||d_i^s||

L is in nats per sample, with the likelihood summed over the streams. The sum of norms, unlike the norm over all streams
together, lets a latent belong to one stream alone. S = 1 is the form of April 2024 of sae_l1.

Shapes: B batch, S streams, X data dimensions of all streams, N latents.
"""

from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.models.sparse.sae_l1 import SAEL1


class Crosscoder(SAEL1):
    """Few latents are active for each sample, each with a direction in every stream.

    Args:
        input_shape: shape of one sample: (S, D) for S streams. Any shape is valid; if it has several dimensions, the
            first one counts the streams.
        latent_dim: N, number of latents.
        l1: lam, weight of the sum of activations, each times the norms of its directions.
        l1_steps: optimiser steps over which lam rises from 0; 0 uses all of it from the start.
        resample_steps: optimiser steps between restarts of dead latents; 0 leaves them dead.
        dead_after: a latent is dead when it has not fired for this many samples.
        data_init: start the bias at the geometric median of the first batch of training.
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
        latent_dim: int = 512,
        l1: float = 1.0,
        l1_steps: int = 0,
        resample_steps: int = 0,
        dead_after: int = 20_000,
        data_init: bool = False,
        likelihood: str = "gaussian",
        lr: float = 1e-3,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(
            input_shape,
            latent_dim=latent_dim,
            form="april",
            l1=l1,
            l1_steps=l1_steps,
            resample_steps=resample_steps,
            dead_after=dead_after,
            data_init=data_init,
            likelihood=likelihood,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            warmup_steps=warmup_steps,
        )
        self.save_hyperparameters()
        self.n_streams = self.input_shape[0] if len(self.input_shape) > 1 else 1

    def norms(self) -> Tensor:
        """||d_i^s||, which shows the streams of each latent, (N, S)."""
        return at_least_float32(self.decoder.W_NX).unflatten(1, (self.n_streams, -1)).norm(dim=2)

    def costs(self) -> Tensor:
        return self.norms().sum(1)
