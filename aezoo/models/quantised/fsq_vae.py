"""FSQ autoencoder, finite scalar quantisation (Mentzer et al. 2023), https://arxiv.org/abs/2309.15505

Each channel of the encoder's output is bounded and rounded to one of its L values:

    z = f(x)    z_q = round(bound(z)) / floor(L / 2)    gradient of bound(z) = gradient of z_q

    L = -log p(x | g(z_q))

There is no codebook that could collapse, hence no other term. The number of codes is the product of the levels. With
depth above 1, each further step rounds the remaining error to the L values of a cell that is L times as fine.
"""

from typing import Unpack

from torch import Tensor

from aezoo.bases.quantised import CodeMapArgs, CodeMapAutoencoder
from aezoo.quantisers.residual_fsq import ResidualFSQ


class FSQVAE(CodeMapAutoencoder, tags=("tokenizer",)):
    """Learns a map of channels, each rounded to one of a few values.

    Args:
        levels: number of values of each channel of a code, in the paper at least 5; K is their product.
        depth: number of quantisation steps at each position, each of which gives one index, with the same levels.
        dropout: share of training samples that keep only their first indices.
        **kwargs: see `CodeMapAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        levels: tuple[int, ...] = (8, 5, 5, 5),
        depth: int = 1,
        dropout: float = 0.0,
        **kwargs: Unpack[CodeMapArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.quantiser = ResidualFSQ(tuple(levels), depth, dropout=dropout)
        self.build_code_nets(len(levels), len(levels))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = self.nll(self.decoder(self.quantise(x).z_q), x).mean()
        return {"loss": nll, "nll": nll}
