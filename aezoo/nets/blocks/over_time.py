"""Sequences of positions that share a dictionary: how samples map to positions, and what earlier positions predict.

(T, D) holds T positions as its rows, e.g. the activations of tokens. For (C, T, ...), positions run along the axis
after the channels, e.g. the rows of an image. A vector is one position.

Shapes: B batch, T positions, D dimensions of one, N latents.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.nets.blocks.dictionary import Dictionary
from aezoo.speed.linear import Linear, linear


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
        x_BTD = linear(f_BN.sum(1), self.directions().t()) + self.b_X
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
        self.query, self.key = Linear(latent_dim, key_dim), Linear(latent_dim, key_dim, bias=False)
        self.value, self.out = Linear(latent_dim, latent_dim, bias=False), Linear(latent_dim, latent_dim)
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
