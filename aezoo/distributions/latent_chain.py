"""Generative models with layers of Gaussian latent variables, in the form required by lossless coding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from aezoo.distributions.likelihoods import Bernoulli, Likelihood


class Layer(Protocol):
    """Gaussian latent variables, given those of the layers above; all tensors are (n, *shape of the layer)."""

    def prior(self, above: list[Tensor], n: int) -> tuple[Tensor, Tensor]:
        """Return the mean m and standard deviation s of p(z | above) for n samples."""
        ...

    def posterior(self, x: Tensor, above: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean mu and standard deviation sigma of q(z | x, above)."""
        ...


@dataclass(frozen=True)
class LatentChain:
    """A generative model in the form used by bits-back coding.

    Attributes:
        layers: layers from the top, whose prior is unconditional, to the bottom.
        params: computes the likelihood's parameters from all z.
        likelihood: a discrete likelihood.
        input_shape: shape of one sample.
    """

    layers: list[Layer]
    params: Callable[[list[Tensor]], Tensor]
    likelihood: Likelihood
    input_shape: tuple[int, ...]

    @property
    def levels(self) -> int:
        """Number of possible values of a data value."""
        return 2 if isinstance(self.likelihood, Bernoulli) else 256
