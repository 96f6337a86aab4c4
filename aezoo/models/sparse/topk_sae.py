"""TopK sparse autoencoder (Gao et al. 2024), https://arxiv.org/abs/2406.04093

The k largest pre-activations form the code; latents that have not fired for long are trained on what is left over:

    pi = W_enc (x - b_pre) + b_enc     f = relu(topk_k(pi))     x_hat = W_dec f + b_pre     ||d_i|| = 1
    L = -log p(x | x_hat) + alpha s ||e - e_hat||^2     e = stop(x - x_hat)
    e_hat = W_dec relu(topk_k_aux(pi of the dead latents))

with s = min(dead / k_aux, 1), so AuxK (section A.2) vanishes when no latent is dead, in nats per sample. The decoder's
rows are normalised after each step, and the gradient along them is removed before it (section A.1).

Shapes: B batch, X data dimensions, N latents.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.errors import AezooError


class Dictionary(nn.Module):
    """f -> W f + b with directions d_i, the rows of W_NX, of unit norm."""

    def __init__(self, latent_dim: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        x_dim = math.prod(input_shape)
        self.input_shape = input_shape
        self.W_NX = nn.Parameter(nn.functional.normalize(torch.randn(latent_dim, x_dim), dim=1))
        self.b_X = nn.Parameter(torch.zeros(x_dim))

    def forward(self, f_BN: Tensor) -> Tensor:
        return (f_BN @ self.W_NX + self.b_X).unflatten(1, self.input_shape)


class TopKSAE(Autoencoder):
    """At most k active latents a sample, from a wide dictionary of unit-norm directions.

    Args:
        input_shape: shape of one sample; any, it is flattened.
        latent_dim: N, number of latents in the dictionary.
        k: active latents a sample; fewer where fewer pre-activations are positive.
        k_aux: dead latents that model the residual; half of the data dimensions if 0.
        aux_weight: alpha, weight of the auxiliary loss.
        dead_after: a latent is dead when it has not fired for this many samples.
        likelihood: how outputs are compared with data: bernoulli, continuous_bernoulli, gaussian, gaussian:0.1,
            gaussian:learned, laplace, discretised_logistic.
        lr: learning rate.
        optimizer: adam, adamw, adamax, nadam, radam, rmsprop, adagrad, adadelta or sgd.
        weight_decay: the optimiser's weight decay.
        lr_schedule: constant, cosine, linear, exponential or step, from warm-up to the last step.
        warmup_steps: optimiser steps over which the learning rate rises linearly.
    """

    sparse_code = True
    decoder: Dictionary
    since_fired_N: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 512,
        k: int = 16,
        k_aux: int = 0,
        aux_weight: float = 1 / 32,
        dead_after: int = 20_000,
        likelihood: str = "gaussian",
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
        if not 1 <= k <= latent_dim:
            raise AezooError(f"k must lie between 1 and latent_dim={latent_dim}, got {k}")
        if k_aux < 0 or dead_after < 1 or not 0 <= aux_weight < math.inf:
            raise AezooError("k_aux and aux_weight must be at least 0 and dead_after at least 1")
        x_dim = math.prod(self.input_shape)
        self.k, self.aux_weight, self.dead_after = k, aux_weight, dead_after
        self.k_aux = min(k_aux or max(1, x_dim // 2), latent_dim)
        self.code_shape = (latent_dim,)
        self.encoder = nn.Linear(x_dim, latent_dim)
        self.decoder = Dictionary(latent_dim, self.input_shape)
        with torch.no_grad():
            self.encoder.weight.copy_(self.decoder.W_NX)
            self.encoder.bias.zero_()
        self.register_buffer("since_fired_N", torch.zeros(latent_dim, dtype=torch.long))

    def pre_activations(self, x: Tensor) -> Tensor:
        """pi, (B, *input_shape) -> (B, N)."""
        pi: Tensor = self.encoder(x.flatten(1) - self.decoder.b_X)
        return pi

    def top(self, pi_BN: Tensor, k: int) -> Tensor:
        """The k largest of each row after a ReLU, the rest zero, (B, N) -> (B, N)."""
        values_Bk, index_Bk = pi_BN.topk(k, dim=1)
        return torch.zeros_like(pi_BN).scatter(1, index_Bk, values_Bk.relu())

    def encode(self, x: Tensor) -> Tensor:
        return self.top(self.pre_activations(x), self.k)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        pi_BN = self.pre_activations(x)
        f_BN = self.top(pi_BN, self.k)
        x_hat = self.decoder(f_BN)
        nll_B = self.nll(x_hat, x)
        self.count(f_BN)
        dead_N = self.since_fired_N >= self.dead_after
        e_BX = (x - self.likelihood.mean(x_hat)).detach().flatten(1)
        f_aux_BN = self.top(pi_BN.masked_fill(~dead_N, -torch.inf), self.k_aux)
        e_hat_BX = f_aux_BN @ self.decoder.W_NX
        aux_B = at_least_float32(e_BX - e_hat_BX).square().sum(1) * (dead_N.sum() / self.k_aux).clamp(max=1)
        return {
            "loss": (nll_B + self.aux_weight * aux_B).mean(),
            "nll": nll_B.mean(),
            "aux": aux_B.mean(),
            "l0": (f_BN > 0).sum(1).float().mean(),
            "dead_latents": dead_N.float().mean(),
        }

    @torch.no_grad()
    def count(self, f_BN: Tensor) -> None:
        """In training, add this batch, over all ranks, to the samples since each latent fired."""
        if self.training:
            fired_N = (f_BN > 0).any(0).long()
            samples = len(f_BN)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(fired_N, op=dist.ReduceOp.MAX)
                samples *= dist.get_world_size()
            self.since_fired_N.add_(samples).mul_(1 - fired_N)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        grad_NX, d_NX = self.decoder.W_NX.grad, self.decoder.W_NX.detach()
        if grad_NX is not None:
            grad_NX -= (grad_NX * d_NX).sum(1, keepdim=True) * d_NX

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.decoder.W_NX.copy_(nn.functional.normalize(self.decoder.W_NX, dim=1))
