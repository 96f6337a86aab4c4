"""MLP-Mixer (Tolstikhin et al. 2021, https://arxiv.org/abs/2105.01601) on patches in 1, 2 or 3 dimensions.

    U = X + W_2 act(W_1 norm(X))               over the positions, with equal weights for each channel     (equation 1)
    Y = U + act(norm(U) W_3) W_4               over the channels, with equal weights for each position

Each entry of `hidden_dims` is such a block of that width D; a linear layer connects blocks of different widths. As in
table 1 of the paper, the layers over channels have 4 D hidden units and those over positions D/2. The latter have
separate weights for each position, so there are no position embeddings, and the number of patches is fixed. Patches are
those of `vit`.

Shapes: B batch, N patches, P values in a patch, D width of a token.
"""

import math
from functools import partial

from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.nets import vit
from aezoo.nets.build import activation
from aezoo.nets.vit import default_hidden_dims, map_shape

__all__ = ["Block", "Decoder", "Encoder", "blocks", "default_hidden_dims", "map_shape"]


def _branch(n: int, between: int, act: str) -> nn.Sequential:
    first, last = nn.Linear(n, between), nn.Linear(between, n)
    for part, gain in ((first, 1.0), (last, 0.1)):  # initialised as the branches of `vit`
        nn.init.xavier_uniform_(part.weight, gain)
        nn.init.zeros_(part.bias)
    return nn.Sequential(first, activation(act), last)


class Block(nn.Module):
    """Two linear layers over the positions, then two over the channels; each pair normalises its input and is residual.

    Args:
        n: N, number of positions.
        width: D.
        act: an activation's name; GELU in the paper.
    """

    def __init__(self, n: int, width: int, act: str) -> None:
        super().__init__()
        half = max(1, width // 2)
        self.norm_1, self.norm_2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.places = _branch(n, half, act)
        self.channels = _branch(width, 4 * width, act)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.places(self.norm_1(x_BND).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x_BND + self.channels(self.norm_2(x_BND))
        return out


def blocks(n: int, widths: tuple[int, ...], act: str) -> nn.Sequential:
    """Create a block for each width and a final normalisation, with a linear layer where the width changes."""
    return vit.blocks(widths, act, partial(Block, n))


def _heads(code_shape: tuple[int, ...], patchify: vit.Patchify, width: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """Create the layers from tokens to the code, linear as for a map, and the layers from the code to tokens."""
    channels, *grid = code_shape
    if not grid:
        tokens = (patchify.n, width)
        size = math.prod(tokens)
        return [nn.Flatten(), nn.Linear(size, channels)], [nn.Linear(channels, size), nn.Unflatten(1, tokens)]
    if tuple(grid) != patchify.grid:
        raise AezooError(f"a code of shape {tuple(code_shape)} does not fit: patches leave a grid of {patchify.grid}")
    return [nn.Linear(width, channels), vit.ToMap(patchify.grid)], [vit.ToTokens(), nn.Linear(channels, width)]


class Encoder(nn.Sequential):
    """(B, C, *grid) -> (B, *code_shape); `hidden_dims` are the widths of the blocks."""

    def __init__(
        self, input_shape: tuple[int, ...], code_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        patchify = vit.Patchify(input_shape)
        layers: list[nn.Module] = [patchify]
        if hidden_dims:
            layers += [nn.Linear(patchify.size, hidden_dims[0]), *blocks(patchify.n, hidden_dims, act)]
        else:
            activation(act)  # raises an error for an unknown name even if there are no blocks
        width = hidden_dims[-1] if hidden_dims else patchify.size
        super().__init__(*layers, *_heads(code_shape, patchify, width)[0])


class Decoder(nn.Sequential):
    """(B, *code_shape) -> (B, C, *grid); `hidden_dims` from the code to the sample."""

    def __init__(
        self, code_shape: tuple[int, ...], input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        patchify = vit.Patchify(input_shape)
        width = hidden_dims[0] if hidden_dims else patchify.size
        layers = _heads(code_shape, patchify, width)[1]
        if hidden_dims:
            layers += [*blocks(patchify.n, hidden_dims, act), nn.Linear(hidden_dims[-1], patchify.size)]
        else:
            activation(act)
        super().__init__(*layers, vit.Unpatchify(patchify))
