"""Matching pursuit sparse autoencoder (Costa et al. 2025), https://arxiv.org/abs/2506.03093

The dictionary is also the encoder. In each of k steps, the projection on the direction with the largest inner product
with the residual is subtracted from the residual (Mallat & Zhang 1993), so that each latent only encodes what earlier
ones have not explained:

    r_0 = x - b     i_t = argmax_i d_i r_{t-1}     c_t = relu(d_{i_t} r_{t-1})     r_t = r_{t-1} - c_t d_{i_t}
    f = sum_t c_t e_{i_t}     x_hat = W f + b     ||d_i|| = 1     L = -log p(x | x_hat)

L is in nats per sample. ||r_t|| never increases, and without the likelihood's mean, x_hat = x - r_k. Gradients pass
through all c_t but not through the choice i_t. With orthogonal directions, this is TopK.

Shapes: B batch, X data dimensions, N latents, k steps.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.errors import AezooError
from aezoo.nets.blocks.dictionary import Dictionary, UnitNorm
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import check_at_least


class MatchingPursuitSAE(
    UnitNorm, Autoencoder, defaults={"likelihood": "gaussian"}, sparse_code=True, tags=("interpretability",)
):
    """At most k active latents per sample, chosen one after the other.

    Args:
        input_shape: shape of one sample; any shape is valid, samples are flattened.
        latent_dim: N, number of latents in the dictionary.
        k: steps of the pursuit; a latent may be chosen more than once.
        dead_after: a latent is dead if it has not been active for this many samples.
        data_init: initialise the bias to the geometric median of the first training batch.
        **kwargs: see `Autoencoder`.
    """

    decoder: Dictionary

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 512,
        k: int = 16,
        dead_after: int = 20_000,
        data_init: bool = False,
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        if not 1 <= k <= latent_dim:
            raise AezooError(f"k must lie between 1 and latent_dim={latent_dim}, got {k}")
        check_at_least(1, dead_after=dead_after)
        self.k = k
        self.code_shape = (latent_dim,)
        self.encoder = nn.Flatten()
        self.decoder = Dictionary(latent_dim, self.input_shape)
        self.init_dictionary_training(latent_dim, dead_after, data_init)

    @torch.no_grad()
    def choose(self, r_BX: Tensor) -> Tensor:
        """Return i_1 ... i_k, (B, X) -> (B, k)."""
        W_NX, r_BX, chosen = at_least_float32(self.decoder.W_NX), at_least_float32(r_BX), []
        with torch.autocast(r_BX.device.type, enabled=False):  # rounding could change the choice between similar values
            for _ in range(self.k):
                chosen.append(F.linear(r_BX, W_NX).argmax(1))
                _, r_BX = self.subtract_projection(r_BX, W_NX[chosen[-1]])
        return torch.stack(chosen, 1)

    def subtract_projection(self, r_BX: Tensor, d_BX: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficient of a direction and the remaining residual, (B, X), (B, X) -> (B, 1), (B, X)."""
        r_BX, d_BX = at_least_float32(r_BX), at_least_float32(d_BX)
        c_B1 = (d_BX * r_BX).sum(1, keepdim=True).relu()
        return c_B1, r_BX - c_B1 * d_BX

    def encode(self, x: Tensor) -> Tensor:
        r_BX = self.encoder(x) - self.decoder.b_X
        index_Bk = self.choose(r_BX)
        # one gather for all steps, so that there is only one gradient of the size of the dictionary; unbind, because
        # a slice at each step would have a gradient of the size of the whole tensor
        d_BkX, values = F.embedding(index_Bk, self.decoder.W_NX), []
        for d_BX in d_BkX.unbind(1):
            c_B1, r_BX = self.subtract_projection(r_BX, d_BX)
            values.append(c_B1)
        values_Bk = torch.cat(values, 1)
        zeros_BN = values_Bk.new_zeros(x.shape[0], *self.code_shape)
        return zeros_BN.scatter_add(1, index_Bk, values_Bk).to(x.dtype)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        f_BN = self.encode(x)
        nll = self.nll(self.decoder(f_BN), x).mean()
        return {"loss": nll, "nll": nll, **self.usage_terms(f_BN)}
