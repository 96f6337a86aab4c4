"""Sparse autoencoder with an L1 penalty on its code, a Laplace prior (Olshausen & Field 1996), https://doi.org/10.1038/381607a0

    L = -log p(x | g(h)) + lam ||h||_1     h = relu(f(x))

L is in nats per sample, with the penalty summed over the code. lam = 0 is the dense autoencoder with a ReLU code.

This textbook model (Goodfellow et al. 2016, "Deep Learning", section 14.2.1) has no optimum. If the decoder is not
constrained, a code of h / c and first decoder weights of c V give the same reconstruction with a smaller penalty, for
any c > 1, so the penalty becomes weaker during training. `sae_l1` keeps the decoder's directions at unit norm, or
includes their norms in the penalty; here `weight_decay` limits the weights.
"""

from typing import Unpack

from torch import Tensor

from aezoo import nets
from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.training.limits import check_at_least


class SparseAEL1(NetworkAutoencoder, hidden_dims={"mlp": ()}, sparse_code=True, tags=("representation",)):
    """Few units of a wide ReLU code are active for each sample.

    Args:
        l1: lam, weight of the sum of activations; its effect decreases as the decoder's weights grow; see
            `weight_decay`.
        latent_dim: size of the code.
        weight_init: default, or glorot (the default of Keras), with which fewer units of a ReLU code are dead.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        l1: float = 0.1,
        latent_dim: int = 256,
        weight_init: str = "default",
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(0, l1=l1)
        self.l1 = l1
        self.code_shape = (latent_dim,)
        self.encoder = self.build_encoder(self.code_shape)
        self.decoder = self.build_decoder(self.code_shape)
        nets.initialise(self, weight_init)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x).relu()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        h_BD = self.encode(x)
        nll_B = self.nll(self.decoder(h_BD), x)
        l1_B = at_least_float32(h_BD).sum(1)
        return {"loss": (nll_B + self.l1 * l1_B).mean(), "nll": nll_B.mean(), "l1": l1_B.mean()}
