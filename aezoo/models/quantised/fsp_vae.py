"""FSP autoencoder, finite scalar perturbation (Zhai et al. 2026), https://arxiv.org/abs/2602.17133

This is `fsq_vae` with values at the middle of equal intervals. In training, random perturbations replace half of the
rounding (`aezoo.quantisers.fsp`):

    p = g(f(x))    z_q = sqrt(12) (p_q - 1/2)    p_q the middle of p's interval, or in training p + u

    L = -log p(x | g(z_q)) + lam_1 ||mu||^2 + lam_2 ||sigma^2 - sigma_g^2||^2

The last two terms use the mean and the variance of each channel of f(x) over all positions of a batch, and are summed
over positions. sigma_g^2 is the variance of the distribution whose distribution function is g. With this variance, p is
roughly uniform and all codes are in use.
"""

from typing import Unpack

from torch import Tensor

from aezoo.bases.quantised import CodeMapArgs, CodeMapAutoencoder
from aezoo.quantisers.fsp import FSP
from aezoo.training.limits import check_at_least


class FSPVAE(CodeMapAutoencoder, tags=("tokenizer",)):
    """Learns a map of channels with few values each; in training, noise of similar size replaces part of the rounding.

    Args:
        levels: number of values of each channel of a code; K is their product.
        squash: g, the map of a channel to [0, 1]: tanh, sigmoid or normal, the distribution function.
        eta: width of a perturbation relative to that of an interval.
        quantised: probability that a number is quantised in training instead of perturbed.
        mean_weight: lam_1.
        variance_weight: lam_2.
        **kwargs: see `CodeMapAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        levels: tuple[int, ...] = (8, 5, 5, 5),
        squash: str = "tanh",
        eta: float = 1.0,
        quantised: float = 0.5,
        mean_weight: float = 0.5,
        variance_weight: float = 0.35,
        **kwargs: Unpack[CodeMapArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, mean_weight=mean_weight, variance_weight=variance_weight)
        self.mean_weight = mean_weight
        self.variance_weight = variance_weight
        self.quantiser = FSP(tuple(levels), squash=squash, eta=eta, quantised=quantised)
        self.build_code_nets(len(levels), len(levels))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        loss = nll + self.mean_weight * terms["code_mean"] + self.variance_weight * terms["code_variance"]
        return {"loss": loss, "nll": nll, **terms}
