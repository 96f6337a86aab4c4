"""Gated PixelCNN (van den Oord et al. 2016), https://arxiv.org/abs/1606.05328

A prior over the indices k of a quantised model, by masked convolutions over their grid:

    L = -sum_t log p(k_t | k_1 .. k_{t-1})        positions in raster order, the Q indices of each in turn

    v <- gate(conv(v))                            vertical stack: rows up to that of a position, all columns
    h <- h + W gate(mask(conv(h)) + W' v_above)   horizontal stack: the row up to a position, and v of the row above
    gate(a, b) = tanh(a) sigmoid(b)

Together, the two stacks cover every earlier position, without the blind spot of a single stack of masked convolutions.
Among the Q indices of one position, index q depends on those before q: the first layer has mask A, later ones mask B,
as for R, G, B.

Shapes: B batch, Q indices of a position, K codes of the largest codebook, (H, W) grid of positions, T = Q H W, F
    channels.
"""

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.bases.token_prior import IndexPrior, IndexPriorArgs
from aezoo.errors import AezooError


class MaskedConv(nn.Conv2d):
    """A convolution over a position and those to its left, with channels in groups.

    Args:
        n_in, n_out: channels.
        reach: number of positions to the left.
        groups: number of channel groups; at its own position, an output depends on the groups before its own.
        own: whether it also depends on its own group (mask B) or not (mask A).
    """

    mask: Tensor

    def __init__(self, n_in: int, n_out: int, reach: int, groups: int, own: bool = True) -> None:
        super().__init__(n_in, n_out, (1, reach + 1))
        of_in, of_out = (torch.arange(n) * groups // n for n in (n_in, n_out))
        mask = torch.ones_like(self.weight, requires_grad=False)
        mask[..., -1] = (of_in < of_out[:, None] + own)[:, :, None]
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (self.kernel_size[1] - 1, 0)), self.weight * self.mask, self.bias)


class GatedLayer(nn.Module):
    """One layer of the two stacks, (B, F, H, W), (B, F, H, W) -> the same.

    Args:
        width: F, divided into groups.
        groups: Q.
        reach: number of positions that it covers to each side, and above.
        vertical: whether there are rows above.
        dropout: dropout rate of the update of h.
        first: whether it is the first layer, which has mask A and no input h.
    """

    def __init__(self, width: int, groups: int, reach: int, vertical: bool, dropout: float, first: bool) -> None:
        super().__init__()
        self.groups = groups
        self.reach = reach
        self.first = first
        self.vertical = vertical
        if vertical:
            self.v = nn.Conv2d(width, 2 * width, (reach + 1, 2 * reach + 1))
            self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.h = MaskedConv(width, 2 * width, reach, groups, own=not first)
        self.out = nn.Sequential(nn.Dropout(dropout), MaskedConv(width, width, 0, groups))

    def gate(self, ab: Tensor) -> Tensor:
        a, b = ab.unflatten(1, (self.groups, 2, -1)).unbind(2)  # each group has both
        return (a.tanh() * b.sigmoid()).flatten(1, 2)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        ab = self.h(h)
        if self.vertical:
            v = self.v(F.pad(v, (self.reach, self.reach, self.reach, 0)))
            ab, v = ab + F.pad(self.link(v), (0, 0, 1, 0))[:, :, :-1], self.gate(v)
        added = self.out(self.gate(ab))
        return v, added if self.first else h + added


def _rename_embedding(_: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Read weights that were saved under the embedding's former name."""
    if f"{prefix}book.weight" in state_dict:
        state_dict[f"{prefix}embedding.weight"] = state_dict.pop(f"{prefix}book.weight")


class PixelCNN(IndexPrior, defaults={"lr": 3e-3}, tags=("generation",)):
    """Learns a gated PixelCNN over the maps or sequences of indices of a quantised model.

    Args:
        input_shape: shape of one sample; any that the tokenizer encodes as a map or a sequence of indices.
        width: F, channels of both stacks, divided among the Q indices of a position.
        depth: number of layers.
        kernel_size: size of the convolutions, odd; a layer reaches half of it to each side.
        dropout: share of a layer's output that is dropped in training.
        **kwargs: see `IndexPrior`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        width: int = 48,
        depth: int = 5,
        kernel_size: int = 3,
        dropout: float = 0.1,
        **kwargs: Unpack[IndexPriorArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.check_net(width, depth, dropout)
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise AezooError(f"kernel_size must be odd and at least 3, got {kernel_size}")
        q, *places = self.index_shape
        if len(places) > 2:
            raise AezooError("pixelcnn takes maps and sequences of indices, not volumes: use index_transformer")
        self.grid = (*(1,) * (2 - len(places)), *places)
        each = -(-width // q)
        k = self.n_codes
        reach = kernel_size // 2
        self.embedding = nn.Embedding(q * k, each)
        self.register_load_state_dict_pre_hook(_rename_embedding)
        self.layers = nn.ModuleList(
            GatedLayer(q * each, q, reach, self.grid[0] > 1, dropout, first=i == 0) for i in range(depth)
        )
        hidden, out = MaskedConv(q * each, q * each, 0, q), MaskedConv(q * each, q * k, 0, q)
        self.head = nn.Sequential(nn.ReLU(), hidden, nn.ReLU(), out)

    def token_logits(self, tokens: Tensor) -> Tensor:
        q = self.index_shape[0]
        offset_Q = self.n_codes * torch.arange(q, device=tokens.device)
        embedded_BPQF = self.embedding(tokens.unflatten(1, (-1, q)) + offset_Q)
        h = v = embedded_BPQF.flatten(2).transpose(1, 2).unflatten(2, self.grid)
        for layer in self.layers:
            v, h = layer(v, h)
        return self.head(h).flatten(2).transpose(1, 2).unflatten(2, (q, self.n_codes)).flatten(1, 2)
