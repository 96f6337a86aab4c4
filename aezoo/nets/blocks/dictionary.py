"""Dictionaries: decoders of sparse codes with unit-norm directions, and their training.

    x_hat = sum_i f_i d_i + b     ||d_i|| = 1

`UnitNorm` keeps the norm during training. It removes the gradient along each direction before the optimiser's step, so
that Adam's moments hold none of it, and normalises the directions after the step (Bricken et al. 2023, Gao et al. 2024,
section A.1).

Shapes: B batch, X data dimensions, N latents, k active ones.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.training.projected_weights import Constrained

DECODES = ("auto", "dense", "gather")
# latents per active latent from which gathering rows beats the dense product, forward and backward, by device: the
# output of `python -m benchmarks.gather` (benchmarks/results/gather-*.csv); dense on devices that are not measured
CROSSOVER = {"cpu": 32}
_MEDIAN_STEPS = 1000


class Dictionary(nn.Module):
    """f -> W f + b with unit-norm directions d_i, the rows of W_NX.

    Args:
        latent_dim: N, number of directions.
        input_shape: shape of one sample and of the output.
        decode: how `decode_sparse` sums: dense multiplies the whole code by the whole dictionary, gather reads only the
            rows of active latents, auto takes the faster one for their number.
    """

    def __init__(self, latent_dim: int, input_shape: tuple[int, ...], decode: str = "auto") -> None:
        super().__init__()
        if decode not in DECODES:
            raise AezooError(f"decode must be one of {', '.join(DECODES)}, got {decode!r}")
        x_dim = math.prod(input_shape)
        self.input_shape, self.decode = input_shape, decode
        self.W_NX = nn.Parameter(nn.functional.normalize(torch.randn(latent_dim, x_dim), dim=1))
        self.b_X = nn.Parameter(torch.zeros(x_dim))

    def directions(self) -> Tensor:
        """d_i, the rows, (N, X)."""
        return self.W_NX

    def forward(self, f_BN: Tensor) -> Tensor:
        """x_hat of a whole code, (B, N) -> (B, *input_shape)."""
        return self.with_bias(F.linear(f_BN, self.directions().t()))

    def decode_sparse(self, values_Bk: Tensor, index_Bk: Tensor) -> Tensor:
        """x_hat of a code given as its active latents, (B, k), (B, k) -> (B, *input_shape)."""
        return self.with_bias(self.sum_of_directions(values_Bk, index_Bk))

    def with_bias(self, sum_BX: Tensor) -> Tensor:
        """Add b, (B, X) -> (B, *input_shape)."""
        return (sum_BX + self.b_X).unflatten(1, self.input_shape)

    def sum_of_directions(self, values_Bk: Tensor, index_Bk: Tensor) -> Tensor:
        """sum_j values_j d_{index_j} without b, as for a residual, (B, k), (B, k) -> (B, X)."""
        d_NX = self.directions()
        if not self.uses_gather(index_Bk.shape[1]):
            return F.linear(scatter_code(values_Bk, index_Bk, len(d_NX)), d_NX.t())
        # half precision lacks a backward on some devices, and k small numbers must be added exactly
        dtype = torch.promote_types(d_NX.dtype, torch.float32)
        sum_BX = nn.functional.embedding_bag(
            index_Bk, d_NX.to(dtype), per_sample_weights=values_Bk.to(dtype), mode="sum"
        )
        return sum_BX.to(d_NX.dtype)

    def uses_gather(self, k: int) -> bool:
        """Whether rows are gathered for k active latents."""
        if self.decode == "auto":
            return len(self.W_NX) >= CROSSOVER.get(self.W_NX.device.type, math.inf) * k
        return self.decode == "gather"

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Remove the gradient along each direction: the normalisation would undo a step along it."""
        grad_NX, d_NX = self.W_NX.grad, self.W_NX
        if grad_NX is not None:
            grad_NX -= (grad_NX * d_NX).sum(1, keepdim=True) * d_NX

    @torch.no_grad()
    def normalise(self) -> None:
        """Give each direction unit norm."""
        self.W_NX.copy_(nn.functional.normalize(self.W_NX, dim=1))


class FreeDictionary(Dictionary):
    """Directions whose norm is trained; they start with norm 1.

    In https://transformer-circuits.pub/2024/april-update they start at 0.1; with Adam at a learning rate of 3e-3, all
    latents would then die within five steps.
    """

    def remove_parallel_gradient(self) -> None:
        """Do nothing."""

    def normalise(self) -> None:
        """Do nothing."""


