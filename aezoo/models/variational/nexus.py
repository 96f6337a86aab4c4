"""Nexus, the hierarchical multimodal VAE (Vasco et al. 2022), https://doi.org/10.1016/j.neunet.2021.11.019

A sample consists of parts x = (x_1, ..., x_M), its modalities. Each part has a VAE with a separate code z_i. Another
VAE, above these, has a shared code u, to which each z_i sends a message; the messages are averaged:

    p(x, z, u) = p(u) prod_i p(z_i|u) p(x_i|z_i)     p(u) = N(0, I)     p(z_i|u) = N(m_i(u), diag s_i^2)
    q(z, u|x) = q(u|z) prod_i q_i(z_i|x_i)     q_i = N(mu_i, diag sigma_i^2)
    q(u|z_S) = N(mu(c), diag sigma(c)^2)     c = 1/|S| sum_(i in S) c_i(z_i)     S: some of the parts

    L = sum_i (E_q_i[-log p(x_i|z_i)] + beta KL(q_i(z_i|x_i) || N(0, I)))
        + E_sg(q_i)[E_q(u|z_S)[-sum_i log p(z_i|u)] + top_beta KL(q(u|z_S) || p(u))]

in nats per sample. sg stops gradients: each part's VAE is trained as if it were the only one, and the higher level does
not change the z_i. S is all parts, except under forced perceptual dropout: for a share of the training samples only
some parts send messages (first their number is drawn, uniformly from 1 to M - 1, then the parts), but u must predict
the codes of all parts. elbo is a bound on log p(x), with p(z_i|u) as the prior of z_i. The code is (u, z_1, ..., z_M),
the means, with m_i(u) for parts that are not used. If parts of a sample are missing, L is computed from its other
parts.

The paper also weights each p(x_i|z_i) and p(z_i|u). In the authors' code
(https://github.com/miguelsvasco/nexus_pytorch), s_i^2 is 1/2, or for one part the optimum for the batch; here s_i is
learned. That code also uses batch normalisation, and KL weights that increase over epochs. MultiVae
(https://github.com/AgatheSenellart/MultiVae), which states that its results are not those of the paper, uses s_i = 1,
and dropout also in evaluation but none by default.

Shapes: B batch, D shared code, P code of a part, M parts, S of them that are used, K importance samples.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.multimodal import MissingModalities, MultimodalBetaArgs, PartDecoders
from aezoo.distributions import gaussians
from aezoo.distributions.gaussians import LOG_2PI, kl, rsample
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE
from aezoo.nets.blocks.levels import ConditionalGaussian, GaussianParams
from aezoo.nets.build import activation
from aezoo.training.limits import check_at_least


class MessageLevel(nn.Module):
    """A Gaussian code above M others, from which it receives messages.

    The c_i are linear; mu, sigma and m_i have one hidden layer.

    Args:
        n: M, number of codes below.
        size: P, size of each code below.
        above: D, size of the code above.
        width: size of a message, and of the hidden layers.
        act: name of the activation of the hidden layers.
        dropout: share of training samples for which only some codes send messages.
    """

    def __init__(self, n: int, size: int, above: int, width: int, act: str, dropout: float) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise AezooError(f"dropout must be from 0 to 1, got {dropout}")
        self.dropout = dropout
        self.messages = nn.ModuleList(nn.Linear(size, width) for _ in range(n))
        self.node = ConditionalGaussian(width, width, above, act)
        self.downward = nn.ModuleList(
            nn.Sequential(nn.Linear(above, width), activation(act), nn.Linear(width, size)) for _ in range(n)
        )
        self.s_log_var_MP = nn.Parameter(torch.zeros(n, size))

    def senders(self, present_BM: Tensor) -> Tensor:
        """Which codes of training samples send messages, (B, M) bool: all known codes or, for some samples, a subset.

        For a share `dropout` of the samples, the number of senders is drawn first, uniformly from 1 to all but one,
        then the senders.
        """
        (n, m), device = present_BM.shape, present_BM.device
        # in one call, because a compiled graph may reorder separate draws
        of_some_B1, size_B1, order_BM = torch.rand(n, 2 + m, device=device).split([1, 1, m], 1)
        rank_BM = order_BM.masked_fill(~present_BM, 1).argsort(1).argsort(1)
        some_BM = rank_BM < 1 + (size_B1 * (present_BM.sum(1, keepdim=True) - 1)).long()
        return (some_BM | (of_some_B1 >= self.dropout)) & present_BM

    def up(self, z: Tensor, which: Sequence[int], sent: Tensor | None = None) -> GaussianParams:
        """Mean and log-variance of q(u|z_S): (..., S, P) -> (..., D), (..., D).

        Args:
            z: codes below.
            which: the indices of these codes, in this order.
            sent: which messages are used, at least one, (..., S) bool; all by default.
        """
        z = z.to(self.s_log_var_MP.dtype)
        c = at_least_float32(torch.stack([self.messages[i](z[..., k, :]) for k, i in enumerate(which)], -2))
        share = torch.ones_like(c[..., :1]) if sent is None else sent[..., None].to(c.dtype)
        found: GaussianParams = self.node((share * c).sum(-2) / share.sum(-2))
        return found

    def down(self, u: Tensor) -> GaussianParams:
        """Mean and log-variance of all p(z_i|u): (..., D) -> (..., M, P), (..., M, P)."""
        m = at_least_float32(torch.stack([net(u.to(self.s_log_var_MP.dtype)) for net in self.downward], -2))
        return m, at_least_float32(self.s_log_var_MP).expand_as(m)

    def log_down(self, z: Tensor, u: Tensor, present: Tensor | None = None) -> Tensor:
        """Log-density sum_i log p(z_i|u) in nats, of all or those present, (..., M): (..., M, P), (..., D) -> (...)."""
        m, log_s2 = self.down(u)
        density = -0.5 * ((z - m) ** 2 * torch.exp(-log_s2) + log_s2 + LOG_2PI)
        if present is not None:
            density = density.masked_fill(~present[..., None], 0)
        return density.sum((-2, -1))

    def impute_missing(
        self, mu_BSP: Tensor, log_var_BSP: Tensor, which: Sequence[int], present_BS: Tensor
    ) -> GaussianParams:
        """Mean and log-variance of u and all z_i, given those of some z_i: (B, S, P), (B, S, P) -> (B, D + M P), twice.

        For an unknown z_i, they are those of p(z_i|u) at the mean of u.
        """
        u = self.up(mu_BSP, which, present_BS)
        both = []
        for u_BD, predicted_BMP, known_BSP in zip(u, self.down(u[0]), (mu_BSP, log_var_BSP), strict=True):
            known_BSP = torch.where(present_BS[..., None], known_BSP, predicted_BMP[:, [*which]])
            z = dict(enumerate(predicted_BMP.unbind(1))) | dict(zip(which, known_BSP.unbind(1), strict=True))
            both.append(torch.cat([u_BD, *z.values()], 1))
        return both[0], both[1]

    def sample_present(self, z: Tensor, log_q: Tensor, present_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Concatenated samples of u and all z_i, and their log-density, from those of z_i: (K, B, M, P), (K, B, M).

        For missing codes, samples from N(0, I) are transformed to samples from p(z_i|u): (K, B, D + M P), (K, B).
        """
        u, log_q_u = rsample(*self.up(z, range(len(self.messages)), present_BM))
        missing_BM1 = ~present_BM[..., None]
        m, log_s2 = self.down(u)
        z = torch.where(missing_BM1, m + torch.exp(0.5 * log_s2) * z, z)
        log_q = log_q - 0.5 * log_s2.masked_fill(~missing_BM1, 0).sum(-1)
        return torch.cat([u, z.flatten(2)], 2), log_q_u + log_q.sum(2)

    def bound(self, z_BMP: Tensor, eps_BD: Tensor, drop: bool, present_BM: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(z|u) for u ~ q(u|z_S), drawn with N(0, I) noise, and KL(q(u|z_S) || p(u)) in nats: (B,), (B,)."""
        sent_BM = self.senders(present_BM) if drop and self.dropout else present_BM
        mu_BD, log_var_BD = self.up(z_BMP, range(len(self.messages)), sent_BM)
        u_BD = mu_BD + torch.exp(0.5 * log_var_BD) * eps_BD
        zero = torch.zeros_like(mu_BD)
        return -self.log_down(z_BMP, u_BD, present_BM), kl(mu_BD, log_var_BD, zero, zero)


class Nexus(MissingModalities, VAE, normal_prior=False, score_term="", tags=("multimodal", "imputation")):
    """A VAE for each of several modalities, and a VAE of their codes, which infers the codes of missing parts.

    Args:
        latent_dim: D, size of the code that all parts share.
        part_dim: P, size of each part's code.
        level_dim: size of a message, and width of the hidden layer of the networks between the levels.
        dropout: share of training samples whose shared code is inferred from only some of their parts.
        beta: weight of the KL terms of the parts.
        top_beta: weight of the KL term of the shared code.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        part_dim: int = 16,
        level_dim: int = 64,
        dropout: float = 0.2,
        top_beta: float = 1.0,
        **kwargs: Unpack[MultimodalBetaArgs],
    ) -> None:
        check_at_least(0, top_beta=top_beta)
        check_at_least(1, latent_dim=latent_dim, part_dim=part_dim, level_dim=level_dim)
        super().__init__(input_shape, latent_dim=part_dim, **kwargs)
        # a capacity is a target for a single KL, but this loss has several
        del self.capacity
        self.build_parts(self.parts, self.net, self.hidden_dims, self.activation)
        self.decoder = PartDecoders([*self.decoder], self.decoder.dim, latent_dim)
        self.latent_dim = latent_dim
        self.top_beta = top_beta
        self.code_shape = (latent_dim + len(self.sizes) * part_dim,)
        self.top = MessageLevel(len(self.sizes), part_dim, latent_dim, level_dim, self.activation, dropout)

    def infer(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        which = range(len(self.sizes)) if parts is None else parts
        return self.top.impute_missing(*self.experts(x, parts), which, self.present_mask(x, parts))

    def bound(self, x: Tensor, noise: bool = True) -> dict[str, Tensor]:
        """Return the terms of the loss, each (B,); without noise, codes are means and all parts send messages."""
        (mu_BMP, log_var_BMP), present_BM = self.experts(x), self.present_mask(x)
        d, zero_BF = self.latent_dim, F.pad(torch.zeros_like(mu_BMP).flatten(1), (0, self.latent_dim))
        # in one call, because a compiled graph may reorder separate draws
        eps_BF = torch.randn_like(zero_BF) if noise else zero_BF
        z_BMP = mu_BMP + torch.exp(0.5 * log_var_BMP) * eps_BF[:, :-d].unflatten(1, mu_BMP.shape[1:])
        top_nll_B, top_kl_B = self.top.bound(z_BMP.detach(), eps_BF[:, -d:], noise and self.training, present_BM)
        nll_B = self.nll(self.decoder(F.pad(z_BMP.flatten(1), (d, 0)).to(x.dtype)), x)
        kl_B = self.kl(mu_BMP.flatten(1), log_var_BMP.flatten(1))
        entropy_B = 0.5 * (log_var_BMP + 1 + gaussians.LOG_2PI).sum(2).masked_fill(~present_BM, 0).sum(1)
        elbo_B = entropy_B - nll_B - top_nll_B - top_kl_B
        return {"nll": nll_B, "kl": kl_B, "top_nll": top_nll_B, "top_kl": top_kl_B, "elbo": elbo_B}

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        of = {name: values_B.mean() for name, values_B in self.bound(x).items()}
        return {"loss": of["nll"] + self.beta * of["kl"] + of["top_nll"] + self.top_beta * of["top_kl"], **of}

    def log_prior(self, z: Tensor) -> Tensor:
        u, own = z[..., : self.latent_dim], z[..., self.latent_dim :]
        return super().log_prior(u) + self.top.log_down(own.unflatten(-1, (len(self.sizes), -1)), u)

    def sample_prior(self, n: int) -> Tensor:
        u_BD = super().sample_prior(n)[:, : self.latent_dim]
        z_BMP, _ = gaussians.rsample(*self.top.down(u_BD))
        return torch.cat([u_BD, z_BMP.flatten(1).to(u_BD.dtype)], 1)

    def sample_posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        return self.top.sample_present(*gaussians.rsample(*self.experts(x), n), self.present_mask(x))

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """-elbo with codes at their means, in nats: (B, *input_shape) -> (B,), no noise."""
        return -self.bound(x, noise=False)["elbo"]
