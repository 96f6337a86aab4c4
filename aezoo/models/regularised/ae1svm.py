"""AE-1SVM (Nguyen & Vien 2018), https://arxiv.org/abs/1804.04888

    L = -log p(x | g(z)) + lam SVM     z = f(x)
    SVM = 1/2 ||w||^2 - rho + 1 / (nu B) sum_i max(0, rho - w'phi(z_i))
    phi(z) = R^-1/2 [cos(Omega'z), sin(Omega'z)]     Omega ~ N(0, 1 / sigma^2)

L is in nats per sample. An autoencoder and a one-class SVM on its codes are trained together; lam is 1 / alpha of the
paper. With random Fourier features (Rahimi & Recht 2007), w'phi(z) is a sum of Gaussian kernels: with many frequencies,
phi(z)'phi(z') tends to exp(-||z - z'||^2 / (2 sigma^2)). At the optimum of w and rho, at most a fraction nu of the
samples lies outside, and SVM is -1/2 ||w||^2, which is between -1/2, for identical codes, and 0. The first batch
initialises w and rho.

The score is rho - w'phi(z), which is above 0 outside. The authors' code doubles the hinge term, so its effective nu is
half of the stated value. As in that code, codes pass through a sigmoid; otherwise the encoder would choose their scale,
and sigma would be meaningless.

Shapes: B batch, D code, R frequencies.
"""

import math
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo import nets
from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.errors import AezooError
from aezoo.training.limits import check_above, check_at_least


class AE1SVM(NetworkAutoencoder, hidden_dims={"mlp": (128,)}, defaults={"likelihood": "gaussian"}, tags=("anomaly",)):
    """An autoencoder trained with a one-class SVM, which separates its codes from everything else.

    Args:
        latent_dim: D, size of the code.
        svm_weight: lam, weight of the SVM.
        nu: fraction of the samples that may lie outside, above 0 and at most 1.
        n_frequencies: R, number of random frequencies; each gives two features.
        bandwidth: sigma, standard deviation of the kernel in the space of codes.
        code_activation: also applied to the code; with identity, choose bandwidth to suit the scale of the codes.
        **kwargs: see `NetworkAutoencoder`.
    """

    omega_DR: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 32,
        svm_weight: float = 1.0,
        nu: float = 0.1,
        n_frequencies: int = 500,
        bandwidth: float = 3.0,
        code_activation: str = "sigmoid",
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(0, svm_weight=svm_weight)
        if not 0 < nu <= 1:
            raise AezooError(f"nu must be above 0 and at most 1, got {nu}")
        if not 1 <= n_frequencies <= 100_000:
            raise AezooError(f"n_frequencies must lie between 1 and 100000, got {n_frequencies}")
        check_above(0, bandwidth=bandwidth)
        self.svm_weight = svm_weight
        self.nu = nu
        self.code_shape = (latent_dim,)
        layers = self.build_encoder(self.code_shape)
        self.encoder = nn.Sequential(layers, nets.activation(code_activation))
        self.decoder = self.build_decoder(self.code_shape)
        self.register_buffer("omega_DR", torch.randn(latent_dim, n_frequencies) / bandwidth)
        self.w_F = nn.Parameter(torch.zeros(2 * n_frequencies))
        self.rho = nn.Parameter(torch.zeros(()))
        self.enable_data_init()

    def init_from_data(self, x: Tensor) -> None:
        """Set w to the mean of phi, its optimum for nu = 1, and rho for a fraction nu outside, (N, *input_shape)."""
        phi_NF = self.features(self.encode(x))
        self.w_F.copy_(phi_NF.mean(0))
        self.rho.copy_((phi_NF * at_least_float32(self.w_F)).sum(1).quantile(self.nu))

    def features(self, z_BD: Tensor) -> Tensor:
        """Return phi(z), of norm 1, (B, D) -> (B, 2 R)."""
        with torch.autocast(z_BD.device.type, enabled=False):  # rounding would change the angles
            angles_BR = at_least_float32(z_BD) @ at_least_float32(self.omega_DR)
        return torch.cat([angles_BR.cos(), angles_BR.sin()], 1) / math.sqrt(angles_BR.shape[1])

    def hinge_margin(self, z_BD: Tensor) -> Tensor:
        """Return the distance outside of the boundary, rho - w'phi(z), (B, D) -> (B,)."""
        # not a matrix product, which autocast would round
        return at_least_float32(self.rho) - (self.features(z_BD) * at_least_float32(self.w_F)).sum(1)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BD = self.encode(x)
        nll = self.nll(self.decoder(z_BD), x).mean()
        hinge = self.hinge_margin(z_BD).relu().mean() / self.nu
        svm = at_least_float32(self.w_F).square().sum() / 2 - at_least_float32(self.rho) + hinge
        return {"loss": nll + self.svm_weight * svm, "nll": nll, "svm": svm}

    def score(self, x: Tensor) -> Tensor:
        """Return rho - w'phi(z), which is above 0 outside of the normal data, (B, *input_shape) -> (B,)."""
        return self.hinge_margin(self.encode(x))
