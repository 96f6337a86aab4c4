"""Prediction of representations (I-JEPA, Assran et al. 2023), https://arxiv.org/abs/2301.08243

Contains masks of a context and of target blocks outside it, a network that follows another one, and a predictor. All
shapes are independent of the masks: `vit.attend_to_visible` ignores patches that are not seen.

Shapes: B batch, N patches, D width of a token, K blocks, S patches along a side.
"""

import copy

import torch
from torch import Tensor, nn

from aezoo.nets import vit
from aezoo.speed.linear import Linear

# share of the grid, and aspect ratio as a multiple of the grid's
_TARGET, _TARGET_ASPECT = (0.15, 0.2), (0.75, 1.5)
_CONTEXT, _CONTEXT_ASPECT = (0.85, 1.0), (1.0, 1.0)

Range = tuple[float, float]


def blocks(u_BK4: Tensor, grid: tuple[int, ...], share: Range, aspect: Range) -> Tensor:
    """Rectangular masks of a grid, from uniform noise for share, aspect, row and column: (B, K, 4) -> (B, K, N).

    Share and aspect are independent, as in the paper. The authors' code draws both from one number, and none of its
    blocks reaches the last row or column.
    """
    share_BK, aspect_BK = (low + (high - low) * u_BK4[..., i] for i, (low, high) in enumerate((share, aspect)))
    lines = []
    for i, (side, area_BK) in enumerate(zip(grid, (share_BK * aspect_BK, share_BK / aspect_BK), strict=True)):
        length_BK1 = (side * area_BK.sqrt()).round().clamp(1, side)[..., None]
        start_BK1 = (u_BK4[..., 2 + i, None] * (side - length_BK1 + 1)).floor()
        place_S = torch.arange(side, device=u_BK4.device)
        lines.append((place_S >= start_BK1) & (place_S < start_BK1 + length_BK1))
    return (lines[0][..., :, None] & lines[1][..., None, :]).flatten(2)


def masks(u_BL4: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The context, the target blocks, and which blocks count: (B, K + 1, 4) -> (B, N), (B, K, N), (B, K).

    The context contains no patch of a block that counts. On a coarse grid, the blocks may cover the whole context; then
    the last ones do not count. The first block alone is smaller than the context on any grid of two patches or more.
    """
    asked_BKN = blocks(u_BL4[:, 1:], grid, _TARGET, _TARGET_ASPECT)
    context_B1N = blocks(u_BL4[:, :1], grid, _CONTEXT, _CONTEXT_ASPECT)
    left_BKN = context_B1N & (asked_BKN.cumsum(1) == 0)
    counts_BK = left_BKN.any(2)
    return context_B1N[:, 0] & ~(asked_BKN & counts_BK[..., None]).any(1), asked_BKN, counts_BK


class Follower(nn.Module):
    """A network whose weights are moving averages of another's.

    They are buffers: saved, moved and restored with the model, and never trained.

    Args:
        leader: the other network; both start with its weights.
    """

    def __init__(self, leader: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(leader)
        for part in self.net.modules():
            for name, weight in [*part.named_parameters(recurse=False)]:
                delattr(part, name)
                part.register_buffer(name, weight.detach())

    @torch.no_grad()
    def follow(self, leader: nn.Module, rate: Tensor) -> None:
        """Move the weights towards the leader's by a share, `rate`, of the difference, ()."""
        named = dict(leader.named_parameters())
        own = [self.net.get_buffer(name) for name in named]
        ahead = torch._foreach_sub([*named.values()], own)
        torch._foreach_mul_(ahead, rate)
        torch._foreach_add_(own, ahead)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Predictor(nn.Module):
    """A narrow transformer on the tokens of a context and mask tokens.

    Args:
        grid: patches along each side.
        dims: width of the encoder's tokens and of the predictor's own.
        depth: number of blocks.
        act: an activation's name.
    """

    def __init__(self, grid: tuple[int, ...], dims: tuple[int, int], depth: int, act: str) -> None:
        super().__init__()
        self.embed, self.positions = Linear(*dims), vit.Positions(grid, dims[1])
        self.mask_token = nn.Parameter(0.02 * torch.randn(dims[1]))
        self.blocks, self.out = vit.blocks((dims[1],) * depth, act), Linear(dims[1], dims[0])

    def forward(self, tokens_BND: Tensor, seen_BN: Tensor, asked_BKN: Tensor) -> Tensor:
        """Codes at each block's positions from the seen tokens: (B, N, D), (B, N), (B, K, N) -> (B, K, N, D)."""
        given_BKND = torch.where(asked_BKN[..., None], self.mask_token, self.embed(tokens_BND)[:, None])
        here_AN = (seen_BN[:, None] | asked_BKN).flatten(0, 1)
        found_AND = self.out(vit.attend_to_visible(self.blocks, self.positions(given_BKND.flatten(0, 1)), here_AN))
        return found_AND.unflatten(0, asked_BKN.shape[:2])
