"""Temporal sparse autoencoder, temporal feature analysis (Lubana et al. 2025), https://arxiv.org/abs/2511.01836

The part of the present position that earlier positions of the sequence predict is subtracted before sparse coding, so
that the sparse code represents only the new information. With r = x - b_pre and v = relu(W_enc r + b_enc):

    p = relu(attention of v to the v of earlier positions)     c = <W_dec p, r> / (||W_dec p|| + 1e-6)^2
    pi = W_enc (r - c W_dec p) + b_enc     f = relu(topk_k(pi))     x_hat = W_dec (f + c p) + b_pre     ||d_i|| = 1
    L = sum over positions of -log p(x | x_hat) + alpha s ||e - e_hat||^2     AuxK and its s as in TopK

L is in nats per sample. The values of earlier positions determine the direction W_dec p; its coefficient c is the
projection of the present position and may be negative. A code of zeros is prepended to the sequence: the first position
attends only to it, all others may attend to it too. As long as the bias of the attention's output is 0, as at
initialisation, the prediction for the first position is 0. With sequences of one position, this bias receives no
gradient, so the model remains the same as topk_sae. k = N leaves only the ReLU.

SAELens and the authors use W_enc = W_dec^T / (4 D), directions of any norm, no b_enc and no AuxK. They also have a bias
of the keys, which has no effect on the softmax, and one of the values, which is equivalent to one of the output.

(T, D) are T positions, e.g. the activations of tokens. For (C, T, ...), the positions are along the axis after the
channels, e.g. the rows of an image. A vector is one position.

Shapes: B batch, T positions, D dimensions per position, N latents, k active latents.
"""

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.errors import AezooError
from aezoo.models.sparse.topk_sae import TopKSAE, TopKSAEArgs
from aezoo.nets.blocks.dictionary import Dictionary, scatter_code

EPS = 1e-6


def counts(input_shape: tuple[int, ...]) -> tuple[int, int]:
    """T and D."""
    t = 1 if len(input_shape) == 1 else input_shape[len(input_shape) > 2]
    return t, math.prod(input_shape) // t


def positions(x: Tensor) -> Tensor:
    """(B, *input_shape) -> (B, T, D)."""
    if x.ndim < 4:
        return x if x.ndim == 3 else x[:, None]
    return x.movedim(2, 1).flatten(2)


class SequenceDictionary(Dictionary):
    """x_hat of codes of several kinds, which are summed, (B, ?, T, N) -> (B, *input_shape)."""

    def __init__(self, latent_dim: int, input_shape: tuple[int, ...]) -> None:
        super().__init__(latent_dim, counts(input_shape)[1:], "dense")
        self.sample_shape = input_shape

    def forward(self, f_BN: Tensor) -> Tensor:
        x_BTD = F.linear(f_BN.sum(1), self.directions().t()) + self.b_X
        if len(self.sample_shape) < 3:
            return x_BTD if len(self.sample_shape) == 2 else x_BTD[:, 0]
        return x_BTD.unflatten(2, (self.sample_shape[0], *self.sample_shape[2:])).movedim(1, 2)


class Context(nn.Module):
    """Attention over the codes of earlier positions, and zeros before the first, (B, T, N) -> (B, T, N).

    Args:
        latent_dim: N.
        key_dim: total width of the keys of all heads.
        heads: number of heads.

    Raises:
        AezooError: a width that the number of heads does not divide.
    """

    def __init__(self, latent_dim: int, key_dim: int, heads: int) -> None:
        super().__init__()
        if min(heads, key_dim) < 1 or latent_dim % heads or key_dim % heads:
            raise AezooError(
                "latent_dim and key_dim must be multiples of heads, and these at least 1, got "
                f"{latent_dim}, {key_dim} and {heads}"
            )
        self.heads = heads
        # the softmax cancels a bias of the keys, and a bias of the values is equivalent to one of the output
        self.query, self.key = nn.Linear(latent_dim, key_dim), nn.Linear(latent_dim, key_dim, bias=False)
        self.value, self.out = nn.Linear(latent_dim, latent_dim, bias=False), nn.Linear(latent_dim, latent_dim)
        widths = {self.query: key_dim // heads, self.key: key_dim // heads, self.value: latent_dim // heads}
        with torch.no_grad():
            for layer, width in (widths | {self.out: latent_dim}).items():
                layer.weight.copy_(F.normalize(layer.weight, dim=1) * width**-0.5)
            self.out.bias.zero_()

    def forward(self, v_BTN: Tensor) -> Tensor:
        earlier_BTN = torch.cat([torch.zeros_like(v_BTN[:, :1]), v_BTN[:, :-1]], 1)
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(v_BTN), self.key(earlier_BTN), self.value(earlier_BTN))
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        predicted: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return predicted


