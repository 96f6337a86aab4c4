"""Corruptions x -> x~, which a denoising model must undo.

A corruption is named by a string with an amount: `gaussian:0.3`, `masking:0.3`, `salt_and_pepper:0.1`, or `none`. Noise
is drawn on the sample's device, from torch's global random state or from a given generator.
"""

import math

import torch
from torch import Generator, Tensor, nn

from aezoo.errors import AezooError


class Corruption(nn.Module):
    """A random map from data to data of the same shape.

    Args:
        amount: strength of the corruption, in the unit of the subclass.
    """

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Return a corrupted copy of x, (B, *shape) -> (B, *shape); `generator` replaces the global random state."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.amount}"

    def _uniform(self, x: Tensor, generator: Generator | None) -> Tensor:
        return torch.rand(x.shape, device=x.device, dtype=torch.float32, generator=generator)


class GaussianNoise(Corruption):
    """Adds noise from amount * N(0, I), without clipping, so that its score is exact (Alain & Bengio 2014)."""

    def forward(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        noise = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
        return x + self.amount * noise


class Masking(Corruption):
    """Sets each value to 0 with probability `amount`; Vincent et al. 2008 choose a fixed number of values."""

    def forward(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        return x * (self._uniform(x, generator) >= self.amount)


class SaltAndPepper(Corruption):
    """Replaces each value, with probability `amount`, by 0 or 1, equally likely; Vincent et al. 2010 a fixed number."""

    def forward(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        u = self._uniform(x, generator)
        return torch.where(u < self.amount / 2, 0.0, torch.where(u < self.amount, 1.0, x)).to(x.dtype)


CORRUPTIONS: dict[str, type[Corruption]] = {
    "gaussian": GaussianNoise,
    "masking": Masking,
    "salt_and_pepper": SaltAndPepper,
}


def corruption(name: str) -> Corruption | None:
    """Build a corruption from its name and amount, e.g. `gaussian:0.3`; `none` gives None.

    Raises:
        AezooError: the name is unknown, the amount is missing or below 0, or a share is above 1.
    """
    if name == "none":
        return None
    kind, _, argument = name.partition(":")
    if kind not in CORRUPTIONS:
        raise AezooError(f"unknown corruption {name!r}: choose from none, {', '.join(f'{c}:0.3' for c in CORRUPTIONS)}")
    try:
        amount = float(argument)
    except ValueError:
        amount = math.nan
    top = math.inf if kind == "gaussian" else 1.0
    if not 0 <= amount <= top or math.isinf(amount):
        unit = "a standard deviation of at least 0" if kind == "gaussian" else "a share between 0 and 1"
        raise AezooError(f"corruption {name!r} needs {unit} after a colon, as in {kind}:0.3")
    return CORRUPTIONS[kind](amount)
