"""Dictionaries, which decode sparse codes, and their training.

    x_hat = sum_i f_i d_i + b     ||d_i|| = 1

`UnitNorm` keeps the norm during training. It removes the gradient along each direction before the optimiser's step, so
that it does not enter Adam's moments, and normalises the directions after the step (Bricken et al. 2023, Gao et al.
2024, section A.1).

Alternatively, directions may have any norm (https://transformer-circuits.pub/2024/april-update). `InputNorm` normalises
each sample before it is encoded.

Shapes: B batch, X data dimensions, N latents, k active ones.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.training.precision import at_least_float32
from aezoo.training.projected_weights import Constrained

DECODES = ("auto", "dense", "gather")
INPUT_NORMS = ("none", "layer_norm", "rms_norm")
# number of latents per active latent above which gathering rows is faster than the dense product, forward and
# backward, by device: the output of `python -m benchmarks.gather` (benchmarks/results/gather-*.csv); unmeasured devices
# use dense
CROSSOVER = {"cpu": 32}
_MEDIAN_STEPS = 1000
# as in the code of Gao et al. 2024, https://github.com/openai/sparse_autoencoder
_LAYER_NORM_EPS = 1e-5


class Dictionary(nn.Module):
    """f -> W f + b, where the directions d_i are the rows of W_NX, with initial norm 1.

    Args:
        latent_dim: N, number of directions.
        input_shape: shape of one sample and of the output.
        decode: how `decode_sparse` computes the sum: dense multiplies the whole code by the whole dictionary, gather
            reads only the rows of active latents, auto selects the faster one for their number.
        unit_norm: keep norm 1 in training; otherwise the norm is trained. In the April update it starts at 0.1; with
            Adam at a learning rate of 3e-3, all latents would then die within five steps.
    """

    def __init__(
        self, latent_dim: int, input_shape: tuple[int, ...], decode: str = "auto", unit_norm: bool = True
    ) -> None:
        super().__init__()
        if decode not in DECODES:
            raise AezooError(f"decode must be one of {', '.join(DECODES)}, got {decode!r}")
        x_dim = math.prod(input_shape)
        self.latent_dim, self.input_shape = latent_dim, input_shape
        self.decode, self.unit_norm = decode, unit_norm
        self.W_NX = nn.Parameter(nn.functional.normalize(torch.randn(latent_dim, x_dim), dim=1))
        self.b_X = nn.Parameter(torch.zeros(x_dim))

    def directions(self) -> Tensor:
        """Return the directions d_i as rows, (N, X)."""
        return self.W_NX

    def forward(self, f_BN: Tensor) -> Tensor:
        """Decode whole codes, (B, N) -> (B, *input_shape), and undo a normalisation by `InputNorm`."""
        n = self.latent_dim
        if f_BN.shape[1] == n:
            return self.with_bias(F.linear(f_BN, self.directions().t()))
        offset_B1, scale_B1 = f_BN[:, n:].split(1, 1)
        x_hat_BX = F.linear(f_BN[:, :n], self.directions().t()) + self.b_X
        return (x_hat_BX * scale_B1 + offset_B1).unflatten(1, self.input_shape)

    def decode_sparse(self, values_Bk: Tensor, index_Bk: Tensor) -> Tensor:
        """Decode codes given by their active latents, (B, k), (B, k) -> (B, *input_shape)."""
        return self.with_bias(self.sum_of_directions(values_Bk, index_Bk))

    def with_bias(self, sum_BX: Tensor) -> Tensor:
        """Add b, (B, X) -> (B, *input_shape)."""
        return (sum_BX + self.b_X).unflatten(1, self.input_shape)

    def sum_of_directions(self, values_Bk: Tensor, index_Bk: Tensor) -> Tensor:
        """Return sum_j values_j d_{index_j}, without b, (B, k), (B, k) -> (B, X)."""
        d_NX = self.directions()
        if not self.uses_gather(index_Bk.shape[1]):
            return F.linear(scatter_code(values_Bk, index_Bk, len(d_NX)), d_NX.t())
        # some devices have no backward pass in half precision, and sums of k small numbers must be exact
        dtype = torch.promote_types(d_NX.dtype, torch.float32)
        sum_BX = nn.functional.embedding_bag(
            index_Bk, d_NX.to(dtype), per_sample_weights=values_Bk.to(dtype), mode="sum"
        )
        return sum_BX.to(d_NX.dtype)

    def uses_gather(self, k: int) -> bool:
        """Return whether rows are gathered for k active latents."""
        if self.decode == "auto":
            return len(self.W_NX) >= CROSSOVER.get(self.W_NX.device.type, math.inf) * k
        return self.decode == "gather"

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Remove the gradient along each direction, since the normalisation would undo a step along it."""
        grad_NX, d_NX = self.W_NX.grad, self.W_NX
        if grad_NX is not None and self.unit_norm:
            grad_NX -= (grad_NX * d_NX).sum(1, keepdim=True) * d_NX

    @torch.no_grad()
    def normalise(self) -> None:
        """Give each direction unit norm."""
        if self.unit_norm:
            self.W_NX.copy_(nn.functional.normalize(self.W_NX, dim=1))


