"""FVQ autoencoder, vector quantisation with all codes in use (Chang et al. 2025), https://arxiv.org/abs/2509.10140

This is `sim_vq_vae` with trained codes C and, instead of the matrix, a transformer over groups of codes, VQBridge:

    z = f(x)    z_q = e_k, k = argmin_j ||z - e_j||, e = bridge(C)    gradient of z = gradient of z_q

    L = -log p(x | g(z_q)) + ||sg(z) - e_k||^2 + beta ||z - sg(e_k)||^2

summed over positions. The transformer also moves codes that are not chosen. The authors decay the learning rate to a
hundredth; without this, their rFID was twice as large: see `lr_schedule`. The bridge is used only in training:
`quantiser.codebook()` returns all codes of the indices.
"""

from typing import Unpack

from aezoo.models.quantised.sim_vq_vae import SimVQVAE, SimVQVAEArgs
from aezoo.quantisers.fvq import FVQ


class FVQVAE(SimVQVAE, tags=("tokenizer",)):
    """Learns a map of codes from one codebook that is the output of a transformer.

    Args:
        group_size: P, number of codes in one token of the bridge.
        width: width of a token.
        depth: number of blocks of the bridge.
        **kwargs: see `SimVQVAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        group_size: int = 4,
        width: int = 64,
        depth: int = 2,
        **kwargs: Unpack[SimVQVAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.quantiser = FVQ(
            self.latent_dim,
            self.codebook_size,
            group_size=group_size,
            width=width,
            depth=depth,
            estimator=self.estimator,
        )
