"""TiTok, a transformer-based 1-dimensional tokenizer (Yu et al. 2024), https://arxiv.org/abs/2406.07550

The code has no grid. A vision transformer reads patches P together with N learned latent tokens l. Only the outputs of
the latent tokens are kept, and each becomes the nearest of K codes. A second transformer reads these together with mask
tokens m and outputs the patches:

    z = f(P, l)    u = z / ||z||    z_q = e_k / ||e_k||, k = argmin_j ||u - e_j / ||e_j|| ||    x_hat = g(m, z_q)

    L = -log p(x | x_hat) + ||sg(u) - z_q||^2 + beta ||u - sg(z_q)||^2

summed over tokens. beta weights only the commitment loss. With update ema, codes are moving averages and there is no
second term. N is a free choice, the same for every size of a sample.

The paper first trains the decoder to predict the codes of a pretrained MaskGIT-VQGAN, and then trains only decoders
with a perceptual and an adversarial loss. Here everything is trained in one stage on the likelihood of the data, which
needs no other model; the paper's code has this too. The initialisation is our own as well, see
`aezoo.nets.blocks.tokens`.

Shapes: B batch, D channels of a token, N tokens, K codes.
"""

from typing import Unpack

from torch import Tensor

from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.nets import vit
from aezoo.nets.blocks import tokens
from aezoo.quantisers.vq import VQ
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import at_least


class TiTok(DiscreteAutoencoder, defaults={"lr": 2e-3}):
    """A row of codes from one codebook, without a grid.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), of any size.
        n_tokens: N, codes per sample.
        latent_dim: D, channels of a code.
        codebook_size: K, number of codes.
        beta: weight of the commitment loss.
        update: how codes learn: ema, moving averages, or gradient.
        decay: decay rate of the moving averages.
        dead_below: mean rows per batch below which a code moves to a row; at most rows / 2K where rows <= K; 0: never.
        estimator: how the gradient passes through the quantiser: ste, rotation, gumbel or diveq.
        cosine: compare directions, on the unit sphere.
        data_init: on the first training batch, scale tokens to mean 0 and variance 1, and start the codes by k-means.
        patch_size: side of a patch; 0 chooses it so that a sample has at most 64, with a side of at most 16.
        width: width of a token in the encoder.
        depth: number of blocks of the encoder.
        decoder_width: width of a token in the decoder.
        decoder_depth: number of blocks of the decoder.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers.
        **kwargs: see `Autoencoder`.
    """

    encoder: tokens.TokenEncoder

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        n_tokens: int = 32,
        latent_dim: int = 16,
        codebook_size: int = 512,
        beta: float = 0.25,
        update: str = "ema",
        decay: float = 0.99,
        dead_below: float = 1.0,
        estimator: str = "ste",
        cosine: bool = True,
        data_init: bool = True,
        patch_size: int = 0,
        width: int = 64,
        depth: int = 1,
        decoder_width: int = 64,
        decoder_depth: int = 2,
        activation: str = "gelu",
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        at_least(0, beta=beta)
        at_least(1, n_tokens=n_tokens, latent_dim=latent_dim, codebook_size=codebook_size)
        at_least(1, width=width, depth=depth, decoder_width=decoder_width, decoder_depth=decoder_depth)
        self.beta = beta
        patchify = vit.Patchify(self.input_shape, patch_size)
        self.code_shape = latent_dim, n_tokens
        self.encoder = tokens.TokenEncoder(patchify, self.code_shape, (width,) * depth, activation)
        self.decoder = tokens.TokenDecoder(patchify, self.code_shape, (decoder_width,) * decoder_depth, activation)
        self.quantiser = VQ(
            latent_dim,
            codebook_size,
            update=update,
            decay=decay,
            dead_below=dead_below,
            estimator=estimator,
            cosine=cosine,
        )
        if data_init:
            self.enable_data_init()

    def init_from_data(self, x: Tensor) -> None:
        self.encoder.init_from_data(x)
        super().init_from_data(x)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        loss = nll + self.beta * terms["commitment"] + terms.get("codebook", 0)
        return {"loss": loss, "nll": nll, **terms}
