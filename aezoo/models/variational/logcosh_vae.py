"""Log-cosh VAE (Chen et al. 2019), https://openreview.net/forum?id=rkglvsC9Ym

    L = E_q[sum_x log cosh(a (x - xhat)) + X log(pi / a)] + beta KL(q(z|x) || p(z))     xhat = g(z)

in nats per sample. The penalty is quadratic for small errors and linear for large ones, so the gradient of outliers is
bounded. The first term is the negative log-density a / (pi cosh(a (x - xhat))), the likelihood `logcosh:S` with S =
1/a, and L is a bound on -log p(x). The paper weights log cosh by 1/a and omits the constant: its loss is L / a for beta
= a, and a = 10.

Shapes: X data dimensions.
"""

from typing import Unpack

from aezoo.bases.network import FixedLikelihoodArgs
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE


class LogCoshVAE(VAE, tags=("generation",)):
    """A VAE with a likelihood between the Gaussian and the Laplace density.

    Args:
        latent_dim: D, size of the code.
        a: the penalty is quadratic for errors well below 1/a, and linear for errors well above.
        beta: weight of the KL term.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        a: float = 10.0,
        beta: float = 1.0,
        **kwargs: Unpack[FixedLikelihoodArgs],
    ) -> None:
        if not 1e-4 <= a <= 1e4:
            raise AezooError(f"a must lie between 1e-4 and 1e4, for data of about unit range, got {a}")
        super().__init__(input_shape, latent_dim=latent_dim, beta=beta, likelihood=f"logcosh:{1 / a!r}", **kwargs)
