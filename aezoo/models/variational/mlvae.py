"""ML-VAE, the multi-level VAE (Bouchacourt et al. 2018), https://arxiv.org/abs/1705.08841

    L = E_q[-log p(x|c, s)] + beta (KL(q(s|x) || p(s)) + KL(q(c|G) || p(c)) / |G|)     (equation 5, by sample)
    q(c|G) = N(mu_G, diag sigma_G^2), proportional to prod_{x' in G} q(c|x')
    1 / sigma_G^2 = sum 1 / sigma(x')^2     mu_G = sigma_G^2 sum mu(x') / sigma(x')^2     (section 3.3)

in nats per sample. G is the group of x. The content c = z_1..z_g is shared by all samples of a group; the style s =
z_g+1..z_D is specific to each sample. The KL of the content is counted once per group, and each sample draws a separate
c from q(c|G).

Labels define the groups: a group consists of all samples with the same label in the batch, over all ranks. A sample
without a label (-1) forms a separate group. Without labels, or with g = 0, the model is the VAE. Codes and scores never
use labels: they are those of a single sample.

Shapes: B batch on this rank, N samples on all ranks, D code, G its first g dimensions.
"""

from typing import Unpack

import torch
from torch import Tensor

from aezoo.distributions import gaussians
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE, VAEArgs
from aezoo.nets.blocks.labels import check_labels


class MLVAE(VAE, compares_samples=True, reads_labels=True, tags=("disentanglement",)):
    """A VAE whose first code dimensions are shared by all samples with the same label.

    Args:
        group_dim: g, size of the content, the part of the code that a group shares; half of the code by default.
        **kwargs: see `VAE`.
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, group_dim: int | None = None, **kwargs: Unpack[VAEArgs]
    ) -> None:
        super().__init__(input_shape, **kwargs)
        group_dim = self.latent_dim // 2 if group_dim is None else group_dim
        if not 0 <= group_dim <= self.latent_dim:
            raise AezooError(f"group_dim must be from 0 to latent_dim = {self.latent_dim}, got {group_dim}")
        self.group_dim = group_dim

    def members(self, y_B: Tensor) -> Tensor:
        """Return which samples of all ranks are in each sample's group, including itself: (B,) -> (B, N) bool."""
        y_N = self.all_gather_batch(check_labels(y_B))
        itself_BN = self.local_rows(y_B)[:, None] == torch.arange(len(y_N), device=y_B.device)
        return (y_B[:, None] == y_N) & (y_B[:, None] != -1) | itself_BN

    def product(self, mu_BG: Tensor, log_var_BG: Tensor, member_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the normalised product of each group's densities: (B, G), (B, G)."""
        return gaussians.product(self.all_gather_batch(mu_BG), self.all_gather_batch(log_var_BG), member_BN)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        g, size_B = self.group_dim, torch.ones_like(mu_BD[:, 0])
        if y is not None:
            member_BN = self.members(y)
            content = self.product(mu_BD[:, :g], log_var_BD[:, :g], member_BN)
            mu_BD, log_var_BD = (torch.cat([c, s[:, g:]], 1) for c, s in zip(content, (mu_BD, log_var_BD), strict=True))
            size_B = member_BN.sum(1).to(mu_BD.dtype)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl_content_B = self.kl(mu_BD[:, :g], log_var_BD[:, :g]) / size_B
        kl = self.mean_kl(kl_content_B + self.kl(mu_BD[:, g:], log_var_BD[:, g:]))
        return {"loss": nll + self.beta * (kl - self.capacity).abs(), "nll": nll, "kl": kl, "elbo": -(nll + kl)}
