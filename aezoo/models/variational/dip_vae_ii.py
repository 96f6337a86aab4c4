"""DIP-VAE-II, disentangled inferred prior (Kumar et al. 2018), https://arxiv.org/abs/1711.00848

    L = E_q[-log p(x|z)] + KL(q(z|x) || p(z)) + l_od sum_{i != j} C_ij^2 + l_d sum_i (C_ii - 1)^2     (equation 7)
    C = Cov[z] = Cov[mu(x)] + E[diag sigma(x)^2]     by the law of total covariance

in nats per sample. The penalties push the covariance of the codes themselves, not only of the posterior means, towards
the prior's covariance. C is the covariance of the whole batch over all ranks. l_od = l_d = 0 is the VAE.

Shapes: B batch, D code.
"""

import torch
from torch import Tensor

from aezoo.models.variational.dip_vae_i import DIPVAEI


class DIPVAEII(DIPVAEI, defaults={"diagonal": 10.0}, tags=("disentanglement",)):
    """A VAE that penalises the difference between the covariance of its codes and the identity.

    Args:
        diagonal: l_d, weight of the squared differences between the variances and 1; usually l_od.
    """

    def covariance(self, mu_BD: Tensor, log_var_BD: Tensor) -> Tensor:
        """Cov[z] over the batch, (B, D), (B, D) -> (D, D)."""
        eye_DD = torch.eye(mu_BD.shape[1], device=mu_BD.device, dtype=mu_BD.dtype)
        return super().covariance(mu_BD, log_var_BD) + self.batch_mean(log_var_BD.exp()) * eye_DD