class UnitNorm(Constrained):
    """Mixin, before `Autoencoder`, for models with a `Dictionary` as decoder: unit norm and dead latents.

    Attributes:
        decoder: the dictionary.
        since_fired_N: number of samples, on all ranks, since each latent was last active.
    """

    decoder: Dictionary
    input_shape: tuple[int, ...]
    since_fired_N: Tensor

    def init_dictionary_training(self, latent_dim: int, dead_after: int, data_init: bool) -> None:
        """Set the counters and buffers of training; for constructors.

        Args:
            latent_dim: N, number of latents.
            dead_after: a latent is dead if it has been inactive for this many samples.
            data_init: whether the first training batch initialises the parameters.
        """
        self.dead_after = dead_after
        self.register_buffer("since_fired_N", torch.zeros(latent_dim, dtype=torch.long))
        if data_init:
            self.enable_data_init()  # type: ignore[operator]

    def target_shape(self) -> tuple[int, ...]:
        """Return the shape that one code reconstructs: a sample, unless a sample has several codes."""
        return self.input_shape

    @property
    def dead_N(self) -> Tensor:
        """Return which latents are dead."""
        return self.since_fired_N >= self.dead_after

    @torch.no_grad()
    def update_firing(self, f_BN: Tensor) -> None:
        """In training, update the number of samples, on all ranks, since each latent was last active."""
        if self.training:
            fired_N = (f_BN != 0).any(0).long()
            samples = len(f_BN)
            if self._across_ranks():  # type: ignore[operator]
                dist.all_reduce(fired_N, op=dist.ReduceOp.MAX)
                samples *= dist.get_world_size()
            self.since_fired_N.add_(samples).mul_(1 - fired_N)

    def usage_terms(self, f_BN: Tensor) -> dict[str, Tensor]:
        """Update the counters; return the mean number of active latents per sample and the fraction of dead latents."""
        self.update_firing(f_BN)
        return {"l0": (f_BN != 0).sum(1).float().mean(), "dead_latents": self.dead_N.float().mean()}

    def init_from_data(self, x: Tensor) -> None:
        """Initialise parameters from samples of all ranks, (N, *input_shape): b at their geometric median."""
        self.decoder.b_X.copy_(geometric_median(x.flatten(1)))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.decoder.unit_norm:
            self.check_averages()

    def check_averages(self) -> None:
        """Check that weights are not averaged without a projection: a mean of unit vectors has a norm below 1.

        Raises:
            AezooError: a callback of the trainer or a schedule-free optimiser averages in this way.
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
                f"{averaging[0]} averages directions of norm 1 to shorter ones: use aezoo.callbacks.EMA "
                f"(--ema.decay 0.999), which gives them norm 1 again"
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.decoder.remove_parallel_gradient()

    def after_optimizer_step(self) -> None:
        """Give each direction unit norm again."""
        self.decoder.normalise()


class InputNorm(nn.Module):
    """Mixin, before `UnitNorm`, for models that may normalise each sample (Gao et al. 2024, section 2.1).

    The loss compares normalised samples. A code then consists of the latents, followed by the offset and the scale of
    its sample, with which `Dictionary` computes a reconstruction in the units of the sample.

    Attributes:
        input_norm: none; layer_norm: subtract the mean of a sample's values and divide by their standard deviation; or
            rms_norm: divide by the root of their mean square.
    """

    input_norm: str = "none"
    sparse_code: bool
    code_shape: tuple[int, ...]

    def init_input_norm(self, input_norm: str, latent_dim: int, bounded: bool) -> None:
        """Set the kind and the shape of codes; for constructors.

        Args:
            input_norm: see above.
            latent_dim: N, number of latents.
            bounded: whether the likelihood's outputs lie in an interval that does not contain normalised samples.

        Raises:
            AezooError: the kind is unknown, or the likelihood does not support it.
        """
        if input_norm not in INPUT_NORMS:
            raise AezooError(f"input_norm must be one of {', '.join(INPUT_NORMS)}, got {input_norm!r}")
        if input_norm != "none":
            if bounded:
                raise AezooError(f"input_norm={input_norm!r} gives values outside [0, 1]: use likelihood='gaussian'")
            self.sparse_code = False  # two entries are never zero
        self.input_norm = input_norm
        self.code_shape = (latent_dim if input_norm == "none" else latent_dim + 2,)

    def latents(self, x: Tensor) -> Tensor:
        """Return the latents f of normalised samples, (B, *input_shape) -> (B, N)."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Return f, followed by offset and scale if there is an input_norm, (B, *input_shape) -> (B, *code_shape)."""
        if self.input_norm == "none":
            return self.latents(x)
        x_n, units_B2 = normalise_samples(x, self.input_norm)
        return torch.cat([self.latents(x_n), units_B2], 1)

    def normalised(self, x: Tensor) -> Tensor:
        """Return samples as the loss compares them, (B, *input_shape) -> (B, *input_shape)."""
        return x if self.input_norm == "none" else normalise_samples(x, self.input_norm)[0]


