"""BSQ autoencoder, binary spherical quantisation (Zhao et al. 2024), https://arxiv.org/abs/2406.07548

This is `lfq_vae` on the unit sphere, where the distance to a code is bounded:

    z = f(x)    u = z / ||z||    z_q = sign(u) / sqrt(D)    gradient of u = gradient of z_q

    L = -log p(x | g(z_q)) + w (E H(p(c|u)) - gamma H(E p(c|u))) + beta ||u - sg(z_q)||^2

u stays near its code, so beta may be 0, which is the default. For w see `lfq_vae`.

In the authors' code, https://github.com/zhaoyue-zephyrus/bsq-vit, the straight-through estimator is applied before the
factor 1 / sqrt(D), so that the gradient of u is that of z_q divided by sqrt(D), and the relative weight of the
entropies is sqrt(D) times as large. On digits of 8 x 8 (D = 9, 400 steps, means of three seeds; `python -m
benchmarks.deviations`), this gave an nll of 17.6 nats instead of 16.8, entropies of 25.9 instead of 27.5, and
diversities of 98.0 instead of 97.9.
"""

from typing import ClassVar

from aezoo.models.quantised.lfq_vae import LFQVAE
from aezoo.quantisers.bsq import BSQ
from aezoo.quantisers.lfq import LFQ


class BSQVAE(LFQVAE, defaults={"beta": 0.0}, tags=("tokenizer", "compression")):
    """Learns a map of binary codes, the corners of a hypercube on the unit sphere."""

    quantiser_class: ClassVar[type[LFQ]] = BSQ
