"""Discrete autoencoders whose codes are vectors of a codebook, and their common arguments.

Each class is a mixin: its constructor passes additional arguments to the next class.
"""

from typing import Any, TypedDict

from aezoo.bases.network import NetworkArgs
from aezoo.bases.quantised import CodeMapArgs, DiscreteAutoencoder
from aezoo.quantisers.vq import VQ
from aezoo.training.limits import check_at_least


class CodebookArgs(TypedDict, total=False):
    """Arguments of `CodebookAutoencoder`."""

    latent_dim: int
    codebook_size: int
    decay: float
    dead_below: float
    data_init: bool


class CodebookMapArgs(CodebookArgs, CodeMapArgs, total=False):
    """Arguments of `CodebookAutoencoder` and `CodeMapAutoencoder`."""


class UnprojectedVQArgs(CodebookArgs, total=False):
    """Arguments of `VQAutoencoder` for quantisers that cannot compare directions."""

    beta: float
    update: str
    estimator: str


class UnprojectedVQMapArgs(UnprojectedVQArgs, CodeMapArgs, total=False):
    """Arguments of `UnprojectedVQArgs` and `CodeMapAutoencoder`."""


class VQArgs(UnprojectedVQArgs, total=False):
    """Arguments of `VQAutoencoder`."""

    cosine: bool


class VQMapArgs(VQArgs, CodeMapArgs, total=False):
    """Arguments of `VQAutoencoder` and `CodeMapAutoencoder`."""


class VQNetworkArgs(VQArgs, NetworkArgs, total=False):
    """Arguments of `VQAutoencoder` and `NetworkAutoencoder`."""


class CodebookAutoencoder(DiscreteAutoencoder):
    """A discrete autoencoder with a codebook that follows the encoder's output; its constructor sets `quantiser`.

    Args:
        latent_dim: number of channels of a code.
        codebook_size: K, number of codes of each codebook.
        decay: decay rate of the codes' moving averages.
        dead_below: a code with fewer assigned rows per batch, on average, is set to a row of the batch; at most
            rows / 2K if rows <= K; 0 disables this.
        data_init: initialise the codes by k-means on the first training batch.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        codebook_size: int = 512,
        decay: float = 0.99,
        dead_below: float = 1.0,
        data_init: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim, codebook_size=codebook_size)
        self.latent_dim = latent_dim
        self.codebook_size = codebook_size
        self.decay = decay
        self.dead_below = dead_below
        if data_init:
            self.enable_data_init()


class VQAutoencoder(CodebookAutoencoder):
    """A discrete autoencoder with vector quantisation; its constructor sets `quantiser`, usually to `build_vq()`.

    Args:
        beta: weight of the commitment loss.
        update: how codes learn: ema, moving averages, or gradient.
        estimator: gradient estimator of the quantiser: ste, rotation, gumbel or diveq.
        cosine: compare vectors on the unit sphere.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        beta: float = 0.25,
        update: str = "ema",
        estimator: str = "ste",
        cosine: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, beta=beta)
        self.beta = beta
        self.update = update
        self.estimator = estimator
        self.cosine = cosine

    @property
    def vq_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `VQ`."""
        return {name: getattr(self, name) for name in ("update", "decay", "dead_below", "estimator", "cosine")}

    def build_vq(self) -> VQ:
        """Create a quantiser with one codebook."""
        return VQ(self.latent_dim, self.codebook_size, **self.vq_settings)
