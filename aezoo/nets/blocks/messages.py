"""A Gaussian code above several others, which send it messages: the connection between the levels of Nexus.

    q(u|z_S) = N(mu(c), diag sigma(c)^2)     c = 1/|S| sum_(i in S) c_i(z_i)     S: some of the codes
    p(z_i|u) = N(m_i(u), diag s_i^2)         p(u) = N(0, I)

The c_i are linear; mu, sigma and m_i have a hidden layer.

Shapes: B batch, D code above, P each code below, M codes below, S of them that are known; ... are the batch dimensions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aezoo.distributions.gaussians import LOG_2PI, kl, rsample
from aezoo.errors import AezooError
from aezoo.nets.blocks.levels import ConditionalGaussian, GaussianParams
from aezoo.nets.build import activation
from aezoo.speed.linear import Linear
from aezoo.training.precision import at_least_float32


class MessageLevel(nn.Module):
    """A code above M others.

    Args:
        n: M, codes below.
        size: P, size of each of them.
        above: D, size of the code above.
        width: size of a message, and of the hidden layers.
        act: name of their activation.
        dropout: share of training samples of which only some codes send messages.
    """

    def __init__(self, n: int, size: int, above: int, width: int, act: str, dropout: float) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise AezooError(f"dropout must be from 0 to 1, got {dropout}")
        self.dropout = dropout
        self.messages = nn.ModuleList(Linear(size, width) for _ in range(n))
        self.node = ConditionalGaussian(width, width, above, act)
        self.downward = nn.ModuleList(
            nn.Sequential(Linear(above, width), activation(act), Linear(width, size)) for _ in range(n)
        )
        self.s_log_var_MP = nn.Parameter(torch.zeros(n, size))

    def senders(self, seen_BM: Tensor) -> Tensor:
        """Which codes of training samples send messages, (B, M) bool: all known ones or, for some samples, a subset.

        For a share `dropout` of the samples, the number of senders is drawn first, uniformly from 1 to all but one,
        then which.
        """
        (n, m), device = seen_BM.shape, seen_BM.device
        # drawn at once, since a graph may reorder separate draws
        of_some_B1, size_B1, order_BM = torch.rand(n, 2 + m, device=device).split([1, 1, m], 1)
        rank_BM = order_BM.masked_fill(~seen_BM, 1).argsort(1).argsort(1)
        some_BM = rank_BM < 1 + (size_B1 * (seen_BM.sum(1, keepdim=True) - 1)).long()
        return (some_BM | (of_some_B1 >= self.dropout)) & seen_BM

    def up(self, z: Tensor, which: Sequence[int], sent: Tensor | None = None) -> GaussianParams:
        """Mean and log-variance of q(u|z_S): (..., S, P) -> (..., D), (..., D).

        Args:
            z: codes below.
            which: their numbers, in this order.
            sent: whose messages count, at least one, (..., S) bool; all by default.
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

    def log_down(self, z: Tensor, u: Tensor, seen: Tensor | None = None) -> Tensor:
        """Log-density sum_i log p(z_i|u) in nats, of all or those seen, (..., M): (..., M, P), (..., D) -> (...)."""
        m, log_s2 = self.down(u)
        density = -0.5 * ((z - m) ** 2 * torch.exp(-log_s2) + log_s2 + LOG_2PI)
        if seen is not None:
            density = density.masked_fill(~seen[..., None], 0)
        return density.sum((-2, -1))

    def completed(self, mu_BSP: Tensor, log_var_BSP: Tensor, which: Sequence[int], seen_BS: Tensor) -> GaussianParams:
        """Mean and log-variance of u and all z_i, given those of some z_i: (B, S, P), (B, S, P) -> (B, D + M P), twice.

        An unknown z_i gets those of p(z_i|u) at the mean of u.
        """
        u = self.up(mu_BSP, which, seen_BS)
        both = []
        for u_BD, told_BMP, known_BSP in zip(u, self.down(u[0]), (mu_BSP, log_var_BSP), strict=True):
            known_BSP = torch.where(seen_BS[..., None], known_BSP, told_BMP[:, [*which]])
            z = dict(enumerate(told_BMP.unbind(1))) | dict(zip(which, known_BSP.unbind(1), strict=True))
            both.append(torch.cat([u_BD, *z.values()], 1))
        return both[0], both[1]

    def drawn(self, z: Tensor, log_q: Tensor, seen_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Draws of u and all z_i in one row, and their log-density, from those of z_i: (K, B, M, P), (K, B, M).

        For codes that are not seen, draws from N(0, I) become draws from p(z_i|u): (K, B, D + M P), (K, B).
        """
        u, log_q_u = rsample(*self.up(z, range(len(self.messages)), seen_BM))
        lacks = ~seen_BM[..., None]
        m, log_s2 = self.down(u)
        z = torch.where(lacks, m + torch.exp(0.5 * log_s2) * z, z)
        log_q = log_q - 0.5 * log_s2.masked_fill(~lacks, 0).sum(-1)
        return torch.cat([u, z.flatten(2)], 2), log_q_u + log_q.sum(2)

    def bound(self, z_BMP: Tensor, eps_BD: Tensor, drop: bool, seen_BM: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(z|u) for u ~ q(u|z_S), drawn with N(0, I) noise, and KL(q(u|z_S) || p(u)) in nats: (B,), (B,)."""
        sent_BM = self.senders(seen_BM) if drop and self.dropout else seen_BM
        mu_BD, log_var_BD = self.up(z_BMP, range(len(self.messages)), sent_BM)
        u_BD = mu_BD + torch.exp(0.5 * log_var_BD) * eps_BD
        zero = torch.zeros_like(mu_BD)
        return -self.log_down(z_BMP, u_BD, seen_BM), kl(mu_BD, log_var_BD, zero, zero)
