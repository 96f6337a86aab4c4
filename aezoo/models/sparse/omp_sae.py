"""OMP sparse autoencoder, orthogonal matching pursuit (Pati et al. 1993), https://doi.org/10.1109/ACSSC.1993.342465

The dictionary is also the encoder, as in matching_pursuit_sae. Here, all coefficients are recomputed by least squares
after each choice, so that the residual is orthogonal to the chosen directions and no direction is chosen twice:

    r_0 = x - b     i_t = argmax_i |d_i r_{t-1}|     r_t = x - b - sum_{s <= t} c_s d_{i_s}
    c_1 ... c_t = argmin ||r_t||^2     f = sum_t c_t e_{i_t}, of c after k steps
    x_hat = W f + b     ||d_i|| = 1     L = -log p(x | x_hat)

L is in nats per sample. Codes have both signs. The chosen directions become an orthonormal basis one after the other,
d_{i_t} = sum_{s <= t} R_st q_s, and c solves R c = q (x - b). Gradients pass through all c_t but not through the
choice. For the squared error, they pass only through the decoder: the derivative with respect to c is 0 there.

Shapes: B batch, X data dimensions, N latents, k steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.models.sparse.matching_pursuit_sae import MatchingPursuitSAE

# sine of a direction's angle to the earlier ones; below this, it is a linear combination of them up to rounding
_MIN_RESIDUAL = 1e-3


class OMPSAE(MatchingPursuitSAE, tags=("interpretability",)):
    """At most k active latents of either sign, with least-squares coefficients.

    Args:
        k: steps of the pursuit.
    """

    def choose(self, r_BX: Tensor) -> Tensor:
        return self.pursue(at_least_float32(r_BX))[0]

    @torch.no_grad()
    def pursue(self, r_BX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return i_1 ... i_k, R and q (x - b), given x - b, (B, X) -> (B, k), (B, k, k), (B, k)."""
        W_NX = at_least_float32(self.decoder.W_NX)
        chosen: list[Tensor] = []
        basis: list[Tensor] = []
        y: list[Tensor] = []
        for _ in range(self.k):
            chosen.append(F.linear(r_BX, W_NX).abs().argmax(1))
            basis.append(self.orthogonal_part(W_NX[chosen[-1]], basis))
            y.append((basis[-1] * r_BX).sum(1))
            r_BX = r_BX - y[-1][:, None] * basis[-1]
        index_Bk = torch.stack(chosen, 1)
        return index_Bk, torch.stack(basis, 1) @ W_NX[index_Bk].mT, torch.stack(y, 1)

    @staticmethod
    def orthogonal_part(d_BX: Tensor, basis: list[Tensor]) -> Tensor:
        """Return a direction's part orthogonal to a basis, normalised, (B, X) -> (B, X); noise if this part is 0."""
        q_BX = d_BX
        if basis:
            q_BsX = torch.stack(basis, 1)
            for _ in range(2):  # one pass leaves rounding errors (Giraud et al. 2005, "twice is enough")
                q_BX = q_BX - ((q_BX[:, None] @ q_BsX.mT) @ q_BsX)[:, 0]
        return F.normalize(q_BX, dim=1)

    def encode(self, x: Tensor) -> Tensor:
        # autocast would round the residual to 8 bits and change the choice
        with torch.autocast(x.device.type, enabled=False):
            r_BX = at_least_float32(self.encoder(x) - self.decoder.b_X)
            index_Bk, R_Bkk, y_Bk = self.pursue(r_BX)
            # not W_NX[index_Bk]: several threads add up that gradient in no fixed order
            d_BkX, c_Bk = F.embedding(index_Bk, at_least_float32(self.decoder.W_NX)), self.solve(R_Bkk, y_Bk)
            # a Newton step, (R'R)^-1 d r_k, at the minimum of r_k: its value is 0 and its gradient is that of c
            left_BX = r_BX - (c_Bk[:, None] @ d_BkX)[:, 0]
            slope_Bk = (d_BkX @ left_BX[:, :, None])[:, :, 0]
            c_Bk = c_Bk + self.solve(R_Bkk, self.solve(R_Bkk.mT.flip(1, 2), slope_Bk.flip(1)).flip(1))
        zeros_BN = c_Bk.new_zeros(x.shape[0], *self.code_shape)
        # if the residual is 0, a latent may be chosen again; its c is then 0
        return zeros_BN.scatter_add(1, index_Bk, c_Bk).to(x.dtype)

    @staticmethod
    def solve(R_Bkk: Tensor, y_Bk: Tensor) -> Tensor:
        """Solve R c = y by back substitution, with R upper triangular; c is 0 for linearly dependent directions."""
        c: list[Tensor] = []
        for t in reversed(range(y_Bk.shape[1])):
            pivot_B = R_Bkk[:, t, t]
            new_B = pivot_B > _MIN_RESIDUAL
            c.append(torch.where(new_B, y_Bk[:, t] / torch.where(new_B, pivot_B, 1), 0))
            y_Bk = y_Bk - R_Bkk[:, :, t] * c[-1][:, None]
        return torch.stack(c[::-1], 1)
