"""Vision transformer (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929) on patches in 1, 2 or 3 dimensions.

Each entry of `hidden_dims` is a block of that width; a linear layer connects blocks of different widths. Position
embeddings are fixed sines and cosines, so any grid works; there is no class token. If a side is not a
multiple of the patch size, it is padded with zeros at its far end and the output is cropped, so every size is restored
exactly.

Shapes: B batch, C channels, N patches, P values in a patch, D width of a token, H heads, E width of a head.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.nets.build import activation
from aezoo.nets.conv import head

_MAX_PATCHES = 64
_LARGEST_PATCH = 16
_HEAD_DIM = 32


def patch_sides(input_shape: tuple[int, ...], patch_size: int = 0) -> tuple[int, ...]:
    """Return the sides of a patch, at most those of the sample; for size 0 the smallest power of two with few patches.

    Few means at most 64, as for 28x28 with side 4 or 64x64 with side 8; but the side is at most 16, as in ViT-B/16.

    Raises:
        AezooError: the input has no grid, or the patch size is negative.
    """
    if not 2 <= len(input_shape) <= 4:
        raise AezooError(
            f"patches need samples (C, L), (C, H, W) or (C, D, H, W), not {tuple(input_shape)}: for a vector use a "
            f"model with net='mlp', such as dense_ae or denoising_ae, or give it as a sequence, {(1, *input_shape)}"
        )
    if patch_size < 0:
        raise AezooError(f"patch_size must be at least 1, or 0 to choose it from the input, got {patch_size}")
    grid = input_shape[1:]
    size = patch_size or (2 if max(grid) > 2 else 1)
    while not patch_size and size < _LARGEST_PATCH and math.prod(-(-n // size) for n in grid) > _MAX_PATCHES:
        size *= 2
    return tuple(min(size, n) for n in grid)


class Patchify(nn.Module):
    """Split samples into patches, (B, C, *grid of values) -> (B, N, P), with the values of a patch channel by channel.

    Attributes:
        grid: number of patches along each side.
        n: N, number of patches.
        size: P, values in a patch.
        real_NP: 1 for values of a sample, 0 for padding at its far end.

    Args:
        input_shape: shape of a sample.
        patch_size: side of a patch; 0 selects it from the input shape.
    """

    real_NP: Tensor

    def __init__(self, input_shape: tuple[int, ...], patch_size: int = 0) -> None:
        super().__init__()
        self.input_shape, self.sides = tuple(input_shape), patch_sides(input_shape, patch_size)
        self.grid = tuple(-(-n // side) for n, side in zip(input_shape[1:], self.sides, strict=True))
        self.n, self.size = math.prod(self.grid), input_shape[0] * math.prod(self.sides)
        missing = [g * side - n for g, side, n in zip(self.grid, self.sides, input_shape[1:], strict=True)]
        self.padding = [n for m in reversed(missing) for n in (0, m)]  # the last side comes first in F.pad
        self.register_buffer("real_NP", self(torch.ones(1, *self.input_shape))[0], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rank = len(self.grid)
        x = F.pad(x, self.padding)
        for i, sizes in enumerate(zip(self.grid, self.sides, strict=True)):
            x = x.unflatten(2 + 2 * i, sizes)
        places, within = range(2, 2 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
        return x.permute(0, *places, 1, *within).flatten(1, rank).flatten(2)

    def standardise(self, patches_BNP: Tensor) -> tuple[Tensor, Tensor]:
        """Return standardised patches, and their means and standard deviations, (B, N, P) -> (B, N, P), (B, N, 2).

        The variance is the unbiased variance of a patch's values without padding, plus 1e-6; for a single value it is
        1e-6.
        """
        n_N1 = self.real_NP.sum(1, keepdim=True)
        mean_BN1 = (patches_BNP * self.real_NP).sum(2, keepdim=True) / n_N1
        square_BN1 = ((patches_BNP - mean_BN1).square() * self.real_NP).sum(2, keepdim=True)
        deviation_BN1 = (square_BN1 / (n_N1 - 1).clamp(min=1) + 1e-6).sqrt()
        return (patches_BNP - mean_BN1) / deviation_BN1, torch.cat([mean_BN1, deviation_BN1], dim=2)

    def inverse(self, patches_BNP: Tensor) -> Tensor:
        """Restore the samples from patches, (B, N, P) -> (B, C, *grid of values)."""
        rank = len(self.grid)
        x = patches_BNP.unflatten(2, (self.input_shape[0], *self.sides)).unflatten(1, self.grid)
        x = x.permute(0, rank + 1, *(i for axis in range(rank) for i in (1 + axis, rank + 2 + axis)))
        for axis, n in enumerate(self.input_shape[1:]):
            x = x.flatten(2 + axis, 3 + axis).narrow(2 + axis, 0, n)
        return x


class Unpatchify(nn.Module):
    """`Patchify.inverse` as a layer.

    Args:
        patchify: the module that splits samples into patches.
    """

    def __init__(self, patchify: Patchify) -> None:
        super().__init__()
        self.patchify = patchify

    def forward(self, patches_BNP: Tensor) -> Tensor:
        return self.patchify.inverse(patches_BNP)


def sinusoids(grid: Sequence[int], width: int, last_side_first: bool = False) -> Tensor:
    """Return the positions of a grid as sines and cosines, (N, D), with a part of the width for each side of the grid.

    The parts are in the order of the sides, or in reverse order as in the MAE authors' code for images.

    The frequencies are 10000^(-i/n), i < n (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), with the n that
    fills D; the last part is truncated to fit.
    """
    n = -(-width // (2 * len(grid)))
    frequency_n = 10_000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
    places = torch.meshgrid([torch.arange(side, dtype=torch.float64) for side in grid], indexing="ij")
    angles = [place.flatten()[:, None] * frequency_n for place in (places[::-1] if last_side_first else places)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)[:, :width].float()


class Positions(nn.Module):
    """Add a fixed position embedding to each token.

    Args:
        grid: number of patches along each side.
        width: D.
        authors: use the positions of MAE's authors: the last side first, see `sinusoids`, and saved with the weights.
    """

    table_ND: Tensor

    def __init__(self, grid: Sequence[int], width: int, authors: bool = False) -> None:
        super().__init__()
        self.register_buffer("table_ND", sinusoids(grid, width, authors), persistent=authors)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        return tokens_BND + self.table_ND


def embedding(size: int, width: int) -> nn.Linear:
    """Create the linear map from patches to tokens, (B, N, P) -> (B, N, D).

    Its initial weights are large enough for data in [0, 1] to outweigh the positions, which have size 1. With the usual
    initialisation, a short training only learns the mean of each position.

    Args:
        size: P, values in a patch.
        width: D.
    """
    embed = nn.Linear(size, width)
    nn.init.normal_(embed.weight, std=16 / math.sqrt(size))
    nn.init.zeros_(embed.bias)
    return embed


class ClassToken(nn.Module):
    """Prepend a trained token, (B, N, D) -> (B, 1 + N, D).

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, tokens_BND: Tensor) -> Tensor:
        return torch.cat([self.token.expand(tokens_BND.shape[0], 1, -1).to(tokens_BND), tokens_BND], dim=1)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D), to all tokens or only to visible tokens, (B, N).

    Args:
        width: D.
        heads: H, a divisor of D; 0 for heads of about 32 numbers.

    Raises:
        AezooError: the number of heads does not divide the width.
    """

    def __init__(self, width: int, heads: int = 0) -> None:
        super().__init__()
        if heads < 0 or (heads and width % heads):
            raise AezooError(f"{heads} heads do not divide a token of {width} numbers: use a divisor, or 0")
        self.heads = heads or next(h for h in range(max(1, width // _HEAD_DIM), 0, -1) if width % h == 0)
        # only queries have a bias: the softmax cancels a key bias, and a value bias adds nothing to the bias of `out`
        self.qkv, self.bias_q = nn.Linear(width, 3 * width, bias=False), nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, visible_BN: Tensor | None = None) -> Tensor:
        qkv_BNF = F.linear(x_BND, self.qkv.weight, F.pad(self.bias_q, (0, 2 * len(self.bias_q))))
        q_BHNE, k_BHNE, v_BHNE = qkv_BNF.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        visible_B11N = None if visible_BN is None else visible_BN[:, None, None]
        mixed_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE, visible_B11N)
        out: Tensor = self.out(mixed_BHNE.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention, then two linear layers for each token, each with residual sum and normalised input (pre-norm).

    Args:
        width: D.
        act: an activation's name.
        heads: see `Attention`.
        eps: added to the variance in the normalisations.
    """

    def __init__(self, width: int, act: str, heads: int = 0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width, eps=eps), Attention(width, heads)
        self.norm_2 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), activation(act), nn.Linear(4 * width, width))
        for part in self.modules():
            if isinstance(part, nn.Linear):
                # small initial weights: with full-size weights, a short training only learns the mean sample
                branch_ends = part in (self.attention.out, self.mlp[2])
                nn.init.xavier_uniform_(part.weight, 0.1 if branch_ends else 1.0)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, x_BND: Tensor, visible_BN: Tensor | None = None) -> Tensor:
        x_BND = x_BND + self.attention(self.norm_1(x_BND), visible_BN)
        out: Tensor = x_BND + self.mlp(self.norm_2(x_BND))
        return out


