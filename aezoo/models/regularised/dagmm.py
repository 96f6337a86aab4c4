"""DAGMM, a deep autoencoding Gaussian mixture model (Zong et al. 2018), https://openreview.net/forum?id=BJJLHbb0-

    L = -log p(x | xhat) + lambda_1 E(z) + lambda_2 sum_k sum_j 1 / Sigma_kjj
    z = [z_c, ||x - xhat|| / ||x||, x'xhat / (||x|| ||xhat||)]     z_c = f(x)     xhat = g(z_c)
    E(z) = -log sum_k phi_k N(z | mu_k, Sigma_k)                                               (equation 6)
    phi_k, mu_k, Sigma_k: weight, mean and covariance of the z_i of a batch, with weights gamma_i = softmax(MLN(z_i))

L is in nats per sample. With the plain Gaussian likelihood, -log p is the paper's squared error up to a constant.
Batches are those of all ranks.

The score is the energy. In evaluation, phi, mu and Sigma are those of about the last 20 training batches, so the
learning rate should be low at the end of training (lr_schedule cosine); otherwise the codes have changed since those
batches. The diagonal of Sigma_k is increased by 1e-6 and by its rounding error. A root mean square of a sample below
1e-3 is replaced by 1e-3 in the distance and the cosine.

Shapes: B batch, D bottleneck, Z = D + 2, K components.
"""

import math
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.distributions import gaussians
from aezoo.errors import AezooError
from aezoo.training.limits import check_at_least

_JITTER, _LEAST_RMS, _MOMENTUM = 1e-6, 1e-3, 0.05


class DAGMM(
    NetworkAutoencoder,
    hidden_dims={"mlp": (256,)},
    defaults={"activation": "tanh", "likelihood": "gaussian"},
    tags=("anomaly",),
):
    """An autoencoder whose codes and errors follow a mixture of Gaussians; samples unlikely under it are anomalous.

    Args:
        latent_dim: D, size of the code; 1 or 2 in the paper.
        n_components: K, number of Gaussians in the mixture.
        energy_weight: lambda_1, weight of the energy.
        covariance_weight: lambda_2, weight of the inverse variances.
        estimation_dim: width of the hidden layer of MLN, which assigns samples to Gaussians.
        dropout: dropout probability of that layer's units.
        **kwargs: see `NetworkAutoencoder`.
    """

    phi_K: Tensor
    mu_KZ: Tensor
    sigma_KZZ: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 8,
        n_components: int = 4,
        energy_weight: float = 0.1,
        covariance_weight: float = 0.005,
        estimation_dim: int = 10,
        dropout: float = 0.5,
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim, n_components=n_components, estimation_dim=estimation_dim)
        check_at_least(0, energy_weight=energy_weight, covariance_weight=covariance_weight)
        if not 0 <= dropout < 1:
            raise AezooError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.energy_weight = energy_weight
        self.covariance_weight = covariance_weight
        self.code_shape = (latent_dim,)
        z_dim = latent_dim + 2
        self.encoder = self.build_encoder(self.code_shape)
        self.decoder = self.build_decoder(self.code_shape)
        hidden = (nn.Linear(z_dim, estimation_dim), nn.Tanh(), nn.Dropout(dropout))
        self.estimation = nn.Sequential(*hidden, nn.Linear(estimation_dim, n_components))
        # a total weight near 0, so that the first training batch replaces these values
        self.register_buffer("phi_K", torch.full((n_components,), 1e-6 / n_components))
        self.register_buffer("mu_KZ", torch.zeros(n_components, z_dim))
        self.register_buffer("sigma_KZZ", torch.eye(z_dim).repeat(n_components, 1, 1))

    def features(self, z_c_BD: Tensor, x: Tensor, x_hat: Tensor) -> Tensor:
        """Return z, the code followed by the distance and the cosine between sample and reconstruction, (B, Z)."""
        x_BX, x_hat_BX = at_least_float32(x).flatten(1), at_least_float32(x_hat).flatten(1)
        least = _LEAST_RMS * math.sqrt(x_BX.shape[1])
        norm_B, norm_hat_B = (v_BX.norm(dim=1).clamp(min=least) for v_BX in (x_BX, x_hat_BX))
        distance_B = (x_BX - x_hat_BX).norm(dim=1) / norm_B
        cosine_B = (x_BX * x_hat_BX).sum(1) / (norm_B * norm_hat_B)
        return torch.cat([at_least_float32(z_c_BD), distance_B[:, None], cosine_B[:, None]], 1)

    def mixture(self, z_BZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights, means and covariances of a batch (equation 5): (B, Z) -> (K,), (K, Z), (K, Z, Z)."""
        gamma_BK = at_least_float32(self.estimation(z_BZ.to(next(self.estimation.parameters()).dtype))).softmax(1)
        phi_K = self.batch_mean(gamma_BK).clamp(min=1e-12)
        share_BK = gamma_BK / phi_K
        mu_KZ = self.batch_mean(share_BK[..., None] * z_BZ[:, None])
        off_BKZ = z_BZ[:, None] - mu_KZ
        return phi_K, mu_KZ, self.batch_mean(share_BK[..., None, None] * off_BKZ[..., None] * off_BKZ[:, :, None])

    def energy(self, z_BZ: Tensor, phi_K: Tensor, mu_KZ: Tensor, sigma_KZZ: Tensor) -> Tensor:
        """Return -log sum_k phi_k N(z | mu_k, Sigma_k), (B, Z) -> (B,)."""
        return -gaussians.mixture_log_density(z_BZ, phi_K, mu_KZ, sigma_KZZ, _JITTER)

    def update_running_mixture(self, phi_K: Tensor, mu_KZ: Tensor, sigma_KZZ: Tensor) -> None:
        """Average a batch, with weight 1/20, with the previous batches."""
        gaussians.update_mixture_((self.phi_K, self.mu_KZ, self.sigma_KZZ), (phi_K, mu_KZ, sigma_KZZ), _MOMENTUM)

    def stored_mixture(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weights, means and covariances that are used in evaluation."""
        return self.phi_K / self.phi_K.sum(), self.mu_KZ, self.sigma_KZZ

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_c_BD = self.encode(x)
        params = self.decoder(z_c_BD)
        z_BZ = self.features(z_c_BD, x, self.likelihood.mean(params))
        mixture = self.mixture(z_BZ) if self.training else self.stored_mixture()
        if self.training:
            self.update_running_mixture(*mixture)
        nll, energy = self.nll(params, x).mean(), self.energy(z_BZ, *mixture).mean()
        inverse = (1 / (at_least_float32(mixture[2]).diagonal(dim1=1, dim2=2) + _JITTER)).sum()
        loss = nll + self.energy_weight * energy + self.covariance_weight * inverse
        return {"loss": loss, "nll": nll, "energy": energy, "inverse_variances": inverse}

    def score(self, x: Tensor) -> Tensor:
        """Return the energy, E(z), in nats: (B, *input_shape) -> (B,)."""
        z_c_BD = self.encode(x)
        return self.energy(self.features(z_c_BD, x, self.decode(z_c_BD)), *self.stored_mixture())
