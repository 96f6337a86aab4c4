"""Crosscoder (Lindsey et al. 2024), https://transformer-circuits.pub/2024/crosscoders

One code explains several streams at once: activations at several positions of a network, or at one position of several
networks. The rows of a sample are its streams, x = (x^1, ..., x^S). The encoder sums over them, and each stream has its
own dictionary:

    f = relu(sum_s W_enc^s x^s + b_enc)     x_hat^s = sum_i f_i d_i^s + b^s
    L = -log p(x | x_hat) + lam sum_i f_i sum_s ||d_i^s||

L is in nats per sample, with the likelihood summed over the streams. The sum of norms, unlike the norm over all streams
together, allows a latent to be used by only one stream. S = 1 is the form of April 2024 of sae_l1.

Shapes: B batch, S streams, X data dimensions of all streams, N latents.
"""

from typing import Unpack

from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.models.sparse.sae_l1 import SAEL1, SAEL1Args


class Crosscoder(SAEL1, tags=("interpretability",)):
    """Few latents are active for each sample, each with a direction in every stream.

    Args:
        input_shape: shape of one sample: (S, D) for S streams. Any shape is valid; if it has several dimensions, the
            first one is the number of streams.
        latent_dim: N, number of latents.
        l1: lam, weight of the sum of activations, each multiplied by the sum of the norms of its directions.
        resample_steps: optimiser steps between restarts of dead latents; 0 disables restarts.
        **kwargs: see `SAEL1`.
    """

    def __init__(self, input_shape: tuple[int, ...], *, resample_steps: int = 0, **kwargs: Unpack[SAEL1Args]) -> None:
        super().__init__(input_shape, form="april", resample_steps=resample_steps, **kwargs)
        self.n_streams = self.input_shape[0] if len(self.input_shape) > 1 else 1

    def norms(self) -> Tensor:
        """Return ||d_i^s||, which shows the streams that use each latent, (N, S)."""
        return at_least_float32(self.decoder.W_NX).unflatten(1, (self.n_streams, -1)).norm(dim=2)

    def costs(self) -> Tensor:
        return self.norms().sum(1)