def blocks(
    widths: Sequence[int], act: str, block: Callable[[int, str], nn.Module] = Block, eps: float = 1e-6
) -> nn.Sequential:
    """Create a block for each width and a final normalisation, with a linear layer where the width changes."""
    layers: list[nn.Module] = []
    for i, width in enumerate(widths):
        layers += [nn.Linear(widths[i - 1], width)] if i and widths[i - 1] != width else []
        layers.append(block(width, act))
    return nn.Sequential(*layers, nn.LayerNorm(widths[-1], eps=eps))


def attend_to_visible(layers: nn.Module, tokens_BND: Tensor, visible_BN: Tensor) -> Tensor:
    """Apply `blocks` with attention only to visible tokens, so that the other tokens have no influence on them.

    The number of tokens stays the same, so shapes do not depend on the mask.
    """
    for layer in layers.children():
        tokens_BND = layer(tokens_BND, visible_BN) if isinstance(layer, Block) else layer(tokens_BND)
    return tokens_BND


class ToMap(nn.Module):
    """Reshape tokens to a feature map, (B, N, D) -> (B, D, *grid).

    Args:
        grid: number of patches along each side.
    """

    def __init__(self, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, tokens_BND: Tensor) -> Tensor:
        return tokens_BND.transpose(1, 2).unflatten(2, self.grid)