class TemporalSAE(TopKSAE, sparse_code=False, tags=("interpretability",)):
    """Encodes with at most k latents what attention to earlier positions does not predict.

    The code, (2, T, N), is the sparse code f, followed by the predicted code c p, which is not sparse.

    Args:
        input_shape: shape of one sample: (T, D) for T positions; any shape is valid, see above.
        k: active latents per position; fewer if fewer pre-activations are positive.
        key_dim: total width of the keys of all heads.
        heads: number of attention heads; key_dim and latent_dim must be multiples of it.
        k_aux: maximum number of dead latents that reconstruct the residual; if 0, half of a position's dimensions.
        dead_after: a latent is dead if it has not been active for this many positions.
        **kwargs: see `TopKSAE`.
    """

    context: Context
    encoder: nn.Linear
    decoder: SequenceDictionary

    def __init__(
        self, input_shape: tuple[int, ...], *, key_dim: int = 32, heads: int = 4, **kwargs: Unpack[TopKSAEArgs]
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.context = Context(self.latent_dim, key_dim, heads)
        self.code_shape = (2, counts(self.input_shape)[0], self.latent_dim)
        self.decoder = SequenceDictionary(self.latent_dim, self.input_shape)
        self.encoder.weight.data.copy_(self.decoder.W_NX)

    def target_shape(self) -> tuple[int, ...]:
        return counts(self.input_shape)[1:]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pi and c p, (B, *input_shape) -> (B, T, N), (B, T, N)."""
        r_BTD = positions(x) - self.decoder.b_X
        p_BTN = self.context(self.encoder(r_BTD).relu()).relu()
        d_BTD, exact_BTD = at_least_float32(F.linear(p_BTN, self.decoder.W_NX.t())), at_least_float32(r_BTD)
        c_BT1 = (d_BTD * exact_BTD).sum(2, keepdim=True) / (d_BTD.norm(dim=2, keepdim=True) + EPS).square()
        pi_BTN: Tensor = self.encoder((exact_BTD - c_BT1 * d_BTD).to(r_BTD.dtype))
        return pi_BTN, (c_BT1 * p_BTN).to(pi_BTN.dtype)

    def both(self, pi_BTN: Tensor, predicted_BTN: Tensor) -> Tensor:
        """Return the code, (B, T, N), (B, T, N) -> (B, 2, T, N)."""
        _, t, n = self.code_shape
        new_BTN = scatter_code(*self.active(pi_BTN.flatten(0, 1), self.k), n).unflatten(0, (-1, t))
        return torch.stack([new_BTN, predicted_BTN], 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.both(*self.split(x))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        pi_BTN, predicted_BTN = self.split(x)
        code_B2TN = self.both(pi_BTN, predicted_BTN)
        x_hat = self.decoder(code_B2TN)
        nll_B, usage = self.nll(x_hat, x), self.usage_terms(code_B2TN[:, 0].flatten(0, 1))
        rows, rows_hat = (positions(each).flatten(0, 1) for each in (x, x_hat))
        aux_B = self.aux(rows, rows_hat, pi_BTN.flatten(0, 1)).unflatten(0, (-1, self.code_shape[1])).sum(1)
        loss = (nll_B + self.aux_weight * aux_B).mean()
        return {"loss": loss, "nll": nll_B.mean(), "aux": aux_B.mean(), **usage}

    def init_from_data(self, x: Tensor) -> None:
        super().init_from_data(positions(x).flatten(0, 1))
