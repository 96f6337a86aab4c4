"""The base class of all quantisers, which map each vector of z to one of finitely many codes.

z is (B, D, *positions): a vector (B, D), a sequence (B, D, L), a map (B, D, H, W), a volume (B, D, H, W, W'). Each
position is quantised independently, so subclasses work on rows, (N, D). The rows of a sample are adjacent.

All computations use at least float32 with autocast off, and the statistics of a codebook stay in at least float32 when
a model is cast to half precision: bf16 may select the wrong one of two almost equally near codes, and a running sum
stops growing.

Shapes: B batch, N = B x positions rows, D channels of z, C channels of a code, K codes of a codebook, Q indices per
position.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aezoo.deprecated import renamed
from aezoo.errors import AezooError
from aezoo.training.precision import buffers_kept_in_float32


@contextmanager
def quantisers_in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Set the quantisers of a module to evaluation mode, in which they do not sample or update codebooks."""
    modules = [child for child in module.modules() if isinstance(child, Quantiser) and child.training]
    for child in modules:
        child.eval()
    try:
        yield
    finally:
        for child in modules:
            child.train()


class Quantised(NamedTuple):
    """The result of quantising z.

    Attributes:
        z_q: the codes, (B, C, *positions), in the precision of z; the quantiser defines the gradient that z gets.
        indices: the indices of the codes, (B, Q, *positions), long; -1 where a level is dropped.
        terms: unweighted loss terms, () each: summed over dimensions and positions, averaged over the batch.
    """

    z_q: Tensor
    indices: Tensor
    terms: dict[str, Tensor]


# z_q, (N, C); indices, (N, Q); terms, either per row, (N,), or per position as a mean over all rows, ()
Rows = tuple[Tensor, Tensor, dict[str, Tensor]]


