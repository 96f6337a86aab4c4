"""Sparse autoencoder with a target activation (Ng 2011, CS294A notes), https://web.stanford.edu/class/cs294a/sparseAutoencoder.pdf

Each unit of a sigmoid code should be active for a fraction rho of the samples:

    L = -log p(x | g(h)) + beta sum_j KL(rho || rhohat_j) + l2 sum ||W||^2
    KL(rho || r) = rho log(rho / r) + (1 - rho) log((1 - rho) / (1 - r))     rhohat_j = mean over the batch of h_j

L is in nats per sample, and W are the weights of all layers without their biases. rhohat is a statistic of the whole
batch, over all ranks. The penalty controls only each unit's mean: without l2, the units can stay close to rho for any
code while the decoder's weights grow by the same factor, without increasing the loss.

With likelihood gaussian, -log p is the squared error up to a constant. Ng halves that error, so L is twice his
J_sparse: beta = 6 is his 3, and l2 = 1e-4 is his weight decay lambda = 1e-4, which he applies as lambda/2 ||W||^2.

Shapes: B batch, D code.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.errors import AezooError
from aezoo.training.limits import check_at_least


class SparseAEKL(NetworkAutoencoder, hidden_dims={"mlp": ()}, sparse_code=True, tags=("representation",)):
    """All units of a sigmoid code are equally and rarely active.

    Args:
        rho: target mean activation of each unit, between 0 and 1.
        beta: weight of the divergence from rho, twice that of the notes.
        l2: weight of the sum of squared weights, the notes' lambda, independent of the optimiser's weight_decay; 0
            turns it off.
        latent_dim: D, size of the code.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        rho: float = 0.05,
        beta: float = 6.0,
        l2: float = 1e-4,
        latent_dim: int = 256,
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        if not 0 < rho < 1:
            raise AezooError(f"rho must lie between 0 and 1, got {rho}")
        check_at_least(0, beta=beta, l2=l2)
        self.rho = rho
        self.beta = beta
        self.l2 = l2
        self.code_shape = (latent_dim,)
        self.encoder = self.build_encoder(self.code_shape)
        self.decoder = self.build_decoder(self.code_shape)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x).sigmoid()

    def sparsity(self, rhohat_D: Tensor) -> Tensor:
        """sum_j KL(rho || rhohat_j) in nats, (D,) -> ()."""
        # not tighter, since an inactive unit within the clamped range would receive no gradient
        r_D = rhohat_D.clamp(torch.finfo(rhohat_D.dtype).tiny, 1 - torch.finfo(rhohat_D.dtype).eps)
        on_D = self.rho * (math.log(self.rho) - torch.log(r_D))
        off_D = (1 - self.rho) * (math.log1p(-self.rho) - torch.log1p(-r_D))
        return (on_D + off_D).sum()

    def squared_weights(self) -> Tensor:
        """Return the sum of squares of all weights, without biases and the gains of normalisations."""
        matrices = [p for part in (self.encoder, self.decoder) for p in part.parameters() if p.ndim > 1]
        return torch.stack([at_least_float32(p).square().sum() for p in matrices]).sum()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        h_BD = self.encode(x)
        nll = self.nll(self.decoder(h_BD), x).mean()
        sparsity, l2 = self.sparsity(self.batch_mean(h_BD)), self.squared_weights()
        return {"loss": nll + self.beta * sparsity + self.l2 * l2, "nll": nll, "sparsity": sparsity, "l2": l2}
