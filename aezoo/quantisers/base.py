"""What every quantiser is: it takes each vector of z to one of finitely many codes.

z is (B, D, *places): a vector (B, D), a sequence (B, D, L), a map (B, D, H, W), a volume (B, D, H, W, W'). Each place
is quantised by itself, so that subclasses work on rows, (N, D), those of a sample next to each other.

Everything is computed in at least float32 with autocast off, and what a codebook has counted stays in it when a model
is cast to half precision: bf16 takes another code of two that are nearly as near, and a sum in it stops growing.

Shapes: B batch, N = B x places rows, D channels of z, C channels of a code, K codes of a book, Q indices a place.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aezoo.errors import AezooError


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """The quantisers of a module draw nothing, and learn nothing from what they are given."""
    parts = [part for part in module.modules() if isinstance(part, Quantiser) and part.training]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for part in parts:
            part.train()


class Quantised(NamedTuple):
    """What a quantiser makes of z.

    Attributes:
        z_q: the codes, (B, C, *places), in the precision of z; a gradient passes to z as the quantiser says.
        indices: which codes, (B, Q, *places), long; -1 where a level is dropped.
        terms: what a loss may add, () each, without weights: summed over dimensions and places, a mean over the batch.
    """

    z_q: Tensor
    indices: Tensor
    terms: dict[str, Tensor]


# z_q, (N, C); indices, (N, Q); terms, of each row (N,) or of all rows together, a place, ()
Rows = tuple[Tensor, Tensor, dict[str, Tensor]]


class Quantiser(nn.Module):
    """Vectors to codes of finite books. A subclass writes `_of_rows` and `_of_codes`.

    Attributes:
        dim: D, channels of z.
        code_dim: C, channels of z_q.
        book_sizes: K of each of the Q indices that a place has.

    Args:
        dim: D.
        book_sizes: K of each index.
        code_dim: C; D if None.
    """

    _like: Tensor

    def __init__(self, dim: int, book_sizes: tuple[int, ...], code_dim: int | None = None) -> None:
        super().__init__()
        code_dim = dim if code_dim is None else code_dim
        if min(dim, code_dim, *book_sizes, len(book_sizes)) < 1:
            raise AezooError(
                f"{type(self).__name__} needs at least one channel and one code a book, got dim {dim}, code_dim "
                f"{code_dim} and books of {book_sizes}: give whole numbers above 0"
            )
        self.dim, self.code_dim, self.book_sizes = dim, code_dim, book_sizes
        self._kept: set[str] = set()
        # what the module's precision is, where it has no parameters
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    @property
    def bits(self) -> float:
        """Of one place: the sum of log2 K over its indices."""
        return sum(math.log2(size) for size in self.book_sizes)

    def forward(self, z: Tensor) -> Quantised:
        """`quantise`."""
        return self.quantise(z)

    def quantise(self, z: Tensor) -> Quantised:
        """The codes of z, their indices and terms for the loss, (B, D, *places) -> (B, C, *places), (B, Q, *places).

        Raises:
            AezooError: z has another number of channels.
        """
        self._check("z", z, self.dim, "channels")
        places = math.prod(z.shape[2:])
        with torch.autocast(z.device.type, enabled=False):
            z_ND = _as_rows(z).to(self.exact_dtype)
            q_NC, index_NQ, terms = self._of_rows(z_ND, places)
            terms = {name: _a_sample(term, places) for name, term in terms.items()}
        return Quantised(_at_places(q_NC, z).to(z.dtype), _at_places(index_NQ, z), terms)

    def codes(self, indices: Tensor) -> Tensor:
        """What the indices stand for, (B, Q, *places) -> (B, C, *places): in evaluation mode exactly z_q.

        Raises:
            AezooError: another number of indices a place.
        """
        self._check("indices", indices, len(self.book_sizes), "indices a place")
        with torch.autocast(indices.device.type, enabled=False):
            q_NC = self._of_codes(_as_rows(indices))
        return _at_places(q_NC, indices).to(self._like.dtype)

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """Start the codebook from data, where it can be: z of all ranks, (B, D, *places), the same on each."""
        self._check("z", z, self.dim, "channels")
        with torch.autocast(z.device.type, enabled=False):
            self._start_rows(_as_rows(z).to(self.exact_dtype))

    def _of_rows(self, z_ND: Tensor, places: int = 1) -> Rows:
        """`quantise` of rows, of which each sample has `places`."""
        raise NotImplementedError(f"{type(self).__name__} must write _of_rows")

    def _of_codes(self, index_NQ: Tensor) -> Tensor:
        """`codes` of rows, (N, Q) -> (N, C)."""
        raise NotImplementedError(f"{type(self).__name__} must write _of_codes")

    def _start_rows(self, z_ND: Tensor) -> None:
        """`start` from rows."""

    # ---- for subclasses ---------------------------------------------------------------------------------------------

    @property
    def exact_dtype(self) -> torch.dtype:
        """What is computed in: the module's precision, and at least float32."""
        return torch.promote_types(self._like.dtype, torch.float32)

    def keep(self, name: str, values: Tensor, persistent: bool = True) -> None:
        """For the constructor: a buffer that stays in at least float32 whatever the module is cast to."""
        self.register_buffer(name, values.to(torch.promote_types(values.dtype, torch.float32)), persistent)
        self._kept.add(name)

    def across_ranks(self) -> bool:
        """Whether there are other processes that train with this one."""
        return self.training and dist.is_available() and dist.is_initialized()

    def over_ranks(self, total: Tensor) -> Tensor:
        """In training the sum over ranks, without gradient; else as it is."""
        if self.across_ranks():
            total = total.clone()
            dist.all_reduce(total)
        return total

    def mean_over_ranks(self, mean: Tensor) -> Tensor:
        """In training the mean over ranks, with gradient; else as it is.

        For what every rank makes the same term of: the gradients of that are alike, so that none is exchanged.
        """
        if self.across_ranks():
            mean = self.over_ranks(mean.detach()) / dist.get_world_size() + (mean - mean.detach())
        return mean

    def moments(self, z_ND: Tensor, variance: float) -> dict[str, Tensor]:
        """Terms that pull each channel to mean 0 and to a variance, over the rows of all ranks."""
        mean_D = self.mean_over_ranks(z_ND.mean(0))
        # on one process no gradient passes the mean either; of a rank's own rows some would
        variance_D = self.mean_over_ranks((z_ND - mean_D.detach()).square().mean(0))
        return {"code_mean": mean_D.square().sum(), "code_variance": (variance_D - variance).square().sum()}

    def _check(self, what: str, given: Tensor, channels: int, name: str) -> None:
        if given.ndim < 2 or given.shape[1] != channels:
            raise AezooError(
                f"{type(self).__name__} takes {what} (B, {channels}, ...), got {tuple(given.shape)}: put the {channels}"
                f" {name} into dimension 1, or build the quantiser for what there is"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers[name] for name in self._kept}
        super()._apply(fn, recurse)
        for name, values in before.items():
            after = self._buffers[name]
            if values is not None and after is not None and after.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = values.to(after.device)  # the bits that the cast took away
        return self


def _as_rows(values: Tensor) -> Tensor:
    """(B, X, *places) -> (N, X)."""
    return values.movedim(1, -1).flatten(0, -2)


def _at_places(rows: Tensor, like: Tensor) -> Tensor:
    """(N, X) -> (B, X, *places), of the places of (B, ?, *places)."""
    return rows.unflatten(0, (like.shape[0], *like.shape[2:])).movedim(-1, 1).contiguous()


def _a_sample(term: Tensor, places: int) -> Tensor:
    """A term summed over the places of a sample, in the mean over samples, of rows (N,) or of a place () -> ()."""
    return term * places if term.ndim == 0 else term.unflatten(0, (-1, places)).sum(1).mean()
