"""BatchTopK sparse autoencoder (Bussmann et al. 2024), https://arxiv.org/abs/2412.06410

The k n largest pre-activations of a batch of n samples, over all ranks, form the code, so that samples may have
different numbers of active latents:

    pi = W_enc (x - b_pre) + b_enc     f = relu(batchtopk_kn(pi))     x_hat = W_dec f + b_pre     ||d_i|| = 1
    L = -log p(x | x_hat) + alpha s ||e - e_hat||^2     AuxK and its s as in TopK
    theta = running mean of the smallest positive f of each batch

L is in nats per sample. Codes, scores and evaluation are independent of the batch: f = relu(pi) where pi >= theta, else
0.

The authors' code has no factor s, and its AuxK does not detach e. On digits of 8x8 (256 latents, k = 4,
dead_after = 2000, 1,400 steps, means of 3 seeds; `python -m benchmarks.deviations`), the squared error per pixel of
held-out digits is 0.0163 without and 0.0161 with detaching, with 124 active latents in both cases.
"""

from collections.abc import Callable
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.errors import AezooError
from aezoo.models.sparse.topk_sae import TopKSAE, TopKVariantArgs
from aezoo.training.precision import buffers_kept_in_float32


class RunningMean(nn.Module):
    """Running mean, exponential after 1 / (1 - decay) steps; float32 even in a bf16 model.

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
        """Add a value; an infinite value is ignored."""
        seen = value.isfinite()
        self.steps.add_(seen)
        rate = (1 / self.steps.clamp(min=1)).clamp(min=1 - self.decay)
        self.value.copy_(torch.where(seen, self.value.lerp(value.to(self.value), rate.to(self.value)), self.value))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        with buffers_kept_in_float32(self, ("value",)):
            super()._apply(fn, recurse)
        return self


class BatchTopKSAEArgs(TopKVariantArgs, total=False):
    """Arguments of `BatchTopKSAE`."""

    theta_decay: float


class BatchTopKSAE(TopKSAE, tags=("interpretability",)):
    """At most k active latents per sample on average, more for some samples and fewer for others.

    Args:
        k: active latents per sample, averaged over the batch; fewer if fewer pre-activations are positive.
        theta_decay: decay of the running mean of the threshold.
        **kwargs: see `TopKSAE`.
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, theta_decay: float = 0.99, **kwargs: Unpack[TopKVariantArgs]
    ) -> None:
        super().__init__(input_shape, **kwargs)
        if not 0 <= theta_decay < 1:
            raise AezooError(f"theta_decay must be at least 0 and below 1, got {theta_decay}")
        self.theta = RunningMean(theta_decay)

    def latents(self, x: Tensor) -> Tensor:
        return self.above_threshold(self.pre_activations(x))

    def above_threshold(self, pi_BN: Tensor) -> Tensor:
        """Return the code, independent of other samples, (B, N) -> (B, N)."""
        return torch.where(pi_BN >= self.theta.value, pi_BN, 0).relu()

    def top_of_batch(self, pi_BN: Tensor, k: int) -> Tensor:
        """Keep the k n largest of all ranks' n samples, apply ReLU, and update theta, (B, N) -> (B, N)."""
        with torch.no_grad():
            n = len(self.all_gather_batch(pi_BN[:, 0]))
            own_M, where_M = at_least_float32(pi_BN).flatten().topk(min(k * n, pi_BN.numel()))
            all_M = self.all_gather_batch(own_M)
            values, chosen = all_M.topk(k * n)
            self.theta.update(torch.where(values > 0, values, torch.inf).min())
            # selected by position, not by value: several values may be equal in bf16
            chosen_M = torch.zeros_like(all_M, dtype=torch.bool).scatter(0, chosen, True)[self.local_rows(own_M)]
            kept = torch.zeros_like(pi_BN, dtype=torch.bool).flatten().scatter(0, where_M, chosen_M)
        return torch.where(kept.view_as(pi_BN), pi_BN, 0).relu()

    def reconstruct(self, pi_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
        f_BN = self.top_of_batch(pi_BN, k) if self.training else self.above_threshold(pi_BN)
        return f_BN, self.decoder(f_BN)
