"""Normalising flows: invertible maps of codes with a known log|det| of the Jacobian.

    u = f(z)     log q(u) = log q(z) - log|det df/dz|

`FLOWS` maps names to steps whose parameters are given for each sample, as the output of an encoder:

    planar      f(z) = z + u' tanh(w z + b)                 u' = u + (m(w u) - w u) w / ||w||^2
    radial      f(z) = z + b' (z - c) / (a + ||z - c||)     a > 0, b' = a m(b)
    sylvester   f(z) = z + Q R tanh(S Q^T z + b)            R, S upper triangular, Q orthogonal

from Rezende & Mohamed 2015, https://arxiv.org/abs/1505.05770, and van den Berg et al. 2018,
https://arxiv.org/abs/1803.05649. m(t) = softplus(t + c) - 1 > -1 makes a step invertible (appendix A of the former,
where c = 0). Here c is such that m(0) = 0: if all its parameters are 0, a step is the identity.

Two networks have masked weights, so that the Jacobian is triangular: `MADE`, for an inverse autoregressive flow, and
`AffineLayer`, which has an inverse and is a coupling layer or a masked autoregressive layer.

Shapes: B batch, D code, H hidden units.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.training.precision import at_least_float32

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
MAX_FLOWS = 256
# minimum distance from -1, or from the limits of tanh, since softplus and tanh reach their limits in float32
FLOOR = 1e-3


def check_n_flows(n_flows: int) -> None:
    """Check the number of steps or layers.

    Raises:
        AezooError: the number is below 0 or above 256.
    """
    if not 0 <= n_flows <= MAX_FLOWS:
        raise AezooError(f"n_flows must be from 0 to {MAX_FLOWS}, got {n_flows}")


def above_minus_one(t: Tensor) -> Tensor:
    """Return m(t), an increasing function with m(0) = 0 and values of at least -1 + 1e-3."""
    return F.softplus(t + math.log(math.expm1(1 - FLOOR))) - (1 - FLOOR)


def inverse_above_minus_one(m: Tensor) -> Tensor:
    """Invert `above_minus_one` for values above -1 + 1e-3."""
    y = m + (1 - FLOOR)
    return y + torch.log(-torch.expm1(-y)) - math.log(math.expm1(1 - FLOOR))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products, elementwise because autocast would round a matrix product: (..., D), (..., D) -> (..., 1)."""
    return (a * b).sum(-1, keepdim=True)


