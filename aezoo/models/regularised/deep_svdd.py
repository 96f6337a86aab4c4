"""Deep SVDD with an autoencoder (Ruff et al. 2018), https://proceedings.mlr.press/v80/ruff18a.html

    L = alpha (-log p(x | g(z))) + SVDD     z = f(x)
    SVDD = 1/B sum_i d_i                                   one class (equation 4)     d_i = ||z_i - c||^2
    SVDD = R^2 + 1 / (nu B) sum_i max(0, d_i - R^2)        soft boundary (equation 3), nu > 0

With alpha = 0, this is the paper's objective, whose weight decay is set in the optimiser. A decoder that is trained
together with the encoder, instead of before it, ensures that the codes of different samples remain different.

c is the mean of the codes of the first batch before training (over all ranks; in the paper, over all samples), with
entries near 0 moved to -0.1 or 0.1. It stays fixed. f has no biases and nothing that could have the same effect, such
as positional embeddings or activations that saturate at a value other than 0: with these, f could be the constant c
(propositions 1 to 3). R is the 1 - nu quantile of the previous batch's distances over all ranks, as in the authors'
code, and 0 before the first batch.

The score is d - R^2, which is above 0 outside; with one class, it is d. `aezoo detect --score deep_svdd` fine-tunes a
copy of a trained model's encoder with this objective.

Shapes: B batch, N samples on all ranks, D code.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.errors import AezooError
from aezoo.training.limits import check_at_least

# networks without positional embeddings, gates or a final normalisation
_NETS = ("mlp", "conv", "resnet", "convnext", "conv_keras", "unet", "gdn", "dc")
# activations that are 0 at 0 and saturate at no other value
_ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu", "identity", "gated")
_NEAR_0 = 0.1


class DeepSVDD(
    NetworkAutoencoder,
    hidden_dims={"mlp": (128,)},
    defaults={"activation": "leaky_relu", "likelihood": "gaussian"},
    tags=("anomaly",),
):
    """An autoencoder whose codes are trained to be near one point; samples with codes far from it are anomalous.

    Args:
        latent_dim: D, size of the code.
        nll_weight: alpha, weight of the reconstruction; with 0, the decoder is not trained.
        nu: fraction of the samples that may lie outside of a soft boundary, below 1; 0 is the one-class objective.
        net: mlp, conv, resnet, convnext, conv_keras, unet, gdn or dc.
        activation: relu, leaky_relu, gelu, silu, identity or (mlp) gated, between layers.
        **kwargs: see `NetworkAutoencoder`.
    """

    centre_D: Tensor
    radius: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 32,
        nll_weight: float = 1.0,
        nu: float = 0.0,
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(0, nll_weight=nll_weight)
        if not 0 <= nu < 1:
            raise AezooError(f"nu must be at least 0 and below 1, got {nu}")
        for kind, name, fit in (("net", self.net, _NETS), ("activation", self.activation, _ACTIVATIONS)):
            if name not in fit:
                raise AezooError(
                    f"deep_svdd would map everything to one point by {kind} {name!r}: choose from {', '.join(fit)}"
                )
        self.nll_weight = nll_weight
        self.nu = nu
        self.code_shape = (latent_dim,)
        self.encoder = self.build_encoder(self.code_shape)
        for layer in self.encoder.modules():
            if isinstance(getattr(layer, "bias", None), nn.Parameter):
                layer.register_parameter("bias", None)
        self.decoder = self.build_decoder(self.code_shape)
        self.register_buffer("centre_D", torch.full(self.code_shape, _NEAR_0))
        self.register_buffer("radius", torch.zeros(()))
        self.enable_data_init()

    def init_from_data(self, x: Tensor) -> None:
        """Initialise c to the mean of the samples' codes, (N, *input_shape)."""
        mean_D = at_least_float32(self.encoder(x)).mean(0)
        away_D = torch.full_like(mean_D, _NEAR_0).copysign(mean_D)
        self.centre_D.copy_(torch.where(mean_D.abs() < _NEAR_0, away_D, mean_D))

    def distances(self, z_BD: Tensor) -> Tensor:
        """Return ||z - c||^2, (B, D) -> (B,)."""
        return (at_least_float32(z_BD) - at_least_float32(self.centre_D)).square().sum(1)

    @torch.no_grad()
    def update_radius(self, d_B: Tensor) -> None:
        """Set the radius for the next batch from the squared distances of the current batch, (B,)."""
        self.radius.copy_(self.all_gather_batch(d_B).sqrt().quantile(1 - self.nu))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BD = self.encode(x)
        nll, d_B = self.nll(self.decoder(z_BD), x).mean(), self.distances(z_BD)
        if not self.nu:
            svdd = d_B.mean()
            return {"loss": self.nll_weight * nll + svdd, "nll": nll, "svdd": svdd}
        radius = at_least_float32(self.radius).clone()
        svdd = radius**2 + (d_B - radius**2).relu().mean() / self.nu
        if self.training:
            self.update_radius(d_B)
        return {"loss": self.nll_weight * nll + svdd, "nll": nll, "svdd": svdd, "radius": radius}

    def score(self, x: Tensor) -> Tensor:
        """Return ||z - c||^2 - R^2, which is above 0 outside of a soft boundary, (B, *input_shape) -> (B,)."""
        return self.distances(self.encode(x)) - at_least_float32(self.radius) ** 2