class UnitNorm(Constrained):
    """Mixin, placed before `Autoencoder`, for models with a `Dictionary` as decoder: unit norm and dead latents.

    Attributes:
        decoder: the dictionary.
        since_fired_N: samples of all ranks since each latent fired.
    """

    decoder: Dictionary
    input_shape: tuple[int, ...]
    since_fired_N: Tensor

    def init_dictionary_training(self, latent_dim: int, dead_after: int, data_init: bool) -> None:
        """Set the counters and buffers of training; for constructors.

        Args:
            latent_dim: N, number of latents.
            dead_after: a latent is dead when it has not fired for this many samples.
            data_init: whether the first training batch initialises the parameters.
        """
        self.dead_after = dead_after
        self.register_buffer("since_fired_N", torch.zeros(latent_dim, dtype=torch.long))
        if data_init:
            self.enable_data_init()  # type: ignore[operator]

    def target_shape(self) -> tuple[int, ...]:
        """Shape of the data that one code explains: a sample, unless a sample holds several codes."""
        return self.input_shape

    @property
    def dead_N(self) -> Tensor:
        """Which latents are dead."""
        return self.since_fired_N >= self.dead_after

    @torch.no_grad()
    def update_firing(self, f_BN: Tensor) -> None:
        """In training, add this batch of all ranks to the samples since each latent fired."""
        if self.training:
            fired_N = (f_BN != 0).any(0).long()
            samples = len(f_BN)
            if self._across_ranks():  # type: ignore[operator]
                dist.all_reduce(fired_N, op=dist.ReduceOp.MAX)
                samples *= dist.get_world_size()
            self.since_fired_N.add_(samples).mul_(1 - fired_N)

    def usage_terms(self, f_BN: Tensor) -> dict[str, Tensor]:
        """Count the batch; return the mean number of active latents per sample and the share of dead ones."""
        self.update_firing(f_BN)
        return {"l0": (f_BN != 0).sum(1).float().mean(), "dead_latents": self.dead_N.float().mean()}

    def init_from_data(self, x: Tensor) -> None:
        """Initialise parameters from samples of all ranks, (N, *input_shape): b at their geometric median."""
        self.decoder.b_X.copy_(geometric_median(x.flatten(1)))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not isinstance(self.decoder, FreeDictionary):
            self.check_averages()

    def check_averages(self) -> None:
        """Refuse averages of the weights that do not project them: a mean of directions is shorter than 1.

        Raises:
            AezooError: a callback of the trainer or a schedule-free optimiser averages so.
        """
        averaging = [
            type(callback).__name__
            for callback in self.trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging)
            and not getattr(callback, "projects_weights", False)
        ]
        # schedulefree's optimisers switch to their average by `eval()`
        averaging += [
            type(optimizer).__name__
            for optimizer in self.trainer.optimizers
            if callable(getattr(optimizer, "eval", None))
        ]
        if averaging:
            raise AezooError(
                f"{averaging[0]} averages directions of norm 1 to shorter ones: take aezoo.callbacks.EMA "
                f"(--ema.decay 0.999), which gives them norm 1 again"
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.decoder.remove_parallel_gradient()

    def after_optimizer_step(self) -> None:
        """Give each direction unit norm again."""
        self.decoder.normalise()


def top_k(pi_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row after a ReLU, and their indices, (B, N) -> (B, k), (B, k)."""
    values_Bk, index_Bk = pi_BN.topk(k, dim=1)
    return values_Bk.relu(), index_Bk


def scatter_code(values_Bk: Tensor, index_Bk: Tensor, latent_dim: int) -> Tensor:
    """The whole code for given active latents, zero elsewhere, (B, k), (B, k) -> (B, N)."""
    zeros_BN = values_Bk.new_zeros(values_Bk.shape[0], latent_dim)  # len would fix the batch in an export
    return zeros_BN.scatter(1, index_Bk, values_Bk)


@torch.no_grad()
def resample_dead(
    encoder: nn.Linear,
    decoder: Dictionary,
    dead_N: Tensor,
    x_nX: Tensor,
    y_nX: Tensor,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Restart n dead latents, each from one sample (Bricken et al. 2023, "neuron resampling").

    The direction of a latent becomes that of its sample. So does its encoder row, with a fifth of the live rows' norm.
    Its encoder bias and the optimiser's moments become 0.

    Args:
        encoder: the layer that reads samples.
        decoder: the dictionary.
        dead_N: which latents are dead, n of them.
        x_nX: the encoder's inputs for the samples.
        y_nX: the decoder's targets.
        optimizer: the optimiser of both.
    """
    W, b, D = encoder.weight, encoder.bias, decoder.W_NX
    live_N = ~dead_N if len(x_nX) < len(dead_N) else dead_N
    W[dead_N] = 0.2 * W[live_N].norm(dim=1).mean() * nn.functional.normalize(x_nX, dim=1)
    D[dead_N] = D[live_N].norm(dim=1).mean() * nn.functional.normalize(y_nX - decoder.b_X, dim=1)
    b[dead_N] = 0
    for parameter in (W, b, D):
        for moment in optimizer.state.get(parameter, {}).values():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                moment[dead_N] = 0


def project_to_simplex(v_NP: Tensor) -> Tensor:
    """The nearest rows that are at least 0 and sum to 1 (Duchi et al. 2008), (N, P) -> (N, P)."""
    v_NP = v_NP.to(torch.promote_types(v_NP.dtype, torch.float32))
    rank_P = torch.arange(1, v_NP.shape[1] + 1, device=v_NP.device)
    excess_NP = (v_NP.sort(1, descending=True).values.cumsum(1) - 1) / rank_P
    return (v_NP - excess_NP.amax(1, keepdim=True)).relu()


@torch.no_grad()
def geometric_median(x_BX: Tensor) -> Tensor:
    """The point with the least summed distance to the rows, (B, X) -> (X,).

    Uses Weiszfeld's iteration, with Vardi & Zhang's step (2000) at the rows themselves, where the plain iteration
    divides by 0 or stalls. Runs in float64 on the CPU, so that all ranks get the same bits.
    """
    x_NX = x_BX.cpu().double()
    m_X = x_NX.mean(0)
    tolerance = 1e-12 * float((x_NX - m_X).norm(dim=1).max())
    for _ in range(_MEDIAN_STEPS):
        distance_N = (x_NX - m_X).norm(dim=1)
        apart_N = distance_N > tolerance
        if not apart_N.any():
            break
        weight_N = torch.where(apart_N, 1 / distance_N, 0.0)
        pull_X = weight_N @ (x_NX - m_X)
        here, pull = float((~apart_N).sum()), float(pull_X.norm())
        if pull <= here:  # no other point is better
            break
        step_X = (1 - here / pull) * pull_X / weight_N.sum()
        m_X = m_X + step_X
        if float(step_X.norm()) <= tolerance:
            break
    return m_X.to(x_BX)
