"""SimVQ autoencoder, vector quantisation with one linear layer (Zhu et al. 2024), https://arxiv.org/abs/2411.02038

This is `vq_vae` with codes C_0 W: C_0 is drawn once and frozen, and W is a D x D matrix that all codes share:

    z = f(x)    z_q = e_k, k = argmin_j ||z - e_j||, e = C_0 W    gradient of z = gradient of z_q

    L = -log p(x | g(z_q)) + ||sg(z) - e_k||^2 + beta ||z - sg(e_k)||^2

summed over positions. The update of a chosen code moves all others, so no code becomes unused or needs a restart.
"""

from typing import Unpack

from torch import Tensor

from aezoo.bases.network import LatentArgs
from aezoo.bases.quantised import CodeMapArgs, CodeMapAutoencoder
from aezoo.quantisers.sim_vq import SimVQ
from aezoo.training.limits import check_at_least


class SimVQVAEArgs(LatentArgs, total=False):
    """Arguments of `SimVQVAE`."""

    codebook_size: int
    beta: float
    estimator: str
    places: int


class SimVQVAE(CodeMapAutoencoder, tags=("tokenizer",)):
    """Learns a map of codes from one codebook, all of whose codes are updated jointly.

    Args:
        latent_dim: D, channels of a code.
        codebook_size: K, number of codes.
        beta: weight of the commitment loss.
        estimator: how the gradient passes through the quantiser: ste or rotation.
        **kwargs: see `CodeMapAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        codebook_size: int = 512,
        beta: float = 0.25,
        estimator: str = "ste",
        **kwargs: Unpack[CodeMapArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.codebook_size = codebook_size
        self.estimator = estimator
        self.latent_dim = latent_dim
        check_at_least(0, beta=beta)
        check_at_least(1, codebook_size=codebook_size)
        self.beta = beta
        self.build_code_nets(latent_dim, latent_dim)
        self.quantiser = SimVQ(latent_dim, codebook_size, estimator=estimator)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        loss = nll + self.beta * terms["commitment"] + terms["codebook"]
        return {"loss": loss, "nll": nll, **terms}
