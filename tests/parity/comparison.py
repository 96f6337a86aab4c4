"""Comparisons of a model with code that others wrote, on equal weights, batch and noise, in float64.

A comparison keeps a row for each quantity: its name, the greatest difference relative to the greatest value, and the
verdict. `python tests/parity` writes the rows of all comparisons to docs/parity.md.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

# relative, in float64
TOLERANCE = 1e-6
# by which quantities must differ that are said to deviate
DEVIATION = 1e-4
# below which a gradient counts as none, relative to the greatest of all parameters
_ROUNDING = 1e-14


@dataclass(frozen=True)
class Row:
    """A quantity of a model beside that of a reference.

    Attributes:
        model: name in the registry.
        reference: distribution and version, such as `pythae 0.1.2`.
        part: the class or function of the reference.
        quantity: what was compared.
        difference: greatest absolute difference by the greatest absolute value of the reference, after `scale`.
        verdict: `equal`, `scaled` or `deviates`.
        reason: why it is scaled or deviates, and which of the two follows the paper.
    """

    model: str
    reference: str
    part: str
    quantity: str
    difference: float
    verdict: str
    reason: str = ""


def relative_difference(ours: Any, theirs: Any) -> float:
    """The greatest absolute difference by the greatest absolute value of `theirs`.

    Raises:
        AssertionError: the shapes differ, or a value is not finite.
    """
    a, b = (np.asarray(x.detach() if isinstance(x, Tensor) else x, np.float64) for x in (ours, theirs))
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    assert a.size and np.isfinite(a).all() and np.isfinite(b).all(), "empty or not finite"
    return float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float64).tiny)) if (a != b).any() else 0.0


class Comparison:
    """Rows of one model beside one part of a reference.

    Args:
        model: name in the registry.
        package: distribution of the reference on the registry of packages.
        part: the class or function compared with.
    """

    def __init__(self, model: str, package: str, part: str) -> None:
        self.model, self.reference, self.part = model, f"{package} {metadata.version(package)}", part
        self.rows: list[Row] = []

    def _keep(self, quantity: str, difference: float, verdict: str, reason: str = "") -> None:
        self.rows.append(Row(self.model, self.reference, self.part, quantity, difference, verdict, reason))

    def equal(self, quantity: str, ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> None:
        """Both are the same number or array."""
        difference = relative_difference(ours, theirs)
        assert difference <= tolerance, f"{quantity}: {difference:.3g} apart, {ours} and {theirs}"
        self._keep(quantity, difference, "equal")

    def scaled(self, quantity: str, ours: Any, theirs: Any, scale: float, reason: str) -> None:
        """Ours is `scale` times theirs, for the reason given."""
        difference = relative_difference(ours, scale * torch.as_tensor(theirs).detach())
        assert difference <= TOLERANCE, f"{quantity}: {difference:.3g} apart after the scale {scale:g}"
        self._keep(quantity, difference, "scaled", f"{scale:g} times theirs: {reason}")

    def deviates(self, quantity: str, ours: Any, theirs: Any, reason: str, *, follows: str) -> None:
        """Both differ, for the reason given; `follows` names what follows the paper: ours, theirs, both or neither."""
        assert follows in ("ours", "theirs", "both", "neither"), follows
        difference = relative_difference(ours, theirs)
        assert difference >= DEVIATION, f"{quantity}: said to deviate, but only {difference:.3g} apart"
        which = {"both": "both follow the paper", "neither": "neither follows the paper"}
        self._keep(quantity, difference, "deviates", f"{reason}; {which.get(follows, f'{follows} follow the paper')}")

    def equal_gradients(
        self,
        ours: Tensor,
        theirs: Tensor,
        pairs: Iterable[tuple[Tensor, Tensor]],
        quantity: str = "gradient",
        scale: float = 1.0,
        reason: str = "",
    ) -> None:
        """Gradients of both losses by each pair of parameters are equal, or ours are `scale` times theirs.

        A parameter that one loss does not reach is one that the other may not reach either.
        """
        left, right = zip(*pairs, strict=True)
        grads = [torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)
                 for loss, of in ((ours, left), (theirs, right))]  # fmt: skip
        # some vanish in exact arithmetic, and by rounding on some processors only
        least = [_ROUNDING * max((float(g.abs().max()) for g in side if g is not None), default=0.0) for side in grads]
        differences = []
        for found, other in zip(*grads, strict=True):
            pair = zip((found, other), least, strict=True)
            reached = [g is not None and float(g.abs().max()) > zero for g, zero in pair]
            assert reached[0] == reached[1], f"{quantity}: only one of the losses reaches a parameter"
            if all(reached):
                # each by its own greatest gradient: a small one must not hide behind a large one
                differences.append(relative_difference(found.reshape(other.shape), scale * other))
        assert differences, f"{quantity}: no parameter is reached"
        assert max(differences) <= TOLERANCE, f"{quantity}: {max(differences):.3g} apart"
        verdict = "equal" if scale == 1 else "scaled"
        reason = "" if scale == 1 else f"{scale:g} times theirs: {reason}"
        self._keep(f"{quantity} of {len(differences)} parameters", max(differences), verdict, reason)

    def record(self) -> list[dict[str, Any]]:
        """The rows for JSON."""
        return [asdict(row) for row in self.rows]


def copy_parameters(source: nn.Module, target: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copy parameters in their order, whose shapes may differ by axes of length 1; gives the pairs, source first."""
    pairs = [*zip(source.parameters(), target.parameters(), strict=True)]
    for a, b in pairs:
        b.data.copy_(a.detach().reshape(b.shape))
    return pairs


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The same random numbers for ours and theirs, where both draw the same shapes in the same order."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def taken(draws: Iterable[Tensor]) -> Iterator[Callable[[Any], Tensor]]:
    """A function that gives the first of the draws that is left of a shape; inside, all of them are to be taken."""
    left = list(draws)

    def take(shape: Any) -> Tensor:
        for i, draw in enumerate(left):
            if draw.shape == torch.Size(shape):
                return left.pop(i).clone()
        raise AssertionError(f"no draw of the shape {tuple(shape)} is left")

    yield take
    assert not left, f"{len(left)} draws were not taken"


def shape_of(arguments: tuple[Any, ...]) -> Any:
    """The shape that `torch.randn` or `torch.rand` is given, as one argument or as one for each axis."""
    return arguments if isinstance(arguments[0], int) else arguments[0]


@contextmanager
def noise(draws: Iterable[Tensor]) -> Iterator[None]:
    """`torch.randn` and `torch.randn_like` give `draws`."""
    with (
        taken(draws) as take,
        mock.patch("torch.randn", lambda *shape, **_: take(shape_of(shape))),
        mock.patch("torch.randn_like", lambda x, **_: take(x.shape)),
    ):
        yield