class ToTokens(nn.Module):
    """Reshape a feature map to tokens, (B, D, *grid) -> (B, N, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


# ---- masks of patches ------------------------------------------------------------------------------------------------


def count_masked(n: int, ratio: float) -> int:
    """Return how many of n patches are masked, floor(ratio n).

    Raises:
        AezooError: the ratio is not between 0 and 1, or no patch would be masked.
    """
    if not 0 < ratio < 1:
        raise AezooError(f"mask_ratio must lie between 0 and 1, got {ratio}")
    masked = math.floor(ratio * n + 1e-9)  # 0.29 * 100 is 28.999999999999996 in floating point
    if masked == 0:
        raise AezooError(f"mask_ratio {ratio} masks none of {n} patches: use a smaller patch_size or a larger ratio")
    return masked


def random_order(samples: int, n: int, device: torch.device) -> Tensor:
    """Return a random order of n patches for each sample, (B, N); the last patches of an order are masked."""
    return torch.rand(samples, n, device=device).argsort(dim=1)


def fixed_orders(n: int, masked: int) -> Tensor:
    """Return K fixed orders of n patches, where each patch is in the last `masked` of some orders, but not of all."""
    order_N = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    step = min(masked, n - masked)
    return torch.stack([order_N.roll(-start) for start in range(0, n, step)])


def is_masked(order_BN: Tensor, masked: int) -> Tensor:
    """Return which patches are among the last `masked` of an order, (B, N) -> (B, N)."""
    return order_BN.argsort(dim=1) >= order_BN.shape[1] - masked


def shuffle(tokens_BND: Tensor, order_BN: Tensor) -> Tensor:
    """Reorder tokens, (B, N, D), (B, V) -> (B, V, D), where the order may contain only some of them."""
    return tokens_BND.gather(1, order_BN[..., None].expand(-1, -1, tokens_BND.shape[2]))


def unshuffle(tokens_BND: Tensor, order_BN: Tensor) -> Tensor:
    """Return tokens to their order before `shuffle`."""
    return shuffle(tokens_BND, order_BN.argsort(dim=1))


def mask_tokens(tokens_BND: Tensor, orders_KN: Tensor, masked: int) -> tuple[Tensor, Tensor]:
    """Return the visible tokens of each of K orders, and the orders, for each sample: (B K, V, D), (B K, N)."""
    k, n = orders_KN.shape
    order_BKN = orders_KN.expand(tokens_BND.shape[0], -1, -1).flatten(0, 1)  # len() would fix an export's batch size
    tokens_BKND = tokens_BND[:, None].expand(-1, k, -1, -1).flatten(0, 1)
    return shuffle(tokens_BKND, order_BKN[:, : n - masked]), order_BKN


def average_masked(values_BKNP: Tensor, orders_KN: Tensor, masked: int) -> Tensor:
    """Average each patch over the orders in which it is masked, (B K, N, P) -> (B, N, P)."""
    hidden_KN = is_masked(orders_KN, masked).to(values_BKNP)
    share_KN = hidden_KN / hidden_KN.sum(0)
    return (values_BKNP.unflatten(0, (-1, len(orders_KN))) * share_KN[..., None]).sum(1)


def default_hidden_dims(input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """See `nets.default_hidden_dims`."""
    sides = zip(input_shape[1:], patch_sides(input_shape), strict=True)
    return (128, 128) if math.prod(-(-n // side) for n, side in sides) <= _MAX_PATCHES else (64, 64)


def map_shape(input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Return (channels, *grid of patches), which does not depend on the blocks."""
    return (channels, *Patchify(input_shape).grid)


