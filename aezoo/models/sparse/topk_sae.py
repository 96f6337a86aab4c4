"""TopK sparse autoencoder (Gao et al. 2024), https://arxiv.org/abs/2406.04093

The k largest pre-activations form the code; latents that have been inactive for long are trained on the residual:

    pi = W_enc (x - b_pre) + b_enc     f = relu(topk_k(pi))     x_hat = W_dec f + b_pre     ||d_i|| = 1
    L = -log p(x | x_hat) + alpha s ||e - e_hat||^2     e = stop(x - x_hat)
    e_hat = W_dec relu(topk_k_aux(pi of the dead latents))

s = min(dead / k_aux, 1), so AuxK (section A.2) is 0 if no latent is dead. L is in nats per sample: a squared error is
the -log p of a Gaussian of variance 1/2. The authors' code divides the first error by Var(x) and the second by Var(e);
with aux_scale variance, AuxK is multiplied by Var(x) / Var(e), which gives the same ratio. Multi-TopK adds
1/8 -log p(x | x_hat), with 4k active latents. The gradient's component parallel to each direction is removed before
each step, and the direction is normalised after it (section A.1). With data_init, b_pre is initialised to the geometric
median of the first batch of all ranks, and the encoder is scaled so that x_hat is as far from b_pre as x.

The factor s is from EleutherAI's sparsify; it is 1 in the paper. The authors' code adds b_pre to e_hat and a detached
b_pre to e: the value is the same, but b_pre receives a gradient. Of 64 latents (digits of 8x8, k = 4, k_aux = 32,
dead_after = 2000, 1,400 steps, means of 3 seeds; `python -m benchmarks.deviations`), 4.3 are dead at the end, 1.0 with
s = 1, and 4.7 with their gradient, at squared errors of 0.0176, 0.0171 and 0.0176 per pixel of held-out digits.

With input_norm, each sample is normalised (section 2.1), and the loss is that of the normalised sample. With
unit_norm=False, directions may have any norm, as in weights of SAELens; the k largest pi are selected regardless of it.

Shapes: B batch, X data dimensions, N latents, k active latents.
"""

import math
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.errors import AezooError
from aezoo.nets.blocks.dictionary import Dictionary, InputNorm, UnitNorm, scatter_code, top_k
from aezoo.training.arguments import TrainingArgs
from aezoo.training.tracing import is_tracing


class SparsityArgs(TrainingArgs, total=False):
    """Arguments of `TopKSAE` that all variants accept."""

    latent_dim: int
    k: int
    k_aux: int
    aux_weight: float
    aux_scale: str
    dead_after: int


class TopKSAEArgs(SparsityArgs, total=False):
    """Arguments of `TopKSAE` that variants with a bias accept."""

    data_init: bool


class TopKVariantArgs(TopKSAEArgs, total=False):
    """Arguments of `TopKSAE` except multi_weight and decode."""

    unit_norm: bool
    input_norm: str


