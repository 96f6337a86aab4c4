"""VQ-VAE, vector-quantised autoencoder (van den Oord et al. 2017), https://arxiv.org/abs/1711.00937

Each place of the encoder's output becomes the nearest of K codes (equation 3):

    z = f(x)    z_q = e_k, k = argmin_j ||z - e_j||    gradient of z = gradient of z_q

    L = -log p(x | g(z_q)) + ||sg(z) - e_k||^2 + beta ||z - sg(e_k)||^2

summed over places. beta weights only the commitment loss, which keeps the encoder near its codes. With update ema there
is no second term: codes are moving averages of the rows that chose them (appendix A.1).

With n_groups G above 1, this is product quantisation (Jégou et al. 2011, https://doi.org/10.1109/TPAMI.2010.57): the
channels of a place are split into G groups, each with its own codebook and index, so that G K vectors give K^G codes.

Shapes: B batch, D channels of a code, K codes, G groups.
"""

from collections.abc import Callable
from functools import partial
from typing import Unpack

from torch import Tensor

from aezoo.bases.quantised import CodeMapArgs, CodeMapAutoencoder
from aezoo.quantisers.base import Quantiser
from aezoo.quantisers.grouped_vq import GroupedVQ
from aezoo.quantisers.vq import VQ
from aezoo.training.limits import at_least


class VQVAE(CodeMapAutoencoder):
    """A map of codes from one codebook, or from one codebook for each group of channels.

    Args:
        latent_dim: D, channels of a code.
        codebook_size: K, codes of each codebook.
        n_groups: G, a divisor of D: number of codebooks, each for an equal share of the channels.
        beta: weight of the commitment loss.
        update: how codes learn: ema, moving averages, or gradient.
        decay: decay rate of the moving averages.
        dead_below: mean rows per batch below which a code moves to a row; at most rows / 2K where rows <= K; 0: never.
        estimator: how the gradient passes through the quantiser: ste, rotation, gumbel or diveq.
        cosine: compare directions, on the unit sphere.
        data_init: initialise the codes by k-means on the first training batch.
        **kwargs: see `CodeMapAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        codebook_size: int = 512,
        n_groups: int = 1,
        beta: float = 0.25,
        update: str = "ema",
        decay: float = 0.99,
        dead_below: float = 1.0,
        estimator: str = "ste",
        cosine: bool = False,
        data_init: bool = True,
        **kwargs: Unpack[CodeMapArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        at_least(0, beta=beta)
        at_least(1, codebook_size=codebook_size, n_groups=n_groups)
        self.beta = beta
        self.build_code_nets(latent_dim, latent_dim)
        # a single codebook keeps the parameter names of earlier checkpoints
        one = n_groups == 1
        make: Callable[..., Quantiser] = partial(VQ, latent_dim) if one else partial(GroupedVQ, latent_dim, n_groups)
        self.quantiser = make(
            codebook_size,
            update=update,
            decay=decay,
            dead_below=dead_below,
            estimator=estimator,
            cosine=cosine,
        )
        if data_init:
            self.enable_data_init()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        loss = nll + self.beta * terms["commitment"] + terms.get("codebook", 0)
        return {"loss": loss, "nll": nll, **terms}
