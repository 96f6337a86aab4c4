"""Pre-norm Transformer blocks (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Xiong et al. 2020, 2002.04745).

A sample is a sequence of steps as in `aezoo.nets.lstm`. Positions are the sinusoids of section 3.5, so any number of
steps works. The encoder computes the code from the mean over the steps; steps beyond given lengths are masked and
excluded from the mean. The decoder's input at each step is the code and the position. A step does not attend to later
steps, so the first steps do not depend on the number of steps.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.nets.build import activation
from aezoo.nets.lstm import FromSteps, Steps, check_shapes, map_shape, sinusoids, steps_of

__all__ = ["Block", "Decoder", "Encoder", "default_hidden_dims", "map_shape"]

_HEAD_DIM = 16
_MANY_STEPS = 256


def default_hidden_dims(input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """See `nets.default_hidden_dims`: the cost of attention is quadratic in the number of steps."""
    return (64, 64) if steps_of(input_shape)[0] <= _MANY_STEPS else (32,)


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)); heads of 16 channels if the width allows.

    A causal block can process a sequence in parts. Each part is given the same list `kept`, initially empty, which
    contains the keys and values of earlier parts.
    """

    def __init__(self, width: int, act: str, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = math.gcd(width, max(1, width // _HEAD_DIM)), causal
        # no bias: the softmax cancels a key bias, so its gradient is only rounding error, which Adam amplifies
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), activation(act), nn.Linear(4 * width, width)
        )

    def forward(self, h_BLW: Tensor, seen_BL: Tensor | None = None, kept: list[Tensor] | None = None) -> Tensor:
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(h_BLW)).chunk(3, 2)
        )
        mask = None if seen_BL is None else seen_BL[:, None, None]
        if kept is not None:
            earlier = kept[0].shape[2] if kept else 0
            k, v = kept[:] = [torch.cat(parts, 2) for parts in zip(kept, (k, v), strict=True)] if kept else [k, v]
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(earlier)
        attended = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and kept is None)
        h_BLW = h_BLW + self.out(attended.transpose(1, 2).flatten(2))
        return h_BLW + self.mlp(h_BLW)


class _Blocks(nn.ModuleList):
    """Blocks of the widths `hidden_dims`, with a linear map between different widths."""

    def __init__(self, hidden_dims: tuple[int, ...], act: str, causal: bool) -> None:
        super().__init__()
        before = hidden_dims[0]
        for width in hidden_dims:
            if width != before:
                self.append(nn.Linear(before, width))
            self.append(Block(width, act, causal))
            before = width
        self.append(nn.LayerNorm(before))

    def forward(self, h: Tensor, seen_BL: Tensor | None = None) -> Tensor:
        for layer in self:
            h = layer(h, seen_BL) if isinstance(layer, Block) else layer(h)
        return h


class Encoder(nn.Module):
    """(B, *input_shape) -> (B, D), with one block for each width of `hidden_dims`."""

    positions_LW: Tensor

    def __init__(
        self, input_shape: tuple[int, ...], code_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        super().__init__()
        check_shapes("transformer", code_shape, hidden_dims)
        n_steps, features = steps_of(input_shape)
        self.embed = nn.Sequential(Steps(), nn.Linear(features, hidden_dims[0]))
        self.register_buffer("positions_LW", sinusoids(n_steps, hidden_dims[0]), persistent=False)
        self.blocks = _Blocks(hidden_dims, act, causal=False)
        self.head = nn.Linear(hidden_dims[-1], code_shape[0])

    def forward(self, x: Tensor, length_B: Tensor | None = None) -> Tensor:
        h_BLW = self.embed(x) + self.positions_LW
        if length_B is None:
            mean_BW = self.blocks(h_BLW).mean(1)
        else:
            seen_BL = torch.arange(h_BLW.shape[1], device=x.device) < length_B[:, None]
            mean_BW = (self.blocks(h_BLW, seen_BL) * seen_BL[..., None]).sum(1) / length_B[:, None]
        code: Tensor = self.head(mean_BW)
        return code


class Decoder(nn.Module):
    """(B, D) -> (B, *input_shape); `hidden_dims` from the code to the sample."""

    positions_LW: Tensor

    def __init__(
        self, code_shape: tuple[int, ...], input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        super().__init__()
        check_shapes("transformer", code_shape, hidden_dims)
        n_steps, features = steps_of(input_shape)
        self.embed = nn.Linear(code_shape[0], hidden_dims[0])
        self.register_buffer("positions_LW", sinusoids(n_steps, hidden_dims[0]), persistent=False)
        self.blocks = _Blocks(hidden_dims, act, causal=True)
        self.head = nn.Sequential(nn.Linear(hidden_dims[-1], features), FromSteps(input_shape))

    def forward(self, z: Tensor) -> Tensor:
        x_hat: Tensor = self.head(self.blocks(self.embed(z)[:, None] + self.positions_LW))
        return x_hat