def normalise_samples(x: Tensor, input_norm: str) -> tuple[Tensor, Tensor]:
    """Return normalised samples and the offset and scale of each, (B, ...) -> (B, ...), (B, 2).

    Args:
        x: samples.
        input_norm: layer_norm or rms_norm, see `InputNorm`.
    """
    x_BX = at_least_float32(x.flatten(1))
    offset_B1 = torch.zeros_like(x_BX[:, :1])
    if input_norm == "layer_norm":
        offset_B1 = x_BX.mean(1, keepdim=True)
        scale_B1 = (x_BX - offset_B1).std(1, keepdim=True)
        x_n = (x_BX - offset_B1) / (scale_B1 + _LAYER_NORM_EPS)
    else:
        scale_B1 = x_BX.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(x_BX.dtype).tiny)
        x_n = x_BX / scale_B1
    return x_n.to(x.dtype).view_as(x), torch.cat([offset_B1, scale_B1], 1).to(x.dtype)


def top_k(pi_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row after a ReLU, and their indices, (B, N) -> (B, k), (B, k)."""
    values_Bk, index_Bk = pi_BN.topk(k, dim=1)
    return values_Bk.relu(), index_Bk


def scatter_code(values_Bk: Tensor, index_Bk: Tensor, latent_dim: int) -> Tensor:
    """Return the whole code for given active latents, zero elsewhere, (B, k), (B, k) -> (B, N)."""
    zeros_BN = values_Bk.new_zeros(values_Bk.shape[0], latent_dim)  # len would fix an export's batch size
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

    The direction of a latent becomes that of its sample. Its encoder row gets the same direction, with one fifth of the
    norm of rows of latents that are not dead. Its encoder bias and the optimiser's moments become 0.

    Args:
        encoder: the layer applied to samples.
        decoder: the dictionary.
        dead_N: which latents are dead, n of them.
        x_nX: the encoder's inputs for the samples.
        y_nX: the decoder's targets for the samples.
        optimizer: the optimiser of encoder and decoder.
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
    """Return the nearest rows that are nonnegative and sum to 1 (Duchi et al. 2008), (N, P) -> (N, P)."""
    v_NP = v_NP.to(torch.promote_types(v_NP.dtype, torch.float32))
    rank_P = torch.arange(1, v_NP.shape[1] + 1, device=v_NP.device)
    excess_NP = (v_NP.sort(1, descending=True).values.cumsum(1) - 1) / rank_P
    return (v_NP - excess_NP.amax(1, keepdim=True)).relu()


@torch.no_grad()
def geometric_median(x_BX: Tensor) -> Tensor:
    """Return the point with the smallest sum of distances to the rows, (B, X) -> (X,).

    Uses Weiszfeld's iteration, with the step of Vardi & Zhang (2000) at the rows themselves, where the plain iteration
    divides by 0 or stalls. Runs in float64 on the CPU, so that the result is bitwise equal on all ranks.
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
        if pull <= here:  # the current point is the median
            break
        step_X = (1 - here / pull) * pull_X / weight_N.sum()
        m_X = m_X + step_X
        if float(step_X.norm()) <= tolerance:
            break
    return m_X.to(x_BX)
