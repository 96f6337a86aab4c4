"""LFQ autoencoder, lookup-free quantisation of MAGVIT-v2 (Yu et al. 2023), https://arxiv.org/abs/2310.05737

Each channel of the encoder's output is replaced by its sign, so each position has one of 2^D codes:

    z = f(x)    z_q = sign(z)    gradient of z = gradient of z_q

    L = -log p(x | g(z_q)) + w (E H(p(c|z)) - gamma H(E p(c|z))) + beta ||z - sg(z_q)||^2

summed over positions. p(c|z) = softmax_c(2 z.c / temperature), and the second E is over the positions of the whole
batch. The first entropy keeps z away from 0, where its sign changes; the second makes the model use all codes.

The paper weights means: 0.1 of the entropy per position against the error per value. For d values and P positions, this
is w = 0.1 d / P here: 1.6 for images of 28 x 28 with 7 x 7 positions. The default gives more weight to the
reconstruction.
"""

from typing import ClassVar, Unpack

from torch import Tensor

from aezoo.bases.quantised import CodeMapArgs, CodeMapAutoencoder
from aezoo.quantisers.lfq import LFQ
from aezoo.training.limits import check_at_least


class LFQVAE(CodeMapAutoencoder, tags=("tokenizer",)):
    """Learns a map of binary codes, the signs of the encoder's output.

    Args:
        latent_dim: D, channels of a code and bits of its index.
        entropy_weight: w, weight of both entropy terms.
        gamma: weight of the diversity term relative to the entropy term.
        beta: weight of the commitment loss.
        temperature: temperature of the code probabilities.
        **kwargs: see `CodeMapAutoencoder`.
    """

    quantiser_class: ClassVar[type[LFQ]] = LFQ

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 9,
        entropy_weight: float = 0.3,
        gamma: float = 1.0,
        beta: float = 0.25,
        temperature: float = 0.1,
        **kwargs: Unpack[CodeMapArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, entropy_weight=entropy_weight, gamma=gamma, beta=beta)
        self.entropy_weight = entropy_weight
        self.gamma = gamma
        self.beta = beta
        self.build_code_nets(latent_dim, latent_dim)
        self.quantiser = self.quantiser_class(latent_dim, temperature=temperature)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        spread = terms["entropy"] - self.gamma * terms["diversity"]
        loss = nll + self.entropy_weight * spread + self.beta * terms["commitment"]
        return {"loss": loss, "nll": nll, **terms}
