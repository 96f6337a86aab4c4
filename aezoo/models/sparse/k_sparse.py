"""k-sparse autoencoder (Makhzani & Frey 2013), https://arxiv.org/abs/1312.5663

The sample is reconstructed from the k largest units of a linear code, with the transpose of the encoder's weights:

    z = W x + b     G = supp_k(z)     x_hat = W' z_G + c     L = -log p(x | x_hat)     (algorithm 1)

L is in nats per sample. z_G is z with all but the k largest units set to 0. There is no other non-linearity. k may
decrease during training, from start_k to k over k_steps optimiser steps, so that no unit dies while k is small (section
2.3). Codes, reconstructions and scores use the alpha k largest units (section 2.2); the loss in evaluation uses the k
largest. If k equals the size of the code, this is the linear autoencoder with tied weights.

Shapes: B batch, X data dimensions, N units.
"""

import math
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.nets.blocks.dictionary import scatter_code
from aezoo.nets.blocks.tied import Transposed
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import check_at_least


class KSparse(Autoencoder, defaults={"likelihood": "gaussian"}, sparse_code=True, tags=("representation",)):
    """A linear code with exactly k active units for each sample; encoder and decoder share their weights.

    Args:
        input_shape: shape of one sample; any shape is valid, samples are flattened.
        latent_dim: N, number of units.
        k: active units per sample.
        start_k: active units at the first step, k if 0; about 100 if k is below 15.
        k_steps: optimiser steps over which the number decreases linearly from start_k to k; 0 disables the schedule.
        alpha: codes, reconstructions and scores use the alpha k largest units, rounded to the nearest whole number; the
            paper has 1 to 3, for codes that are classified.
        **kwargs: see `Autoencoder`.
    """

    steps: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 512,
        k: int = 25,
        start_k: int = 0,
        k_steps: int = 0,
        alpha: float = 1.0,
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        if not 1 <= k <= latent_dim:
            raise AezooError(f"k must lie between 1 and latent_dim={latent_dim}, got {k}")
        if start_k != 0 and not k <= start_k <= latent_dim:
            raise AezooError(f"start_k must be 0 or lie between k={k} and latent_dim={latent_dim}, got {start_k}")
        check_at_least(0, k_steps=k_steps)
        if not 0 < alpha * k <= latent_dim:
            raise AezooError(f"alpha must be above 0 and alpha k at most latent_dim={latent_dim}, got alpha={alpha}")
        self.k = k
        self.k_steps = k_steps
        self.start_k = start_k or k
        self.test_k = max(1, round(alpha * k))
        self.code_shape = (latent_dim,)
        self.encoder = nn.Linear(math.prod(self.input_shape), latent_dim)
        self.decoder = Transposed(self.encoder, self.input_shape)
        self.enable_step_counter()

    def present_k(self) -> Tensor:
        """Return the number of active units at the current step of the schedule, ()."""
        share = self.step_fraction(self.k_steps)
        return (self.start_k + (self.k - self.start_k) * share).round()

    def top(self, z_BN: Tensor, most: int, k: Tensor | int) -> Tensor:
        """Keep the k largest units of each row, with k at most `most`, and set the others to 0, (B, N) -> (B, N)."""
        values_Bk, index_Bk = z_BN.topk(most, dim=1)
        kept_k = torch.arange(most, device=z_BN.device) < k
        return scatter_code(values_Bk * kept_k, index_Bk, z_BN.shape[1])

    def encode(self, x: Tensor) -> Tensor:
        return self.top(self.encoder(x.flatten(1)), self.test_k, self.test_k)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BN = self.encoder(x.flatten(1))
        z_BN = self.top(z_BN, self.start_k, self.present_k()) if self.training else self.top(z_BN, self.k, self.k)
        nll_B = self.nll(self.decoder(z_BN), x)
        nll = nll_B.mean()
        return {"loss": nll, "nll": nll, "l0": (z_BN != 0).sum(1).float().mean()}
