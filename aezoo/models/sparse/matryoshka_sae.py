"""Matryoshka sparse autoencoder (Bussmann et al. 2025), https://arxiv.org/abs/2503.17547

Nested dictionaries: the first n_m latents alone must also reconstruct the data, for each prefix n_1 < ... < n_M = N, so
that early latents hold general features and later ones special features:

    f = relu(batchtopk_kn(W_enc (x - b_pre) + b_enc))     x_hat_m = sum_{i <= n_m} f_i d_i + b_pre     ||d_i|| = 1
    L = sum_m -log p(x | x_hat_m) + alpha s ||e - e_hat||^2     e of the whole dictionary; AuxK as in TopK

L is in nats per sample. One top-k over the whole dictionary serves all prefixes. Without fractions, this is BatchTopK.

Shapes: B batch, X data dimensions, N latents.
"""

from itertools import pairwise

import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.models.sparse.batch_topk_sae import BatchTopKSAE
from aezoo.speed.linear import linear


class MatryoshkaSAE(BatchTopKSAE):
    """A BatchTopK dictionary in which every prefix is a dictionary.

    Args:
        input_shape: shape of one sample; any, it is flattened.
        latent_dim: N, number of latents in the dictionary.
        k: active latents per sample, averaged over the batch; fewer if fewer pre-activations are positive.
        fractions: sizes of the prefixes before the whole dictionary, as rising shares of it between 0 and 1.
        theta_decay: share of itself that the threshold of evaluation keeps at each step, once it has seen enough.
        k_aux: dead latents that model the residual; half of the data dimensions if 0.
        aux_weight: alpha, weight of the auxiliary loss.
        aux_scale: sse or variance, what the auxiliary loss is measured in.
        dead_after: a latent is dead when it has not fired for this many samples.
        data_init: start the bias and the encoder's scale from the first batch of training.
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
        fractions: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2),
        theta_decay: float = 0.99,
        k_aux: int = 0,
        aux_weight: float = 1 / 32,
        aux_scale: str = "sse",
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
            k=k,
            theta_decay=theta_decay,
            k_aux=k_aux,
            aux_weight=aux_weight,
            aux_scale=aux_scale,
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
        if not all(a < b for a, b in pairwise((0, *fractions, 1))):
            raise AezooError(f"fractions must rise between 0 and 1, got {tuple(fractions)}")
        # small dictionaries have fewer prefixes
        self.prefixes = sorted({max(1, round(share * latent_dim)) for share in fractions} | {latent_dim})

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        pi_BN = self.pre_activations(x)
        f_BN = self.top_of_batch(pi_BN, self.k) if self.training else self.above_threshold(pi_BN)
        self.update_firing(f_BN)
        sum_BX, nlls = torch.zeros((), device=x.device), []
        for start, end in pairwise((0, *self.prefixes)):
            sum_BX = sum_BX + linear(f_BN[:, start:end], self.decoder.W_NX[start:end].t())
            x_hat = self.decoder.with_bias(sum_BX)
            nlls.append(self.nll(x_hat, x).mean())
        aux = self.aux(x, x_hat, pi_BN).mean()
        return {
            "loss": torch.stack(nlls).sum() + self.aux_weight * aux,
            "nll": nlls[-1],
            "prefix_nll": torch.stack(nlls).sum() - nlls[-1],
            "aux": aux,
            "l0": (f_BN > 0).sum(1).float().mean(),
            "dead_latents": self.dead_N.float().mean(),
        }
