"""QLAE, quantised-latent autoencoder (Hsu et al. 2023), https://arxiv.org/abs/2305.18378

Each number of the code is replaced by the nearest of a few learned values, with separate values for each number:

    z = f(x)    z_q,d = v_dk, k = argmin_j |z_d - v_dj|    gradient of z = gradient of z_q

    L = -log p(x | g(z_q)) + ||sg(z) - z_q||^2 + beta ||z - sg(z_q)||^2

Strong weight decay keeps the decoder simple, so that each value gets one meaning, independent of the other numbers. The
numbers therefore tend to represent the factors of the data. Only matrices and kernels have weight decay.

The paper weights both terms by 0.01, with means over the code and over the sample. For d values and D numbers, this is
a beta of 0.01 d / D here: 10 for its 64 x 64 colour images and 12 numbers. With a much smaller beta, z moves away from
the values, which move by one Adam step at a time whatever the weight of their own term, and few values are in use.

Shapes: B batch, D numbers of a code, K values of each.
"""

from typing import Any, Unpack

from torch import Tensor

from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.quantisers.latent_quantisation import LatentQuantisation
from aezoo.training.limits import check_at_least


class QLAE(
    DiscreteAutoencoder,
    NetworkAutoencoder,
    defaults={"optimizer": "adamw", "weight_decay": 0.1},
    tags=("disentanglement",),
):
    """Learns a vector of numbers with few values each, with weight decay.

    Args:
        latent_dim: D, number of numbers of a code; the paper uses twice the number of factors of the data.
        n_values: K, values of each number.
        beta: weight of the commitment loss.
        weight_decay: the optimiser's weight decay, of matrices and kernels only.
        **kwargs: see `NetworkAutoencoder`.
    """

    quantiser: LatentQuantisation

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 10,
        n_values: int = 10,
        beta: float = 10.0,
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(2, n_values=n_values)
        check_at_least(0, beta=beta)
        self.beta = beta
        self.code_shape = (latent_dim,)
        self.encoder = self.build_encoder(self.code_shape)
        self.decoder = self.build_decoder(self.code_shape)
        self.quantiser = LatentQuantisation(latent_dim, n_values)

    def parameter_groups(self) -> list[dict[str, Any]]:
        values = self.quantiser.value_DK
        decays, rest = (
            [p for p in self.parameters() if (p.ndim > 1 and p is not values) == chosen] for chosen in (True, False)
        )
        return [{"params": decays}, {"params": rest, "weight_decay": 0.0}]

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        return {"loss": nll + terms["codebook"] + self.beta * terms["commitment"], "nll": nll, **terms}
