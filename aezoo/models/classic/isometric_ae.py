"""Isometric autoencoder, I-AE (Gropp et al. 2020), https://arxiv.org/abs/2006.09289

The decoder preserves lengths and angles, and the encoder is its pseudo-inverse, an orthogonal projection:

    L = -log p(x | g(f(x))) + lambda (L_iso + L_piso)
    L_iso = E_z,u (||dg(z) u|| - 1)^2     L_piso = E_x,u (||u' df(x)|| - 1)^2     u uniform on the unit sphere

L is in nats per sample, with one u per sample. g is the reconstruction, the likelihood's mean. z are the codes of the
batch, detached, so that L_iso trains only the decoder and L_piso only the encoder. lambda = 0 gives the plain
autoencoder.

`distortion` relaxed preserves lengths up to a common factor and has no L_piso (Lee et al. 2022,
https://openreview.net/forum?id=mQxt8l7JL04):

    L_iso = E tr(G^2) / (E tr G)^2     G = dg(z)' dg(z)

This L_iso is at least 1 / D, with equality if G is the same multiple of I everywhere. With v = sqrt(D) u, the traces
are the expectations of v' G v and v' G^2 v. Unlike in that paper, the codes are not mixed.

Shapes: B batch, X data dimensions, D code.
"""

import math
from collections.abc import Callable
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.errors import AezooError
from aezoo.training.limits import check_at_least

DISTORTIONS = ("isometric", "relaxed")


class IsometricAE(NetworkAutoencoder, hidden_dims={"mlp": (256,)}, tags=("representation",)):
    """Learns a code in which distances equal those along the data manifold.

    Args:
        latent_dim: D, size of the code.
        isometry: lambda, weight of the isometric terms.
        distortion: how the decoder preserves lengths: isometric, or relaxed (up to a common factor).
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        isometry: float = 10.0,
        distortion: str = "isometric",
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(0, isometry=isometry)
        if distortion not in DISTORTIONS:
            raise AezooError(f"unknown distortion {distortion!r}: choose from {', '.join(DISTORTIONS)}")
        self.isometry = isometry
        self.distortion = distortion
        self.code_shape = (latent_dim,)
        self.encoder = self.build_encoder(self.code_shape)
        self.decoder = self.build_decoder(self.code_shape)

    def reconstruct(self, z_BD: Tensor) -> Tensor:
        """g, (B, D) -> (B, X)."""
        return self.likelihood.mean(self.decoder(z_BD)).flatten(1)

    def linearised(self, z_BD: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The maps u -> dg(z) u, (B, D) -> (B, X), and w -> w' dg(z), (B, X) -> (B, D)."""
        x_hat_BX, pull, *_ = torch.func.vjp(self.reconstruct, z_BD)
        # vjp of the vjp: faster at this size than forward mode, whose rules take torch a second to script
        _, push, *_ = torch.func.vjp(lambda w_BX: pull(w_BX)[0], torch.zeros_like(x_hat_BX))
        return lambda u_BD: push(u_BD)[0], lambda w_BX: pull(w_BX.to(x_hat_BX.dtype))[0]

    def iso(self, z_BD: Tensor, u_BD: Tensor) -> Tensor:
        """(||dg(z) u|| - 1)^2, (B, D), (B, D) -> (B,)."""
        push, _ = self.linearised(z_BD)
        return (at_least_float32(push(u_BD)).norm(dim=1) - 1).square()

    def piso(self, x: Tensor, u_BD: Tensor) -> Tensor:
        """(||u' df(x)|| - 1)^2, (B, *input_shape), (B, D) -> (B,)."""
        z_BD, pull, *_ = torch.func.vjp(self.encoder, x)
        return (at_least_float32(pull(u_BD.to(z_BD.dtype))[0]).flatten(1).norm(dim=1) - 1).square()

    def relaxed(self, z_BD: Tensor, u_BD: Tensor) -> Tensor:
        """E tr(G^2) / (E tr G)^2 over the codes of all ranks, (B, D), (B, D) -> ()."""
        push, pull = self.linearised(z_BD)
        moved_BX = push(math.sqrt(u_BD.shape[1]) * u_BD)
        trace_B, trace_of_square_B = (at_least_float32(v).square().sum(1) for v in (moved_BX, pull(moved_BX)))
        return self.batch_mean(trace_of_square_B) / self.batch_mean(trace_B).square()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BD = self.encoder(x)
        nll = self.nll(self.decoder(z_BD), x).mean()
        at_BD = z_BD.detach().to(x.dtype)
        # a single draw: if torch 2.13 compiles two draws, the second one differs from that in eager mode
        noise_B2D = torch.randn_like(at_least_float32(at_BD)[:, None].expand(-1, 2, -1))
        u_BD, v_BD = F.normalize(noise_B2D, dim=2).to(x.dtype).unbind(1)
        if self.distortion == "isometric":
            iso, piso = self.iso(at_BD, u_BD).mean(), self.piso(x, v_BD).mean()
        else:
            iso, piso = self.relaxed(at_BD, u_BD), torch.zeros_like(nll)
        return {"loss": nll + self.isometry * (iso + piso), "nll": nll, "iso": iso, "piso": piso}
