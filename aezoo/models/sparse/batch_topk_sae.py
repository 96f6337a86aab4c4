"""BatchTopK sparse autoencoder (Bussmann et al. 2024), https://arxiv.org/abs/2412.06410

The code of a batch of n samples, over all ranks, keeps its k n largest pre-activations, so that each sample uses as
many latents as it needs:

    pi = W_enc (x - b_pre) + b_enc     f = relu(batchtopk_kn(pi))     x_hat = W_dec f + b_pre     ||d_i|| = 1
    L = -log p(x | x_hat) + alpha s ||e - e_hat||^2     AuxK and its s as in TopK
    theta = running mean of the least positive f of each batch

L is in nats per sample. Codes, scores and evaluation do not depend on a batch: f = relu(pi) where pi >= theta, else 0.

Shapes: B batch, X data dimensions, N latents.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.errors import AezooError
from aezoo.models.sparse.topk_sae import TopKSAE


class RunningMean(nn.Module):
    """Running mean, exponential from 1 / (1 - decay) steps on; stays float32 in a model of bf16.

    In bf16, a step smaller than 1/256 of the value would not change it.
    """

    value: Tensor
    steps: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("value", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, value: Tensor) -> None:
        """Add a value; infinity means that there is none."""
        seen = value.isfinite()
        self.steps.add_(seen)
        rate = (1 / self.steps.clamp(min=1)).clamp(min=1 - self.decay)
        self.value.copy_(torch.where(seen, self.value.lerp(value.to(self.value), rate.to(self.value)), self.value))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        value = self.value
        super()._apply(fn, recurse)
        if self.value.dtype in (torch.bfloat16, torch.float16):
            self.value = value.to(self.value.device)
        return self


class BatchTopKSAE(TopKSAE):
    """At most k active latents per sample on average, many for some samples and few for others.

    Args:
        input_shape: shape of one sample; any, it is flattened.
        latent_dim: N, number of latents in the dictionary.
        k: active latents per sample, averaged over the batch; fewer if fewer pre-activations are positive.
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
        if not 0 <= theta_decay < 1:
            raise AezooError(f"theta_decay must be at least 0 and below 1, got {theta_decay}")
        self.theta = RunningMean(theta_decay)

    def encode(self, x: Tensor) -> Tensor:
        return self.above_threshold(self.pre_activations(x))

    def above_threshold(self, pi_BN: Tensor) -> Tensor:
        """The code, independent of other samples, (B, N) -> (B, N)."""
        return torch.where(pi_BN >= self.theta.value, pi_BN, 0).relu()

    def top_of_batch(self, pi_BN: Tensor, k: int) -> Tensor:
        """The k n largest of all ranks' n samples after a ReLU; updates theta with the least, (B, N) -> (B, N)."""
        with torch.no_grad():
            n = len(self.all_gather_batch(pi_BN[:, 0]))
            own_M, where_M = at_least_float32(pi_BN).flatten().topk(min(k * n, pi_BN.numel()))
            all_M = self.all_gather_batch(own_M)
            values, chosen = all_M.topk(k * n)
            self.theta.update(torch.where(values > 0, values, torch.inf).min())
            # by position, not by value: several may be equal in bf16
            chosen_M = torch.zeros_like(all_M, dtype=torch.bool).scatter(0, chosen, True)[self.local_rows(own_M)]
            kept = torch.zeros_like(pi_BN, dtype=torch.bool).flatten().scatter(0, where_M, chosen_M)
        return torch.where(kept.view_as(pi_BN), pi_BN, 0).relu()

    def reconstruct(self, pi_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
        f_BN = self.top_of_batch(pi_BN, k) if self.training else self.above_threshold(pi_BN)
        return f_BN, self.decoder(f_BN)