class TopKSAE(
    InputNorm, UnitNorm, Autoencoder, defaults={"likelihood": "gaussian"}, sparse_code=True, tags=("interpretability",)
):
    """At most k active latents per sample, from a wide dictionary of unit-norm directions.

    Args:
        input_shape: shape of one sample; any shape is valid, samples are flattened.
        latent_dim: N, number of latents in the dictionary.
        k: active latents per sample; fewer if fewer pre-activations are positive.
        k_aux: maximum number of dead latents that reconstruct the residual; if 0, half of the data dimensions.
        aux_weight: alpha, weight of the auxiliary loss.
        aux_scale: scale of the auxiliary loss: sse, the squared error, or variance, multiplied by Var(x) / Var(e).
        dead_after: a latent is dead if it has not been active for this many samples.
        multi_weight: weight of the loss with 4k active latents; 1/8 in the paper's Multi-TopK, 0 disables it.
        data_init: initialise the bias and the encoder's scale from the first training batch.
        unit_norm: normalise the directions after each training step.
        input_norm: none, layer_norm or rms_norm: normalise each sample, see `aezoo.nets.blocks.dictionary.InputNorm`.
        decode: dense, a product with the whole dictionary; gather, a sum of the active latents' directions; or auto,
            the faster of the two.
        **kwargs: see `Autoencoder`.
    """

    decoder: Dictionary

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
        unit_norm: bool = True,
        input_norm: str = "none",
        decode: str = "auto",
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.latent_dim = latent_dim
        if not 1 <= k <= latent_dim:
            raise AezooError(f"k must lie between 1 and latent_dim={latent_dim}, got {k}")
        if k_aux < 0 or dead_after < 1 or not 0 <= aux_weight < math.inf or not 0 <= multi_weight < math.inf:
            raise AezooError("k_aux, aux_weight and multi_weight must be at least 0 and dead_after at least 1")
        if aux_scale not in ("sse", "variance"):
            raise AezooError(f"aux_scale must be sse or variance, got {aux_scale!r}")
        self.k = k
        self.aux_weight = aux_weight
        self.aux_scale = aux_scale
        self.multi_weight = multi_weight
        self.k_aux = min(k_aux or max(1, math.prod(self.target_shape()) // 2), latent_dim)
        self.init_input_norm(input_norm, latent_dim, self.likelihood.unit_interval)
        self.encoder = nn.Linear(math.prod(self.target_shape()), latent_dim)
        self.decoder = Dictionary(latent_dim, self.target_shape(), decode, unit_norm)
        self.encoder.weight.data.copy_(self.decoder.W_NX)
        nn.init.zeros_(self.encoder.bias)
        self.init_dictionary_training(latent_dim, dead_after, data_init)

    def pre_activations(self, x: Tensor) -> Tensor:
        """Return pi, (B, *input_shape) -> (B, N)."""
        pi: Tensor = self.encoder(x.flatten(1) - self.decoder.b_X)
        return pi

    def active(self, pi_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the values of at most k active latents and their indices, (B, N) -> (B, k), (B, k)."""
        return top_k(pi_BN, k)

    def latents(self, x: Tensor) -> Tensor:
        return scatter_code(*self.active(self.pre_activations(x), self.k), self.latent_dim)

    def reconstruct(self, pi_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the code of the k largest and the decoder's output, (B, N) -> (B, N), (B, *input_shape)."""
        active = self.active(pi_BN, k)
        return scatter_code(*active, self.latent_dim), self.decoder.decode_sparse(*active)

    def aux(self, x: Tensor, x_hat: Tensor, pi_BN: Tensor) -> Tensor:
        """Return AuxK, scaled according to aux_scale, (B, *input_shape), (B, *input_shape), (B, N) -> (B,)."""
        if pi_BN.device.type == "cpu" and not (is_tracing() or self.dead_N.any()):
            return at_least_float32(pi_BN.new_zeros(len(pi_BN)))  # same value; on a GPU, the check would synchronise
        e_BX = (x - self.likelihood.mean(x_hat)).detach().flatten(1)
        e_hat_BX = self.decoder.sum_of_directions(*self.active(pi_BN.masked_fill(~self.dead_N, 0), self.k_aux))
        aux_B = at_least_float32(e_BX - e_hat_BX).square().sum(1) * (self.dead_N.sum() / self.k_aux).clamp(max=1)
        if self.aux_scale == "sse":
            return aux_B
        ratio = self.variance(x.flatten(1)) / self.variance(e_BX)
        return aux_B * ratio.clamp(max=1e6)  # finite if the residual is 0

    def variance(self, v_BX: Tensor) -> Tensor:
        """Return the variance over all ranks, summed over dimensions and clamped above 0, (B, X) -> ()."""
        off_BX = at_least_float32(v_BX) - self.batch_mean(v_BX)
        return self.batch_mean(off_BX.square()).sum().clamp(min=torch.finfo(off_BX.dtype).tiny)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        x = self.normalised(x)
        pi_BN = self.pre_activations(x)
        f_BN, x_hat = self.reconstruct(pi_BN, self.k)
        nll_B, usage = self.nll(x_hat, x), self.usage_terms(f_BN)
        aux_B = self.aux(x, x_hat, pi_BN)
        terms = {"loss": (nll_B + self.aux_weight * aux_B).mean(), "nll": nll_B.mean(), "aux": aux_B.mean(), **usage}
        if self.multi_weight:
            terms["multi"] = self.nll(self.reconstruct(pi_BN, min(4 * self.k, self.latent_dim))[1], x).mean()
            terms["loss"] = terms["loss"] + self.multi_weight * terms["multi"]
        return terms

    def init_from_data(self, x: Tensor) -> None:
        x = self.normalised(x)
        super().init_from_data(x)
        sum_BX = self.decoder.sum_of_directions(*self.active(self.pre_activations(x), self.k))
        scale = (x.flatten(1) - self.decoder.b_X).norm(dim=1).mean() / sum_BX.norm(dim=1).mean()
        for parameter in self.encoder.parameters():
            parameter.mul_(scale if scale.isfinite() else 1)
