"""Ada-GVAE, weak supervision by pairs (Locatello et al. 2020), https://arxiv.org/abs/2002.02886

    L = E_q~[-log p(x|z)] + beta KL(q~(z|x, x') || p(z))
    q~(z_d|x, x') = average of q(z_d|x) and q(z_d|x') where delta_d <= tau, else q(z_d|x)
    delta_d = KL(q(z_d|x) || q(z_d|x')) / 2 + KL(q(z_d|x') || q(z_d|x)) / 2
    tau = (least + largest delta of the dimensions) / 2     (section 4)

in nats per sample. A pair differs in few factors, so the dimensions that differ least are shared. The average of two
posteriors has the average of their means and the average of their variances (gvae, Hosoya 2019), or is the normalised
square root of the product of the two densities (mlvae, the Ada-ML-VAE).

Both samples of a pair share the same dimensions. The paper's delta is only the first KL, where x is the first sample of
the pair; the authors' code uses this delta for both samples. A batch defines no order within a pair, so delta here is
the mean over both orders. It equals the paper's delta if the variances are equal.

Labels define the pairs: x' is the next sample in the batch with the same label as x, and for the last such sample it is
the first. A label with two samples gives the paper's pair. The batch contains the samples of all ranks. A sample
without a label (-1), or with a label that no other sample has, is paired with itself, which gives the VAE. Codes and
scores never use labels.

Shapes: B batch on this rank, N samples on all ranks, D code.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE, VAEArgs

AVERAGES = ("gvae", "mlvae")


class AdaGVAE(VAE, compares_samples=True, reads_labels=True, tags=("disentanglement",)):
    """A VAE in which samples with the same label agree in all dimensions of the code except those that differ most.

    Args:
        average: how two posteriors are averaged: gvae or mlvae.
        **kwargs: see `VAE`.
    """

    def __init__(self, input_shape: tuple[int, ...], *, average: str = "gvae", **kwargs: Unpack[VAEArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        if average not in AVERAGES:
            raise AezooError(f"unknown average {average!r}: choose from {', '.join(AVERAGES)}")
        self.average = average

    def partners(self, y_B: Tensor) -> Tensor:
        """Index of each sample's partner among the samples of all ranks, (B,) -> (B,)."""
        y_N = self.all_gather_batch(y_B)
        n = len(y_N)
        row_B1 = self.local_rows(y_B)[:, None]
        ahead_BN = (torch.arange(n, device=y_B.device) - row_B1) % n
        fits_BN = (y_B[:, None] == y_N) & (y_B[:, None] != -1) & (ahead_BN > 0)
        return (row_B1[:, 0] + torch.where(fits_BN, ahead_BN, n).amin(1)) % n

    @staticmethod
    def shared(mu_BD: Tensor, log_var_BD: Tensor, mu2_BD: Tensor, log_var2_BD: Tensor) -> Tensor:
        """Return which dimensions a pair shares, independent of its order: four (B, D) -> (B, D) bool."""
        square_BD = 0.25 * (mu_BD - mu2_BD) ** 2 * (torch.exp(-log_var_BD) + torch.exp(-log_var2_BD))
        delta_BD = square_BD + torch.sinh(0.5 * (log_var_BD - log_var2_BD)) ** 2
        tau_B1 = 0.5 * (delta_BD.amin(1, keepdim=True) + delta_BD.amax(1, keepdim=True))
        return delta_BD <= tau_B1

    def averaged(self, mu_BD: Tensor, log_var_BD: Tensor, mu2_BD: Tensor, log_var2_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the average of two posteriors: four (B, D) -> (B, D), (B, D)."""
        if self.average == "gvae":
            return 0.5 * (mu_BD + mu2_BD), torch.logaddexp(log_var_BD, log_var2_BD) - math.log(2)
        share_BD = torch.sigmoid(log_var2_BD - log_var_BD)  # share of the first in the sum of both precisions
        log_precision_BD = torch.logaddexp(-log_var_BD, -log_var2_BD) - math.log(2)
        return share_BD * mu_BD + (1 - share_BD) * mu2_BD, -log_precision_BD

    def paired(self, mu_BD: Tensor, log_var_BD: Tensor, y_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q~: (B, D), (B, D), (B,) -> (B, D), (B, D)."""
        if y_B is None:
            return mu_BD, log_var_BD
        pair_B = self.partners(y_B)
        own = mu_BD, log_var_BD
        pair = self.all_gather_batch(mu_BD)[pair_B], self.all_gather_batch(log_var_BD)[pair_B]
        shared_BD = self.shared(*own, *pair)
        average = self.averaged(*own, *pair)
        return torch.where(shared_BD, average[0], mu_BD), torch.where(shared_BD, average[1], log_var_BD)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.paired(*self.posterior(x), y)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.mean_kl(self.kl(mu_BD, log_var_BD))
        return {"loss": nll + self.beta * (kl - self.capacity).abs(), "nll": nll, "kl": kl, "elbo": -(nll + kl)}
