"""I-JEPA, image-based joint-embedding predictive architecture (Assran et al. 2023), https://arxiv.org/abs/2301.08243

An encoder f processes a context C, some patches of an image. A narrow predictor g predicts the codes of K target blocks
T_k, which C excludes. The target codes come from the target encoder f', whose input is the whole image and whose
weights are a moving average of those of f:

    L = N/K sum_k 1/|T_k| sum_{i in T_k} sum_d l(g_i(f(x_C), T_k)_d - s_id) - log p(x | h(sg f'(x)))    s = norm(f'(x))
    f' <- m f' + (1 - m) f before each step, m from 0.996 to 1

l is the smooth L1 loss of the authors' code, where the paper has the squared error; norm is that code's normalisation
of each patch's code, without weights. L is N D times their mean over patches and features, so that it is a sum over the
code, as nll is a sum over the data. The decoder h, which is not part of the paper, shows what a code contains: its
gradient stops at the code, so no gradient from pixels reaches f.

Blocks are drawn on the device for each sample, each with its own size. T_k covers a share of 0.15 to 0.2 of the grid,
with an aspect ratio of 0.75 to 1.5 times the grid's; C covers 0.85 to 1, with the grid's aspect ratio. Sizes are
rounded to patches. The authors' code uses one size per batch and truncates masks to the smallest; here, attention
ignores patches outside the context, so shapes do not depend on the masks. On a coarse grid, blocks T_k that would leave
C empty are not predicted. Codes are those of f', as in the paper.

Shapes: B batch, N patches, D width of a token, K blocks.
"""

import copy
import math
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.patch_transformer import PatchTransformer, PatchTransformerArgs
from aezoo.deprecated import renamed
from aezoo.errors import AezooError
from aezoo.nets import vit
from aezoo.training.limits import check_at_least
from aezoo.training.optimizers import known_steps

# each needs a pass through the predictor
_MOST_TARGETS = 64


# share of the grid, and aspect ratio relative to the grid's
_TARGET, _TARGET_ASPECT = (0.15, 0.2), (0.75, 1.5)
_CONTEXT, _CONTEXT_ASPECT = (0.85, 1.0), (1.0, 1.0)

Range = tuple[float, float]


def blocks(u_BK4: Tensor, grid: tuple[int, ...], share: Range, aspect: Range) -> Tensor:
    """Return rectangular masks of a grid from uniform noise for share, aspect, row and column, (B, K, 4) -> (B, K, N).

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
    """Return the context, the target blocks, and which blocks are used, (B, K + 1, 4) -> (B, N), (B, K, N), (B, K).

    The context contains no patch of a block that is used. On a coarse grid, the blocks may cover the whole context; the
    last ones are then not used. A single block is smaller than the context on any grid of two patches or more.
    """
    target_BKN = blocks(u_BL4[:, 1:], grid, _TARGET, _TARGET_ASPECT)
    context_B1N = blocks(u_BL4[:, :1], grid, _CONTEXT, _CONTEXT_ASPECT)
    left_BKN = context_B1N & (target_BKN.cumsum(1) == 0)
    counts_BK = left_BKN.any(2)
    return context_B1N[:, 0] & ~(target_BKN & counts_BK[..., None]).any(1), target_BKN, counts_BK


class EMAEncoder(nn.Module):
    """A network whose weights are moving averages of those of another network.

    The weights are buffers: saved, moved to devices and restored with the model, but not trained.

    Args:
        source: the other network, whose weights are copied initially.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(source)
        for part in self.net.modules():
            for name, weight in [*part.named_parameters(recurse=False)]:
                delattr(part, name)
                part.register_buffer(name, weight.detach())

    @torch.no_grad()
    def update_from(self, source: nn.Module, rate: Tensor) -> None:
        """Move the weights towards those of the source by a share `rate`, (), of the difference."""
        for name, weight in source.named_parameters():
            own = self.net.get_buffer(name)
            own.lerp_(weight, rate.to(own))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Predictor(nn.Module):
    """A narrow transformer on the tokens of a context and mask tokens.

    Args:
        grid: patches along each side.
        dims: widths of the encoder's and the predictor's tokens.
        depth: number of blocks.
        act: name of an activation.
    """

    def __init__(self, grid: tuple[int, ...], dims: tuple[int, int], depth: int, act: str) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(*dims), vit.Positions(grid, dims[1])
        self.mask_token = nn.Parameter(0.02 * torch.randn(dims[1]))
        self.blocks, self.out = vit.blocks((dims[1],) * depth, act), nn.Linear(dims[1], dims[0])

    def forward(self, tokens_BND: Tensor, context_BN: Tensor, target_BKN: Tensor) -> Tensor:
        """Predict codes at each block's positions from context tokens, (B, N, D), (B, N), (B, K, N) -> (B, K, N, D)."""
        given_BKND = torch.where(target_BKN[..., None], self.mask_token, self.embed(tokens_BND)[:, None])
        here_AN = (context_BN[:, None] | target_BKN).flatten(0, 1)
        found_AND = self.out(vit.attend_to_visible(self.blocks, self.positions(given_BKND.flatten(0, 1)), here_AN))
        return found_AND.unflatten(0, target_BKN.shape[:2])