class Quantiser(nn.Module):
    """Maps vectors to codes of finite codebooks. A subclass defines `_quantise_rows` and `_lookup_rows`.

    Attributes:
        dim: D, channels of z.
        code_dim: C, channels of z_q.
        codebook_sizes: K of each of the Q indices of a position.

    Args:
        dim: D.
        codebook_sizes: K of each index.
        code_dim: C; D if None.
    """

    _like: Tensor

    def __init__(self, dim: int, codebook_sizes: tuple[int, ...], code_dim: int | None = None) -> None:
        super().__init__()
        code_dim = dim if code_dim is None else code_dim
        if min(dim, code_dim, *codebook_sizes, len(codebook_sizes)) < 1:
            raise AezooError(
                f"{type(self).__name__} needs at least one channel and one code per codebook, got dim {dim}, code_dim "
                f"{code_dim} and codebooks of {codebook_sizes}: give whole numbers above 0"
            )
        self.dim, self.code_dim, self.codebook_sizes = dim, code_dim, codebook_sizes
        self._float32_buffers: set[str] = set()
        # has the module's precision even if there are no parameters
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    @property
    def bits(self) -> float:
        """Return the bits of one position, the sum of log2 K over its indices."""
        return sum(math.log2(size) for size in self.codebook_sizes)

    def forward(self, z: Tensor) -> Quantised:
        """Same as `quantise`."""
        return self.quantise(z)

    def quantise(self, z: Tensor) -> Quantised:
        """Return codes, indices and loss terms of z, (B, D, *positions) -> (B, C, *positions), (B, Q, *positions).

        Raises:
            AezooError: z has a different number of channels.
        """
        self._check("z", z, self.dim, "channels")
        rows_per_sample = math.prod(z.shape[2:])
        with torch.autocast(z.device.type, enabled=False):
            z_ND = _as_rows(z).to(self.exact_dtype)
            q_NC, index_NQ, terms = self._quantise_rows(z_ND, rows_per_sample)
            terms = {name: _per_sample(term, rows_per_sample) for name, term in terms.items()}
        return Quantised(_restore_shape(q_NC, z).to(z.dtype), _restore_shape(index_NQ, z), terms)

    def codes(self, indices: Tensor) -> Tensor:
        """Return the codes of indices, exactly z_q in evaluation mode, (B, Q, *positions) -> (B, C, *positions).

        Raises:
            AezooError: there is a different number of indices per position.
        """
        self._check("indices", indices, len(self.codebook_sizes), "indices per position")
        with torch.autocast(indices.device.type, enabled=False):
            q_NC = self._lookup_rows(_as_rows(indices))
        return _restore_shape(q_NC, indices).to(self._like.dtype)

    @torch.no_grad()
    def init_from_data(self, z: Tensor) -> None:
        """Initialise the codebook from data if possible: z of all ranks, (B, D, *positions), equal on each rank."""
        self._check("z", z, self.dim, "channels")
        with torch.autocast(z.device.type, enabled=False):
            self._init_rows(_as_rows(z).to(self.exact_dtype))

    def _quantise_rows(self, z_ND: Tensor, rows_per_sample: int = 1) -> Rows:
        """`quantise` for rows; each sample has `rows_per_sample` rows."""
        raise NotImplementedError(f"{type(self).__name__} must write _quantise_rows")

    def _lookup_rows(self, index_NQ: Tensor) -> Tensor:
        """`codes` for rows, (N, Q) -> (N, C)."""
        raise NotImplementedError(f"{type(self).__name__} must write _lookup_rows")

    def _init_rows(self, z_ND: Tensor) -> None:
        """`init_from_data` for rows."""

    # ---- for subclasses ---------------------------------------------------------------------------------------------

    @property
    def exact_dtype(self) -> torch.dtype:
        """Return the precision of computations: the module's precision, but at least float32."""
        return torch.promote_types(self._like.dtype, torch.float32)

    def register_float32_buffer(self, name: str, values: Tensor, persistent: bool = True) -> None:
        """Register a buffer that stays in at least float32 in all casts of the module; for constructors."""
        self.register_buffer(name, values.to(torch.promote_types(values.dtype, torch.float32)), persistent)
        self._float32_buffers.add(name)

    def is_distributed(self) -> bool:
        """Return whether the model is trained on several processes."""
        return self.training and dist.is_available() and dist.is_initialized()

    def all_reduce_sum(self, total: Tensor) -> Tensor:
        """Return the sum over ranks in training, without gradient; otherwise the input."""
        if self.is_distributed():
            total = total.clone()
            dist.all_reduce(total)
        return total

    def all_reduce_mean(self, mean: Tensor) -> Tensor:
        """Return the mean over ranks in training, with gradient; otherwise the input.

        It is used in terms that are equal on all ranks, so their gradients are equal and need no exchange.
        """
        if self.is_distributed():
            mean = self.all_reduce_sum(mean.detach()) / dist.get_world_size() + (mean - mean.detach())
        return mean

    def moments(self, z_ND: Tensor, variance: float) -> dict[str, Tensor]:
        """Return terms that are 0 if each channel has mean 0 and the given variance, over the rows of all ranks."""
        mean_D = self.all_reduce_mean(z_ND.mean(0))
        # detached: on one process, the gradient through the mean is 0 anyway; on one of several ranks, it is not
        variance_D = self.all_reduce_mean((z_ND - mean_D.detach()).square().mean(0))
        return {"code_mean": mean_D.square().sum(), "code_variance": (variance_D - variance).square().sum()}

    def _check(self, what: str, values: Tensor, channels: int, name: str) -> None:
        if values.ndim < 2 or values.shape[1] != channels:
            raise AezooError(
                f"{type(self).__name__} takes {what} (B, {channels}, ...), got {tuple(values.shape)}: put the "
                f"{channels} {name} into dimension 1, or build the quantiser for what there is"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with buffers_kept_in_float32(self, self._float32_buffers):
            super()._apply(fn, recurse)
        return self


def _as_rows(values: Tensor) -> Tensor:
    """(B, X, *positions) -> (N, X)."""
    return values.movedim(1, -1).flatten(0, -2)


def _restore_shape(rows: Tensor, like: Tensor) -> Tensor:
    """(N, X) -> (B, X, *positions), with the positions of `like`, (B, ?, *positions)."""
    return rows.unflatten(0, (like.shape[0], *like.shape[2:])).movedim(-1, 1).contiguous()


def _per_sample(term: Tensor, rows_per_sample: int) -> Tensor:
    """A term summed over the positions of a sample and averaged over samples: per row (N,) or per position () -> ()."""
    return term * rows_per_sample if term.ndim == 0 else term.unflatten(0, (-1, rows_per_sample)).sum(1).mean()


__getattr__ = renamed(__name__)
