"""Comparisons of a model with a reference implementation, on equal weights, batch and noise, in float64.

A comparison keeps a row for each quantity: its name, the largest difference relative to the largest value, and the
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

# relative tolerance in float64
TOLERANCE = 1e-6
# least relative difference of quantities that deviate
DEVIATION = 1e-4
# gradients smaller than this, relative to the largest of all parameters, are taken as 0
_ROUNDING = 1e-14


@dataclass(frozen=True)
class Row:
    """A quantity of a model compared with that of a reference.

    Attributes:
        model: name in the registry.
        reference: distribution and version, such as `pythae 0.1.2`.
        part: the class or function of the reference.
        quantity: what was compared.
        difference: largest absolute difference divided by the largest absolute value of the reference, after `scale`.
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
    """The largest absolute difference divided by the largest absolute value of `theirs`.

    Raises:
        AssertionError: the shapes differ, or a value is not finite.
    """
    a, b = (np.asarray(x.detach() if isinstance(x, Tensor) else x, np.float64) for x in (ours, theirs))
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    assert a.size and np.isfinite(a).all() and np.isfinite(b).all(), "empty or not finite"
    return float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float64).tiny)) if (a != b).any() else 0.0


class Comparison:
    """Rows of one model compared with one part of a reference.

    Args:
        model: name in the registry.
        package: PyPI name of the reference.
        part: the class or function compared with.
    """

    def __init__(self, model: str, package: str, part: str) -> None:
        self.model, self.reference, self.part = model, f"{package} {metadata.version(package)}", part
        self.rows: list[Row] = []

    def _keep(self, quantity: str, difference: float, verdict: str, reason: str = "") -> None:
        self.rows.append(Row(self.model, self.reference, self.part, quantity, difference, verdict, reason))

    def equal(self, quantity: str, ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> None:
        """Assert that both are the same number or array."""
        difference = relative_difference(ours, theirs)
        assert difference <= tolerance, f"{quantity}: {difference:.3g} apart, {ours} and {theirs}"
        self._keep(quantity, difference, "equal")

    def scaled(self, quantity: str, ours: Any, theirs: Any, scale: float, reason: str) -> None:
        """Assert that ours is `scale` times theirs, for the reason given."""
        difference = relative_difference(ours, scale * torch.as_tensor(theirs).detach())
        assert difference <= TOLERANCE, f"{quantity}: {difference:.3g} apart after the scale {scale:g}"
        self._keep(quantity, difference, "scaled", f"{scale:g} times theirs: {reason}")

    def deviates(self, quantity: str, ours: Any, theirs: Any, reason: str, *, follows: str) -> None:
        """Assert that they differ; `follows` says which agrees with the paper: ours, theirs, both or neither."""
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
        """Assert that the gradients of both losses are equal for each pair of parameters, or ours `scale` times theirs.

        A parameter without a gradient in one loss must not have one in the other.
        """
        left, right = zip(*pairs, strict=True)
        grads = [torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)
                 for loss, of in ((ours, left), (theirs, right))]  # fmt: skip
        # some are 0 in exact arithmetic, and nonzero by rounding on some processors
        least = [_ROUNDING * max((float(g.abs().max()) for g in side if g is not None), default=0.0) for side in grads]
        differences = []
        for found, other in zip(*grads, strict=True):
            pair = zip((found, other), least, strict=True)
            reached = [g is not None and float(g.abs().max()) > zero for g, zero in pair]
            assert reached[0] == reached[1], f"{quantity}: only one of the losses reaches a parameter"
            if all(reached):
                # relative to each parameter's own largest gradient, so that small ones are compared, too
                differences.append(relative_difference(found.reshape(other.shape), scale * other))
        assert differences, f"{quantity}: no parameter is reached"
        assert max(differences) <= TOLERANCE, f"{quantity}: {max(differences):.3g} apart"
        verdict = "equal" if scale == 1 else "scaled"
        reason = "" if scale == 1 else f"{scale:g} times theirs: {reason}"
        self._keep(f"{quantity} of {len(differences)} parameters", max(differences), verdict, reason)

    def record(self) -> list[dict[str, Any]]:
        """The rows as dicts, for JSON."""
        return [asdict(row) for row in self.rows]


def copy_parameters(source: nn.Module, target: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copy parameters in order, up to axes of length 1 in their shapes, and return the pairs, source first."""
    pairs = [*zip(source.parameters(), target.parameters(), strict=True)]
    for a, b in pairs:
        b.data.copy_(a.detach().reshape(b.shape))
    return pairs


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Seed torch, so that ours and theirs draw the same numbers if both draw the same shapes in the same order."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def taken(draws: Iterable[Tensor]) -> Iterator[Callable[[Any], Tensor]]:
    """A function that returns the next unused draw of a shape; on exit, all of them must have been used."""
    left = list(draws)

    def take(shape: Any) -> Tensor:
        for i, draw in enumerate(left):
            if draw.shape == torch.Size(shape):
                return left.pop(i).clone()
        raise AssertionError(f"no draw of the shape {tuple(shape)} is left")

    yield take
    assert not left, f"{len(left)} draws were not taken"


def shape_of(arguments: tuple[Any, ...]) -> Any:
    """The shape passed to `torch.randn` or `torch.rand`, as one argument or as one for each axis."""
    return arguments if isinstance(arguments[0], int) else arguments[0]


@contextmanager
def noise(draws: Iterable[Tensor]) -> Iterator[None]:
    """Make `torch.randn` and `torch.randn_like` return `draws`."""
    with (
        taken(draws) as take,
        mock.patch("torch.randn", lambda *shape, **_: take(shape_of(shape))),
        mock.patch("torch.randn_like", lambda x, **_: take(x.shape)),
    ):
        yield
