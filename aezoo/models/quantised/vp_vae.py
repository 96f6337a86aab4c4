"""VP-VAE, vector perturbation autoencoder (Zhai et al. 2026), https://arxiv.org/abs/2602.17133

The model trains without a codebook. The encoder's output at each position is perturbed about as much as by
quantisation, such that the distribution of codes is preserved (`aezoo.quantisers.vector_perturbation`, a
Metropolis-Hastings step):

    z = f(x)    z_q = z + u, or z where u is rejected    gradient of z = gradient of z_q

    L = -log p(x | g(z_q)) + lam_1 ||mu||^2 + lam_2 ||sigma^2 - 1||^2

The last two terms use the mean and the variance of each channel over all positions of a batch, and are summed over
positions. Evaluation quantises to the nearest of K codes, which are moving averages of z and do not enter the loss. The
authors weight means over channels by 0.1 and 0.07, relative to a mean over the data's dimensions.
"""

from typing import Unpack

from torch import Tensor

from aezoo.bases.quantised import CodeMapAutoencoder
from aezoo.bases.vector_quantised import CodebookAutoencoder, CodebookMapArgs
from aezoo.quantisers.vector_perturbation import VectorPerturbation
from aezoo.training.limits import check_at_least


class VPVAE(CodebookAutoencoder, CodeMapAutoencoder, defaults={"latent_dim": 4}, tags=("tokenizer",)):
    """Learns a map of codes that is perturbed in training and quantised with one codebook afterwards.

    Args:
        eta: largest perturbation, relative to the distance to the S / K-th nearest row.
        neighbours: k, the neighbour whose distance estimates the density of codes.
        queue_size: S, rows of earlier batches from which both are estimated.
        share: share of the rows of a batch that enter the queue.
        mean_weight: lam_1.
        variance_weight: lam_2.
        data_init: initialise the codes by k-means on the first training batch, and fill the queue with its rows.
        **kwargs: see `CodebookAutoencoder` and `CodeMapAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        eta: float = 1.0,
        neighbours: int = 8,
        queue_size: int = 4096,
        share: float = 0.1,
        mean_weight: float = 0.5,
        variance_weight: float = 0.35,
        **kwargs: Unpack[CodebookMapArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, mean_weight=mean_weight, variance_weight=variance_weight)
        self.mean_weight = mean_weight
        self.variance_weight = variance_weight
        self.build_code_nets(self.latent_dim, self.latent_dim)
        self.quantiser = VectorPerturbation(
            self.latent_dim,
            self.codebook_size,
            eta=eta,
            neighbours=neighbours,
            queue_size=queue_size,
            share=share,
            decay=self.decay,
            dead_below=self.dead_below,
        )

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        loss = nll + self.mean_weight * terms["code_mean"] + self.variance_weight * terms["code_variance"]
        return {"loss": loss, "nll": nll, **terms}
