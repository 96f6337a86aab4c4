"""BSQ autoencoder, binary spherical quantisation (Zhao et al. 2024), https://arxiv.org/abs/2406.07548

This is `lfq_vae` on the unit sphere, where the distance to a code is bounded:

    z = f(x)    u = z / ||z||    z_q = sign(u) / sqrt(D)    gradient of u = gradient of z_q

    L = -log p(x | g(z_q)) + w (E H(p(c|u)) - gamma H(E p(c|u))) + beta ||u - sg(z_q)||^2

u cannot drift away from its code, so beta may be 0, which is the default. For w see `lfq_vae`.
"""

from typing import Unpack

from torch import Tensor

from aezoo.bases.quantised import CodeMapArgs, CodeMapAutoencoder
from aezoo.quantisers.bsq import BSQ
from aezoo.training.limits import at_least


class BSQVAE(CodeMapAutoencoder):
    """A map of binary codes: the corners of a hypercube on the unit sphere.

    Args:
        latent_dim: D, channels of a code and bits of its index.
        entropy_weight: w, weight of both entropy terms.
        gamma: weight of the diversity term relative to the entropy term.
        beta: weight of the commitment loss.
        temperature: temperature of the code probabilities.
        **kwargs: see `CodeMapAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 9,
        entropy_weight: float = 0.3,
        gamma: float = 1.0,
        beta: float = 0.0,
        temperature: float = 0.1,
        **kwargs: Unpack[CodeMapArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        at_least(0, entropy_weight=entropy_weight, gamma=gamma, beta=beta)
        self.entropy_weight = entropy_weight
        self.gamma = gamma
        self.beta = beta
        self.build_code_nets(latent_dim, latent_dim)
        self.quantiser = BSQ(latent_dim, temperature=temperature)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        spread = terms["entropy"] - self.gamma * terms["diversity"]
        loss = nll + self.entropy_weight * spread + self.beta * terms["commitment"]
        return {"loss": loss, "nll": nll, **terms}
