"""RQ-VAE, residual-quantised autoencoder (Lee et al. 2022), https://arxiv.org/abs/2203.01941

The encoder's output at each position becomes a sum of codes, each of which is the nearest to the current residual:

    z = f(x)    r_0 = z    r_l = r_(l-1) - e_l, e_l = the nearest code of codebook l    z_q = sum_l e_l

    L = -log p(x | g(z_q)) + sum_l ||sg(r_(l-1)) - e_l||^2 + beta sum_l ||z - sg(sum_(i<=l) e_i)||^2

summed over positions. K codes per level give K^levels sums: more levels, not larger codebooks, give more bits. Each
level has its own codebook, as in SoundStream (Zeghidour et al. 2021, arXiv:2107.03312); in the paper, levels share one.
The second term applies to update gradient; with ema, as in the paper, codes are moving averages. With SoundStream's
quantiser dropout, a sample keeps its first n levels, n uniform, so that one model decodes at every rate.
"""

from typing import Unpack

from torch import Tensor

from aezoo.bases.quantised import CodeMapAutoencoder
from aezoo.bases.vector_quantised import UnprojectedVQMapArgs, VQAutoencoder
from aezoo.quantisers.residual_vq import ResidualVQ
from aezoo.training.limits import check_at_least


class RQVAE(VQAutoencoder, CodeMapAutoencoder, defaults={"codebook_size": 32}, tags=("tokenizer",)):
    """Learns a map of sums of codes, one code from each of several codebooks.

    Args:
        levels: number of codes per position, each from a separate codebook.
        dropout: share of training samples that keep only their first levels.
        data_init: initialise the codes by k-means on the first training batch, each level on the residuals.
        **kwargs: see `VQAutoencoder` and `CodeMapAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        levels: int = 2,
        dropout: float = 0.0,
        **kwargs: Unpack[UnprojectedVQMapArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, levels=levels)
        self.build_code_nets(self.latent_dim, self.latent_dim)
        self.quantiser = ResidualVQ(
            self.latent_dim,
            levels,
            self.codebook_size,
            dropout=dropout,
            update=self.update,
            decay=self.decay,
            dead_below=self.dead_below,
            estimator=self.estimator,
        )

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        loss = nll + self.beta * terms["commitment"] + terms.get("codebook", 0)
        return {"loss": loss, "nll": nll, **terms}
