"""SoftVQ-VAE, soft vector quantisation (Chen et al. 2024), https://arxiv.org/abs/2412.10958

A sequence of tokens as in TiTok (`aezoo.nets.blocks.tokens`; the initialisation is not that of the paper). Each token
is a mixture of all K codes C instead of the nearest code:

    z = f(x)    p_k = softmax_k(-||z - e_k||^2 / temperature)    z_q = sum_k p_k e_k = p C

    L = -log p(x | g(z_q)) + entropy_weight (E[H(p)] - gamma H(E[p]))

Everything is differentiable: z and the codes get the gradient of z_q itself, without a straight-through estimator, and
no term pulls z and codes together. The entropies are the paper's KL, in nats, per token, summed over the N tokens of a
sample. `entropy` is smallest when each token is one code. `diversity` is largest, N log K, when all codes are used
equally over the tokens of all ranks; exp(diversity / N) is the number of codes in use. As the temperature falls to 0,
z_q becomes the nearest code, as in VQ; as it rises, z_q becomes the mean of the codes.

The authors' code, https://github.com/Hhhhhhao/continuous_tokenizer, detaches the codes in p, so that their only
gradient is that of the mixture; here they get the gradient of the formula. It computes both entropies at a temperature
of 0.02 (0.01 of cosines), and adds 0.01 times their means over tokens to a mean over the X values of a sample, which is
an entropy_weight of 0.01 X / N here. On digits of 8 x 8 (N = 8, K = 64, 400 steps, means of three seeds; `python -m
benchmarks.deviations`), the nll was 15.2 nats with both and 16.0 here, and E[H(p)] 15.1 nats per sample instead of 8.5.

The code is a continuous mixture, so it cannot be written as indices. With cosine, z and the codes are projected to the
unit sphere, where ||z - e||^2 = 2 - 2 z.e: cosines over a temperature t, as in the paper's code, are squared distances
over 2 t.

Shapes: B batch, D channels of a token, N tokens, K codes.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.patch_transformer import PatchTransformer, PatchTransformerArgs
from aezoo.errors import AezooError
from aezoo.nets import vit
from aezoo.nets.blocks import tokens
from aezoo.quantisers.common import entropy, k_means, relative_distance
from aezoo.training.limits import check_at_least


class SoftVQ(PatchTransformer, defaults={"depth": 1, "lr": 2e-3}, tags=("tokenizer", "latent diffusion")):
    """Learns a sequence of mixtures of codes, without a grid.

    Args:
        n_tokens: N, number of tokens per sample.
        latent_dim: D, channels of a code.
        codebook_size: K, number of codes.
        temperature: temperature of the mixtures, in squared distances; near 0 a mixture is its nearest code.
        entropy_weight: weight of both entropy terms.
        gamma: weight of `diversity` relative to that of `entropy`.
        cosine: compare directions, on the unit sphere.
        data_init: on the first training batch, scale tokens to mean 0 and variance 1, and initialise the codes by
            k-means.
        **kwargs: see `PatchTransformer`.
    """

    encoder: tokens.TokenEncoder

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        n_tokens: int = 32,
        latent_dim: int = 16,
        codebook_size: int = 512,
        temperature: float = 0.14,
        entropy_weight: float = 0.1,
        gamma: float = 1.0,
        cosine: bool = True,
        data_init: bool = True,
        **kwargs: Unpack[PatchTransformerArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, entropy_weight=entropy_weight, gamma=gamma, temperature=temperature)
        check_at_least(1, n_tokens=n_tokens, latent_dim=latent_dim, codebook_size=codebook_size)
        if not temperature > 0:
            raise AezooError("temperature must be above 0: for the nearest code itself use titok")
        self.temperature = temperature
        self.entropy_weight = entropy_weight
        self.gamma = gamma
        self.cosine = cosine
        patchify = vit.Patchify(self.input_shape, self.patch_size)
        self.code_shape = latent_dim, n_tokens
        self.encoder = tokens.TokenEncoder(patchify, self.code_shape, self.widths, self.activation)
        self.decoder = tokens.TokenDecoder(patchify, self.code_shape, self.decoder_widths, self.activation)
        self.code_KD = nn.Parameter(torch.randn(codebook_size, latent_dim) * latent_dim**-0.5)
        if data_init:
            self.enable_data_init()

    def project(self, rows: Tensor) -> Tensor:
        """Return rows as they are compared with codes, in at least float32, on the unit sphere if `cosine`."""
        rows = at_least_float32(rows)
        return F.normalize(rows, dim=-1) if self.cosine else rows

    def mixtures(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z_q and p of samples, (B, *input_shape) -> (B, D, N), (B, N, K); p is in at least float32."""
        z_BDN = self.encoder(x)
        with torch.autocast(x.device.type, enabled=False):
            code_KD, rows = self.project(self.code_KD), self.project(z_BDN.transpose(1, 2))
            p_BNK = (-relative_distance(rows.flatten(0, 1), code_KD) / self.temperature).softmax(1)
            p_BNK = p_BNK.unflatten(0, rows.shape[:2])
            return (p_BNK @ code_KD).transpose(1, 2).to(z_BDN.dtype), p_BNK

    def encode(self, x: Tensor) -> Tensor:
        return self.mixtures(x)[0]

    def init_from_data(self, x: Tensor) -> None:
        self.encoder.init_from_data(x)
        rows = self.project(self.encoder(x).transpose(1, 2)).flatten(0, 1)
        self.code_KD.copy_(k_means(rows, len(self.code_KD))[0])

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, p_BNK = self.mixtures(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        alone = entropy(p_BNK).sum(1).mean()
        diversity = p_BNK.shape[1] * entropy(self.batch_mean(p_BNK.mean(1)))
        loss = nll + self.entropy_weight * (alone - self.gamma * diversity)
        return {"loss": loss, "nll": nll, "entropy": alone, "diversity": diversity}
