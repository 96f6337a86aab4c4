"""VQ-VAE, vector-quantised autoencoder (van den Oord et al. 2017), https://arxiv.org/abs/1711.00937

The encoder's output at each position is replaced by the nearest of K codes (equation 3):

    z = f(x)    z_q = e_k, k = argmin_j ||z - e_j||    gradient of z = gradient of z_q

    L = -log p(x | g(z_q)) + ||sg(z) - e_k||^2 + beta ||z - sg(e_k)||^2

summed over positions. beta multiplies only the commitment loss, which keeps the encoder near its codes. With update
ema, there is no second term: codes are moving averages of the rows assigned to them (appendix A.1).

The terms are sums, as in equation 3. The authors' code has means over the X values of a sample and over the P D values
of its code, P positions of D, so its beta is beta X / (P D) here, and so is its weight of the second term: the same for
samples of 28 x 28 with 7 x 7 positions of 16 channels. On digits of 8 x 8, where this is beta / 4 (moving averages, 64
codes, 400 steps, means of three seeds; `python -m benchmarks.deviations`), the commitment loss was 8.3 instead of 2.2,
and the nll 16.1 nats with both.

With n_groups G above 1, this is product quantisation (Jégou et al. 2011, https://doi.org/10.1109/TPAMI.2010.57): the
channels at a position are split into G groups, each with a separate codebook and index, so that G K vectors give K^G
codes.

Shapes: B batch, D channels of a code, K codes, G groups.
"""

from typing import Unpack

from torch import Tensor

from aezoo.bases.quantised import CodeMapAutoencoder
from aezoo.bases.vector_quantised import VQAutoencoder, VQMapArgs
from aezoo.quantisers.grouped_vq import GroupedVQ
from aezoo.training.limits import check_at_least


class VQVAE(VQAutoencoder, CodeMapAutoencoder, tags=("tokenizer",)):
    """Learns a map of codes from one codebook, or from one codebook for each group of channels.

    Args:
        n_groups: G, a divisor of D: number of codebooks, each for an equal share of the channels.
        **kwargs: see `VQAutoencoder` and `CodeMapAutoencoder`.
    """

    def __init__(self, input_shape: tuple[int, ...], *, n_groups: int = 1, **kwargs: Unpack[VQMapArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, n_groups=n_groups)
        self.build_code_nets(self.latent_dim, self.latent_dim)
        # a single codebook keeps the parameter names of earlier checkpoints
        if n_groups == 1:
            self.quantiser = self.build_vq()
        else:
            self.quantiser = GroupedVQ(self.latent_dim, n_groups, self.codebook_size, **self.vq_settings)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        loss = nll + self.beta * terms["commitment"] + terms.get("codebook", 0)
        return {"loss": loss, "nll": nll, **terms}