def planar(z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a step with parameters u, w, b: (..., D), (..., 2 D + 1) -> new codes, (..., D), and log|det|, (...)."""
    d = z.shape[-1]
    u, w, b = parameters.split([d, d, 1], -1)
    w_u = above_minus_one(dot(w, u))
    u = u + (w_u - dot(w, u)) * w / dot(w, w).clamp_min(1e-12)
    h = torch.tanh(dot(w, z) + b)
    return z + u * h, torch.log1p((1 - h**2) * w_u).squeeze(-1)  # section 4.1


def radial(z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a step with parameters c, a, b: (..., D), (..., D + 2) -> new codes, (..., D), and log|det|, (...)."""
    d = z.shape[-1]
    centre, a, b = parameters.split([d, 1, 1], -1)
    a = F.softplus(a) + FLOOR
    off = z - centre
    r = dot(off, off).clamp_min(1e-24).sqrt()
    b = a * above_minus_one(b)
    log_det = (d - 1) * torch.log1p(b / (a + r)) + torch.log1p(b * a / (a + r) ** 2)  # section 4.1
    return z + b * off / (a + r), log_det.squeeze(-1)


def sylvester(z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a step with R, S, b, Q: (..., D), (..., D^2 + 2 D + H D) -> new codes, (..., D), and log|det|, (...).

    Q is the product of H Householder reflections; the diagonals of R and S lie within (-1, 1).
    """
    d = z.shape[-1]
    both, s_diagonal, b, reflections = parameters.split([d * d, d, d, parameters.shape[-1] - d * d - 2 * d], -1)
    # R is above the diagonal and the transpose of S below it, as in the authors' code
    both = both.unflatten(-1, (d, d))
    r_diagonal = (1 - FLOOR) * both.diagonal(dim1=-2, dim2=-1).tanh()
    s_diagonal = (1 - FLOOR) * s_diagonal.tanh()
    r = both.triu(1) + torch.diag_embed(r_diagonal)
    s = both.tril(-1).transpose(-2, -1) + torch.diag_embed(s_diagonal)
    axes = reflections.unflatten(-1, (-1, d)).unbind(-2)
    rotated = z
    for axis in axes:
        rotated = reflect(rotated, axis)
    h = torch.tanh((s * rotated[..., None, :]).sum(-1) + b)
    moved = (r * h[..., None, :]).sum(-1)
    for axis in reversed(axes):
        moved = reflect(moved, axis)
    return z + moved, torch.log1p((1 - h**2) * r_diagonal * s_diagonal).sum(-1)  # van den Berg et al., section 3


def reflect(z: Tensor, axis: Tensor) -> Tensor:
    """Return (I - 2 v v^T / ||v||^2) z."""
    return z - 2 * axis * dot(axis, z) / dot(axis, axis).clamp_min(1e-12)


# name of a step -> the step, and its number of parameters for a code of size D
FLOWS: dict[str, tuple[Step, Callable[[int], int]]] = {
    "planar": (planar, lambda d: 2 * d + 1),
    "radial": (radial, lambda d: d + 2),
    "sylvester": (sylvester, lambda d: d * d + 2 * d + d * min(d, 8)),
}


class MaskedLinear(nn.Linear):
    """A linear layer with masked weights.

    Args:
        mask: whether an output, by row, may depend on an input, by column.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """Computes shift and gate of each element of a code from previous elements and a context, with one hidden layer.

    Germain et al. 2015, https://arxiv.org/abs/1502.03509: hidden units have degrees from 0 to D - 1; units of degree 0
    depend only on the context.

    Args:
        size: D.
        hidden: H, number of hidden units and of values in the context.
    """

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        degree_D, degree_H = torch.arange(size), torch.arange(hidden) * size // hidden
        self.first = MaskedLinear(degree_H[:, None] > degree_D)
        self.shift = MaskedLinear(degree_D[:, None] >= degree_H)
        self.gate = MaskedLinear(degree_D[:, None] >= degree_H)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return shift and gate, before a sigmoid: (..., B, D), (B, H) -> (..., B, D), (..., B, D)."""
        dtype = self.first.weight.dtype
        hidden = F.elu(self.first(z.to(dtype)) + context.to(dtype))
        return at_least_float32(self.shift(hidden)), at_least_float32(self.gate(hidden))


class AffineLayer(nn.Module):
    """f(z)_i = z_i exp(a_i(z)) + m_i(z), where a_i and m_i depend on the elements of lower rank than z_i.

    With ranks 0 and 1 only and rank 0 `fixed`, it is a coupling layer of RealNVP (Dinh et al. 2016,
    https://arxiv.org/abs/1605.08803). With one rank per element, it is a layer of a masked autoregressive flow
    (Papamakarios et al. 2017, https://arxiv.org/abs/1705.07057). The inverse takes as many passes as there are ranks.

    Args:
        rank_D: position of each element in the order in which f is inverted; equal ranks are inverted together.
        fixed: leave elements of rank 0 unchanged; otherwise they are moved by constants.
        width: H, size of each of the two hidden layers.
    """

    moves_D: Tensor

    def __init__(self, rank_D: Tensor, fixed: bool, width: int) -> None:
        super().__init__()
        self.n_ranks = int(rank_D.max()) + 1
        # a hidden unit of rank r has inputs of rank below r and outputs of rank r or more (Germain et al. 2015)
        rank_H = 1 + torch.arange(width) * max(1, self.n_ranks - 1) // width
        self.net = nn.Sequential(
            MaskedLinear(rank_H[:, None] > rank_D),
            nn.ELU(),
            MaskedLinear(rank_H[:, None] >= rank_H),
            nn.ELU(),
            MaskedLinear((rank_D[:, None] >= rank_H).repeat(2, 1)),
        )
        moves_D = rank_D > 0 if fixed else torch.ones_like(rank_D, dtype=torch.bool)
        self.register_buffer("moves_D", moves_D, persistent=False)

    def shift_and_log_scale(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return m and a of the formula: (..., D) -> (..., D), (..., D)."""
        m, a = at_least_float32(self.net(z.to(next(self.net.parameters()).dtype))).chunk(2, -1)
        # the scale is limited to a factor of 1000, as in zuko
        return m * self.moves_D, a / (1 + a.abs() / math.log(1000)) * self.moves_D

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(z) and log|det|: (..., D) -> (..., D), (...)."""
        m, a = self.shift_and_log_scale(z)
        return z * a.exp() + m, a.sum(-1)

    def inverse(self, u: Tensor) -> Tensor:
        """Invert f rank by rank, each rank from the elements of lower rank: (..., D) -> (..., D)."""
        z = torch.zeros_like(u)
        for _ in range(self.n_ranks):
            m, a = self.shift_and_log_scale(z)
            z = (u - m) * torch.exp(-a)
        return z


class AutoregressiveFlow(nn.ModuleList):
    """Masked autoregressive layers with alternating order of the elements; without layers the identity.

    Args:
        size: D.
        n_flows: number of layers.
        width: H, size of each of their two hidden layers.
    """

    def __init__(self, size: int, n_flows: int, width: int) -> None:
        order_D = torch.arange(size)
        super().__init__(AffineLayer(order_D.flip(0) if t % 2 else order_D, False, width) for t in range(n_flows))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(z) and log|det df/dz|: (..., D) -> (..., D), (...)."""
        log_det = torch.zeros_like(z[..., 0])
        for layer in self:
            z, log_det_t = layer(z)
            log_det = log_det + log_det_t
        return z, log_det

    def inverse(self, u: Tensor) -> Tensor:
        """Return z such that f(z) = u: (..., D) -> (..., D)."""
        layer: nn.Module
        for layer in reversed(self):
            u = layer.inverse(u)  # type: ignore[operator]
        return u