class Encoder(nn.Sequential):
    """(B, C, *grid) -> (B, *code_shape); `hidden_dims` are the widths of the blocks."""

    def __init__(
        self, input_shape: tuple[int, ...], code_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        patchify = Patchify(input_shape)
        layers: list[nn.Module] = [patchify]
        if hidden_dims:
            embed = embedding(patchify.size, hidden_dims[0])
            layers += [embed, Positions(patchify.grid, hidden_dims[0]), *blocks(hidden_dims, act)]
        else:
            activation(act)  # raises an error for an unknown name even if there are no blocks
        width = hidden_dims[-1] if hidden_dims else patchify.size
        down = head(code_shape, (width, *patchify.grid), len(patchify.grid))[0]
        super().__init__(*layers, ToMap(patchify.grid), down)


class Decoder(nn.Sequential):
    """(B, *code_shape) -> (B, C, *grid); `hidden_dims` from the code to the sample."""

    def __init__(
        self, code_shape: tuple[int, ...], input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        patchify = Patchify(input_shape)
        width = hidden_dims[0] if hidden_dims else patchify.size
        layers: list[nn.Module] = [head(code_shape, (width, *patchify.grid), len(patchify.grid))[1], ToTokens()]
        if hidden_dims:
            layers += [Positions(patchify.grid, width), *blocks(hidden_dims, act)]
            layers.append(nn.Linear(hidden_dims[-1], patchify.size))
        else:
            activation(act)
        super().__init__(*layers, Unpatchify(patchify))
