"""TiTok, a transformer-based 1-dimensional tokenizer (Yu et al. 2024), https://arxiv.org/abs/2406.07550

The code has no grid. The input of a vision transformer is patches P and N learned latent tokens l. Only the outputs of
the latent tokens are kept, and each is replaced by the nearest of K codes. The input of a second transformer is these
codes and mask tokens m, and its outputs are the patches:

    z = f(P, l)    u = z / ||z||    z_q = e_k / ||e_k||, k = argmin_j ||u - e_j / ||e_j|| ||    x_hat = g(m, z_q)

    L = -log p(x | x_hat) + ||sg(u) - z_q||^2 + beta ||u - sg(z_q)||^2

summed over tokens. beta multiplies only the commitment loss. With update ema, codes are moving averages and there is no
second term. N does not depend on the size of a sample.

The authors' code, https://github.com/bytedance/1d-tokenizer, has means over the X values of a sample and over the N D
values of a code, so its beta, and its weight of the second term, are X / (N D) times as large here. On digits of 8 x 8,
where this is 2 (moving averages, K = 64, 400 steps, means of three seeds; `python -m benchmarks.deviations`), the nll
was 17.0 nats instead of 16.9.

The paper first trains the decoder to predict the codes of a pretrained MaskGIT-VQGAN, and then trains only decoders
with a perceptual and an adversarial loss. Here everything is trained in one stage on the likelihood of the data,
without another model, which the paper's code also offers. The initialisation is not that of the paper, see
`aezoo.nets.blocks.tokens`.

Shapes: B batch, D channels of a token, N tokens, K codes.
"""

from typing import Unpack

from torch import Tensor

from aezoo.bases.patch_transformer import PatchTransformer, PatchTransformerArgs
from aezoo.bases.vector_quantised import VQArgs, VQAutoencoder
from aezoo.nets import vit
from aezoo.nets.blocks import tokens
from aezoo.training.limits import check_at_least


class TiTokArgs(VQArgs, PatchTransformerArgs, total=False):
    """Arguments that `TiTok` passes to its bases."""


class TiTok(VQAutoencoder, PatchTransformer, defaults={"cosine": True, "depth": 1, "lr": 2e-3}, tags=("tokenizer",)):
    """Learns a sequence of codes from one codebook, without a grid.

    Args:
        n_tokens: N, number of codes per sample.
        data_init: on the first training batch, scale tokens to mean 0 and variance 1, and initialise the codes by
            k-means.
        **kwargs: see `VQAutoencoder` and `PatchTransformer`.
    """

    encoder: tokens.TokenEncoder

    def __init__(self, input_shape: tuple[int, ...], *, n_tokens: int = 32, **kwargs: Unpack[TiTokArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, n_tokens=n_tokens)
        patchify = vit.Patchify(self.input_shape, self.patch_size)
        self.code_shape = self.latent_dim, n_tokens
        self.encoder = tokens.TokenEncoder(patchify, self.code_shape, self.widths, self.activation)
        self.decoder = tokens.TokenDecoder(patchify, self.code_shape, self.decoder_widths, self.activation)
        self.quantiser = self.build_vq()

    def init_from_data(self, x: Tensor) -> None:
        self.encoder.init_from_data(x)
        super().init_from_data(x)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        loss = nll + self.beta * terms["commitment"] + terms.get("codebook", 0)
        return {"loss": loss, "nll": nll, **terms}
