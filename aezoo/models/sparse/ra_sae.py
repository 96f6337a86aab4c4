"""Relaxed archetypal sparse autoencoder (Fel et al. 2025), https://arxiv.org/abs/2502.12892

Directions are convex combinations of data points plus a small deviation, so that a dictionary stays near the data and
two fits give similar directions, as in archetypal analysis (Cutler & Breiman 1994):

    D = W A + Lambda     W >= 0     sum_j W_ij = 1     ||Lambda_i|| <= delta
    f = relu(topk_k(W_enc x + b_enc))     x_hat = sum_i f_i d_i
    L = -log p(x | x_hat) + alpha s ||e - e_hat||^2     AuxK and its s as in TopK

L is in nats per sample. delta = 0 is A-SAE, whose directions lie in the convex hull of the points A. These are samples
of the first batch of all ranks (the authors use means of clusters) and are not trained. Directions are initialised to
the points; if there are more directions than points, the others are initialised to midpoints between two points. As in
the authors' code, directions may have any norm and there is no bias; the code's factor of D is omitted, since the codes
absorb it. After each step, the rows of W are projected onto the simplex (the authors divide relu(W) by its sum), and
the rows of Lambda onto balls of radius delta. The encoder is initialised to its own directions, scaled so that x_hat
has the norm of x; if it were initialised to those of the points, similar latents would be active together.

Shapes: B batch, X data dimensions, N latents, P points.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import normalize

from aezoo.autoencoder import at_least_float32
from aezoo.models.sparse.topk_sae import SparsityArgs, TopKSAE
from aezoo.nets.blocks.dictionary import Dictionary, project_to_simplex
from aezoo.training.limits import check_at_least


class Archetypes(Dictionary):
    """Directions within delta of the convex hull of points, without a bias.

    Args:
        latent_dim: N, number of directions.
        input_shape: shape of one sample, that of the output.
        n_points: P, number of points.
        delta: maximum distance of a direction from the convex hull.
    """

    points_PX: Tensor

    def __init__(self, latent_dim: int, input_shape: tuple[int, ...], n_points: int, delta: float) -> None:
        super().__init__(latent_dim, input_shape, "dense")
        self.delta = delta
        self.lambda_NX = nn.Parameter(torch.zeros_like(self.W_NX))
        del self.W_NX, self.b_X
        self.register_buffer("points_PX", torch.empty(n_points, self.lambda_NX.shape[1]))
        self.shares_NP = nn.Parameter(torch.empty(latent_dim, n_points))
        self.init_from_data(normalize(torch.randn_like(self.points_PX)))  # placeholders until init_from_data is called

    @torch.no_grad()
    def init_from_data(self, x_BX: Tensor) -> None:
        """Set the points to samples, and the directions to points and to midpoints between two points."""
        n = min(len(self.points_PX), len(x_BX))
        self.points_PX.copy_(x_BX[torch.arange(len(self.points_PX), device=x_BX.device) % n])
        i_N = torch.arange(len(self.shares_NP), device=x_BX.device)
        self.shares_NP.zero_().scatter_(1, torch.stack([i_N, i_N + i_N // n], 1) % n, 1.0)
        self.shares_NP.div_(self.shares_NP.sum(1, keepdim=True))

    def directions(self) -> Tensor:
        with torch.autocast(self.shares_NP.device.type, enabled=False):  # rounded shares would not sum to 1
            return F.linear(self.shares_NP, self.points_PX.t()) + self.lambda_NX

    def with_bias(self, sum_BX: Tensor) -> Tensor:
        return sum_BX.unflatten(1, self.input_shape)

    def remove_parallel_gradient(self) -> None:
        """Leave the gradient unchanged."""

    @torch.no_grad()
    def normalise(self) -> None:
        """Project W and Lambda onto their constraints."""
        self.shares_NP.copy_(project_to_simplex(self.shares_NP))
        norm_N1 = at_least_float32(self.lambda_NX).norm(dim=1, keepdim=True)
        self.lambda_NX.mul_((self.delta / norm_N1.clamp(min=1e-12)).clamp(max=1))


class RASAE(TopKSAE, tags=("interpretability",)):
    """At most k active latents per sample, with directions near convex combinations of data points.

    Args:
        n_points: P, number of samples of the first batch that serve as points; fewer if the batch is smaller.
        delta: maximum norm of a direction's deviation from its convex combination.
        **kwargs: see `TopKSAE`.
    """

    encoder: nn.Linear
    decoder: Archetypes

    def __init__(
        self, input_shape: tuple[int, ...], *, n_points: int = 128, delta: float = 1.0, **kwargs: Unpack[SparsityArgs]
    ) -> None:
        super().__init__(input_shape, data_init=True, **kwargs)
        check_at_least(1, n_points=n_points)
        check_at_least(0, delta=delta)
        self.decoder = Archetypes(self.latent_dim, self.input_shape, n_points, delta)

    def pre_activations(self, x: Tensor) -> Tensor:
        pi: Tensor = self.encoder(x.flatten(1))
        return pi

    def init_from_data(self, x: Tensor) -> None:
        self.decoder.init_from_data(x.flatten(1))
        scale = x.flatten(1).norm(dim=1).mean() / self.decoder(self.encode(x)).flatten(1).norm(dim=1).mean()
        self.encoder.weight.mul_(scale if scale.isfinite() else 1)