class IJEPA(
    PatchTransformer,
    defaults={"decoder_width": 32, "decoder_depth": 1, "likelihood": "gaussian"},
    tags=("representation",),
):
    """Learns to predict the codes of hidden patches from visible ones, with a decoder as a probe.

    Args:
        input_shape: (C, H, W), any size of at least two patches.
        n_targets: K, number of blocks to predict.
        momentum: m of the target encoder at the start.
        momentum_steps: optimiser steps over which m rises to 1; 0 uses the number of steps of the run, if it is known.
        width: D, size of a token; the code has one token of the target encoder for each patch.
        predictor_width: size of the predictor's tokens.
        predictor_depth: number of blocks of the predictor.
        **kwargs: see `PatchTransformer`.
    """

    encoder: EMAEncoder
    steps: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        n_targets: int = 4,
        momentum: float = 0.996,
        momentum_steps: int = 0,
        predictor_width: int = 32,
        predictor_depth: int = 2,
        **kwargs: Unpack[PatchTransformerArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        if len(self.input_shape) != 3:
            raise AezooError(f"ijepa takes images (C, H, W), got {self.input_shape}: use mae, which has no blocks")
        check_at_least(1, n_targets=n_targets, predictor_width=predictor_width, predictor_depth=predictor_depth)
        check_at_least(0, momentum_steps=momentum_steps)
        if not (0 <= momentum <= 1 and n_targets <= _MOST_TARGETS):
            most = f"n_targets be at most {_MOST_TARGETS}"
            raise AezooError(f"momentum must lie between 0 and 1 and {most}, got {momentum} and {n_targets}")
        patchify = vit.Patchify(self.input_shape, self.patch_size)
        if patchify.n == 1:
            raise AezooError(
                f"ijepa predicts patches from others and {self.input_shape} is one: use a smaller patch_size"
            )
        self.n_targets = n_targets
        self.momentum = momentum
        self.momentum_steps = momentum_steps
        self.enable_step_counter()
        self.grid = patchify.grid
        width, activation = self.width, self.activation
        self.code_shape = (width, *patchify.grid)
        embed = nn.Sequential(patchify, vit.embedding(patchify.size, width), vit.Positions(self.grid, width))
        self.context = nn.Sequential(embed, vit.blocks(self.widths, activation), vit.ToMap(self.grid))
        self.encoder = EMAEncoder(self.context)
        self.predictor = Predictor(self.grid, (width, predictor_width), predictor_depth, activation)
        narrow, out = nn.Linear(width, self.decoder_width), nn.Linear(self.decoder_width, patchify.size)
        layers = vit.ToTokens(), narrow, vit.blocks(self.decoder_widths, activation), out
        self.decoder = nn.Sequential(*layers, vit.Unpatchify(patchify))

    def current_momentum(self) -> Tensor:
        """Return the momentum m at the current step, ()."""
        steps = self.momentum_steps or (math.inf if self._trainer is None else known_steps(self._trainer))
        return 1 - (1 - self.momentum) * (1 - self.step_fraction(steps))

    def begin_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor | None]:
        before = self.steps.clone()
        x, y = super().begin_step(batch, batch_idx)
        # once per optimiser step, even if several batches make a step
        self.encoder.update_from(self.context, (1 - self.current_momentum()) * (self.steps != before))
        return x, y

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        u_BL4 = torch.rand(len(x), self.n_targets + 1, 4, device=x.device)
        context_BN, target_BKN, counts_BK = masks(u_BL4, self.grid)
        with torch.no_grad():
            code = self.encoder(x)
            target_BND = at_least_float32(code.flatten(2).transpose(1, 2))
            target_BND = F.layer_norm(target_BND, target_BND.shape[2:])
        embed, layers, _ = self.context.children()
        found_BKND = at_least_float32(
            self.predictor(vit.attend_to_visible(layers, embed(x), context_BN), context_BN, target_BKN)
        )
        error_BKN = F.smooth_l1_loss(found_BKND, target_BND[:, None].expand_as(found_BKND), reduction="none").sum(3)
        error_BK = (error_BKN * target_BKN).sum(2) / target_BKN.sum(2)
        prediction = context_BN.shape[1] * ((error_BK * counts_BK).sum(1) / counts_BK.sum(1)).mean()
        nll = self.nll(self.decoder(code), x).mean()
        return {"loss": nll + prediction, "nll": nll, "prediction": prediction}


__getattr__ = renamed(__name__)
