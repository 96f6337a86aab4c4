"""BSQ autoencoder, binary spherical quantisation (Zhao et al. 2024), https://arxiv.org/abs/2406.07548

This is `lfq_vae` on the unit sphere, where the distance to a code is bounded:

    z = f(x)    u = z / ||z||    z_q = sign(u) / sqrt(D)    gradient of u = gradient of z_q

    L = -log p(x | g(z_q)) + w (E H(p(c|u)) - gamma H(E p(c|u))) + beta ||u - sg(z_q)||^2

u cannot drift away from its code, so beta may be 0, which is the default. For w see `lfq_vae`.

In the authors' code, https://github.com/zhaoyue-zephyrus/bsq-vit, the straight-through estimator stands inside the
factor 1 / sqrt(D), so that the gradient of u is that of z_q divided by sqrt(D), and the entropies weigh sqrt(D) times
as much beside it. On digits of 8 x 8 (D = 9, 400 steps, means of three seeds; `python -m benchmarks.deviations`) this
gave an nll of 17.6 nats in place of 16.8, entropies of 25.9 in place of 27.5, and diversities of 98.0 in place of 97.9.
"""

from typing import ClassVar

from aezoo.models.quantised.lfq_vae import LFQVAE
from aezoo.quantisers.bsq import BSQ
from aezoo.quantisers.lfq import LFQ


class BSQVAE(LFQVAE, defaults={"beta": 0.0}, tags=("tokenizer", "compression")):
    """A map of binary codes: the corners of a hypercube on the unit sphere."""

    quantiser_class: ClassVar[type[LFQ]] = BSQ
