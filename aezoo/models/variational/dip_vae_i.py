"""DIP-VAE-I, disentangled inferred prior (Kumar et al. 2018), https://arxiv.org/abs/1711.00848

    L = E_q[-log p(x|z)] + KL(q(z|x) || p(z)) + l_od sum_{i != j} C_ij^2 + l_d sum_i (C_ii - 1)^2     (equation 6)
    C = Cov[mu(x)]

in nats per sample. The penalties push the posterior means towards no correlation and variance 1. C is the covariance,
with 1/B, of the whole batch over all ranks. l_od = l_d = 0 is the VAE.

Shapes: B batch, D code.
"""

from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.network import LatentArgs
from aezoo.models.variational.vae import VAE
from aezoo.training.limits import check_at_least


class DIPVAEI(VAE, tags=("disentanglement",)):
    """A VAE that penalises the difference between the covariance of its posterior means and the identity.

    Args:
        off_diagonal: l_od, weight of the squared covariances; usually 1 to 50.
        diagonal: l_d, weight of the squared differences between the variances and 1; usually 10 l_od.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        off_diagonal: float = 10.0,
        diagonal: float = 100.0,
        **kwargs: Unpack[LatentArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, off_diagonal=off_diagonal, diagonal=diagonal)
        self.off_diagonal = off_diagonal
        self.diagonal = diagonal

    def covariance(self, mu_BD: Tensor, log_var_BD: Tensor) -> Tensor:
        """Cov[mu(x)] over the batch, (B, D), (B, D) -> (D, D)."""
        # from centred means, because E[mu mu'] - E[mu] E[mu]' loses digits; without matmul, which autocast would
        # round
        centred_BD = mu_BD - self.batch_mean(mu_BD)
        return self.batch_mean(centred_BD[:, :, None] * centred_BD[:, None, :])

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.mean_kl(self.kl(mu_BD, log_var_BD))
        cov_DD = self.covariance(mu_BD, log_var_BD)
        # with a mask, because inductor emits a warning about its internals when it reads a diagonal
        eye_DD = torch.eye(len(cov_DD), device=cov_DD.device, dtype=cov_DD.dtype)
        var_D = (cov_DD * eye_DD).sum(1)
        off_diagonal = ((cov_DD * (1 - eye_DD)) ** 2).sum()
        diagonal = ((var_D - 1) ** 2).sum()
        elbo_loss = nll + self.beta * (kl - self.capacity).abs()  # 1 and 0 unless BetaAnnealing changes them
        return {
            "loss": elbo_loss + self.off_diagonal * off_diagonal + self.diagonal * diagonal,
            "nll": nll,
            "kl": kl,
            "elbo": -(nll + kl),
            "off_diagonal": off_diagonal,
            "diagonal": diagonal,
        }
