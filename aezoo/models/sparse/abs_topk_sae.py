"""AbsTopK sparse autoencoder (Zhu et al. 2025), https://arxiv.org/abs/2510.00404

The k pre-activations with the largest absolute values form the code and keep their signs, so that one direction of the
dictionary covers both poles of what it represents:

    pi = W_enc (x - b_pre) + b_enc     f_i = pi_i where |pi_i| is among the k largest, else 0
    x_hat = W_dec f + b_pre     ||d_i|| = 1
    L = -log p(x | x_hat) + alpha s ||e - e_hat||^2     AuxK and its s as in TopK, e_hat by absolute value too

L is in nats per sample. This is a step of the proximal gradient for at most k entries of any sign (hard thresholding);
TopK takes entries of at least 0. If the k largest are positive, both are the same. A latent fires if it is not 0.

Shapes: B batch, N latents, k active ones.
"""

from torch import Tensor

from aezoo.models.sparse.topk_sae import TopKSAE


class AbsTopKSAE(TopKSAE):
    """At most k active latents per sample, of either sign, from a wide dictionary of unit-norm directions.

    Args:
        input_shape: shape of one sample; any, it is flattened.
        latent_dim: N, number of latents in the dictionary.
        k: active latents per sample.
        k_aux: dead latents that model the residual; half of the data dimensions if 0.
        aux_weight: alpha, weight of the auxiliary loss.
        aux_scale: sse or variance, what the auxiliary loss is measured in.
        dead_after: a latent is dead when it has not fired for this many samples.
        multi_weight: weight of the loss with 4k active latents; 1/8 in Multi-TopK, 0 leaves it out.
        data_init: start the bias and the encoder's scale from the first batch of training.
        decode: dense, gather or auto: multiply by the whole dictionary, read the active latents' rows, or the faster.
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
        k: int = 16,
        k_aux: int = 0,
        aux_weight: float = 1 / 32,
        aux_scale: str = "sse",
        dead_after: int = 20_000,
        multi_weight: float = 0.0,
        data_init: bool = False,
        decode: str = "auto",
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
            k=k,
            k_aux=k_aux,
            aux_weight=aux_weight,
            aux_scale=aux_scale,
            dead_after=dead_after,
            multi_weight=multi_weight,
            data_init=data_init,
            decode=decode,
            likelihood=likelihood,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            warmup_steps=warmup_steps,
        )
        self.save_hyperparameters()

    def active(self, pi_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
        index_Bk = pi_BN.abs().topk(k, dim=1).indices
        return pi_BN.gather(1, index_Bk), index_Bk
