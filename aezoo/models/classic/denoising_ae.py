"""Denoising autoencoder (Vincent et al. 2008), https://doi.org/10.1145/1390156.1390294

Reconstructs a clean sample from a corrupted one, x~ ~ C(x~ | x):

    L = E_C[ -log p(x | g(f(x~))) ]

With Gaussian noise of standard deviation s and the squared error, the best reconstruction is
r(x~) = x~ + s^2 grad log p_s(x~). The gradient is the score of the noisy density (Alain & Bengio 2014,
https://arxiv.org/abs/1211.4246). Training draws new noise for every batch; evaluation draws it once, from a fixed seed.
"""

from typing import Unpack

from torch import Tensor

from aezoo import corruptions
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.training.limits import check_at_least


class DenoisingAE(NetworkAutoencoder, hidden_dims={"mlp": (256,)}, tags=("denoising", "representation")):
    """Learns to undo a corruption; in evaluation, reconstructions and metrics also start from corrupted input.

    Args:
        corruption: gaussian:STD, masking:SHARE, salt_and_pepper:SHARE or none.
        latent_dim: size of the code.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        corruption: str = "gaussian:0.3",
        latent_dim: int = 64,
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        self.code_shape = (latent_dim,)
        self.corruption = corruptions.corruption(corruption)
        self.encoder = self.build_encoder(self.code_shape)
        self.decoder = self.build_decoder(self.code_shape)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        noisy = x if self.corruption is None else self.corruption(x)
        nll_B = self.nll(self.decoder(self.encoder(noisy)), x)
        nll = nll_B.mean()
        return {"loss": nll, "nll": nll}
