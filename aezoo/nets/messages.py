"""A Gaussian code over several others, which send it messages: what stands between the levels of Nexus.

    q(u|z_S) = N(mu(c), diag sigma(c)^2)     c = 1/|S| sum_(i in S) c_i(z_i)     S: some of the codes
    p(z_i|u) = N(m_i(u), diag s_i^2)         p(u) = N(0, I)

c_i are linear, mu, sigma and m_i have a hidden layer.

Shapes: B batch, D code above, P each code below, M codes below, S of them that are known; ... are the batch dimensions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.gaussians import LOG_2PI, kl
from aezoo.nets.build import activation
from aezoo.nets.levels import ConditionalGaussian, Pair
from aezoo.nets.linear import Linear
from aezoo.precision import at_least_float32


class MessageLevel(nn.Module):
    """A code above M others.

    Args:
        n: M, codes below.
        size: P, of each of them.
        above: D.
        width: size of a message, and of the hidden layers.
        act: name of their activation.
        dropout: share of samples in training of which some codes alone send messages.
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

    def senders(self, n: int) -> Tensor:
        """Which codes of n training samples send messages, (n, M) bool: all, or of a share `dropout` of them some.

        First how many, evenly from 1 to M - 1, then which.
        """
        m, device = len(self.messages), self.s_log_var_MP.device
        # at once, since a graph may have several draws in another order
        of_some_B1, size_B1, order_BM = torch.rand(n, 2 + m, device=device).split([1, 1, m], 1)
        some_BM = order_BM.argsort(1).argsort(1) < 1 + (size_B1 * (m - 1)).long()
        return some_BM | (of_some_B1 >= self.dropout)

    def up(self, z: Tensor, which: Sequence[int], sent: Tensor | None = None) -> Pair:
        """Mean and log-variance of q(u|z_S): (..., S, P) -> (..., D), (..., D).

        Args:
            z: codes below.
            which: their numbers, in this order.
            sent: whose messages count, at least one, (..., S) bool; all by default.
        """
        z = z.to(self.s_log_var_MP.dtype)
        c = at_least_float32(torch.stack([self.messages[i](z[..., k, :]) for k, i in enumerate(which)], -2))
        share = torch.ones_like(c[..., :1]) if sent is None else sent[..., None].to(c.dtype)
        found: Pair = self.node((share * c).sum(-2) / share.sum(-2))
        return found

    def down(self, u: Tensor) -> Pair:
        """Mean and log-variance of all p(z_i|u): (..., D) -> (..., M, P), (..., M, P)."""
        m = at_least_float32(torch.stack([net(u.to(self.s_log_var_MP.dtype)) for net in self.downward], -2))
        return m, at_least_float32(self.s_log_var_MP).expand_as(m)

    def log_down(self, z: Tensor, u: Tensor) -> Tensor:
        """The density sum_i log p(z_i|u) in nats: (..., M, P), (..., D) -> (...)."""
        m, log_s2 = self.down(u)
        return -0.5 * ((z - m) ** 2 * torch.exp(-log_s2) + log_s2 + LOG_2PI).sum((-2, -1))

    def completed(self, mu_BSP: Tensor, log_var_BSP: Tensor, which: Sequence[int]) -> Pair:
        """Mean and log-variance of u and all z_i, as it is known of some: (B, S, P), (B, S, P) -> (B, D + M P), twice.

        A code that is not known is that of p(z_i|u) for the mean of u.
        """
        u = self.up(mu_BSP, which)
        both = []
        for u_BD, told_BMP, known_BSP in zip(u, self.down(u[0]), (mu_BSP, log_var_BSP), strict=True):
            z = dict(enumerate(told_BMP.unbind(1))) | dict(zip(which, known_BSP.unbind(1), strict=True))
            both.append(torch.cat([u_BD, *z.values()], 1))
        return both[0], both[1]

    def bound(self, z_BMP: Tensor, eps_BD: Tensor, drop: bool) -> tuple[Tensor, Tensor]:
        """-log p(z|u) of a u ~ q(u|z_S), made of N(0, I) noise, and KL(q(u|z_S) || p(u)) in nats: (B,), (B,)."""
        sent_BM = self.senders(len(z_BMP)) if drop and self.dropout else None
        mu_BD, log_var_BD = self.up(z_BMP, range(len(self.messages)), sent_BM)
        u_BD = mu_BD + torch.exp(0.5 * log_var_BD) * eps_BD
        zero = torch.zeros_like(mu_BD)
        return -self.log_down(z_BMP, u_BD), kl(mu_BD, log_var_BD, zero, zero)
